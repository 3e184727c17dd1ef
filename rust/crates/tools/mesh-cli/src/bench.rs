//! `hydramesh bench`: an engine in this process, or a running mesh over HTTP.

use std::path::Path;
use std::time::{Duration, Instant};

use mesh_api::{CompletionRequest, GenerationOptions};
use mesh_client::http::HttpClient;
use mesh_engine::{LogitRows, Segment, Stage, StageError, StageInput, StageOutput};
use mesh_engine_ort::{OrtOptions, OrtStage};
use mesh_model::Model;
use serde_json::json;

use crate::args::{BenchArgs, HeadArgs};
use crate::ask::{http_client, name_the_model};
use crate::failure::Failure;
use crate::output::{Stats, Timer, duration};

pub(crate) async fn run(head: &HeadArgs, args: BenchArgs) -> Result<(), Failure> {
    let measured = match args.file.clone() {
        Some(file) => {
            let args = args.clone();
            let work = tokio::task::spawn_blocking(move || engine(&file, &args));
            work.await.map_err(failed)??
        }
        None => mesh(head, &args).await?,
    };
    if args.json {
        let object = json!({
            "what": measured.what,
            "prompt_tokens": args.prompt_tokens,
            "tokens": args.tokens,
            "concurrency": args.concurrency,
            "prefill_tokens_per_second": measured.prefill,
            "decode_tokens_per_second": measured.decode,
            "first_token_ms": measured.first_token.as_secs_f64() * 1e3,
        });
        println!("{object}");
    } else {
        println!("{}", measured.what);
        println!(
            "{} at once, {} tokens of prompt, {} of answer, best of {}",
            args.concurrency, args.prompt_tokens, args.tokens, args.rounds
        );
        if let Some(prefill) = measured.prefill {
            println!("prefill      {prefill:>8.1} tokens per second");
        }
        println!("decode       {:>8.1} tokens per second", measured.decode);
        println!("first token  {:>8}", duration(measured.first_token));
    }
    Ok(())
}

fn failed(error: impl std::error::Error) -> Failure {
    Failure::failed(error.to_string())
}

struct Measured {
    what: String,
    /// Prefill speed over all answers, tokens per second.
    prefill: Option<f64>,
    /// Decode speed over all answers, tokens per second.
    decode: f64,
    /// The slowest of the answers at once.
    first_token: Duration,
}

fn engine(file: &Path, args: &BenchArgs) -> Result<Measured, Failure> {
    let model = Model::open(file).map_err(failed)?;
    let config = model.config();
    if u64::from(args.prompt_tokens) + u64::from(args.tokens) > u64::from(config.context) {
        return Err(Failure::usage(format!(
            "{} tokens of prompt and {} of answer do not fit the model's context of {}",
            args.prompt_tokens, args.tokens, config.context
        )));
    }
    let options = OrtOptions {
        library: args.runtime.clone(),
        threads: args.threads.unwrap_or(0),
        slots: args.concurrency,
        ..OrtOptions::default()
    };
    let started = Instant::now();
    let mut stage = OrtStage::load(&model, 0..config.layers, options).map_err(|error| {
        failed(error).hint("`make fetch` brings ONNX Runtime; set ORT_DYLIB_PATH to it.")
    })?;
    let loaded = duration(started.elapsed());
    // The same for every run, spread over the vocabulary, no special tokens.
    let vocab = config.vocab as u64;
    let prompt: Vec<u32> = (0..u64::from(args.prompt_tokens))
        .map(|i| (i * 7_919 % (vocab / 2) + vocab / 4) as u32)
        .collect();
    let (mut prefill, mut decode) = (Duration::MAX, Duration::MAX);
    for _ in 0..args.rounds {
        let round = one_round(&mut stage, &prompt, args).map_err(failed)?;
        prefill = prefill.min(round.0);
        decode = decode.min(round.1);
    }
    let per_second = |tokens: u32, time: Duration| {
        f64::from(tokens) * f64::from(args.concurrency) / time.as_secs_f64()
    };
    Ok(Measured {
        what: format!("{} in this process, loaded in {loaded}", model.name()),
        prefill: Some(per_second(args.prompt_tokens, prefill)),
        decode: per_second(args.tokens - 1, decode),
        first_token: prefill,
    })
}

