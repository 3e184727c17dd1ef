//! The check of a stream: re-scoring the whole with a fresh engine finds every greedy token to be the arg max given the
//! tokens before it.
//!
//! The tolerance is 0. It is derived from undisturbed runs: a row's value does not depend on the batch it is computed in, bit
//! for bit, so that an answer which was begun on one worker in a batch of sixteen and ended on another in a batch of three is
//! the answer that one engine gives alone. A gap or a repeated token would make the rest of the stream another text.

use std::collections::HashMap;
use std::fmt;

use anyhow::{Context, Result, bail, ensure};
use mesh_engine::{LogitRows, Segment, Stage, StageInput, StageOutput};
use mesh_engine_ort::{OrtOptions, OrtStage};
use mesh_model::{EncodeOptions, Message, Model};
use mesh_testkit::client::http::AnswerPiece;
use mesh_testkit::paths;

/// A streamed answer with its tokens, in order of arrival.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Transcript {
    /// The text of all pieces.
    pub text: String,
    /// The bytes of each token, from its log probability entry.
    pub tokens: Vec<Vec<u8>>,
    /// Reason for the end: `stop` or `length`; `None` before it.
    pub finish: Option<String>,
    /// Tokens of the prompt, as the mesh counts them.
    pub prompt_tokens: Option<u64>,
    /// Tokens of the answer, as the mesh counts them.
    pub completion_tokens: Option<u64>,
    /// Number of times the mesh reran the request.
    pub reruns: u64,
}

impl Transcript {
    /// Takes the next piece of a stream that was asked for with `"logprobs": true`.
    ///
    /// # Errors
    /// If something comes after the end.
    pub fn take(&mut self, piece: &AnswerPiece) -> Result<()> {
        let logprobs = piece.logprobs.as_ref();
        let entries = logprobs.map_or(&[][..], |logprobs| &logprobs.content);
        if self.finish.is_some() {
            ensure!(
                piece.text.is_empty() && entries.is_empty() && piece.finish_reason.is_none(),
                "the answer went on after its end: {piece:?}"
            );
        }
        self.text += &piece.text;
        let bytes = entries.iter().map(|entry| entry.token.bytes.clone());
        self.tokens.extend(bytes);
        if let Some(reason) = &piece.finish_reason {
            self.finish = Some(reason.clone());
        }
        if let Some(usage) = &piece.usage {
            self.prompt_tokens = Some(u64::from(usage.prompt_tokens));
            self.completion_tokens = Some(u64::from(usage.completion_tokens));
        }
        if let Some(timings) = &piece.timings {
            self.reruns = u64::from(timings.reruns);
        }
        Ok(())
    }
}

/// A fresh engine that no worker has touched.
pub struct Judge {
    model: Model,
    stage: OrtStage,
    ids: HashMap<Vec<u8>, u32>,
}

impl fmt::Debug for Judge {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Judge")
            .field("model", &self.model.name())
            .finish_non_exhaustive()
    }
}

/// SmolLM2 with all of its layers, for one sequence.
pub(crate) fn smollm2() -> Result<(Model, OrtStage)> {
    let model = Model::open(paths::smollm2()?)?;
    let options = OrtOptions {
        library: Some(paths::ort_library()?),
        slots: 1,
        ..OrtOptions::default()
    };
    let stage = OrtStage::load(&model, 0..model.config().layers, options)?;
    Ok((model, stage))
}

impl Judge {
    /// Loads SmolLM2.
    ///
    /// # Errors
    /// If it was not fetched.
    pub fn new() -> Result<Self> {
        let (model, stage) = smollm2()?;
        let tokenizer = model.tokenizer();
        let mut ids = HashMap::new();
        for id in 0..tokenizer.vocab_size() as u32 {
            if !tokenizer.is_special(id) {
                ids.entry(tokenizer.token_bytes(id).to_vec()).or_insert(id);
            }
        }
        Ok(Self { model, stage, ids })
    }

