//! Selection of the files of a repository that a model needs.

mod images;

use std::collections::HashMap;

use mesh_model::file::has_extension;
use mesh_model::gguf::split::PartName;
use mesh_model::hf::{INDEX, files_of_index};

use crate::error::HubError;
use crate::listing::{Repo, RepoFile};

/// Storage format of a model's weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// One GGUF file with everything in it, or all parts of a split one.
    Gguf,
    /// `config.json`, `tokenizer.json` and safetensors files, or a model for images in diffusers' form.
    Safetensors,
}

/// The files that a model needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chosen {
    /// Storage format of the weights.
    pub format: Format,
    /// The name the model gets: that of the GGUF file without its ending and the numbers of a part, or the
    /// repository's without the organisation.
    pub name: String,
    /// Files with the weights.
    pub weights: Vec<RepoFile>,
    /// All other files; they are small.
    pub others: Vec<RepoFile>,
}

impl Chosen {
    /// All files, weights first.
    pub fn files(&self) -> impl Iterator<Item = &RepoFile> {
        self.weights.iter().chain(&self.others)
    }
}

/// Files that describe a model of safetensors files; those that exist are taken. Those of
/// sentence-transformers hold the pooling of embedding models.
const DESCRIPTIONS: &[&str] = &[
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "1_Pooling/config.json",
    "2_Normalize/config.json",
];

/// Quantisations to choose from by default, in order of preference.
const USUAL: &[&str] = &["Q4_K_M", "Q4_0", "Q4_1", "Q4_K_S", "Q5_K_M", "Q8_0"];

/// Selects the files of `repo` that make up the model `which`: a quantisation or a file, or by default the
/// repository's most likely purpose. `index` is the content of [`INDEX`], if the repository has one.
///
/// # Errors
/// If nothing fits, or more than one thing does: the message names what there is.
pub fn choose(repo: &Repo, which: Option<&str>, index: Option<&[u8]>) -> Result<Chosen, HubError> {
    let failed = |reason: String| HubError::Choice {
        repo: repo.id.clone(),
        reason,
    };
    let half = which == Some(images::HALF);
    if (which.is_none() || half)
        && let Some(files) = images::files(repo, half)
    {
        let (weights, others) = files.map_err(failed)?;
        return Ok(Chosen {
            format: Format::Safetensors,
            name: repo.id.rsplit('/').next().unwrap_or(&repo.id).to_owned(),
            weights,
            others,
        });
    }
    let ggufs = ggufs(repo);
    if let Some(which) = which {
        if let Some(file) = repo.file(which) {
            return match () {
                () if is_gguf(file) => gguf(&GgufModel::of(repo, file)).map_err(failed),
                () if has_extension(file.path.as_ref(), "safetensors") => {
                    safetensors(repo, vec![file.clone()]).map_err(failed)
                }
                () => Err(failed(format!(
                    "{which} is neither a .gguf nor a .safetensors file; {}",
                    offer(&ggufs)
                ))),
            };
        }
        let named = ggufs.iter().find(|model| model.is_called(which));
        let mut fitting = ggufs.iter().filter(|model| model.has_quantisation(which));
        return match (named, fitting.next(), fitting.next()) {
            (Some(model), _, _) | (None, Some(model), None) => gguf(model).map_err(failed),
            (None, Some(first), Some(second)) => Err(failed(format!(
                "{which} may mean {} or {}; write the path of one file behind ':'",
                first.path, second.path
            ))),
            (None, None, _) => Err(failed(format!(
                "it has no quantisation or file {which:?}; {}",
                offer(&ggufs)
            ))),
        };
    }
    if let Some(weights) = all_safetensors(repo, index).map_err(failed)? {
        return safetensors(repo, weights).map_err(failed);
    }
    if let [only] = &ggufs[..] {
        return gguf(only).map_err(failed);
    }
    for usual in USUAL {
        let fitting: Vec<_> = ggufs
            .iter()
            .filter(|model| model.has_quantisation(usual))
            .collect();
        if let [only] = fitting[..] {
            return gguf(only).map_err(failed);
        }
    }
    Err(failed(match ggufs.is_empty() {
        true => "it holds no model that can be served: neither a .gguf file nor safetensors with config.json and tokenizer.json".to_owned(),
        false => format!("it holds several models; {}", offer(&ggufs)),
    }))
}

