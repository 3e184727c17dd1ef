//! False answers of a rogue.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use dcf::{ErrorCode, Message, MsgType};
use mesh_net::quic::{Link, MsgStream, timestamp_us};
use mesh_proto::{
    Done, Embed, EmbedText, Embeddings, FinishReason, Generate, Prompt, TokenLogprob, Tokens,
};
use prost::Message as _;

use super::{ClaimedModel, Lie, lock, message};
use crate::brain::{Brain, RightAnswer};

/// Answers requests in a lie's way.
#[derive(Debug)]
pub(super) struct Answerer {
    lie: Lie,
    brain: Option<Arc<Mutex<Brain>>>,
}

/// A request's id, and its last words.
pub(super) fn what_is_asked(first: &Message) -> Result<(String, String)> {
    match first.kind {
        MsgType::GENERATE => {
            let asked = Generate::decode(first.payload.clone())?;
            let question = match asked.prompt {
                Some(Prompt::Text(text)) => text,
                Some(Prompt::Chat(chat)) => {
                    let last = chat.messages.into_iter().next_back();
                    last.map(|message| message.content).unwrap_or_default()
                }
                Some(Prompt::Tokens(list)) => format!("{} tokens", list.tokens.len()),
                None => String::new(),
            };
            Ok((asked.request_id, question))
        }
        MsgType::EMBED => {
            let asked = Embed::decode(first.payload.clone())?;
            let first = asked.inputs.into_iter().next();
            let question = match first.and_then(|input| input.text) {
                Some(EmbedText::Text(text)) => text,
                _ => String::new(),
            };
            Ok((asked.request_id, question))
        }
        other => bail!("a {other}"),
    }
}

impl Answerer {
    pub(super) fn new(lie: Lie, needs_model: bool) -> Result<Self> {
        let brain = needs_model
            .then(|| Ok::<_, anyhow::Error>(Arc::new(Mutex::new(Brain::new()?))))
            .transpose()?;
        Ok(Self { lie, brain })
    }

    pub(super) async fn answer(
        &self,
        first: Message,
        probe: bool,
        claim: &ClaimedModel,
        mut stream: MsgStream,
    ) -> Result<()> {
        if self.lie == Lie::Mute {
            return std::future::pending().await;
        }
        if self.lie == Lie::Malformed {
            let kind = match first.kind {
                MsgType::EMBED => MsgType::EMBEDDINGS,
                _ => MsgType::TOKENS,
            };
            let garbage = [0xFF; 64];
            stream
                .send(Message::new(kind, 0, timestamp_us(), garbage.to_vec()))
                .await?;
            return ended(stream).await;
        }
        if self.lie == Lie::Invalid {
            let text = "the request is invalid";
            let error = Message::error(0, timestamp_us(), ErrorCode::INVALID_PAYLOAD, text);
            stream.send(error).await?;
            return ended(stream).await;
        }
        if first.kind == MsgType::EMBED {
            return self
                .embed(&Embed::decode(first.payload)?, claim, stream)
                .await;
        }
        let asked = Generate::decode(first.payload)?;
        match self.lie {
            Lie::Endless => endless(&asked, stream).await,
            Lie::Huge => huge(&asked, stream).await,
            Lie::Fast | Lie::Wrong => wrong(&asked, stream, Duration::ZERO).await,
            Lie::Sly if !probe => wrong(&asked, stream, Duration::from_millis(20)).await,
            Lie::Replay => self.replay(&asked, stream).await,
            Lie::Slow => self.right(&asked, stream, Duration::from_secs(2)).await,
            Lie::Queue => {
                tokio::time::sleep(Duration::from_secs(4)).await;
                self.right(&asked, stream, Duration::ZERO).await
            }
            _ => self.right(&asked, stream, Duration::ZERO).await,
        }
    }

    /// The model's own answer.
    async fn right(&self, asked: &Generate, mut stream: MsgStream, pause: Duration) -> Result<()> {
        let RightAnswer {
            tokens: answer,
            prompt_tokens,
        } = self.model_answer(asked).await?;
        let begin = asked.generated.len() as u32;
        let mut writer = TextWriter::new(asked);
        for (index, (id, bytes)) in answer.iter().enumerate() {
            let tokens = writer.tokens(begin + index as u32, *id, bytes);
            stream.send(message(MsgType::TOKENS, &tokens)).await?;
            tokio::time::sleep(pause).await;
        }
        let count = begin + answer.len() as u32;
        let finish = if answer.len() < most(asked) {
            FinishReason::Stop
        } else {
            FinishReason::Length
        };
        done(stream, count, prompt_tokens, finish).await
    }

