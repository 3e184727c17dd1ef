//! Mixtures of experts against their definition, and rows against each other.

mod support;

use mesh_kernels::{
    Activation, Expert, ExpertMatrix, Experts, Isa, KernelError, MixtureLayer, Pool, PoolOptions,
    QMatrix, RmsNorm, WeightType, mixture, rms_norm, rms_norm_columns,
};
use support::{Rng, bits, dequantized, error, random_rows};

const WIDTH: usize = 256;
const WIDE: usize = 512;
const COUNT: usize = 12;

fn pool(threads: usize, isa: Isa) -> Pool {
    Pool::with_options(PoolOptions {
        threads,
        isa: Some(isa),
        ..PoolOptions::default()
    })
}

/// A layer and its weights as floats.
struct Layer {
    norm: Vec<f32>,
    router: QMatrix,
    experts: Experts,
    scores: Vec<f32>,
    floats: Vec<[Vec<f32>; 3]>,
    activation: Activation,
    router_bias: Option<Vec<f32>>,
    /// Of each expert those of gate, up and down.
    biases: Vec<[Vec<f32>; 3]>,
}

impl Layer {
    /// Experts with gate, up and down of these types.
    fn new(types: [WeightType; 3], rng: &mut Rng) -> Layer {
        Layer::made(types, false, rng)
    }

    /// As [`Layer::new`], with biases and gpt-oss's activation.
    fn biased(types: [WeightType; 3], rng: &mut Rng) -> Layer {
        let router_bias = rng.floats(COUNT);
        Layer {
            activation: Activation::ClampedSwiglu,
            router_bias: Some(router_bias),
            ..Layer::made(types, true, rng)
        }
    }

    fn made(types: [WeightType; 3], biased: bool, rng: &mut Rng) -> Layer {
        let scores: Vec<f32> = rng.floats(COUNT * WIDTH).iter().map(|x| x / 4.0).collect();
        let bytes: Vec<u8> = scores.iter().flat_map(|x| x.to_le_bytes()).collect();
        let router = QMatrix::pack(WeightType::F32, COUNT, WIDTH, &bytes).expect("packs");
        let shapes = [(WIDE, WIDTH), (WIDE, WIDTH), (WIDTH, WIDE)];
        let (mut experts, mut floats, mut biases) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..COUNT {
            let made = [0, 1, 2].map(|i| {
                let (ty, (n, k)) = (types[i], shapes[i]);
                let rows = random_rows(ty, n, k, rng);
                let matrix = QMatrix::pack(ty, n, k, &rows).expect("packs");
                (matrix, dequantized(ty, n, k, &rows))
            });
            let [(gate, g), (up, u), (down, d)] = made;
            let mut matrices = [gate, up, down].map(ExpertMatrix::from);
            if biased {
                // Large enough that gates and ups go over their bounds.
                let bias = shapes.map(|(n, _)| rng.floats(n).iter().map(|x| 9.0 * x).collect());
                for (matrix, bias) in matrices.iter_mut().zip(&bias) {
                    matrix.bias = Some(Vec::clone(bias));
                }
                biases.push(bias);
            }
            let [gate, up, down] = matrices;
            experts.push(Expert { gate, up, down });
            floats.push([g, u, d]);
        }
        Layer {
            norm: (0..WIDTH).map(|i| 0.5 + i as f32 / WIDTH as f32).collect(),
            router,
            experts: Experts::new(experts).expect("one shape"),
            scores,
            floats,
            activation: Activation::Silu,
            router_bias: None,
            biases,
        }
    }

