//! Join tokens: hashes only, each good for one node unless more were asked for.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use data_encoding::HEXLOWER;
use mesh_base::clock::{self, unix_seconds};
use mesh_net::trust::{JoinToken, Refusal, Role, TrustError};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

/// The tokens that were created. Times come in as arguments; the caller keeps the records.
#[derive(Clone, Debug, Default)]
pub struct Tokens {
    records: Vec<TokenRecord>,
}

/// Properties of a token that is to be made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenSpec {
    /// Time for which it is good.
    pub lifetime: Duration,
    /// Number of nodes that may join with it.
    pub nodes: u32,
    /// Note of the operator.
    pub note: String,
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
    /// Role of the nodes that join with it.
    #[serde(default = "worker")]
    pub role: String,
    /// Number of nodes that may join with it.
    #[serde(default = "one")]
    pub nodes: u32,
    /// The nodes that used it, in order.
    #[serde(default)]
    pub uses: Vec<TokenUse>,
    /// The last of them, once it is used up: earlier versions know this one only.
    #[serde(default)]
    used: Option<TokenUse>,
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

impl TokenSpec {
    /// A token for one node.
    pub fn once(lifetime: Duration, note: &str) -> Self {
        Self {
            lifetime,
            nodes: 1,
            note: note.to_owned(),
        }
    }
}

impl TokenRecord {
    /// True if a node can still join with it at the time `now`.
    pub fn is_open(&self, now: u64) -> bool {
        self.uses_left() > 0 && now < self.expires
    }

    /// Number of nodes that can still join with it before it expires.
    pub fn uses_left(&self) -> u32 {
        let used = u32::try_from(self.uses.len()).unwrap_or(u32::MAX);
        self.nodes.saturating_sub(used)
    }
}

/// Errors of withdrawing a token.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Revocation {
    /// There is no token of this id.
    #[error("no join token has the id {0:?}; `hydramesh token list` shows them")]
    Unknown(String),
    /// All nodes that it was good for have joined with it.
    #[error(
        "the token {id} was used by `{node_name}`, so there is nothing to withdraw; to remove that node: `hydramesh nodes expel {node_name}`"
    )]
    Used {
        /// Id of the token.
        id: String,
        /// Name of the last node that used it.
        node_name: String,
    },
    /// The list cannot be written.
    #[error(transparent)]
    Trust(#[from] TrustError),
}

impl Tokens {
    /// The tokens with these records, as [`records`](Self::records) gave them, or as earlier versions wrote them.
    pub fn restore(mut records: Vec<TokenRecord>) -> Self {
        for record in &mut records {
            if let Some(used) = &record.used
                && record.uses.is_empty()
            {
                record.uses.push(used.clone());
            }
        }
        Self { records }
    }

    /// Creates a token for the mesh whose root certificate has this SHA-256.
    ///
    /// # Errors
    /// If there are too many open ones.
    pub fn create(
        &mut self,
        root_sha256: [u8; 32],
        spec: &TokenSpec,
        now: SystemTime,
    ) -> Result<JoinToken, TrustError> {
        let token = JoinToken::generate(root_sha256);
        let created = unix_seconds(now);
        self.correct_dates(now);
        self.forget(created);
        let open = self.records.iter().filter(|record| record.is_open(created));
        if open.count() >= MOST_OPEN {
            return Err(TrustError::TooManyTokens { most: MOST_OPEN });
        }
        self.records.push(TokenRecord {
            id: token.id(),
            secret_sha256: hash(token.secret()),
            note: spec.note.clone(),
            created,
            expires: created.saturating_add(spec.lifetime.as_secs()),
            role: worker(),
            nodes: spec.nodes.clamp(1, MOST_NODES),
            uses: Vec::new(),
            used: None,
        });
        Ok(token)
    }

