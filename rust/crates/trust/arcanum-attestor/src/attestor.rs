//! The head's admission: decisions of [`Enrolment`] with certificates and files.

mod evidence;

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant, SystemTime};

use data_encoding::HEXLOWER;
use mesh_base::clock::{self, unix_seconds};
use mesh_identity::PublicKey;
use mesh_net::trust::{
    Admission, Applicant, DenyList, EXPELLED_FILE, Expulsion, Issued, JoinAsk, JoinToken,
    MEMBERS_FILE, MOST_EXPELLED, Member, MeshRoot, NODE_CERTIFICATE_FILE, NodeIdentity, Refusal,
    RenewAsk, Role, Subject, TOKENS_FILE, TrustError, Validity, read_json, requested_key_id,
    write_json,
};

use crate::enrolment::{Approval, Candidate, Decision, Enrolment};
use crate::news::News;
use crate::policy::EvidencePolicy;
use crate::roster::{KnownMember, Pending, Roster};
use crate::tokens::{Revocation, TokenRecord, TokenSpec, Tokens};

/// The head's admission: a node with a token of this mesh becomes a worker, at once or when an operator has approved it, and
/// remains one until it is expelled. Names of workers are unique.
#[derive(Debug)]
pub struct Attestor {
    /// Changes only after its file has changed.
    root: RwLock<MeshRoot>,
    dir: PathBuf,
    /// Changes only after its files have changed, in one assignment.
    enrolment: Mutex<Enrolment>,
    approval: Approval,
    policy: EvidencePolicy,
    news: News,
    deny_list: DenyList,
    validity: Validity,
    /// Time at which each node was last seen as a member in this process; a monotonic clock.
    seen: Mutex<HashMap<String, Instant>>,
}

/// Errors of an operator's decisions.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EnrolmentError {
    /// The node does not wait for approval.
    #[error("the node {0} does not wait for approval; `hydramesh nodes list` shows those that do")]
    NotPending(String),
    /// The state cannot be written.
    #[error(transparent)]
    Trust(#[from] TrustError),
}

impl Attestor {
    /// Opens the head's state directory; makes a root for a mesh of this name at the first start.
    ///
    /// # Errors
    /// If its files are not whole.
    pub fn open(dir: &Path, mesh: &str, validity: Validity) -> Result<Self, TrustError> {
        let root = MeshRoot::load_or_create(dir, mesh)?;
        let records: Option<Vec<TokenRecord>> = read_json(&dir.join(TOKENS_FILE))?;
        let tokens = Tokens::restore(records.unwrap_or_default());
        let members = dir.join(MEMBERS_FILE);
        let roster: Option<Roster> = read_json(&members)?;
        let roster = roster.unwrap_or_else(|| Roster::of_tokens(tokens.records(), validity.life));
        let expelled = dir.join(EXPELLED_FILE);
        if roster.has_deny_list() && !expelled.exists() {
            return Err(TrustError::missing(&expelled, &members));
        }
        Ok(Self {
            root: RwLock::new(root),
            dir: dir.to_owned(),
            enrolment: Mutex::new(Enrolment { tokens, roster }),
            approval: Approval::default(),
            policy: EvidencePolicy::default(),
            news: News::default(),
            deny_list: DenyList::open(dir)?,
            validity,
            seen: Mutex::default(),
        })
    }

    /// The same with another rule for new nodes.
    #[must_use]
    pub fn with_approval(self, approval: Approval) -> Self {
        Self { approval, ..self }
    }

    /// The same with another policy on evidence.
    #[must_use]
    pub fn with_evidence_policy(self, policy: EvidencePolicy) -> Self {
        Self { policy, ..self }
    }