    fn options(&self, used: usize, normalised: bool) -> MixtureLayer<'_> {
        MixtureLayer {
            norm: RmsNorm {
                weight: &self.norm,
                eps: 1e-5,
            },
            router: &self.router,
            router_bias: self.router_bias.as_deref(),
            experts: &self.experts,
            activation: self.activation,
            used,
            normalised,
            scale: 0.5,
            shared: None,
        }
    }

    fn run(&self, pool: &Pool, x: &[f32], used: usize, normalised: bool) -> Vec<f32> {
        let mut out = x.to_vec();
        let layer = self.options(used, normalised);
        mixture(pool, &layer, &mut out, x.len() / WIDTH).expect("shapes fit");
        out
    }

    /// The sum that the layer adds to one row, by its definition.
    fn plain(&self, x: &[f32], used: usize, normalised: bool) -> Vec<f64> {
        let times = |w: &[f32], x: &[f64]| -> Vec<f64> {
            let dot = |w: &[f32]| w.iter().zip(x).map(|(w, x)| f64::from(*w) * x).sum();
            w.chunks_exact(x.len()).map(dot).collect()
        };
        let mean = x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / x.len() as f64;
        let factor = 1.0 / (mean + 1e-5).sqrt();
        let normed = x.iter().zip(&self.norm);
        let normed: Vec<f64> = normed
            .map(|(x, w)| f64::from(*x) * factor * f64::from(*w))
            .collect();
        let plus = |mut sums: Vec<f64>, bias: Option<&Vec<f32>>| {
            let bias = bias.into_iter().flatten();
            sums.iter_mut()
                .zip(bias)
                .for_each(|(sum, bias)| *sum += f64::from(*bias));
            sums
        };
        let scores = plus(times(&self.scores, &normed), self.router_bias.as_ref());
        let mut order: Vec<usize> = (0..COUNT).collect();
        order.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]));
        let among = if normalised {
            &order[..used]
        } else {
            &order[..]
        };
        let total: f64 = among.iter().map(|expert| scores[*expert].exp()).sum();
        let mut out = vec![0.0; WIDTH];
        for expert in &order[..used] {
            let [gate, up, down] = &self.floats[*expert];
            let bias = |matrix: usize| self.biases.get(*expert).map(|biases| &biases[matrix]);
            let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
            let gates = plus(times(gate, &normed), bias(0));
            let pairs = gates.into_iter().zip(plus(times(up, &normed), bias(1)));
            let gated = |(gate, up): (f64, f64)| match self.activation {
                Activation::ClampedSwiglu => {
                    let gate = gate.min(7.0);
                    gate * sigmoid(1.702 * gate) * (up.clamp(-7.0, 7.0) + 1.0)
                }
                _ => gate * sigmoid(gate) * up,
            };
            let middle: Vec<f64> = pairs.map(gated).collect();
            let weight = 0.5 * scores[*expert].exp() / total;
            let down = plus(times(down, &middle), bias(2));
            out.iter_mut()
                .zip(down)
                .for_each(|(out, y)| *out += weight * y);
        }
        out
    }
}

#[test]
fn a_mixture_agrees_with_its_definition() {
    let mut rng = Rng(5);
    for (types, most) in [
        ([WeightType::F32; 3], 1e-4),
        ([WeightType::F16, WeightType::F16, WeightType::BF16], 1e-4),
        ([WeightType::Q4_K; 3], 0.1),
        // Gate and up in different layouts cannot be one pass.
        ([WeightType::Q4_0, WeightType::Q6_K, WeightType::Q8_0], 0.1),
        ([WeightType::F32, WeightType::Q8_0, WeightType::F32], 0.1),
    ] {
        let layer = Layer::new(types, &mut rng);
        let x = rng.floats(9 * WIDTH);
        for (used, normalised) in [(1, true), (3, true), (4, false), (COUNT, false)] {
            for isa in Isa::available() {
                let found = layer.run(&pool(2, isa), &x, used, normalised);
                let added: Vec<f32> = found.iter().zip(&x).map(|(out, x)| out - x).collect();
                let rows = x.chunks_exact(WIDTH);
                let want: Vec<f64> = rows
                    .flat_map(|x| layer.plain(x, used, normalised))
                    .collect();
                let off = error(&added, &want);
                assert!(off < most, "{types:?}, {used} experts, on {isa:?}: {off}");
            }
        }
    }
}

#[test]
fn biases_and_the_clamped_activation_agree_with_their_definition() {
    let mut rng = Rng(15);
    for (types, most) in [
        ([WeightType::F32; 3], 1e-4),
        ([WeightType::MXFP4; 3], 0.1),
        ([WeightType::F16, WeightType::Q8_0, WeightType::F32], 0.1),
    ] {
        let layer = Layer::biased(types, &mut rng);
        let x = rng.floats(9 * WIDTH);
        for isa in Isa::available() {
            let found = layer.run(&pool(2, isa), &x, 4, true);
            let added: Vec<f32> = found.iter().zip(&x).map(|(out, x)| out - x).collect();
            let rows = x.chunks_exact(WIDTH);
            let want: Vec<f64> = rows.flat_map(|x| layer.plain(x, 4, true)).collect();
            let off = error(&added, &want);
            assert!(off < most, "{types:?} on {isa:?}: {off}");
        }
    }
}

#[test]
fn a_row_depends_on_no_other_row_and_on_no_thread() {
    let mut rng = Rng(6);
    for (types, biased) in [
        ([WeightType::Q4_K; 3], false),
        ([WeightType::F16; 3], false),
        ([WeightType::MXFP4; 3], true),
        ([WeightType::Q4_0, WeightType::Q5_0, WeightType::Q8_0], true),
    ] {
        let layer = Layer::made(types, biased, &mut rng);
        // More rows than are computed at once.
        let x = rng.floats(530 * WIDTH);
        for isa in Isa::available() {
            let together = layer.run(&pool(2, isa), &x, 3, true);
            let other = layer.run(&pool(1, isa), &x, 3, true);
            assert_eq!(bits(&together), bits(&other), "{types:?} on {isa:?}");
            for row in [0, 1, 17, 511, 512, 529] {
                let range = row * WIDTH..(row + 1) * WIDTH;
                let alone = layer.run(&pool(2, isa), &x[range.clone()], 3, true);
                assert_eq!(
                    bits(&together[range]),
                    bits(&alone),
                    "{types:?}, row {row} on {isa:?}"
                );
            }
        }
    }
}

