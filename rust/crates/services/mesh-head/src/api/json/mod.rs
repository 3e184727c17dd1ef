//! Reading JSON as real clients send it.
//!
//! Strings cut in the middle of an emoji hold half of a surrogate pair, as an escape or as bytes; JSON's own
//! reader refuses them, and a conversation that holds one would be refused on every turn. Half a pair is read
//! as U+FFFD, a whole pair in bytes (CESU-8) as its character. A byte order mark is skipped.
//!
//! Values are bounded in number and depth, see `bounded`.

mod bounded;

use std::borrow::Cow;

use serde::de::DeserializeSeed;

use crate::api::invalid::Invalid;

use bounded::{Body, Budget};
pub(crate) use bounded::{Lists, Object};

/// A JSON object.
///
/// # Errors
/// [`Invalid`] says where the text stops being one.
pub(crate) fn object(body: &[u8]) -> Result<Object, Invalid> {
    let body = body.strip_prefix(BYTE_ORDER_MARK).unwrap_or(body);
    if body.trim_ascii().is_empty() {
        let text = "The body is empty: send a JSON object";
        return Err(Invalid::new("body", text));
    }
    let mut object = read(body)?;
    // Only bodies that are no JSON are looked at a second time.
    if object.is_err()
        && let Cow::Owned(mended) = whole_characters(body)
    {
        object = read(&mended)?;
    }
    object.map_err(|error| {
        let text = format!("The body is not a JSON object: {error}");
        Invalid::new("body", text)
    })
}

/// The object, or the error that shows that it is none. A body that holds too much is refused.
fn read(body: &[u8]) -> Result<serde_json::Result<Object>, Invalid> {
    let mut budget = Budget::default();
    let mut json = serde_json::Deserializer::from_slice(body);
    let object = Body(&mut budget).deserialize(&mut json);
    let object = object.and_then(|object| json.end().map(|()| object));
    match budget.exceeded {
        None => Ok(object),
        Some(exceeded) => {
            let text =
                format!("The body is too large for one request: {exceeded}; send less at a time");
            Err(Invalid::new("body", text))
        }
    }
}

/// `body` with every half of a surrogate pair and every pair in bytes replaced; borrowed if nothing is
/// replaced.
fn whole_characters(body: &[u8]) -> Cow<'_, [u8]> {
    let mut mended: Vec<u8> = Vec::new();
    let mut copied = 0;
    let mut at = 0;
    while at < body.len() {
        let rest = &body[at..];
        let mut utf8 = [0; 4];
        let (len, replacement): (usize, &[u8]) = match rest {
            [b'\\', b'u', ..] => match (escape(rest), rest.get(6..).and_then(escape)) {
                (Some(0xd800..0xdc00), Some(0xdc00..0xe000)) => (12, b""),
                (Some(0xd800..0xe000), _) => (6, b"\\ufffd"),
                _ => (2, b""),
            },
            // An escaped character begins no escape.
            [b'\\', _, ..] => (2, b""),
            // Surrogates in bytes, as UTF-8 does not allow them.
            [0xed, 0xa0..=0xbf, 0x80..=0xbf, ..] => match pair(rest) {
                Some(character) => (6, character.encode_utf8(&mut utf8).as_bytes()),
                None => (3, b"\\ufffd"),
            },
            _ => (1, b""),
        };
        if !replacement.is_empty() {
            mended.extend_from_slice(&body[copied..at]);
            mended.extend_from_slice(replacement);
            copied = at + len;
        }
        at += len;
    }
    if mended.is_empty() {
        return Cow::Borrowed(body);
    }
    mended.extend_from_slice(&body[copied..]);
    Cow::Owned(mended)
}

/// The code unit of a `\u` escape with four hexadecimal digits at the beginning.
fn escape(text: &[u8]) -> Option<u16> {
    let digits = text.strip_prefix(b"\\u")?.first_chunk::<4>()?;
    let digits = std::str::from_utf8(digits).ok()?;
    let all_hex = digits.bytes().all(|byte| byte.is_ascii_hexdigit());
    all_hex.then(|| u16::from_str_radix(digits, 16).ok())?
}

/// The character of two surrogates of three bytes each at the beginning.
fn pair(text: &[u8]) -> Option<char> {
    let unit = |bytes: &[u8]| match *bytes {
        [0xed, second, third] if third & 0xc0 == 0x80 => {
            Some(0xd000 | u16::from(second & 0x3f) << 6 | u16::from(third & 0x3f))
        }
        _ => None,
    };
    let (high, low) = text.first_chunk::<6>()?.split_at(3);
    let mut characters = char::decode_utf16([unit(high)?, unit(low)?]);
    let first = characters.next()?.ok();
    first.filter(|&character| character > '\u{ffff}')
}