    /// Root of the mesh.
    pub fn root(&self) -> MeshRoot {
        let root = self.root.read();
        root.unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Makes a root that takes the place of the present one; both are accepted until then. Blocks on the
    /// disk.
    ///
    /// # Errors
    /// If a rotation is under way, or the root cannot be written.
    pub fn rotate_root(&self, until: SystemTime, now: SystemTime) -> Result<MeshRoot, TrustError> {
        let mut root = self.root.write().unwrap_or_else(PoisonError::into_inner);
        let former = root.sha256();
        *root = root.rotate(&self.dir, until, now)?;
        tracing::warn!(
            event = "root rotated",
            root = HEXLOWER.encode(&root.sha256()),
            former = HEXLOWER.encode(&former),
            until = clock::utc(until),
            "the mesh has a new root"
        );
        Ok(root.clone())
    }

    /// Drops the former root once its time is over. Returns true if there was one. Blocks on the disk.
    ///
    /// # Errors
    /// If the root cannot be written.
    pub fn drop_former_root(&self, now: SystemTime) -> Result<bool, TrustError> {
        let mut root = self.root.write().unwrap_or_else(PoisonError::into_inner);
        // Its statement relates the files of the head to the new root.
        root.settle(&self.dir)?;
        match root.without_former(&self.dir, now)? {
            Some(alone) => *root = alone,
            None => return Ok(false),
        }
        Ok(true)
    }

    /// The head's own identity, kept in `dir`: loaded when it is of this mesh and holds now, else issued. One whose dates lie
    /// in the future was issued while the clock was wrong. A rotated identity key takes effect here.
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
        let root = self.root();
        root.check(now)?;
        if let Some(until) = root.intermediate_until()
            && until < unix_seconds(now + INTERMEDIATE_WARNING)
        {
            tracing::warn!(
                until = clock::utc_of(until),
                "the intermediate by which this head issues certificates ends soon: have the root sign a new one (`hydramesh root intermediate`)"
            );
        }
        root.settle(dir)?;
        let mut former = None;
        match NodeIdentity::load_with(dir, self.deny_list.clone()) {
            Ok(identity) if identity.root() != *root.certificate() => {
                return Err(TrustError::MixedUp {
                    path: dir.join(NODE_CERTIFICATE_FILE),
                    reason: "it is of another root than root.key".to_owned(),
                });
            }
            Ok(old) if old.is_identity_due() => former = Some(old.member()),
            Ok(identity) if !identity.is_renewal_due(now) => return Ok(identity),
            Ok(old) if !old.member().is_valid_at(now) => tracing::warn!(
                certificate = old.member().dates(),
                clock = clock::utc(now),
                "this head's certificate does not hold now, so a new one is issued; if the date is wrong, set the clock"
            ),
            Ok(_) | Err(TrustError::NoIdentity { .. }) => {}
            // The root is here, so a certificate for the same key is as good as the lost one.
            Err(error @ (TrustError::Missing { .. } | TrustError::Damaged { .. }))
                if error.is_about(NODE_CERTIFICATE_FILE) =>
            {
                tracing::warn!(%error, "this head's own certificate is issued anew");
            }
            Err(error) => return Err(error),
        }
        let rotated = former.filter(|former| former.has_identity());
        let applicant = match rotated {
            // Whoever has the old keys must not be able to pose as the head.
            Some(_) => Applicant::with_new_key(dir)?,
            None => Applicant::open(dir)?,
        };
        let request = applicant.request()?;
        let key = applicant.public_key().cloned();
        let subject = Subject {
            request: &request,
            name,
            role: Role::Head,
            identity: key.as_ref(),
        };
        let issued = root.issue(&subject, &self.validity, now)?;
        let identity = NodeIdentity::store(dir, applicant, issued, self.deny_list.clone())?;
        if let Some(former) = rotated {
            self.replace(&former, &identity.node_id(), now)?;
        }
        Ok(identity)
    }

    /// The list of expelled nodes.
    pub fn deny_list(&self) -> &DenyList {
        &self.deny_list
    }

    /// The nodes that have joined and are not expelled, by node id. Waits for changes, which block on the disk.
    pub fn members(&self) -> BTreeMap<String, KnownMember> {
        let mut members = self.lock().roster.members().clone();
        members.retain(|node_id, _| !self.deny_list.contains(node_id));
        members
    }

    /// The nodes that wait for approval, by node id. Waits for changes, which block on the disk.
    pub fn pending(&self) -> BTreeMap<String, Pending> {
        self.lock().roster.pending().clone()
    }

    /// The record of a member, also of an expelled one. Waits for changes, which block on the disk.
    pub fn record_of(&self, node_id: &str) -> Option<KnownMember> {
        self.lock().roster.members().get(node_id).cloned()
    }

