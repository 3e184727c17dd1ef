//! Every instruction set gives the results of its group, bit for bit: hashes of the results of most operators.
//!
//! Under an emulator (`make test-isa`, `make test-arm`) they tell whether a CPU without the newer sets, or of
//! another architecture, computes the same. A change that is meant to change results replaces the hashes by
//! those in the failure's message.

use mesh_kernels::{
    Activation, Attention, EightBit, FeedForward, Gate, Isa, KvCache, KvFormat, KvSegment, KvShape,
    Linear, PackOptions, Pool, PoolOptions, QMatrix, Residual, RmsNorm, Rope, RopeOptions,
    RopeStyle, WeightType, add_rms_norm, attention, encode_attention, feed_forward, layer_norm,
    linear, rms_norm,
};

use crate::support::{Rng, groups, random_rows};

/// Name, hash where products are rounded, hash where they are fused with the addition.
type Golden = (&'static str, u64, u64);

const GOLDEN: [Golden; 26] = [
    ("F32", 0xc992_b237_9c65_05d3, 0xa07b_8626_f510_34b0),
    ("F16", 0xcf17_9905_7a60_7f2e, 0xb213_ffeb_6546_e79e),
    ("BF16", 0x2681_7d46_a1a2_7935, 0xa36b_9403_8d45_70bc),
    ("Q4_0", 0x985e_8106_798d_a128, 0x503e_ef15_8484_8d0e),
    ("Q4_1", 0x0c06_e14f_c69b_c1cd, 0x94c3_8daa_c922_f030),
    ("Q5_0", 0xc777_8196_7002_3745, 0x69df_480d_1c4c_07ee),
    ("Q5_1", 0xa91f_0db6_22a3_f98f, 0xff4b_eb7a_f563_7316),
    ("Q8_0", 0x6a37_5877_9450_95bd, 0xffcf_d5f4_3bd0_1985),
    ("Q4_K", 0xf079_6c23_4b7f_ad09, 0xf385_71d7_9080_a9e9),
    ("Q5_K", 0x41bf_b47d_7f83_8aae, 0xa90f_bdab_7dcb_29cf),
    ("Q6_K", 0xe22b_564d_41b5_4610, 0xcd75_47ea_ccdb_d3bf),
    ("Q4_1 coded", 0x72db_73eb_6c67_e773, 0x165c_cfd6_5e86_ea7e),
    (
        "Q8_0 in 6 bits",
        0x7e7e_a872_116f_af6e,
        0xd862_c130_228c_4531,
    ),
    (
        "Q8_0 in 5 bits",
        0x23a4_c863_b2dc_7b56,
        0x2a0c_5edb_af03_985f,
    ),
    ("Q4_0 coded", 0x214b_51ff_417e_09a3, 0xb6af_425a_6628_3dd9),
    ("SiLU", 0x56dd_d46a_b967_2316, 0xebb7_2b71_8b2e_8f98),
    ("GELU of tanh", 0xfc1e_03c0_16e3_a27d, 0x1291_06f7_d1b7_e70e),
    ("GELU", 0x810c_b877_7f3e_3959, 0x981b_4584_5935_e354),
    ("ReLU", 0x32b1_dc74_aab2_34aa, 0x207b_fd1e_4fec_de88),
    (
        "clamped SwiGLU",
        0x2436_8267_e601_6ae2,
        0xee9a_c63f_0a88_4546,
    ),
    ("RMS norm", 0x1cb6_0388_a181_cd54, 0xa496_ff91_d931_5f2c),
    ("layer norm", 0xbe28_0a0d_2998_04e5, 0xef54_9f22_864e_70aa),
    (
        "attention, f16",
        0x2f96_84f1_9bda_a873,
        0xf598_8929_97c0_b46f,
    ),
    (
        "attention, f32",
        0xa9a5_a65a_3d15_e210,
        0xb4e4_d735_ee68_d3ee,
    ),
    (
        "attention with sinks",
        0xba9e_d678_08ba_d69c,
        0x8a20_6807_bd99_341b,
    ),
    (
        "attention of encoders",
        0x1858_0150_cdf7_117d,
        0x185e_52c1_897d_cdff,
    ),
];

/// Results by name.
type Results = Vec<(&'static str, u64)>;

#[test]
fn each_group_gives_its_results() {
    let mut failures = Vec::new();
    for isa in Isa::available() {
        let pool = Pool::with_options(PoolOptions {
            threads: 2,
            isa: Some(isa),
            ..PoolOptions::default()
        });
        let mut got = products(&pool);
        got.extend(fused(&pool));
        got.extend(norms(&pool));
        got.extend(attentions(&pool));
        assert_eq!(got.len(), GOLDEN.len());
        let before = failures.len();
        for ((name, hash), (wanted, rounded, fused)) in got.into_iter().zip(GOLDEN) {
            assert_eq!(name, wanted);
            if hash
                != if isa.rounds_products() {
                    rounded
                } else {
                    fused
                }
            {
                failures.push(format!("{} gives {hash:#018x} for {name}", isa.name()));
            }
        }
        if failures.len() == before {
            // scripts/emulated_kernels.sh looks for this line.
            println!("{}: as its group", isa.name());
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

/// FNV-1a over the bits.
fn hash(values: &[f32]) -> u64 {
    values
        .iter()
        .flat_map(|v| v.to_bits().to_le_bytes())
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        })
}

/// Tiles of 8, 4 and 1 rows, or 4, 4, 4 and 1; a last panel that is not full.
const ROWS: usize = 13;

fn products(pool: &Pool) -> Results {
    let types = [
        ("F32", WeightType::F32),
        ("F16", WeightType::F16),
        ("BF16", WeightType::BF16),
        ("Q4_0", WeightType::Q4_0),
        ("Q4_1", WeightType::Q4_1),
        ("Q5_0", WeightType::Q5_0),
        ("Q5_1", WeightType::Q5_1),
        ("Q8_0", WeightType::Q8_0),
        ("Q4_K", WeightType::Q4_K),
        ("Q5_K", WeightType::Q5_K),
        ("Q6_K", WeightType::Q6_K),
    ];
    let exact = types.map(|(name, ty)| (name, ty, PackOptions::default()));
    let compact = |q8_0| PackOptions {
        coded_scales: true,
        q8_0,
    };
    let compact = [
        ("Q4_1 coded", WeightType::Q4_1, compact(EightBit::Keep)),
        ("Q8_0 in 6 bits", WeightType::Q8_0, compact(EightBit::Six)),
        ("Q8_0 in 5 bits", WeightType::Q8_0, compact(EightBit::Five)),
        ("Q4_0 coded", WeightType::Q4_0, compact(EightBit::Keep)),
    ];
    let (n, k) = (37, 512);
    let mut rng = Rng(1);
    exact
        .into_iter()
        .chain(compact)
        .map(|(name, ty, options)| {
            let rows = random_rows(ty, n, k, &mut rng);
            let matrix = QMatrix::pack_with(pool, ty, n, k, &rows, options).expect("packs");
            let mut out = vec![0.0; ROWS * n];
            linear(
                pool,
                &matrix,
                &rng.floats(ROWS * k),
                ROWS,
                &mut out,
                &Linear::default(),
            )
            .expect("fits");
            (name, hash(&out))
        })
        .collect()
}

/// Products with all that can be fused into them.
fn fused(pool: &Pool) -> Results {
    let (n, k) = (64, 96);
    let mut rng = Rng(2);
    let mut pack = |n, k| {
        let rows = random_rows(WeightType::Q4_1, n, k, &mut rng);
        QMatrix::pack(WeightType::Q4_1, n, k, &rows).expect("packs")
    };
    let (gate, up, down) = (pack(n, k), pack(n, k), pack(k, n));
    let weight = rng.floats(k);
    let (bias, x) = (rng.floats(n), rng.floats(ROWS * k));
    let norm = RmsNorm {
        weight: &weight,
        eps: 1e-5,
    };
    [
        ("SiLU", Activation::Silu),
        ("GELU of tanh", Activation::GeluTanh),
        ("GELU", Activation::Gelu),
        ("ReLU", Activation::Relu),
        ("clamped SwiGLU", Activation::ClampedSwiglu),
    ]
    .into_iter()
    .map(|(name, activation)| {
        let mut out = vec![0.25; ROWS * n];
        let options = Linear {
            norm: Some(norm),
            bias: Some(&bias),
            activation: Some(activation),
            residual: Residual::InPlace,
        };
        linear(pool, &gate, &x, ROWS, &mut out, &options).expect("fits");
        let layer = FeedForward {
            norm,
            gate: Gate {
                gate: &gate,
                up: &up,
                activation,
            },
            down: &down,
            post_norm: Some(norm),
        };
        let mut rows = x.clone();
        feed_forward(pool, &layer, &mut rows, ROWS).expect("fits");
        out.extend(rows);
        (name, hash(&out))
    })
    .collect()
}

fn norms(pool: &Pool) -> Results {
    let k = 77;
    let mut rng = Rng(3);
    let (x, weight, bias) = (rng.floats(ROWS * k), rng.floats(k), rng.floats(k));
    let mut out = vec![0.0; x.len()];
    rms_norm(pool, &x, &weight, 1e-5, &mut out).expect("whole rows");
    add_rms_norm(pool, &x, &weight, 1e-5, &mut out).expect("whole rows");
    let mut layer = x;
    layer_norm(pool, &mut layer, &weight, &bias, 1e-5).expect("whole rows");
    vec![("RMS norm", hash(&out)), ("layer norm", hash(&layer))]
}

fn attentions(pool: &Pool) -> Results {
    let mut rng = Rng(4);
    let (heads, kv_heads, dim, rows) = (8, 2, 64, 150);
    let rope = Rope::new(&RopeOptions {
        style: RopeStyle::Halves,
        dim,
        base: 10_000.0,
        scale: 1.0,
        factors: None,
        positions: rows + 1,
    })
    .expect("an even dimension");
    let norm = rng.floats(dim);
    let plain = Attention {
        heads,
        scale: None,
        window: Some(90),
        rope: Some(&rope),
        q_norm: Some(&norm),
        k_norm: None,
        eps: 1e-6,
        sinks: None,
    };
    let width = (heads + 2 * kv_heads) * dim;
    let (prompt, next) = (rng.floats(rows * width), rng.floats(width));
    let sinks = [-1.0, 0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 100.0];
    let with_sinks = Attention {
        sinks: Some(&sinks),
        ..plain
    };
    let mut results: Results = [
        ("attention, f16", KvFormat::F16, plain),
        ("attention, f32", KvFormat::F32, plain),
        ("attention with sinks", KvFormat::F32, with_sinks),
    ]
    .into_iter()
    .map(|(name, format, spec)| {
        let mut cache = KvCache::new(KvShape {
            layers: 1,
            slots: 1,
            context: rows + 1,
            kv_heads,
            head_dim: dim,
            value_dim: dim,
            format,
        })
        .expect("sane dimensions");
        let mut step = |position, rows, qkv: &[f32]| {
            let mut out = vec![0.0; rows * heads * dim];
            let segments = [KvSegment {
                slot: 0,
                position,
                rows,
            }];
            attention(pool, &spec, &mut cache, 0, &segments, qkv, &mut out).expect("fits");
            out
        };
        let mut out = step(0, rows, &prompt);
        out.extend(step(rows, 1, &next));
        (name, hash(&out))
    })
    .collect();
    let (heads, dim, lengths) = (3, 32, [1, 17, 40]);
    let rows: usize = lengths.iter().sum();
    let mut out = vec![0.0; rows * heads * dim];
    encode_attention(
        pool,
        heads,
        dim,
        &lengths,
        &rng.floats(3 * out.len()),
        &mut out,
    )
    .expect("fits");
    results.push(("attention of encoders", hash(&out)));
    results
}

#[test]
fn every_type_gives_the_same_bits_within_a_group() {
    let (n, k) = (37, 512);
    let mut rng = Rng(5);
    for ty in WeightType::ALL {
        let rows = random_rows(ty, n, k, &mut rng);
        let matrix = QMatrix::pack(ty, n, k, &rows).expect("packs");
        let x = rng.floats(ROWS * k);
        for group in groups() {
            let results = group.iter().map(|&isa| {
                let pool = Pool::with_options(PoolOptions {
                    threads: 1,
                    isa: Some(isa),
                    ..PoolOptions::default()
                });
                let mut out = vec![0.0; ROWS * n];
                linear(&pool, &matrix, &x, ROWS, &mut out, &Linear::default()).expect("fits");
                hash(&out)
            });
            let results: Vec<u64> = results.collect();
            let same = results.windows(2).all(|pair| pair[0] == pair[1]);
            assert!(same, "{ty:?} on {group:?}: {results:x?}");
        }
    }
}