/// Times to prefill all prompts and to decode all tokens after the first.
fn one_round(
    stage: &mut OrtStage,
    prompt: &[u32],
    args: &BenchArgs,
) -> Result<(Duration, Duration), StageError> {
    let max_rows = stage.info().max_rows as usize;
    let vocab = stage.info().shape.vocab;
    let mut last = Vec::new();
    let started = Instant::now();
    for slot in 0..args.concurrency {
        stage.truncate(slot, 0);
        let mut position = 0;
        for chunk in prompt.chunks(max_rows) {
            let rows = chunk.len() as u32;
            let ends = position + rows == args.prompt_tokens;
            let logits = match ends {
                true => LogitRows::Last,
                false => LogitRows::None,
            };
            let segment = Segment {
                slot,
                position,
                rows,
                logits,
            };
            let output = stage.forward(&[segment], StageInput::Tokens(chunk))?;
            if ends && let StageOutput::Logits(row) = output {
                last.push(arg_max(row));
            }
            position += rows;
        }
    }
    let prefill = started.elapsed();

    let started = Instant::now();
    for step in 0..args.tokens - 1 {
        let segments: Vec<Segment> = (0..args.concurrency)
            .map(|slot| Segment {
                slot,
                position: args.prompt_tokens + step,
                rows: 1,
                logits: LogitRows::Last,
            })
            .collect();
        // Steps of no more rows than the stage takes.
        let mut next = Vec::with_capacity(last.len());
        for (segments, tokens) in segments.chunks(max_rows).zip(last.chunks(max_rows)) {
            if let StageOutput::Logits(rows) =
                stage.forward(segments, StageInput::Tokens(tokens))?
            {
                next.extend(rows.chunks_exact(vocab).map(arg_max));
            }
        }
        last = next;
    }
    Ok((prefill, started.elapsed()))
}

fn arg_max(row: &[f32]) -> u32 {
    let mut best = 0;
    for (index, value) in row.iter().enumerate() {
        if *value > row[best] {
            best = index;
        }
    }
    best as u32
}

async fn mesh(head: &HeadArgs, args: &BenchArgs) -> Result<Measured, Failure> {
    let client = http_client(head)?;
    let mut options = GenerationOptions {
        max_tokens: Some(args.tokens.into()),
        temperature: Some(0.0),
        ignore_eos: Some(true),
        ..GenerationOptions::default()
    };
    name_the_model(&client, &mut options).await?;
    let (mut decode, mut first_token) = (0.0_f64, Duration::MAX);
    for round in 0..args.rounds {
        let started = Instant::now();
        let streams: Vec<_> = (0..args.concurrency)
            .map(|stream| {
                // Another beginning each time, or the prefix cache would answer.
                let prompt = prompt_text(round, stream, args.prompt_tokens);
                let request = CompletionRequest::new(prompt, options.clone());
                tokio::spawn(one_stream(client.clone(), request, started))
            })
            .collect();
        let mut ended: Vec<Stats> = Vec::new();
        for stream in streams {
            ended.push(stream.await.map_err(failed)??);
        }
        let firsts = || ended.iter().map(|stats| stats.first_text);
        let last_end = ended.iter().map(|stats| stats.total).max();
        let decoding = last_end.zip(firsts().min());
        let decoding = decoding.map_or(Duration::ZERO, |(end, first)| end.saturating_sub(first));
        let tokens: u64 = ended.iter().filter_map(|stats| stats.tokens).sum();
        let later = tokens.saturating_sub(u64::from(args.concurrency));
        decode = decode.max(later as f64 / decoding.as_secs_f64());
        first_token = first_token.min(firsts().max().unwrap_or_default());
    }
    let model = options.model.unwrap_or_default();
    Ok(Measured {
        what: format!("{model} in the mesh at {}", client.base()),
        prefill: None,
        decode,
        first_token,
    })
}

async fn one_stream(
    client: HttpClient,
    request: CompletionRequest,
    started: Instant,
) -> Result<Stats, Failure> {
    let mut timer = Timer::since(started);
    let mut stream = client.stream(request).await?;
    while let Some(piece) = stream.next().await? {
        timer.note(&piece);
    }
    Ok(timer.stats())
}

/// About `tokens` tokens of plain words.
fn prompt_text(round: u32, stream: u32, tokens: u32) -> String {
    const WORDS: [&str; 8] = [
        "river", "stone", "light", "winter", "garden", "letter", "window", "music",
    ];
    let mut state = u64::from(round) << 32 | u64::from(stream);
    (0..tokens)
        .map(|_| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            WORDS[(state >> 61) as usize]
        })
        .collect::<Vec<_>>()
        .join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_logit_wins_and_the_first_of_equals() {
        assert_eq!(arg_max(&[1.0, 3.0, 3.0, f32::NAN]), 1);
    }

    #[test]
    fn every_stream_of_every_round_asks_something_else() {
        let prompts: std::collections::HashSet<String> = (0..3)
            .flat_map(|round| (0..8).map(move |stream| prompt_text(round, stream, 32)))
            .collect();
        assert_eq!(prompts.len(), 24);
    }
}
