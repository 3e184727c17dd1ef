//! Decides which party is to blame for a failed attempt.

use std::time::Instant;

use dcf::ErrorCode;
use mesh_control::request::Fault;

use super::drive::{Attempted, Drive};
use super::event::Event;
use crate::mesh::{Assignment, Route};

impl<E: FnMut(Event) + Send> Drive<'_, E> {
    /// Notes whose fault it is that an attempt failed.
    pub(super) fn blame(&mut self, assignment: &Assignment, began: Instant) {
        let placed = &assignment.placed;
        // A ring's driver is not to blame for the silence of its members: see `Mesh::suspect`.
        if placed.ring.is_some() && self.answer.fault() == Fault::Silence {
            return;
        }
        let attempted = Attempted {
            key: placed.key.clone(),
            name: placed.name.clone(),
            model: match assignment.route {
                Route::Legacy(_) => String::new(),
                _ => placed.model.clone(),
            },
            began,
        };
        match self.answer.fault() {
            Fault::Unknown => {}
            Fault::Perhaps => self.suspects.push(attempted),
            Fault::Silence | Fault::Worker => {
                self.mesh
                    .at_fault(&attempted.key, &placed.name, &attempted.model, began);
            }
        }
    }

    /// The request was answered, so the workers that failed on it were at fault, and not the request.
    pub(super) fn exonerate(&mut self, by: &Assignment) {
        for attempted in std::mem::take(&mut self.suspects) {
            if attempted.key != by.placed.key {
                let Attempted {
                    key,
                    name,
                    model,
                    began,
                } = attempted;
                self.mesh.at_fault(&key, &name, &model, began);
            }
        }
    }

    /// A worker says that the request itself is at fault: notes whether another one can be asked, and what
    /// its answer would prove.
    pub(super) fn ask_another(&mut self, assignment: &Assignment) {
        let another = self.mesh.another(&self.ask, assignment.placed.worker);
        self.answer.set_second_opinion(another);
        self.rejected_in = self
            .mesh
            .context_on(assignment.placed.worker, &assignment.placed.model);
    }

    /// A worker answers. If another one rejected the request before, that one was wrong, unless its context
    /// is smaller.
    pub(super) fn contradict(&mut self, assignment: &Assignment) {
        let Some(rejected) = self.answer.contradicted() else {
            return;
        };
        let context = self
            .mesh
            .context_on(assignment.placed.worker, &assignment.placed.model);
        let excused = rejected.code == ErrorCode::CONTEXT_TOO_LONG && self.rejected_in < context;
        if !excused {
            self.mesh
                .contradicted(rejected.worker, &assignment.placed, &rejected.text);
        }
    }
}
