//! Contents of one link of a token, and their encoding as CWT claims.

use std::fmt;
use std::str::FromStr;

use coset::cbor::Value;
use coset::cwt::{ClaimName, ClaimsSet, ClaimsSetBuilder, Timestamp};
use coset::iana::CwtClaimName;
use coset::{AsCborValue as _, CborSerializable as _, CoseKeyBuilder, MlDsaVariant};
use data_encoding::HEXLOWER;
use mesh_base::random;
use mesh_identity::{NodeId, PublicKey};
use serde::{Deserialize, Serialize};

use crate::rights::{Right, Rights, Tier, shown};

/// Contents of one link of a token. Times are seconds since the Unix epoch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claims {
    /// `sanctum:ID` in the first link, `holder:ID` in the others, with the id of the key that signs it.
    pub issuer: String,
    /// Customer or group that it was issued to.
    pub tenant: String,
    /// How far it is trusted.
    pub tier: Tier,
    /// Person or program that it is for, as the issuer calls it; may be empty.
    pub subject: String,
    /// What it allows.
    pub rights: Rights,
    /// The mesh that it is for.
    pub audience: String,
    /// Start of the validity.
    pub not_before: u64,
    /// End of the validity.
    pub expires: u64,
    /// Its id.
    pub id: TokenId,
    /// SHA-256 of the link before it; `None` in the first one.
    pub parent: Option<[u8; 32]>,
    /// The key that signs the next link. A link with one is for delegation only.
    pub holder: Option<PublicKey>,
}

/// Id of a token: 128 random bits. Its text is 32 lower-case hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct TokenId([u8; 16]);

/// A text that is not a token's id.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("the id of a curtain token is 32 hexadecimal digits, and {0:?} is not")]
pub struct TokenIdError(String);

