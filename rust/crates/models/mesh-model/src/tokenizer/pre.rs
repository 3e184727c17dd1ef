//! Cutting text into words before BPE, as the pre-tokenizer that a model was trained with does.
//!
//! A pre-tokenizer is a list of patterns. Each cuts every piece that the ones before it left into its matches
//! and what lies between them. The patterns are those of the models' own `tokenizer.json`; where llama.cpp's
//! differ on purpose (ASCII apostrophe endings), they follow llama.cpp.

use fancy_regex::Regex;

use super::error::TokenizerError;

#[derive(Debug)]
pub(super) struct PreTokenizer {
    kind: PreTokenizerKind,
    patterns: Vec<Regex>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum PreTokenizerKind {
    Default,
    Gpt2,
    /// GPT-2 with every digit a word of its own.
    SingleDigits,
    Llama3,
    Qwen2,
    Falcon,
    DeepseekLlm,
    DeepseekCoder,
    DeepseekV3,
    Tekken,
    Gpt4o,
    Bloom,
    Viking,
}

/// Endings after an apostrophe, letters, digits, everything else, space: each word with the one space before
/// it.
pub(super) const GPT2: &str =
    r"'(?:[stmd]|re|ve|ll)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)";

/// Runs of CJK ideographs and Hangul, as DeepSeek's older tokenizers bound them.
const DEEPSEEK_CJK: &str = r"[\x{0800}-\x{9FA5}\x{AC00}-\x{D7FF}]+";

/// Letters with case, as DeepSeek-LLM's tokenizer lists them: a set that leaves out what Unicode added or
/// recased later and the mathematical alphabets.
const DEEPSEEK_LETTERS: &str = concat!(
    r"\s?[\p{Lu}\p{Ll}\p{Lt}&&[^",
    r"\x{0560}\x{0588}\x{10C7}\x{10CD}-\x{10FF}\x{1C80}-\x{1C8F}\x{2D00}-\x{2D2F}\x{A790}-\x{A7FA}\x{AB30}-\x{AB68}",
    r"\x{10570}-\x{105BF}\x{10D50}-\x{10D8F}\x{16E40}-\x{16E7F}\x{1D400}-\x{1D7CB}\x{1DF00}-\x{1DF2F}",
    r"]]+"
);

/// GPT-2's successor: endings in any case, one leading character of any kind, digits in groups of `digits`,
/// line ends kept with what stands before them. `slash` lets those line ends be slashes too.
fn modern(words: &str, digits: &str, slash: &str) -> String {
    format!(
        r"{words}|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n{slash}]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
}

const ENDINGS: &str = r"'(?:[sStTmMdD]|[rR][eE]|[vV][eE]|[lL][lL])";

/// Endings, or letters with one character before them that is neither letter, digit nor line end.
fn plain_words() -> String {
    format!(r"{ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+")
}

/// Words that end where small letters are followed by a capital.
fn cased_words(ending: &str) -> String {
    const UPPER: &str = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]";
    const LOWER: &str = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]";
    const BEFORE: &str = r"[^\r\n\p{L}\p{N}]?";
    format!("{BEFORE}{UPPER}*{LOWER}+{ending}|{BEFORE}{UPPER}+{LOWER}*{ending}")
}

impl PreTokenizer {
    /// The pre-tokenizer that `tokenizer.ggml.pre` names.
    pub(super) fn from_name(name: &str) -> Option<Self> {
        let kind = PreTokenizerKind::from_name(name)?;
        let patterns = kind
            .patterns()
            .iter()
            .map(|pattern| {
                Regex::new(pattern).expect("the patterns are constants, each built by a test")
            })
            .collect();
        Some(PreTokenizer { kind, patterns })
    }

