//! How token texts are written in files.

use std::sync::LazyLock;

/// SentencePiece's mark for a space, "▁".
pub(super) const SPACE: &str = "\u{2581}";

/// Notation of token texts in a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Notation {
    /// Byte-level BPE: every byte is written as one printable character.
    Bpe,
    /// SentencePiece: "▁" is a space, `<0xNN>` a byte.
    Spm,
}

impl Notation {
    /// Appends the bytes of the text of a token that is not special.
    pub(super) fn push_bytes(self, text: &str, out: &mut Vec<u8>) {
        match self {
            Notation::Bpe => push_bytes_of_alphabet(text, out),
            Notation::Spm => push_bytes_of_pieces(text, out),
        }
    }
}

/// Characters outside the alphabet are kept.
fn push_bytes_of_alphabet(text: &str, out: &mut Vec<u8>) {
    for c in text.chars() {
        match ALPHABET.byte(c) {
            Some(byte) => out.push(byte),
            None => out.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes()),
        }
    }
}

fn push_bytes_of_pieces(text: &str, out: &mut Vec<u8>) {
    let mut rest = text;
    while let Some((before, after)) = rest.split_once(SPACE) {
        out.extend_from_slice(before.as_bytes());
        out.push(b' ');
        rest = after;
    }
    out.extend_from_slice(rest.as_bytes());
}

/// The byte of a token such as `<0x0A>`.
pub(super) fn byte_of(text: &str) -> Option<u8> {
    let digits = text.strip_prefix("<0x")?.strip_suffix('>')?;
    match digits.len() {
        2 => u8::from_str_radix(digits, 16).ok(),
        _ => None,
    }
}

/// The bytes that occur in UTF-8. Some vocabularies lack the others.
pub(super) fn text_bytes() -> impl Iterator<Item = u8> {
    (0..=0xf4).filter(|byte| !matches!(byte, 0xc0 | 0xc1))
}

/// The character that a byte is written as.
pub(crate) fn byte_char(byte: u8) -> char {
    ALPHABET.chars[byte as usize]
}

/// GPT-2's alphabet: each byte as one printable character. Printable Latin-1 stands for itself, the other 68
/// bytes follow from U+0100 on in order.
struct Alphabet {
    chars: [char; 256],
    /// Bytes of the characters up to U+0143, the last one used.
    bytes: [Option<u8>; 0x144],
}

static ALPHABET: LazyLock<Alphabet> = LazyLock::new(|| {
    let mut alphabet = Alphabet {
        chars: ['\0'; 256],
        bytes: [None; 0x144],
    };
    let mut next = 0x100;
    for byte in 0..=255u8 {
        let code = match byte {
            b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff => u32::from(byte),
            _ => {
                next += 1;
                next - 1
            }
        };
        alphabet.chars[byte as usize] = char::from_u32(code).expect("below the surrogates");
        alphabet.bytes[code as usize] = Some(byte);
    }
    alphabet
});

impl Alphabet {
    fn byte(&self, c: char) -> Option<u8> {
        self.bytes.get(c as usize).copied().flatten()
    }
}
