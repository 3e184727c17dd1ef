//! A model in closed form, a vocabulary of bytes, and requests.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use mesh_diffusion::config::Family;
use mesh_diffusion::{
    ClipTokenizer, Conditioning, Diffuser, DiffuserInfo, Image, ImageRequest, Imaging,
    ImagingOptions, InitImage, LatentColours, LatentShape, Prompt, SamplerConfig, SamplerKind,
    TextEmbedding,
};
use mesh_engine::{Engine, StageError};

/// A model by formula.
pub(crate) struct Formula {
    pub(crate) info: DiffuserInfo,
    /// Time that a prediction takes.
    pub(crate) pause: Duration,
}

/// A prompt with this word makes the model fail.
pub(crate) const FAIL: &str = "fail";
/// A prompt with this word makes its predictions infinite.
pub(crate) const INFINITE: &str = "infinite";

impl Formula {
    pub(crate) fn new() -> Self {
        Formula {
            pause: Duration::ZERO,
            info: DiffuserInfo {
                family: "formula".to_owned(),
                default_size: 64,
                size_multiple: 8,
                min_size: 32,
                max_size: 256,
                latent_channels: 4,
                pixels_per_latent: 8,
                colours: Some(LatentColours::of(Family::Sd1)),
                inpaints: false,
                sampler: SamplerConfig::stable_diffusion(Default::default()),
                default_sampler: SamplerKind::DpmPlusPlus2M,
                default_steps: 5,
                default_guidance: 7.5,
                weight_bytes: 0,
                memory_base: 1 << 20,
                memory_per_pixel: 1 << 10,
                memory_limit: Some(40 << 20),
            },
        }
    }
}

/// One row per token: its id and its weight.
fn embed(prompt: &Prompt) -> TextEmbedding {
    let rows = prompt.ids(prompt.end).into_iter().zip(prompt.weights());
    let hidden: Vec<f32> = rows
        .flat_map(|(ids, weights)| ids.into_iter().zip(weights))
        .flat_map(|(id, weight)| [id as f32, weight])
        .collect();
    TextEmbedding {
        tokens: hidden.len() / 2,
        width: 2,
        hidden,
        pooled: Vec::new(),
    }
}

fn mean(text: &TextEmbedding) -> f32 {
    let rows = text.hidden.chunks_exact(2).map(|row| row[0] * row[1]);
    rows.sum::<f32>() / text.tokens as f32
}

impl Diffuser for Formula {
    fn info(&self) -> &DiffuserInfo {
        &self.info
    }

    fn encode(
        &mut self,
        prompt: &Prompt,
        negative: Option<&Prompt>,
    ) -> Result<Conditioning, StageError> {
        assert!(negative.is_none_or(|negative| negative.chunks.len() == prompt.chunks.len()));
        let prompt = embed(prompt);
        let bytes: Vec<u8> = prompt.hidden.chunks(2).map(|row| row[0] as u8).collect();
        let says = |word: &str| bytes.windows(3).any(|part| part == &ids(word)[..3]);
        if says(FAIL) {
            return Err(StageError::Malformed("spilt ink".to_owned()));
        }
        let mut conditioning = Conditioning {
            prompt,
            negative: negative.map(embed),
            beside: Vec::new(),
        };
        if says(INFINITE) {
            conditioning.prompt.hidden[0] = f32::INFINITY;
        }
        Ok(conditioning)
    }

    fn denoise(
        &mut self,
        latents: &[f32],
        shape: LatentShape,
        timestep: f32,
        conditioning: &Conditioning,
        guidance: f32,
    ) -> Result<Vec<f32>, StageError> {
        assert_eq!(latents.len(), shape.len());
        let beside = if self.info.inpaints {
            shape.len() + shape.len() / 4
        } else {
            0
        };
        assert_eq!(conditioning.beside.len(), beside);
        std::thread::sleep(self.pause);
        let mut angle = mean(&conditioning.prompt);
        if let Some(negative) = &conditioning.negative {
            angle = mean(negative) + guidance * (angle - mean(negative));
        }
        let value = |(place, x): (usize, &f32)| {
            let wave = (0.01 * angle + 0.001 * timestep + place as f32).cos();
            let beside = conditioning.beside.get(place).unwrap_or(&0.0);
            0.5 * x / (1.0 + 0.1 * x.abs()) + 0.3 * wave + 0.2 * beside
        };
        Ok(latents.iter().enumerate().map(value).collect())
    }

