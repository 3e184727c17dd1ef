//! Events of a task for its front end.

use bytes::Bytes;
use mesh_control::placement::Placed;
use mesh_control::request::{AnswerError, Complete, Delta};
use mesh_proto::{Progress, RequestPhase};

use crate::api::preview::Preview;

/// An event of a task for its front end. [`Event::Complete`] and [`Event::Failed`] are last.
#[derive(Debug)]
pub(crate) enum Event {
    /// It waits for a worker with room.
    Queued,
    /// A worker has it; again after each rerun.
    Placed(Placed),
    /// Its worker reports the cause of its wait.
    Waits(Progress),
    Delta(Delta),
    /// So many steps of an image are done, of so many.
    Stepped {
        step: u32,
        steps: u32,
        /// The image as it is, where that is due.
        preview: Option<Preview>,
    },
    /// The whole answer to a plain task, as it is.
    Whole(Bytes),
    Complete(Complete),
    /// There will be no (more) answer.
    Failed(AnswerError),
}

/// The cause of a wait while no worker has room, in words that follow "waiting".
pub(crate) const FOR_ROOM: &str = "for a worker with room";

/// The cause of the wait for an image of which so many steps are done, in words that follow "waiting".
pub(crate) fn next_step(step: u32, steps: u32) -> String {
    match step < steps {
        true => format!("for step {} of {steps}", step + 1),
        false => format!("for the image, {steps} steps done"),
    }
}

/// The cause of a request's wait at its worker, in words that follow "waiting".
pub(crate) fn words(progress: &Progress) -> String {
    match progress.phase() {
        RequestPhase::Preparing => "for its worker to take it in".to_owned(),
        RequestPhase::Queued => format!("for a slot, {} requests before it", progress.position),
        RequestPhase::Prefilling => format!(
            "for its prompt, {} of {} tokens computed",
            progress.prompt_done, progress.prompt_tokens
        ),
        RequestPhase::Decoding | RequestPhase::Unspecified => "for its worker".to_owned(),
    }
}
