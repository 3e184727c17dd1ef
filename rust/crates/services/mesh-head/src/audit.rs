//! The audit trail of the head: the words of its records, and the policy of admission with records.

use std::fmt;
use std::net::IpAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use mesh_audit::home::Tier;
use mesh_audit::kept::ShownEpochs;
use mesh_audit::keys::Identity;
use mesh_audit::record::{Event, Text};
use mesh_audit::store::{Limits, StoreError};
use mesh_audit::writer::{Audit, Counts, Envelope, Settings, Tally};
use mesh_control::fair::Origin;
use mesh_gossip::Sighting;
use mesh_identity::IdentityKey;
use mesh_net::trust::{Admission, Issued, JoinAsk, Member, NodeIdentity, Refusal, RenewAsk};

use crate::config::Config;
use crate::locks::lock;
use crate::metrics::{Front, Outcome};
use crate::refusals::{Refusals, Refused, RefusedRecord};

/// Writes records, unless the configuration turns the trail off. Nothing here waits. Clones write to the same
/// trail.
#[derive(Debug, Clone, Default)]
pub(crate) struct Recorder {
    audit: Option<Audit>,
    /// Each message has a record of its own.
    each_message: bool,
    refusals: Arc<Mutex<Refusals>>,
}

/// The key or token of a request, as records name it.
#[derive(Debug, Clone, PartialEq)]
pub struct Holder {
    /// Its id: nothing can be done with it.
    pub(crate) id: Arc<str>,
    /// The trail that the request belongs to.
    pub(crate) tier: mesh_curtain::Tier,
}

/// A request that ended, for its record.
#[derive(Debug, Clone)]
pub(crate) struct EndedRequest<'a> {
    pub id: &'a str,
    pub front: Front,
    pub task: &'static str,
    pub model: &'a str,
    pub origin: Origin,
    pub holder: Option<&'a Holder>,
    pub outcome: Outcome,
    pub took: Duration,
}

impl Recorder {
    /// Opens the trail below the state directory, and begins to write. The head's identity endorses its keys.
    ///
    /// # Errors
    /// If another process writes it, or files cannot be read or written.
    pub(crate) fn start(config: &Config, identity: &NodeIdentity) -> Result<Self, StoreError> {
        let audit = &config.audit;
        if !audit.enabled {
            return Ok(Self::default());
        }
        let settings = Settings {
            mesh: config.mesh_name.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            sync_interval: audit.sync_interval,
            message_interval: audit.message_interval,
            limits: Limits {
                epoch_time: u64::try_from(audit.epoch.as_millis()).unwrap_or(u64::MAX),
                bytes: audit.limit,
                ..Limits::default()
            },
            ..Settings::default()
        };
        let endorser = identity.identity_key().map(|key| Endorser {
            key,
            node: identity.clone(),
        });
        let endorser = endorser.map(|endorser| Box::new(endorser) as Box<dyn Identity + Send>);
        let each_message = settings.message_interval.is_zero();
        let audit = Audit::start(&config.state_dir.join(FOLDER), settings, endorser)?;
        Ok(Self {
            audit: Some(audit),
            each_message,
            refusals: Arc::default(),
        })
    }

    /// Numbers for the metrics; `None` without a trail.
    pub(crate) fn counts(&self) -> Option<&Counts> {
        self.audit.as_ref().map(Audit::counts)
    }

    /// Counts a key or token that was refused, for a record.
    pub(crate) fn refused_credential(&self, refused: Refused, from: IpAddr) {
        tracing::debug!(?refused, %from, "key or token refused");
        if self.audit.is_some() {
            let now = Instant::now();
            let records = lock(&self.refusals).note(refused, from.to_canonical(), now);
            self.record_refusals(records);
        }
    }

    /// Records refusals of the minute that is over.
    pub(crate) fn look_after(&self) {
        let records = lock(&self.refusals).flush_if_due(Instant::now());
        self.record_refusals(records);
    }

    fn record_refusals(&self, records: Vec<RefusedRecord>) {
        for RefusedRecord { id, note } in records {
            self.token(&id, "refused", Some(&note));
        }
    }

    /// Writes what waits, and ends. Blocks.
    pub(crate) fn stop(&self) {
        let records = lock(&self.refusals).flush();
        self.record_refusals(records);
        if let Some(audit) = &self.audit {
            audit.stop();
        }
    }

