//! Tiny models with random weights against diffusers' and transformers' results, which `scripts/diffusion_goldens.py` writes.

use std::path::{Path, PathBuf};

use mesh_diffusion::checkpoint::Checkpoint;
use mesh_diffusion::config::Family;
use mesh_diffusion::noise::Noise;
use mesh_diffusion::sampler::{Plan, PlanOptions, Sampler};
use mesh_diffusion::{
    Chunk, Conditioning, Diffuser, Image, LatentShape, Prompt, SamplerKind, TextEmbedding, synth,
};
use mesh_engine::StageError;
use mesh_model::safetensors::{Dtype, Safetensors};

use crate::{Device, LoadError, Offload, Options, Precision, TchDiffuser, WeightForm};

const FAMILIES: [(&str, Family); 3] = [
    ("sd1", Family::Sd1),
    ("sd2", Family::Sd2),
    ("xl", Family::Xl),
];
const SHAPE: LatentShape = LatentShape {
    channels: 4,
    height: 9,
    width: 12,
};
const TIMESTEP: f32 = 481.0;
const GUIDANCE: f32 = 2.5;
/// Each how many rows of hidden states are in the file.
const EVERY: usize = 7;

fn goldens() -> Safetensors {
    Safetensors::open(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/golden.safetensors"))
        .unwrap()
}

fn golden(name: &str) -> Vec<f32> {
    goldens().tensor(name).unwrap().to_f32().unwrap()
}

/// A folder with the tiny models.
struct Models(tempfile::TempDir);

impl Models {
    fn new() -> Self {
        Models(tempfile::tempdir().unwrap())
    }

    fn folder(&self, family: Family) -> PathBuf {
        let path = self.0.path().join("model");
        synth::write_folder(&synth::tiny(family), &path, Dtype::F32).unwrap();
        path
    }

    fn single(&self, family: Family) -> PathBuf {
        let path = self.0.path().join("model.safetensors");
        synth::write_single(&synth::tiny(family), &path, Dtype::F32).unwrap();
        path
    }

    fn tiny_vae(&self) -> PathBuf {
        let path = self.0.path().join("taesd");
        synth::write_tiny_vae(&synth::tiny_vae(), &path, Dtype::F32).unwrap();
        path
    }
}

fn options() -> Options {
    Options {
        device: Device::Cpu,
        threads: 2,
        ..Options::default()
    }
}

fn load(path: &Path, options: &Options) -> TchDiffuser {
    TchDiffuser::load(&Checkpoint::open(path).unwrap().into(), options).unwrap()
}

fn chunk(tokens: &[u32]) -> Chunk {
    Chunk {
        tokens: tokens.into(),
        weights: vec![1.0; tokens.len()],
    }
}

fn prompt() -> Prompt {
    Prompt {
        chunks: vec![chunk(&[5, 77, 340, 995, 12]), chunk(&[800, 3])],
        start: 998,
        end: 999,
    }
}

fn text(name: &str, width: usize, pooled: usize) -> TextEmbedding {
    TextEmbedding {
        hidden: synth::randoms(&format!("input/{name}"), 77 * width),
        tokens: 77,
        width,
        pooled: synth::randoms(&format!("input/{name} pooled"), pooled),
    }
}

fn conditioning(model: &TchDiffuser, family: Family) -> Conditioning {
    let width = model.config.unet.context as usize;
    let pooled = if family == Family::Xl { 64 } else { 0 };
    Conditioning {
        prompt: text("prompt", width, pooled),
        negative: Some(text("negative", width, pooled)),
        beside: Vec::new(),
    }
}

fn latents(scale: f32) -> Vec<f32> {
    let latents = synth::randoms("input/latents", SHAPE.len());
    latents.into_iter().map(|x| scale * x).collect()
}

fn picture() -> Image {
    let (width, height) = (24, 16);
    let values = synth::randoms("input/picture", 3 * 24 * 16);
    Image {
        width,
        height,
        rgb: values
            .into_iter()
            .map(|x| ((x + 1.0) * 127.0) as u8)
            .collect(),
    }
}

fn assert_close(what: &str, found: &[f32], expected: &[f32], tolerance: f32) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let most = found
        .iter()
        .zip(expected)
        .map(|(a, b)| (a - b).abs())
        .fold(0.0, f32::max);
    println!("{what}: largest difference {most:e}");
    assert!(
        most <= tolerance,
        "{what}: largest difference {most}, {tolerance} is allowed"
    );
}

