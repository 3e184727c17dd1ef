//! The error line of a service that ends.

use std::error::Error;

/// Formats an error and its causes in one line, without repeating causes that an error already quotes.
pub fn describe(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let words = error.to_string();
        if !text.contains(&words) {
            text = format!("{text}: {words}");
        }
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::anyhow;

    #[derive(Debug, thiserror::Error)]
    #[error("cannot read x: {source}")]
    struct Quoting {
        source: std::io::Error,
    }

    #[test]
    fn a_cause_that_is_quoted_is_said_once() {
        let source = std::io::Error::other("the disk is gone");
        let error = anyhow!(Quoting { source }).context("starting");
        assert_eq!(
            describe(error.as_ref()),
            "starting: cannot read x: the disk is gone"
        );
    }
}