    /// Approves a node that waits: it becomes a member when it asks again, within seconds; or the change of a member's
    /// evidence. Blocks on the disk.
    ///
    /// # Errors
    /// If it does not wait, or the approval cannot be written.
    pub fn approve(&self, node_id: &str) -> Result<Pending, EnrolmentError> {
        self.change(|enrolment| {
            let roster = &mut enrolment.roster;
            let approved = roster.approve(node_id).cloned();
            let changed = || {
                let name = roster.approve_change(node_id)?;
                Some(Pending {
                    name,
                    approved: true,
                    ..Pending::default()
                })
            };
            approved
                .or_else(changed)
                .ok_or_else(|| EnrolmentError::NotPending(node_id.to_owned()))
        })
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
        let known = self.record_of(node_id);
        let key_id = known.map(|known| known.key_id);
        let expulsion = Expulsion {
            name: name.to_owned(),
            reason: reason.to_owned(),
            since: unix_seconds(now),
            key_id: key_id.filter(|key_id| !key_id.is_empty() && key_id != node_id),
            replaced_by: None,
        };
        let expelled = self.deny_list.add(node_id, expulsion);
        if expelled.is_ok() {
            self.note(|roster| roster.expelled(node_id));
        }
        expelled
    }

    /// Lets an expelled node in again, with the name that is in its certificate. `None` if it was not expelled. Blocks on the
    /// disk.
    ///
    /// # Errors
    /// If another node has its name now; or as [`DenyList::readmit`].
    pub fn readmit(&self, node_id: &str) -> Result<Option<Expulsion>, TrustError> {
        let roster = self.lock().roster.clone();
        let known = roster.members().get(node_id);
        let name = known.map(|member| member.name.clone());
        let name = name.or_else(|| self.deny_list.list().remove(node_id).map(|node| node.name));
        let name = name.unwrap_or_default();
        let is_expelled = |id: &str| self.deny_list.contains(id);
        if let Some(holder) = roster.other_of(&name, node_id, is_expelled)
            && self.deny_list.contains(node_id)
        {
            return Err(TrustError::NameTaken {
                name,
                holder: holder.clone(),
            });
        }
        let readmitted = self.deny_list.readmit(node_id)?;
        if let Some(expulsion) = &readmitted {
            let life = self.validity.life;
            self.note(|roster| roster.readmitted(node_id, expulsion, life));
        }
        Ok(readmitted)
    }

    /// Creates a join token for one node; its text form goes to the operator and nowhere else.
    ///
    /// # Errors
    /// As [`issue_token`](Self::issue_token).
    pub fn create_token(
        &self,
        lifetime: Duration,
        note: &str,
        now: SystemTime,
    ) -> Result<JoinToken, TrustError> {
        self.issue_token(&TokenSpec::once(lifetime, note), now)
    }

    /// Creates a join token.
    ///
    /// # Errors
    /// If there are too many, or the list cannot be written.
    pub fn issue_token(&self, spec: &TokenSpec, now: SystemTime) -> Result<JoinToken, TrustError> {
        let root = self.root().sha256();
        self.change(|enrolment| enrolment.tokens.create(root, spec, now))
    }

    /// Withdraws an open token.
    ///
    /// # Errors
    /// As [`Tokens::revoke`]; or if the list cannot be written.
    pub fn revoke_token(&self, id: &str, now: SystemTime) -> Result<(), Revocation> {
        self.change(|enrolment| enrolment.tokens.revoke(id, now))
    }

    /// The tokens that are remembered. Waits for changes of them, which block on the disk.
    pub fn token_records(&self) -> Vec<TokenRecord> {
        self.lock().tokens.records().to_vec()
    }

    fn lock(&self) -> MutexGuard<'_, Enrolment> {
        self.enrolment
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the state if that succeeds and can be written.
    fn change<T, E: From<TrustError>>(
        &self,
        work: impl FnOnce(&mut Enrolment) -> Result<T, E>,
    ) -> Result<T, E> {
        let mut enrolment = self.lock();
        let mut fresh = enrolment.clone();
        let done = work(&mut fresh)?;
        if fresh.roster != enrolment.roster {
            write_json(&self.dir.join(MEMBERS_FILE), &fresh.roster)?;
        }
        if fresh.tokens.records() != enrolment.tokens.records() {
            write_json(&self.dir.join(TOKENS_FILE), &fresh.tokens.records())?;
        }
        *enrolment = fresh;
        Ok(done)
    }

    /// Changes the roster, also if it cannot be written: the mesh works without it.
    fn note(&self, work: impl FnOnce(&mut Roster)) {
        let mut enrolment = self.lock();
        let before = enrolment.roster.clone();
        work(&mut enrolment.roster);
        if enrolment.roster != before
            && let Err(error) = write_json(&self.dir.join(MEMBERS_FILE), &enrolment.roster)
        {
            tracing::warn!(%error, "the members of the mesh are not written down");
        }
    }

