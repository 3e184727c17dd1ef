//! The text form of a join token, which a person carries from the head to a new node.

use std::fmt;
use std::str::FromStr;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use data_encoding::HEXLOWER;
use mesh_base::random;
use zeroize::Zeroizing;

use super::digest::sha256;

/// A one-time join token: the mesh's root digest, the token's id, and its secret.
///
/// Its text is `hydra1.` and the base64url of 60 bytes: SHA-256 of the root's certificate (32), token id (8),
/// secret (16), and the first four bytes of the SHA-256 of these, to distinguish copying errors from tokens
/// that the head does not know.
#[derive(Clone, PartialEq, Eq)]
pub struct JoinToken {
    root_sha256: [u8; 32],
    id: [u8; ID_LEN],
    secret: Zeroizing<[u8; SECRET_LEN]>,
}

impl JoinToken {
    /// A fresh token for the mesh whose root certificate has this hash.
    pub fn generate(root_sha256: [u8; 32]) -> Self {
        Self {
            root_sha256,
            id: random::bytes(),
            secret: Zeroizing::new(random::bytes()),
        }
    }

    /// SHA-256 of the certificate (DER) of the root that the token is for.
    pub fn root_sha256(&self) -> &[u8; 32] {
        &self.root_sha256
    }

    /// The public part, lower-case hex: names the token in lists and logs.
    pub fn id(&self) -> String {
        HEXLOWER.encode(&self.id)
    }

    /// The secret part of the token.
    pub fn secret(&self) -> &[u8] {
        self.secret.as_slice()
    }
}

/// The whole token, secret included.
impl fmt::Display for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut bytes = Zeroizing::new(Vec::with_capacity(LEN));
        bytes.extend_from_slice(&self.root_sha256);
        bytes.extend_from_slice(&self.id);
        bytes.extend_from_slice(self.secret.as_slice());
        let checksum = sha256(&bytes);
        bytes.extend_from_slice(&checksum[..CHECKSUM_LEN]);
        write!(f, "{PREFIX}{}", URL_SAFE_NO_PAD.encode(&bytes))
    }
}

impl fmt::Debug for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JoinToken")
            .field("root", &HEXLOWER.encode(&self.root_sha256))
            .field("id", &self.id())
            .finish_non_exhaustive()
    }
}

impl FromStr for JoinToken {
    type Err = ParseTokenError;

    fn from_str(text: &str) -> Result<Self, ParseTokenError> {
        let text = text.trim();
        let Some(body) = text.strip_prefix(PREFIX) else {
            return Err(match text.split_once('.') {
                Some((version, _)) if version.starts_with("hydra") && version.len() <= 16 => {
                    ParseTokenError::Version(version.to_owned())
                }
                _ => ParseTokenError::Prefix,
            });
        };
        // Longer text is refused before it is decoded.
        if body.len() > 4 * LEN {
            return Err(ParseTokenError::Length(body.len() / 4 * 3));
        }
        if let Some((at, found)) = body.char_indices().find(|(_, c)| !is_base64url(*c)) {
            return Err(ParseTokenError::Character {
                found,
                position: PREFIX.len() + at + 1,
            });
        }
        let bytes = URL_SAFE_NO_PAD.decode(body).map(Zeroizing::new);
        let bytes = bytes.map_err(|_| ParseTokenError::Length(body.len() / 4 * 3))?;
        if bytes.len() != LEN {
            return Err(ParseTokenError::Length(bytes.len()));
        }
        let (content, checksum) = bytes.split_at(LEN - CHECKSUM_LEN);
        if sha256(content)[..CHECKSUM_LEN] != *checksum {
            return Err(ParseTokenError::Checksum);
        }
        let (root, rest) = content.split_at(32);
        let (id, secret) = rest.split_at(ID_LEN);
        let fits = "lengths add up to LEN";
        Ok(Self {
            root_sha256: root.try_into().expect(fits),
            id: id.try_into().expect(fits),
            secret: Zeroizing::new(secret.try_into().expect(fits)),
        })
    }
}

