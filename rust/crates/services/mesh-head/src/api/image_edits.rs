//! `/v1/images/edits`: an image to change, as a form with files or as JSON.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use mesh_control::image_upload::{self, Size};
use mesh_proto::ImageCard;
use serde_json::Value;

use crate::api::fields::{Api, Fields};
use crate::api::form::Form;
use crate::api::images::{AskedImages, first_of};
use crate::api::invalid::Invalid;
use crate::api::json;
use crate::flight::task::InitialPixels;

/// A checked request for changed images, whose files are not read yet.
#[derive(Debug, Clone, PartialEq)]
pub struct AskedEdit {
    /// All but the files.
    pub images: AskedImages,
    /// Share of the steps that are run.
    pub strength: Option<f32>,
    /// The file of the image.
    pub image: Bytes,
    /// The file of the mask.
    pub mask: Option<Bytes>,
}

impl AskedEdit {
    /// Reads a body: a form if `content_type` says so, else JSON.
    ///
    /// # Errors
    /// [`Invalid`] names the field that is wrong or not supported.
    pub fn parse(content_type: &str, body: &Bytes) -> Result<Self, Invalid> {
        if !is_form(content_type) {
            let object = json::object(body)?;
            let fields = Fields::of(&object);
            let image = from_json(fields, "image")?;
            let mask = from_json(fields, "mask")?;
            return Self::of(fields, image, mask);
        }
        let Form { fields, mut files } = Form::read(content_type, body.clone(), TEXTS, FILES)?;
        let mut take = |name: &str| -> Result<Option<Bytes>, Invalid> {
            let mut found = files.extract_if(.., |(field, _)| field == name);
            let first = found.next().map(|(_, file)| file);
            match found.count() {
                0 => Ok(first),
                more => Err(several(name, more + 1)),
            }
        };
        let (image, mask) = (take("image")?, take("mask")?);
        Self::of(Fields::new(&fields), image, mask)
    }

    fn of(fields: Fields<'_>, image: Option<Bytes>, mask: Option<Bytes>) -> Result<Self, Invalid> {
        let images = AskedImages::of(Api::ImageEdits, fields)?;
        let strength = first_of(STRENGTH, |name| {
            let strength = fields.number(name, 0.0..=1.0)?;
            match strength {
                Some(0.0) => {
                    let text = format!(
                        "'{name}' is 0, so the image would stay as it is; use 0.8, or more to change more"
                    );
                    Err(Invalid::new(name, text))
                }
                strength => Ok(strength),
            }
        })?;
        let image = image.filter(|file| !file.is_empty());
        Ok(Self {
            images,
            strength,
            image: image.ok_or_else(|| Invalid::missing("image"))?,
            // An empty part is a field that a web page left out.
            mask: mask.filter(|file| !file.is_empty()),
        })
    }

    /// Reads the files, and puts their pixels and the size of the image into the request. `card` has the model's own size
    /// and limit. It takes a while and much memory.
    ///
    /// # Errors
    /// [`Invalid`] names the file that cannot be used.
    pub fn read_files(self, card: &ImageCard) -> Result<AskedImages, Invalid> {
        let mut images = self.images;
        let size = match images.request.size {
            Some((width, height)) => Size::Exactly(width, height),
            None => {
                let own = u64::from(card.width) * u64::from(card.height);
                let most = match card.most_pixels {
                    0 => u64::MAX,
                    most => most,
                };
                Size::Own {
                    most_pixels: most.min(own * MOST_OF_OWN),
                    least_side: card.least_side,
                }
            }
        };
        let read = image_upload::read(&self.image, self.mask.as_deref(), size);
        let pixels = read.map_err(|unusable| Invalid::new(unusable.field, unusable.reason))?;
        let own = if pixels.masked {
            1.0
        } else {
            STRENGTH_OF_IMAGES
        };
        images.request.size = Some((pixels.width, pixels.height));
        images.request.init = Some(InitialPixels {
            strength: self.strength.unwrap_or(own),
            masked: pixels.masked,
            pixels: pixels.bytes.into(),
        });
        Ok(images)
    }
}

/// True if a body of this content type is a form.
pub(crate) fn is_form(content_type: &str) -> bool {
    let essence = content_type.split(';').next().unwrap_or_default();
    essence.trim().eq_ignore_ascii_case("multipart/form-data")
}

/// A file in base64 or as a `data:` URL, alone or in a list of one.
fn from_json(fields: Fields<'_>, name: &str) -> Result<Option<Bytes>, Invalid> {
    let value = match fields.get(name) {
        None => return Ok(None),
        Some(Value::Array(list)) => match &list[..] {
            [] => return Ok(None),
            [one] => one,
            several_of => return Err(several(name, several_of.len())),
        },
        Some(value) => value,
    };
    let expected = "a file in base64 or as a data: URL";
    let text = value.as_str();
    let text = text.ok_or_else(|| Invalid::wrong_type(name, expected, value))?;
    let encoded = match text.strip_prefix("data:") {
        None => text,
        Some(url) => match url.split_once(";base64,") {
            Some((_, encoded)) => encoded,
            None => {
                let text = format!("'{name}' is a data: URL without base64; send {expected}");
                return Err(Invalid::new(name, text));
            }
        },
    };
    let decoded = STANDARD.decode(encoded.trim_ascii());
    let decoded = decoded.map_err(|error| {
        let text = format!("'{name}' is not {expected}: {error}");
        Invalid::new(name, text)
    })?;
    Ok(Some(decoded.into()))
}

