//! Admission and continued membership: the trait for policies, and the default policy.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::Mutex;
use std::time::{Duration, Instant, SystemTime};

use mesh_base::clock;
use mesh_base::sync::lock;
use rustls::pki_types::CertificateDer;

use super::certificate::{Member, Role, requested_node_id};
use super::deny::{DenyList, Expulsion};
use super::error::TrustError;
use super::identity::{NodeIdentity, NodeKey};
use super::names;
use super::refusal::Refusal;
use super::root::{MeshRoot, Validity};
use super::roster::{KnownMember, Roster};
use super::store::{Revocation, TokenRecord, TokenStore};
use super::token::JoinToken;

/// Decides who becomes a member and who remains one. A [`quic::Listener`](crate::quic::Listener) asks it.
///
/// The methods may block on the disk; the listener calls them on blocking threads. Certificates are DER, the node's
/// first, then the root's.
pub trait Admission: Send + Sync + 'static {
    /// Decides on a node without certificate that presents a token.
    fn join(
        &self,
        ask: &JoinAsk<'_>,
        now: SystemTime,
    ) -> Result<Vec<CertificateDer<'static>>, Refusal>;

    /// A member, authenticated by its certificate, which may have ended, asks for a fresh one for the key in `request`
    /// (PKCS#10, DER).
    fn renew(
        &self,
        member: &Member,
        request: &[u8],
        now: SystemTime,
    ) -> Result<Vec<CertificateDer<'static>>, Refusal>;

    /// A node with a valid certificate connects. Refuse it here when it has been expelled.
    fn connect(&self, member: &Member, now: SystemTime) -> Result<(), Refusal> {
        let _ = (member, now);
        Ok(())
    }

    /// Name of the mesh.
    fn mesh(&self) -> String;
}

/// A join request.
#[derive(Clone, Copy, Debug)]
pub struct JoinAsk<'a> {
    /// Public part of the token.
    pub token_id: &'a str,
    /// Secret part of the token.
    pub token_secret: &'a [u8],
    /// PKCS#10 request for the node's key, DER.
    pub request: &'a [u8],
    /// Name of the node.
    pub node_name: &'a str,
}

/// The default policy: a node with an unused token of this mesh becomes a worker, and remains one until it is
/// expelled. Names of workers are unique.
#[derive(Debug)]
pub struct Authority {
    root: MeshRoot,
    /// Changes only after its file has changed, in one assignment.
    tokens: Mutex<TokenStore>,
    /// Locked before the tokens.
    roster: Mutex<Roster>,
    deny_list: DenyList,
    validity: Validity,
    /// Time at which each node was last seen as a member in this process; a monotonic clock.
    seen: Mutex<HashMap<String, Instant>>,
}

impl Authority {
    /// Opens the head's state directory; makes a root for a mesh of this name at the first start.
    pub fn open(dir: &Path, mesh: &str, validity: Validity) -> Result<Self, TrustError> {
        let root = MeshRoot::load_or_create(dir, mesh)?;
        let tokens = TokenStore::open(dir, root.sha256())?;
        let roster = Roster::open(dir, tokens.records(), validity.life)?;
        Ok(Self {
            root,
            tokens: Mutex::new(tokens),
            roster: Mutex::new(roster),
            deny_list: DenyList::open(dir)?,
            validity,
            seen: Mutex::default(),
        })
    }

    /// Root of the mesh.
    pub fn root(&self) -> &MeshRoot {
        &self.root
    }

    /// The head's own identity, kept in `dir`: loaded when it is of this mesh and holds now, else issued. One whose dates lie
    /// in the future was issued while the clock was wrong.
    ///
    /// # Errors
    /// If its key is missing or damaged, or its certificate belongs to another root or key: that is not mended by making
    /// another one.
    pub fn head_identity(
        &self,
        dir: &Path,
        name: &str,
        now: SystemTime,
    ) -> Result<NodeIdentity, TrustError> {
        if clock::is_implausible(now) {
            tracing::warn!(
                clock = clock::utc(now),
                "this head's clock is wrong; set it, for example with `timedatectl set-ntp true`"
            );
        }
        match NodeIdentity::load_with(dir, self.deny_list.clone()) {
            Ok(identity) if identity.root() != self.root.certificate() => {
                return Err(TrustError::MixedUp {
                    path: dir.join(names::NODE_CERTIFICATE),
                    reason: "it is of another root than root.key".to_owned(),
                });
            }
            Ok(identity) if !identity.is_renewal_due(now) => return Ok(identity),
            Ok(old) if !old.member().is_valid_at(now) => tracing::warn!(
                certificate = old.member().dates(),
                clock = clock::utc(now),
                "this head's certificate does not hold now, so a new one is issued; if the date is wrong, set the clock"
            ),
            Ok(_) | Err(TrustError::NoIdentity { .. }) => {}
            // The root is here, so a certificate for the same key is as good as the lost one.
            Err(error @ (TrustError::Missing { .. } | TrustError::Damaged { .. }))
                if error.is_about(names::NODE_CERTIFICATE) =>
            {
                tracing::warn!(%error, "this head's own certificate is issued anew");
            }
            Err(error) => return Err(error),
        }
        let key = NodeKey::load_or_create(dir)?;
        let request = key.request()?;
        let life = self.validity.life;
        let chain = self.root.issue(&request, name, Role::Head, life, now)?;
        NodeIdentity::store(dir, key, chain, self.deny_list.clone())
    }

