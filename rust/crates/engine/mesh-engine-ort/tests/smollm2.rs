//! The stage on the real SmolLM2-135M-Instruct.

mod common;

use common::{arg_max, encode, last, logits, options, smollm2, whole};
use mesh_engine::{LogitRows, Segment, Stage};
use mesh_engine_ort::OrtOptions;

/// Largest distance of llama.cpp's choice below the largest logit. Both engines round activations to 8 bits,
/// in different groups, so logits differ by a few tenths and near ties fall differently.
const TIE: f32 = 0.5;

/// The answers are llama.cpp's (Debian's build 11669, the same file, temperature 0).
#[test]
fn llama_cpps_greedy_answers_are_ours_up_to_ties() {
    let model = smollm2();
    let mut stage = whole(&model, options(1, 256));
    for (prompt, answer) in [
        (
            "The capital of France is",
            " Paris.\n\nThe United States has a population of approximately 311 million people.",
        ),
        (
            "Once upon a time, there was a little",
            " girl named Emma who loved to play in the sun. She had a big smile on her face and always \
             had a ball",
        ),
        (
            "Water boils at",
            " 100°C, which is a perfect Celsius.\n\nThe ratio of the heat energy absorbed by the",
        ),
    ] {
        let prompt = encode(&model, prompt);
        let answer = encode(&model, answer);
        let all = [&prompt[..], &answer[..answer.len() - 1]].concat();
        let segment = Segment {
            logits: LogitRows::All,
            ..last(0, 0, all.len())
        };
        let rows = logits(&mut stage, &[segment], &all);
        let rows = rows.chunks(model.config().vocab).skip(prompt.len() - 1);
        let mut ties = 0;
        for (row, &token) in rows.zip(&answer) {
            let gap = row[arg_max(row) as usize] - row[token as usize];
            assert!(
                gap < TIE,
                "{:?}: {gap}",
                model.tokenizer().token_bytes(token)
            );
            ties += usize::from(gap > 0.0);
        }
        assert!(
            ties * 8 <= answer.len(),
            "{ties} ties in {} tokens",
            answer.len()
        );
    }
}

#[test]
fn memory_follows_what_the_slots_hold() {
    let model = smollm2();
    let options = OrtOptions {
        max_rows: 512,
        ..options(8, 8192)
    };
    let mut stage = whole(&model, options);
    let file = model.tensors().file_len();
    assert!(
        stage.info().weight_bytes < file + file / 10,
        "{} bytes",
        stage.info().weight_bytes
    );
    let tokens: Vec<u32> = (0..400).map(|i| 100 + i * 7).collect();
    for slot in 0..4 {
        logits(&mut stage, &[last(slot, 0, tokens.len())], &tokens);
    }
    let full = resident();
    for slot in 0..4 {
        stage.truncate(slot, 0);
    }
    let freed = full.saturating_sub(resident());
    let held = 4 * 400 * stage.info().kv_bytes_per_token;
    assert!(freed > held * 8 / 10, "{freed} bytes came back of {held}");
}

/// Resident bytes of this process.
fn resident() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    statm.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * 4096
}
