//! Embeddings: from an Embed message to an engine's request, and from its vectors to Embeddings.

pub(crate) mod load;

use std::sync::Arc;
use std::time::Instant;

use bytes::{BufMut, BytesMut};
use dcf::MsgType;
use mesh_engine::embed::scheduler::Embedded;
use mesh_engine::embed::shorten;
use mesh_engine::{EmbedRequest, Embedding, EncoderInfo, RequestError};
use mesh_model::EncoderModel;
use mesh_proto::{Embed, EmbedText, Embeddings};
use prost::Message as _;

use crate::codec::{Bodies, Codec, ModelEngine, PrepareError, TaskHeader, deadline};
use crate::config::SamplingDefaults;
use crate::templates::Templates;

/// What Embeddings need besides the vectors.
pub(crate) struct Reply {
    dimensions: usize,
    tokens: Vec<u32>,
    arrived: Instant,
}

impl Codec for Embedding {
    const TASK: MsgType = MsgType::EMBED;
    const MODEL: &'static str = "an embedding model";

    type Task = Embed;
    type Model = Arc<EncoderModel>;
    type Written = Embed;
    type Reply = Reply;

    fn header(embed: &Embed) -> TaskHeader<'_> {
        TaskHeader {
            id: &embed.request_id,
            model: &embed.model,
            progress_ms: embed.progress_ms,
        }
    }

    fn check(model: &ModelEngine<Self>, embed: &Embed) -> Result<(), PrepareError> {
        let (asked, there) = (embed.dimensions, model.engine.info().dimensions);
        let texts = embed.inputs.len();
        let fault = if asked as usize > there {
            format!("dimensions is {asked}, but the model's vectors have {there} numbers")
        } else if texts == 0 {
            "no texts were given".to_owned()
        } else if texts > MOST_TEXTS {
            format!("{texts} texts are more than the limit of {MOST_TEXTS}")
        } else {
            return Ok(());
        };
        Err(PrepareError::Invalid(fault))
    }

    fn bytes(embed: &Embed) -> usize {
        let bytes = embed.inputs.iter().map(|input| match &input.text {
            Some(EmbedText::Text(text)) => text.len(),
            Some(EmbedText::Tokens(list)) => list.tokens.len() * size_of::<u32>(),
            None => 0,
        });
        bytes.sum()
    }

    async fn write(
        _: &ModelEngine<Self>,
        _: &Templates,
        embed: Embed,
    ) -> Result<Embed, PrepareError> {
        Ok(embed)
    }

    fn request(
        model: &ModelEngine<Self>,
        _: &SamplingDefaults,
        embed: Embed,
        arrived: Instant,
    ) -> Result<(EmbedRequest, Reply), PrepareError> {
        let sequences = tokenise(&model.model, &embed)?;
        let reply = Reply {
            dimensions: match embed.dimensions {
                0 => model.engine.info().dimensions,
                dimensions => dimensions as usize,
            },
            tokens: sequences.iter().map(|s| s.len() as u32).collect(),
            arrived,
        };
        let request = EmbedRequest {
            id: embed.request_id,
            sequences,
            deadline: deadline(arrived, embed.deadline_ms),
        };
        Ok((request, reply))
    }

    async fn encode(reply: &Reply, event: Embedded) -> Result<Bodies, RequestError> {
        let embedded = event?;
        let dimensions = reply.dimensions;
        let mut vectors = BytesMut::with_capacity(embedded.len() * dimensions * 4);
        for mut vector in embedded {
            shorten(&mut vector, dimensions);
            vector.iter().for_each(|&x| vectors.put_f32_le(x));
        }
        let body = Embeddings {
            dimensions: u32::try_from(dimensions).unwrap_or(u32::MAX),
            vectors: vectors.freeze(),
            tokens: reply.tokens.clone(),
            total_us: u64::try_from(reply.arrived.elapsed().as_micros()).unwrap_or(u64::MAX),
        };
        Ok(vec![(MsgType::EMBEDDINGS, body.encode_to_vec())])
    }

    fn max_rows(info: &EncoderInfo) -> usize {
        info.max_rows
    }
}

fn tokenise(model: &EncoderModel, embed: &Embed) -> Result<Vec<Vec<u32>>, PrepareError> {
    let prompt = (!embed.prompt_name.is_empty()).then_some(embed.prompt_name.as_str());
    let inputs = embed.inputs.iter().enumerate();
    inputs
        .map(|(index, input)| {
            let tokenised = match &input.text {
                Some(EmbedText::Text(text)) => model.tokenise(text, prompt),
                Some(EmbedText::Tokens(list)) => model.wrap_tokens(&list.tokens),
                None => model.tokenise("", prompt),
            };
            tokenised
                .map(|tokenised| tokenised.tokens)
                .map_err(|error| PrepareError::Invalid(format!("text {index}: {error}")))
        })
        .collect()
}

/// Texts of one Embed; heads cut larger requests.
const MOST_TEXTS: usize = 2048;