    /// The list of expelled nodes.
    pub fn deny_list(&self) -> &DenyList {
        &self.deny_list
    }

    /// The nodes that have joined and are not expelled, by node id. Waits for changes of the roster, which block on the disk.
    pub fn members(&self) -> BTreeMap<String, KnownMember> {
        let mut members = lock(&self.roster).members().clone();
        members.retain(|node_id, _| !self.deny_list.contains(node_id));
        members
    }

    /// Expels a node: its links end, and it gets no link or certificate any more, with any token. Its name
    /// becomes free. Blocks on the disk.
    ///
    /// # Errors
    /// As [`DenyList::expel`].
    pub fn expel(
        &self,
        node_id: &str,
        name: &str,
        reason: &str,
        now: SystemTime,
    ) -> Result<(), TrustError> {
        let expelled = self.deny_list.expel(node_id, name, reason, now);
        if expelled.is_ok() {
            lock(&self.roster).expelled();
        }
        expelled
    }

    /// Lets an expelled node in again, with the name that is in its certificate. `None` if it was not expelled. Blocks on the
    /// disk.
    ///
    /// # Errors
    /// If another node has its name now; or as [`DenyList::readmit`].
    pub fn readmit(&self, node_id: &str) -> Result<Option<Expulsion>, TrustError> {
        let mut roster = lock(&self.roster);
        let known = roster.members().get(node_id);
        let name = known.map(|member| member.name.clone());
        let name = name.or_else(|| self.deny_list.list().remove(node_id).map(|node| node.name));
        let name = name.unwrap_or_default();
        if let Some(holder) = roster.other_of(&name, node_id, &self.deny_list)
            && self.deny_list.contains(node_id)
        {
            return Err(TrustError::NameTaken {
                name,
                holder: holder.clone(),
            });
        }
        let readmitted = self.deny_list.readmit(node_id)?;
        if let Some(expulsion) = &readmitted {
            roster.readmitted(node_id, expulsion, self.validity.life);
        }
        Ok(readmitted)
    }

    /// Creates a join token; its text form goes to the operator and nowhere else.
    pub fn create_token(
        &self,
        lifetime: Duration,
        note: &str,
        now: SystemTime,
    ) -> Result<JoinToken, TrustError> {
        lock(&self.tokens).create(lifetime, note, now)
    }

    /// Withdraws an open token.
    ///
    /// # Errors
    /// As [`TokenStore::revoke`].
    pub fn revoke_token(&self, id: &str, now: SystemTime) -> Result<(), Revocation> {
        lock(&self.tokens).revoke(id, now)
    }

    /// The tokens that are remembered. Waits for changes of them, which block on the disk.
    pub fn token_records(&self) -> Vec<TokenRecord> {
        lock(&self.tokens).records().to_vec()
    }

    /// Records that this node is a member now.
    fn note_seen(&self, node_id: &str) {
        let mut seen = lock(&self.seen);
        if seen.len() >= MOST_SEEN {
            seen.retain(|_, at| at.elapsed() < self.validity.renewal_grace);
        }
        if seen.len() < MOST_SEEN || seen.contains_key(node_id) {
            seen.insert(node_id.to_owned(), Instant::now());
        }
    }

    fn was_seen_lately(&self, node_id: &str) -> bool {
        let seen = lock(&self.seen);
        let last = seen.get(node_id);
        last.is_some_and(|at| at.elapsed() <= self.validity.life + self.validity.renewal_grace)
    }

    fn refuse_expelled(&self, node_id: &str) -> Result<(), Refusal> {
        self.deny_list.refusal(node_id).map_or(Ok(()), Err)
    }
}