/// Compares the bytes of a picture with those of the file: rounding may differ by one.
fn assert_bytes(what: &str, found: &[u8], name: &str) {
    let goldens = goldens();
    let expected = goldens
        .tensor(name)
        .unwrap()
        .data
        .read()
        .unwrap()
        .into_owned();
    assert_eq!(found.len(), expected.len(), "{what}");
    let most = found
        .iter()
        .zip(&expected)
        .map(|(a, b)| a.abs_diff(*b))
        .max();
    println!("{what}: a byte differs by {most:?}");
    assert!(most <= Some(1), "{what}: a byte differs by {most:?}");
    // A picture of one colour would prove nothing.
    assert!(expected.iter().max() > expected.iter().min().map(|least| least + 50).as_ref());
}

#[test]
fn prompts_are_encoded_as_by_transformers() {
    for (name, family) in FAMILIES {
        let models = Models::new();
        let mut model = load(&models.folder(family), &options());
        let encoded = model.encode(&prompt(), None).unwrap().prompt;
        assert_eq!(
            (encoded.tokens, encoded.width),
            (2 * 77, model.config.unet.context as usize)
        );
        let rows: Vec<f32> = encoded
            .hidden
            .chunks(encoded.width)
            .step_by(EVERY)
            .flatten()
            .copied()
            .collect();
        assert_close(
            &format!("{name} hidden rows"),
            &rows,
            &golden(&format!("{name}.hidden")),
            1e-4,
        );
        if family == Family::Xl {
            assert_close("xl pooled row", &encoded.pooled, &golden("xl.pooled"), 1e-4);
        }
    }
}

#[test]
fn noise_is_predicted_as_by_diffusers() {
    for (name, family) in FAMILIES {
        let models = Models::new();
        let path = models.folder(family);
        for guidance_in_turn in [false, true] {
            let mut model = load(
                &path,
                &Options {
                    guidance_in_turn,
                    ..options()
                },
            );
            let both = conditioning(&model, family);
            let alone = Conditioning {
                negative: None,
                ..both.clone()
            };
            let mut predict = |conditioning| {
                model
                    .denoise(&latents(1.7), SHAPE, TIMESTEP, conditioning, GUIDANCE)
                    .unwrap()
            };
            let what = format!("{name} in turn {guidance_in_turn}");
            assert_close(
                &format!("{what} predicted"),
                &predict(&alone),
                &golden(&format!("{name}.predicted")),
                1e-4,
            );
            assert_close(
                &format!("{what} guided"),
                &predict(&both),
                &golden(&format!("{name}.guided")),
                3e-4,
            );
        }
    }
}

#[test]
fn pictures_are_decoded_and_encoded_as_by_diffusers() {
    for (name, family) in FAMILIES {
        let models = Models::new();
        let mut model = load(&models.folder(family), &options());
        let image = model.decode(&latents(0.5), SHAPE).unwrap();
        assert_eq!((image.width, image.height), (24, 18));
        assert_bytes(name, &image.rgb, &format!("{name}.decoded"));

        let encoded = model
            .encode_image(&picture(), None, &synth::randoms("input/noise", 4 * 8 * 12))
            .unwrap();
        assert_close(
            &format!("{name} encoded"),
            &encoded,
            &golden(&format!("{name}.encoded")),
            1e-4,
        );
    }
}