/// Claims that no token may have.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ClaimsError {
    /// A claim is missing.
    #[error("its claim {0} is missing")]
    Missing(&'static str),
    /// A claim has another type or is out of range.
    #[error("its claim {0} is malformed")]
    Malformed(&'static str),
    /// It is of a version that this program does not know.
    #[error("it is of version {0}, and this program knows version {VERSION}; update this program")]
    Version(i128),
    /// It has a claim that this program does not know.
    #[error("it has the unknown claim {0}")]
    Unknown(String),
    /// The tenant's name cannot be one.
    #[error("invalid tenant {0:?}: use 1 to {LONGEST_NAME} letters, digits and any of . _ -")]
    Tenant(String),
    /// A text is too long or has control characters.
    #[error("invalid {0}: use at most {LONGEST_TEXT} bytes without control characters")]
    Text(&'static str),
    /// It allows nothing, or too much to list.
    #[error("it has {0} rights: use 1 to {MOST_RIGHTS}")]
    Rights(usize),
    /// The right needs the tier master.
    #[error("the right {right} needs the tier master, and this is {tier}")]
    Tier {
        /// The right.
        right: Right,
        /// The tier that was asked for.
        tier: Tier,
    },
    /// It ends before it begins.
    #[error("it ends at {expires}, not after its begin at {not_before} (seconds since 1970)")]
    Dates {
        /// Begin.
        not_before: u64,
        /// End.
        expires: u64,
    },
}

impl Claims {
    /// Checks the rules that hold for each link by itself.
    ///
    /// # Errors
    /// [`ClaimsError`] names the first rule that is broken.
    pub fn check(&self) -> Result<(), ClaimsError> {
        let is_named = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        if !(1..=LONGEST_NAME).contains(&self.tenant.len()) || !self.tenant.chars().all(is_named) {
            return Err(ClaimsError::Tenant(shown(&self.tenant)));
        }
        let texts = [
            ("issuer", &self.issuer),
            ("subject", &self.subject),
            ("audience", &self.audience),
        ];
        for (name, text) in texts {
            let is_absent = text.is_empty() && name != "subject";
            if is_absent || text.len() > LONGEST_TEXT || text.contains(char::is_control) {
                return Err(ClaimsError::Text(name));
            }
        }
        if !(1..=MOST_RIGHTS).contains(&self.rights.len()) {
            return Err(ClaimsError::Rights(self.rights.len()));
        }
        let tier = self.tier;
        if self.rights.contains(&Right::Admin) && tier < Tier::Master {
            let right = Right::Admin;
            return Err(ClaimsError::Tier { right, tier });
        }
        let (not_before, expires) = (self.not_before, self.expires);
        if not_before >= expires || i64::try_from(expires).is_err() {
            return Err(ClaimsError::Dates {
                not_before,
                expires,
            });
        }
        Ok(())
    }

    /// The issuer of links that the mesh's issuer signs with this key.
    pub(crate) fn sanctum(key: &NodeId) -> String {
        format!("sanctum:{key}")
    }

    /// The issuer of links that a holder signs with this key.
    pub(crate) fn holder(key: &NodeId) -> String {
        format!("holder:{key}")
    }

    /// The claims in CBOR, labels in the deterministic order of RFC 8949, section 4.2.1.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let seconds = |time: u64| Timestamp::WholeSeconds(i64::try_from(time).unwrap_or(i64::MAX));
        let mut set = ClaimsSetBuilder::new()
            .issuer(self.issuer.clone())
            .subject(self.subject.clone())
            .audience(self.audience.clone())
            .expiration_time(seconds(self.expires))
            .not_before(seconds(self.not_before))
            .cwt_id(self.id.0.to_vec());
        if let Some(key) = &self.holder {
            set = set.claim(CwtClaimName::Cnf, confirmation(key));
        }
        let rights = self.rights.iter();
        let rights = rights.map(|right| Value::Text(right.to_string()));
        set = set
            .private_claim(VERSION_CLAIM, Value::from(VERSION))
            .private_claim(TENANT_CLAIM, Value::Text(self.tenant.clone()))
            .private_claim(TIER_CLAIM, Value::Text(self.tier.to_string()))
            .private_claim(RIGHTS_CLAIM, Value::Array(rights.collect()));
        if let Some(parent) = self.parent {
            set = set.private_claim(PARENT_CLAIM, Value::Bytes(parent.to_vec()));
        }
        set.build().to_vec().expect("claims can be encoded")
    }

    /// Reads the output of [`encode`](Self::encode), and other encodings of the same: the caller compares.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, ClaimsError> {
        let set = ClaimsSet::from_slice(bytes).map_err(|_| ClaimsError::Malformed("set (CWT)"))?;
        let mut rest = set.rest.into_iter();
        let mut holder = None;
        let (mut version, mut tenant, mut tier, mut rights, mut parent) =
            (None, None, None, None, None);
        for (name, value) in rest.by_ref() {
            match name {
                ClaimName::Assigned(CwtClaimName::Cnf) => holder = Some(confirmed(&value)?),
                ClaimName::PrivateUse(VERSION_CLAIM) => version = Some(value),
                ClaimName::PrivateUse(TENANT_CLAIM) => tenant = Some(value),
                ClaimName::PrivateUse(TIER_CLAIM) => tier = Some(value),
                ClaimName::PrivateUse(RIGHTS_CLAIM) => rights = Some(value),
                ClaimName::PrivateUse(PARENT_CLAIM) => parent = Some(value),
                other => return Err(ClaimsError::Unknown(shown(&format!("{other:?}")))),
            }
        }
        let version = version.ok_or(ClaimsError::Missing("version"))?;
        match version.as_integer().map(i128::from) {
            Some(version) if version == i128::from(VERSION) => {}
            Some(version) => return Err(ClaimsError::Version(version)),
            None => return Err(ClaimsError::Malformed("version")),
        }
        let tier = text(tier, "tier")?;
        let id = set.cwt_id.ok_or(ClaimsError::Missing("id"))?;
        let parent = parent.map(|parent| {
            let digest = parent
                .as_bytes()
                .and_then(|bytes| bytes.as_slice().try_into().ok());
            digest.ok_or(ClaimsError::Malformed("parent"))
        });
        let claims = Self {
            issuer: set.issuer.ok_or(ClaimsError::Missing("issuer"))?,
            subject: set.subject.ok_or(ClaimsError::Missing("subject"))?,
            audience: set.audience.ok_or(ClaimsError::Missing("audience"))?,
            tenant: text(tenant, "tenant")?,
            tier: tier.parse().map_err(|_| ClaimsError::Malformed("tier"))?,
            rights: read_rights(rights)?,
            not_before: time(set.not_before, "begin")?,
            expires: time(set.expiration_time, "expiry")?,
            id: TokenId(id.try_into().map_err(|_| ClaimsError::Malformed("id"))?),
            parent: parent.transpose()?,
            holder,
        };
        claims.check()?;
        Ok(claims)
    }
}

