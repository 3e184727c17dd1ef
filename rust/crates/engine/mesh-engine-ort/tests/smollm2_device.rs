//! The graph of ONNX Runtime's own operators on the real SmolLM2-135M-Instruct, against the CPU's stage.

mod common;
mod reference;

use common::{arg_max, encode, last, logits, options, provider, smollm2, whole};
use mesh_engine::{LogitRows, Segment, Stage};
use mesh_engine_ort::{Device, DeviceStage, Provider};
use mesh_model::Model;

fn device_stage(model: &Model) -> DeviceStage {
    let layers = 0..model.config().layers;
    DeviceStage::load(model, layers, options(1, 512), Device::new(provider())).unwrap()
}

/// Greedy tokens, and how far the best logit of each step lay above the second.
fn greedy(stage: &mut impl Stage, prompt: &[u32], count: usize) -> Vec<(u32, f32)> {
    stage.truncate(0, 0);
    let mut row = logits(stage, &[last(0, 0, prompt.len())], prompt);
    let mut out = Vec::new();
    while out.len() < count {
        let token = arg_max(&row);
        let best = row[token as usize];
        row[token as usize] = f32::NEG_INFINITY;
        out.push((token, best - row[arg_max(&row) as usize]));
        row = logits(stage, &[last(0, stage.kv_len(0), 1)], &[token]);
    }
    out
}

/// The CPU's stage rounds activations to 8 bits, so near ties may fall differently.
const TIE: f32 = 0.5;

#[test]
fn greedy_answers_are_those_of_the_cpus_stage_up_to_a_near_tie() {
    let model = smollm2();
    let mut ours = device_stage(&model);
    let mut cpu = whole(&model, options(1, 512));
    let mut same = 0;
    for prompt in [
        "The capital of France is",
        "Once upon a time, there was a little",
        "Water boils at",
        "The three primary colours are",
    ] {
        let prompt = encode(&model, prompt);
        let found = greedy(&mut ours, &prompt, 24);
        let expected = greedy(&mut cpu, &prompt, 24);
        let differs = found.iter().zip(&expected).position(|(a, b)| a.0 != b.0);
        if let Some(at) = differs {
            let gap = found[at].1.min(expected[at].1);
            assert!(gap < TIE, "token {at} differs by {gap}");
        }
        same += differs.unwrap_or(found.len());
    }
    // Streams do not leave each other at once.
    assert!(
        same >= 24,
        "{same} of 96 tokens before the first difference"
    );
}

/// Perplexity of `tokens` from the second one on.
fn perplexity(stage: &mut impl Stage, tokens: &[u32], vocab: usize) -> f64 {
    stage.truncate(0, 0);
    let mut rows = Vec::new();
    for chunk in tokens.chunks(64) {
        let segment = Segment {
            logits: LogitRows::All,
            ..last(0, stage.kv_len(0), chunk.len())
        };
        rows.extend(logits(stage, &[segment], chunk));
    }
    perplexity_of(rows.chunks(vocab), &tokens[1..])
}

/// Perplexity of tokens by the logits before each of them.
fn perplexity_of<'a>(rows: impl Iterator<Item = &'a [f32]>, tokens: &[u32]) -> f64 {
    let mut sum = 0.0;
    for (row, next) in rows.zip(tokens) {
        let most = row[arg_max(row) as usize];
        let total: f64 = row.iter().map(|x| f64::from(x - most).exp()).sum();
        sum += total.ln() - f64::from(row[*next as usize] - most);
    }
    (sum / tokens.len() as f64).exp()
}

/// The graph computes in f32 with the file's own weights. The CPU's stage rounds activations and, by default,
/// scales to 8 bits; over the same text without the latter it has 24.35, plain f32 24.20.
#[test]
fn perplexity_is_that_of_plain_f32_and_near_the_cpus_stage() {
    let model = smollm2();
    let vocab = model.config().vocab;
    let tokens = encode(&model, TEXT);
    assert!(tokens.len() > 250, "{} tokens", tokens.len());
    let mut ours = device_stage(&model);
    let found = perplexity(&mut ours, &tokens, vocab);
    let cpu = perplexity(&mut whole(&model, options(1, 512)), &tokens, vocab);
    let off = found / cpu - 1.0;
    assert!(off.abs() < 0.015, "{found}, on the CPU {cpu}: {off:+.5}");

    let beginning = &tokens[..PLAIN_TOKENS];
    let found = perplexity(&mut ours, beginning, vocab);
    let plain = reference::forward(&model, beginning);
    let plain = perplexity_of(plain.chunks(vocab), &beginning[1..]);
    let off = found / plain - 1.0;
    let most = match provider() {
        Provider::Cpu => 1e-4,
        _ => 0.005,
    };
    assert!(off.abs() < most, "{found}, in plain f32 {plain}: {off:+.7}");
}

/// A plain forward pass takes a quarter of a second for each.
const PLAIN_TOKENS: usize = 48;

const TEXT: &str = "The mesh answers as long as one machine is left, and nobody who asked it something needs to know which \
machine that was, or how many there were when it began. Old laptops are slow, but they are many, and most of them still have \
a screen that works and a battery that lasts an hour. When one of them is switched off in the middle of a sentence, another \
one takes over: it reads what was said so far, and goes on with the next word. The owner of the house notices nothing. A ring \
of five machines computes what one machine would, only that each of them holds a part of the layers, and passes what it has \
computed to its neighbour. The first one reads the words, the last one chooses the next, and between them the numbers go \
around, a few kilobytes for every word. Water boils at 100 degrees Celsius at sea level, and at about 93 degrees on a \
mountain of two thousand metres, since the air is thinner there. The capital of France is Paris, which lies on the river \
Seine. In the north of the country the summers are mild and the winters are wet, while the south has dry summers and a long \
coast on the Mediterranean Sea. Once upon a time there was a little girl who lived with her grandmother at the edge of a \
forest. Every morning she went to the well to fetch water, and every evening she told the old woman what she had seen.";