#[test]
fn a_seed_gives_the_picture_that_it_gives_in_diffusers() {
    let kinds = [
        SamplerKind::DpmPlusPlus2M,
        SamplerKind::Ddim,
        SamplerKind::Euler,
    ];
    for ((name, family), kind) in FAMILIES.into_iter().zip(kinds) {
        let models = Models::new();
        let mut model = load(&models.folder(family), &options());
        let one = |tokens: &[u32]| Prompt {
            chunks: vec![chunk(tokens)],
            ..prompt()
        };
        let conditioning = model
            .encode(&one(&[5, 77, 340, 995, 12]), Some(&one(&[7])))
            .unwrap();
        let plan = PlanOptions {
            kind,
            karras: false,
            steps: 5,
            strength: None,
        };
        let plan = Plan::new(&model.info().sampler, plan).unwrap();
        let shape = model.info().latent_shape(48, 32);
        let mut sampler = Sampler::from_noise(plan, Noise::new(9).normal(shape.len()));
        while let Some(timestep) = sampler.timestep() {
            let predicted = model
                .denoise(&sampler.scaled(), shape, timestep, &conditioning, 4.0)
                .unwrap();
            sampler.advance(&predicted, None).unwrap();
        }
        let image = model.decode(sampler.latents(), shape).unwrap();
        assert_bytes(name, &image.rgb, &format!("{name}.painted"));
    }
}

#[test]
fn models_for_inpainting_paint_over_a_mask_as_diffusers_does() {
    let cases = [
        ("sd1", Family::Sd1, SamplerKind::DpmPlusPlus2M, 1.0),
        ("sd2", Family::Sd2, SamplerKind::Ddim, 0.6),
    ];
    let (width, height) = (48, 32);
    let values = synth::randoms("input/inpainting", 3 * 48 * 32);
    let picture = Image {
        width,
        height,
        rgb: values
            .into_iter()
            .map(|x| ((x + 1.0) * 127.0) as u8)
            .collect(),
    };
    let painted = |column: u32| column >= 20;
    let mask: Vec<u8> = (0..width * height)
        .map(|at| if painted(at % width) { 255 } else { 0 })
        .collect();
    for (name, family, kind, strength) in cases {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model");
        let config = synth::inpainting(synth::tiny(family));
        synth::write_folder(&config, &path, Dtype::F32).unwrap();
        let mut model = load(&path, &options());
        assert!(model.info().inpaints);
        let one = |tokens: &[u32]| Prompt {
            chunks: vec![chunk(tokens)],
            ..prompt()
        };
        let mut conditioning = model
            .encode(&one(&[5, 77, 340, 995, 12]), Some(&one(&[7])))
            .unwrap();
        let plan = PlanOptions {
            kind,
            karras: false,
            steps: 5,
            strength: Some(strength),
        };
        let plan = Plan::new(&model.info().sampler, plan).unwrap();
        let shape = model.info().latent_shape(width, height);
        let mut noise = Noise::new(9);
        let mut fresh = || noise.normal(shape.len());
        let mut sampler = match strength < 1.0 {
            true => {
                let latents = model.encode_image(&picture, None, &fresh()).unwrap();
                Sampler::from_image(plan, &latents, &fresh()).unwrap()
            }
            false => Sampler::from_noise(plan, fresh()),
        };
        let masked = model.encode_image(&picture, Some(&mask), &fresh()).unwrap();
        // A mask's latent is that of its first pixel, and a latent has two pixels in each direction.
        let places = 0..shape.height * shape.width;
        let plane = places.map(|at| f32::from(painted(2 * (at % shape.width) as u32)));
        let without = model.denoise(&sampler.scaled(), shape, TIMESTEP, &conditioning, GUIDANCE);
        assert!(
            matches!(&without, Err(StageError::Malformed(text)) if text.contains("takes 9 channels")),
            "{without:?}"
        );
        conditioning.beside = plane.chain(masked).collect();
        while let Some(timestep) = sampler.timestep() {
            let predicted = model
                .denoise(&sampler.scaled(), shape, timestep, &conditioning, 4.0)
                .unwrap();
            sampler.advance(&predicted, None).unwrap();
        }
        let image = model.decode(sampler.latents(), shape).unwrap();
        assert_bytes(name, &image.rgb, &format!("{name}.inpainted"));
    }
}