/// A GGUF file of a repository, or all parts of one.
struct GgufModel<'a> {
    /// Path of the file, or of the first part that is there.
    path: &'a str,
    /// Path without the ending and the numbers of a part.
    stem: String,
    /// The file, or the parts by number.
    files: Vec<&'a RepoFile>,
}

impl<'a> GgufModel<'a> {
    /// The model that `file` is, or is a part of.
    fn of(repo: &'a Repo, file: &'a RepoFile) -> Self {
        let Some(part) = PartName::parse(&file.path) else {
            return GgufModel::beginning_with(file);
        };
        let files: Vec<_> = part.all().filter_map(|path| repo.file(&path)).collect();
        let first = files.first().copied().unwrap_or(file);
        GgufModel {
            files,
            ..GgufModel::beginning_with(first)
        }
    }

    /// The model whose first file is this one; others may follow.
    fn beginning_with(file: &'a RepoFile) -> Self {
        let whole = || file.path[..file.path.len() - ".gguf".len()].to_owned();
        GgufModel {
            path: &file.path,
            stem: PartName::parse(&file.path).map_or_else(whole, |part| part.stem),
            files: vec![file],
        }
    }

    /// Paths of parts that the repository lacks.
    fn missing(&self) -> Vec<String> {
        let is_here = |path: &String| self.files.iter().any(|file| file.path == *path);
        let parts = PartName::parse(self.path)
            .map(|part| part.all().filter(|path| !is_here(path)).collect());
        parts.unwrap_or_default()
    }

    /// True if `name` is the path of all parts without their numbers.
    fn is_called(&self, name: &str) -> bool {
        let stem = name.strip_suffix(".gguf").unwrap_or(name);
        self.stem == stem && self.path != name
    }

    fn has_quantisation(&self, wanted: &str) -> bool {
        has_quantisation(self.path, wanted)
    }
}

/// The models in GGUF files, by path.
fn ggufs(repo: &Repo) -> Vec<GgufModel<'_>> {
    let mut models: Vec<GgufModel<'_>> = Vec::new();
    // Positions of the split models, by the name of the first part, which may be missing.
    let mut split: HashMap<String, usize> = HashMap::new();
    // Files are sorted, so parts come by number.
    for file in repo.files.iter().filter(|file| is_model_gguf(file)) {
        let first = PartName::parse(&file.path).and_then(|part| part.all().next());
        let new = models.len();
        let at = first.map_or(new, |first| *split.entry(first).or_insert(new));
        match models.get_mut(at) {
            Some(model) => model.files.push(file),
            None => models.push(GgufModel::beginning_with(file)),
        }
    }
    models
}

fn gguf(model: &GgufModel<'_>) -> Result<Chosen, String> {
    let missing = model.missing();
    if let [first, ..] = &missing[..] {
        return Err(format!(
            "{} is one of {} parts of a split GGUF file, of which it lacks {}: {first}; take another quantisation or revision",
            model.path,
            model.files.len() + missing.len(),
            missing.len()
        ));
    }
    let name = model.stem.rsplit('/').next().unwrap_or(&model.stem);
    Ok(Chosen {
        format: Format::Gguf,
        name: name.to_owned(),
        weights: model.files.iter().copied().cloned().collect(),
        others: Vec::new(),
    })
}