#[test]
fn equal_scores_go_to_the_first_experts_and_absurd_ones_harm_nobody() {
    let mut rng = Rng(7);
    let mut layer = Layer::new([WeightType::Q8_0; 3], &mut rng);
    let x = rng.floats(2 * WIDTH);
    // All scores are equal.
    let zeros = vec![0; COUNT * WIDTH * 4];
    layer.router = QMatrix::pack(WeightType::F32, COUNT, WIDTH, &zeros).expect("packs");
    let pool = pool(2, Isa::detect());
    let found = layer.run(&pool, &x, 2, true);
    layer.scores = vec![0.0; COUNT * WIDTH];
    let added: Vec<f32> = found.iter().zip(&x).map(|(out, x)| out - x).collect();
    let want: Vec<f64> = x
        .chunks_exact(WIDTH)
        .flat_map(|x| layer.plain(x, 2, true))
        .collect();
    assert!(
        error(&added, &want) < 0.1,
        "the stable order of the definition"
    );

    // No numbers in the router or in a row reach no other row.
    for absurd in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX] {
        let mut bytes = zeros.clone();
        bytes[..4].copy_from_slice(&absurd.to_le_bytes());
        layer.router = QMatrix::pack(WeightType::F32, COUNT, WIDTH, &bytes).expect("packs");
        for normalised in [true, false] {
            let found = layer.run(&pool, &x, 3, normalised);
            assert!(found.iter().all(|x| x.is_finite()), "{absurd}");
        }
        let mut bad = x.clone();
        bad[5] = absurd;
        let found = layer.run(&pool, &bad, 3, true);
        let alone = layer.run(&pool, &x[WIDTH..], 3, true);
        assert_eq!(bits(&found[WIDTH..]), bits(&alone));
    }
}

#[test]
fn shapes_that_do_not_fit_are_named() {
    let mut rng = Rng(8);
    let layer = Layer::new([WeightType::Q8_0; 3], &mut rng);
    let pool = pool(1, Isa::detect());
    let mut x = rng.floats(WIDTH);
    for used in [0, COUNT + 1] {
        let error = mixture(&pool, &layer.options(used, true), &mut x, 1);
        assert!(
            matches!(error, Err(KernelError::OutOfRange { .. })),
            "{error:?}"
        );
    }
    let error = mixture(&pool, &layer.options(1, true), &mut x, 2);
    assert!(
        matches!(error, Err(KernelError::Length { .. })),
        "{error:?}"
    );
    assert!(mixture(&pool, &layer.options(1, true), &mut [], 0).is_ok());
    assert!(Experts::new(Vec::new()).is_err());
    let matrix = |n, k| {
        let rows = vec![0; n * k * 4];
        QMatrix::pack(WeightType::F32, n, k, &rows).expect("packs")
    };
    let odd = |up, down| Expert {
        gate: matrix(32, 16).into(),
        up: matrix(up, 16).into(),
        down: matrix(16, down).into(),
    };
    assert!(Experts::new(vec![odd(32, 32)]).is_ok());
    let mut biased = odd(32, 32);
    biased.down.bias = Some(vec![0.0; 32]);
    let error = Experts::new(vec![biased]);
    assert!(matches!(error, Err(KernelError::Length { .. })));
    for (up, down) in [(16, 32), (32, 16)] {
        let error = Experts::new(vec![odd(32, 32), odd(up, down)]);
        assert!(matches!(error, Err(KernelError::Mismatch { .. })));
    }
}

#[test]
fn columns_are_normed_as_rows_of_their_own() {
    let mut rng = Rng(9);
    let pool = pool(2, Isa::detect());
    let (x, weight) = (rng.floats(3 * 100), rng.floats(48));
    let mut found = x.clone();
    rms_norm_columns(&pool, &mut found, 100, 20..68, &weight, 1e-5).expect("fits");
    for (found, x) in found.chunks(100).zip(x.chunks(100)) {
        let mut want = vec![0.0; 48];
        rms_norm(&pool, &x[20..68], &weight, 1e-5, &mut want).expect("fits");
        assert_eq!(bits(&found[20..68]), bits(&want));
        assert_eq!((&found[..20], &found[68..]), (&x[..20], &x[68..]));
    }
    for (stride, columns) in [(100, 80..128), (100, 20..60), (7, 0..48)] {
        assert!(rms_norm_columns(&pool, &mut found, stride, columns, &weight, 1e-5).is_err());
    }
}
