//! API keys: admit clients and administrators, and limit the use by each client.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard};
use std::time::SystemTime;

use axum::http::{HeaderMap, header};
use data_encoding::HEXLOWER;
use mesh_base::clock::unix_seconds;
use mesh_base::random;
use mesh_control::fair::Origin;
use mesh_curtain::{PREFIX, Refusal, TokenId};
use mesh_service::files::Readers;
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use super::papers::{Entry, Papers};
use crate::ids;
use crate::locks::lock;
use crate::mesh::Lease;
use crate::refusals::Refused;
use crate::sanctum::{NotAccepted, Sanctum};

/// The keys of one head. Only their hashes are held. Clones share them, so that keys that are read again
/// count everywhere.
#[derive(Clone)]
pub(crate) struct Keys {
    known: Arc<RwLock<Known>>,
    /// Issues and accepts curtain tokens.
    sanctum: Arc<Sanctum>,
    /// A key or token is needed even if no API key is listed.
    required: bool,
    /// Numbers of issued tokens that were shown.
    tokens: Arc<Mutex<HashMap<TokenId, usize>>>,
    /// Only this process has it.
    secret: KeyHash,
}

#[derive(PartialEq)]
struct Known {
    admin: KeyHash,
    api: Vec<ApiKey>,
}

#[derive(PartialEq)]
struct ApiKey {
    hash: KeyHash,
    /// It keeps this for as long as it is known.
    number: usize,
    entry: Option<Entry>,
}

/// An API key, as administrators see it.
#[derive(Debug, Clone)]
pub(crate) struct KeyInfo {
    pub id: String,
    pub entry: Option<Entry>,
}

type KeyHash = [u8; 32];

/// Origin of a request, by its key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Caller {
    Admin,
    Key(usize),
    /// Holds a token that is, or follows from, the issued one with this number.
    Token(usize),
    /// Holds none, and none is needed.
    Anyone,
}

/// A caller with its rights.
#[derive(Debug, Clone)]
pub(crate) struct Admitted {
    pub caller: Caller,
    /// Salt under which its requests share cached prompts; 0 for all requests without a key.
    pub salt: u64,
    pub papers: Arc<Papers>,
    pub proof: Proof,
}

/// What a caller has shown, as far as is needed to see later whether it still holds. No text of a key or
/// token.
#[derive(Clone)]
pub(crate) enum Proof {
    Nothing,
    /// An API key, or the admin key.
    Key(KeyHash),
    /// The ids of a curtain token's links, and its end.
    Token(Vec<TokenId>, u64),
}

/// A key that opens nothing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Denied {
    #[error("no API key was sent; send it as `Authorization: Bearer <key>`")]
    Missing,
    #[error("no API key or curtain token was sent: sealed DCF needs one")]
    Unsent,
    #[error("the API key is not one of this head's; ask its operator for one")]
    Wrong,
    #[error("the API key {id} expired {seconds} s ago; ask the head's operator for another")]
    Expired { id: String, seconds: u64 },
    #[error(transparent)]
    Token(#[from] NotAccepted),
    #[error(
        "the request is for the organization {given:?}, and its key or token is of the tenant {tenant:?}"
    )]
    Organization { given: String, tenant: String },
}

impl Denied {
    /// The refusal for the audit trail; `None` where nothing was shown.
    pub(crate) fn refused(&self, door: &'static str) -> Option<Refused> {
        let known = |id: &TokenId| id.to_string();
        let (reason, id) = match self {
            Self::Missing | Self::Unsent => return None,
            Self::Wrong => ("unknown API key", String::new()),
            Self::Expired { id, .. } => ("expired API key", id.clone()),
            Self::Organization { .. } => ("wrong tenant", String::new()),
            Self::Token(NotAccepted::Unreadable(_)) => ("unreadable token", String::new()),
            // The signatures of these hold.
            Self::Token(NotAccepted::Refused(refusal)) => match refusal {
                Refusal::Expired { id, .. } => ("expired token", known(id)),
                Refusal::NotYet { id, .. } => ("token that is not valid yet", known(id)),
                Refusal::Revoked(id) => ("revoked or unknown token", known(id)),
                Refusal::DelegationOnly(id) => ("token for delegation only", known(id)),
                Refusal::Audience { .. } => ("token of another mesh", String::new()),
                Refusal::Issuer { .. } => ("token of another issuer", String::new()),
                Refusal::Tenant { .. } => ("token of another tenant", String::new()),
                _ => ("altered token", String::new()),
            },
        };
        Some(Refused { door, reason, id })
    }
}

