//! Forms with files (`multipart/form-data`), in the shape of a JSON object with files beside it.

use bytes::Bytes;
use futures::executor::block_on;
use futures::stream;
use multer::{Constraints, Multipart, SizeLimit};
use serde_json::{Map, Value};

use crate::api::invalid::Invalid;

/// The parts of a form.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Form {
    /// Parts without files. A number or a truth value has its type, unless the field is one of the texts.
    pub(crate) fields: Map<String, Value>,
    /// Files in their order, each with the name of its field. `name[]` is `name`.
    pub(crate) files: Vec<(String, Bytes)>,
}

impl Form {
    /// Reads a body. `texts` names the fields whose values are texts whatever they look like, `files` those that are
    /// files.
    ///
    /// # Errors
    /// [`Invalid`] says where the body stops being a form, or names the field that is too much.
    pub(crate) fn read(
        content_type: &str,
        body: Bytes,
        texts: &[&str],
        files: &[&str],
    ) -> Result<Self, Invalid> {
        let broken = |error: multer::Error| {
            let text = format!("The body is not a form (multipart/form-data): {error}");
            Invalid::new("body", text)
        };
        let boundary = multer::parse_boundary(content_type).map_err(broken)?;
        let limit = SizeLimit::new().whole_stream(body.len() as u64);
        // In pieces, since what is read is kept twice.
        let pieces = (0..body.len()).step_by(PIECE).map(move |begin| {
            let end = (begin + PIECE).min(body.len());
            Ok::<_, std::convert::Infallible>(body.slice(begin..end))
        });
        let constraints = Constraints::new().size_limit(limit);
        let mut parts = Multipart::with_constraints(stream::iter(pieces), boundary, constraints);
        let mut form = Self::default();
        // All of it is here: nothing is waited for.
        block_on(async {
            let mut count = 0;
            while let Some(part) = parts.next_field().await.map_err(broken)? {
                count += 1;
                if count > MOST_PARTS {
                    let text = format!("The form has more than {MOST_PARTS} parts; send fewer");
                    return Err(Invalid::new("body", text));
                }
                let name = part.name().unwrap_or_default();
                let name = name.strip_suffix("[]").unwrap_or(name).to_owned();
                let value = part.bytes().await.map_err(broken)?;
                if files.contains(&name.as_str()) {
                    form.files.push((name, value));
                } else {
                    let value = value_of(&name, &value, texts)?;
                    form.fields.insert(name, value);
                }
            }
            Ok(())
        })?;
        Ok(form)
    }
}

fn value_of(name: &str, bytes: &[u8], texts: &[&str]) -> Result<Value, Invalid> {
    let text = std::str::from_utf8(bytes).map_err(|_| {
        let text = format!("'{name}' is neither a file that is taken here nor text in UTF-8");
        Invalid::new(name, text)
    })?;
    let is_text = texts.contains(&name);
    let typed = || match serde_json::from_str(text.trim()) {
        Ok(value @ (Value::Number(_) | Value::Bool(_) | Value::Null)) => Some(value),
        // As Python writes them.
        _ if text == "True" || text == "False" => Some(Value::Bool(text == "True")),
        _ => None,
    };
    let value = if is_text { None } else { typed() };
    Ok(value.unwrap_or_else(|| Value::String(text.to_owned())))
}

/// Bytes that are given to the parser at a time.
const PIECE: usize = 64 << 10;
/// Parts of a form: more than there are fields.
const MOST_PARTS: usize = 128;

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const KIND: &str = "multipart/form-data; boundary=XX";

    fn body(parts: &[(&str, &str)]) -> String {
        let part = |(name, value): &(&str, &str)| {
            format!("--XX\r\nContent-Disposition: form-data; name=\"{name}\"\r\n\r\n{value}\r\n")
        };
        parts.iter().map(part).collect::<String>() + "--XX--\r\n"
    }

    fn read(parts: &[(&str, &str)]) -> Result<Form, Invalid> {
        Form::read(KIND, body(parts).into(), &["prompt"], &["image"])
    }

    #[test]
    fn parts_have_the_types_that_json_would_have() {
        let form = read(&[
            ("prompt", "5"),
            ("n", "2"),
            ("strength", "0.5"),
            ("stream", "true"),
            ("progress", "True"),
            ("size", "64x64"),
            ("image[]", "\u{7f}PNG\r\n--X"),
            ("image", "second"),
        ])
        .unwrap();
        let fields = json!({
            "prompt": "5", "n": 2, "strength": 0.5, "stream": true, "progress": true, "size": "64x64",
        });
        assert_eq!(Value::Object(form.fields), fields);
        let files = [("image", "\u{7f}PNG\r\n--X"), ("image", "second")];
        let files = files.map(|(name, file)| (name.to_owned(), Bytes::from(file)));
        assert_eq!(form.files, files);
    }

    #[test]
    fn what_is_no_form_is_refused() {
        let whole = body(&[("prompt", "a fox"), ("image", "file")]);
        for cut in [0, 3, 30, whole.len() - 12] {
            let part = Bytes::copy_from_slice(&whole.as_bytes()[..cut]);
            let error = Form::read(KIND, part, &[], &["image"]).unwrap_err();
            assert_eq!(error.param, "body", "{cut}");
        }
        let no_boundary = Form::read("multipart/form-data", whole.into(), &[], &[]);
        assert!(no_boundary.is_err());
        let many = vec![("x", "1"); MOST_PARTS + 1];
        assert!(read(&many).unwrap_err().message.contains("128 parts"));
        let text = Form::read(
            KIND,
            Bytes::from_static(
                b"--XX\r\nContent-Disposition: form-data; name=\"file\"\r\n\r\n\xff\r\n--XX--\r\n",
            ),
            &[],
            &[],
        );
        assert_eq!(text.unwrap_err().param, "file");
    }
}
