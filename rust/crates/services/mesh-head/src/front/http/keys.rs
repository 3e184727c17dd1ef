//! API keys: admit clients and administrators, and limit the use by each client.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard};

use axum::http::{HeaderMap, header};
use data_encoding::HEXLOWER;
use mesh_base::random;
use mesh_control::fair::Origin;
use mesh_service::files::Readers;
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use crate::ids;
use crate::locks::lock;
use crate::mesh::Lease;

/// The keys of one head. Only their hashes are held. Clones share them, so that keys that are read again
/// count everywhere.
#[derive(Clone)]
pub(crate) struct Keys {
    known: Arc<RwLock<Known>>,
    /// Only this process has it.
    secret: KeyHash,
}

#[derive(PartialEq)]
struct Known {
    admin: KeyHash,
    /// Each with a number that it keeps for as long as it is known.
    api: Vec<(KeyHash, usize)>,
}

type KeyHash = [u8; 32];

/// Origin of a request, by its key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Caller {
    Admin,
    Key(usize),
    /// Holds none, and none is needed.
    Anyone,
}

/// A key that opens nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Denied {
    Missing,
    Wrong,
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
    /// The file is not created anew: the holder of the old key would be locked out without a word.
    #[error(
        "{0} is damaged: it holds no key; restore it from a backup, or remove it, and the head makes another at its next start"
    )]
    NoAdminKey(PathBuf),
}

impl Keys {
    /// Reads the API keys (one per line; empty lines and lines that begin with # are skipped) and the admin
    /// key, which is made at the first start.
    ///
    /// # Errors
    /// [`KeysError`] names the file.
    pub(crate) fn load(state_dir: &Path, api_keys_file: Option<&Path>) -> Result<Self, KeysError> {
        let known = Known::read(state_dir, api_keys_file, &[])?;
        Ok(Self {
            known: Arc::new(RwLock::new(known)),
            secret: random::bytes(),
        })
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

    /// Ids of the API keys for records, by their numbers from 1: the first digits of their hashes.
    pub(crate) fn ids(&self) -> HashMap<usize, String> {
        let known = self.known();
        let id = |hash: &KeyHash| HEXLOWER.encode(&hash[..8]);
        known
            .api
            .iter()
            .map(|(hash, number)| (number + 1, id(hash)))
            .collect()
    }

    pub(crate) fn are_needed(&self) -> bool {
        !self.known().api.is_empty()
    }

    /// Salt under which requests of `caller` share cached prompts; 0 for all requests without a key.
    pub(crate) fn salt(&self, caller: Caller) -> u64 {
        let known = self.known();
        match caller {
            Caller::Anyone => 0,
            Caller::Admin => self.salt_of(&known.admin),
            Caller::Key(number) => {
                let found = known.api.iter().find(|(_, known)| *known == number);
                // A key that was removed in this moment shares with no other.
                found.map_or_else(ids::unique, |(hash, _)| self.salt_of(hash))
            }
        }
    }

    /// The number by which workers tell requests of different keys apart. It reveals nothing about the key, as
    /// it is made with the secret. Never 0, which is for requests without keys.
    fn salt_of(&self, key: &KeyHash) -> u64 {
        let salted = Sha256::new().chain_update(self.secret).chain_update(key);
        let digest = salted.finalize();
        let first = digest.first_chunk();
        first.map_or(1, |bytes| u64::from_le_bytes(*bytes).max(1))
    }

    /// The caller that these headers prove.
    ///
    /// # Errors
    /// `Denied` where a key is needed and is missing, and wherever one is sent that is wrong and keys are in
    /// use.
    pub(crate) fn caller(&self, headers: &HeaderMap) -> Result<Caller, Denied> {
        let known = self.known();
        let Some(key) = bearer(headers) else {
            return match known.api.is_empty() {
                true => Ok(Caller::Anyone),
                false => Err(Denied::Missing),
            };
        };
        let presented = hash(key);
        if bool::from(presented.ct_eq(&known.admin)) {
            return Ok(Caller::Admin);
        }
        // All of them are compared, so that the time tells nothing about which one matched.
        let mut found = None;
        for (hash, number) in &known.api {
            if bool::from(presented.ct_eq(hash)) {
                found = Some(*number);
            }
        }
        match found {
            Some(number) => Ok(Caller::Key(number)),
            // Clients insist on sending some key even where none is needed.
            None if known.api.is_empty() => Ok(Caller::Anyone),
            None => Err(Denied::Wrong),
        }
    }
}

impl Known {
    /// Reads the keys. Those that are among `before` keep their numbers, and no other key gets one of those.
    fn read(
        state_dir: &Path,
        api_keys_file: Option<&Path>,
        before: &[(KeyHash, usize)],
    ) -> Result<Self, KeysError> {
        let admin = hash(&load_or_create_admin_key(&state_dir.join(ADMIN_KEY_FILE))?);
        let mut api = Vec::new();
        if let Some(path) = api_keys_file {
            let text = std::fs::read_to_string(path).map_err(|error| file_error(path, error))?;
            mesh_service::files::warn_if_exposed(path, Readers::Group);
            let lines = text.lines().map(str::trim);
            let keys = lines.filter(|line| !line.is_empty() && !line.starts_with('#'));
            let taken = before.iter().map(|(_, number)| number + 1);
            let mut next = taken.max().unwrap_or(0);
            for key in keys.map(hash) {
                let old = before.iter().find(|(known, _)| *known == key);
                let number = old.map_or(next, |(_, number)| *number);
                next = next.max(number + 1);
                api.push((key, number));
            }
            if api.is_empty() {
                return Err(KeysError::Empty(path.into()));
            }
        }
        Ok(Self { admin, api })
    }
}

/// The client of a request, as limits count it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Client {
    pub caller: Caller,
    /// Address of the client, which counts where there are no keys.
    pub address: Option<IpAddr>,
    /// Salt of its cached prompts; see [`Keys::salt`].
    pub salt: u64,
}

