//! Detects workers that died of a request, as far as the head can see.

use dcf::ErrorCode;
use mesh_control::registry::WorkerId;
use mesh_control::request::{Failure, Lifecycle};
use mesh_net::quic::Closed;

use crate::mesh::{Assignment, Mesh};

/// Workers that died while they had a request, as far as can be seen: one whose process connects again lives.
#[derive(Debug, Default)]
pub(crate) struct Deaths(Vec<(WorkerId, String, u64)>);

impl Deaths {
    /// A stream that broke with its link: perhaps the worker is gone.
    pub(crate) fn of(
        &mut self,
        failure: Failure,
        assignment: &Assignment,
        answer: &mut Lifecycle,
        mesh: &Mesh,
    ) -> Failure {
        let closed = || assignment.connection.as_ref()?.close_reason();
        let (Failure::Lost(text), Some(reason)) = (&failure, closed()) else {
            return failure;
        };
        let node = &assignment.placed.key;
        let is = ProcessMatch::of(assignment.process, mesh.process_of(node));
        if !is_death(&reason, is) {
            return failure;
        }
        self.review(answer, mesh);
        let died = (assignment.placed.worker, node.clone(), assignment.process);
        self.0.push(died);
        Failure::Died(text.clone())
    }

    /// Takes back the deaths of those that are connected again.
    pub(crate) fn review(&mut self, answer: &mut Lifecycle, mesh: &Mesh) {
        self.0.retain(|(worker, node, process)| {
            let lives = ProcessMatch::of(*process, mesh.process_of(node)) == ProcessMatch::Same;
            if lives {
                answer.lives(*worker);
            }
            !lives
        });
    }
}

/// The process that is connected now as the node of a worker whose link is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ProcessMatch {
    /// The same process.
    Same,
    /// Another one: the worker was restarted.
    Other,
    /// None, or one that does not say.
    Unknown,
}

impl ProcessMatch {
    fn of(before: u64, now: Option<u64>) -> Self {
        match now {
            Some(now) if now == 0 || before == 0 => Self::Unknown,
            Some(now) if now == before => Self::Same,
            Some(_) => Self::Other,
            None => Self::Unknown,
        }
    }
}

/// Returns true if a link that ended like this shows that the worker died.
fn is_death(reason: &Closed, process: ProcessMatch) -> bool {
    match (reason, process) {
        (_, ProcessMatch::Same) => false,
        (Closed::Gone | Closed::Restarted | Closed::Silent, _) => true,
        // This head closes links that it has no use for: in quarantine, expelled, or replaced. A new process
        // has replaced one that died unnoticed.
        (Closed::ByUs, process) => process == ProcessMatch::Other,
        (Closed::ByPeer { code, .. }, _) => {
            let goodbye = [ErrorCode::OK, ErrorCode::DRAINING, ErrorCode::CANCELLED];
            !goodbye.contains(code)
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_that_ends_is_a_death_only_if_the_process_is_gone() {
        let by_peer = |code| Closed::ByPeer {
            code,
            text: String::new(),
        };
        for reason in [Closed::Gone, Closed::Restarted, Closed::Silent] {
            assert!(
                is_death(&reason, ProcessMatch::Unknown) && is_death(&reason, ProcessMatch::Other)
            );
            assert!(!is_death(&reason, ProcessMatch::Same), "it connected again");
        }
        // In quarantine, expelled, or connected again.
        assert!(!is_death(&Closed::ByUs, ProcessMatch::Unknown));
        assert!(!is_death(&Closed::ByUs, ProcessMatch::Same));
        assert!(is_death(&Closed::ByUs, ProcessMatch::Other), "started anew");
        for goodbye in [ErrorCode::OK, ErrorCode::DRAINING, ErrorCode::CANCELLED] {
            assert!(!is_death(&by_peer(goodbye), ProcessMatch::Unknown));
        }
        assert!(is_death(
            &by_peer(ErrorCode::INTERNAL),
            ProcessMatch::Unknown
        ));
        assert_eq!(ProcessMatch::of(7, Some(7)), ProcessMatch::Same);
        assert_eq!(ProcessMatch::of(7, Some(8)), ProcessMatch::Other);
        assert_eq!(ProcessMatch::of(0, Some(0)), ProcessMatch::Unknown);
        assert_eq!(ProcessMatch::of(7, None), ProcessMatch::Unknown);
    }
}
