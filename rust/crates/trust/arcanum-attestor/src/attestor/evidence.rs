//! Evidence at the head: the policy's decisions, and their effects on members.

use std::time::SystemTime;

use mesh_base::clock::unix_seconds;
use mesh_net::trust::{Member, Refusal, Vouched};

use super::Attestor;
use crate::evidence::{Change, Evidence};
use crate::news::{EvidenceDecision, EvidenceNews};
use crate::policy::Reason;
use crate::record::Assessment;

impl Attestor {
    /// Judges the evidence that a member reports on its link; `None` where it sends none. Blocks on the disk.
    ///
    /// # Errors
    /// [`Refusal`] if the link has to end.
    pub fn report(
        &self,
        member: &Member,
        evidence: Option<Vouched<'_>>,
        now: SystemTime,
    ) -> Result<(), Refusal> {
        let (node_id, name) = (&member.node_id, &member.name);
        self.refuse_expelled(node_id, &member.key_id)?;
        let evidence = self.read_evidence(node_id, name, evidence)?;
        self.judge(node_id, name, evidence, now)
    }

    /// Decisions on evidence since the last call, the oldest first.
    pub fn take_evidence_news(&self) -> Vec<EvidenceNews> {
        self.news.take()
    }

    pub(super) fn read_evidence(
        &self,
        node_id: &str,
        name: &str,
        evidence: Option<Vouched<'_>>,
    ) -> Result<Option<Evidence>, Refusal> {
        let read = evidence.map(|vouched| Evidence::of(&vouched, &self.policy.trusted_keys));
        read.transpose().map_err(|error| {
            let text = format!("evidence refused: {error}");
            self.news.refused(node_id, name, &text);
            Refusal::Evidence(text)
        })
    }

    /// Takes the evidence of a member, or refuses it.
    pub(super) fn judge(
        &self,
        node_id: &str,
        name: &str,
        evidence: Option<Evidence>,
        now: SystemTime,
    ) -> Result<(), Refusal> {
        let mut assessment = Assessment::Same;
        let seconds = unix_seconds(now);
        self.note(|roster| {
            assessment = roster.assess(node_id, evidence, &self.policy, seconds);
        });
        let news = |decision, changes: Vec<Change>| {
            self.news
                .add(EvidenceNews::new(node_id, name, decision, changes));
        };
        match assessment {
            Assessment::Same => Ok(()),
            Assessment::First => {
                news(EvidenceDecision::First, Vec::new());
                Ok(())
            }
            Assessment::Changed(changes) => {
                news(EvidenceDecision::Changed, changes);
                Ok(())
            }
            Assessment::Held(changes, waits) => {
                let text = changes_awaiting_approval(name, node_id, &changes);
                if !waits {
                    news(EvidenceDecision::Held, changes);
                }
                Err(Refusal::AwaitingApproval(text))
            }
            Assessment::Refused(reasons) => {
                let text = refusal_text(&reasons);
                self.news.refused(node_id, name, &text);
                Err(Refusal::Evidence(text))
            }
            Assessment::Expelled(changes) => {
                let reason = format!("its evidence changed: {}", summary(&changes));
                news(EvidenceDecision::Expelled, changes);
                if let Err(error) = self.expel(node_id, name, &reason, now) {
                    tracing::error!(%error, "an expelled node is forgotten when the head starts again");
                }
                self.refuse_expelled(node_id, node_id)?;
                Err(Refusal::Expelled(reason))
            }
        }
    }

    /// Refuses a node that asks to join and does not meet the requirements.
    pub(super) fn require(
        &self,
        node_id: &str,
        name: &str,
        evidence: Option<&Evidence>,
    ) -> Result<(), Refusal> {
        let unmet = self.policy.unmet(evidence);
        if unmet.is_empty() {
            return Ok(());
        }
        let text = refusal_text(&unmet);
        self.news.refused(node_id, name, &text);
        Err(Refusal::Evidence(text))
    }

    /// A node has joined with evidence.
    pub(super) fn note_first(&self, node_id: &str, name: &str) {
        let first = EvidenceDecision::First;
        self.news
            .add(EvidenceNews::new(node_id, name, first, Vec::new()));
    }
}

/// The names of the fields, and the first values.
fn summary(changes: &[Change]) -> String {
    let texts = changes.iter().take(2).map(ToString::to_string);
    let mut texts: Vec<String> = texts.collect();
    let more = changes.iter().skip(2).map(|change| change.field.name());
    texts.extend(more.map(str::to_owned));
    texts.join("; ")
}

fn refusal_text(reasons: &[Reason]) -> String {
    let texts: Vec<String> = reasons.iter().map(ToString::to_string).collect();
    texts.join("; ")
}

fn changes_awaiting_approval(name: &str, node_id: &str, changes: &[Change]) -> String {
    format!(
        "`{name}` waits for approval of a change ({}): undo it on this node, or accept it with `hydramesh nodes approve {}` at the head",
        summary(changes),
        node_id.get(..16).unwrap_or(node_id)
    )
}
