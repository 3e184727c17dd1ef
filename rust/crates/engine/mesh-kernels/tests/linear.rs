//! Products of every weight type on every instruction set that this CPU runs.

mod support;

use mesh_kernels::{
    Activation, EightBit, FeedForward, Gate, Isa, KernelError, Linear, PackOptions, Pool,
    PoolOptions, QMatrix, Residual, RmsNorm, WeightType, feed_forward, gate_up, linear,
};
use proptest::prelude::*;
use support::{Rng, bits, dequantized, error, groups, product, random_rows, rounded};

fn pool(threads: usize, isa: Isa) -> Pool {
    Pool::with_options(PoolOptions {
        threads,
        isa: Some(isa),
        ..PoolOptions::default()
    })
}

fn plain(pool: &Pool, w: &QMatrix, x: &[f32]) -> Vec<f32> {
    let rows = x.len() / w.k();
    let mut out = vec![f32::NAN; rows * w.n()];
    linear(pool, w, x, rows, &mut out, &Linear::default()).expect("shapes fit");
    out
}

#[test]
fn packing_keeps_every_weight() {
    let mut rng = Rng(1);
    for ty in WeightType::ALL {
        let (n, k) = (37, 512);
        let rows = random_rows(ty, n, k, &mut rng);
        let want = dequantized(ty, n, k, &rows);
        let matrix = QMatrix::pack(ty, n, k, &rows).expect("packs");
        let mut got = vec![0.0; k];
        for row in 0..n {
            matrix.dequantize_row(row, &mut got).expect("row exists");
            let worst = got
                .iter()
                .zip(&want[row * k..])
                .map(|(g, w)| (g - w).abs())
                .fold(0.0, f32::max);
            assert!(worst <= 1e-7, "{ty:?} row {row}: off by {worst}");
        }
    }
}

#[test]
fn any_bytes_are_weights() {
    let mut rng = Rng(9);
    let (n, k) = (17, 256);
    let x = rng.floats(2 * k);
    for ty in WeightType::ALL {
        let bytes = n * ty.row_bytes(k).expect("whole blocks");
        let random: Vec<u8> = (0..bytes).map(|_| rng.next() as u8).collect();
        for rows in [random, vec![0; bytes], vec![0xff; bytes]] {
            let matrix = QMatrix::pack(ty, n, k, &rows).expect("packs");
            for isa in Isa::available() {
                plain(&pool(1, isa), &matrix, &x);
            }
            let mut row = vec![0.0; k];
            (0..n).for_each(|i| matrix.dequantize_row(i, &mut row).expect("row exists"));
        }
    }
}

#[test]
fn packed_sizes_are_known_beforehand_and_near_the_file_s() {
    let mut rng = Rng(8);
    let most = |ty| match ty {
        WeightType::IQ1_S => 2.4,
        WeightType::IQ1_M => 2.1,
        WeightType::IQ2_XXS => 1.8,
        WeightType::IQ2_XS | WeightType::TQ1_0 => 1.6,
        WeightType::IQ2_S => 1.5,
        WeightType::IQ3_XXS => 1.52,
        WeightType::IQ3_S => 1.35,
        WeightType::TQ2_0 => 1.3,
        _ => 1.1,
    };
    let (n, k) = (48, 512);
    for ty in WeightType::ALL {
        let rows = random_rows(ty, n, k, &mut rng);
        let matrix = QMatrix::pack(ty, n, k, &rows).expect("packs");
        let foretold = QMatrix::packed_bytes(ty, n, k, PackOptions::default());
        assert_eq!(foretold, Some(matrix.bytes() as u64), "{ty}");
        let ratio = matrix.bytes() as f64 / rows.len() as f64;
        assert!(ratio <= most(ty), "{ty}: {ratio}");
    }
    for (n, k) in [(0, 256), (16, 0), (16, 255), (usize::MAX, 256)] {
        let ty = WeightType::Q2_K;
        assert_eq!(
            QMatrix::packed_bytes(ty, n, k, PackOptions::default()),
            None
        );
    }
}

#[test]
fn products_agree_with_the_definition() {
    let mut rng = Rng(2);
    for ty in WeightType::ALL {
        for (n, k) in [(16, 256), (37, 512), (80, 768)] {
            let rows = random_rows(ty, n, k, &mut rng);
            let w = dequantized(ty, n, k, &rows);
            let matrix = QMatrix::pack(ty, n, k, &rows).expect("packs");
            let x = rng.floats(11 * k);
            let want = if ty.block_size() == 1 {
                product(&w, &x, k)
            } else {
                product(&w, &rounded(&x), k)
            };
            for isa in Isa::available() {
                let got = plain(&pool(2, isa), &matrix, &x);
                let off = error(&got, &want);
                assert!(off < 2e-5, "{ty:?} {n}x{k} on {isa:?}: {off}");
            }
        }
    }
}

