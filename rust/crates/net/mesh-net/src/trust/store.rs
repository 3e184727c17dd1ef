//! Join tokens at the head: hashes only, each good for one node.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use data_encoding::HEXLOWER;
use mesh_base::clock::{self, unix_seconds};
use serde::{Deserialize, Serialize};
use subtle::ConstantTimeEq;

use super::digest::sha256;
use super::error::TrustError;
use super::names;
use super::refusal::Refusal;
use super::token::JoinToken;
use crate::files;

/// The tokens that were created, persisted in `tokens.json`. Every change is on disk before it takes effect.
#[derive(Debug)]
pub struct TokenStore {
    path: PathBuf,
    root_sha256: [u8; 32],
    records: Vec<TokenRecord>,
}

/// The head's record of a join token. Times are seconds since the Unix epoch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenRecord {
    /// The token's public part.
    pub id: String,
    /// SHA-256 of the token's secret, hex: 128 random bits need no slower hash.
    secret_sha256: String,
    /// Note of the operator.
    #[serde(default)]
    pub note: String,
    /// Time of creation.
    pub created: u64,
    /// Time of expiry.
    pub expires: u64,
    /// The node that used the token; `None` for an unused one.
    #[serde(default)]
    pub used: Option<TokenUse>,
}

/// The use of a token by a node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenUse {
    /// Id of the node.
    pub node_id: String,
    /// Name of the node.
    pub node_name: String,
    /// Time of the use, seconds since the Unix epoch.
    pub at: u64,
}

impl TokenRecord {
    /// True if a node can still join with it at the time `now`.
    pub fn is_open(&self, now: u64) -> bool {
        self.used.is_none() && now < self.expires
    }
}

/// Errors of withdrawing a token.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Revocation {
    /// There is no token of this id.
    #[error("no join token has the id {0:?}; `hydramesh token list` shows them")]
    Unknown(String),
    /// A node has joined with it.
    #[error(
        "the token {id} was used by `{node_name}`, so there is nothing to withdraw; to remove that node: `hydramesh nodes expel {node_name}`"
    )]
    Used {
        /// Id of the token.
        id: String,
        /// Name of the node that used it.
        node_name: String,
    },
    /// The list cannot be written.
    #[error(transparent)]
    Trust(#[from] TrustError),
}

impl TokenStore {
    /// Reads the tokens in `dir`; without a file there are no tokens.
    ///
    /// # Errors
    /// If the file cannot be read; it is not replaced.
    pub fn open(dir: &Path, root_sha256: [u8; 32]) -> Result<Self, TrustError> {
        let path = dir.join(names::TOKENS);
        Ok(Self {
            records: files::read_json(&path)?.unwrap_or_default(),
            path,
            root_sha256,
        })
    }

    /// Creates a token that is good for one node until `now + lifetime`.
    pub fn create(
        &mut self,
        lifetime: Duration,
        note: &str,
        now: SystemTime,
    ) -> Result<JoinToken, TrustError> {
        let token = JoinToken::generate(self.root_sha256);
        let created = unix_seconds(now);
        self.correct_dates(now)?;
        let mut records = self.remembered(created);
        let open = records.iter().filter(|record| record.is_open(created));
        if open.count() >= MOST_OPEN {
            return Err(TrustError::TooManyTokens { most: MOST_OPEN });
        }
        let record = TokenRecord {
            id: token.id(),
            secret_sha256: HEXLOWER.encode(&sha256(token.secret())),
            note: note.to_owned(),
            created,
            expires: created.saturating_add(lifetime.as_secs()),
            used: None,
        };
        records.push(record);
        self.persist(records)?;
        Ok(token)
    }

    /// Uses a token up for a node. When this returns `Ok`, the use is on disk.
    ///
    /// The same key may ask again for [`RETRY_WINDOW`] after the use: the first answer may have been lost on its way,
    /// and it is still the one node.
    pub fn redeem(
        &mut self,
        id: &str,
        secret: &[u8],
        node_id: &str,
        node_name: &str,
        now: SystemTime,
    ) -> Result<(), Refusal> {
        let date = clock::utc(now);
        self.correct_dates(now)?;
        let now = unix_seconds(now);
        let hash = HEXLOWER.encode(&sha256(secret));
        // Compares with every record, so that the duration does not reveal which ids exist.
        let record = self.records.iter().fold(None, |found, record| {
            let matches = record.id.as_bytes().ct_eq(id.as_bytes())
                & record.secret_sha256.as_bytes().ct_eq(hash.as_bytes());
            if matches.into() { Some(record) } else { found }
        });
        let record = record.ok_or(Refusal::TokenUnknown)?;
        if let Some(used) = &record.used {
            let same_node = used.node_id == node_id;
            if same_node && now.saturating_sub(used.at) <= RETRY_WINDOW.as_secs() {
                return Ok(());
            }
            return Err(Refusal::TokenUsed {
                node_name: used.node_name.clone(),
                seconds_ago: now.saturating_sub(used.at),
            });
        }
        if now >= record.expires {
            return Err(Refusal::TokenExpired {
                seconds_ago: now - record.expires,
                now: date,
            });
        }
        let used = TokenUse {
            node_id: node_id.to_owned(),
            node_name: node_name.to_owned(),
            at: now,
        };
        let mut records = self.remembered(now);
        let record = records.iter_mut().find(|record| record.id == id);
        record.expect("it is open").used = Some(used);
        Ok(self.persist(records)?)
    }