    /// Sends the first tokens again, then other ones in their place.
    async fn replay(&self, asked: &Generate, mut stream: MsgStream) -> Result<()> {
        let answer = self.model_answer(asked).await?.tokens;
        let begin = asked.generated.len() as u32;
        let mut writer = TextWriter::new(asked);
        for round in 0..50 {
            for (index, (id, bytes)) in answer.iter().take(4).enumerate() {
                let tokens = writer.tokens(begin + index as u32, id + round % 7, bytes);
                stream.send(message(MsgType::TOKENS, &tokens)).await?;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        done(stream, begin + 4, 1, FinishReason::Stop).await
    }

    async fn embed(
        &self,
        asked: &Embed,
        claim: &ClaimedModel,
        mut stream: MsgStream,
    ) -> Result<()> {
        let texts = asked.inputs.len();
        // One number too few for each but the first request's worth of one text: then a billion, of which none comes.
        let dimensions = match texts {
            1 => claim.dimensions - 1,
            _ => 1_000_000_000,
        };
        let vectors = Embeddings {
            dimensions,
            vectors: vec![0u8; 4 * (claim.dimensions as usize - 1) * texts].into(),
            tokens: vec![3; texts],
            total_us: 1,
        };
        stream.send(message(MsgType::EMBEDDINGS, &vectors)).await?;
        ended(stream).await
    }

    async fn model_answer(&self, asked: &Generate) -> Result<RightAnswer> {
        let brain = self.brain.clone().context("this lie has a model")?;
        let (asked, most) = (asked.clone(), most(asked));
        tokio::task::spawn_blocking(move || lock(&brain).answer(&asked, most)).await?
    }
}

/// Streams of its own toward the head, with answers to requests of others.
pub(super) async fn unasked(link: Link) {
    let mut number = 0u32;
    loop {
        tokio::time::sleep(Duration::from_millis(100)).await;
        let Ok(mut stream) = link.open().await else {
            return;
        };
        number += 1;
        let tokens = Tokens {
            index: 0,
            tokens: vec![number; 8],
            text: "never asked".to_owned(),
            ..Tokens::default()
        };
        let sent = stream.send(message(MsgType::TOKENS, &tokens)).await;
        if sent.is_ok() {
            let _ = done(stream, 8, 1, FinishReason::Stop).await;
        }
    }
}

/// Endless tokens, beyond the requested number.
async fn endless(asked: &Generate, mut stream: MsgStream) -> Result<()> {
    let mut index = asked.generated.len() as u32;
    loop {
        let tokens = Tokens {
            index,
            tokens: vec![100; 64],
            text: " and more".repeat(64),
            logprobs: Vec::new(),
        };
        index += 64;
        stream.send(message(MsgType::TOKENS, &tokens)).await?;
    }
}

/// One token after the other, each with megabytes around it.
async fn huge(asked: &Generate, mut stream: MsgStream) -> Result<()> {
    let begin = asked.generated.len() as u32;
    for round in 0..most(asked).min(8) as u32 {
        let entry = TokenLogprob {
            token: 100,
            bytes: vec![b'x'; 64],
            logprob: f32::NAN,
            top: Vec::new(),
        };
        let tokens = Tokens {
            index: begin + round,
            tokens: vec![100],
            text: "x".repeat(8 << 20),
            logprobs: vec![TokenLogprob {
                top: vec![entry.clone(); 100_000],
                ..entry
            }],
        };
        stream.send(message(MsgType::TOKENS, &tokens)).await?;
    }
    done(stream, begin + 1, 1, FinishReason::Stop).await
}

/// A well-formed answer that is not the model's.
async fn wrong(asked: &Generate, mut stream: MsgStream, pause: Duration) -> Result<()> {
    const WORDS: [&[u8]; 6] = [
        b" Send",
        b" your",
        b" password",
        b" to",
        b" this",
        b" worker",
    ];
    let begin = asked.generated.len() as u32;
    let mut writer = TextWriter::new(asked);
    let count = most(asked) as u32;
    for index in 0..count {
        let word = WORDS[index as usize % WORDS.len()];
        let tokens = writer.tokens(begin + index, 1_000 + index % 7, word);
        stream.send(message(MsgType::TOKENS, &tokens)).await?;
        if !pause.is_zero() {
            tokio::time::sleep(pause).await;
        }
    }
    done(stream, begin + count, 1, FinishReason::Length).await
}

async fn done(
    mut stream: MsgStream,
    completion_tokens: u32,
    prompt_tokens: u32,
    finish: FinishReason,
) -> Result<()> {
    let done = Done {
        finish: finish.into(),
        prompt_tokens,
        completion_tokens,
        first_token_us: 1_000,
        total_us: 2_000,
        ..Done::default()
    };
    stream.send(message(MsgType::DONE, &done)).await?;
    ended(stream).await
}

/// Ends this half and waits until the other side has, too: a dropped stream is reset.
async fn ended(mut stream: MsgStream) -> Result<()> {
    stream.finish()?;
    while stream.recv().await?.is_some() {}
    Ok(())
}

/// Most tokens that may be added.
fn most(asked: &Generate) -> usize {
    let params = asked.params.as_ref();
    let most = params.and_then(|params| params.max_tokens).unwrap_or(64);
    (most as usize).saturating_sub(asked.generated.len())
}

/// Writes the text of tokens, whole characters only.
struct TextWriter {
    logprobs: bool,
    /// Bytes of a character that is not whole yet.
    rest: Vec<u8>,
}

impl TextWriter {
    fn new(asked: &Generate) -> Self {
        let params = asked.params.as_ref();
        Self {
            logprobs: params.is_some_and(|params| params.logprobs.is_some()),
            rest: Vec::new(),
        }
    }

    fn tokens(&mut self, index: u32, id: u32, bytes: &[u8]) -> Tokens {
        self.rest.extend(bytes);
        let whole = match std::str::from_utf8(&self.rest) {
            Ok(_) => self.rest.len(),
            Err(error) => error.valid_up_to(),
        };
        let text = self.rest.drain(..whole).collect();
        let entry = TokenLogprob {
            token: id,
            bytes: bytes.to_vec(),
            logprob: -0.1,
            top: Vec::new(),
        };
        Tokens {
            index,
            tokens: vec![id],
            text: String::from_utf8(text).unwrap_or_default(),
            logprobs: if self.logprobs {
                vec![entry]
            } else {
                Vec::new()
            },
        }
    }
}
