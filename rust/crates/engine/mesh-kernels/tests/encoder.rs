//! Layer norm, attention over sequences side by side, and activations, on every instruction set that this CPU
//! runs.

mod support;

use mesh_kernels::{
    Activation, Isa, KernelError, Linear, Pool, PoolOptions, QMatrix, WeightType, encode_attention,
    layer_norm, linear,
};
use proptest::prelude::*;
use support::{Rng, bits, error};

fn pool(threads: usize, isa: Isa) -> Pool {
    Pool::with_options(PoolOptions {
        threads,
        isa: Some(isa),
        ..PoolOptions::default()
    })
}

/// Attention by its definition, in f64.
fn defined(heads: usize, dim: usize, lengths: &[usize], qkv: &[f32]) -> Vec<f64> {
    let width = heads * dim;
    let mut out = vec![0.0; qkv.len() / 3];
    let mut start = 0;
    for &length in lengths {
        for head in 0..heads {
            let at = |row: usize, part: usize, i: usize| {
                f64::from(qkv[(start + row) * 3 * width + part * width + head * dim + i])
            };
            for row in 0..length {
                let scores: Vec<f64> = (0..length)
                    .map(|other| {
                        let dot: f64 = (0..dim).map(|i| at(row, 0, i) * at(other, 1, i)).sum();
                        (dot / (dim as f64).sqrt()).exp()
                    })
                    .collect();
                let sum: f64 = scores.iter().sum();
                for i in 0..dim {
                    out[(start + row) * width + head * dim + i] = (0..length)
                        .map(|other| scores[other] / sum * at(other, 2, i))
                        .sum();
                }
            }
        }
        start += length;
    }
    out
}

#[test]
fn attention_agrees_with_its_definition() {
    let mut rng = Rng(11);
    for (heads, dim, lengths) in [
        (2, 32, &[1, 7, 16, 33][..]),
        (3, 64, &[130, 2]),
        (1, 16, &[5]),
    ] {
        let rows: usize = lengths.iter().sum();
        let qkv: Vec<f32> = rng
            .floats(rows * 3 * heads * dim)
            .iter()
            .map(|x| 3.0 * x)
            .collect();
        let want = defined(heads, dim, lengths, &qkv);
        for isa in Isa::available() {
            let mut out = vec![f32::NAN; rows * heads * dim];
            encode_attention(&pool(2, isa), heads, dim, lengths, &qkv, &mut out).unwrap();
            let off = error(&out, &want);
            assert!(off < 1e-5, "{heads} heads of {dim} on {isa:?}: {off}");
        }
    }
}

#[test]
fn attention_that_does_not_fit_is_refused() {
    let pool = Pool::new(1);
    let mut out = vec![0.0; 64];
    let qkv = vec![0.0; 192];
    let mut run = |heads, dim, lengths: &[usize]| {
        encode_attention(&pool, heads, dim, lengths, &qkv, &mut out)
    };
    assert!(run(2, 32, &[1]).is_ok());
    for (heads, dim, lengths) in [
        (2, 32, &[2][..]),
        (2, 32, &[1, 0]),
        (2, 32, &[usize::MAX, 2]),
    ] {
        assert!(run(heads, dim, lengths).is_err(), "{lengths:?}");
    }
    assert!(matches!(
        run(8, 8, &[1]),
        Err(KernelError::Dimension { .. })
    ));
    assert!(run(0, 32, &[1]).is_err());
}