impl Admission for Authority {
    fn join(
        &self,
        ask: &JoinAsk<'_>,
        now: SystemTime,
    ) -> Result<Vec<CertificateDer<'static>>, Refusal> {
        let node_id = requested_node_id(ask.request)?;
        self.refuse_expelled(&node_id)?;
        let mut roster = lock(&self.roster);
        let name = roster.assign(&node_id, ask.node_name, &self.deny_list);
        // The certificate is made before the token is used up, so that a bad request costs no token; it goes out after.
        let life = self.validity.life;
        let chain = self
            .root
            .issue(ask.request, &name, Role::Worker, life, now)?;
        lock(&self.tokens).redeem(ask.token_id, ask.token_secret, &node_id, &name, now)?;
        roster.note(&Member::from_certificate(&chain[0])?, now);
        drop(roster);
        self.note_seen(&node_id);
        tracing::info!(node = node_id, name, token = ask.token_id, "a node joined");
        Ok(chain)
    }

    fn renew(
        &self,
        member: &Member,
        request: &[u8],
        now: SystemTime,
    ) -> Result<Vec<CertificateDer<'static>>, Refusal> {
        self.refuse_expelled(&member.node_id)?;
        // The grace bounds how long a node may have been away. It says nothing where the certificate was issued while this
        // clock was wrong: before any release of this program, or to a node that was here a short while ago; and the head
        // renews its own whenever it likes.
        let ended = now > member.not_after + self.validity.renewal_grace;
        let clock_was_wrong = clock::is_implausible(member.not_after)
            || member.role == Role::Head
            || self.was_seen_lately(&member.node_id);
        if ended && !clock_was_wrong {
            return Err(Refusal::NotAdmitted(format!(
                "the certificate of `{}` ({}) ended too long ago to be renewed: the head's clock says {}; join again with a new token (`hydramesh token create`), or set the head's clock if that date is wrong",
                member.name,
                member.dates(),
                clock::utc(now)
            )));
        }
        if requested_node_id(request)? != member.node_id {
            return Err(Refusal::Invalid(
                "a renewal is for the key of the old certificate".to_owned(),
            ));
        }
        let chain = self
            .root
            .issue(request, &member.name, member.role, self.validity.life, now)?;
        if member.role == Role::Worker {
            lock(&self.roster).note(&Member::from_certificate(&chain[0])?, now);
        }
        self.note_seen(&member.node_id);
        Ok(chain)
    }

    fn connect(&self, member: &Member, now: SystemTime) -> Result<(), Refusal> {
        self.refuse_expelled(&member.node_id)?;
        // Nodes that joined before there was a roster.
        if member.role == Role::Worker {
            lock(&self.roster).note(member, now);
        }
        self.note_seen(&member.node_id);
        Ok(())
    }

    fn mesh(&self) -> String {
        self.root.mesh().to_owned()
    }
}

/// Maximum number of remembered members; others only lose a leniency after a change of the clock.
const MOST_SEEN: usize = 65_536;

#[cfg(test)]
mod tests {
    use std::time::UNIX_EPOCH;

    use super::*;

    const DAY: Duration = Duration::from_secs(86_400);