    /// Records a decision about the mesh.
    fn decision(&self, event: impl FnOnce() -> Event) {
        if let Some(audit) = &self.audit {
            audit.record(Tier::Master, event());
        }
    }

    pub(crate) fn joined(
        &self,
        node: &str,
        name: &str,
        how: &str,
        from: &str,
        token: Option<&str>,
    ) {
        self.decision(|| Event::Join {
            node: node.into(),
            name: name.into(),
            from: from.into(),
            how: how.into(),
            token: token.map(Text::from),
        });
    }

    pub(crate) fn left(&self, node: &str, name: &str, reason: &str) {
        self.decision(|| Event::Leave {
            node: node.into(),
            name: name.into(),
            reason: reason.into(),
        });
    }

    pub(crate) fn refused(&self, node: &str, name: &str, from: &str, reason: &str) {
        self.decision(|| Event::Refuse {
            node: node.into(),
            name: name.into(),
            from: from.into(),
            reason: reason.into(),
        });
    }

    pub(crate) fn revoked(&self, node: &str, name: &str, decision: &str, reason: &str) {
        self.decision(|| Event::Revoke {
            node: node.into(),
            name: name.into(),
            decision: decision.into(),
            reason: reason.into(),
        });
    }

    /// Records a rotation of the mesh root, by the digest of the new one.
    pub(crate) fn root(&self, root: &str, decision: &str) {
        self.decision(|| Event::Root {
            root: root.into(),
            decision: decision.into(),
        });
    }

    /// Records a node's report of an attack.
    pub(crate) fn sighting(&self, sighting: &Sighting) {
        self.decision(|| Event::Sighting {
            reporter: sighting.origin.to_string().into(),
            attack: (&sighting.kind).into(),
            subject: (&sighting.subject).into(),
            detail: (&sighting.detail).into(),
        });
    }

    /// The last epochs that have ended, of each trail.
    pub(crate) fn epochs(&self) -> Vec<ShownEpochs> {
        self.audit.as_ref().map(Audit::epochs).unwrap_or_default()
    }

    pub(crate) fn evidence(&self, node: &str, name: &str, decision: &str, texts: &[String]) {
        self.decision(|| Event::Evidence {
            node: node.into(),
            name: name.into(),
            decision: decision.into(),
            texts: texts.iter().take(MOST_MODELS).map(Text::from).collect(),
        });
    }

    pub(crate) fn token(&self, token: &str, decision: &str, note: Option<&str>) {
        self.decision(|| Event::Token {
            token: token.into(),
            decision: decision.into(),
            note: note.filter(|note| !note.is_empty()).map(Text::from),
        });
    }

    pub(crate) fn models<'a>(
        &self,
        node: &str,
        name: &str,
        decision: &str,
        models: impl Iterator<Item = &'a str>,
    ) {
        self.decision(|| Event::Model {
            node: node.into(),
            name: name.into(),
            decision: decision.into(),
            models: models.take(MOST_MODELS).map(Text::from).collect(),
        });
    }

    pub(crate) fn failover(&self, model: &str, times: u64) {
        self.decision(|| Event::Failover {
            model: model.into(),
            times,
        });
    }

    pub(crate) fn drained(&self, node: &str, name: &str, decision: &str) {
        self.decision(|| Event::Drain {
            node: node.into(),
            name: name.into(),
            decision: decision.into(),
        });
    }

    /// Records a request of any kind, however it ended.
    pub(crate) fn request(&self, ended: &EndedRequest<'_>) {
        let Some(audit) = &self.audit else { return };
        let key = ended.holder.map(|holder| Text::from(&*holder.id));
        let from = match ended.origin {
            Origin::Address(address) => Some(Text::from(address.to_string())),
            _ => None,
        };
        let tier = ended.holder.map(|holder| holder.tier);
        let tier = match tier.unwrap_or_default() {
            mesh_curtain::Tier::GrimoirePublic => Tier::GrimoirePublic,
            mesh_curtain::Tier::Goodlife => Tier::Goodlife,
            mesh_curtain::Tier::Master => Tier::Master,
        };
        let event = Event::Request {
            request: ended.id.into(),
            front: lower(ended.front).into(),
            task: ended.task.into(),
            model: ended.model.into(),
            key,
            from,
            outcome: lower(ended.outcome).into(),
            milliseconds: u64::try_from(ended.took.as_millis()).unwrap_or(u64::MAX),
        };
        audit.record(tier, event);
    }

    /// Records the envelope of a message that was accepted.
    pub(crate) fn message(
        &self,
        carrier: &'static str,
        kind: impl fmt::Display,
        from: impl fmt::Display,
        bytes: usize,
    ) {
        if let Some(audit) = &self.audit {
            let envelope = Envelope {
                carrier,
                message: kind.to_string(),
                from: from.to_string(),
            };
            audit.message(envelope, bytes as u64);
        }
    }

    /// Records messages that were counted already.
    pub(crate) fn messages(
        &self,
        carrier: &'static str,
        kind: impl fmt::Display,
        from: impl fmt::Display,
        tally: Tally,
    ) {
        if let Some(audit) = &self.audit {
            let envelope = Envelope {
                carrier,
                message: kind.to_string(),
                from: from.to_string(),
            };
            audit.messages(envelope, tally);
        }
    }

    /// True if messages of a kind may be counted before they are recorded.
    pub(crate) fn counts_messages(&self) -> bool {
        self.audit.is_some() && !self.each_message
    }
}