/// Reasons for which the keys cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum KeysError {
    /// The file cannot be read or written.
    #[error("{path}: {error}")]
    File {
        /// Path of the file.
        path: PathBuf,
        /// Error of the system.
        error: io::Error,
    },
    /// A file without keys would lock everyone out, or let everyone in.
    #[error("{0} holds no API key; write one per line, or leave http.api_keys_file out")]
    Empty(PathBuf),
    /// A line of the file makes no sense.
    #[error("{path}, line {line}: {reason}")]
    Entry {
        /// Path of the file.
        path: PathBuf,
        /// Counted from 1.
        line: usize,
        /// What is wrong.
        reason: String,
    },
    /// The file is not created anew: the holder of the old key would be locked out without a word.
    #[error(
        "{0} is damaged: it holds no key; restore it from a backup, or remove it, and the head makes another at its next start"
    )]
    NoAdminKey(PathBuf),
}

impl Keys {
    /// Reads the API keys (one per line, with or without an entry; empty lines and lines that begin with # are
    /// skipped) and the admin key, which is made at the first start.
    ///
    /// # Errors
    /// [`KeysError`] names the file.
    pub(crate) fn load(
        state_dir: &Path,
        api_keys_file: Option<&Path>,
        sanctum: Arc<Sanctum>,
    ) -> Result<Self, KeysError> {
        let known = Known::read(state_dir, api_keys_file, &[])?;
        Ok(Self {
            known: Arc::new(RwLock::new(known)),
            sanctum,
            required: false,
            tokens: Arc::default(),
            secret: random::bytes(),
        })
    }

    /// The same; with `required`, a key or token is needed even if no API key is listed.
    #[must_use]
    pub(crate) fn required(self, required: bool) -> Self {
        Self { required, ..self }
    }

    pub(crate) fn sanctum(&self) -> &Arc<Sanctum> {
        &self.sanctum
    }

    /// Reads them again; true if they have changed. Requests under way are not touched.
    ///
    /// # Errors
    /// [`KeysError`] names the file. The keys stay as they were.
    pub(crate) fn reload(
        &self,
        state_dir: &Path,
        api_keys_file: Option<&Path>,
    ) -> Result<bool, KeysError> {
        let fresh = Known::read(state_dir, api_keys_file, &self.known().api)?;
        let changed = *self.known() != fresh;
        *self.known.write().unwrap_or_else(PoisonError::into_inner) = fresh;
        Ok(changed)
    }

    fn known(&self) -> RwLockReadGuard<'_, Known> {
        self.known.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// The API keys.
    pub(crate) fn infos(&self) -> Vec<KeyInfo> {
        let known = self.known();
        let info = |key: &ApiKey| KeyInfo {
            id: key_id(&key.hash),
            entry: key.entry.clone(),
        };
        known.api.iter().map(info).collect()
    }

    pub(crate) fn are_needed(&self) -> bool {
        self.required || !self.known().api.is_empty()
    }

    /// The number by which workers tell requests of different keys apart. It reveals nothing about the key, as
    /// it is made with the secret. Never 0, which is for requests without keys.
    fn salt_of(&self, key: &KeyHash) -> u64 {
        let salted = Sha256::new().chain_update(self.secret).chain_update(key);
        let digest = salted.finalize();
        let first = digest.first_chunk();
        first.map_or(1, |bytes| u64::from_le_bytes(*bytes).max(1))
    }

