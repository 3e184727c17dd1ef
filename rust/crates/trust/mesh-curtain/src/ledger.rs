//! The issuer's records: tokens that were issued, and ids that are revoked. The text of a token is not kept.

use serde::{Deserialize, Serialize};

use crate::claims::{Claims, TokenId};
use crate::rights::{Rights, Tier};

/// Records of an issuer. Times come in as arguments; the caller keeps the records.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Ledger {
    issued: Vec<Record>,
    /// Ids of links that holders signed.
    revoked: Vec<Revoked>,
}

/// An issued token. Times are seconds since the Unix epoch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Its id.
    pub id: TokenId,
    /// The issued token with which it was asked for, if it was not the operator's admin key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<TokenId>,
    /// Customer or group that it was issued to.
    pub tenant: String,
    /// How far it is trusted.
    pub tier: Tier,
    /// Person or program that it is for.
    #[serde(default)]
    pub subject: String,
    /// What it allows.
    pub rights: Rights,
    /// Time of issue.
    pub created: u64,
    /// End of its validity.
    pub expires: u64,
    /// Id of the holder key, for tokens that are for delegation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub holder: Option<String>,
    /// Note of the operator.
    #[serde(default)]
    pub note: String,
    /// Time of its revocation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revoked: Option<u64>,
}

/// A link that a holder signed and that is refused.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Revoked {
    /// Id of the link.
    pub id: TokenId,
    /// Time of its revocation.
    pub at: u64,
    /// Time from which it is refused anyway.
    pub until: u64,
}

/// Reasons for not changing the records.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LedgerError {
    /// Too many tokens are in use.
    #[error(
        "{MOST_OPEN} curtain tokens are in use already; revoke some (`hydramesh keys revoke`), or let them expire"
    )]
    Full,
    /// No token has this id, and none can be narrowed by its holder.
    #[error("no curtain token has the id {0}; `hydramesh keys list --all` shows them")]
    Unknown(TokenId),
    /// Too many links of holders are revoked.
    #[error(
        "{MOST_REVOKED} narrowed tokens are revoked already; revoke the tokens that they follow from"
    )]
    TooManyRevoked,
}

impl Ledger {
    /// Notes a token that is about to be handed out.
    ///
    /// # Errors
    /// If too many are in use.
    pub fn issue(
        &mut self,
        claims: &Claims,
        parent: Option<TokenId>,
        note: &str,
        now: u64,
    ) -> Result<(), LedgerError> {
        self.forget(now);
        let open = self.issued.iter().filter(|record| record.is_open(now));
        if open.count() >= MOST_OPEN {
            return Err(LedgerError::Full);
        }
        self.issued.push(Record {
            id: claims.id,
            parent,
            tenant: claims.tenant.clone(),
            tier: claims.tier,
            subject: claims.subject.clone(),
            rights: claims.rights.clone(),
            created: now,
            expires: claims.expires,
            holder: claims.holder.as_ref().map(|key| key.node_id().to_string()),
            note: note.to_owned(),
            revoked: None,
        });
        Ok(())
    }

    /// Revokes a token, and with it all that follow from it. An id that is not among the issued ones may be that of a link
    /// that a holder signed: it is remembered until the last such link has expired.
    ///
    /// # Errors
    /// If it can be no such link, or too many are revoked.
    pub fn revoke(&mut self, id: TokenId, now: u64) -> Result<(), LedgerError> {
        self.forget(now);
        if let Some(record) = self.issued.iter_mut().find(|record| record.id == id) {
            record.revoked.get_or_insert(now);
            return Ok(());
        }
        if self.revoked.iter().any(|revoked| revoked.id == id) {
            return Ok(());
        }
        let delegable = self.issued.iter().filter(|record| record.holder.is_some());
        let until = delegable.map(|record| record.expires).max();
        let until = until
            .filter(|until| *until > now)
            .ok_or(LedgerError::Unknown(id))?;
        if self.revoked.len() >= MOST_REVOKED {
            return Err(LedgerError::TooManyRevoked);
        }
        self.revoked.push(Revoked { id, at: now, until });
        Ok(())
    }

    /// True if a token with this id as its link `at`, counted from 0, is refused: it is revoked, was not issued here, or a
    /// token that it follows from is revoked.
    pub fn refuses(&self, at: usize, id: &TokenId) -> bool {
        if at > 0 {
            return self.revoked.iter().any(|revoked| revoked.id == *id);
        }
        let mut next = Some(*id);
        // A parent was issued before its child, so the walk ends.
        let mut before = self.issued.len();
        while let Some(id) = next {
            let found = self.issued[..before]
                .iter()
                .rposition(|record| record.id == id);
            let Some(found) = found.filter(|found| self.issued[*found].revoked.is_none()) else {
                return true;
            };
            before = found;
            next = self.issued[found].parent;
        }
        false
    }

