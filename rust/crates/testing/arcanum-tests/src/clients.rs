//! Clients of a mesh: their questions, the answers, and the times.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use mesh_api::{ChatCompletionRequest, GenerationOptions};
use mesh_testkit::client::http::HttpClient;
use tokio::task::JoinHandle;

use crate::rescore::Transcript;

/// A question with all parameters that decide the answer.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ChatQuestion {
    /// Text of the user's message.
    pub question: String,
    /// Tokens of the answer.
    pub tokens: u32,
    /// Sampled with this seed at temperature 0.8; `None` is greedy.
    pub seed: Option<u64>,
    /// Ends where the model ends; otherwise the answer has exactly `tokens` tokens.
    pub may_stop: bool,
    /// Name of the model; `None` is the mesh's first model.
    pub model: Option<String>,
    /// JSON Schema that the answer follows.
    pub schema: Option<String>,
}

impl ChatQuestion {
    /// Asks for a greedy answer of exactly `tokens` tokens.
    pub fn greedy(question: impl Into<String>, tokens: u32) -> Self {
        Self {
            question: question.into(),
            tokens,
            seed: None,
            may_stop: false,
            model: None,
            schema: None,
        }
    }

    /// Asks for a sampled answer of exactly `tokens` tokens.
    pub fn sampled(question: impl Into<String>, tokens: u32, seed: u64) -> Self {
        Self {
            seed: Some(seed),
            ..Self::greedy(question, tokens)
        }
    }

    /// The answer ends where the model ends it.
    #[must_use]
    pub fn until_it_ends(self) -> Self {
        Self {
            may_stop: true,
            ..self
        }
    }

    /// The answer follows a JSON Schema, and ends with it.
    #[must_use]
    pub fn following(self, schema: &str) -> Self {
        Self {
            schema: Some(schema.to_owned()),
            ..self.until_it_ends()
        }
    }

    /// Asks `model` instead of the mesh's first one.
    #[must_use]
    pub fn of(self, model: &str) -> Self {
        Self {
            model: Some(model.to_owned()),
            ..self
        }
    }

    fn request(&self, model: &str) -> ChatCompletionRequest {
        let options = GenerationOptions {
            model: Some(model.to_owned()),
            max_tokens: Some(self.tokens.into()),
            temperature: Some(if self.seed.is_some() { 0.8 } else { 0.0 }),
            seed: self.seed,
            ignore_eos: Some(!self.may_stop),
            json_schema: self.schema.clone().map(Into::into),
            ..GenerationOptions::default()
        };
        ChatCompletionRequest {
            logprobs: Some(true),
            ..ChatCompletionRequest::question(&self.question, options)
        }
    }

    /// Asks and follows the stream to its end.
    ///
    /// # Errors
    /// If the mesh refuses, or if the stream breaks off or has an error in it.
    pub async fn ask(&self, client: &HttpClient) -> Result<StreamedAnswer> {
        self.follow(client, &AtomicUsize::new(0)).await
    }

    /// As [`ChatQuestion::ask`]; adds to `arrived` as tokens come.
    async fn follow(&self, client: &HttpClient, arrived: &AtomicUsize) -> Result<StreamedAnswer> {
        let model = match &self.model {
            Some(model) => model.clone(),
            None => first_model(client).await?,
        };
        let asked = Instant::now();
        let mut stream = client.stream(self.request(&model)).await?;
        let mut answer = StreamedAnswer::new(asked);
        loop {
            let piece = stream
                .next()
                .await
                .with_context(|| format!("after {} tokens", answer.transcript.tokens.len()))?;
            let Some(piece) = piece else { break };
            let before = answer.transcript.tokens.len();
            answer.transcript.take(&piece)?;
            let new = answer.transcript.tokens.len() - before;
            let now = Instant::now();
            answer.arrivals.extend(std::iter::repeat_n(now, new));
            arrived.fetch_add(new, Ordering::Relaxed);
        }
        answer.check(self)?;
        Ok(answer)
    }
}

/// The name of the mesh's first model.
///
/// # Errors
/// If the head does not answer or serves no model.
pub async fn first_model(client: &HttpClient) -> Result<String> {
    let models = client.models().await?;
    models.into_iter().next().context("the mesh has no model")
}