fn text(value: Option<Value>, name: &'static str) -> Result<String, ClaimsError> {
    let value = value.ok_or(ClaimsError::Missing(name))?;
    value.into_text().map_err(|_| ClaimsError::Malformed(name))
}

fn time(time: Option<Timestamp>, name: &'static str) -> Result<u64, ClaimsError> {
    match time {
        Some(Timestamp::WholeSeconds(seconds)) => {
            u64::try_from(seconds).map_err(|_| ClaimsError::Malformed(name))
        }
        Some(Timestamp::FractionalSeconds(_)) => Err(ClaimsError::Malformed(name)),
        None => Err(ClaimsError::Missing(name)),
    }
}

fn read_rights(value: Option<Value>) -> Result<Rights, ClaimsError> {
    let malformed = || ClaimsError::Malformed("rights");
    let value = value.ok_or(ClaimsError::Missing("rights"))?;
    let values = value.into_array().map_err(|_| malformed())?;
    if values.len() > MOST_RIGHTS {
        return Err(ClaimsError::Rights(values.len()));
    }
    let right = |value: &Value| value.as_text().and_then(|text| text.parse::<Right>().ok());
    let rights = values.iter().map(right).collect::<Option<Rights>>();
    rights.ok_or_else(malformed)
}

/// The claim `cnf` with an ML-DSA-65 key (RFC 8747, RFC 9964).
fn confirmation(key: &PublicKey) -> Value {
    let bytes = key.as_bytes().to_vec();
    let key = CoseKeyBuilder::new_mldsa_pub_key(MlDsaVariant::MlDsa65, bytes).build();
    let key = key.to_cbor_value().expect("a key can be encoded");
    Value::Map(vec![(Value::from(COSE_KEY), key)])
}

/// The key in a claim `cnf`. Only its bytes are read: the caller compares the whole encoding.
fn confirmed(value: &Value) -> Result<PublicKey, ClaimsError> {
    let field = |value: &Value, label: i64| {
        let map = value.as_map()?;
        let found = map.iter().find(|(name, _)| *name == Value::from(label));
        found.map(|(_, value)| value.clone())
    };
    let key = field(value, COSE_KEY).and_then(|key| field(&key, PUBLIC_KEY));
    let key = key.as_ref().and_then(Value::as_bytes);
    let key = key.and_then(|bytes| PublicKey::from_bytes(bytes).ok());
    key.ok_or(ClaimsError::Malformed("holder key"))
}

impl TokenId {
    /// A new id, of the system's randomness.
    pub fn random() -> Self {
        Self(random::bytes())
    }
}

impl fmt::Display for TokenId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&HEXLOWER.encode(&self.0))
    }
}

impl fmt::Debug for TokenId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl From<TokenId> for String {
    fn from(id: TokenId) -> Self {
        id.to_string()
    }
}

impl TryFrom<String> for TokenId {
    type Error = TokenIdError;

    fn try_from(text: String) -> Result<Self, TokenIdError> {
        text.parse()
    }
}

impl FromStr for TokenId {
    type Err = TokenIdError;

    fn from_str(text: &str) -> Result<Self, TokenIdError> {
        let bytes = HEXLOWER.decode(text.as_bytes()).ok();
        let bytes = bytes.and_then(|bytes| bytes.try_into().ok());
        bytes.map(Self).ok_or_else(|| TokenIdError(shown(text)))
    }
}

const VERSION: u64 = 1;
/// Labels of the claims without a registered one: CWT leaves those below -65536 to private use.
const VERSION_CLAIM: i64 = -65537;
const TENANT_CLAIM: i64 = -65538;
const TIER_CLAIM: i64 = -65539;
const RIGHTS_CLAIM: i64 = -65540;
const PARENT_CLAIM: i64 = -65541;
/// Label of a key in `cnf` (RFC 8747), and of its bytes in an AKP key (RFC 9964).
const COSE_KEY: i64 = 1;
const PUBLIC_KEY: i64 = -1;

const LONGEST_NAME: usize = 64;
const LONGEST_TEXT: usize = 128;
/// Maximum number of rights in a token.
const MOST_RIGHTS: usize = 32;
