//! Text as CLIP's words are cut from it.

use fancy_regex::Regex;
use tokenizers::NormalizedString;

/// Cleans text.
pub(super) struct Cleaner {
    dropped: Regex,
}

impl Cleaner {
    pub(super) fn new() -> Self {
        let dropped = r"[\p{C}&&[^\t\n\r]]|\x{FFFD}";
        Cleaner {
            dropped: Regex::new(dropped).expect("the pattern is valid"),
        }
    }

    /// Drops control and format characters, puts spaces around Chinese characters, composes accents (NFC), makes all white
    /// space plain spaces and lower-cases.
    pub(super) fn clean(&self, text: &str) -> Result<String, String> {
        let mut spaced = String::with_capacity(text.len());
        let mut from = 0;
        for dropped in self.dropped.find_iter(text) {
            let dropped = dropped.map_err(|error| error.to_string())?;
            space(&text[from..dropped.start()], &mut spaced);
            from = dropped.end();
        }
        space(&text[from..], &mut spaced);
        let mut composed = NormalizedString::from(spaced);
        composed.nfc();
        Ok(composed.get().to_lowercase())
    }
}

fn space(text: &str, spaced: &mut String) {
    for c in text.chars() {
        if c.is_whitespace() {
            spaced.push(' ');
        } else if is_chinese(c) {
            spaced.extend([' ', c, ' ']);
        } else {
            spaced.push(c);
        }
    }
}

/// The blocks of unified and compatibility ideographs that BERT's tokenizer counts.
fn is_chinese(c: char) -> bool {
    matches!(c,
        '\u{4E00}'..='\u{9FFF}'
        | '\u{3400}'..='\u{4DBF}'
        | '\u{20000}'..='\u{2A6DF}'
        | '\u{2A700}'..='\u{2B73F}'
        | '\u{2B740}'..='\u{2B81F}'
        | '\u{2B820}'..='\u{2CEAF}'
        | '\u{F900}'..='\u{FAFF}'
        | '\u{2F800}'..='\u{2FA1F}')
}
