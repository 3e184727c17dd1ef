//! Recognises models that make images, without reading more of them than that takes.
//!
//! Their contents are the business of mesh-diffusion; here they are told from models of text and vectors by the
//! form of their files.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use crate::file::has_extension;

/// The file at the root of a folder in diffusers' form.
pub const INDEX: &str = "model_index.json";

/// True if there is a model for images at `path`: a folder in diffusers' form, or one `.safetensors` file with the
/// tensors of a UNet under the names of the original Stable Diffusion.
pub fn is_image_model(path: &Path) -> bool {
    if path.is_dir() {
        return path.join(INDEX).is_file();
    }
    has_extension(path, "safetensors") && has_unet(path).unwrap_or(false)
}

/// The model for images that `name` refers to: a path, or a file or folder in one of `dirs`.
pub fn find(name: &str, dirs: &[PathBuf]) -> Option<PathBuf> {
    let inside = dirs
        .iter()
        .flat_map(|dir| [dir.join(name), dir.join(format!("{name}.safetensors"))])
        .filter(|_| !name.is_empty() && !name.contains(".."));
    std::iter::once(PathBuf::from(name))
        .chain(inside)
        .find(|path| is_image_model(path))
}

/// Looks for the tensors' names in the header of a safetensors file, whose length comes first. The header is read only
/// as far as the limit, whatever it says.
fn has_unet(path: &Path) -> std::io::Result<bool> {
    let mut file = File::open(path)?;
    let mut length = [0; 8];
    file.read_exact(&mut length)?;
    let length = u64::from_le_bytes(length).min(LONGEST_HEADER);
    let mut header = Vec::new();
    file.take(length).read_to_end(&mut header)?;
    let names = UNET.as_bytes();
    Ok(header.windows(names.len()).any(|window| window == names))
}

/// The beginning of a tensor's name, after the quote.
const UNET: &str = "\"model.diffusion_model.";

/// The header of Stable Diffusion XL has 0.4 MB.
const LONGEST_HEADER: u64 = 8 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    fn file(path: &Path, header: &str, length: u64) {
        let bytes = [&length.to_le_bytes(), header.as_bytes()].concat();
        std::fs::write(path, bytes).unwrap();
    }

    #[test]
    fn models_are_told_by_their_form() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        std::fs::create_dir(at("sd")).unwrap();
        assert!(!is_image_model(&at("sd")));
        std::fs::write(at("sd").join(INDEX), "{}").unwrap();
        assert!(is_image_model(&at("sd")));

        let unet = r#"{"model.diffusion_model.out.0.bias":{"dtype":"F16","shape":[1],"data_offsets":[0,2]}}"#;
        file(&at("one.safetensors"), unet, unet.len() as u64);
        assert!(is_image_model(&at("one.safetensors")));
        // A length that is a lie allocates nothing.
        file(&at("lie.safetensors"), unet, u64::MAX);
        assert!(is_image_model(&at("lie.safetensors")));
        let text = r#"{"model.embed_tokens.weight":{}}"#;
        file(&at("text.safetensors"), text, text.len() as u64);
        assert!(!is_image_model(&at("text.safetensors")));
        std::fs::write(at("short.safetensors"), [1, 2]).unwrap();
        assert!(!is_image_model(&at("short.safetensors")));
        assert!(!is_image_model(&at("none")));
    }

    #[test]
    fn names_are_looked_up_in_folders() {
        let folder = tempfile::tempdir().unwrap();
        let dirs = [folder.path().to_owned()];
        std::fs::create_dir(folder.path().join("sd")).unwrap();
        std::fs::write(folder.path().join("sd").join(INDEX), "{}").unwrap();
        let unet = "{\"model.diffusion_model.";
        file(&folder.path().join("one.safetensors"), unet, 40);
        assert_eq!(find("sd", &dirs), Some(folder.path().join("sd")));
        let one = folder.path().join("one.safetensors");
        assert_eq!(find("one", &dirs), Some(one.clone()));
        assert_eq!(find("one.safetensors", &dirs), Some(one));
        assert_eq!(find("../sd", &dirs), None);
        assert_eq!(find("", &dirs), None);
    }
}
