//! Split GGUF files: the names of their parts, and finding them on the disk.
//!
//! llama.cpp's `gguf-split` cuts a model into files called `STEM-00001-of-00003.gguf`, numbered from 1 with
//! five digits. Each is a GGUF file with its own list of tensors. The first one has the model's keys, and
//! perhaps no tensors.

use std::fmt::Display;
use std::io;
use std::path::{Path, PathBuf};

use data_encoding::HEXLOWER;
use sha2::{Digest, Sha256};

use super::error::SplitError;
use crate::file::has_extension;

/// Maximum number of parts; every one takes a file descriptor while the model is loaded. The largest known
/// models have about a hundred.
pub const MAX_PARTS: u32 = 512;

const ENDING: &str = ".gguf";

/// The name of one part of a split GGUF file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PartName {
    /// The name that all parts have before their numbers; with the folder, if the part's has one.
    pub stem: String,
    /// Number of the part, from 1.
    pub number: u32,
    /// Number of parts, from 2 to [`MAX_PARTS`].
    pub count: u32,
    /// `.gguf`, as it is written.
    ending: String,
}

impl PartName {
    /// Reads the name of a file, or its path; `None` if that of no part.
    pub fn parse(name: &str) -> Option<PartName> {
        let name = read_numbers(name)?;
        let is_sound =
            (2..=MAX_PARTS).contains(&name.count) && (1..=name.count).contains(&name.number);
        is_sound.then_some(name)
    }

    /// The names of all parts, in order.
    pub fn all(&self) -> impl ExactSizeIterator<Item = String> {
        (0..self.count).map(|index| self.of_number(index + 1))
    }

    /// True if `other` is a part of the same model.
    pub fn is_beside(&self, other: &PartName) -> bool {
        (&self.stem, self.count, &self.ending) == (&other.stem, other.count, &other.ending)
    }

    fn of_number(&self, number: u32) -> String {
        let PartName {
            stem,
            count,
            ending,
            ..
        } = self;
        format!("{stem}-{number:05}-of-{count:05}{ending}")
    }
}

/// A name with two numbers, whatever these are.
fn read_numbers(name: &str) -> Option<PartName> {
    let (rest, ending) = name.split_at_checked(name.len().checked_sub(ENDING.len())?)?;
    let (rest, count) = rest.rsplit_once("-of-")?;
    let (stem, number) = rest.rsplit_once('-')?;
    let five = |digits: &str| {
        let plain = digits.len() == 5 && digits.bytes().all(|digit| digit.is_ascii_digit());
        plain.then(|| digits.parse().ok()).flatten()
    };
    let has_stem = !stem.is_empty() && !stem.ends_with('/');
    let is_part = ending.eq_ignore_ascii_case(ENDING) && has_stem;
    Some(PartName {
        stem: stem.to_owned(),
        number: five(number)?,
        count: five(count)?,
        ending: ending.to_owned(),
    })
    .filter(|_| is_part)
}

/// The name without the numbers of a part and `.gguf`; other names as they are.
pub fn without_numbers(name: &str) -> String {
    PartName::parse(name).map_or_else(|| name.to_owned(), |part| part.stem)
}

fn file_name(path: &Path) -> Option<&str> {
    path.file_name()?.to_str()
}

/// Paths of all parts, in order, if the file at `path` is called like one of them. They need not exist.
pub fn parts(path: &Path) -> Option<Vec<PathBuf>> {
    let part = PartName::parse(file_name(path)?)?;
    Some(part.all().map(|name| path.with_file_name(name)).collect())
}