/// Asks a model for exactly `tokens` tokens, the likeliest ones.
pub fn greedy(model: &str, tokens: u32) -> GenerationOptions {
    GenerationOptions {
        model: Some(model.to_owned()),
        max_tokens: Some(tokens.into()),
        temperature: Some(0.0),
        ignore_eos: Some(true),
        ..GenerationOptions::default()
    }
}

/// A streamed answer, with the time at which each token came.
#[derive(Debug, Clone)]
pub struct StreamedAnswer {
    /// The received text and tokens.
    pub transcript: Transcript,
    /// Time of the request.
    pub asked: Instant,
    /// Arrival time of each token.
    pub arrivals: Vec<Instant>,
}

impl StreamedAnswer {
    fn new(asked: Instant) -> Self {
        Self {
            transcript: Transcript::default(),
            asked,
            arrivals: Vec::new(),
        }
    }

    /// Checks the invariants of every answer: it has an end, and as many tokens as the mesh reports and the
    /// client asked for.
    fn check(&self, ask: &ChatQuestion) -> Result<()> {
        let came = self.transcript.tokens.len() as u64;
        ensure!(
            self.transcript.finish.is_some(),
            "the answer has no end after {came} tokens"
        );
        let counted = self.transcript.completion_tokens.context("no usage")?;
        // The token that ends an answer has no text and may be left out.
        ensure!(
            came == counted || (ask.may_stop && came + 1 == counted),
            "{came} tokens came, the mesh counts {counted}"
        );
        ensure!(
            ask.may_stop || came == u64::from(ask.tokens),
            "{came} tokens came, {} were asked for",
            ask.tokens
        );
        Ok(())
    }

    /// The longest pause between two tokens.
    pub fn longest_gap(&self) -> Duration {
        let pauses = self.arrivals.windows(2).map(|pair| pair[1] - pair[0]);
        pauses.max().unwrap_or_default()
    }

    /// The longest pause that ended after `moment`, as the client noticed it. `None` if no token came after
    /// it.
    pub fn gap_after(&self, moment: Instant) -> Option<Duration> {
        let pauses = self.arrivals.windows(2);
        let after = pauses.filter(|pair| pair[1] >= moment);
        after.map(|pair| pair[1] - pair[0]).max()
    }

    /// Tokens per second after the first.
    pub fn decode_rate(&self) -> f64 {
        let (Some(first), Some(last)) = (self.arrivals.first(), self.arrivals.last()) else {
            return 0.0;
        };
        (self.arrivals.len() - 1) as f64 / (*last - *first).as_secs_f64()
    }
}

/// Streamed answers in progress.
#[derive(Debug)]
pub struct RunningStreams {
    tasks: Vec<JoinHandle<Result<StreamedAnswer>>>,
    arrived: Arc<AtomicUsize>,
}

impl RunningStreams {
    /// Asks all of `asks` at once.
    pub fn start(client: &HttpClient, asks: &[ChatQuestion]) -> Self {
        let arrived = Arc::new(AtomicUsize::new(0));
        let tasks = asks.iter().cloned().map(|ask| {
            let (client, arrived) = (client.clone(), Arc::clone(&arrived));
            tokio::spawn(async move { ask.follow(&client, &arrived).await })
        });
        Self {
            tasks: tasks.collect(),
            arrived,
        }
    }

    /// Tokens that came so far, over all answers.
    pub fn arrived(&self) -> usize {
        self.arrived.load(Ordering::Relaxed)
    }