#[test]
fn layer_norm_agrees_with_its_definition() {
    let mut rng = Rng(12);
    for k in [1, 15, 16, 33, 384] {
        let (x, weight, bias) = (rng.floats(5 * k), rng.floats(k), rng.floats(k));
        for isa in Isa::available() {
            let mut got = x.clone();
            layer_norm(&pool(2, isa), &mut got, &weight, &bias, 1e-5).unwrap();
            for (x, got) in x.chunks(k).zip(got.chunks(k)) {
                let mean = x.iter().map(|&v| f64::from(v)).sum::<f64>() / k as f64;
                let variance = x
                    .iter()
                    .map(|&v| (f64::from(v) - mean).powi(2))
                    .sum::<f64>()
                    / k as f64;
                for i in 0..k {
                    let unit = (f64::from(x[i]) - mean) / (variance + 1e-5).sqrt();
                    let want = unit * f64::from(weight[i]) + f64::from(bias[i]);
                    assert!((f64::from(got[i]) - want).abs() < 1e-5, "{k} on {isa:?}");
                }
            }
            assert!(
                layer_norm(&pool(1, isa), &mut got[1..], &weight, &bias, 1e-5).is_err() || k == 1
            );
            assert!(layer_norm(&pool(1, isa), &mut got, &weight, &bias[1..], 1e-5).is_err());
        }
    }
}

/// The error function by its series, in f64.
fn erf(x: f64) -> f64 {
    let (mut term, mut sum) = (x, x);
    for n in 1..200 {
        term *= -x * x / n as f64;
        sum += term / (2 * n + 1) as f64;
    }
    sum * 2.0 / std::f64::consts::PI.sqrt()
}

#[test]
fn activations_agree_with_their_definitions() {
    // The identity times numbers from -5 to 5.
    let k = 64;
    let mut identity = vec![0_u8; 4 * k * k];
    for i in 0..k {
        identity[4 * (i * k + i)..][..4].copy_from_slice(&1.0_f32.to_le_bytes());
    }
    let matrix = QMatrix::pack(WeightType::F32, k, k, &identity).unwrap();
    let x: Vec<f32> = (0..10 * k).map(|i| i as f32 / 64.0 - 5.0).collect();
    for isa in Isa::available() {
        for activation in [
            Activation::Silu,
            Activation::Gelu,
            Activation::GeluTanh,
            Activation::Relu,
            Activation::ClampedSwiglu,
        ] {
            let options = Linear {
                activation: Some(activation),
                ..Linear::default()
            };
            let mut out = vec![0.0; x.len()];
            linear(&pool(2, isa), &matrix, &x, 10, &mut out, &options).unwrap();
            for (&x, &got) in x.iter().zip(&out) {
                let x = f64::from(x);
                let want = match activation {
                    Activation::Gelu => x * 0.5 * (1.0 + erf(x / 2.0_f64.sqrt())),
                    Activation::GeluTanh => {
                        let u = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x.powi(3));
                        x * 0.5 * (1.0 + u.tanh())
                    }
                    Activation::Relu => x.max(0.0),
                    Activation::Silu => x / (1.0 + (-x).exp()),
                    Activation::ClampedSwiglu => x.min(7.0) / (1.0 + (-1.702 * x.min(7.0)).exp()),
                };
                assert!(
                    (f64::from(got) - want).abs() < 2e-6,
                    "{activation:?}({x}) on {isa:?}: {got} for {want}"
                );
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn a_sequence_is_the_same_in_any_company(
        lengths in prop::collection::vec(1_usize..40, 1..6), threads in 1_usize..4, seed in any::<u64>()
    ) {
        let (heads, dim) = (2, 32);
        let mut rng = Rng(seed);
        let width = heads * dim;
        let rows: usize = lengths.iter().sum();
        let qkv = rng.floats(rows * 3 * width);
        for isa in Isa::available() {
            let mut all = vec![0.0; rows * width];
            encode_attention(&pool(threads, isa), heads, dim, &lengths, &qkv, &mut all).unwrap();
            let mut at = 0;
            for &length in &lengths {
                let mut alone = vec![0.0; length * width];
                let own = &qkv[at * 3 * width..][..length * 3 * width];
                encode_attention(&pool(1, isa), heads, dim, &[length], own, &mut alone).unwrap();
                prop_assert_eq!(bits(&alone), bits(&all[at * width..][..length * width]));
                at += length;
            }
        }
    }
}