fn several(name: &str, count: usize) -> Invalid {
    let text = format!("'{name}' has {count} files, but the limit is 1: send one image at a time");
    Invalid::new(name, text)
}

/// Fields of forms that are files, and those that are texts even if they look like numbers.
const FILES: &[&str] = &["image", "mask"];
const TEXTS: &[&str] = &["prompt", "negative_prompt", "model", "user", "size"];

const STRENGTH: &[&str] = &["strength", "denoising_strength", "prompt_strength"];

/// Strength of requests that set none and have no mask, as in diffusers.
const STRENGTH_OF_IMAGES: f32 = 0.8;

/// Pixels of the model's own size times this are the most that an upload keeps of its own size: models make larger images
/// badly, and slowly.
const MOST_OF_OWN: u64 = 4;

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn png(width: u32, height: u32) -> Vec<u8> {
        let mut file = Vec::new();
        let mut encoder = png::Encoder::new(&mut file, width, height);
        encoder.set_color(png::ColorType::Rgb);
        let mut writer = encoder.write_header().unwrap();
        let colours = vec![7; (width * height * 3) as usize];
        writer.write_image_data(&colours).unwrap();
        writer.finish().unwrap();
        file
    }

    fn parse(more: Value) -> Result<AskedEdit, Invalid> {
        let mut body = json!({"prompt": "a fox", "image": STANDARD.encode(png(80, 100))});
        let map = body.as_object_mut().unwrap();
        map.extend(more.as_object().unwrap().clone());
        AskedEdit::parse("application/json", &body.to_string().into())
    }

    fn form(parts: &[(&str, &[u8])]) -> Result<AskedEdit, Invalid> {
        let mut body = Vec::new();
        for (name, value) in parts {
            let head = format!(
                "--B\r\nContent-Disposition: form-data; name=\"{name}\"; filename=\"f\"\r\n\r\n"
            );
            body.extend_from_slice(head.as_bytes());
            body.extend_from_slice(value);
            body.extend_from_slice(b"\r\n");
        }
        body.extend_from_slice(b"--B--\r\n");
        AskedEdit::parse("Multipart/Form-Data; boundary=B", &body.into())
    }

    fn card() -> ImageCard {
        ImageCard {
            width: 64,
            height: 64,
            least_side: 64,
            ..ImageCard::default()
        }
    }

    #[test]
    fn json_and_forms_ask_for_the_same() {
        let file = png(80, 100);
        let by_form = form(&[
            ("image", &file),
            ("prompt", b"a fox"),
            ("seed", b"7"),
            ("strength", b"0.5"),
            ("response_format", b"url"),
            ("mask", b""),
        ]);
        let by_json = parse(json!({"seed": 7, "strength": 0.5, "response_format": "url"}));
        assert_eq!(by_form, by_json);
        let url = format!("data:image/png;base64,{}", STANDARD.encode(&file));
        let by_url = parse(json!({
            "image": [url], "seed": 7, "denoising_strength": 0.5, "response_format": "url", "mask": null,
        }));
        assert_eq!(by_url, by_json);
    }

    #[test]
    fn files_become_pixels_of_the_size() {
        let asked = parse(json!({"size": "72x64"})).unwrap();
        let request = asked.read_files(&card()).unwrap().request;
        let init = request.init.unwrap();
        assert_eq!(request.size, Some((72, 64)));
        assert_eq!((init.pixels.len(), init.strength), (72 * 64 * 3, 0.8));
        // Its own size in multiples of 8, no more than four times the model's.
        let asked = parse(json!({"size": "auto"})).unwrap();
        let size = asked.read_files(&card()).unwrap().request.size;
        assert_eq!(size, Some((80, 96)));
        let large = STANDARD.encode(png(400, 400));
        let asked = parse(json!({"image": large})).unwrap();
        let size = asked.read_files(&card()).unwrap().request.size;
        assert_eq!(size, Some((128, 128)));
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (body, param, words) in [
            (json!({"image": null}), "image", "Missing"),
            (json!({"image": 5}), "image", "base64"),
            (json!({"image": "not base64"}), "image", "base64"),
            (json!({"image": "data:,x"}), "image", "without base64"),
            (json!({"image": ["AA==", "AA=="]}), "image", "limit is 1"),
            (json!({"mask": ["AA==", "AA=="]}), "mask", "limit is 1"),
            (json!({"strength": 0}), "strength", "stay as it is"),
            (json!({"strength": 1.5}), "strength", "between 0 and 1"),
            (json!({"prompt": ""}), "prompt", "empty"),
            (json!({"partial_images": 2}), "partial_images", "stream"),
        ] {
            let invalid = parse(body.clone()).expect_err(&body.to_string());
            assert_eq!(invalid.param, param, "{body}");
            assert!(invalid.message.contains(words), "{invalid}");
        }
        let file = png(64, 64);
        let twice = form(&[("image[]", &file), ("image[]", &file), ("prompt", b"x")]);
        assert!(twice.unwrap_err().message.contains("'image' has 2 files"));
        let none = form(&[("prompt", b"x")]).unwrap_err();
        assert_eq!(none.param, "image");
        let junk = form(&[("prompt", b"x"), ("image", b"GIF89a")]).unwrap();
        let invalid = junk.read_files(&card()).unwrap_err();
        assert_eq!(invalid.param, "image");
    }
}
