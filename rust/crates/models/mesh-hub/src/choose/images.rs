//! The files of a model for images in diffusers' form.

use mesh_model::image;

use crate::listing::{Repo, RepoFile};

/// Folders with weights, each with the beginning of their files' names.
const MODULES: [(&str, &str); 4] = [
    ("unet", "diffusion_pytorch_model"),
    ("vae", "diffusion_pytorch_model"),
    ("text_encoder", "model"),
    ("text_encoder_2", "model"),
];

/// Files that describe a model; those that exist are taken.
const DESCRIPTIONS: [&str; 16] = [
    image::INDEX,
    "scheduler/scheduler_config.json",
    "unet/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "text_encoder_2/config.json",
    "tokenizer/vocab.json",
    "tokenizer/merges.txt",
    "tokenizer/special_tokens_map.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/tokenizer.json",
    "tokenizer_2/vocab.json",
    "tokenizer_2/merges.txt",
    "tokenizer_2/special_tokens_map.json",
    "tokenizer_2/tokenizer_config.json",
    "tokenizer_2/tokenizer.json",
];

/// Name of the variant with weights of 16 bits, which a user may write behind the repository's.
pub(super) const HALF: &str = "fp16";

/// Files with weights, and those that describe them.
type Files = (Vec<RepoFile>, Vec<RepoFile>);

/// The files of `repo` if it has a model for images; of the weights those of 16 bits if `half` or if there are no others.
pub(super) fn files(repo: &Repo, half: bool) -> Option<Result<Files, String>> {
    repo.file(image::INDEX)?;
    Some(files_of(repo, half))
}

fn files_of(repo: &Repo, half: bool) -> Result<Files, String> {
    let mut weights = Vec::new();
    let mut others: Vec<RepoFile> = DESCRIPTIONS
        .iter()
        .filter_map(|path| repo.file(path).cloned())
        .collect();
    let endings = match half {
        true => [".fp16", ""],
        false => ["", ".fp16"],
    };
    for (folder, stem) in MODULES {
        let prefix = format!("{folder}/");
        if !repo.files.iter().any(|file| file.path.starts_with(&prefix)) {
            continue;
        }
        let found = endings
            .iter()
            .find_map(|ending| module(repo, folder, stem, ending));
        let Some((mut of_module, index)) = found else {
            return Err(format!(
                "it has no {folder}/{stem}.safetensors, and pickled weights can run code and are not read; look for a repository of the \
                 same model that has safetensors"
            ));
        };
        weights.append(&mut of_module);
        others.extend(index);
    }
    Ok((weights, others))
}

/// The one file of a module's weights, or all of several with their index.
fn module(
    repo: &Repo,
    folder: &str,
    stem: &str,
    ending: &str,
) -> Option<(Vec<RepoFile>, Option<RepoFile>)> {
    if let Some(file) = repo.file(&format!("{folder}/{stem}{ending}.safetensors")) {
        return Some((vec![file.clone()], None));
    }
    let indexes = [
        format!("{folder}/{stem}.safetensors.index{ending}.json"),
        format!("{folder}/{stem}{ending}.safetensors.index.json"),
    ];
    let index = indexes.iter().find_map(|path| repo.file(path))?;
    let shards = repo.files.iter().filter(|file| {
        let name = file
            .path
            .strip_prefix(folder)
            .and_then(|name| name.strip_prefix('/'));
        name.is_some_and(|name| is_shard(name, stem, ending))
    });
    let shards: Vec<RepoFile> = shards.cloned().collect();
    (!shards.is_empty()).then(|| (shards, Some(index.clone())))
}

/// True for `STEM.fp16-00001-of-00002.safetensors` and `STEM-00001-of-00002.fp16.safetensors` with the ending `.fp16`.
fn is_shard(name: &str, stem: &str, ending: &str) -> bool {
    let middle = name
        .strip_suffix(".safetensors")
        .and_then(|name| name.strip_prefix(stem));
    let numbers = |text: &str| {
        let of = text
            .strip_prefix('-')
            .and_then(|text| text.split_once("-of-"));
        let digits =
            |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        of.is_some_and(|(number, total)| digits(number) && digits(total))
    };
    middle.is_some_and(|middle| {
        let before = middle.strip_prefix(ending).is_some_and(numbers);
        before || middle.strip_suffix(ending).is_some_and(numbers)
    })
}
