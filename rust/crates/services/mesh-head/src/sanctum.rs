//! Sanctum, the mesh's issuer of curtain tokens: its key, its records, and the acceptance of tokens.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError, RwLock, RwLockReadGuard};

use data_encoding::BASE64;
use mesh_curtain::{
    Claims, ClaimsError, Door, Grant, Ledger, LedgerError, Refusal, Right, Rights, Tier, Token,
    TokenError, TokenId,
};
use mesh_identity::{IdentityKey, NodeId, PublicKey};
use mesh_net::trust::{TrustError, read_json, write_json};

use crate::locks::lock;

/// Issues, revokes and accepts curtain tokens.
#[derive(Debug)]
pub(crate) struct Sanctum {
    key: IdentityKey,
    mesh: String,
    path: PathBuf,
    /// Changes only after its file has changed.
    ledger: RwLock<Ledger>,
    changing: Mutex<()>,
    /// The mesh root's statement about the key.
    endorsement: String,
}

/// A token that is to be issued.
#[derive(Debug, Clone)]
pub(crate) struct Wanted {
    pub tenant: String,
    pub tier: Tier,
    pub subject: String,
    pub rights: Rights,
    /// Seconds for which it is good.
    pub life: u64,
    pub holder: Option<PublicKey>,
    pub note: String,
}

/// The limits of the caller that asks for a token.
#[derive(Debug, Clone)]
pub(crate) struct Limits {
    /// The issued token that it has shown.
    pub parent: Option<TokenId>,
    pub tenant: Option<String>,
    pub tier: Tier,
    pub rights: Rights,
    pub expires: Option<u64>,
}

