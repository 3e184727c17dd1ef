//! Fields of a request that mean nothing here: named in the answer's headers, or refused.

use axum::http::HeaderValue;
use axum::response::Response;

use super::error::ApiError;
use super::state::Api;
use crate::api::invalid::Invalid;

const HEADER: &str = "x-hydramesh-ignored";
/// Most bytes of all names together.
const LONGEST: usize = 512;
/// Most characters of one name.
const LONGEST_NAME: usize = 64;

/// The names in the form of the header; `None` without any.
pub(super) struct Ignored(Option<HeaderValue>);

impl Ignored {
    /// Notes the names.
    ///
    /// # Errors
    /// If the head refuses unknown fields (`http.strict`).
    pub(super) fn new(api: &Api, names: &[String]) -> Result<Self, ApiError> {
        let Some(first) = names.first() else {
            return Ok(Self(None));
        };
        if api.mesh.config.http.strict {
            let first = printable(first);
            let text = format!(
                "'{first}' is not a field of this API, and this head refuses such fields (http.strict); leave it out"
            );
            return Err(Invalid::new(first, text).into());
        }
        Ok(Self(HeaderValue::from_str(&joined(names)).ok()))
    }

    pub(super) fn named_in(self, mut response: Response) -> Response {
        if let Some(names) = self.0 {
            response.headers_mut().insert(HEADER, names);
        }
        response
    }
}

/// The names with commas between them, as far as they fit.
fn joined(names: &[String]) -> String {
    let mut list = String::new();
    for (count, name) in names.iter().enumerate() {
        let name = printable(name);
        if list.len() + name.len() > LONGEST {
            return format!("{list}, and {} more", names.len() - count);
        }
        if count > 0 {
            list += ", ";
        }
        list += &name;
    }
    list
}

/// The name in visible ASCII characters without commas.
fn printable(name: &str) -> String {
    let visible = |character: char| match character {
        ',' => '?',
        character if character.is_ascii_graphic() => character,
        _ => '?',
    };
    let mut shown: String = name.chars().take(LONGEST_NAME).map(visible).collect();
    if shown.is_empty() {
        shown.push_str("\"\"");
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_made_fit_for_a_header() {
        let names = |names: &[&str]| {
            let names: Vec<String> = names.iter().map(|&name| name.to_owned()).collect();
            let list = joined(&names);
            assert!(HeaderValue::from_str(&list).is_ok() && list.len() < LONGEST + 40);
            list
        };
        assert_eq!(names(&["foo", "bar"]), "foo, bar");
        assert_eq!(
            names(&["a\r\nx-evil: 1", "é,", ""]),
            "a??x-evil:?1, ??, \"\""
        );
        let long = "x".repeat(200);
        let many: Vec<&str> = vec![&long; 30];
        assert!(names(&many).ends_with("more"), "{}", names(&many));
    }
}
