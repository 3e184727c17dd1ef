//! Tokens: chains of links, their text form, issuing and delegation.

use std::fmt;

use coset::cbor::{self, Value};
use data_encoding::BASE64URL_NOPAD;
use mesh_identity::{IdentityKey, PublicKey};

use crate::claims::{Claims, ClaimsError, TokenId};
use crate::link::{Link, LinkError};
use crate::rights::{Right, Rights, Tier};

/// A chain of links, from the issuer's to that of the bearer. It is well-formed; whether it holds, a
/// [`Door`](crate::Door) says. The text of a token is a secret.
#[derive(Clone, PartialEq, Eq)]
pub struct Token {
    /// Never empty.
    links: Vec<Link>,
}

/// Claims of a link that a holder adds.
#[derive(Clone, Debug)]
pub struct Child {
    /// What it allows.
    pub rights: Rights,
    /// How far it is trusted; `None` as far as its parent.
    pub tier: Option<Tier>,
    /// Person or program that it is for.
    pub subject: String,
    /// Start of the validity, seconds since the Unix epoch.
    pub not_before: u64,
    /// End of the validity, seconds since the Unix epoch.
    pub expires: u64,
    /// The key that may narrow it further. With one it is for delegation only.
    pub holder: Option<PublicKey>,
}

/// Reasons for which a text or bytes are not a token.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TokenError {
    /// The text is not `hydra-cap1.` and base64url.
    #[error("it is not a curtain token: one is {PREFIX} and base64url without padding")]
    Text,
    /// It is longer than any token.
    #[error("it has {0} bytes, and a token has at most {LONGEST_TOKEN}")]
    Length(usize),
    /// It is not a list of links.
    #[error("it is not a list of links in CBOR")]
    Encoding,
    /// It has no link, or too many.
    #[error("it has {0} links, and a token has 1 to {MOST_LINKS}")]
    Links(usize),
    /// One of its links is not one.
    #[error("link {number}: {error}")]
    Link {
        /// Counted from 1.
        number: usize,
        /// What is wrong.
        error: LinkError,
    },
    /// It says the same as a token, in another encoding than this program's.
    #[error("its encoding is not canonical")]
    NotCanonical,
}

/// A link that does not only narrow the one before it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TooWide {
    /// A right that the parent lacks.
    #[error("the right {0} is not covered by the parent's rights")]
    Right(Right),
    /// It begins before its parent or ends after it.
    #[error("its validity is not within its parent's")]
    Dates,
    /// It is for another tenant.
    #[error("its tenant is not its parent's")]
    Tenant,
    /// It is for another mesh.
    #[error("its audience is not its parent's")]
    Audience,
    /// It is trusted further.
    #[error("its tier {0} is higher than its parent's")]
    Tier(Tier),
}