    /// A member has rotated its identity: the old one is good for nothing any more.
    fn replace(&self, member: &Member, successor: &str, now: SystemTime) -> Result<(), TrustError> {
        let expulsion = Expulsion {
            name: member.name.clone(),
            since: unix_seconds(now),
            replaced_by: Some(successor.to_owned()),
            ..Expulsion::default()
        };
        let life = self.validity.life + self.validity.renewal_grace;
        self.deny_list
            .forget_replaced(unix_seconds(now).saturating_sub(life.as_secs()));
        self.deny_list.add(&member.node_id, expulsion)?;
        self.note(|roster| {
            roster.expelled(&member.node_id);
            roster.renamed(&member.node_id, successor);
        });
        tracing::warn!(
            event = "identity rotated",
            node = member.node_id,
            successor,
            name = member.name,
            "a node has rotated its identity"
        );
        Ok(())
    }

    /// A rotation is remembered for as long as the old certificate could be used. Their number is limited, so that no member
    /// fills the list of expelled nodes.
    fn refuse_frequent_rotation(&self, member: &Member, now: SystemTime) -> Result<(), Refusal> {
        let rotated: Vec<Expulsion> = self.deny_list.list().into_values().collect();
        let rotated = rotated.iter().filter(|entry| entry.replaced_by.is_some());
        if rotated.clone().count() >= MOST_ROTATED {
            return Err(Refusal::Internal(format!(
                "{MOST_ROTATED} identities were rotated lately, and no more can be now; `hydramesh nodes list` shows them"
            )));
        }
        let mut own = rotated.filter(|entry| entry.replaced_by.as_ref() == Some(&member.node_id));
        let age = |entry: &Expulsion| unix_seconds(now).saturating_sub(entry.since);
        match own.find(|entry| age(entry) < ROTATION_INTERVAL.as_secs()) {
            Some(entry) => Err(Refusal::NotAdmitted(format!(
                "the identity of `{}` was rotated {} s ago, and once in {} s is enough: restart it later",
                member.name,
                age(entry),
                ROTATION_INTERVAL.as_secs()
            ))),
            None => Ok(()),
        }
    }

    /// Records that this node is a member now.
    fn note_seen(&self, node_id: &str) {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        if seen.len() >= MOST_SEEN {
            seen.retain(|_, at| at.elapsed() < self.validity.renewal_grace);
        }
        if seen.len() < MOST_SEEN || seen.contains_key(node_id) {
            seen.insert(node_id.to_owned(), Instant::now());
        }
    }

    fn was_seen_lately(&self, node_id: &str) -> bool {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let last = seen.get(node_id);
        last.is_some_and(|at| at.elapsed() <= self.validity.life + self.validity.renewal_grace)
    }

    fn refuse_expelled(&self, node_id: &str, key_id: &str) -> Result<(), Refusal> {
        let refusal = self.deny_list.refusal_of_any(node_id, key_id);
        refusal.map_or(Ok(()), Err)
    }
}

impl Admission for Attestor {
    fn join(&self, ask: &JoinAsk<'_>, now: SystemTime) -> Result<Issued, Refusal> {
        let key_id = requested_key_id(ask.request)?;
        let node_id = ask.identity.map_or_else(|| key_id.clone(), id_of);
        self.refuse_expelled(&node_id, &key_id)?;
        mesh_net::trust::check_name(ask.node_name)?;
        let evidence = self.read_evidence(&node_id, ask.node_name, ask.evidence)?;
        self.require(&node_id, ask.node_name, evidence.as_ref())?;
        let candidate = Candidate {
            evidence: evidence.as_ref(),
            node_id: &node_id,
            key_id: &key_id,
            name: ask.node_name,
            token_id: ask.token_id,
            token_secret: ask.token_secret,
        };
        let (issued, name) = self
            .change(|enrolment| {
                let is_expelled = |id: &str| self.deny_list.contains(id);
                let decision =
                    enrolment.join(&candidate, self.approval, &self.policy, is_expelled, now)?;
                let Decision::Admit { name } = decision else {
                    return Ok(None);
                };
                let subject = Subject {
                    request: ask.request,
                    name: &name,
                    role: Role::Worker,
                    identity: ask.identity,
                };
                // A request that cannot be granted costs no token.
                let root = self.root();
                let issued = root.issue_under(&ask.root, &subject, &self.validity, now)?;
                let member = Member::from_certificate(&issued.certificates[0])?;
                enrolment.roster.note(&member, now);
                enrolment.roster.note_token(&node_id, ask.token_id);
                let seconds = unix_seconds(now);
                enrolment
                    .roster
                    .note_evidence(&node_id, evidence.clone(), seconds);
                Ok::<_, Refusal>(Some((issued, name)))
            })?
            .ok_or_else(|| awaiting_approval(ask.node_name, &node_id))?;
        self.note_seen(&node_id);
        if evidence.is_some() {
            self.note_first(&node_id, &name);
        }
        tracing::info!(node = node_id, name, token = ask.token_id, "a node joined");
        Ok(issued)
    }