    /// Tokens that were made while the clock was wrong, in the future or before any release of this program, count from now:
    /// how old they are is unknown.
    fn correct_dates(&mut self, now: SystemTime) -> Result<(), TrustError> {
        if clock::is_implausible(now) {
            return Ok(());
        }
        let seconds = unix_seconds(now);
        let is_wrong = |record: &TokenRecord| {
            record.used.is_none()
                && (record.created > seconds.saturating_add(CLOCK_STEP.as_secs())
                    || clock::is_implausible(UNIX_EPOCH + Duration::from_secs(record.created)))
        };
        if !self.records.iter().any(is_wrong) {
            return Ok(());
        }
        let mut records = self.records.clone();
        for record in records.iter_mut().filter(|record| is_wrong(record)) {
            let life = record.expires.saturating_sub(record.created);
            (record.created, record.expires) = (seconds, seconds.saturating_add(life));
            tracing::warn!(
                token = record.id,
                "this join token was made while the clock was wrong; its life counts from now"
            );
        }
        self.persist(records)
    }

    /// Withdraws an open token.
    ///
    /// # Errors
    /// [`Revocation`] if there is no open token of this id, or if the file cannot be written.
    pub fn revoke(&mut self, id: &str, now: SystemTime) -> Result<(), Revocation> {
        let record = self.records.iter().find(|record| record.id == id);
        let record = record.ok_or_else(|| Revocation::Unknown(id.chars().take(64).collect()))?;
        if let Some(used) = &record.used {
            return Err(Revocation::Used {
                id: record.id.clone(),
                node_name: used.node_name.clone(),
            });
        }
        let mut kept = self.remembered(unix_seconds(now));
        kept.retain(|record| record.id != id);
        self.persist(kept)?;
        Ok(())
    }

    /// All tokens that are remembered, used and expired ones included.
    pub fn records(&self) -> &[TokenRecord] {
        &self.records
    }

    /// The records without those that expired more than [`MEMORY`] ago, and without the oldest closed ones
    /// above [`MOST_CLOSED`].
    fn remembered(&self, now: u64) -> Vec<TokenRecord> {
        let recent = |record: &&TokenRecord| record.expires.saturating_add(MEMORY.as_secs()) > now;
        let mut kept: Vec<_> = self.records.iter().filter(recent).cloned().collect();
        let closed = kept.iter().filter(|record| !record.is_open(now)).count();
        let mut surplus = closed.saturating_sub(MOST_CLOSED);
        // They stand in the order of their making.
        kept.retain(|record| {
            let goes = surplus > 0 && !record.is_open(now);
            surplus -= usize::from(goes);
            !goes
        });
        kept
    }

    fn persist(&mut self, records: Vec<TokenRecord>) -> Result<(), TrustError> {
        files::write_json(&self.path, &records)?;
        self.records = records;
        Ok(())
    }
}

/// Period in which the node that used a token may repeat its request.
pub const RETRY_WINDOW: Duration = Duration::from_secs(60);

/// A clock that is set back by less needs no correction.
const CLOCK_STEP: Duration = Duration::from_secs(300);

/// Period for which a token is remembered after its end, to tell "expired" and "used" from "unknown".
const MEMORY: Duration = Duration::from_secs(30 * 24 * 3600);