    /// Cuts `text` into words that together are the text.
    #[cfg(test)]
    pub(super) fn split<'t>(&self, text: &'t str) -> Result<Vec<&'t str>, TokenizerError> {
        let mut words = Vec::new();
        self.each_word(text, &mut |word| {
            words.push(word);
            Ok(())
        })?;
        Ok(words)
    }

    /// Visits the words of `text` in order, until a visit fails. Nothing is kept of the words before.
    pub(super) fn each_word<'t>(
        &self,
        text: &'t str,
        visit: &mut Visit<'_, 't>,
    ) -> Result<(), TokenizerError> {
        each_piece(&self.patterns, text, visit)
    }

    /// True if a word that is a token becomes that token regardless of the merges.
    pub(super) fn whole_words_first(&self) -> bool {
        matches!(
            self.kind,
            PreTokenizerKind::Llama3 | PreTokenizerKind::Tekken
        )
    }

    /// True if plain text begins with the begin token unless the file says otherwise.
    pub(super) fn adds_bos(&self) -> bool {
        matches!(
            self.kind,
            PreTokenizerKind::Llama3 | PreTokenizerKind::Tekken
        )
    }
}

impl PreTokenizerKind {
    fn from_name(name: &str) -> Option<Self> {
        Some(match name {
            "default" => PreTokenizerKind::Default,
            "gpt-2" | "phi-2" | "mpt" | "olmo" | "jais" | "trillion" | "exaone4" | "gigachat"
            | "mellum" | "a.x-4.0" => PreTokenizerKind::Gpt2,
            "smollm" | "starcoder" | "refact" | "command-r" | "codeshell" | "exaone"
            | "minerva-7b" => PreTokenizerKind::SingleDigits,
            "llama-bpe" | "llama3" | "llama-v3" | "falcon3" | "falcon-h1" | "pixtral"
            | "midm-2.0" | "lfm2" => PreTokenizerKind::Llama3,
            "qwen2" | "deepseek-r1-qwen" | "stablelm2" | "megrez" | "hunyuan" => {
                PreTokenizerKind::Qwen2
            }
            "falcon" => PreTokenizerKind::Falcon,
            "deepseek-llm" => PreTokenizerKind::DeepseekLlm,
            "deepseek-coder" => PreTokenizerKind::DeepseekCoder,
            "deepseek-v3" | "hunyuan-dense" => PreTokenizerKind::DeepseekV3,
            "tekken" => PreTokenizerKind::Tekken,
            "gpt-4o" | "llama4" => PreTokenizerKind::Gpt4o,
            "bloom" | "poro-chat" | "gpt3-finnish" => PreTokenizerKind::Bloom,
            "viking" => PreTokenizerKind::Viking,
            _ => return None,
        })
    }

    fn patterns(self) -> Vec<String> {
        let list = |patterns: &[&str]| patterns.iter().map(|&pattern| pattern.to_owned()).collect();
        match self {
            PreTokenizerKind::Default => {
                list(&[r"[\p{P}$+<=>^~|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"])
            }
            PreTokenizerKind::Gpt2 => list(&[GPT2]),
            PreTokenizerKind::SingleDigits => list(&[r"\p{N}", GPT2]),
            PreTokenizerKind::Llama3 => vec![modern(&plain_words(), "{1,3}", "")],
            PreTokenizerKind::Qwen2 => vec![modern(&plain_words(), "", "")],
            PreTokenizerKind::Falcon => list(&[r"[\p{P}$+<=>^~|`]+", GPT2, "[0-9][0-9][0-9]"]),
            PreTokenizerKind::DeepseekLlm => list(&[
                r"[\r\n]",
                DEEPSEEK_LETTERS,
                r"\s?[!-/:-~\x{FF01}-\x{FF0F}\x{FF1A}-\x{FF5E}\x{2018}-\x{201F}\x{3000}-\x{3002}]+",
                r"\s+$",
                DEEPSEEK_CJK,
                r"\p{N}+",
            ]),
            PreTokenizerKind::DeepseekCoder => list(&[
                r"[\r\n]",
                r"\s?\p{L}+",
                r"\s?\p{P}+",
                DEEPSEEK_CJK,
                r"\p{N}",
            ]),
            PreTokenizerKind::DeepseekV3 => list(&[
                r"\p{N}{1,3}",
                r"[\x{4E00}-\x{9FA5}\x{3040}-\x{30FF}]+",
                concat!(
                    r"[!-/:-@\[-`{-~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+",
                    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
                ),
            ]),
            PreTokenizerKind::Tekken => vec![modern(&cased_words(""), "", "/")],
            PreTokenizerKind::Gpt4o => vec![modern(
                &cased_words(&format!("(?:{ENDINGS})?")),
                "{1,3}",
                "/",
            )],
            PreTokenizerKind::Bloom => list(&[BLOOM]),
            PreTokenizerKind::Viking => list(&[BLOOM, r"\p{N}"]),
        }
    }
}