#[test]
fn instruction_sets_of_a_group_give_the_same_bits() {
    let mut rng = Rng(3);
    for ty in WeightType::ALL {
        let (n, k) = (48, 512);
        let matrix = QMatrix::pack(ty, n, k, &random_rows(ty, n, k, &mut rng)).expect("packs");
        let x = rng.floats(7 * k);
        for group in groups() {
            let results = group
                .iter()
                .map(|&isa| bits(&plain(&pool(1, isa), &matrix, &x)));
            let results: Vec<_> = results.collect();
            assert!(
                results.windows(2).all(|pair| pair[0] == pair[1]),
                "{ty:?} on {group:?}"
            );
        }
    }
}

#[test]
fn compact_layouts_lose_little() {
    let mut rng = Rng(4);
    for (ty, q8_0, limit, size) in [
        (WeightType::Q4_0, EightBit::Keep, 0.02, 0.97),
        (WeightType::Q4_1, EightBit::Keep, 0.02, 0.94),
        (WeightType::Q8_0, EightBit::Six, 0.12, 0.77),
        (WeightType::Q8_0, EightBit::Five, 0.25, 0.65),
    ] {
        let (n, k) = (48, 576);
        let options = PackOptions {
            coded_scales: true,
            q8_0,
        };
        let rows = random_rows(ty, n, k, &mut rng);
        let w = dequantized(ty, n, k, &rows);
        let exact = QMatrix::pack(ty, n, k, &rows).expect("packs");
        let small =
            QMatrix::pack_with(&pool(2, Isa::current()), ty, n, k, &rows, options).expect("packs");
        assert!(
            small.bytes() as f64 <= exact.bytes() as f64 * size,
            "{ty:?} {q8_0:?}"
        );
        let x = rng.floats(3 * k);
        let want = product(&w, &rounded(&x), k);
        for isa in Isa::available() {
            let off = error(&plain(&pool(1, isa), &small, &x), &want);
            assert!(off < limit, "{ty:?} {q8_0:?} on {isa:?}: {off}");
        }
    }
}

#[test]
fn the_smallest_scales_of_q4_0_keep_their_size_in_compact_form() {
    let mut rng = Rng(6);
    let (n, k) = (16, 512);
    let options = PackOptions {
        coded_scales: true,
        ..PackOptions::default()
    };
    for scale in [1e-6, 1e-4, 1e-2, 100.0, 60_000.0] {
        let mut rows = random_rows(WeightType::Q4_0, n, k, &mut rng);
        for block in rows.chunks_exact_mut(18) {
            let d = half::f16::from_f32(scale * rng.unit());
            block[..2].copy_from_slice(&d.to_le_bytes());
        }
        let w = dequantized(WeightType::Q4_0, n, k, &rows);
        let pool = pool(1, Isa::current());
        let small = QMatrix::pack_with(&pool, WeightType::Q4_0, n, k, &rows, options);
        let small = small.expect("packs");
        let x = rng.floats(k);
        let off = error(&plain(&pool, &small, &x), &product(&w, &rounded(&x), k));
        assert!(off < 0.02, "scales up to {scale}: {off}");
    }
}

#[test]
fn norm_bias_and_residual_are_added_in_order() {
    let mut rng = Rng(5);
    let (n, k, rows) = (52, 96, 5);
    let matrix = QMatrix::pack(
        WeightType::Q4_1,
        n,
        k,
        &random_rows(WeightType::Q4_1, n, k, &mut rng),
    )
    .expect("packs");
    let (x, weight) = (rng.floats(rows * k), rng.floats(k));
    let (bias, residual) = (rng.floats(n), rng.floats(rows * n));
    for isa in Isa::available() {
        let pool = pool(2, isa);
        let mut normed = vec![0.0; x.len()];
        mesh_kernels::rms_norm(&pool, &x, &weight, 1e-5, &mut normed).expect("shapes fit");
        let mut want = plain(&pool, &matrix, &normed);
        for (i, v) in want.iter_mut().enumerate() {
            *v = *v + bias[i % n] + residual[i];
        }
        let options = Linear {
            norm: Some(RmsNorm {
                weight: &weight,
                eps: 1e-5,
            }),
            bias: Some(&bias),
            activation: None,
            residual: Residual::Rows(&residual),
        };
        let mut got = vec![0.0; rows * n];
        linear(&pool, &matrix, &x, rows, &mut got, &options).expect("shapes fit");
        assert_eq!(bits(&got), bits(&want), "{isa:?}");
        let mut in_place = residual.clone();
        let options = Linear {
            residual: Residual::InPlace,
            ..options
        };
        linear(&pool, &matrix, &x, rows, &mut in_place, &options).expect("shapes fit");
        assert_eq!(bits(&in_place), bits(&want), "{isa:?} in place");
    }
}