    /// The caller that these headers prove, and its rights at this time.
    ///
    /// # Errors
    /// `Denied` where a key is needed and is missing, and wherever one is sent that is wrong and keys are in
    /// use. A curtain token is never ignored.
    pub(crate) fn admit(&self, headers: &HeaderMap, now: SystemTime) -> Result<Admitted, Denied> {
        let now = unix_seconds(now);
        let admitted = match bearer(headers) {
            Some(credential) => self.admit_credential(credential, now)?,
            None if self.are_needed() => return Err(Denied::Missing),
            None => Admitted::anyone(),
        };
        // OpenAI's clients name their organization here. Those of plain keys have always been free in it.
        let given = headers
            .get(ORGANIZATION)
            .and_then(|name| name.to_str().ok());
        admitted.for_tenant(given.unwrap_or_default())
    }

    /// The caller that this key or token proves, where one is needed even if no API key is listed. `tenant`
    /// is the one that it means to act for, or empty.
    ///
    /// # Errors
    /// `Denied` as [`Keys::admit`], and if nothing was sent.
    pub(crate) fn admit_shown(
        &self,
        credential: &str,
        tenant: &str,
        now: SystemTime,
    ) -> Result<Admitted, Denied> {
        let credential = credential.trim();
        if credential.is_empty() {
            return Err(Denied::Unsent);
        }
        let admitted = self.admit_credential(credential, unix_seconds(now))?;
        admitted.unless_anyone()?.for_tenant(tenant)
    }

    /// The same caller at this time, if what it has shown still holds. Its rights may have changed.
    ///
    /// # Errors
    /// `Denied` says why it does not hold any more.
    pub(crate) fn admit_again(
        &self,
        admitted: &Admitted,
        now: SystemTime,
    ) -> Result<Admitted, Denied> {
        let now = unix_seconds(now);
        match &admitted.proof {
            Proof::Nothing => Err(Denied::Unsent),
            Proof::Key(hash) => self.admit_hash(*hash, now)?.unless_anyone(),
            Proof::Token(links, expires) => {
                self.sanctum.accept_again(links, *expires, now)?;
                Ok(admitted.clone())
            }
        }
    }

    fn admit_credential(&self, credential: &str, now: u64) -> Result<Admitted, Denied> {
        match credential.starts_with(PREFIX) {
            true => self.admit_token(credential, now),
            false => self.admit_hash(hash(credential), now),
        }
    }

    fn admit_token(&self, token: &str, now: u64) -> Result<Admitted, Denied> {
        let grant = self.sanctum.accept(token, now)?;
        let mut numbers = lock(&self.tokens);
        let next = numbers.len();
        let number = *numbers.entry(grant.issued_id()).or_insert(next);
        Ok(Admitted {
            caller: Caller::Token(number),
            salt: self.salt_of(&hash(&grant.id().to_string())),
            proof: Proof::Token(grant.ids.clone(), grant.expires),
            papers: Arc::new(Papers::of_token(grant)),
        })
    }

    fn admit_hash(&self, presented: KeyHash, now: u64) -> Result<Admitted, Denied> {
        let known = self.known();
        if bool::from(presented.ct_eq(&known.admin)) {
            return Ok(Admitted {
                caller: Caller::Admin,
                salt: self.salt_of(&known.admin),
                papers: Arc::new(Papers::of_admin()),
                proof: Proof::Key(presented),
            });
        }
        // All of them are compared, so that the time tells nothing about which one matched.
        let mut found = None;
        for key in &known.api {
            if bool::from(presented.ct_eq(&key.hash)) {
                found = Some(key);
            }
        }
        let Some(found) = found else {
            // Clients insist on sending some key even where none is needed.
            return match self.required || !known.api.is_empty() {
                true => Err(Denied::Wrong),
                false => Ok(Admitted::anyone()),
            };
        };
        let (id, entry) = (key_id(&found.hash), found.entry.as_ref());
        if let Some(end) = entry.and_then(|entry| entry.expires)
            && now >= end
        {
            let seconds = now - end;
            return Err(Denied::Expired { id, seconds });
        }
        Ok(Admitted {
            caller: Caller::Key(found.number),
            salt: self.salt_of(&found.hash),
            papers: Arc::new(Papers::of_key(&id, entry)),
            proof: Proof::Key(presented),
        })
    }
}

