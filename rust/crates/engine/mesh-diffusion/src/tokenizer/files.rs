//! The files of a tokenizer, which are not trusted.

use std::collections::HashMap;
use std::fs::File;
use std::io::Read as _;
use std::path::Path;

use serde::Deserialize;
use tokenizers::models::bpe::Vocab as BpeVocab;

use super::TokenizerError;

/// Ids of tokens.
pub(super) type Vocab = BpeVocab;
/// Pairs to merge, first to last.
pub(super) type Merges = Vec<(String, String)>;

pub(super) fn read(path: &Path) -> Result<Vec<u8>, TokenizerError> {
    let failed = |source| TokenizerError::Read {
        path: path.display().to_string(),
        source,
    };
    let file = File::open(path).map_err(failed)?;
    let mut bytes = Vec::new();
    file.take(MOST_BYTES + 1)
        .read_to_end(&mut bytes)
        .map_err(failed)?;
    match bytes.len() as u64 > MOST_BYTES {
        false => Ok(bytes),
        true => Err(TokenizerError::TooLarge {
            path: path.display().to_string(),
            limit: MOST_BYTES,
        }),
    }
}

/// The content of `vocab.json`.
pub(super) fn vocab(json: &[u8]) -> Result<Vocab, TokenizerError> {
    let file = "vocab.json";
    let tokens: HashMap<String, u32> = parse(file, json)?;
    checked(file, tokens)
}

/// The content of `merges.txt`: a line for each pair, after one with the version.
pub(super) fn merges(text: &[u8], vocab: &Vocab) -> Result<Merges, TokenizerError> {
    let file = "merges.txt";
    let text = std::str::from_utf8(text)
        .map_err(|error| malformed(file, format!("it is not valid UTF-8: {error}")))?;
    let mut merges = Vec::new();
    for (number, line) in text.lines().enumerate() {
        let header = number == 0 && line.starts_with("#version");
        if header || line.trim().is_empty() {
            continue;
        }
        let mut parts = line.split_whitespace();
        let (Some(left), Some(right), None) = (parts.next(), parts.next(), parts.next()) else {
            let line: String = line.chars().take(40).collect();
            return Err(malformed(
                file,
                format!("line {} is {line:?}, not two tokens", number + 1),
            ));
        };
        push(&mut merges, left, right, vocab);
    }
    Ok(merges)
}

/// The parts of `tokenizer.json` that count.
#[derive(Deserialize)]
struct TokenizerJson {
    #[serde(default)]
    added_tokens: Vec<AddedToken>,
    model: ModelJson,
}

#[derive(Deserialize)]
struct AddedToken {
    id: u32,
    content: String,
}

#[derive(Deserialize)]
struct ModelJson {
    #[serde(rename = "type")]
    kind: Option<String>,
    vocab: HashMap<String, u32>,
    merges: Vec<MergeJson>,
}

/// A pair; older files have it as one text with a space.
#[derive(Deserialize)]
#[serde(untagged)]
enum MergeJson {
    Pair([String; 2]),
    Line(String),
}

/// The content of `tokenizer.json`.
pub(super) fn tokenizer_json(json: &[u8]) -> Result<(Vocab, Merges), TokenizerError> {
    let file = "tokenizer.json";
    let content: TokenizerJson = parse(file, json)?;
    if let Some(kind) = &content.model.kind
        && kind != "BPE"
    {
        let kind: String = kind.chars().take(40).collect();
        return Err(malformed(
            file,
            format!("its model is {kind:?}, but CLIP's is BPE"),
        ));
    }
    let mut tokens = content.model.vocab;
    for token in content.added_tokens {
        tokens.entry(token.content).or_insert(token.id);
    }
    let vocab = checked(file, tokens)?;
    let mut merges = Vec::with_capacity(content.model.merges.len());
    for merge in &content.model.merges {
        let (left, right) = match merge {
            MergeJson::Pair([left, right]) => (left.as_str(), right.as_str()),
            MergeJson::Line(line) => line.split_once(' ').ok_or_else(|| {
                let line: String = line.chars().take(40).collect();
                malformed(file, format!("merge {line:?} is not two tokens"))
            })?,
        };
        push(&mut merges, left, right, &vocab);
    }
    Ok((vocab, merges))
}

fn parse<'a, T: Deserialize<'a>>(file: &'static str, json: &'a [u8]) -> Result<T, TokenizerError> {
    serde_json::from_slice(json).map_err(|error| malformed(file, error.to_string()))
}

fn checked(file: &'static str, tokens: HashMap<String, u32>) -> Result<Vocab, TokenizerError> {
    let count = tokens.len();
    let mut seen = vec![false; count];
    for (token, &id) in &tokens {
        let place = seen.get_mut(id as usize);
        if place.is_none_or(|place| std::mem::replace(place, true)) {
            let token: String = token.chars().take(40).collect();
            return Err(malformed(
                file,
                format!(
                    "token {token:?} has id {id}, but {count} tokens need ids 0 to {}, each once",
                    count - 1
                ),
            ));
        }
    }
    Ok(tokens.into_iter().collect())
}

/// Adds a pair unless it names or makes no token.
fn push(merges: &mut Merges, left: &str, right: &str, vocab: &Vocab) {
    let known = |token: &str| vocab.contains_key(token);
    if known(left) && known(right) && known(&format!("{left}{right}")) {
        merges.push((left.to_owned(), right.to_owned()));
    }
}

fn malformed(file: &'static str, message: String) -> TokenizerError {
    TokenizerError::Malformed { file, message }
}

/// The printable character that stands for a byte: itself where it is one in Latin-1, else one from U+0100 on.
pub(super) fn byte_char(byte: u8) -> char {
    match byte {
        b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF => char::from(byte),
        0..=b' ' => shifted(u32::from(byte)),
        0x7F..=0xA0 => shifted(u32::from(byte) - 0x7F + 33),
        0xAD => shifted(67),
    }
}

fn shifted(by: u32) -> char {
    char::from_u32(0x100 + by).expect("there is a character at each of U+0100 to U+0143")
}

/// The characters of all bytes.
pub(crate) fn byte_chars() -> impl Iterator<Item = char> {
    (0..=u8::MAX).map(byte_char)
}

/// The largest file, a tokenizer.json, has 3.6 MB.
const MOST_BYTES: u64 = 16 << 20;