#[test]
fn concatenated_matrices_of_different_types_give_both_products() {
    let mut rng = Rng(6);
    let k = 256;
    let shapes = [
        (WeightType::Q4_K, 32),
        (WeightType::Q6_K, 24),
        (WeightType::F16, 17),
    ];
    let x = rng.floats(6 * k);
    let pool = pool(3, Isa::current());
    let parts: Vec<_> = shapes
        .iter()
        .map(|&(ty, n)| random_rows(ty, n, k, &mut rng))
        .collect();
    let pack = |i: usize| QMatrix::pack(shapes[i].0, shapes[i].1, k, &parts[i]).expect("packs");
    let all = QMatrix::concat((0..3).map(pack)).expect("same k");
    let got = plain(&pool, &all, &x);
    let mut column = 0;
    for (i, &(_, n)) in shapes.iter().enumerate() {
        let want = plain(&pool, &pack(i), &x);
        for row in 0..6 {
            let got = &got[row * all.n() + column..][..n];
            assert_eq!(bits(got), bits(&want[row * n..][..n]));
        }
        column += n;
    }
}

/// The activations by their definitions, in f64.
fn activated(activation: Activation, x: f64) -> f64 {
    match activation {
        Activation::Silu => x / (1.0 + (-x).exp()),
        Activation::GeluTanh => {
            let u = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x.powi(3));
            0.5 * x * (1.0 + u.tanh())
        }
        other => unreachable!("no gate has {other:?}; tests/encoder.rs has its definition"),
    }
}

#[test]
fn activations_are_right_over_their_whole_range() {
    // A product with the matrix 1 by 1, in floats: the gate is x, the other half 1.
    let (one, zero) = (1f32.to_le_bytes(), 0f32.to_le_bytes());
    let gate = QMatrix::pack(WeightType::F32, 1, 2, &[one, zero].concat()).expect("packs");
    let up = QMatrix::pack(WeightType::F32, 1, 2, &[zero, one].concat()).expect("packs");
    let inputs: Vec<f32> = (-400..=400).map(|i| i as f32 / 16.0).collect();
    let mut inputs: Vec<f32> = inputs.iter().flat_map(|&x| [x, 1.0]).collect();
    for far in [-1e30, -1e12, -300.0, 300.0, 1e12] {
        inputs.extend([far, 1.0]);
    }
    let rows = inputs.len() / 2;
    for isa in Isa::available() {
        for activation in [Activation::Silu, Activation::GeluTanh] {
            let matrices = Gate {
                gate: &gate,
                up: &up,
                activation,
            };
            let mut got = vec![0.0; rows];
            gate_up(&pool(1, isa), &matrices, &inputs, rows, None, &mut got).expect("shapes fit");
            for (x, got) in inputs.iter().step_by(2).zip(got) {
                let want = activated(activation, (*x).into());
                let off = (f64::from(got) - want).abs();
                assert!(
                    off <= 1e-6 * want.abs() + 1e-6,
                    "{activation:?}({x}) is {got}, not {want}, on {isa:?}"
                );
            }
        }
    }
}

#[test]
fn gate_and_up_are_fused_without_changing_a_bit() {
    let mut rng = Rng(7);
    let (n, k, rows) = (72, 128, 5);
    let pack =
        |ty, rng: &mut Rng| QMatrix::pack(ty, n, k, &random_rows(ty, n, k, rng)).expect("packs");
    let x = rng.floats(rows * k);
    for isa in Isa::available() {
        let pool = pool(2, isa);
        for other in [WeightType::Q4_0, WeightType::Q8_0, WeightType::F16] {
            let gate = pack(WeightType::Q4_0, &mut rng);
            let up = pack(other, &mut rng);
            let mut got = vec![0.0; rows * n];
            let (g, u) = (plain(&pool, &gate, &x), plain(&pool, &up, &x));
            for activation in [Activation::Silu, Activation::GeluTanh] {
                let matrices = Gate {
                    gate: &gate,
                    up: &up,
                    activation,
                };
                gate_up(&pool, &matrices, &x, rows, None, &mut got).expect("shapes fit");
                let want: Vec<f64> = g
                    .iter()
                    .zip(&u)
                    .map(|(&g, &u)| activated(activation, g.into()) * f64::from(u))
                    .collect();
                let off = error(&got, &want);
                assert!(off < 1e-6, "{activation:?} {other:?} on {isa:?}: {off}");
            }
        }
    }
}

