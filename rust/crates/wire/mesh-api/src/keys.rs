//! Administration of curtain tokens and API keys.

use std::borrow::Cow;

use serde::{Deserialize, Serialize};

/// A curtain token to issue.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default, deny_unknown_fields)]
pub struct CreateKeyRequest {
    /// Customer or group that it is for: letters, digits and any of `. _ -`; `default` if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tenant: Option<String>,
    /// How far it is trusted; `grimoire-public` if absent. The right `admin` needs `master`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(extend("enum" = ["grimoire-public", "goodlife", "master"])))]
    pub tier: Option<String>,
    /// Person or program that it is for, up to 128 bytes.
    pub subject: String,
    /// Rights: `infer:MODEL` (a trailing `*` stands for any rest), `embed`, `image`, `admin`, `federate`, `join`. Without
    /// any: `infer:*`, `embed` and `image`.
    pub rights: Vec<String>,
    /// Seconds for which it is good, up to five years; 90 days if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(range(min = 1, max = 158_112_000)))]
    pub ttl_seconds: Option<u64>,
    /// ML-DSA-65 public key in base64, of a holder that narrows the token for others. Such a token admits nobody by itself.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub holder_key: Option<String>,
    /// Note for the operator, up to 256 bytes.
    pub note: String,
}

/// A new curtain token.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct KeyCreated {
    /// The token, which is shown only once.
    pub token: String,
    /// Id of the token.
    #[serde(default)]
    pub id: String,
    /// Its end, in seconds since 1970.
    #[serde(default)]
    pub expires_at: u64,
}

/// The curtain tokens that the head remembers, and the API keys.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct KeyList {
    /// Id of the issuer's key: SHA-256 of its ML-DSA-65 public key.
    pub issuer: String,
    /// The mesh root's signed statement about that key, base64.
    pub endorsement: String,
    /// API keys and tokens.
    pub keys: Vec<Key>,
}

/// A curtain token or an API key, without its text.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct Key {
    /// Its id.
    pub id: String,
    /// `token`; `narrowed` for a revoked token that a holder signed; `api-key` for a key of `http.api_keys_file`.
    #[cfg_attr(feature = "schema", schemars(extend("enum" = ["token", "narrowed", "api-key"])))]
    pub kind: Cow<'static, str>,
    /// `open`, `revoked` or `expired`.
    #[cfg_attr(feature = "schema", schemars(extend("enum" = ["open", "revoked", "expired"])))]
    pub state: Cow<'static, str>,
    /// Customer or group that it is for.
    pub tenant: Option<String>,
    /// How far it is trusted.
    pub tier: String,
    /// Person or program that it is for.
    pub subject: String,
    /// Its rights.
    pub rights: Vec<String>,
    /// Note of its creator.
    pub note: String,
    /// Its creation, in seconds since 1970.
    pub created_at: Option<u64>,
    /// Its end, in seconds since 1970.
    pub expires_at: Option<u64>,
    /// Its revocation, in seconds since 1970.
    pub revoked_at: Option<u64>,
    /// The token with which it was asked for.
    pub parent: Option<String>,
    /// Id of the holder key, if it is for delegation only.
    pub holder: Option<String>,
}

/// A curtain token, by its id.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct KeyRequest {
    /// Id of the token.
    pub id: String,
}

/// A curtain token that is no longer valid.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct RevokedKey {
    /// Id of the token.
    pub id: String,
    /// Always true.
    pub revoked: bool,
}
