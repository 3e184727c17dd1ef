//! Answers without failures: those of one worker that has the whole model.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use anyhow::Result;

use crate::clients::{ChatQuestion, RunningStreams, StreamedAnswer, assert_same_tokens};
use crate::cluster::Cluster;
use crate::rescore::Transcript;

/// Answers without failures, by question; asks a worker of its own for those it does not know yet.
#[derive(Debug, Default)]
pub struct Undisturbed {
    known: HashMap<ChatQuestion, Transcript>,
}

impl Undisturbed {
    /// A collection without answers.
    pub fn new() -> Self {
        Self::default()
    }

    /// Learns the answers to all of `asks`, from a worker that runs only for this, or that ran in this process before.
    ///
    /// # Errors
    /// If it cannot be started, or does not answer.
    pub async fn learn(&mut self, asks: &[ChatQuestion]) -> Result<()> {
        let mut new: Vec<ChatQuestion> = Vec::new();
        for ask in asks.iter().map(plain) {
            if self.known.contains_key(&ask) || new.contains(&ask) {
                continue;
            }
            match learned(|learned| learned.get(&ask).cloned()) {
                Some(answer) => _ = self.known.insert(ask, answer),
                None => new.push(ask),
            }
        }
        if new.is_empty() {
            return Ok(());
        }
        let mut cluster = Cluster::builder().whole(1).threads(2).start().await?;
        cluster.mesh.wait_for_workers(1).await?;
        for asks in new.chunks(8) {
            let answers = RunningStreams::start(&cluster.client()?, asks)
                .answers()
                .await?;
            let answers = answers.into_iter().map(|answer| answer.transcript);
            self.known.extend(asks.iter().cloned().zip(answers));
        }
        let known = new.iter().map(|ask| (ask.clone(), self.known[ask].clone()));
        learned(|learned| learned.extend(known));
        Ok(())
    }

    /// Fails unless `answer` is the undisturbed answer to `ask`, token by token.
    ///
    /// # Errors
    /// Names the first difference.
    ///
    /// # Panics
    /// If the answer was not learned before.
    pub fn check(&self, ask: &ChatQuestion, answer: &StreamedAnswer) -> Result<()> {
        let known = self.known.get(&plain(ask));
        let known = known.expect("learned before: a test's own mistake");
        assert_same_tokens(known, &answer.transcript)
    }

    /// As [`Undisturbed::check`], for several.
    ///
    /// # Errors
    /// Names the first question with another answer.
    pub fn check_all(&self, asks: &[ChatQuestion], answers: &[StreamedAnswer]) -> Result<()> {
        anyhow::ensure!(
            asks.len() == answers.len(),
            "{} answers to {} questions",
            answers.len(),
            asks.len()
        );
        for (ask, answer) in asks.iter().zip(answers) {
            self.check(ask, answer)
                .map_err(|error| error.context(format!("{:?}", ask.question)))?;
        }
        Ok(())
    }
}

/// The answers that this process has learned.
fn learned<T>(look: impl FnOnce(&mut HashMap<ChatQuestion, Transcript>) -> T) -> T {
    static LEARNED: Mutex<Option<HashMap<ChatQuestion, Transcript>>> = Mutex::new(None);
    let mut learned = LEARNED.lock().unwrap_or_else(PoisonError::into_inner);
    look(learned.get_or_insert_default())
}

/// The question without the model's name: all names stand for the same model.
fn plain(ask: &ChatQuestion) -> ChatQuestion {
    ChatQuestion {
        model: None,
        ..ask.clone()
    }
}