    /// Uses a token for a node.
    ///
    /// The same node may ask again for [`RETRY_WINDOW`] after the use: the first answer may have been lost on its way, and
    /// it is still the one node.
    ///
    /// # Errors
    /// [`Refusal`] if the token is unknown, used up or expired.
    pub fn redeem(
        &mut self,
        id: &str,
        secret: &[u8],
        node_id: &str,
        node_name: &str,
        now: SystemTime,
    ) -> Result<(), Refusal> {
        let date = clock::utc(now);
        self.correct_dates(now);
        let now = unix_seconds(now);
        let record = self.find(id, secret).ok_or(Refusal::TokenUnknown)?;
        let own = record.uses.iter().find(|used| used.node_id == node_id);
        if own.is_some_and(|used| now.saturating_sub(used.at) <= RETRY_WINDOW.as_secs()) {
            return Ok(());
        }
        if let Some(last) = record.uses.last()
            && (own.is_some() || record.uses_left() == 0)
        {
            let used = own.unwrap_or(last);
            return Err(Refusal::TokenUsed {
                node_name: used.node_name.clone(),
                seconds_ago: now.saturating_sub(used.at),
                nodes: record.nodes,
            });
        }
        if now >= record.expires {
            return Err(Refusal::TokenExpired {
                seconds_ago: now - record.expires,
                now: date,
            });
        }
        self.forget(now);
        self.note_use(id, node_id, node_name, now);
        Ok(())
    }

    /// True if this node has used the token with this secret.
    pub fn was_used_by(&self, id: &str, secret: &[u8], node_id: &str) -> bool {
        let record = self.find(id, secret);
        record.is_some_and(|record| record.uses.iter().any(|used| used.node_id == node_id))
    }

    /// The node has joined with the token just now; from here on counts [`RETRY_WINDOW`].
    pub fn note_use(&mut self, id: &str, node_id: &str, node_name: &str, now: u64) {
        let Some(record) = self.records.iter_mut().find(|record| record.id == id) else {
            return;
        };
        record.uses.retain(|used| used.node_id != node_id);
        record.uses.push(TokenUse {
            node_id: node_id.to_owned(),
            node_name: node_name.to_owned(),
            at: now,
        });
        record.used = match record.uses_left() {
            0 => record.uses.last().cloned(),
            _ => None,
        };
    }

    /// Compares with every record, so that the duration does not reveal which ids exist.
    fn find(&self, id: &str, secret: &[u8]) -> Option<&TokenRecord> {
        let hash = hash(secret);
        self.records.iter().fold(None, |found, record| {
            let matches = record.id.as_bytes().ct_eq(id.as_bytes())
                & record.secret_sha256.as_bytes().ct_eq(hash.as_bytes());
            if matches.into() { Some(record) } else { found }
        })
    }

    /// Tokens that were made while the clock was wrong, in the future or before any release of this program, count from now:
    /// how old they are is unknown.
    fn correct_dates(&mut self, now: SystemTime) {
        if clock::is_implausible(now) {
            return;
        }
        let seconds = unix_seconds(now);
        let is_wrong = |record: &TokenRecord| {
            record.uses.is_empty()
                && (record.created > seconds.saturating_add(CLOCK_STEP.as_secs())
                    || clock::is_implausible(UNIX_EPOCH + Duration::from_secs(record.created)))
        };
        for record in self.records.iter_mut().filter(|record| is_wrong(record)) {
            let life = record.expires.saturating_sub(record.created);
            (record.created, record.expires) = (seconds, seconds.saturating_add(life));
            tracing::warn!(
                token = record.id,
                "this join token was made while the clock was wrong; its life counts from now"
            );
        }
    }

    /// Withdraws an open token; of one that some nodes have used, the uses that are left.
    ///
    /// # Errors
    /// [`Revocation`] if there is no open token of this id.
    pub fn revoke(&mut self, id: &str, now: SystemTime) -> Result<(), Revocation> {
        let record = self.records.iter_mut().find(|record| record.id == id);
        let record = record.ok_or_else(|| Revocation::Unknown(id.chars().take(64).collect()))?;
        match record.uses.last().cloned() {
            Some(last) if record.uses_left() == 0 => {
                return Err(Revocation::Used {
                    id: record.id.clone(),
                    node_name: last.node_name,
                });
            }
            Some(last) => {
                record.nodes = u32::try_from(record.uses.len()).unwrap_or(u32::MAX);
                record.used = Some(last);
            }
            None => self.records.retain(|record| record.id != id),
        }
        self.forget(unix_seconds(now));
        Ok(())
    }