    /// The issued tokens that are remembered, in the order of their issue.
    pub fn issued(&self) -> &[Record] {
        &self.issued
    }

    /// The links of holders that are revoked.
    pub fn revoked(&self) -> &[Revoked] {
        &self.revoked
    }

    /// Forgets tokens that expired more than [`MEMORY`] seconds ago, the oldest closed ones above [`MOST_CLOSED`], and
    /// revocations without effect.
    fn forget(&mut self, now: u64) {
        self.revoked.retain(|revoked| revoked.until > now);
        self.issued
            .retain(|record| record.expires.saturating_add(MEMORY) > now);
        let expired = self.issued.iter().filter(|record| record.expires <= now);
        let mut surplus = expired.count().saturating_sub(MOST_CLOSED);
        self.issued.retain(|record| {
            let goes = surplus > 0 && record.expires <= now;
            surplus -= usize::from(goes);
            !goes
        });
    }
}

impl Record {
    /// True if it is neither revoked nor expired.
    pub fn is_open(&self, now: u64) -> bool {
        self.revoked.is_none() && now < self.expires
    }
}

/// Maximum number of tokens in use.
const MOST_OPEN: usize = 4096;
/// Maximum number of expired tokens that are remembered.
const MOST_CLOSED: usize = 1024;
/// Maximum number of revoked links of holders.
const MOST_REVOKED: usize = 4096;
/// Seconds for which an expired token is remembered.
const MEMORY: u64 = 30 * 24 * 3600;

#[cfg(test)]
mod tests {
    use mesh_identity::IdentityKey;

    use super::*;

    fn claims(expires: u64) -> Claims {
        Claims {
            issuer: "sanctum:x".to_owned(),
            tenant: "lab".to_owned(),
            tier: Tier::Goodlife,
            subject: String::new(),
            rights: "embed".parse().unwrap(),
            audience: "home".to_owned(),
            not_before: 0,
            expires,
            id: TokenId::random(),
            parent: None,
            holder: None,
        }
    }

    #[test]
    fn a_revocation_reaches_all_tokens_that_follow_from_it() {
        let mut ledger = Ledger::default();
        let [first, second, third, other] = [(); 4].map(|()| claims(1_000));
        ledger.issue(&first, None, "", 1).unwrap();
        ledger.issue(&second, Some(first.id), "", 2).unwrap();
        ledger.issue(&third, Some(second.id), "", 3).unwrap();
        ledger.issue(&other, None, "", 4).unwrap();
        assert!(
            [&first, &second, &third, &other]
                .iter()
                .all(|claims| !ledger.refuses(0, &claims.id))
        );
        ledger.revoke(first.id, 5).unwrap();
        assert!(
            [&first, &second, &third]
                .iter()
                .all(|claims| ledger.refuses(0, &claims.id))
        );
        assert!(!ledger.refuses(0, &other.id));
        assert!(ledger.refuses(0, &TokenId::random()), "not issued here");
        let kept = ledger.clone();
        ledger.revoke(first.id, 9).unwrap();
        assert_eq!(ledger, kept, "the first time counts");
    }

    #[test]
    fn links_of_holders_can_be_revoked_by_their_ids_for_as_long_as_they_may_live() {
        let mut ledger = Ledger::default();
        let link = TokenId::random();
        ledger.issue(&claims(1_000), None, "", 1).unwrap();
        assert_eq!(ledger.revoke(link, 5), Err(LedgerError::Unknown(link)));
        let key = IdentityKey::from_seed(&[1; 32]);
        let holder = Some(key.public().clone());
        ledger
            .issue(
                &Claims {
                    holder,
                    ..claims(500)
                },
                None,
                "",
                1,
            )
            .unwrap();
        assert!(!ledger.refuses(1, &link));
        ledger.revoke(link, 5).unwrap();
        assert!(ledger.refuses(1, &link) && ledger.revoked()[0].until == 500);
        let other = TokenId::random();
        assert_eq!(ledger.revoke(other, 600), Err(LedgerError::Unknown(other)));
        assert!(ledger.revoked().is_empty(), "it has no effect any more");
    }

    #[test]
    fn records_are_bounded_and_expired_ones_go_first() {
        let mut ledger = Ledger::default();
        for _ in 0..MOST_OPEN {
            ledger.issue(&claims(100), None, "", 1).unwrap();
        }
        assert_eq!(
            ledger.issue(&claims(100), None, "", 1),
            Err(LedgerError::Full)
        );
        ledger.issue(&claims(9_999), None, "", 200).unwrap();
        assert_eq!(ledger.issued().len(), MOST_CLOSED + 1);
        ledger
            .issue(&claims(9_999_999), None, "", 100 + MEMORY)
            .unwrap();
        assert_eq!(ledger.issued().len(), 2);
    }
}
