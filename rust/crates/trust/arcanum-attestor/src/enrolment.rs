//! Enrolment as a state machine: who becomes a member, with which name. No I/O and no clock.

use std::time::SystemTime;

use mesh_base::clock::unix_seconds;
use mesh_net::trust::Refusal;

use crate::evidence::Evidence;
use crate::policy::EvidencePolicy;
use crate::roster::{Pending, Roster};
use crate::tokens::Tokens;

/// The head's rules for new nodes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Approval {
    /// A valid token is enough.
    #[default]
    Automatic,
    /// A node with a valid token also waits until an operator has approved it.
    Manual,
}

/// State of the enrolment: tokens, members, and nodes that wait for approval.
#[derive(Clone, Debug, Default)]
pub struct Enrolment {
    /// Join tokens.
    pub tokens: Tokens,
    /// Members and nodes that wait.
    pub roster: Roster,
}

/// A node that asks to join. Its identity and the key of its request are proven.
#[derive(Clone, Copy, Debug)]
pub struct Candidate<'a> {
    /// Id of the node.
    pub node_id: &'a str,
    /// Id of the key in its certificate request: its node id in earlier versions.
    pub key_id: &'a str,
    /// The name that it asks for.
    pub name: &'a str,
    /// Public part of its token.
    pub token_id: &'a str,
    /// Secret part of its token.
    pub token_secret: &'a [u8],
    /// Its evidence, which meets the requirements.
    pub evidence: Option<&'a Evidence>,
}

/// Decision on a candidate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// It becomes a member with this name.
    Admit {
        /// Name of the node in the mesh.
        name: String,
    },
    /// It waits for approval, and may ask again.
    Wait,
}

impl Enrolment {
    /// Decides on a candidate, and records the decision. A token is used by the first request with it; while the node waits
    /// for approval it keeps its place, whenever the token expires.
    ///
    /// A known member that joins again, with a new token, needs no second approval. An approval is for the evidence that the
    /// operator could see: if a watched field changes, the node waits again.
    ///
    /// # Errors
    /// [`Refusal`] if the token is not good, or too many nodes wait.
    pub fn join(
        &mut self,
        candidate: &Candidate<'_>,
        approval: Approval,
        policy: &EvidencePolicy,
        is_expelled: impl Fn(&str) -> bool,
        now: SystemTime,
    ) -> Result<Decision, Refusal> {
        let Candidate {
            node_id,
            name,
            token_id,
            token_secret,
            ..
        } = *candidate;
        let known = [node_id, candidate.key_id];
        let known = known
            .iter()
            .any(|id| self.roster.members().contains_key(*id));
        let waiting = self.roster.pending().get(node_id);
        let waiting = waiting.filter(|waiting| {
            waiting.token == token_id && self.tokens.was_used_by(token_id, token_secret, node_id)
        });
        match waiting.cloned() {
            Some(mut waiting) if approval == Approval::Manual => {
                let shown = waiting.evidence.as_deref();
                if differs(shown, candidate.evidence, policy) {
                    waiting.approved = false;
                    waiting.evidence = candidate.evidence.cloned().map(Box::new);
                }
                if !waiting.approved {
                    self.roster
                        .wait(node_id, waiting)
                        .map_err(Refusal::Internal)?;
                    return Ok(Decision::Wait);
                }
            }
            Some(_) => {}
            None => {
                self.tokens
                    .redeem(token_id, token_secret, node_id, name, now)?;
                if approval == Approval::Manual && !known {
                    let pending = Pending {
                        name: name.to_owned(),
                        token: token_id.to_owned(),
                        since: unix_seconds(now),
                        approved: false,
                        evidence: candidate.evidence.cloned().map(Box::new),
                    };
                    self.roster
                        .wait(node_id, pending)
                        .map_err(Refusal::Internal)?;
                    return Ok(Decision::Wait);
                }
            }
        }
        self.roster.stop_waiting(node_id);
        // A node of an earlier version that joins again has an identity now, and is still the same.
        self.roster.renamed(candidate.key_id, node_id);
        let name = self.roster.assign(node_id, name, is_expelled);
        self.tokens
            .note_use(token_id, node_id, &name, unix_seconds(now));
        Ok(Decision::Admit { name })
    }
}