    /// Checks a greedy answer to one user message.
    ///
    /// # Errors
    /// Names the first token that is not the one the model gives there.
    pub fn check(&mut self, question: &str, answer: &Transcript) -> Result<()> {
        let model = self.model.clone();
        let tokenizer = model.tokenizer();
        let rendered = model
            .template()
            .render(&[Message::new("user", question)], true)?;
        let prompt = tokenizer.encode(&rendered, EncodeOptions::RENDERED_CHAT)?;
        ensure!(
            answer.prompt_tokens == Some(prompt.len() as u64),
            "the mesh counts {:?} prompt tokens, there are {}",
            answer.prompt_tokens,
            prompt.len()
        );

        // The token that ends an answer has no text; it may be reported all the same.
        let mut pieces = answer.tokens.as_slice();
        if answer.finish.as_deref() == Some("stop")
            && let Some((last, rest)) = pieces.split_last()
            && tokenizer
                .eos_ids()
                .iter()
                .any(|&id| tokenizer.token_bytes(id) == last || last.is_empty())
        {
            pieces = rest;
        }
        let bytes = pieces.concat();
        ensure!(
            String::from_utf8_lossy(&bytes) == answer.text,
            "the text is not that of its tokens: {:?} of {:?}",
            answer.text,
            String::from_utf8_lossy(&bytes)
        );
        let tokens: Vec<u32> = pieces
            .iter()
            .map(|piece| {
                self.ids
                    .get(piece)
                    .copied()
                    .with_context(|| format!("no token has the bytes {piece:?}"))
            })
            .collect::<Result<_>>()?;

        let best = self.arg_max_after_each(&prompt, &tokens)?;
        for (index, token) in tokens.iter().enumerate() {
            ensure!(
                best[index] == *token,
                "token {index} is {token} ({:?}), the model gives {} ({:?}) after {:?}",
                String::from_utf8_lossy(tokenizer.token_bytes(*token)),
                best[index],
                String::from_utf8_lossy(tokenizer.token_bytes(best[index])),
                String::from_utf8_lossy(&pieces[..index].concat())
            );
        }
        let next = best[tokens.len()];
        match answer.finish.as_deref() {
            Some("stop") => ensure!(
                tokenizer.eos_ids().contains(&next),
                "the answer stops, but the model goes on with {next}"
            ),
            Some("length") => {}
            other => bail!("the answer ended with {other:?}"),
        }
        Ok(())
    }

    /// The likeliest token after the prompt, and after each of `tokens`.
    fn arg_max_after_each(&mut self, prompt: &[u32], tokens: &[u32]) -> Result<Vec<u32>> {
        self.stage.truncate(0, 0);
        let vocab = self.stage.info().shape.vocab;
        let max_rows = self.stage.info().max_rows as usize;
        let (last, head) = prompt.split_last().context("a prompt has tokens")?;
        let mut position = 0;
        for chunk in head.chunks(max_rows) {
            let segment = segment(position, chunk.len(), LogitRows::None);
            self.stage.forward(&[segment], StageInput::Tokens(chunk))?;
            position += chunk.len();
        }
        let scored: Vec<u32> = std::iter::once(last).chain(tokens).copied().collect();
        let mut best = Vec::with_capacity(scored.len());
        for chunk in scored.chunks(max_rows) {
            let segment = segment(position, chunk.len(), LogitRows::All);
            match self.stage.forward(&[segment], StageInput::Tokens(chunk))? {
                StageOutput::Logits(rows) => best.extend(rows.chunks_exact(vocab).map(arg_max)),
                StageOutput::Hidden(_) => bail!("a whole model gives logits"),
            }
            position += chunk.len();
        }
        Ok(best)
    }
}

fn segment(position: usize, rows: usize, logits: LogitRows) -> Segment {
    Segment {
        slot: 0,
        position: position as u32,
        rows: rows as u32,
        logits,
    }
}

/// The largest logit, the lowest id among equals: greedy sampling.
pub(crate) fn arg_max(row: &[f32]) -> u32 {
    let mut best = 0;
    for (index, value) in row.iter().enumerate() {
        if *value > row[best] {
            best = index;
        }
    }
    best as u32
}
