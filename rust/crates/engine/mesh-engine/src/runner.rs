//! The trait for running an engine's steps: on a local stage, or on a pipeline of stages over several
//! machines.

use std::time::Instant;

use crate::request::RequestError;
use crate::scheduler::{SlotOp, Step};
use crate::{Stage, StageError, StageInfo, StageInput, StageOutput};

/// Runs steps, on the engine's thread. Arriving results wake the thread through a [`Waker`](crate::Waker).
pub trait Runner: Send {
    /// Shape and limits of the whole model.
    fn info(&self) -> &StageInfo;

    /// True if another step may begin now.
    fn has_room(&self) -> bool;

    /// Begins `step`, leaving an empty one in its place.
    fn begin(&mut self, step: &mut Step, now: Instant);

    /// The next outcome of the steps under way, in the order in which they began; `None` if there is no
    /// outcome yet.
    fn poll(&mut self, now: Instant) -> Option<Outcome<'_>>;

    /// Time of the next poll if nothing wakes the thread before; `None` means no timer.
    fn next_timer(&self) -> Option<Instant>;
}

/// A result of [`Runner::poll`].
#[derive(Debug)]
pub enum Outcome<'a> {
    /// A step is through: its logits, row-major `[step.logit_rows(), vocab]`.
    Logits(&'a Step, &'a [f32]),
    /// A step failed; the others go on.
    Failed(&'a Step, StageError),
    /// All steps under way are void. For each slot, the tokens whose KV rows are there.
    Resumed(Vec<Vec<u32>>),
    /// Nothing more can be run; every request ends with this error.
    Ended(RequestError),
}

/// A stage that holds a whole model, on this machine.
pub(crate) struct Local {
    stage: Box<dyn Stage>,
    step: Step,
    under_way: bool,
}

impl Local {
    pub(crate) fn new(stage: Box<dyn Stage>) -> Self {
        Local {
            stage,
            step: Step::default(),
            under_way: false,
        }
    }
}

impl Runner for Local {
    fn info(&self) -> &StageInfo {
        self.stage.info()
    }

    fn has_room(&self) -> bool {
        !self.under_way
    }

    fn begin(&mut self, step: &mut Step, _: Instant) {
        std::mem::swap(&mut self.step, step);
        self.under_way = true;
    }

    fn poll(&mut self, _: Instant) -> Option<Outcome<'_>> {
        if !std::mem::take(&mut self.under_way) {
            return None;
        }
        let Local { stage, step, .. } = self;
        if let Err(error) = apply(&step.slot_ops, &mut **stage) {
            return Some(Outcome::Failed(step, error));
        }
        let output = stage.forward(&step.segments, StageInput::Tokens(&step.tokens));
        Some(match output {
            Ok(StageOutput::Logits(logits)) => Outcome::Logits(step, logits),
            Ok(StageOutput::Hidden(_)) => {
                let message = "a whole model gave hidden rows instead of logits".to_owned();
                Outcome::Failed(step, StageError::Malformed(message))
            }
            Err(error) => Outcome::Failed(step, error),
        })
    }

    fn next_timer(&self) -> Option<Instant> {
        None
    }
}

/// Applies changes to slots, in order.
pub fn apply(slot_ops: &[SlotOp], stage: &mut dyn Stage) -> Result<(), StageError> {
    for op in slot_ops {
        match *op {
            SlotOp::Truncate { slot, len } => stage.truncate(slot, len),
            SlotOp::CopyPrefix { from, to, len } => stage.copy_prefix(from, to, len)?,
        }
    }
    Ok(())
}