/// Runs without space or sentence punctuation, with the one space before them.
const BLOOM: &str = r" ?[^(\s|.,!?…。，、।۔،)]+";

type Visit<'v, 't> = dyn FnMut(&'t str) -> Result<(), TokenizerError> + 'v;

/// Visits the matches of the first pattern in `piece` and what lies between them, each cut by the other
/// patterns.
fn each_piece<'t>(
    patterns: &[Regex],
    piece: &'t str,
    visit: &mut Visit<'_, 't>,
) -> Result<(), TokenizerError> {
    let Some((pattern, others)) = patterns.split_first() else {
        return visit(piece);
    };
    let mut end = 0;
    for found in pattern.find_iter(piece) {
        let found = found.map_err(|error| TokenizerError::Encode {
            reason: error.to_string(),
        })?;
        if found.start() > end {
            each_piece(others, &piece[end..found.start()], visit)?;
        }
        if found.end() > found.start() {
            each_piece(others, found.as_str(), visit)?;
        }
        end = found.end();
    }
    if end < piece.len() {
        each_piece(others, &piece[end..], visit)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAMES: [&str; 13] = [
        "default",
        "gpt-2",
        "smollm",
        "llama-bpe",
        "qwen2",
        "falcon",
        "deepseek-llm",
        "deepseek-coder",
        "deepseek-v3",
        "tekken",
        "gpt-4o",
        "bloom",
        "viking",
    ];

    fn split<'t>(name: &str, text: &'t str) -> Vec<&'t str> {
        PreTokenizer::from_name(name).unwrap().split(text).unwrap()
    }

    #[test]
    fn every_pre_tokenizer_keeps_all_of_the_text() {
        let text =
            "I'm 12345 ½ — don't!\r\n\n  Zażółć \t GĘŚLĄ\u{3000}你好。नमस्ते 🦀🦀 fooBar()/// ";
        for name in NAMES {
            assert_eq!(split(name, text).concat(), text, "{name}");
            assert!(split(name, "").concat().is_empty(), "{name}");
        }
    }

    #[test]
    fn digits_are_grouped_as_each_model_wants_them() {
        assert_eq!(split("gpt-2", "a 12345"), ["a", " 12345"]);
        assert_eq!(split("smollm", "a 123"), ["a", " ", "1", "2", "3"]);
        assert_eq!(split("llama-bpe", "a 12345"), ["a", " ", "123", "45"]);
        assert_eq!(split("qwen2", "12"), ["1", "2"]);
    }

    #[test]
    fn cased_words_end_before_a_capital() {
        assert_eq!(
            split("tekken", "fooBar HTTPServer"),
            ["foo", "Bar", " HTTPServer"]
        );
        assert_eq!(split("gpt-4o", "can't"), ["can't"]);
    }

    #[test]
    fn a_megabyte_of_spaces_is_split_in_reasonable_time() {
        let text = " ".repeat(1 << 20) + "x";
        let begun = std::time::Instant::now();
        for name in NAMES {
            // A pattern may give up on it with an error, but it must not run on.
            if let Ok(pieces) = PreTokenizer::from_name(name).unwrap().split(&text) {
                assert_eq!(pieces.concat().len(), text.len(), "{name}");
            }
        }
        assert!(begun.elapsed() < std::time::Duration::from_secs(60));
    }
}