    /// Waits until `wanted` tokens came, over all answers.
    ///
    /// # Errors
    /// If they do not within 2 minutes, or if all answers end before.
    pub async fn wait_for_tokens(&self, wanted: usize) -> Result<()> {
        let started = Instant::now();
        while self.arrived() < wanted {
            ensure!(
                started.elapsed() < ANSWER_LIMIT,
                "{} tokens came within {ANSWER_LIMIT:?}, not {wanted}",
                self.arrived()
            );
            ensure!(
                !self.tasks.iter().all(JoinHandle::is_finished) || self.arrived() >= wanted,
                "all answers ended after {} tokens, {wanted} were waited for",
                self.arrived()
            );
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        Ok(())
    }

    /// Waits for all answers, in the order of the questions, each with its outcome.
    ///
    /// # Errors
    /// If one does not end within 2 minutes.
    pub async fn outcomes(mut self) -> Result<Vec<Result<StreamedAnswer>>> {
        let deadline = tokio::time::Instant::now() + ANSWER_LIMIT;
        let mut outcomes = Vec::new();
        for (index, task) in self.tasks.iter_mut().enumerate() {
            let joined = tokio::time::timeout_at(deadline, task).await;
            let joined = joined
                .with_context(|| format!("answer {index} does not end within {ANSWER_LIMIT:?}"))?;
            outcomes.push(joined.context("a client panicked")?);
        }
        Ok(outcomes)
    }

    /// As [`RunningStreams::outcomes`], where none may fail.
    ///
    /// # Errors
    /// If one failed.
    pub async fn answers(self) -> Result<Vec<StreamedAnswer>> {
        let outcomes = self.outcomes().await?.into_iter().enumerate();
        outcomes
            .map(|(index, outcome)| outcome.with_context(|| format!("answer {index}")))
            .collect()
    }
}

impl Drop for RunningStreams {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

/// Fails unless both have the same tokens, the same text and the same end; names the first difference.
///
/// # Errors
/// If they differ.
pub fn assert_same_tokens(expected: &Transcript, found: &Transcript) -> Result<()> {
    let pairs = expected.tokens.iter().zip(&found.tokens);
    if let Some((index, (expected, found))) = pairs
        .enumerate()
        .find(|(_, (expected, found))| expected != found)
    {
        anyhow::bail!(
            "token {index} is {:?}, undisturbed it is {:?}",
            String::from_utf8_lossy(found),
            String::from_utf8_lossy(expected)
        );
    }
    ensure!(
        expected.tokens.len() == found.tokens.len(),
        "{} tokens, undisturbed there are {}",
        found.tokens.len(),
        expected.tokens.len()
    );
    ensure!(
        expected.text == found.text && expected.finish == found.finish,
        "the same tokens, but {:?} ({:?}) instead of {:?} ({:?})",
        found.text,
        found.finish,
        expected.text,
        expected.finish
    );
    Ok(())
}

/// Questions of all sorts, always the same one for the same number.
pub fn question(number: usize) -> String {
    const TOPICS: [&str; 10] = [
        "rivers", "bridges", "the moon", "bread", "clocks", "whales", "glass", "chess", "rain",
        "maps",
    ];
    const FORMS: [&str; 10] = [
        "Tell me about {}.",
        "Write one sentence on {}.",
        "Why do people like {}?",
        "What would a child ask about {}?",
        "Explain {} to a friend.",
        "Who knows most about {}?",
        "Give me a short poem about {}.",
        "When did people first think of {}?",
        "List three facts about {}.",
        "What is hard about {}?",
    ];
    FORMS[number / 10 % 10].replace("{}", TOPICS[number % 10])
}

/// A question of about `tokens` tokens.
pub fn long_question(number: usize, tokens: usize) -> String {
    let mut text = String::from("Here are some notes. ");
    // Each note is about ten tokens.
    for note in 0..tokens / 10 {
        text += &format!("Note {note}: {} ", question(number + note * 7));
    }
    text + &question(number)
}

/// Longest time for an answer, on a busy machine and with failures.
pub const ANSWER_LIMIT: Duration = Duration::from_secs(120);

#[cfg(test)]
mod tests {
    use super::*;

    fn transcript(tokens: &[&str]) -> Transcript {
        Transcript {
            text: tokens.concat(),
            tokens: tokens
                .iter()
                .map(|token| token.as_bytes().to_vec())
                .collect(),
            finish: Some("length".into()),
            ..Transcript::default()
        }
    }

    #[test]
    fn a_lost_a_doubled_and_another_token_are_found() {
        let whole = transcript(&["a", "b", "c"]);
        assert!(assert_same_tokens(&whole, &whole).is_ok());
        for other in [&["a", "c"][..], &["a", "b", "b", "c"], &["a", "b"]] {
            assert!(assert_same_tokens(&whole, &transcript(other)).is_err());
        }
    }

    #[test]
    fn the_gap_after_a_moment_is_the_longest_pause_that_ended_after_it() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let answer = StreamedAnswer {
            arrivals: vec![at(0), at(500), at(510), at(810), at(820)],
            ..StreamedAnswer::new(start)
        };
        let gap = |ms| answer.gap_after(at(ms)).map(|gap| gap.as_millis());
        assert_eq!(
            [gap(505), gap(600), gap(815), gap(900)],
            [Some(300), Some(300), Some(10), None]
        );
        assert_eq!(answer.longest_gap().as_millis(), 500);
    }
}