impl Admitted {
    fn anyone() -> Self {
        Self {
            caller: Caller::Anyone,
            salt: 0,
            papers: Arc::new(Papers::nothing()),
            proof: Proof::Nothing,
        }
    }

    fn unless_anyone(self) -> Result<Self, Denied> {
        match self.caller {
            Caller::Anyone => Err(Denied::Wrong),
            _ => Ok(self),
        }
    }

    fn for_tenant(self, given: &str) -> Result<Self, Denied> {
        let given = given.trim();
        match &self.papers.tenant {
            Some(tenant) if !given.is_empty() && given != tenant => Err(Denied::Organization {
                given: given.chars().take(80).collect(),
                tenant: tenant.clone(),
            }),
            _ => Ok(self),
        }
    }
}

impl fmt::Debug for Proof {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Nothing => f.write_str("Nothing"),
            Self::Key(hash) => write!(f, "Key({})", key_id(hash)),
            Self::Token(links, _) => f.debug_tuple("Token").field(links).finish(),
        }
    }
}

impl Known {
    /// Reads the keys. Those that are among `before` keep their numbers, and no other key gets one of those.
    fn read(
        state_dir: &Path,
        api_keys_file: Option<&Path>,
        before: &[ApiKey],
    ) -> Result<Self, KeysError> {
        let admin = hash(&load_or_create_admin_key(&state_dir.join(ADMIN_KEY_FILE))?);
        let mut api = Vec::new();
        if let Some(path) = api_keys_file {
            let text = std::fs::read_to_string(path).map_err(|error| file_error(path, error))?;
            mesh_service::files::warn_if_exposed(path, Readers::Group);
            let lines = text.lines().map(str::trim).enumerate();
            let lines = lines.filter(|(_, line)| !line.is_empty() && !line.starts_with('#'));
            let taken = before.iter().map(|key| key.number + 1);
            let mut next = taken.max().unwrap_or(0);
            for (at, line) in lines {
                let (key, entry) = Entry::read(line).map_err(|reason| KeysError::Entry {
                    path: path.into(),
                    line: at + 1,
                    reason,
                })?;
                let hash = hash(key);
                let old = before.iter().find(|known| known.hash == hash);
                let number = old.map_or(next, |known| known.number);
                next = next.max(number + 1);
                api.push(ApiKey {
                    hash,
                    number,
                    entry,
                });
            }
            if api.is_empty() {
                return Err(KeysError::Empty(path.into()));
            }
        }
        Ok(Self { admin, api })
    }
}

/// The client of a request, as limits count it.
#[derive(Debug, Clone)]
pub(crate) struct Client {
    pub caller: Caller,
    /// Address of the client, which counts where there are no keys.
    pub address: Option<IpAddr>,
    /// Salt of its cached prompts; see [`Admitted::salt`].
    pub salt: u64,
    /// What it may do.
    pub papers: Arc<Papers>,
}

impl Client {
    /// A client of plain DCF, which has no key.
    pub(crate) fn at(address: IpAddr) -> Self {
        Self::new(Admitted::anyone(), address)
    }

    /// A caller, and the address that it came from.
    pub(crate) fn new(admitted: Admitted, address: IpAddr) -> Self {
        Self {
            caller: admitted.caller,
            address: Some(address.to_canonical()),
            salt: admitted.salt,
            papers: admitted.papers,
        }
    }