/// Maximum number of open tokens.
const MOST_OPEN: usize = 1024;
/// Maximum number of used and expired tokens that are remembered.
const MOST_CLOSED: usize = 1024;

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    fn now() -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(1_800_000_000)
    }

    fn store(dir: &Path) -> TokenStore {
        TokenStore::open(dir, [1; 32]).expect("store opens")
    }

    #[test]
    fn a_token_is_good_for_one_node_also_after_a_restart() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let token = store(dir.path())
            .create(HOUR, "attic", now())
            .expect("created");
        let mut reopened = store(dir.path());
        reopened
            .redeem(&token.id(), token.secret(), "node-a", "a", now())
            .expect("first use");
        for mut store in [reopened, store(dir.path())] {
            let refusal =
                store.redeem(&token.id(), token.secret(), "node-b", "b", now() + HOUR / 2);
            assert_eq!(
                refusal,
                Err(Refusal::TokenUsed {
                    node_name: "a".into(),
                    seconds_ago: 1800
                })
            );
        }
    }

    #[test]
    fn the_node_that_used_it_may_repeat_its_request_for_a_minute() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let mut store = store(dir.path());
        let token = store.create(HOUR, "", now()).expect("created");
        let mut redeem =
            |after| store.redeem(&token.id(), token.secret(), "node-a", "a", now() + after);
        assert_eq!(redeem(Duration::ZERO), Ok(()));
        assert_eq!(redeem(RETRY_WINDOW), Ok(()));
        assert!(matches!(
            redeem(RETRY_WINDOW * 2),
            Err(Refusal::TokenUsed { .. })
        ));
    }

    #[test]
    fn expired_unknown_and_wrong_secrets_are_refused_by_name() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let mut store = store(dir.path());
        let token = store.create(HOUR, "", now()).expect("created");
        let other = JoinToken::generate([1; 32]);
        assert_eq!(
            store.redeem(&token.id(), other.secret(), "n", "n", now()),
            Err(Refusal::TokenUnknown)
        );
        assert_eq!(
            store.redeem(&other.id(), other.secret(), "n", "n", now()),
            Err(Refusal::TokenUnknown)
        );
        assert_eq!(
            store.redeem(&token.id(), token.secret(), "n", "n", now() + HOUR),
            Err(Refusal::TokenExpired {
                seconds_ago: 0,
                now: clock::utc(now() + HOUR)
            })
        );
        store
            .redeem(&token.id(), token.secret(), "n", "n", now())
            .expect("still unused");
    }

    #[test]
    fn a_token_that_was_made_while_the_clock_was_wrong_lives_from_when_that_was_noticed() {
        let year = HOUR * 24 * 365;
        for wrong in [now() + year * 2, UNIX_EPOCH + HOUR] {
            let dir = tempfile::tempdir().expect("temporary directory");
            let mut store = store(dir.path());
            let token = store.create(HOUR, "", wrong).expect("created");
            let other = store.create(HOUR, "", wrong).expect("created");
            store
                .redeem(&token.id(), token.secret(), "n", "n", now())
                .expect("good");
            let late = store.redeem(&other.id(), other.secret(), "n", "n", now() + HOUR);
            assert!(
                matches!(late, Err(Refusal::TokenExpired { .. })),
                "{late:?}"
            );
        }
    }

    #[test]
    fn the_file_holds_no_secret_and_is_private() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().expect("temporary directory");
        let token = store(dir.path()).create(HOUR, "", now()).expect("created");
        let path = dir.path().join(names::TOKENS);
        let text = std::fs::read_to_string(&path).expect("readable");
        assert!(text.contains(&token.id()) && !text.contains(&HEXLOWER.encode(token.secret())));
        assert_eq!(
            std::fs::metadata(path)
                .expect("metadata")
                .permissions()
                .mode()
                & 0o777,
            0o600
        );
    }

    #[test]
    fn revoked_tokens_are_unknown_and_old_ones_are_forgotten() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let mut store = store(dir.path());
        let token = store.create(HOUR, "", now()).expect("created");
        store.revoke(&token.id(), now()).expect("withdrawn");
        let error = store.revoke(&token.id(), now()).expect_err("unknown");
        assert!(error.to_string().contains("token list"), "{error}");
        assert_eq!(
            store.redeem(&token.id(), token.secret(), "n", "n", now()),
            Err(Refusal::TokenUnknown)
        );
        store.create(HOUR, "", now()).expect("created");
        store
            .create(HOUR, "", now() + MEMORY + HOUR * 2)
            .expect("created");
        assert_eq!(store.records().len(), 1);
    }

    #[test]
    fn a_used_token_is_not_withdrawn_and_the_refusal_names_the_node() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let mut store = store(dir.path());
        let token = store.create(HOUR, "", now()).expect("created");
        store
            .redeem(&token.id(), token.secret(), "node-a", "attic", now())
            .expect("used");
        let error = store.revoke(&token.id(), now()).expect_err("used");
        assert!(error.to_string().contains("nodes expel attic"), "{error}");
    }

    #[test]
    fn the_tokens_are_bounded_and_closed_ones_go_first() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let mut store = store(dir.path());
        let record = |number: usize, expires: Duration| TokenRecord {
            id: format!("{number:016x}"),
            secret_sha256: String::new(),
            note: String::new(),
            created: unix_seconds(now()),
            expires: unix_seconds(now() + expires),
            used: None,
        };
        store.records = (0..3 * MOST_CLOSED)
            .map(|number| record(number, Duration::ZERO))
            .collect();
        let first = store.create(HOUR, "", now()).expect("created");
        assert_eq!(store.records().len(), MOST_CLOSED + 1);
        let newest = format!("{:016x}", 3 * MOST_CLOSED - 1);
        assert!(store.records().iter().any(|record| record.id == newest));
        store
            .records
            .extend((1..MOST_OPEN).map(|number| record(number, HOUR)));
        let error = store.create(HOUR, "", now()).expect_err("full");
        assert!(error.to_string().contains("token revoke"), "{error}");
        store.revoke(&first.id(), now()).expect("withdrawn");
        store.create(HOUR, "", now()).expect("there is room again");
    }

    #[test]
    fn a_damaged_file_is_named_not_replaced() {
        let dir = tempfile::tempdir().expect("temporary directory");
        std::fs::write(dir.path().join(names::TOKENS), "[{").expect("written");
        let error = TokenStore::open(dir.path(), [1; 32])
            .expect_err("damaged")
            .to_string();
        assert!(error.contains("tokens.json is damaged"), "{error}");
    }
}