impl Client {
    /// The client that its requests can be traced to.
    pub(super) fn origin(&self) -> Origin {
        match (self.caller, self.address) {
            (Caller::Admin, _) => Origin::Admin,
            (Caller::Key(number), _) => Origin::Key(number + 1),
            (Caller::Anyone, Some(address)) => Origin::of(address),
            (Caller::Anyone, None) => Origin::Unknown,
        }
    }
}

/// Bounds the answers that one client has running: a request for several counts as several.
#[derive(Debug)]
pub(super) struct ConcurrencyLimit {
    limit: usize,
    inside: Mutex<HashMap<Name, usize>>,
}

type Name = (Caller, Option<IpAddr>);

impl ConcurrencyLimit {
    /// Lets requests for `limit` answers of each client through at a time; 0 lets all through.
    pub(super) fn new(limit: usize) -> Self {
        Self {
            limit,
            inside: Mutex::default(),
        }
    }

    /// Admits a request for `answers` answers, if there is room. One with more answers than the limit is
    /// admitted only alone.
    pub(super) fn enter(self: &Arc<Self>, client: Client, answers: usize) -> Option<Pass> {
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
pub(super) struct Pass(Option<(Arc<ConcurrencyLimit>, Name, usize)>, Option<Lease>);

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

const ADMIN_KEY_FILE: &str = "admin.key";

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn headers(value: &str) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(header::AUTHORIZATION, value.parse().unwrap());
        headers
    }

