//! The right answers, from a model of its own: a hostile worker needs them wherever only one thing about it may be a lie.

use std::fmt;

use anyhow::{Context, Result, bail, ensure};
use mesh_engine::{LogitRows, Segment, Stage, StageInput, StageOutput};
use mesh_engine_ort::OrtStage;
use mesh_model::{EncodeOptions, Message, Model};
use mesh_proto::{Generate, Prompt};

use crate::rescore::{arg_max, smollm2};

/// SmolLM2, one answer at a time, greedy.
pub struct Brain {
    model: Model,
    stage: OrtStage,
}

/// The model's own answer, token by token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RightAnswer {
    /// Id and bytes of each token.
    pub tokens: Vec<(u32, Vec<u8>)>,
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
}

impl fmt::Debug for Brain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Brain")
            .field("model", &self.model.name())
            .finish_non_exhaustive()
    }
}

impl Brain {
    /// Loads the model.
    ///
    /// # Errors
    /// If it was not fetched.
    pub fn new() -> Result<Self> {
        let (model, stage) = smollm2()?;
        Ok(Self { model, stage })
    }

    /// The greedy answer to a request, without the tokens in [`Generate::generated`].
    ///
    /// # Errors
    /// If the prompt cannot be read, or is longer than 1,024 tokens.
    pub fn answer(&mut self, asked: &Generate, most: usize) -> Result<RightAnswer> {
        let model = self.model.clone();
        let tokenizer = model.tokenizer();
        let prompt = self.prompt(asked)?;
        ensure!(prompt.len() <= LONGEST, "{} tokens", prompt.len());
        let max_rows = self.stage.info().max_rows as usize;
        let ignores_end = asked
            .params
            .as_ref()
            .is_some_and(|params| params.ignore_eos);
        let mut rows = [prompt.as_slice(), &asked.generated].concat();
        let mut position = 0;
        let mut answer = Vec::new();
        self.stage.truncate(0, 0);
        while answer.len() < most {
            let mut best = None;
            let chunks = rows.len().div_ceil(max_rows);
            for (index, chunk) in rows.chunks(max_rows).enumerate() {
                let last = index + 1 == chunks;
                let segment = Segment {
                    slot: 0,
                    position,
                    rows: chunk.len() as u32,
                    logits: if last {
                        LogitRows::Last
                    } else {
                        LogitRows::None
                    },
                };
                let output = self.stage.forward(&[segment], StageInput::Tokens(chunk))?;
                position += chunk.len() as u32;
                if last {
                    let StageOutput::Logits(logits) = output else {
                        bail!("a whole model gives logits");
                    };
                    best = (!logits.is_empty()).then(|| arg_max(logits));
                }
            }
            let next = best.context("a prompt has tokens")?;
            if tokenizer.eos_ids().contains(&next) && !ignores_end {
                break;
            }
            answer.push((next, tokenizer.token_bytes(next).to_vec()));
            rows = vec![next];
        }
        Ok(RightAnswer {
            tokens: answer,
            prompt_tokens: prompt.len() as u32,
        })
    }

    fn prompt(&self, asked: &Generate) -> Result<Vec<u32>> {
        let tokenizer = self.model.tokenizer();
        Ok(match asked.prompt.as_ref().context("no prompt")? {
            Prompt::Text(text) => tokenizer.encode(text, EncodeOptions::RAW_PROMPT)?,
            Prompt::Tokens(list) => list.tokens.clone(),
            Prompt::Chat(chat) => {
                let messages = chat.messages.iter();
                let messages: Vec<Message> = messages
                    .map(|message| Message::new(&message.role, &message.content))
                    .collect();
                let rendered = self.model.template().render(&messages, true)?;
                tokenizer.encode(&rendered, EncodeOptions::RENDERED_CHAT)?
            }
        })
    }
}

/// The longest prompt that it reads: beyond that it only takes time.
const LONGEST: usize = 1_024;