/// Errors of parsing a join token.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ParseTokenError {
    /// The text does not have the prefix of a token.
    #[error(
        "not a join token: it must begin with `{PREFIX}`; make one with `hydramesh token create`"
    )]
    Prefix,
    /// A token of another version.
    #[error("join token version `{0}` is not known to this program (it reads `hydra1`); update it")]
    Version(String),
    /// A character that base64url does not have.
    #[error(
        "the join token has `{found}` at position {position}, where only letters, digits, - and _ can be; copy it again"
    )]
    Character {
        /// Character that is not allowed.
        found: char,
        /// Position of the character in the text, in bytes from 1.
        position: usize,
    },
    /// Cut off, or with something appended.
    #[error(
        "the join token holds {0} bytes instead of {LEN}: part of it is missing or something was added; copy it again"
    )]
    Length(usize),
    /// The checksum does not match: a typing error.
    #[error("the join token's checksum does not fit: a character was changed; copy it again")]
    Checksum,
}

fn is_base64url(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '-' || c == '_'
}

const PREFIX: &str = "hydra1.";
const ID_LEN: usize = 8;
const SECRET_LEN: usize = 16;
const CHECKSUM_LEN: usize = 4;
const LEN: usize = 32 + ID_LEN + SECRET_LEN + CHECKSUM_LEN;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn debug_output_has_no_secret() {
        let token = JoinToken::generate([7; 32]);
        let debug = format!("{token:?}");
        assert!(
            debug.contains(&token.id()) && !debug.contains(&HEXLOWER.encode(token.secret())),
            "{debug}"
        );
    }

    #[test]
    fn what_is_wrong_with_a_text_is_named() {
        let text = JoinToken::generate([7; 32]).to_string();
        let parse = |text: &str| text.parse::<JoinToken>().expect_err("must be refused");
        assert_eq!(parse("hello"), ParseTokenError::Prefix);
        assert_eq!(parse(""), ParseTokenError::Prefix);
        assert_eq!(
            parse(&text.replace("hydra1", "hydra2")),
            ParseTokenError::Version("hydra2".into())
        );
        assert_eq!(parse(&text[..text.len() - 4]), ParseTokenError::Length(57));
        assert_eq!(parse(&format!("{text}AAAA")), ParseTokenError::Length(63));
        assert_eq!(
            parse(&format!("{}!{}", &text[..20], &text[21..])),
            ParseTokenError::Character {
                found: '!',
                position: 21
            }
        );
        let other = if text.as_bytes()[30] == b'A' {
            "B"
        } else {
            "A"
        };
        assert_eq!(
            parse(&format!("{}{other}{}", &text[..30], &text[31..])),
            ParseTokenError::Checksum
        );
    }

    proptest! {
        #[test]
        fn text_form_round_trips(root: [u8; 32], space in "[ \n]{0,3}") {
            let token = JoinToken::generate(root);
            let text = format!("{space}{token}{space}");
            prop_assert_eq!(text.parse::<JoinToken>().expect("own text"), token);
        }

        #[test]
        fn any_change_of_one_character_is_noticed(at in 0usize..87, to in "[ -~]") {
            let text = JoinToken::generate([9; 32]).to_string();
            prop_assume!(&text[at..=at] != to.as_str());
            prop_assume!(!(to == " " && at == 86));
            let changed = format!("{}{to}{}", &text[..at], &text[at + 1..]);
            prop_assert!(changed.parse::<JoinToken>().is_err());
        }

        #[test]
        fn no_text_panics(text: String, tail in "[A-Za-z0-9_-]{0,200}") {
            let _ = text.parse::<JoinToken>();
            let _ = format!("hydra1.{tail}").parse::<JoinToken>();
        }
    }
}