    /// All tokens that are remembered, used and expired ones included.
    pub fn records(&self) -> &[TokenRecord] {
        &self.records
    }

    /// Forgets those that expired more than [`MEMORY`] ago, and the oldest closed ones above [`MOST_CLOSED`].
    fn forget(&mut self, now: u64) {
        let recent = |record: &TokenRecord| record.expires.saturating_add(MEMORY.as_secs()) > now;
        self.records.retain(recent);
        let closed = self.records.iter().filter(|record| !record.is_open(now));
        let mut surplus = closed.count().saturating_sub(MOST_CLOSED);
        // They stand in the order of their making.
        self.records.retain(|record| {
            let goes = surplus > 0 && !record.is_open(now);
            surplus -= usize::from(goes);
            !goes
        });
    }
}

fn hash(secret: &[u8]) -> String {
    HEXLOWER.encode(&Sha256::digest(secret))
}

fn worker() -> String {
    Role::Worker.as_str().to_owned()
}

fn one() -> u32 {
    1
}

/// Maximum number of nodes that may join with one token.
pub const MOST_NODES: u32 = 1024;

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

    fn create(tokens: &mut Tokens, note: &str, now: SystemTime) -> Result<JoinToken, TrustError> {
        tokens.create([1; 32], &TokenSpec::once(HOUR, note), now)
    }

    fn stored(tokens: &Tokens) -> Tokens {
        let text = serde_json::to_string(tokens.records()).unwrap();
        Tokens::restore(serde_json::from_str(&text).unwrap())
    }

    #[test]
    fn a_token_is_good_for_one_node_also_after_a_restart() {
        let mut tokens = Tokens::default();
        let token = create(&mut tokens, "attic", now()).expect("created");
        let mut reopened = stored(&tokens);
        reopened
            .redeem(&token.id(), token.secret(), "node-a", "a", now())
            .expect("first use");
        for mut store in [stored(&reopened), reopened] {
            let refusal =
                store.redeem(&token.id(), token.secret(), "node-b", "b", now() + HOUR / 2);
            assert_eq!(
                refusal,
                Err(Refusal::TokenUsed {
                    node_name: "a".into(),
                    seconds_ago: 1800,
                    nodes: 1
                })
            );
        }
    }

    #[test]
    fn the_node_that_used_it_may_repeat_its_request_for_a_minute() {
        let mut store = Tokens::default();
        let token = create(&mut store, "", now()).expect("created");
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
        let mut store = Tokens::default();
        let token = create(&mut store, "", now()).expect("created");
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
            let mut store = Tokens::default();
            let token = create(&mut store, "", wrong).expect("created");
            let other = create(&mut store, "", wrong).expect("created");
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
    fn revoked_tokens_are_unknown_and_old_ones_are_forgotten() {
        let mut store = Tokens::default();
        let token = create(&mut store, "", now()).expect("created");
        store.revoke(&token.id(), now()).expect("withdrawn");
        let error = store.revoke(&token.id(), now()).expect_err("unknown");
        assert!(error.to_string().contains("token list"), "{error}");
        assert_eq!(
            store.redeem(&token.id(), token.secret(), "n", "n", now()),
            Err(Refusal::TokenUnknown)
        );
        create(&mut store, "", now()).expect("created");
        create(&mut store, "", now() + MEMORY + HOUR * 2).expect("created");
        assert_eq!(store.records().len(), 1);
    }

    #[test]
    fn a_used_token_is_not_withdrawn_and_the_refusal_names_the_node() {
        let mut store = Tokens::default();
        let token = create(&mut store, "", now()).expect("created");
        store
            .redeem(&token.id(), token.secret(), "node-a", "attic", now())
            .expect("used");
        let error = store.revoke(&token.id(), now()).expect_err("used");
        assert!(error.to_string().contains("nodes expel attic"), "{error}");
    }

    #[test]
    fn the_tokens_are_bounded_and_closed_ones_go_first() {
        let mut store = Tokens::default();
        let record = |number: usize, expires: Duration| TokenRecord {
            id: format!("{number:016x}"),
            secret_sha256: String::new(),
            note: String::new(),
            created: unix_seconds(now()),
            expires: unix_seconds(now() + expires),
            role: worker(),
            nodes: 1,
            uses: Vec::new(),
            used: None,
        };
        store.records = (0..3 * MOST_CLOSED)
            .map(|number| record(number, Duration::ZERO))
            .collect();
        let first = create(&mut store, "", now()).expect("created");
        assert_eq!(store.records().len(), MOST_CLOSED + 1);
        let newest = format!("{:016x}", 3 * MOST_CLOSED - 1);
        assert!(store.records().iter().any(|record| record.id == newest));
        store
            .records
            .extend((1..MOST_OPEN).map(|number| record(number, HOUR)));
        let error = create(&mut store, "", now()).expect_err("full");
        assert!(error.to_string().contains("token revoke"), "{error}");
        store.revoke(&first.id(), now()).expect("withdrawn");
        create(&mut store, "", now()).expect("there is room again");
    }

    #[test]
    fn a_token_for_several_nodes_admits_so_many_and_what_is_left_can_be_withdrawn() {
        let mut store = Tokens::default();
        let spec = TokenSpec {
            nodes: 3,
            ..TokenSpec::once(HOUR, "shelf")
        };
        let token = store.create([1; 32], &spec, now()).expect("created");
        let redeem = |store: &mut Tokens, node: &str, after| {
            store.redeem(&token.id(), token.secret(), node, node, now() + after)
        };
        redeem(&mut store, "a", Duration::ZERO).expect("the first");
        redeem(&mut store, "a", RETRY_WINDOW).expect("the same once more");
        redeem(&mut store, "b", RETRY_WINDOW).expect("the second");
        assert_eq!(store.records()[0].uses_left(), 1);
        assert!(
            store.records()[0].used.is_none(),
            "also for earlier versions"
        );
        let again = redeem(&mut store, "a", RETRY_WINDOW * 3);
        assert!(
            matches!(again, Err(Refusal::TokenUsed { nodes: 3, .. })),
            "{again:?}"
        );
        let mut withdrawn = store.clone();
        withdrawn
            .revoke(&token.id(), now())
            .expect("some uses are left");
        let refused = redeem(&mut withdrawn, "c", RETRY_WINDOW);
        assert!(
            matches!(refused, Err(Refusal::TokenUsed { .. })),
            "{refused:?}"
        );
        let mut store = stored(&store);
        redeem(&mut store, "c", RETRY_WINDOW).expect("the third");
        assert!(store.records()[0].used.is_some());
        let refused = redeem(&mut store, "d", RETRY_WINDOW).expect_err("used up");
        assert!(
            refused.to_string().contains("good for 3 nodes"),
            "{refused}"
        );
    }

    #[test]
    fn records_of_earlier_versions_are_read() {
        let text = r#"[{"id": "aa", "secret_sha256": "", "created": 1, "expires": 2,
            "used": {"node_id": "n", "node_name": "attic", "at": 1}},
            {"id": "bb", "secret_sha256": "", "note": "x", "created": 1, "expires": 2, "used": null}]"#;
        let tokens = Tokens::restore(serde_json::from_str(text).unwrap());
        let left: Vec<u32> = tokens
            .records()
            .iter()
            .map(TokenRecord::uses_left)
            .collect();
        assert_eq!(left, [0, 1]);
        assert_eq!(tokens.records()[0].uses[0].node_name, "attic");
    }
}