/// The head's identity, as it endorses the keys of the trail.
struct Endorser {
    key: Arc<IdentityKey>,
    node: NodeIdentity,
}

impl Identity for Endorser {
    fn public_key(&self) -> Vec<u8> {
        self.key.public().as_bytes().to_vec()
    }

    fn sign(&self, context: &'static [u8], message: &[u8]) -> Vec<u8> {
        self.key.sign(context, message)
    }

    fn document(&self) -> Option<Vec<u8>> {
        self.node.papers()
    }
}

fn lower(word: impl fmt::Debug) -> String {
    format!("{word:?}").to_lowercase()
}

/// A policy of admission that records its decisions.
pub(crate) struct Recorded<A> {
    policy: Arc<A>,
    recorder: Recorder,
}

impl<A: Admission> Recorded<A> {
    pub(crate) fn new(policy: Arc<A>, recorder: Recorder) -> Self {
        Self { policy, recorder }
    }
}

impl<A: Admission> Admission for Recorded<A> {
    fn join(&self, ask: &JoinAsk<'_>, now: SystemTime) -> Result<Issued, Refusal> {
        let joined = self.policy.join(ask, now);
        match &joined {
            Ok(issued) => {
                let certificate = issued.certificates.first();
                let member = certificate.and_then(|cert| Member::from_certificate(cert).ok());
                let (node, name) =
                    member.map_or_else(Default::default, |member| (member.node_id, member.name));
                self.recorder
                    .joined(&node, &name, "joined", "", Some(ask.token_id));
                self.recorder.token(ask.token_id, "used", None);
            }
            // It asks again and again; the approval is recorded when an operator gives it.
            Err(Refusal::AwaitingApproval(_)) => {}
            // It has a record of its own.
            Err(Refusal::Evidence(_)) => {}
            Err(refusal) => {
                self.recorder
                    .refused("", ask.node_name, "", &refusal.to_string());
            }
        }
        joined
    }

    fn renew(&self, ask: &RenewAsk<'_>, now: SystemTime) -> Result<Issued, Refusal> {
        let member = ask.member;
        let renewed = self.policy.renew(ask, now);
        match &renewed {
            Ok(_) => {
                if let Some(successor) = ask.successor {
                    let reason = format!("by {}", successor.node_id());
                    self.recorder
                        .revoked(&member.node_id, &member.name, "replaced", &reason);
                }
                self.recorder
                    .joined(&member.node_id, &member.name, "renewed", "", None);
            }
            Err(Refusal::AwaitingApproval(_) | Refusal::Evidence(_)) => {}
            Err(refusal) => {
                self.recorder
                    .refused(&member.node_id, &member.name, "", &refusal.to_string())
            }
        }
        renewed
    }

    fn connect(&self, member: &Member, now: SystemTime) -> Result<(), Refusal> {
        let admitted = self.policy.connect(member, now);
        if let Err(refusal) = &admitted {
            self.recorder
                .refused(&member.node_id, &member.name, "", &refusal.to_string());
        }
        admitted
    }

    fn mesh(&self) -> String {
        self.policy.mesh()
    }
}

/// In the state directory.
const FOLDER: &str = "audit";
/// Names of models or changes in one record; they fit its longest length.
const MOST_MODELS: usize = 16;
