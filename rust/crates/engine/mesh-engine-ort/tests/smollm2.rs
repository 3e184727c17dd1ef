//! The stage on the real SmolLM2-135M-Instruct.

mod common;

use common::{
    arg_max, assert_same_bits, encode, last, logits, options, pipeline, quiet, smollm2, whole,
};
use mesh_engine::{LogitRows, Segment, Stage};
use mesh_engine_ort::{OrtOptions, OrtStage};

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
fn a_row_does_not_depend_on_what_shares_its_step() {
    let model = smollm2();
    let mut alone = whole(&model, options(1, 256));
    let text = "The mesh answers as long as one machine is left, and nobody who asked it something \
                needs to know which machine that was, or how many there were when it began.";
    let tokens = encode(&model, text);
    let prompt = logits(&mut alone, &[last(0, 0, tokens.len())], &tokens);
    let next = logits(&mut alone, &[last(0, tokens.len() as u32, 1)], &[28]);

    // The same rows: another slot, other threads, the prompt in uneven pieces, each beside rows of other
    // sequences.
    let mut busy = whole(
        &model,
        mesh_engine_ort::OrtOptions {
            threads: 1,
            ..options(4, 256)
        },
    );
    let noise: Vec<u32> = (1000..1040).collect();
    let cut = [1, 6, tokens.len()];
    let mut from = 0;
    let mut row = Vec::new();
    for (turn, to) in cut.into_iter().enumerate() {
        let piece = &tokens[from..to];
        let beside = &noise[..7 * turn + 1];
        let segments = [
            last(0, busy.kv_len(0), beside.len()),
            last(2, from as u32, piece.len()),
            quiet(3, busy.kv_len(3), beside.len()),
        ];
        let step = [beside, piece, beside].concat();
        let vocab = model.config().vocab;
        row = logits(&mut busy, &segments, &step)[vocab..].to_vec();
        from = to;
    }
    assert_same_bits(&row, &prompt);
    let at = busy.kv_len(0);
    let both = logits(
        &mut busy,
        &[last(0, at, 1), last(2, tokens.len() as u32, 1)],
        &[5, 28],
    );
    assert_same_bits(&both[model.config().vocab..], &next);
}

#[test]
fn stages_in_a_row_give_the_whole_models_bits() {
    let model = smollm2();
    let tokens = encode(
        &model,
        "A ring of five machines computes what one machine would.",
    );
    let mut one = whole(&model, options(2, 64));
    let all = Segment {
        logits: LogitRows::All,
        ..last(1, 0, tokens.len())
    };
    let expected = logits(&mut one, &[all], &tokens);
    assert_eq!(expected.len(), tokens.len() * model.config().vocab);
    let expected_next = logits(&mut one, &[last(1, tokens.len() as u32, 1)], &[42]);
    for cuts in [&[0, 13, 30][..], &[0, 1, 2, 10, 29, 30]] {
        let mut stages: Vec<OrtStage> = cuts
            .windows(2)
            .map(|cut| OrtStage::load(&model, cut[0]..cut[1], options(2, 64)).unwrap())
            .collect();
        assert_same_bits(&pipeline(&mut stages, &[all], &tokens), &expected);
        let next = pipeline(&mut stages, &[last(1, tokens.len() as u32, 1)], &[42]);
        assert_same_bits(&next, &expected_next);
    }
}

#[test]
fn exported_kv_rows_continue_elsewhere_bit_for_bit() {
    let model = smollm2();
    let tokens = encode(
        &model,
        "The key/value rows of one stage are mirrored to its standby.",
    );
    let rows = tokens.len() as u32;
    let mut a = whole(&model, options(2, 128));
    logits(&mut a, &[quiet(0, 0, tokens.len())], &tokens);
    let per_token = a.info().kv_bytes_per_token as usize;
    let head = a.kv_export(0, 0..5).unwrap();
    let tail = a.kv_export(0, 5..rows).unwrap();
    assert_eq!(tail.len(), (tokens.len() - 5) * per_token);

    let mut b = whole(&model, options(2, 128));
    b.kv_import(1, 0, &head).unwrap();
    b.kv_import(1, 5, &tail).unwrap();
    assert_eq!(b.kv_len(1), rows);
    assert_eq!(b.kv_export(1, 0..rows).unwrap(), [head, tail].concat());
    let expected = logits(&mut a, &[last(0, rows, 1)], &[7]);
    assert_same_bits(&logits(&mut b, &[last(1, rows, 1)], &[7]), &expected);

    // A prefix of one conversation begins another.
    a.copy_prefix(0, 1, 5).unwrap();
    assert_eq!((a.kv_len(0), a.kv_len(1)), (rows + 1, 5));
    let fork = logits(&mut a, &[last(1, 5, tokens.len() - 5)], &tokens[5..]);
    a.truncate(0, rows);
    a.truncate(0, 5);
    let again = logits(&mut a, &[last(0, 5, tokens.len() - 5)], &tokens[5..]);
    assert_same_bits(&fork, &again);
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
