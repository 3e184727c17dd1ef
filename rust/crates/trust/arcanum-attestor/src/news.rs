//! Decisions on evidence, for the log, the audit trail and the metrics.

use std::collections::VecDeque;
use std::sync::Mutex;

use mesh_base::sync::lock;

use crate::evidence::Change;
use crate::text::cut;

/// A decision on evidence of a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EvidenceNews {
    /// Id of the node.
    pub node_id: String,
    /// Its name, or the one that it asked for.
    pub name: String,
    /// The decision.
    pub decision: EvidenceDecision,
    /// What changed, a line for each, or why the node was refused.
    pub texts: Vec<String>,
}

/// Kind of a decision on evidence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EvidenceDecision {
    /// The evidence of a node that joined, or its first one.
    First,
    /// A change was accepted.
    Changed,
    /// A change waits for approval.
    Held,
    /// The node was refused.
    Refused,
    /// The node was expelled.
    Expelled,
}

impl EvidenceDecision {
    /// The decision as a word.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::First => "first",
            Self::Changed => "changed",
            Self::Held => "held",
            Self::Refused => "refused",
            Self::Expelled => "expelled",
        }
    }
}

impl EvidenceNews {
    pub(crate) fn new(
        node_id: &str,
        name: &str,
        decision: EvidenceDecision,
        changes: Vec<Change>,
    ) -> Self {
        Self {
            node_id: node_id.to_owned(),
            name: cut(name),
            decision,
            texts: changes.iter().map(Change::to_string).collect(),
        }
    }
}

/// Decisions that nobody has taken yet; the oldest go if there are too many.
#[derive(Debug, Default)]
pub(crate) struct News(Mutex<VecDeque<EvidenceNews>>);

impl News {
    pub(crate) fn add(&self, news: EvidenceNews) {
        let mut waiting = lock(&self.0);
        if waiting.len() >= MOST_NEWS {
            waiting.pop_front();
        }
        waiting.push_back(news);
    }

    pub(crate) fn refused(&self, node_id: &str, name: &str, reason: &str) {
        let refused = EvidenceDecision::Refused;
        let news = EvidenceNews {
            texts: vec![reason.to_owned()],
            ..EvidenceNews::new(node_id, name, refused, Vec::new())
        };
        self.add(news);
    }

    pub(crate) fn take(&self) -> Vec<EvidenceNews> {
        lock(&self.0).drain(..).collect()
    }
}

const MOST_NEWS: usize = 256;
