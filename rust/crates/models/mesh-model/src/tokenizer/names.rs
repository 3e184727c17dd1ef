//! Tokens that are known by their names, whatever type a file gives them.

use super::vocab::{TokenType, Vocab};

/// Tokens that end an answer, by name: files often name only one of them as their end token, and some give them the type of
/// ordinary text.
const END_NAMES: [&str; 28] = [
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|end|>",
    "<end_of_turn>",
    "<end_of_utterance>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "</s>",
    "<\u{ff5c}end\u{2581}of\u{2581}sentence\u{ff5c}>",
    "<|END_OF_TURN_TOKEN|>",
    "<|end_of_turn|>",
    "<|endofturn|>",
    "<turn|>",
    "<|eot|>",
    "<|eom|>",
    "<|return|>",
    "<|call|>",
    "<|flush|>",
    "<|calls|>",
    "<|eos|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
    "<|role_end|>",
];

/// Tokens that begin turns and parts of a prompt, by name. They are control tokens whatever type a file gives them.
const CONTROL_NAMES: [&str; 24] = [
    "<|im_start|>",
    "<|im_sep|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|begin_of_text|>",
    "<start_of_turn>",
    "<|turn>",
    "<|start|>",
    "<|message|>",
    "<|channel|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
    "<|START_OF_TURN_TOKEN|>",
    "<|USER_TOKEN|>",
    "<|CHATBOT_TOKEN|>",
    "<|SYSTEM_TOKEN|>",
    "<\u{ff5c}User\u{ff5c}>",
    "<\u{ff5c}Assistant\u{ff5c}>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|startoftext|>",
];

/// The type of a token, corrected by its name; llama.cpp overrides types likewise.
pub(super) fn type_by_name(text: &str, ty: TokenType) -> TokenType {
    let named = || END_NAMES.contains(&text) || CONTROL_NAMES.contains(&text);
    match ty {
        // As a word of a vocabulary this ends struck text.
        _ if text == "</s>" => ty,
        TokenType::Normal | TokenType::UserDefined if named() => TokenType::Control,
        _ => ty,
    }
}

/// All tokens that end an answer: those that the files list, then those with a name for it.
pub(super) fn ends_of(vocab: &Vocab, listed: impl Iterator<Item = u32>) -> Vec<u32> {
    // In this format it ends a message, of which an answer has several.
    let several = ["<|return|>", "<|call|>"]
        .iter()
        .all(|name| vocab.find_special(name).is_some());
    let named = END_NAMES
        .iter()
        .filter(|name| !(several && **name == "<|end|>"))
        .filter_map(|name| vocab.find_special(name))
        .filter(|&id| vocab.token_type(id) == TokenType::Control);
    let mut ends: Vec<u32> = Vec::new();
    for id in listed.chain(named) {
        if !ends.contains(&id) {
            ends.push(id);
        }
    }
    let unlisted = vocab.overridden().filter(|(_, id)| ends.contains(id));
    for (name, _) in unlisted {
        tracing::warn!(
            token = name,
            "the file gives this token the type of ordinary text; by its name it ends answers, and does so here"
        );
    }
    ends
}
