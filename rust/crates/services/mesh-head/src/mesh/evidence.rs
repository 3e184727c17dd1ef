//! Decisions on evidence of nodes: the log, the audit trail, the metrics, and the links of nodes that are out.

use arcanum_attestor::{EvidenceDecision, EvidenceNews};
use mesh_net::trust::{AWAITING_APPROVAL, EVIDENCE_REFUSED, EXPELLED};
use tracing::{info, warn};

use super::state::Mesh;

impl Mesh {
    /// Records a decision. A node that is connected from before loses its link if it may not go on.
    pub(crate) fn note_evidence(&self, news: &EvidenceNews) {
        let (node, name) = (&news.node_id, &news.name);
        let (decision, texts) = (news.decision.as_str(), news.texts.join("; "));
        self.metrics.evidence(decision);
        self.audit.evidence(node, name, decision, &news.texts);
        let code = match news.decision {
            EvidenceDecision::First => {
                info!(node, name, "evidence of this node received");
                return;
            }
            EvidenceDecision::Changed => {
                warn!(
                    event = "evidence changed",
                    node,
                    name,
                    changes = texts,
                    "evidence of a node has changed"
                );
                return;
            }
            EvidenceDecision::Held => AWAITING_APPROVAL,
            EvidenceDecision::Refused => EVIDENCE_REFUSED,
            EvidenceDecision::Expelled => EXPELLED,
        };
        warn!(
            event = format!("evidence {decision}"),
            node,
            name,
            reasons = texts,
            "a node is kept out because of its evidence"
        );
        self.disconnect(node, code, &texts);
        if news.decision == EvidenceDecision::Expelled {
            self.tell_changes_of_expelled();
        }
    }
}
