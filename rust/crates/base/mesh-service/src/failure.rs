//! How a service says why it ends.

use std::error::Error;

/// An error and its causes in one line. Many of our errors already quote their cause: it is not said twice.
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