    fn decode(&mut self, latents: &[f32], shape: LatentShape) -> Result<Image, StageError> {
        let (width, height) = (shape.width * 8, shape.height * 8);
        let pixel = |at: usize| {
            let (row, column) = (at / width / 8, at % width / 8);
            let value = |c: usize| latents[(c * shape.height + row) * shape.width + column];
            [0, 1, 2].map(|c| (128.0 + 60.0 * value(c)) as u8)
        };
        Ok(Image {
            width: width as u32,
            height: height as u32,
            rgb: (0..width * height).flat_map(pixel).collect(),
        })
    }

    fn encode_image(
        &mut self,
        image: &Image,
        mask: Option<&[u8]>,
        noise: &[f32],
    ) -> Result<Vec<f32>, StageError> {
        let mean = |at: usize| {
            let at = at * 7 % image.rgb.len();
            match mask.is_some_and(|mask| mask[at / 3] >= 128) {
                true => 0.0,
                false => f32::from(image.rgb[at]) / 127.5 - 1.0,
            }
        };
        let sample = |(at, noise): (usize, &f32)| mean(at) + 0.1 * noise;
        Ok(noise.iter().enumerate().map(sample).collect())
    }
}

/// Tokens of an ASCII word as bytes; that of the last letter is another one, with the mark of a word's end.
fn ids(word: &str) -> Vec<u8> {
    let printable = word.bytes().map(|byte| byte - b'!');
    printable.collect()
}

/// A vocabulary of single bytes: printable ASCII comes first, so the token of a letter is its distance from `!`.
pub(crate) fn tokenizer() -> Arc<ClipTokenizer> {
    let printable = |byte: u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    let plain = (0..=255u8).filter(|&byte| printable(byte)).map(char::from);
    let others = (0..68).filter_map(|i| char::from_u32(0x100 + i));
    let bytes: Vec<char> = plain.chain(others).collect();
    let mut vocab: HashMap<String, usize> = HashMap::new();
    for (id, byte) in bytes.iter().enumerate() {
        vocab.insert(byte.to_string(), id);
        vocab.insert(format!("{byte}</w>"), 256 + id);
    }
    vocab.insert("<|startoftext|>".to_owned(), 512);
    vocab.insert("<|endoftext|>".to_owned(), 513);
    let vocab = serde_json::to_vec(&vocab).unwrap();
    Arc::new(ClipTokenizer::from_vocab(&vocab, b"#version: 0.2\n").unwrap())
}

pub(crate) fn request(prompt: &str) -> ImageRequest {
    ImageRequest {
        id: prompt.to_owned(),
        prompt: prompt.to_owned(),
        negative_prompt: "blurry".to_owned(),
        width: 64,
        height: 48,
        steps: 5,
        guidance: 4.0,
        seed: 9,
        sampler: SamplerKind::EulerAncestral,
        karras: false,
        init: None,
        previews: false,
        resume: None,
        deadline: None,
    }
}

/// A request that starts from a picture.
pub(crate) fn from_picture(strength: f32, mask: bool) -> ImageRequest {
    let rgb = (0..64 * 48 * 3).map(|i| (i * 31 % 256) as u8).collect();
    let (width, height) = (64, 48);
    let mask = mask.then(|| {
        (0..64 * 48)
            .map(|i| if i % 64 < 20 { 0 } else { 255 })
            .collect()
    });
    ImageRequest {
        init: Some(InitImage {
            image: Image { width, height, rgb },
            strength,
            mask,
        }),
        ..request("a cat")
    }
}

pub(crate) fn imaging() -> Imaging<Formula> {
    imaging_of(Formula::new())
}

fn imaging_of(model: Formula) -> Imaging<Formula> {
    Imaging::new(model, tokenizer(), ImagingOptions::default())
}

pub(crate) fn engine() -> Engine<Imaging<Formula>> {
    engine_of(Formula::new())
}

pub(crate) fn engine_of(model: Formula) -> Engine<Imaging<Formula>> {
    Engine::start_with("images", |_| Ok(imaging_of(model))).unwrap()
}