/// As [`parts`]; all must exist.
pub(super) fn checked_parts(path: &Path) -> Result<Option<Vec<PathBuf>>, SplitError> {
    let Some(parts) = parts(path) else {
        return match file_name(path).and_then(read_numbers) {
            // A file by itself, as far as its name tells.
            None
            | Some(PartName {
                number: 1,
                count: 1,
                ..
            }) => Ok(None),
            Some(PartName { number, count, .. }) => Err(SplitError::Numbers {
                path: path.into(),
                number,
                count,
                limit: MAX_PARTS,
            }),
        };
    };
    let is_missing = |path: &Path| {
        let found = std::fs::metadata(path);
        found.is_err_and(|error| error.kind() == io::ErrorKind::NotFound)
    };
    let missing: Vec<usize> = (0..parts.len())
        .filter(|&index| is_missing(&parts[index]))
        .collect();
    match missing.first() {
        // Any other error is met again when the file is opened.
        None => Ok(Some(parts)),
        Some(&first) => Err(SplitError::Missing {
            path: parts[first].clone(),
            numbers: missing.iter().map(|&index| index as u32 + 1).collect(),
            count: parts.len() as u32,
        }),
    }
}

/// The first part that exists of the split file that `path` means: it is one of the parts, or the name that
/// they have in common, or a folder with these files and no others of weights.
pub fn find(path: &Path) -> Option<PathBuf> {
    if let Some(parts) = parts(path) {
        return parts.into_iter().find(|part| part.is_file());
    }
    if path.is_dir() {
        return in_folder(path);
    }
    // Most paths are those of files.
    if path.exists() {
        return None;
    }
    let stem = file_name(path)?;
    let stem = without_ending(stem);
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    only_one(parts_in(parent).filter(|(part, _)| part.stem == stem))
}

fn without_ending(name: &str) -> &str {
    let cut = name.len().checked_sub(ENDING.len());
    match cut.and_then(|cut| name.split_at_checked(cut)) {
        Some((stem, ending)) if ending.eq_ignore_ascii_case(ENDING) => stem,
        _ => name,
    }
}

/// The first part in a folder that is no model in Hugging Face's form and holds one split file.
fn in_folder(folder: &Path) -> Option<PathBuf> {
    if folder.join("config.json").exists() {
        return None;
    }
    let is_weights =
        |path: &Path| has_extension(path, "gguf") || has_extension(path, "safetensors");
    let others = |path: PathBuf| is_weights(&path) && parts(&path).is_none();
    match paths_in(folder).any(others) {
        true => None,
        false => only_one(parts_in(folder)),
    }
}

fn paths_in(folder: &Path) -> impl Iterator<Item = PathBuf> + use<> {
    let items = std::fs::read_dir(folder).into_iter().flatten();
    items.filter_map(|item| Some(item.ok()?.path()))
}

/// The parts in a folder.
fn parts_in(folder: &Path) -> impl Iterator<Item = (PartName, PathBuf)> + use<> {
    paths_in(folder).filter_map(|path| {
        let part = PartName::parse(file_name(&path)?)?;
        path.is_file().then_some((part, path))
    })
}

/// The first of these parts if all are of one model.
fn only_one(parts: impl Iterator<Item = (PartName, PathBuf)>) -> Option<PathBuf> {
    let mut first: Option<(PartName, PathBuf)> = None;
    for (part, path) in parts {
        match &first {
            Some((known, _)) if !known.is_beside(&part) => return None,
            Some((known, _)) if known.number < part.number => {}
            _ => first = Some((part, path)),
        }
    }
    first.map(|(_, path)| path)
}

/// The first of the files at `paths` if these are all parts of one split file and nothing else.
pub fn first_of<'a>(paths: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let mut parts = Vec::new();
    for path in paths {
        parts.push((PartName::parse(path)?, path));
    }
    parts.sort_by_key(|(part, _)| part.number);
    let (first, path) = parts.first()?;
    let are_all = parts.len() == first.count as usize
        && (1..)
            .zip(&parts)
            .all(|(number, (part, _))| part.number == number && part.is_beside(first));
    are_all.then_some(path)
}