#[test]
fn wrong_sizes_are_errors() {
    let pool = pool(1, Isa::current());
    let rows = vec![0; 18 * 4];
    assert!(matches!(
        QMatrix::pack(WeightType::Q4_0, 4, 31, &rows),
        Err(KernelError::Block { k: 31, .. })
    ));
    assert!(matches!(
        QMatrix::pack(WeightType::Q4_0, 5, 32, &rows),
        Err(KernelError::Length {
            got: 72,
            need: 90,
            ..
        })
    ));
    for (n, k) in [
        (0, 32),
        (4, 0),
        (usize::MAX, 32),
        (1 << 27, usize::MAX & !31),
    ] {
        assert!(QMatrix::pack(WeightType::Q4_0, n, k, &rows).is_err());
    }
    let matrix = QMatrix::pack(WeightType::Q4_0, 4, 32, &rows).expect("packs");
    let (x, mut out) = (vec![0.0; 64], vec![0.0; 8]);
    let run = |x: &[f32], rows, out: &mut [f32], options: &Linear<'_>| {
        linear(&pool, &matrix, x, rows, out, options)
    };
    assert!(run(&x, 2, &mut out, &Linear::default()).is_ok());
    assert!(run(&x, 1, &mut out, &Linear::default()).is_err());
    assert!(run(&x[1..], 2, &mut out, &Linear::default()).is_err());
    assert!(run(&x, usize::MAX, &mut out, &Linear::default()).is_err());
    assert!(run(&[], 0, &mut [], &Linear::default()).is_ok());
    let short = Linear {
        bias: Some(&[1.0]),
        ..Linear::default()
    };
    assert!(run(&x, 2, &mut out, &short).is_err());
    assert!(matrix.dequantize_row(4, &mut [0.0; 32]).is_err());
    let other = QMatrix::pack(WeightType::Q4_0, 1, 64, &[0; 36]).expect("packs");
    assert!(QMatrix::concat([matrix, other]).is_err());
    assert!(QMatrix::concat([]).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn rows_do_not_depend_on_their_company(
        rows in 1_usize..40,
        cuts in prop::collection::vec(1_usize..17, 40),
        threads in 1_usize..5,
        ty in 0_usize..WeightType::ALL.len(),
        n in 1_usize..100,
        seed in any::<u64>(),
    ) {
        let ty = WeightType::ALL[ty];
        let k = 256;
        let mut rng = Rng(seed);
        let w = random_rows(ty, n, k, &mut rng);
        let x = rng.floats(rows * k);
        let weight = rng.floats(k);
        let norm = RmsNorm { weight: &weight, eps: 1e-5 };
        let matrix = QMatrix::pack(ty, n, k, &w).expect("packs");
        let down = QMatrix::pack(WeightType::F16, k, n, &random_rows(WeightType::F16, k, n, &mut rng)).expect("packs");
        for isa in Isa::available() {
            let run = |pool: &Pool, x: &[f32]| {
                let rows = x.len() / k;
                let mut out = vec![0.0; rows * n];
                linear(pool, &matrix, x, rows, &mut out, &Linear { norm: Some(norm), ..Linear::default() }).expect("fits");
                let mut y = x.to_vec();
                let mut layer = FeedForward {
                    norm,
                    gate: Gate { gate: &matrix, up: &matrix, activation: Activation::Silu },
                    down: &down,
                    post_norm: None,
                };
                feed_forward(pool, &layer, &mut y, rows).expect("fits");
                layer.gate.activation = Activation::GeluTanh;
                layer.post_norm = Some(norm);
                feed_forward(pool, &layer, &mut y, rows).expect("fits");
                (bits(&out), bits(&y))
            };
            let whole = run(&pool(threads, isa), &x);
            let single = pool(1, isa);
            let (mut at, mut parts) = (0, (Vec::new(), Vec::new()));
            for cut in &cuts {
                let end = (at + cut).min(rows);
                let part = run(&single, &x[at * k..end * k]);
                parts.0.extend(part.0);
                parts.1.extend(part.1);
                at = end;
            }
            prop_assert_eq!(&whole.0, &parts.0, "{:?} {:?}", ty, isa);
            prop_assert_eq!(&whole.1, &parts.1, "{:?} {:?}", ty, isa);
        }
    }
}