const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn text(body: &[u8]) -> Result<String, String> {
        match object(body) {
            Ok(object) => Ok(object.map["x"].as_str().unwrap().to_owned()),
            Err(invalid) => Err(invalid.message),
        }
    }

    #[test]
    fn half_a_surrogate_pair_is_a_replacement_character() {
        for (body, expected) in [
            (&br#"{"x":"a\ud83db"}"#[..], "a\u{fffd}b"),
            (br#"{"x":"a\uDE00"}"#, "a\u{fffd}"),
            (br#"{"x":"\ud83d\ud83d\ude00"}"#, "\u{fffd}\u{1f600}"),
            (br#"{"x":"\ud83d\n"}"#, "\u{fffd}\n"),
            (br#"{"x":"\\ud83d \ude00"}"#, "\\ud83d \u{fffd}"),
            (br#"{"x":"\ud83d\ude00"}"#, "\u{1f600}"),
            (b"{\"x\":\"a\xed\xa0\xbdb\"}", "a\u{fffd}b"),
            (b"{\"x\":\"a\xed\xa0\xbd\xed\xb8\x80b\"}", "a\u{1f600}b"),
            (
                b"{\"x\":\"\xed\xa0\xbd\xed\xa0\xbd\xed\xb8\x80\"}",
                "\u{fffd}\u{1f600}",
            ),
            (b"{\"x\":\"\xed\xb8\x80\xed\xa0\xbd\"}", "\u{fffd}\u{fffd}"),
            (b"{\"x\":\"\xed\xa0\xbd\xed\x9f\xbf\"}", "\u{fffd}\u{d7ff}"),
            (b"\xef\xbb\xbf{\"x\":\"y\"}", "y"),
        ] {
            assert_eq!(text(body).as_deref(), Ok(expected));
        }
    }

    #[test]
    fn a_key_may_hold_half_a_pair_too() {
        let object = object(br#"{"a\ud800":1}"#).unwrap();
        assert_eq!(
            serde_json::Value::Object(object.map),
            json!({"a\u{fffd}": 1})
        );
    }

    #[test]
    fn small_values_cannot_take_a_multiple_of_the_body() {
        let many = |unit: &str| {
            let units = vec![unit; 1 << 18].join(",");
            [format!("[{units}]"), format!("{{\"a\":[{units}]}}")]
        };
        for unit in ["{}", "[]", "0", "\"\"", "null", "{\"a\":1}", "[{}]"] {
            for value in many(unit) {
                for name in ["messages", "tools", "prompt", "input", "logit_bias", "x"] {
                    let of_ids = unit == "0"
                        && value.starts_with("[0")
                        && ["prompt", "input"].contains(&name);
                    let body = format!("{{\"{name}\":{value}}}");
                    match object(body.as_bytes()) {
                        Ok(object) => assert!(of_ids && object.lists.len() == 1, "{name}: {unit}"),
                        Err(invalid) => assert!(
                            !of_ids && invalid.message.contains("holds over"),
                            "{}",
                            invalid.message
                        ),
                    }
                }
            }
        }
        let keys: Vec<String> = (0..1 << 18).map(|key| format!("\"{key}\":1")).collect();
        let body = format!("{{\"logit_bias\":{{{}}}}}", keys.join(","));
        assert!(object(body.as_bytes()).is_err());
        let deep = format!("{{\"x\":{}1{}}}", "{\"a\":".repeat(200), "}".repeat(200));
        assert!(object(deep.as_bytes()).is_err());
    }

    #[test]
    fn token_ids_are_kept_as_numbers_and_mixed_lists_as_their_kinds() {
        let of = |input: &str| object(format!("{{\"input\":{input}}}").as_bytes()).unwrap();
        let lists = |input: &str| of(input).lists.remove("input");
        assert_eq!(
            lists("[1,2.0,4294967295]"),
            Some(Lists::One(vec![1, 2, u32::MAX]))
        );
        assert_eq!(
            lists("[[1],[],[2,3]]"),
            Some(Lists::Many(vec![vec![1], vec![], vec![2, 3]]))
        );
        for mixed in [
            "[1,\"a\"]",
            "[1,-1]",
            "[1,[2]]",
            "[[1],2]",
            "[[1],\"a\"]",
            "[]",
            "[[1.5]]",
            "[[1,\"a\"]]",
            "\"a\"",
            "5",
        ] {
            assert_eq!(lists(mixed), None, "{mixed}");
        }
        assert_eq!(of("[\"a\",\"b\"]").map["input"], json!(["a", "b"]));
        // The last of two counts.
        let twice = object(b"{\"input\":[1],\"input\":\"x\"}").unwrap();
        assert_eq!((twice.lists.len(), &twice.map["input"]), (0, &json!("x")));
    }

    #[test]
    fn what_is_no_json_is_refused_with_its_place() {
        for (body, part) in [
            (&b""[..], "empty"),
            (b" \n", "empty"),
            (b"{\"x\":", "EOF"),
            (b"[]", "not a JSON object"),
            (b"{\"x\":\"\xff\"}", "line 1"),
            (b"{\"x\":\"\\ud8\"}", "line 1"),
            (b"{\"x\":NaN}", "line 1"),
        ] {
            let message = text(body).unwrap_err();
            assert!(message.contains(part), "{message}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(body in prop::collection::vec(any::<u8>(), 0..60)) {
            let _ = object(&body);
        }

        #[test]
        fn escapes_of_any_code_units_are_read(units in prop::collection::vec(any::<u16>(), 0..12)) {
            let escaped: String = units.iter().map(|unit| format!("\\u{unit:04x}")).collect();
            let body = format!("{{\"x\":\"{escaped}\"}}");
            prop_assert_eq!(text(body.as_bytes()), Ok(String::from_utf16_lossy(&units)));
        }

        #[test]
        fn surrogates_in_bytes_are_read(units in prop::collection::vec(0xd7f0..0xe010_u16, 0..12)) {
            let mut body = b"{\"x\":\"".to_vec();
            for unit in &units {
                let [high, low] = unit.to_be_bytes();
                body.extend([0xe0 | high >> 4, 0x80 | (high & 0xf) << 2 | low >> 6, 0x80 | low & 0x3f]);
            }
            body.extend(b"\"}");
            prop_assert_eq!(text(&body), Ok(String::from_utf16_lossy(&units)));
        }
    }
}
