//! The cost of answers that follow a JSON Schema: eight streams with one against eight without, and the time
//! to compile a schema.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use clap::Parser;
use futures::future::join_all;
use mesh_bench::{Ours, Ratios};
use mesh_engine::{Engine, EngineHandle, Event, Request, SamplingParams, SchedulerConfig};
use mesh_engine_ort::OrtOptions;
use mesh_grammar::{Grammars, Source};
use mesh_launcher::paths;
use mesh_model::Model;
use serde_json::json;

/// Measures what a schema costs the decode steps of eight streams
#[derive(Parser)]
struct Args {
    /// Model file; default SmolLM2-135M-Instruct
    model: Option<PathBuf>,
    /// Threads
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Rounds, each of which gives one ratio
    #[arg(long, default_value_t = 9)]
    rounds: u64,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let path = args.model.clone().map_or_else(paths::smollm2, Ok)?;
    let model = Model::open(&path)?;
    let grammars = compile(&model)?;
    streams(model, &grammars, &args)
}

/// Compiles a schema of 200 properties.
fn compile(model: &Model) -> Result<Grammars> {
    let start = Instant::now();
    let grammars = Grammars::new(model)?;
    let trie = start.elapsed();
    let kinds = [
        json!({"type": "string", "maxLength": 40}),
        json!({"type": "integer", "minimum": 0, "maximum": 10_000}),
        json!({"enum": ["low", "middle", "high"]}),
        json!({"type": "array", "items": {"type": "number"}, "maxItems": 8}),
    ];
    let mut seconds = Ratios::default();
    for round in 0..9 {
        let properties = (0..200).map(|i| (format!("p{round}_{i}"), kinds[i % 4].clone()));
        let properties: serde_json::Map<_, _> = properties.collect();
        let names: Vec<&String> = properties.keys().step_by(2).collect();
        let schema = json!({"type": "object", "required": names, "properties": properties});
        let source = Source::JsonSchema(schema.to_string());
        let start = Instant::now();
        grammars.compile(&source)?;
        seconds.0.push(start.elapsed().as_secs_f64());
    }
    println!(
        "trie of the vocabulary: {:.0} ms; a schema of 200 properties: {:.1} ms (wanted: at most 50)",
        trie.as_secs_f64() * 1e3,
        seconds.median() * 1e3
    );
    Ok(grammars)
}

fn streams(model: Model, grammars: &Grammars, args: &Args) -> Result<()> {
    let options = OrtOptions {
        threads: args.threads,
        slots: STREAMS as u32,
        context: 1024,
        ..OrtOptions::default()
    };
    let stage = Box::new(Ours::load(&model, options)?.stage);
    let engine = Engine::start("bench", stage, Arc::new(model), SchedulerConfig::default())?;
    // An answer that does not end within the measurement.
    let schema = json!({"type": "array", "minItems": 1000, "items": {
        "type": "object", "additionalProperties": false, "required": ["name", "born", "tags"], "properties": {
            "name": {"type": "string", "maxLength": 30}, "born": {"type": "integer", "minimum": 0, "maximum": 2030},
            "tags": {"type": "array", "items": {"type": "string", "maxLength": 12}, "minItems": 1, "maxItems": 3}}}});
    let grammar = grammars.compile(&Source::JsonSchema(schema.to_string()))?;
    let mut ratios = Ratios::default();
    for round in 0..=args.rounds {
        let free = decode(&engine.handle(), |request| request, round)?;
        let bound = |request| Request {
            grammar: Some(grammar.clone()),
            ..request
        };
        let bound = decode(&engine.handle(), bound, round)?;
        if round > 0 {
            ratios.0.push(free.as_secs_f64() / bound.as_secs_f64());
        }
    }
    println!(
        "{STREAMS} streams with a schema / without, tokens per second: ratio {:.3} ({:.3}-{:.3}; wanted: at least 0.98)",
        ratios.median(),
        ratios.least(),
        ratios.most()
    );
    Ok(())
}

/// Time that the answers of all streams take together.
fn decode(
    engine: &EngineHandle,
    change: impl Fn(Request) -> Request,
    seed: u64,
) -> Result<Duration> {
    let request = |stream: u64| {
        let prompt = (0..24).map(|i| 200 + (i * 7919 + stream as u32 * 13) % 40_000);
        change(Request {
            ignore_eos: true,
            params: SamplingParams {
                seed: seed * STREAMS + stream,
                ..SamplingParams::default()
            },
            ..Request::greedy("bench", prompt.collect(), TOKENS)
        })
    };
    let start = Instant::now();
    let answers = (0..STREAMS).map(|stream| engine.submit(request(stream)).last_event());
    for event in futures::executor::block_on(join_all(answers)) {
        match event {
            Event::Done(done) => ensure!(done.completion_tokens == TOKENS, "it ended: {done:?}"),
            other => bail!("{other:?}"),
        }
    }
    Ok(start.elapsed())
}

const STREAMS: u64 = 8;
const TOKENS: u32 = 128;