/// Reasons for not issuing or revoking a token.
#[derive(Debug, thiserror::Error)]
pub(crate) enum IssueError {
    #[error("no token was issued: {0}")]
    Claims(#[from] ClaimsError),
    #[error("no token was issued: you lack the right {0}, so you cannot give it")]
    Right(Right),
    #[error("no token was issued: you may issue tokens of the tenant {0:?} only")]
    Tenant(String),
    #[error("no token was issued: your tier is {0}, so you cannot give a higher one")]
    Tier(Tier),
    #[error("no token was issued: it would outlive yours, which ends in {0} s")]
    Expiry(u64),
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    #[error(transparent)]
    Trust(#[from] TrustError),
}

/// Reasons for not accepting a token.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum NotAccepted {
    #[error("the curtain token cannot be read: {0}")]
    Unreadable(#[from] TokenError),
    #[error(transparent)]
    Refused(#[from] Refusal),
}

impl Sanctum {
    /// Opens the issuer of a mesh in the head's state directory; its key is made at the first start. `endorse` has the
    /// mesh root sign a statement about the key.
    ///
    /// # Errors
    /// If its files are not whole.
    pub(crate) fn open(
        dir: &Path,
        mesh: &str,
        endorse: impl FnOnce(&PublicKey) -> Vec<u8>,
    ) -> Result<Self, TrustError> {
        let (key_path, path) = (dir.join(KEY_FILE), dir.join(LEDGER_FILE));
        let ledger: Option<Ledger> = read_json(&path)?;
        // Another key would void all tokens without a word.
        if ledger.is_some() && !key_path.exists() {
            return Err(TrustError::missing(&key_path, &path));
        }
        let key = IdentityKey::load_or_create(&key_path)?;
        Ok(Self {
            endorsement: BASE64.encode(&endorse(key.public())),
            key,
            mesh: mesh.to_owned(),
            path,
            ledger: RwLock::new(ledger.unwrap_or_default()),
            changing: Mutex::default(),
        })
    }

    /// Id of the key.
    pub(crate) fn id(&self) -> NodeId {
        self.key.node_id()
    }

    /// The mesh root's signed statement about the key, base64 of a [`mesh_identity::Document`].
    pub(crate) fn endorsement(&self) -> &str {
        &self.endorsement
    }

    /// The records of issued tokens and revocations.
    pub(crate) fn ledger(&self) -> RwLockReadGuard<'_, Ledger> {
        self.ledger.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Issues a token. One that is asked for with a token can only be narrower than that. Blocks on the disk.
    ///
    /// # Errors
    /// [`IssueError`] says what is not allowed.
    pub(crate) fn issue(
        &self,
        wanted: Wanted,
        by: &Limits,
        now: u64,
    ) -> Result<(Token, Claims), IssueError> {
        let claims = Claims {
            issuer: String::new(),
            tenant: wanted.tenant,
            tier: wanted.tier,
            subject: wanted.subject,
            rights: wanted.rights,
            audience: self.mesh.clone(),
            not_before: now,
            expires: now.saturating_add(wanted.life),
            id: TokenId::random(),
            parent: None,
            holder: wanted.holder,
        };
        by.check(&claims, now)?;
        let token = Token::issue(claims, &self.key)?;
        let claims = token.claims().next().expect("a token has a link").clone();
        let (parent, note) = (by.parent, wanted.note);
        self.change(|ledger| ledger.issue(&claims, parent, &note, now))?;
        Ok((token, claims))
    }

    /// Revokes a token, and all that follow from it. Blocks on the disk.
    ///
    /// # Errors
    /// If there can be no such token, or the revocation cannot be written.
    pub(crate) fn revoke(&self, id: TokenId, now: u64) -> Result<(), IssueError> {
        self.change(|ledger| ledger.revoke(id, now))
    }

    fn change(
        &self,
        change: impl FnOnce(&mut Ledger) -> Result<(), LedgerError>,
    ) -> Result<(), IssueError> {
        let _one = lock(&self.changing);
        let mut fresh = self.ledger().clone();
        change(&mut fresh)?;
        write_json(&self.path, &fresh)?;
        *self.ledger.write().unwrap_or_else(PoisonError::into_inner) = fresh;
        Ok(())
    }

    /// Verifies the text of a token.
    ///
    /// # Errors
    /// [`NotAccepted`] says what is wrong with it.
    pub(crate) fn accept(&self, text: &str, now: u64) -> Result<Grant, NotAccepted> {
        let token = Token::parse(text)?;
        let door = Door {
            issuer: self.key.public(),
            audience: &self.mesh,
            tenant: None,
        };
        let ledger = self.ledger();
        Ok(door.accept(&token, now, |at, id| ledger.refuses(at, id))?)
    }

    /// Judges a token that was accepted before, by the ids of its links and its end.
    ///
    /// # Errors
    /// If it has expired, or it or one that it follows from is revoked.
    pub(crate) fn accept_again(
        &self,
        links: &[TokenId],
        expires: u64,
        now: u64,
    ) -> Result<(), NotAccepted> {
        let ledger = self.ledger();
        let mut links = links.iter().enumerate();
        if let Some((_, id)) = links.clone().find(|(at, id)| ledger.refuses(*at, id)) {
            return Err(Refusal::Revoked(*id).into());
        }
        match links.next_back() {
            Some((_, &id)) if now >= expires => {
                let seconds = now - expires;
                Err(Refusal::Expired { id, seconds }.into())
            }
            _ => Ok(()),
        }
    }
}

impl Limits {
    /// Those of the admin key.
    pub(crate) fn none() -> Self {
        Self {
            parent: None,
            tenant: None,
            tier: Tier::Master,
            rights: Rights::all(),
            expires: None,
        }
    }

    fn check(&self, claims: &Claims, now: u64) -> Result<(), IssueError> {
        if let Some(right) = self.rights.first_beyond(&claims.rights) {
            return Err(IssueError::Right(right.clone()));
        }
        if let Some(tenant) = &self.tenant
            && *tenant != claims.tenant
        {
            return Err(IssueError::Tenant(tenant.clone()));
        }
        if claims.tier > self.tier {
            return Err(IssueError::Tier(self.tier));
        }
        match self.expires {
            Some(end) if claims.expires > end => Err(IssueError::Expiry(end.saturating_sub(now))),
            _ => Ok(()),
        }
    }
}

/// In the state directory; a secret.
pub(crate) const KEY_FILE: &str = "issuer.key";
/// In the state directory.
pub(crate) const LEDGER_FILE: &str = "curtain-tokens.json";
/// Role of the key in the mesh root's statement.
pub(crate) const ROLE: &str = "issuer";

#[cfg(test)]
mod tests {
    use mesh_identity::Document;

    use super::*;

    fn wanted(rights: &str) -> Wanted {
        Wanted {
            tenant: "lab".to_owned(),
            tier: Tier::Goodlife,
            subject: String::new(),
            rights: rights.parse().unwrap(),
            life: 100,
            holder: None,
            note: "for the notebook".to_owned(),
        }
    }

    fn open(dir: &Path) -> Result<Sanctum, TrustError> {
        Sanctum::open(dir, "home", |_| Vec::new())
    }

    #[test]
    fn tokens_and_revocations_survive_a_restart_and_no_text_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let sanctum = open(dir.path()).unwrap();
        let issue = |rights| {
            sanctum
                .issue(wanted(rights), &Limits::none(), 1_000)
                .unwrap()
        };
        let (kept, revoked) = (issue("embed"), issue("image"));
        sanctum.revoke(revoked.1.id, 1_010).unwrap();
        let id = sanctum.id();
        drop(sanctum);
        let sanctum = open(dir.path()).unwrap();
        assert_eq!(sanctum.id(), id);
        let grant = sanctum.accept(&kept.0.to_text(), 1_050).unwrap();
        assert_eq!(
            (grant.id(), grant.rights),
            (kept.1.id, "embed".parse().unwrap())
        );
        let refused = sanctum.accept(&revoked.0.to_text(), 1_050).unwrap_err();
        assert_eq!(
            refused,
            NotAccepted::Refused(Refusal::Revoked(revoked.1.id))
        );
        assert!(matches!(
            sanctum.accept("hydra-cap1.", 1_050),
            Err(NotAccepted::Unreadable(_))
        ));
        let text = std::fs::read_to_string(dir.path().join(LEDGER_FILE)).unwrap();
        assert!(
            text.contains("for the notebook") && !text.contains(&kept.0.to_text()[20..60]),
            "{text}"
        );
        // Lost records refuse everything; a lost key is not replaced by another.
        std::fs::remove_file(dir.path().join(LEDGER_FILE)).unwrap();
        let emptied = open(dir.path()).unwrap();
        assert!(emptied.accept(&kept.0.to_text(), 1_050).is_err());
        std::fs::write(dir.path().join(LEDGER_FILE), text).unwrap();
        std::fs::remove_file(dir.path().join(KEY_FILE)).unwrap();
        let error = open(dir.path()).unwrap_err().to_string();
        assert!(error.contains(KEY_FILE), "{error}");
    }

    #[test]
    fn a_token_that_is_asked_for_with_a_token_is_no_wider_than_that() {
        let dir = tempfile::tempdir().unwrap();
        let sanctum = open(dir.path()).unwrap();
        let parent = TokenId::random();
        let by = Limits {
            parent: Some(parent),
            tenant: Some("lab".to_owned()),
            tier: Tier::Goodlife,
            rights: "infer:Qwen*,embed".parse().unwrap(),
            expires: Some(1_100),
        };
        let refused = |wanted| sanctum.issue(wanted, &by, 1_000).unwrap_err();
        assert!(matches!(refused(wanted("infer:*")), IssueError::Right(_)));
        let tenant = "shop".to_owned();
        assert!(matches!(
            refused(Wanted {
                tenant,
                ..wanted("embed")
            }),
            IssueError::Tenant(_)
        ));
        assert!(matches!(
            refused(Wanted {
                tier: Tier::Master,
                ..wanted("embed")
            }),
            IssueError::Tier(_)
        ));
        assert!(matches!(
            refused(Wanted {
                life: 101,
                ..wanted("embed")
            }),
            IssueError::Expiry(100)
        ));
        assert!(sanctum.ledger().issued().is_empty());
        let (token, _) = sanctum.issue(wanted("infer:Qwen3"), &by, 1_000).unwrap();
        assert_eq!(sanctum.ledger().issued()[0].parent, Some(parent));
        // The parent is in no record of this issuer, so the child is refused with it.
        assert!(sanctum.accept(&token.to_text(), 1_050).is_err());
    }

    #[test]
    fn the_mesh_root_endorses_the_issuer() {
        let dir = tempfile::tempdir().unwrap();
        let now = std::time::SystemTime::now();
        let check = || {
            let authority =
                arcanum_attestor::Attestor::open(dir.path(), "home", Default::default()).unwrap();
            let root = authority.root();
            let sanctum =
                Sanctum::open(dir.path(), "home", |key| root.endorse(key, ROLE, now)).unwrap();
            let document = BASE64.decode(sanctum.endorsement().as_bytes()).unwrap();
            let document = Document::verify(&document, root.identity()).unwrap();
            assert_eq!(
                (document.node_id(), document.role.as_str()),
                (sanctum.id(), ROLE)
            );
            assert_eq!(document.root, root.sha256());
            (root.intermediate_until(), document.not_after)
        };
        assert_eq!(check().0, None);
        // By an intermediate, until its end.
        let key = dir.path().join("root.key");
        let request = mesh_net::trust::request_intermediate(dir.path()).unwrap();
        let life = std::time::Duration::from_secs(86_400);
        let signed = mesh_net::trust::sign_intermediate(&key, &request, life, now).unwrap();
        mesh_net::trust::install_intermediate(dir.path(), &signed, now).unwrap();
        std::fs::remove_file(key).unwrap();
        let (until, ends) = check();
        assert_eq!(until, Some(ends));
    }
}