/// Reasons for which a token cannot be delegated.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DelegationError {
    /// Its last link names no key.
    #[error("the token names no holder key, so it cannot be narrowed further")]
    NoHolder,
    /// The key is another one.
    #[error("the token is to be narrowed with another key: its holder is {0}")]
    Holder(mesh_identity::NodeId),
    /// The new claims are not allowed.
    #[error(transparent)]
    Claims(#[from] ClaimsError),
    /// The child would be wider than its parent.
    #[error(transparent)]
    TooWide(#[from] TooWide),
    /// It would be too long.
    #[error(transparent)]
    Token(#[from] TokenError),
}

impl Token {
    /// Issues a token of one link. `claims.issuer` and `claims.parent` are set here.
    ///
    /// # Errors
    /// If the claims are not allowed.
    pub fn issue(claims: Claims, key: &IdentityKey) -> Result<Self, ClaimsError> {
        let claims = Claims {
            issuer: Claims::sanctum(&key.node_id()),
            parent: None,
            ..claims
        };
        claims.check()?;
        let links = vec![Link::sign(claims, key)];
        Ok(Self { links })
    }

    /// A token that allows less, signed with the holder key of this one.
    ///
    /// # Errors
    /// If `key` is not that of the holder, the child is not narrower in each respect, or the chain gets too long.
    pub fn delegate(&self, child: Child, key: &IdentityKey) -> Result<Self, DelegationError> {
        let parent = self.last();
        let holder = parent.claims.holder.as_ref();
        let holder = holder.ok_or(DelegationError::NoHolder)?.node_id();
        if holder != key.node_id() {
            return Err(DelegationError::Holder(holder));
        }
        let claims = Claims {
            issuer: Claims::holder(&key.node_id()),
            tenant: parent.claims.tenant.clone(),
            tier: child.tier.unwrap_or(parent.claims.tier),
            subject: child.subject,
            rights: child.rights,
            audience: parent.claims.audience.clone(),
            not_before: child.not_before,
            expires: child.expires,
            id: TokenId::random(),
            parent: Some(parent.digest()),
            holder: child.holder,
        };
        claims.check()?;
        check_narrower(&parent.claims, &claims)?;
        if self.links.len() >= MOST_LINKS {
            return Err(TokenError::Links(self.links.len() + 1).into());
        }
        let mut links = self.links.clone();
        links.push(Link::sign(claims, key));
        let token = Self { links };
        match token.to_bytes().len() {
            length if length > LONGEST_TOKEN => Err(TokenError::Length(length).into()),
            _ => Ok(token),
        }
    }

    /// Reads the text form. Nothing is believed: [`Door::accept`](crate::Door::accept) verifies.
    ///
    /// # Errors
    /// If it is not the one encoding of a token.
    pub fn parse(text: &str) -> Result<Self, TokenError> {
        let encoded = text.strip_prefix(PREFIX).ok_or(TokenError::Text)?;
        if text.len() > LONGEST_TEXT {
            return Err(TokenError::Length(encoded.len() / 4 * 3));
        }
        let bytes = BASE64URL_NOPAD.decode(encoded.as_bytes());
        Self::from_bytes(&bytes.map_err(|_| TokenError::Text)?)
    }

    /// Reads the bytes of a token.
    ///
    /// # Errors
    /// If they are not the one encoding of a token.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, TokenError> {
        if bytes.len() > LONGEST_TOKEN {
            return Err(TokenError::Length(bytes.len()));
        }
        let value: Value = cbor::de::from_reader(bytes).map_err(|_| TokenError::Encoding)?;
        let parts = value.into_array().map_err(|_| TokenError::Encoding)?;
        if !(1..=MOST_LINKS).contains(&parts.len()) {
            return Err(TokenError::Links(parts.len()));
        }
        let link = |(at, part): (usize, &Value)| {
            let number = at + 1;
            let bytes = part.as_bytes().ok_or(TokenError::Encoding)?;
            Link::decode(bytes).map_err(|error| TokenError::Link { number, error })
        };
        let links = parts.iter().enumerate().map(link);
        let token = Self {
            links: links.collect::<Result<_, _>>()?,
        };
        if token.to_bytes() != bytes {
            return Err(TokenError::NotCanonical);
        }
        Ok(token)
    }

    /// The bytes of the token.
    pub fn to_bytes(&self) -> Vec<u8> {
        let links = self.links.iter().map(|link| Value::Bytes(link.encode()));
        let mut bytes = Vec::new();
        let written = cbor::ser::into_writer(&Value::Array(links.collect()), &mut bytes);
        written.expect("memory takes all bytes");
        bytes
    }

    /// The text form, a secret.
    pub fn to_text(&self) -> String {
        format!("{PREFIX}{}", BASE64URL_NOPAD.encode(&self.to_bytes()))
    }

    /// Claims of the links, from the issuer's on; whether they hold is another matter.
    pub fn claims(&self) -> impl Iterator<Item = &Claims> {
        self.links.iter().map(|link| &link.claims)
    }

    pub(crate) fn links(&self) -> &[Link] {
        &self.links
    }

    fn last(&self) -> &Link {
        self.links.last().expect("a token has a link")
    }
}

/// Without the text, which is a secret.
impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ids: Vec<_> = self.claims().map(|claims| claims.id).collect();
        f.debug_struct("Token")
            .field("ids", &ids)
            .finish_non_exhaustive()
    }
}

/// A child may narrow and do nothing else.
pub(crate) fn check_narrower(parent: &Claims, child: &Claims) -> Result<(), TooWide> {
    if child.tenant != parent.tenant {
        return Err(TooWide::Tenant);
    }
    if child.audience != parent.audience {
        return Err(TooWide::Audience);
    }
    if child.tier > parent.tier {
        return Err(TooWide::Tier(child.tier));
    }
    if child.not_before < parent.not_before || child.expires > parent.expires {
        return Err(TooWide::Dates);
    }
    match parent.rights.first_beyond(&child.rights) {
        Some(right) => Err(TooWide::Right(right.clone())),
        None => Ok(()),
    }
}

/// Begin of the text form.
pub const PREFIX: &str = "hydra-cap1.";
/// Maximum number of links in a token.
pub const MOST_LINKS: usize = 4;
/// Maximum bytes of a token: four links with three holder keys have some 21,000.
pub const LONGEST_TOKEN: usize = 24 << 10;
/// Maximum bytes of a token's text.
pub const LONGEST_TEXT: usize = PREFIX.len() + LONGEST_TOKEN / 3 * 4;
