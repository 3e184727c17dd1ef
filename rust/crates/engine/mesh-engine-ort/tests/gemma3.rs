//! The stage on the real Gemma 3 270M, whose file has Q4_K, Q5_0, Q6_K and Q8_0 matrices.

mod common;
mod reference;

use common::{
    arg_max, assert_same_bits, cosine, encode, last, logits, options, pipeline, quiet, whole,
};
use mesh_engine::{LogitRows, Segment};
use mesh_engine_ort::{OrtOptions, OrtStage};
use mesh_model::{EncodeOptions, Model};
use mesh_testkit::paths;

fn gemma3() -> Model {
    Model::open(paths::gemma3().unwrap()).unwrap()
}

/// All that is cheap on one loaded model: loading takes most of the time.
#[test]
fn texts_are_llama_cpps_and_rows_do_not_depend_on_cuts_of_prompt_or_model() {
    let model = gemma3();
    let vocab = model.config().vocab;
    let wide = || OrtOptions {
        max_rows: 700,
        ..options(1, 700)
    };
    let mut stage = whole(&model, wide());

    // llama.cpp's answers (Debian's 0.7.0, the same file, temperature 0), up to near ties.
    for (prompt, answer) in [
        (
            "The capital of France is",
            " the capital of the country of France. It is the largest city in France.",
        ),
        (
            "Once upon a time, there was a little",
            " girl named Lily. She was a very smart girl, and she loved to play with her friends.",
        ),
        ("Water boils at", " 100 degrees Celsius.\n\nWater boils at"),
        (
            "def fibonacci(n):",
            "\n    if n == 0:\n        return 0\n    elif n == 1:",
        ),
    ] {
        let prompt = encode(&model, prompt);
        let tokenizer = model.tokenizer();
        let answer = tokenizer.encode(answer, EncodeOptions::default()).unwrap();
        let tokens = [&prompt[..], &answer[..answer.len() - 1]].concat();
        let segment = Segment {
            logits: LogitRows::All,
            ..last(0, 0, tokens.len())
        };
        let rows = logits(&mut stage, &[segment], &tokens);
        let rows = rows.chunks(vocab).skip(prompt.len() - 1);
        let mut ties = 0;
        for (row, &token) in rows.zip(&answer) {
            let gap = row[arg_max(row) as usize] - row[token as usize];
            assert!(gap < TIE, "{:?}: {gap}", tokenizer.token_bytes(token));
            ties += usize::from(gap > 0.0);
        }
        assert!(ties * 8 <= answer.len(), "{ties} ties in {}", answer.len());
    }

    // A plain forward pass in f32 sees rows that were not rounded to 8 bits.
    let tokens = encode(&model, "Gemma has layers that see 512 positions only");
    let found = logits(&mut stage, &[last(0, 0, tokens.len())], &tokens);
    let expected = reference::last_row(&model, &tokens);
    let off = 1.0 - cosine(&found, &expected);
    assert!(off < 3e-3, "1 - cosine = {off:e}");

    // Longer than the window.
    let sentence = encode(
        &model,
        "The quick brown fox jumps over the lazy dog; it was not impressed.\n",
    );
    let tokens: Vec<u32> = sentence.iter().copied().cycle().take(650).collect();
    let expected = logits(&mut stage, &[last(0, 0, 650)], &tokens);
    for piece in [0..600, 600..649] {
        let segment = quiet(0, piece.start as u32, piece.len());
        logits(&mut stage, &[segment], &tokens[piece]);
    }
    let found = logits(&mut stage, &[last(0, 649, 1)], &tokens[649..]);
    assert_same_bits(&found, &expected);
    drop(stage);

    let mut stages = [0..7, 7..18].map(|cut| OrtStage::load(&model, cut, wide()).unwrap());
    let found = pipeline(&mut stages, &[last(0, 0, 650)], &tokens);
    assert_same_bits(&found, &expected);
}

/// Largest distance of llama.cpp's choice below the largest logit. Both engines round activations to 8 bits,
/// in different groups, so logits differ by a few tenths and near ties fall differently.
const TIE: f32 = 0.5;
