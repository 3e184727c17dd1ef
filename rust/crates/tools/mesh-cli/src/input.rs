//! Input from files and from standard input.

use std::io::{self, IsTerminal, Read};
use std::path::Path;

use mesh_base::files::{Readers, exposure};

use crate::failure::Failure;

/// The prompt: the words of the command line, or standard input if there are no words or only `-`.
pub(crate) fn prompt(words: &[String]) -> Result<String, Failure> {
    let from_input = words.is_empty() || words == ["-"];
    let text = if !from_input {
        words.join(" ")
    } else if words.is_empty() && io::stdin().is_terminal() {
        return Err(Failure::usage("nothing was asked")
            .hint("hydramesh ask \"Why is the sky blue?\", or pipe the question in."));
    } else {
        let mut text = String::new();
        io::stdin()
            .read_to_string(&mut text)
            .map_err(|error| Failure::usage(format!("standard input: {error}")))?;
        text.trim_end().to_owned()
    };
    if text.trim().is_empty() {
        return Err(Failure::usage("the question is empty"));
    }
    Ok(text)
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
        return Err(Failure::usage(format!(
            "key file {} does not hold one key",
            path.display()
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
