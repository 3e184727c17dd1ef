//! Decides which party is to blame for a failed attempt.

use std::time::Instant;

use dcf::ErrorCode;
use mesh_control::request::{Failure, Fault, Lifecycle};
use mesh_control::router::Requirements;

use crate::mesh::{Assignment, Mesh};

/// Attempts at one request whose workers are to blame if another worker can do it.
#[derive(Debug, Default)]
pub(super) struct FailedAttempts {
    attempts: Vec<Attempted>,
    /// The context that the worker claims whose rejection of this request is looked into.
    rejected_in: u32,
}

#[derive(Debug)]
struct Attempted {
    key: String,
    name: String,
    model: String,
    began: Instant,
}

impl FailedAttempts {
    /// Notes whose fault it is that an attempt failed.
    pub(super) fn blame(
        &mut self,
        fault: Fault,
        assignment: &Assignment,
        began: Instant,
        mesh: &Mesh,
    ) {
        let placed = &assignment.placed;
        // A ring's driver is not to blame for the silence of its members: see `Mesh::suspect`.
        if placed.ring.is_some() && fault == Fault::Silence {
            return;
        }
        let attempted = Attempted {
            key: placed.key.clone(),
            name: placed.name.clone(),
            model: assignment.faulted_model().to_owned(),
            began,
        };
        match fault {
            Fault::Unknown => {}
            Fault::Perhaps => self.attempts.push(attempted),
            Fault::Silence | Fault::Worker => attempted.at_fault(mesh),
        }
    }

    /// The request was answered, so the workers that failed on it were at fault, and not the request. The
    /// answer of a worker without an identity does not show that.
    pub(super) fn exonerate(&mut self, by: &Assignment, mesh: &Mesh) {
        if by.plain {
            return;
        }
        for attempted in std::mem::take(&mut self.attempts) {
            if attempted.key != by.placed.key {
                attempted.at_fault(mesh);
            }
        }
    }

    /// If a worker says that the request itself is at fault: notes whether another one can be asked, and what
    /// its answer would prove.
    pub(super) fn ask_another(
        &mut self,
        failure: &Failure,
        (ask, answer): (&Requirements, &mut Lifecycle),
        assignment: &Assignment,
        mesh: &Mesh,
    ) {
        if let Failure::Error { code, .. } = failure
            && matches!(
                *code,
                ErrorCode::INVALID_PAYLOAD | ErrorCode::CONTEXT_TOO_LONG
            )
        {
            answer.set_second_opinion(mesh.another(ask, assignment.placed.worker));
            self.rejected_in = context_on(assignment, mesh);
        }
    }

    /// A worker with an identity answers. If another one rejected the request before, that one was wrong,
    /// unless its context is smaller.
    pub(super) fn contradict(&self, answer: &mut Lifecycle, by: &Assignment, mesh: &Mesh) {
        let Some(rejected) = answer.contradicted().filter(|_| !by.plain) else {
            return;
        };
        let smaller = self.rejected_in < context_on(by, mesh);
        if rejected.code != ErrorCode::CONTEXT_TOO_LONG || !smaller {
            mesh.contradicted(rejected.worker, &by.placed, &rejected.text);
        }
    }
}

impl Attempted {
    fn at_fault(&self, mesh: &Mesh) {
        mesh.at_fault(&self.key, &self.name, &self.model, self.began);
    }
}

fn context_on(assignment: &Assignment, mesh: &Mesh) -> u32 {
    let placed = &assignment.placed;
    mesh.context_on(placed.worker, &placed.model)
}