fn safetensors(repo: &Repo, weights: Vec<RepoFile>) -> Result<Chosen, String> {
    for needed in ["config.json", "tokenizer.json"] {
        if repo.file(needed).is_none() {
            return Err(format!(
                "it has safetensors, but no {needed}, without which they cannot be served; look for a repository of the same model that has one"
            ));
        }
    }
    let others = DESCRIPTIONS.iter().filter_map(|path| repo.file(path));
    let mut others: Vec<RepoFile> = others.cloned().collect();
    if weights.len() > 1 {
        others.extend(repo.file(INDEX).cloned());
    }
    Ok(Chosen {
        format: Format::Safetensors,
        name: repo.id.rsplit('/').next().unwrap_or(&repo.id).to_owned(),
        weights,
        others,
    })
}

/// The safetensors files of a whole model, if the repository has one.
fn all_safetensors(repo: &Repo, index: Option<&[u8]>) -> Result<Option<Vec<RepoFile>>, String> {
    if let Some(file) = repo.file("model.safetensors") {
        return Ok(Some(vec![file.clone()]));
    }
    let Some(index) = index else {
        return Ok(None);
    };
    let shards = files_of_index(index).map_err(|error| error.to_string())?;
    shards
        .into_iter()
        .map(|shard| {
            repo.file(&shard)
                .cloned()
                .ok_or_else(|| format!("{INDEX} names {shard}, which it has not"))
        })
        .collect::<Result<_, _>>()
        .map(Some)
}

fn is_gguf(file: &RepoFile) -> bool {
    has_extension(file.path.as_ref(), "gguf")
}

/// Not what goes beside a model: projectors of images, importance matrices.
fn is_model_gguf(file: &RepoFile) -> bool {
    let name = file.path.rsplit('/').next().unwrap_or_default();
    let name = name.to_ascii_lowercase();
    is_gguf(file) && !name.starts_with("mmproj") && !name.contains("imatrix")
}

/// True if a file's name contains a quantisation, as `model-Q4_K_M.gguf` and `model.q4_k_m.gguf` do and
/// `model-IQ4_K_M.gguf` does not.
fn has_quantisation(path: &str, wanted: &str) -> bool {
    if wanted.is_empty() {
        return false;
    }
    let name = path.rsplit('/').next().unwrap_or(path).to_ascii_lowercase();
    let wanted = wanted.to_ascii_lowercase();
    name.match_indices(&wanted).any(|(at, _)| {
        let before = name[..at].chars().next_back();
        let behind = name[at + wanted.len()..].chars().next();
        let edge = |c: Option<char>| !c.is_some_and(|c| c.is_alphanumeric() || c == '_');
        edge(before) && edge(behind)
    })
}

