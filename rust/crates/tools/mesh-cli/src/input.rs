//! Input from files and from standard input.

use std::io::{self, IsTerminal};
use std::path::Path;

use mesh_base::files::{Readers, exposure};

use crate::failure::Failure;

/// Standard input if there are no words or only `-`; `None` if the words are meant. `nothing` is the failure
/// for no words at a terminal.
pub(crate) fn standard_input(
    words: &[String],
    nothing: Failure,
) -> Result<Option<String>, Failure> {
    if !words.is_empty() && words != ["-"] {
        return Ok(None);
    }
    if words.is_empty() && io::stdin().is_terminal() {
        return Err(nothing);
    }
    match io::read_to_string(io::stdin()) {
        Ok(text) => Ok(Some(text)),
        Err(error) => Err(Failure::usage(format!("standard input: {error}"))),
    }
}

/// The prompt: the words of the command line, or standard input.
pub(crate) fn prompt(words: &[String]) -> Result<String, Failure> {
    let nothing = Failure::usage("nothing was asked")
        .hint("hydramesh ask \"Why is the sky blue?\", or pipe the question in.");
    let text = match standard_input(words, nothing)? {
        Some(text) => text.trim_end().to_owned(),
        None => words.join(" "),
    };
    match text.trim().is_empty() {
        true => Err(Failure::usage("the question is empty")),
        false => Ok(text),
    }
}

/// The one line of a key file.
pub(crate) fn key_file(path: &Path) -> Result<String, Failure> {
    let text = std::fs::read_to_string(path)
        .map_err(|error| Failure::usage(format!("key file {}: {error}", path.display())))?;
    if let Some(exposed) = exposure(path, Readers::Group) {
        eprintln!("hydramesh: warning: {exposed}");
    }
    let key = text.trim();
    if key.is_empty() || key.contains(char::is_whitespace) {
        let path = path.display();
        return Err(Failure::usage(format!(
            "key file {path} does not hold one key"
        )));
    }
    Ok(key.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_file_holds_one_key() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        std::fs::write(&file, "secret\n").expect("written");
        assert_eq!(key_file(file.path()).expect("a key"), "secret");
        std::fs::write(&file, "two words\n").expect("written");
        let failure = key_file(file.path()).expect_err("no key");
        assert!(failure.message.contains("does not hold one key"));
    }
}