    fn renew(&self, ask: &RenewAsk<'_>, now: SystemTime) -> Result<Issued, Refusal> {
        let member = ask.member;
        let identity = ask.identity.map(id_of);
        let successor = ask.successor.map(id_of);
        // The answer to a rotation may have been lost on its way.
        let replaced_by = self.deny_list.replaced_by(&member.node_id);
        if replaced_by.is_none() || replaced_by != successor {
            self.refuse_expelled(&member.node_id, &member.key_id)?;
        }
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
        if member.has_identity() && identity.as_ref() != Some(&member.node_id) {
            return Err(Refusal::NotAdmitted(format!(
                "the certificate of `{}` is bound to the identity {}, and the node does not show that it holds its key: restore identity.key from a backup, or join again with a new token (`hydramesh token create`)",
                member.name, member.node_id
            )));
        }
        let key_id = requested_key_id(ask.request)?;
        if key_id != member.key_id && (ask.successor.is_none() || identity.is_none()) {
            return Err(Refusal::Invalid(
                "a renewal is for the key of the old certificate".to_owned(),
            ));
        }
        let node_id = successor.clone().or(identity);
        let node_id = node_id.unwrap_or_else(|| member.node_id.clone());
        self.refuse_expelled(&node_id, &key_id)?;
        if member.role == Role::Worker && replaced_by.is_none() {
            let evidence = self.read_evidence(&member.node_id, &member.name, ask.evidence)?;
            self.judge(&member.node_id, &member.name, evidence, now)?;
        }
        let subject = Subject {
            request: ask.request,
            name: &member.name,
            role: member.role,
            identity: ask.successor.or(ask.identity),
        };
        let rotates = successor.is_some() && member.has_identity() && replaced_by.is_none();
        if rotates {
            self.refuse_frequent_rotation(member, now)?;
        }
        let root = self.root();
        let issued = root.issue_under(&ask.root, &subject, &self.validity, now)?;
        if rotates {
            self.replace(member, &node_id, now)?;
        }
        if member.role == Role::Worker {
            let fresh = Member::from_certificate(&issued.certificates[0])?;
            self.note(|roster| {
                roster.renamed(&member.node_id, &node_id);
                roster.note(&fresh, now);
            });
        }
        self.note_seen(&node_id);
        if node_id != member.node_id {
            tracing::info!(
                node = node_id,
                former = member.node_id,
                name = member.name,
                "a member has another id from now on"
            );
        }
        Ok(issued)
    }

    fn connect(&self, member: &Member, now: SystemTime) -> Result<(), Refusal> {
        self.refuse_expelled(&member.node_id, &member.key_id)?;
        // Nodes that joined before there was a roster.
        if member.role == Role::Worker {
            self.note(|roster| {
                roster.note(member, now);
            });
        }
        self.note_seen(&member.node_id);
        Ok(())
    }

    fn mesh(&self) -> String {
        self.root().mesh().to_owned()
    }
}

fn id_of(key: &PublicKey) -> String {
    key.node_id().to_string()
}

fn awaiting_approval(name: &str, node_id: &str) -> Refusal {
    Refusal::AwaitingApproval(format!(
        "`{name}` waits for approval: `hydramesh nodes approve {}` at the head lets it in",
        node_id.get(..16).unwrap_or(node_id)
    ))
}

/// Time before the end of an intermediate at which the head begins to complain.
const INTERMEDIATE_WARNING: Duration = Duration::from_secs(30 * 24 * 3600);
/// A member rotates its identity no more often.
const ROTATION_INTERVAL: Duration = Duration::from_secs(3600);
/// Maximum number of rotated identities on the list of expelled nodes.
const MOST_ROTATED: usize = MOST_EXPELLED / 4;
/// Maximum number of remembered members; others only lose a leniency after a change of the clock.
const MOST_SEEN: usize = 65_536;

#[cfg(test)]
mod tests;