/// The names that a user may write.
fn offer(ggufs: &[GgufModel<'_>]) -> String {
    const SHOWN: usize = 30;
    let mut names: Vec<&str> = ggufs.iter().map(|model| model.path).collect();
    let more = names.len().saturating_sub(SHOWN);
    names.truncate(SHOWN);
    match (names.is_empty(), more) {
        (true, _) => "it has no .gguf files".to_owned(),
        (false, 0) => format!(
            "write one of these behind ':', or its quantisation: {}",
            names.join(", ")
        ),
        (false, more) => format!(
            "write one of these behind ':', or its quantisation: {} and {more} more",
            names.join(", ")
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn repo(paths: &[&str]) -> Repo {
        Repo {
            id: "acme/Tiny".to_owned(),
            commit: "0".repeat(40),
            files: paths
                .iter()
                .map(|&path| RepoFile {
                    path: path.to_owned(),
                    bytes: Some(1),
                    sha256: None,
                    blob_id: None,
                })
                .collect(),
        }
    }

    fn chosen(paths: &[&str], which: Option<&str>) -> Result<Vec<String>, String> {
        let chosen = choose(&repo(paths), which, None).map_err(|error| error.to_string())?;
        Ok(chosen.files().map(|file| file.path.clone()).collect())
    }

    #[test]
    fn a_model_for_images_is_taken_in_one_precision_with_its_descriptions() {
        let files = [
            "README.md",
            "model_index.json",
            "scheduler/scheduler_config.json",
            "sd.safetensors",
            "text_encoder/config.json",
            "text_encoder/model.fp16.safetensors",
            "text_encoder/model.safetensors",
            "text_encoder/pytorch_model.bin",
            "tokenizer/merges.txt",
            "tokenizer/vocab.json",
            "unet/config.json",
            "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
            "unet/diffusion_pytorch_model-00002-of-00002.safetensors",
            "unet/diffusion_pytorch_model.fp16.safetensors",
            "unet/diffusion_pytorch_model.non_ema.safetensors",
            "unet/diffusion_pytorch_model.safetensors.index.json",
            "vae/config.json",
            "vae/diffusion_pytorch_model.fp16.safetensors",
        ];
        let without = |left_out: &[usize]| {
            let kept = files.iter().enumerate();
            let kept = kept.filter(|(index, _)| !left_out.contains(index));
            let mut kept: Vec<&str> = kept.map(|(_, file)| *file).collect();
            kept.sort_unstable();
            kept
        };
        let sorted = |which| {
            let mut files = chosen(&files, which).unwrap();
            files.sort_unstable();
            files
        };
        assert_eq!(sorted(None), without(&[0, 3, 5, 7, 13, 14]));
        assert_eq!(sorted(Some("fp16")), without(&[0, 3, 6, 7, 11, 12, 14, 15]));
        let pickled = ["model_index.json", "unet/diffusion_pytorch_model.bin"];
        let error = chosen(&pickled, None).unwrap_err();
        assert!(
            error.contains("unet/diffusion_pytorch_model.safetensors"),
            "{error}"
        );
    }

    const GGUFS: &[&str] = &[
        "README.md",
        "Tiny-IQ4_XS.gguf",
        "Tiny-Q4_K_M.gguf",
        "Tiny-Q8_0.gguf",
        "Tiny-f16-00001-of-00002.gguf",
        "Tiny-f16-00002-of-00002.gguf",
        "mmproj-Tiny-Q8_0.gguf",
    ];

    #[test]
    fn a_quantisation_is_found_in_any_spelling() {
        assert_eq!(chosen(GGUFS, Some("Q8_0")).unwrap(), ["Tiny-Q8_0.gguf"]);
        assert_eq!(chosen(GGUFS, Some("q4_k_m")).unwrap(), ["Tiny-Q4_K_M.gguf"]);
        assert_eq!(
            chosen(GGUFS, Some("Tiny-IQ4_XS.gguf")).unwrap(),
            ["Tiny-IQ4_XS.gguf"]
        );
        // Parts of words do not count.
        assert!(
            chosen(GGUFS, Some("Q4"))
                .unwrap_err()
                .contains("Tiny-Q4_K_M.gguf")
        );
        assert!(chosen(GGUFS, Some("Q4_XS")).is_err());
    }

    #[test]
    fn without_a_wish_the_usual_one_is_taken() {
        assert_eq!(chosen(GGUFS, None).unwrap(), ["Tiny-Q4_K_M.gguf"]);
        assert_eq!(chosen(&["x-Q2_K.gguf"], None).unwrap(), ["x-Q2_K.gguf"]);
        let two = chosen(&["x-Q2_K.gguf", "x-Q3_K_S.gguf"], None).unwrap_err();
        assert!(two.contains("x-Q2_K.gguf, x-Q3_K_S.gguf"), "{two}");
        let none = chosen(&["pytorch_model.bin"], None).unwrap_err();
        assert!(none.contains("no model that can be served"), "{none}");
    }

    #[test]
    fn all_parts_of_a_split_file_are_one_choice() {
        let both = [
            "Tiny-f16-00001-of-00002.gguf",
            "Tiny-f16-00002-of-00002.gguf",
        ];
        for which in ["f16", "F16", both[0], both[1], "Tiny-f16", "Tiny-f16.gguf"] {
            assert_eq!(chosen(GGUFS, Some(which)).unwrap(), both, "{which}");
        }
        let whole = choose(&repo(GGUFS), Some("f16"), None).unwrap();
        assert_eq!((&*whole.name, whole.format), ("Tiny-f16", Format::Gguf));
        // Also where it is the only one, or the usual one, in a folder of its own.
        assert_eq!(chosen(&both, None).unwrap(), both);
        let folders = [
            "Q4_K_M/Tiny-Q4_K_M-00001-of-00003.gguf",
            "Q4_K_M/Tiny-Q4_K_M-00002-of-00003.gguf",
            "Q4_K_M/Tiny-Q4_K_M-00003-of-00003.gguf",
            "Q8_0/Tiny-Q8_0-00001-of-00002.gguf",
            "Q8_0/Tiny-Q8_0-00002-of-00002.gguf",
        ];
        assert_eq!(chosen(&folders, None).unwrap(), folders[..3]);
        let chosen = choose(&repo(&folders), Some("Q8_0"), None).unwrap();
        assert_eq!((&*chosen.name, chosen.weights.len()), ("Tiny-Q8_0", 2));
    }

    #[test]
    fn two_split_files_of_one_quantisation_are_told_apart_by_their_paths() {
        let two = [
            "A-Q4_0-00001-of-00002.gguf",
            "A-Q4_0-00002-of-00002.gguf",
            "B-Q4_0-00001-of-00002.gguf",
            "B-Q4_0-00002-of-00002.gguf",
        ];
        let error = chosen(&two, Some("Q4_0")).unwrap_err();
        assert!(error.contains(two[0]) && error.contains(two[2]), "{error}");
        assert_eq!(chosen(&two, Some(two[3])).unwrap(), two[2..]);
    }

    #[test]
    fn a_split_file_of_which_a_part_is_missing_is_refused() {
        let two = ["m-Q4_0-00002-of-00003.gguf", "m-Q4_0-00003-of-00003.gguf"];
        for which in [None, Some("Q4_0"), Some(two[1])] {
            let error = chosen(&two, which).unwrap_err();
            assert!(error.contains("m-Q4_0-00001-of-00003.gguf"), "{error}");
            assert!(error.contains("one of 3 parts"), "{error}");
        }
    }

    #[test]
    fn a_folder_of_safetensors_comes_with_what_describes_it() {
        let files = [
            "README.md",
            "config.json",
            "model.safetensors",
            "onnx/model.onnx",
            "pytorch_model.bin",
            "tokenizer.json",
            "1_Pooling/config.json",
        ];
        assert_eq!(
            chosen(&files, None).unwrap(),
            [
                "model.safetensors",
                "config.json",
                "tokenizer.json",
                "1_Pooling/config.json"
            ]
        );
        let error = chosen(&["config.json", "model.safetensors"], None).unwrap_err();
        assert!(error.contains("no tokenizer.json"), "{error}");
    }

    #[test]
    fn shards_are_those_of_the_index() {
        let repo = repo(&[
            "config.json",
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
            "model.safetensors.index.json",
            "other.safetensors",
            "tokenizer.json",
        ]);
        let index = br#"{"metadata":{}, "weight_map":{"a":"model-00002-of-00002.safetensors","b":"model-00001-of-00002.safetensors"}}"#;
        let chosen = choose(&repo, None, Some(index)).unwrap();
        assert_eq!(chosen.weights.len(), 2);
        assert_eq!(chosen.name, "Tiny");
        assert!(chosen.others.iter().any(|file| file.path == INDEX));
        for bad in [
            &b"{}"[..],
            br#"{"weight_map":{"a":"../../etc/passwd.safetensors"}}"#,
            br#"{"weight_map":{"a":"missing.safetensors"}}"#,
            br#"{"weight_map":{}}"#,
            br#"{"weight_map":{"a":7}}"#,
            b"\xff",
        ] {
            let error = choose(&repo, None, Some(bad)).unwrap_err();
            assert!(error.to_string().contains(INDEX), "{error}");
        }
    }
}