/// SHA-256 over numbers and digests of all parts, as hexadecimal: the same for the same parts, whatever their
/// common name. `digests` are the SHA-256 of the parts as hexadecimal, in order.
pub fn fingerprint(digests: &[impl Display]) -> String {
    let mut hasher = Sha256::new();
    for (number, digest) in (1..).zip(digests) {
        hasher.update(format!("{digest}  {number:05}-of-{:05}\n", digests.len()));
    }
    HEXLOWER.encode(&hasher.finalize())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_parts_are_told_from_others() {
        let part = PartName::parse("q4/Tiny-Q4_0-00002-of-00003.gguf").unwrap();
        assert_eq!(
            (&*part.stem, part.number, part.count),
            ("q4/Tiny-Q4_0", 2, 3)
        );
        let all: Vec<String> = part.all().collect();
        assert_eq!(all[0], "q4/Tiny-Q4_0-00001-of-00003.gguf");
        assert_eq!(all.len(), 3);
        let upper = PartName::parse("T-00001-of-00002.GGUF").unwrap();
        assert_eq!(upper.all().last().unwrap(), "T-00002-of-00002.GGUF");
        for other in [
            "",
            ".gguf",
            "Tiny.gguf",
            "Tiny-00001-of-00001.gguf",
            "Tiny-00000-of-00002.gguf",
            "Tiny-00003-of-00002.gguf",
            "Tiny-00001-of-00000.gguf",
            "Tiny-00001-of-00513.gguf",
            "Tiny-0001-of-0002.gguf",
            "Tiny-000001-of-000002.gguf",
            "Tiny-+0001-of-00002.gguf",
            "-00001-of-00002.gguf",
            "q4/-00001-of-00002.gguf",
            "model-00001-of-00002.safetensors",
            "Tiny-00001-of-00002.gguf.part",
            "-of-\u{1f600}.gguf",
        ] {
            assert_eq!(PartName::parse(other), None, "{other}");
        }
        assert_eq!(without_numbers("Tiny-00001-of-00002.gguf"), "Tiny");
        assert_eq!(without_numbers("Tiny.gguf"), "Tiny.gguf");
    }

    #[test]
    fn a_list_of_files_is_a_split_file_only_if_it_is_complete() {
        let [a, b, c] = [1, 2, 3].map(|number| format!("x/T-{number:05}-of-00003.gguf"));
        assert_eq!(first_of([&*b, &*a, &*c]), Some(&*a));
        for list in [
            &[&*a, &*b][..],
            &[&a, &b, &b],
            &[&a, &b, "x/U-00003-of-00003.gguf"],
            &[],
        ] {
            assert_eq!(first_of(list.iter().copied()), None, "{list:?}");
        }
        assert_eq!(first_of([&*a, &*b, &*c, "config.json"]), None);
    }

    #[test]
    fn a_part_the_common_name_and_a_folder_mean_the_first_part() {
        let dir = tempfile::tempdir().unwrap();
        let put = |name: &str| std::fs::write(dir.path().join(name), name).unwrap();
        put("T-00003-of-00003.gguf");
        put("T-00002-of-00003.gguf");
        let found = |name: &str| {
            let found = find(&dir.path().join(name))?;
            Some(found.file_name()?.to_str()?.to_owned())
        };
        let second = Some("T-00002-of-00003.gguf".to_owned());
        for name in [
            "T-00001-of-00003.gguf",
            "T-00003-of-00003.gguf",
            "T",
            "T.gguf",
            "T.GGUF",
            "",
        ] {
            assert_eq!(found(name), second, "{name}");
        }
        assert_eq!(found("U"), None);
        put("notes.txt");
        put("T-00001-of-00003.gguf");
        assert_eq!(found("").as_deref(), Some("T-00001-of-00003.gguf"));
        // A folder of several models is none of them, and a name of two is neither.
        put("T-00001-of-00002.gguf");
        assert_eq!((found(""), found("T")), (None, None));
        assert!(found("T-00001-of-00003.gguf").is_some());
        std::fs::remove_file(dir.path().join("T-00001-of-00002.gguf")).unwrap();
        put("other.gguf");
        assert_eq!(found(""), None);
        assert!(found("T").is_some());
    }
}