/// True if an approval for the first evidence is none for the second.
fn differs(shown: Option<&Evidence>, asked: Option<&Evidence>, policy: &EvidencePolicy) -> bool {
    match (shown, asked) {
        (None, None) => false,
        (Some(shown), Some(asked)) => {
            let changes = shown.changes_to(asked);
            !policy.watched_of(&changes, asked).is_empty()
        }
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    use mesh_net::trust::{JoinToken, Member, Role};
    use proptest::prelude::*;

    use super::*;
    use crate::tokens::{RETRY_WINDOW, TokenSpec};

    const HOUR: Duration = Duration::from_secs(3600);

    fn now() -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(1_800_000_000)
    }

    fn token(enrolment: &mut Enrolment, nodes: u32) -> JoinToken {
        let spec = TokenSpec {
            nodes,
            ..TokenSpec::once(HOUR, "")
        };
        enrolment.tokens.create([1; 32], &spec, now()).unwrap()
    }

    fn ask(
        enrolment: &mut Enrolment,
        token: &JoinToken,
        node: &str,
        approval: Approval,
        now: SystemTime,
    ) -> Result<Decision, Refusal> {
        let candidate = Candidate {
            node_id: node,
            key_id: &format!("key of {node}"),
            name: "laptop",
            token_id: &token.id(),
            token_secret: token.secret(),
            evidence: None,
        };
        let policy = EvidencePolicy::default();
        let decision = enrolment.join(&candidate, approval, &policy, |_| false, now)?;
        if let Decision::Admit { name } = &decision {
            let member = Member {
                node_id: node.to_owned(),
                key_id: format!("key of {node}"),
                name: name.clone(),
                role: Role::Worker,
                mesh: "test".to_owned(),
                not_before: now,
                not_after: now + HOUR,
            };
            enrolment.roster.note(&member, now);
        }
        Ok(decision)
    }

    #[test]
    fn a_node_waits_until_it_is_approved_however_long_and_its_token_is_taken() {
        let mut enrolment = Enrolment::default();
        let token = token(&mut enrolment, 1);
        let manual = Approval::Manual;
        for after in [Duration::ZERO, HOUR / 2, HOUR * 50] {
            let decision = ask(&mut enrolment, &token, "a", manual, now() + after);
            assert_eq!(decision, Ok(Decision::Wait));
        }
        let other = ask(&mut enrolment, &token, "b", manual, now());
        assert!(matches!(other, Err(Refusal::TokenUsed { .. })), "{other:?}");
        // Knowing the id of a node that waits, and its token's, is not enough.
        let guess = JoinToken::generate([1; 32]);
        let candidate = Candidate {
            node_id: "a",
            key_id: "k",
            name: "laptop",
            token_id: &token.id(),
            token_secret: guess.secret(),
            evidence: None,
        };
        let policy = EvidencePolicy::default();
        assert!(enrolment.roster.approve("b").is_none());
        enrolment.roster.approve("a").unwrap();
        let forged = enrolment.join(&candidate, manual, &policy, |_| false, now());
        assert_eq!(forged, Err(Refusal::TokenUnknown));
        let later = now() + HOUR * 51;
        let admitted = ask(&mut enrolment, &token, "a", manual, later);
        let name = "laptop".to_owned();
        assert_eq!(admitted, Ok(Decision::Admit { name }));
        assert!(enrolment.roster.pending().is_empty());
        // The answer may be lost on its way.
        let again = ask(&mut enrolment, &token, "a", manual, later + RETRY_WINDOW);
        assert!(matches!(again, Ok(Decision::Admit { .. })), "{again:?}");
        let late = ask(&mut enrolment, &token, "a", manual, later + HOUR);
        assert!(matches!(late, Err(Refusal::TokenUsed { .. })), "{late:?}");
    }

    #[test]
    fn a_member_that_joins_again_and_a_node_that_waited_for_another_policy_need_no_approval() {
        let mut enrolment = Enrolment::default();
        let first = token(&mut enrolment, 1);
        ask(&mut enrolment, &first, "a", Approval::Automatic, now()).unwrap();
        let second = token(&mut enrolment, 2);
        let again = ask(&mut enrolment, &second, "a", Approval::Manual, now());
        assert!(matches!(again, Ok(Decision::Admit { .. })), "{again:?}");
        let waits = ask(&mut enrolment, &second, "b", Approval::Manual, now());
        assert_eq!(waits, Ok(Decision::Wait));
        let admitted = ask(&mut enrolment, &second, "b", Approval::Automatic, now());
        let name = "laptop-2".to_owned();
        assert_eq!(admitted, Ok(Decision::Admit { name }));
    }

    proptest! {
        /// Whatever comes in which order: a token admits as many nodes as it is good for, nobody joins unapproved, and no
        /// two members have one name.
        #[test]
        fn tokens_admit_no_more_nodes_than_they_are_good_for(
            nodes in 1..4u32,
            steps in proptest::collection::vec((0..6u8, 0..4u8, 0..5_000u64), 0..60),
        ) {
            let mut enrolment = Enrolment::default();
            let token = token(&mut enrolment, nodes);
            let mut approved = std::collections::BTreeSet::new();
            let mut time = now();
            for (node, step, seconds) in steps {
                time += Duration::from_secs(seconds / 10);
                let node = format!("node {node}");
                match step {
                    0 => {
                        if enrolment.roster.approve(&node).is_some() {
                            approved.insert(node);
                        }
                    }
                    1 => enrolment = Enrolment {
                        tokens: Tokens::restore(enrolment.tokens.records().to_vec()),
                        roster: serde_json::from_str(&serde_json::to_string(&enrolment.roster).unwrap()).unwrap(),
                    },
                    _ => {
                        let decision = ask(&mut enrolment, &token, &node, Approval::Manual, time);
                        if let Ok(Decision::Admit { .. }) = decision {
                            prop_assert!(approved.contains(&node), "{} was not approved", node);
                        }
                    }
                }
                let members = enrolment.roster.members();
                let count = members.len() + enrolment.roster.pending().len();
                prop_assert!(count <= nodes as usize);
                let names: std::collections::BTreeSet<_> = members.values().map(|known| &known.name).collect();
                prop_assert_eq!(names.len(), members.len());
            }
        }
    }
}