/// Results of a model: conditioning, a guided prediction, a picture and latents.
fn all_of(model: &mut TchDiffuser, family: Family) -> (Conditioning, Vec<f32>, Image, Vec<f32>) {
    let both = conditioning(model, family);
    let encoded = model.encode(&prompt(), Some(&prompt())).unwrap();
    let predicted = model
        .denoise(&latents(1.7), SHAPE, TIMESTEP, &both, GUIDANCE)
        .unwrap();
    let image = model.decode(&latents(0.5), SHAPE).unwrap();
    let noise = synth::randoms("input/noise", 4 * 8 * 12);
    let back = model.encode_image(&picture(), None, &noise).unwrap();
    (encoded, predicted, image, back)
}

#[test]
fn weights_as_in_the_file_and_offloaded_ones_compute_the_same_bits() {
    for (name, family) in FAMILIES {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model");
        synth::write_folder(&synth::tiny(family), &path, Dtype::F16).unwrap();
        let single = folder.path().join("model.safetensors");
        synth::write_single(&synth::tiny(family), &single, Dtype::F16).unwrap();
        let mut sizes = Vec::new();
        let mut expected = None;
        for (weights, offload) in [
            (WeightForm::Full, Offload::None),
            (WeightForm::Auto, Offload::None),
            (WeightForm::File, Offload::None),
            (WeightForm::File, Offload::Modules),
            (WeightForm::File, Offload::Sequential),
        ] {
            let options = Options {
                weights,
                offload,
                ..options()
            };
            for path in [&path, &single] {
                let mut model = load(path, &options);
                let all = all_of(&mut model, family);
                // Parts come back.
                assert!(all == all_of(&mut model, family), "{name} {options:?}");
                let expected = expected.get_or_insert_with(|| all.clone());
                assert!(all == *expected, "{name} {options:?}");
            }
            let checkpoint = Checkpoint::open(&path).unwrap();
            sizes.push(options.weight_bytes(&checkpoint));
        }
        assert!(sizes.is_sorted_by(|a, b| a > b), "{name}: {sizes:?}");

        let checkpoint = Checkpoint::open(&path).unwrap();
        let within = |memory| {
            let found = options().within(&checkpoint, memory);
            (found.weights, found.offload)
        };
        let expected = [
            (WeightForm::Auto, Offload::None),
            (WeightForm::File, Offload::None),
            (WeightForm::File, Offload::Modules),
            (WeightForm::File, Offload::Sequential),
        ];
        let found: Vec<_> = sizes[1..].iter().map(|&size| within(size)).collect();
        assert_eq!(found, expected, "{name}");
        assert_eq!(within(0), (WeightForm::File, Offload::Sequential));
    }
}

#[test]
fn a_file_that_changes_under_an_offloaded_model_is_an_error() {
    let models = Models::new();
    let path = models.folder(Family::Sd1);
    let offload = Offload::Sequential;
    let mut model = load(
        &path,
        &Options {
            offload,
            ..options()
        },
    );
    model.decode(&latents(0.5), SHAPE).unwrap();
    let file = path.join("vae/diffusion_pytorch_model.safetensors");
    let file = std::fs::OpenOptions::new().write(true).open(file).unwrap();
    file.set_len(20_000).unwrap();
    let message = model.decode(&latents(0.5), SHAPE).unwrap_err().to_string();
    assert!(
        message.contains("vae") && message.contains("diffusion_pytorch_model.safetensors"),
        "{message}"
    );
}

