//! Embedding: the workload of encoders.

use std::time::Instant;

use super::scheduler::{Batch, Embedded, Scheduler};
use super::{EmbedRequest, Encoder, EncoderInfo};
use crate::RequestError;
use crate::workload::{StepOutcome, Workload};

/// An encoder and its scheduler.
pub struct Embedding {
    encoder: Box<dyn Encoder>,
    scheduler: Scheduler,
    /// The next batch to compute.
    batch: Option<Batch>,
}

impl Embedding {
    /// The workload of `encoder`, for which so many requests may wait.
    pub fn new(encoder: Box<dyn Encoder>, queue_limit: usize) -> Self {
        Embedding {
            scheduler: Scheduler::new(encoder.info().clone(), queue_limit),
            encoder,
            batch: None,
        }
    }
}

impl Workload for Embedding {
    type Request = EmbedRequest;
    type Event = Embedded;
    type Info = EncoderInfo;
    type Scheduler = Scheduler;

    const STEPS: &'static str = "batches";
    const LONG_STEPS: bool = true;

    fn info(&self) -> &EncoderInfo {
        self.encoder.info()
    }

    fn scheduler(&mut self) -> &mut Scheduler {
        &mut self.scheduler
    }

    fn begin(&mut self, now: Instant) -> bool {
        if self.batch.is_some() {
            return false;
        }
        self.batch = self.scheduler.plan(now);
        self.batch.is_some()
    }

    fn poll(&mut self, now: Instant) -> StepOutcome {
        let Some(batch) = self.batch.take() else {
            return StepOutcome::Pending;
        };
        let sequences: Vec<&[u32]> = batch.parts.iter().map(|(_, _, s)| s.as_slice()).collect();
        match self.encoder.encode(&sequences) {
            Ok(vectors) => {
                self.scheduler.complete(&batch, &vectors, now.elapsed());
                StepOutcome::Completed
            }
            Err(error) => {
                self.scheduler.fail(&batch, &error);
                let rows = batch.rows();
                StepOutcome::Failed { rows, error }
            }
        }
    }

    fn is_last(_: &Self::Event) -> bool {
        true
    }

    fn failed(error: RequestError) -> Self::Event {
        Err(error)
    }
}