    #[test]
    fn keys_open_what_they_are_for() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("keys");
        std::fs::write(&file, "# ours\n\nsk-one\n  sk-two \n").unwrap();
        let keys = Keys::load(dir.path(), Some(&file)).unwrap();
        let admin = std::fs::read_to_string(dir.path().join(ADMIN_KEY_FILE)).unwrap();
        assert_eq!(keys.caller(&headers("Bearer sk-one")), Ok(Caller::Key(0)));
        assert_eq!(keys.caller(&headers("bearer sk-two")), Ok(Caller::Key(1)));
        assert_eq!(
            keys.caller(&headers(&format!("Bearer {}", admin.trim()))),
            Ok(Caller::Admin)
        );
        assert_eq!(keys.caller(&headers("Bearer sk-three")), Err(Denied::Wrong));
        assert_eq!(keys.caller(&headers("Basic sk-one")), Err(Denied::Missing));
        assert_eq!(keys.caller(&HeaderMap::new()), Err(Denied::Missing));
    }

    #[test]
    fn keys_that_are_read_again_count_at_once_and_keep_their_numbers() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("keys");
        std::fs::write(&file, "sk-one\nsk-two\n").unwrap();
        let keys = Keys::load(dir.path(), Some(&file)).unwrap();
        let shared = keys.clone();
        assert!(!keys.reload(dir.path(), Some(&file)).unwrap());
        std::fs::write(&file, "sk-three\nsk-two\n").unwrap();
        assert!(keys.reload(dir.path(), Some(&file)).unwrap());
        let caller = |key: &str| shared.caller(&headers(&format!("Bearer {key}")));
        assert_eq!(caller("sk-one"), Err(Denied::Wrong));
        assert_eq!(caller("sk-two"), Ok(Caller::Key(1)));
        assert_eq!(caller("sk-three"), Ok(Caller::Key(2)));
        std::fs::write(&file, "").unwrap();
        assert!(keys.reload(dir.path(), Some(&file)).is_err());
        assert_eq!(caller("sk-two"), Ok(Caller::Key(1)), "the old ones stay");
    }

    #[test]
    fn every_key_has_a_salt_of_its_own_that_another_head_does_not_have() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("keys");
        std::fs::write(&file, "sk-one\nsk-two\n").unwrap();
        let keys = Keys::load(dir.path(), Some(&file)).unwrap();
        let callers = [
            Caller::Key(0),
            Caller::Key(1),
            Caller::Admin,
            Caller::Anyone,
        ];
        let salts = callers.map(|caller| keys.salt(caller));
        for (i, salt) in salts.iter().enumerate() {
            assert!(!salts[..i].contains(salt), "{salts:?}");
        }
        assert_eq!(salts[3], 0);
        assert_eq!(keys.clone().salt(Caller::Key(1)), salts[1]);
        // A key that comes in the place of another has another salt.
        std::fs::write(&file, "sk-one\n").unwrap();
        assert!(keys.reload(dir.path(), Some(&file)).unwrap());
        std::fs::write(&file, "sk-one\nsk-three\n").unwrap();
        assert!(keys.reload(dir.path(), Some(&file)).unwrap());
        assert_eq!(keys.salt(Caller::Key(0)), salts[0]);
        assert_ne!(keys.salt(Caller::Key(1)), salts[1]);
        let other = Keys::load(dir.path(), Some(&file)).unwrap();
        assert_ne!(other.salt(Caller::Key(0)), salts[0]);
    }

    #[test]
    fn answers_count_and_not_requests() {
        let concurrency = Arc::new(ConcurrencyLimit::new(8));
        let client = Client {
            caller: Caller::Key(1),
            address: None,
            salt: 0,
        };
        let many = concurrency
            .enter(client, 16)
            .expect("alone it may have more than the limit");
        assert!(concurrency.enter(client, 1).is_none());
        drop(many);
        let _some = concurrency.enter(client, 5).unwrap();
        assert!(concurrency.enter(client, 4).is_none());
        assert!(concurrency.enter(client, 3).is_some());
    }

    #[test]
    fn without_api_keys_anyone_may_ask_and_only_the_admin_key_administers() {
        let dir = tempfile::tempdir().unwrap();
        let keys = Keys::load(dir.path(), None).unwrap();
        assert_eq!(keys.caller(&HeaderMap::new()), Ok(Caller::Anyone));
        assert_eq!(keys.caller(&headers("Bearer whatever")), Ok(Caller::Anyone));
    }

    #[test]
    fn the_admin_key_is_private_and_stays_the_same() {
        let dir = tempfile::tempdir().unwrap();
        Keys::load(dir.path(), None).unwrap();
        let path = dir.path().join(ADMIN_KEY_FILE);
        let key = std::fs::read_to_string(&path).unwrap();
        assert!(key.len() > 40);
        assert_eq!(
            std::fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o600
        );
        Keys::load(dir.path(), None).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), key);
    }

    #[test]
    fn a_damaged_admin_key_is_not_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(ADMIN_KEY_FILE);
        std::fs::write(&path, "\n").unwrap();
        let error = Keys::load(dir.path(), None).unwrap_err().to_string();
        assert!(error.contains("admin.key is damaged"), "{error}");
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "\n");
    }

    #[test]
    fn a_client_has_so_many_requests_running_and_no_more() {
        let concurrency = Arc::new(ConcurrencyLimit::new(2));
        let client = |number| Client {
            caller: Caller::Key(number),
            address: None,
            salt: 0,
        };
        let one = concurrency.enter(client(1), 1).unwrap();
        let _two = concurrency.enter(client(1), 1).unwrap();
        assert!(concurrency.enter(client(1), 1).is_none());
        assert!(concurrency.enter(client(2), 1).is_some());
        drop(one);
        assert!(concurrency.enter(client(1), 1).is_some());
        assert_eq!(lock(&concurrency.inside).len(), 1);
        assert!(
            Arc::new(ConcurrencyLimit::new(0))
                .enter(client(1), 1)
                .is_some()
        );
    }

    #[test]
    fn a_file_without_keys_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("keys");
        std::fs::write(&file, "# none\n").unwrap();
        assert!(matches!(
            Keys::load(dir.path(), Some(&file)),
            Err(KeysError::Empty(_))
        ));
    }
}