#[test]
fn weights_of_8_bits_are_close_to_f32() {
    for (name, family) in FAMILIES {
        let models = Models::new();
        let weights = WeightForm::Int8;
        let path = models.folder(family);
        let mut model = load(
            &path,
            &Options {
                weights,
                ..options()
            },
        );
        let (encoded, _, image, _) = all_of(&mut model, family);
        let rows: Vec<f32> = encoded
            .prompt
            .hidden
            .chunks(encoded.prompt.width)
            .step_by(EVERY)
            .flatten()
            .copied()
            .collect();
        let alone = Conditioning {
            negative: None,
            ..conditioning(&model, family)
        };
        let predicted = model
            .denoise(&latents(1.7), SHAPE, TIMESTEP, &alone, 1.0)
            .unwrap();
        for (what, found) in [("hidden", &rows), ("predicted", &predicted)] {
            let expected = golden(&format!("{name}.{what}"));
            let energy = |values: &mut dyn Iterator<Item = f32>| values.map(|x| x * x).sum::<f32>();
            let error = energy(&mut found.iter().zip(&expected).map(|(a, b)| a - b));
            let relative = (error / energy(&mut expected.iter().copied())).sqrt();
            println!("{name} {what}: relative error {relative:e}");
            assert!(
                0.0 < relative && relative < 0.03,
                "{name} {what}: {relative}"
            );
        }
        assert_bytes(name, &image.rgb, &format!("{name}.decoded"));
    }
}

#[test]
fn the_tiny_autoencoder_computes_what_diffusers_does() {
    let models = Models::new();
    let tiny_vae = Some(models.tiny_vae());
    let mut model = load(
        &models.folder(Family::Sd1),
        &Options {
            tiny_vae,
            ..options()
        },
    );
    let shape = [
        1,
        SHAPE.channels as i64,
        SHAPE.height as i64,
        SHAPE.width as i64,
    ];
    let tensor = model
        .tensor(&latents(2.0), &shape, tch::Kind::Float)
        .unwrap();
    assert_close(
        "decoded",
        &model.pixels(&tensor).unwrap(),
        &golden("taesd.pixels"),
        1e-4,
    );
    let encoded = model
        .encode_image(&picture(), None, &[0.0; 4 * 8 * 12])
        .unwrap();
    assert_close("encoded", &encoded, &golden("taesd.encoded"), 1e-4);
}

#[test]
fn a_single_file_computes_the_same_bits_as_the_folder() {
    for (name, family) in FAMILIES {
        let models = Models::new();
        let mut folder = load(&models.folder(family), &options());
        let mut single = load(&models.single(family), &options());
        assert_eq!(single.config, folder.config, "{name}");
        let both = conditioning(&folder, family);
        let mut results = [&mut folder, &mut single].map(|model| {
            let encoded = model.encode(&prompt(), Some(&prompt())).unwrap();
            let predicted = model
                .denoise(&latents(1.7), SHAPE, TIMESTEP, &both, GUIDANCE)
                .unwrap();
            (
                encoded,
                predicted,
                model.decode(&latents(0.5), SHAPE).unwrap(),
            )
        });
        let [first, second] = &mut results;
        assert!(first == second, "{name}");
    }
}

#[test]
fn large_pictures_are_made_of_tiles() {
    let models = Models::new();
    let path = models.folder(Family::Sd1);
    let shape = LatentShape {
        channels: 4,
        height: 40,
        width: 56,
    };
    let latents = synth::randoms("input/large", shape.len());
    let decode = |tile| {
        load(&path, &Options { tile, ..options() })
            .decode(&latents, shape)
            .unwrap()
    };
    let (whole, tiled) = (decode(128), decode(32));
    assert_eq!(
        (whole.width, whole.height, whole.rgb.len()),
        (tiled.width, tiled.height, tiled.rgb.len())
    );
    // Norms over a tile differ from those over the picture, here by little.
    let differences: u64 = whole
        .rgb
        .iter()
        .zip(&tiled.rgb)
        .map(|(a, b)| u64::from(a.abs_diff(*b)))
        .sum();
    let mean = differences as f64 / whole.rgb.len() as f64;
    assert!(mean > 0.0 && mean < 8.0, "mean difference {mean}");
}

