//! The expert that computes every row of a mixture, beside those that are chosen.

mod support;

use mesh_kernels::{
    Activation, Expert, Experts, FeedForward, Gate, KernelError, MixtureLayer, Pool, QMatrix,
    RmsNorm, SharedExpert, WeightType, feed_forward, linear, mixture, rms_norm,
};
use support::{Rng, bits, random_rows};

const WIDTH: usize = 64;
const WIDE: usize = 96;

fn matrix(ty: WeightType, n: usize, k: usize, rng: &mut Rng) -> QMatrix {
    QMatrix::pack(ty, n, k, &random_rows(ty, n, k, rng)).expect("packs")
}

fn expert(ty: WeightType, wide: usize, rng: &mut Rng) -> Expert {
    Expert {
        gate: matrix(ty, wide, WIDTH, rng).into(),
        up: matrix(ty, wide, WIDTH, rng).into(),
        down: matrix(ty, WIDTH, wide, rng).into(),
    }
}

/// A mixture of four experts beside a shared one.
struct Layer {
    norm: Vec<f32>,
    router: QMatrix,
    experts: Experts,
    shared: Expert,
    score: QMatrix,
}

impl Layer {
    fn new(ty: WeightType, rng: &mut Rng) -> Layer {
        let experts = (0..4).map(|_| expert(ty, 32, rng)).collect();
        Layer {
            norm: (0..WIDTH).map(|i| 0.5 + i as f32 / 64.0).collect(),
            router: matrix(WeightType::F32, 4, WIDTH, rng),
            experts: Experts::new(experts).expect("one shape"),
            shared: expert(ty, WIDE, rng),
            score: matrix(WeightType::F32, 1, WIDTH, rng),
        }
    }

    fn gate(&self) -> Gate<'_> {
        Gate {
            gate: &self.shared.gate.weights,
            up: &self.shared.up.weights,
            activation: Activation::Silu,
        }
    }

    fn norm(&self) -> RmsNorm<'_> {
        RmsNorm {
            weight: &self.norm,
            eps: 1e-5,
        }
    }

    fn shared(&self, gated: bool) -> SharedExpert<'_> {
        SharedExpert {
            gate: self.gate(),
            down: &self.shared.down.weights,
            score: gated.then_some(&self.score),
            scale: 0.25,
        }
    }

    fn with<'a>(&'a self, shared: Option<SharedExpert<'a>>) -> MixtureLayer<'a> {
        MixtureLayer {
            norm: self.norm(),
            router: &self.router,
            router_bias: None,
            experts: &self.experts,
            activation: Activation::Silu,
            used: 2,
            normalised: true,
            scale: 0.25,
            shared,
        }
    }

    fn run(&self, pool: &Pool, shared: Option<SharedExpert<'_>>, x: &[f32]) -> Vec<f32> {
        let mut out = x.to_vec();
        mixture(pool, &self.with(shared), &mut out, x.len() / WIDTH).expect("it fits");
        out
    }
}

#[test]
fn its_output_is_that_of_a_dense_layer_times_its_factors() {
    let mut rng = Rng(11);
    let pool = Pool::new(2);
    for ty in [WeightType::F32, WeightType::Q8_0] {
        let layer = Layer::new(ty, &mut rng);
        let x = rng.floats(5 * WIDTH);
        let without = layer.run(&pool, None, &x);
        let mut dense = x.clone();
        let dense_layer = FeedForward {
            norm: layer.norm(),
            gate: layer.gate(),
            down: &layer.shared.down.weights,
            post_norm: None,
        };
        feed_forward(&pool, &dense_layer, &mut dense, 5).expect("it fits");
        let mut normed = vec![0.0; x.len()];
        rms_norm(&pool, &x, &layer.norm, 1e-5, &mut normed).expect("it fits");
        let mut scores = vec![0.0; 5];
        linear(
            &pool,
            &layer.score,
            &normed,
            5,
            &mut scores,
            &Default::default(),
        )
        .expect("fits");
        for gated in [false, true] {
            let found = layer.run(&pool, Some(layer.shared(gated)), &x);
            for (at, found) in found.iter().enumerate() {
                let factor = match gated {
                    true => 0.25 / (1.0 + (-scores[at / WIDTH]).exp()),
                    false => 0.25,
                };
                let expected = without[at] + factor * (dense[at] - x[at]);
                assert!((found - expected).abs() < 1e-5, "{found} is not {expected}");
            }
        }
    }
}

#[test]
fn rows_stay_independent_of_each_other_and_of_threads() {
    let mut rng = Rng(12);
    let layer = Layer::new(WeightType::Q4_0, &mut rng);
    let x = rng.floats(530 * WIDTH);
    let shared = Some(layer.shared(true));
    let together = layer.run(&Pool::new(2), shared, &x);
    assert_eq!(bits(&together), bits(&layer.run(&Pool::new(1), shared, &x)));
    for row in [0, 127, 128, 511, 512, 529] {
        let range = row * WIDTH..(row + 1) * WIDTH;
        let alone = layer.run(&Pool::new(2), shared, &x[range.clone()]);
        assert_eq!(bits(&together[range]), bits(&alone), "row {row}");
    }
}

#[test]
fn matrices_that_do_not_fit_are_named_and_nothing_is_written() {
    let mut rng = Rng(13);
    let layer = Layer::new(WeightType::F32, &mut rng);
    let pool = Pool::new(1);
    let narrow = matrix(WeightType::F32, WIDTH, 32, &mut rng);
    let two = matrix(WeightType::F32, 2, WIDTH, &mut rng);
    let fits = layer.shared(true);
    let down = SharedExpert {
        down: &narrow,
        ..fits
    };
    let score = SharedExpert {
        score: Some(&two),
        ..fits
    };
    let gate = SharedExpert {
        gate: Gate {
            gate: &narrow,
            ..fits.gate
        },
        ..fits
    };
    for shared in [down, score, gate] {
        let mut x = vec![1.0; WIDTH];
        let error = mixture(&pool, &layer.with(Some(shared)), &mut x, 1);
        assert!(
            matches!(error, Err(KernelError::Mismatch { .. })),
            "{error:?}"
        );
        assert_eq!(x, [1.0; WIDTH]);
    }
}