    /// 2026-11-29.
    fn today() -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(1_795_910_400)
    }

    fn authority(dir: &Path) -> Authority {
        Authority::open(dir, "attic", Validity::default()).expect("authority")
    }

    /// A worker that joined when the head's clock said `then`.
    fn worker(authority: &Authority, dir: &Path, then: SystemTime) -> NodeIdentity {
        let token = authority.create_token(DAY, "", then).expect("token");
        let key = NodeKey::load_or_create(dir).expect("key");
        let request = key.request().expect("request");
        let ask = JoinAsk {
            token_id: &token.id(),
            token_secret: token.secret(),
            request: &request,
            node_name: "laptop",
        };
        let chain = authority.join(&ask, then).expect("joined");
        let deny_list = DenyList::open(dir).expect("empty");
        NodeIdentity::store(dir, key, chain, deny_list).expect("stored")
    }

    #[test]
    fn a_readmitted_node_does_not_make_two_of_one_name() {
        let dirs = [(); 3].map(|()| tempfile::tempdir().expect("temporary directory"));
        let [at_head, first, second] = dirs.each_ref().map(tempfile::TempDir::path);
        let head = authority(at_head);
        let first = worker(&head, first, today());
        let first = &*first.node_id();
        let expel = |head: &Authority, id: &str| head.expel(id, "laptop", "", today());
        expel(&head, first).expect("kept");
        // A machine that takes its place may have its name.
        let second = worker(&head, second, today());
        assert_eq!(second.member().name, "laptop");
        let head = authority(at_head);
        let error = head.readmit(first).expect_err("its name is taken");
        let TrustError::NameTaken { holder, .. } = &error else {
            panic!("{error}");
        };
        assert_eq!(*holder, second.node_id());
        assert!(head.deny_list().contains(first));
        expel(&head, &second.node_id()).expect("kept");
        assert!(head.members().is_empty());
        head.readmit(first).expect("free").expect("it was expelled");
        // Before it has connected again.
        let head = authority(at_head);
        assert_eq!(head.members()[first].name, "laptop");
        let third = tempfile::tempdir().expect("temporary directory");
        let third = worker(&head, third.path(), today());
        assert_eq!(third.member().name, "laptop-2");
        assert!(head.readmit(&second.node_id()).is_err());
    }

    #[test]
    fn names_are_still_taken_when_the_roster_is_lost() {
        let dirs = [(); 3].map(|()| tempfile::tempdir().expect("temporary directory"));
        let [at_head, first, second] = dirs.each_ref().map(tempfile::TempDir::path);
        worker(&authority(at_head), first, today());
        std::fs::remove_file(at_head.join(names::MEMBERS)).expect("removed");
        let second = worker(&authority(at_head), second, today());
        assert_eq!(second.member().name, "laptop-2");
    }

    fn renew(authority: &Authority, worker: &NodeIdentity, now: SystemTime) -> Result<(), Refusal> {
        let request = worker.request().expect("request");
        let chain = authority.renew(&worker.member(), &request, now)?;
        worker.install(chain).expect("installed");
        assert!(worker.member().is_valid_at(now) && !worker.is_renewal_due(now));
        Ok(())
    }

    #[test]
    fn a_head_that_started_with_a_wrong_clock_issues_itself_a_new_certificate() {
        for wrong in [
            today() + 730 * DAY,
            today() - 90 * DAY,
            UNIX_EPOCH,
            UNIX_EPOCH + Duration::from_secs(253_402_300_000),
        ] {
            let dir = tempfile::tempdir().expect("temporary directory");
            let head = authority(dir.path());
            let then = head
                .head_identity(dir.path(), "head", wrong)
                .expect("issued");
            assert!(then.member().is_valid_at(wrong), "{wrong:?}");
            let restarted = authority(dir.path());
            let now = restarted
                .head_identity(dir.path(), "head", today())
                .expect("issued");
            assert!(
                now.member().is_valid_at(today()),
                "{}",
                now.member().dates()
            );
            assert_eq!(now.root_sha256(), then.root_sha256(), "tokens pin the root");
            assert_eq!(now.node_id(), then.node_id());
        }
    }

    #[test]
    fn a_certificate_from_a_time_when_the_heads_clock_was_wrong_is_renewed() {
        for wrong in [
            today() + 730 * DAY,
            UNIX_EPOCH + DAY / 2,
            today() - 90 * DAY,
        ] {
            let (head, node) = (
                tempfile::tempdir().expect("dir"),
                tempfile::tempdir().expect("dir"),
            );
            let running = authority(head.path());
            let worker = worker(&running, node.path(), wrong);
            assert!(!worker.member().is_valid_at(today()));
            assert!(worker.is_renewal_due(today()));
            renew(&running, &worker, today()).expect("renewed");
        }
    }

    #[test]
    fn after_a_restart_too_unless_only_the_nodes_absence_explains_it() {
        for (wrong, renewed) in [
            (today() + 730 * DAY, true),
            (UNIX_EPOCH + DAY / 2, true),
            (today() - 20 * DAY, true),
            (today() - 90 * DAY, false),
        ] {
            let (head, node) = (
                tempfile::tempdir().expect("dir"),
                tempfile::tempdir().expect("dir"),
            );
            let worker = worker(&authority(head.path()), node.path(), wrong);
            let verdict = renew(&authority(head.path()), &worker, today());
            assert_eq!(
                verdict.is_ok(),
                renewed,
                "{}: {verdict:?}",
                worker.member().dates()
            );
            if let Err(refusal) = verdict {
                let text = refusal.to_string();
                for part in ["laptop", "2026-11-29", "the head's clock", "token create"] {
                    assert!(text.contains(part), "{part} is not in {text}");
                }
            }
        }
    }

    #[test]
    fn the_heads_own_certificate_is_always_renewed() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let head = authority(dir.path());
        let own = head
            .head_identity(dir.path(), "head", today())
            .expect("issued");
        for now in [today() + 3_650 * DAY, today() - 300 * DAY, today()] {
            renew(&head, &own, now).expect("renewed");
        }
    }
}