    /// The client that its requests can be traced to.
    pub(crate) fn origin(&self) -> Origin {
        match (self.caller, self.address) {
            (Caller::Admin, _) => Origin::Admin,
            (Caller::Key(number), _) => Origin::Key(number + 1),
            (Caller::Token(number), _) => Origin::Token(number),
            (Caller::Anyone, Some(address)) => Origin::of(address),
            (Caller::Anyone, None) => Origin::Unknown,
        }
    }
}

/// Bounds the answers that one client has running: a request for several counts as several.
#[derive(Debug)]
pub(crate) struct ConcurrencyLimit {
    limit: usize,
    inside: Mutex<HashMap<Name, usize>>,
}

type Name = (Caller, Option<IpAddr>);

impl ConcurrencyLimit {
    /// Lets requests for `limit` answers of each client through at a time; 0 lets all through.
    pub(crate) fn new(limit: usize) -> Self {
        Self {
            limit,
            inside: Mutex::default(),
        }
    }

    /// Admits a request for `answers` answers, if there is room. One with more answers than the limit is
    /// admitted only alone.
    pub(crate) fn enter(self: &Arc<Self>, client: &Client, answers: usize) -> Option<Pass> {
        if self.limit == 0 {
            return Some(Pass(None, None));
        }
        let name = (
            client.caller,
            client.address.filter(|_| client.caller == Caller::Anyone),
        );
        let mut inside = lock(&self.inside);
        let count = inside.entry(name).or_default();
        if *count > 0 && *count + answers > self.limit {
            return None;
        }
        *count += answers;
        Some(Pass(Some((self.clone(), name, answers)), None))
    }
}

/// The answers of one request inside; dropping it makes room.
#[derive(Debug)]
pub(crate) struct Pass(Option<(Arc<ConcurrencyLimit>, Name, usize)>, Option<Lease>);

impl Pass {
    /// The same, with the memory of the request.
    pub(super) fn holding(mut self, lease: Lease) -> Self {
        self.1 = Some(lease);
        self
    }

    /// The memory of the request, to be kept for longer.
    pub(super) fn take_lease(&mut self) -> Option<Lease> {
        self.1.take()
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        let Some((concurrency, name, answers)) = self.0.take() else {
            return;
        };
        let mut inside = lock(&concurrency.inside);
        if let Some(count) = inside.get_mut(&name) {
            *count -= answers;
            if *count == 0 {
                inside.remove(&name);
            }
        }
    }
}

impl fmt::Debug for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Keys")
            .field("api", &self.known().api.len())
            .finish_non_exhaustive()
    }
}

fn bearer(headers: &HeaderMap) -> Option<&str> {
    let value = headers.get(header::AUTHORIZATION)?.to_str().ok()?;
    let (scheme, key) = value.split_once(' ')?;
    let key = key.trim();
    (scheme.eq_ignore_ascii_case("bearer") && !key.is_empty()).then_some(key)
}

fn load_or_create_admin_key(path: &Path) -> Result<String, KeysError> {
    match std::fs::read_to_string(path) {
        Ok(key) if !key.trim().is_empty() => return Ok(key.trim().to_owned()),
        Ok(_) => return Err(KeysError::NoAdminKey(path.into())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(file_error(path, error)),
    }
    let key = format!("hydra-admin-{}", ids::secret());
    let written = mesh_service::files::write_private(path, format!("{key}\n").as_bytes());
    written.map_err(|error| file_error(path, error))?;
    Ok(key)
}

fn file_error(path: &Path, error: io::Error) -> KeysError {
    let path = path.into();
    KeysError::File { path, error }
}

fn hash(key: &str) -> KeyHash {
    Sha256::digest(key.as_bytes()).into()
}

/// Id of an API key for people and records.
fn key_id(hash: &KeyHash) -> String {
    HEXLOWER.encode(&hash[..8])
}

const ORGANIZATION: &str = "openai-organization";
const ADMIN_KEY_FILE: &str = "admin.key";

#[cfg(test)]
mod tests;