#[test]
fn an_empty_negative_prompt_of_xl_is_all_zeros() {
    let models = Models::new();
    let mut model = load(&models.folder(Family::Xl), &options());
    let empty = Prompt {
        chunks: vec![Chunk::default(); 2],
        ..prompt()
    };
    let negative = model
        .encode(&prompt(), Some(&empty))
        .unwrap()
        .negative
        .unwrap();
    assert!(
        negative
            .hidden
            .iter()
            .chain(&negative.pooled)
            .all(|&x| x == 0.0)
    );
    assert_eq!(negative.tokens, 2 * 77);
}

#[test]
fn bf16_is_close_to_f32() {
    let models = Models::new();
    let precision = Precision::Bf16;
    let mut model = match TchDiffuser::load(
        &Checkpoint::open(&models.folder(Family::Sd1))
            .unwrap()
            .into(),
        &Options {
            precision,
            ..options()
        },
    ) {
        Ok(model) => model,
        // An old CPU.
        Err(LoadError::Precision { .. }) => return,
        Err(error) => panic!("{error}"),
    };
    let alone = Conditioning {
        negative: None,
        ..conditioning(&model, Family::Sd1)
    };
    let predicted = model
        .denoise(&latents(1.7), SHAPE, TIMESTEP, &alone, 1.0)
        .unwrap();
    assert_close("bf16", &predicted, &golden("sd1.predicted"), 0.1);
}

#[test]
fn malformed_calls_are_errors_and_the_model_works_on() {
    let models = Models::new();
    let mut model = load(&models.folder(Family::Sd1), &options());
    let both = conditioning(&model, Family::Sd1);
    let short = model.denoise(&[0.0; 5], SHAPE, TIMESTEP, &both, GUIDANCE);
    assert!(matches!(short, Err(StageError::Malformed(_))), "{short:?}");
    let narrow = Conditioning {
        prompt: text("prompt", 64, 0),
        negative: None,
        beside: Vec::new(),
    };
    let narrow = model.denoise(&latents(1.0), SHAPE, TIMESTEP, &narrow, GUIDANCE);
    assert!(
        matches!(narrow, Err(StageError::Malformed(_))),
        "{narrow:?}"
    );
    let unknown = Prompt {
        start: 5000,
        ..prompt()
    };
    let unknown = model.encode(&unknown, None);
    assert!(
        matches!(unknown, Err(StageError::NoSuchToken { token: 5000, .. })),
        "{unknown:?}"
    );
    // More than any address space.
    let side = 1 << 22;
    let pixels = tch::Tensor::f_zeros([1, 4, 1, 1], (tch::Kind::Float, tch::Device::Cpu)).unwrap();
    let failed = model
        .decode_whole(&pixels.f_expand([1, 4, side, side], false).unwrap())
        .unwrap_err();
    let message = StageError::from(failed).to_string();
    assert!(
        message.contains("out of memory") && message.contains("use a smaller picture"),
        "{message}"
    );
    assert!(
        model
            .denoise(&latents(1.0), SHAPE, TIMESTEP, &both, GUIDANCE)
            .is_ok()
    );
}

#[test]
fn a_device_that_does_not_exist_is_named() {
    let models = Models::new();
    let checkpoint = Checkpoint::open(&models.folder(Family::Sd1))
        .unwrap()
        .into();
    let device = Device::Gpu(63);
    let error = TchDiffuser::load(
        &checkpoint,
        &Options {
            device,
            ..options()
        },
    )
    .unwrap_err();
    assert!(error.to_string().contains("no device cuda:63"), "{error}");
}
