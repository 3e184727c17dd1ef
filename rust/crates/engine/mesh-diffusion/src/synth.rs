//! Models with random weights, for tests, examples and benchmarks.
//!
//! A weight is a function of its module, its tensor's name and its index, so that a model need not be stored to be compared with:
//! `scripts/diffusion_goldens.py` has diffusers compute the same ones.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::Path;

use mesh_model::safetensors::{Dtype, Planned, write};
use serde_json::{Value, json};

use crate::checkpoint::{Module, Origin, single_origins};
use crate::config::{
    Activation, AddedConfig, Family, HiddenRows, PipelineConfig, TensorShape, TextConfig,
    TinyVaeConfig, UnetBlock, UnetConfig, VaeConfig,
};
use crate::sampler::{Prediction, SamplerConfig};
use crate::tokenizer::byte_chars;

/// Value `index` of the random numbers called `name`: from -1 up to 1, exact in f32.
pub fn random(name: &str, index: u64) -> f32 {
    // FNV-1a over the name, then SplitMix64.
    let seed = name.bytes().fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    });
    let mut z = seed.wrapping_add(index.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^= z >> 31;
    (z >> 40) as f32 / (1u32 << 23) as f32 - 1.0
}

/// `count` random numbers called `name`.
pub fn randoms(name: &str, count: usize) -> Vec<f32> {
    (0..count as u64).map(|index| random(name, index)).collect()
}

/// The files `vocab.json` and `merges.txt` of a tokenizer with so many tokens: those of single bytes, fillers, and the
/// two special ones last. It merges nothing.
///
/// # Panics
/// If `tokens` are too few for all bytes.
pub fn tokenizer_files(tokens: u32) -> (Vec<u8>, &'static [u8]) {
    let of_bytes = ["", "</w>"]
        .into_iter()
        .flat_map(|ending| byte_chars().map(move |letter| format!("{letter}{ending}")));
    let mut all: Vec<String> = of_bytes.collect();
    let fillers = (tokens as usize).checked_sub(all.len() + 2);
    let fillers = fillers.expect("bytes and two special tokens fit");
    all.extend((0..fillers).map(|number| format!("filler{number}")));
    all.extend(["<|startoftext|>".to_owned(), "<|endoftext|>".to_owned()]);
    let ids: serde_json::Map<_, _> = all.into_iter().zip((0u32..).map(Value::from)).collect();
    (
        Value::Object(ids).to_string().into_bytes(),
        b"#version: 0.2\n",
    )
}

/// Writes the files of such a tokenizer into `folder`, which is created if missing.
///
/// # Errors
/// If they cannot be written.
pub fn write_tokenizer(folder: &Path, tokens: u32) -> io::Result<()> {
    let (vocab, merges) = tokenizer_files(tokens);
    fs::create_dir_all(folder)?;
    fs::write(folder.join("vocab.json"), vocab)?;
    fs::write(folder.join("merges.txt"), merges)
}

/// A tiny model of a family, with a picture's factor of 2.
pub fn tiny(family: Family) -> PipelineConfig {
    let text = |width, layers, activation, projection, rows, pad| TextConfig {
        vocab: 1000,
        positions: 77,
        width,
        layers,
        heads: width / 64,
        inner: 2 * width,
        activation,
        eps: 1e-5,
        end: 999,
        pad,
        projection,
        rows,
    };
    let block = |channels, heads, depth| UnetBlock {
        channels,
        heads,
        depth,
    };
    let (text, blocks, mid_depth, added, prediction) = match family {
        Family::Sd1 => (
            vec![text(
                128,
                2,
                Activation::QuickGelu,
                None,
                HiddenRows::Last,
                None,
            )],
            vec![block(32, 8, 1), block(64, 8, 0)],
            1,
            None,
            Prediction::Epsilon,
        ),
        Family::Sd2 => (
            vec![text(
                128,
                2,
                Activation::Gelu,
                None,
                HiddenRows::Last,
                Some(0),
            )],
            vec![block(64, 1, 1), block(128, 2, 0)],
            1,
            None,
            Prediction::VPrediction,
        ),
        Family::Xl => (
            vec![
                text(
                    64,
                    2,
                    Activation::QuickGelu,
                    None,
                    HiddenRows::Penultimate,
                    None,
                ),
                text(
                    128,
                    3,
                    Activation::Gelu,
                    Some(64),
                    HiddenRows::Penultimate,
                    Some(0),
                ),
            ],
            vec![block(64, 1, 0), block(128, 2, 2)],
            2,
            Some(AddedConfig {
                number: 8,
                inputs: 112,
            }),
            Prediction::Epsilon,
        ),
    };
    PipelineConfig {
        family,
        unet: UnetConfig {
            channels: 4,
            inputs: 4,
            sample_size: [64, 96, 128][family as usize],
            blocks,
            mid_depth,
            layers: 1,
            context: text.iter().map(|text| text.width).sum(),
            linear_projection: family != Family::Sd1,
            groups: 32,
            eps: 1e-5,
            freq_shift: 0.0,
            added,
            guidance: None,
        },
        text,
        vae: VaeConfig {
            latent: 4,
            blocks: vec![32, 64],
            layers: 1,
            groups: 32,
            sample_size: if family == Family::Xl { 1024 } else { 512 },
            scale: if family == Family::Xl {
                0.13025
            } else {
                0.18215
            },
            shift: 0.0,
            quant: true,
            attention: true,
            force_f32: true,
        },
        sampler: SamplerConfig::stable_diffusion(prediction),
        zero_empty_negative: family == Family::Xl,
    }
}

/// The same model for inpainting.
pub fn inpainting(mut config: PipelineConfig) -> PipelineConfig {
    config.unet.inputs = 2 * config.unet.channels + 1;
    config
}

/// The shape of Stable Diffusion 1.5.
pub fn stable_diffusion_1_5() -> PipelineConfig {
    let mut config = tiny(Family::Sd1);
    config.text[0] = TextConfig {
        vocab: 49408,
        width: 768,
        layers: 12,
        heads: 12,
        inner: 3072,
        end: 49407,
        ..config.text[0].clone()
    };
    let channels = [(320, 1), (640, 1), (1280, 1), (1280, 0)];
    config.unet = UnetConfig {
        blocks: channels
            .map(|(channels, depth)| UnetBlock {
                channels,
                heads: 8,
                depth,
            })
            .into(),
        layers: 2,
        context: 768,
        ..config.unet
    };
    config.vae = VaeConfig {
        blocks: vec![128, 256, 512, 512],
        layers: 2,
        ..config.vae
    };
    config
}

/// The structure of Stable Diffusion 1.5 with half its channels in the UNet and the autoencoder, so a quarter of the weights, and a
/// tiny text encoder.
pub fn half_of_stable_diffusion_1_5() -> PipelineConfig {
    let mut config = stable_diffusion_1_5();
    let tiny = tiny(Family::Sd1);
    for block in &mut config.unet.blocks {
        block.channels /= 2;
    }
    for channels in &mut config.vae.blocks {
        *channels /= 2;
    }
    config.unet.context = tiny.unet.context;
    config.text = tiny.text;
    config
}

/// A tiny autoencoder's tiny version, with a factor of 2.
pub fn tiny_vae() -> TinyVaeConfig {
    TinyVaeConfig {
        latent: 4,
        channels: 16,
        encoder: vec![1, 2],
        decoder: vec![2, 1],
        scale: 1.0,
    }
}

/// Writes the model into `folder` in diffusers' form.
///
/// # Errors
/// If writing fails.
pub fn write_folder(config: &PipelineConfig, folder: &Path, dtype: Dtype) -> io::Result<()> {
    let two = config.text.len() > 1;
    let mut index = json!({
        "_class_name": match (two, config.unet.inpaints()) {
            (false, false) => "StableDiffusionPipeline",
            (false, true) => "StableDiffusionInpaintPipeline",
            (true, false) => "StableDiffusionXLPipeline",
            (true, true) => "StableDiffusionXLInpaintPipeline",
        },
        "_diffusers_version": "0.35.2",
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    });
    if two {
        index["text_encoder_2"] = json!(["transformers", "CLIPTextModelWithProjection"]);
        index["tokenizer_2"] = json!(["transformers", "CLIPTokenizer"]);
        index["force_zeros_for_empty_prompt"] = json!(config.zero_empty_negative);
    }
    write_json(&folder.join("model_index.json"), &index)?;
    write_json(
        &folder.join("scheduler/scheduler_config.json"),
        &scheduler_json(&config.sampler),
    )?;
    for (i, text) in config.text.iter().enumerate() {
        let (module, suffix) = [(Module::TextEncoder, ""), (Module::TextEncoder2, "_2")][i.min(1)];
        let pad = if text.pad == Some(0) {
            "!"
        } else {
            "<|endoftext|>"
        };
        let special = folder.join(format!("tokenizer{suffix}/special_tokens_map.json"));
        write_json(&special, &json!({"pad_token": pad}))?;
        write_module(
            folder,
            module,
            &text_json(text),
            text.tensors(),
            "model",
            dtype,
        )?;
    }
    let stem = "diffusion_pytorch_model";
    write_module(
        folder,
        Module::Unet,
        &unet_json(&config.unet),
        config.unet.tensors(),
        stem,
        dtype,
    )?;
    write_module(
        folder,
        Module::Vae,
        &vae_json(&config.vae),
        config.vae.tensors(),
        stem,
        dtype,
    )
}

/// Writes a tiny autoencoder into `folder` in diffusers' form.
///
/// # Errors
/// If writing fails.
pub fn write_tiny_vae(config: &TinyVaeConfig, folder: &Path, dtype: Dtype) -> io::Result<()> {
    let channels = vec![config.channels; config.encoder.len()];
    let json = json!({
        "_class_name": "AutoencoderTiny",
        "act_fn": "relu",
        "decoder_block_out_channels": channels,
        "encoder_block_out_channels": channels,
        "in_channels": 3,
        "latent_channels": config.latent,
        "num_decoder_blocks": config.decoder,
        "num_encoder_blocks": config.encoder,
        "out_channels": 3,
        "scaling_factor": config.scale,
        "upsampling_scaling_factor": 2,
    });
    write_json(&folder.join("config.json"), &json)?;
    let path = folder.join("diffusion_pytorch_model.safetensors");
    write_weights(&path, "taesd", config.tensors(), dtype)
}

/// Writes the model as one file in the layout of the original programs. Its weights are those of [`write_folder`].
///
/// # Errors
/// If writing fails.
pub fn write_single(config: &PipelineConfig, path: &Path, dtype: Dtype) -> io::Result<()> {
    let mut pieces: Vec<(String, usize, Piece)> = Vec::new();
    let mut add = |config: &PipelineConfig, module: Module, tensors: Vec<TensorShape>| {
        for shape in tensors {
            let origin = single_origins(config, module, &shape.name).swap_remove(0);
            let part = origin.part.map_or(0, |(part, _)| part);
            let name = origin.name.clone();
            let module = module.name();
            pieces.push((
                name,
                part,
                Piece {
                    module,
                    shape,
                    origin,
                },
            ));
        }
    };
    // Stable Diffusion 2 does without the last layer that its file has.
    let mut text = config.text.clone();
    text[0].layers += u32::from(config.family == Family::Sd2);
    for (text, module) in text.iter().zip([Module::TextEncoder, Module::TextEncoder2]) {
        add(config, module, text.tensors());
    }
    add(config, Module::Unet, config.unet.tensors());
    add(config, Module::Vae, config.vae.tensors());
    pieces.sort_by(|a, b| (&a.0, a.1).cmp(&(&b.0, b.1)));
    let mut planned: Vec<Planned> = Vec::new();
    for (name, part, piece) in &pieces {
        if *part == 0 {
            let shape = piece
                .origin
                .shape_in_file(&piece.shape.shape)
                .swap_remove(0);
            planned.push(Planned {
                name: name.clone(),
                dtype,
                shape,
            });
        }
    }
    let mut out = BufWriter::new(File::create(path)?);
    write(&mut out, &planned, |planned, out| {
        for (_, _, piece) in pieces.iter().filter(|(name, ..)| *name == planned.name) {
            write_values(
                out,
                piece.module,
                &piece.shape,
                piece.origin.transposed,
                dtype,
            )?;
        }
        Ok(())
    })
}

/// A tensor and its place in a single file.
struct Piece {
    module: &'static str,
    shape: TensorShape,
    origin: Origin,
}

fn write_json(path: &Path, value: &Value) -> io::Result<()> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    fs::write(path, serde_json::to_vec_pretty(value)?)
}

fn write_module(
    folder: &Path,
    module: Module,
    json: &Value,
    tensors: Vec<TensorShape>,
    stem: &str,
    dtype: Dtype,
) -> io::Result<()> {
    let folder = folder.join(module.name());
    write_json(&folder.join("config.json"), json)?;
    write_weights(
        &folder.join(format!("{stem}.safetensors")),
        module.name(),
        tensors,
        dtype,
    )
}

fn write_weights(
    path: &Path,
    module: &str,
    tensors: Vec<TensorShape>,
    dtype: Dtype,
) -> io::Result<()> {
    let planned = tensors
        .into_iter()
        .map(|TensorShape { name, shape }| Planned { name, dtype, shape });
    let planned: Vec<Planned> = planned.collect();
    let mut out = BufWriter::new(File::create(path)?);
    write(&mut out, &planned, |tensor, out| {
        let shape = TensorShape {
            name: tensor.name.clone(),
            shape: tensor.shape.clone(),
        };
        write_values(out, module, &shape, false, dtype)
    })
}

/// Writes a tensor's values: about of the size that keeps a network's activations where they are.
fn write_values(
    out: &mut dyn Write,
    module: &str,
    tensor: &TensorShape,
    transposed: bool,
    dtype: Dtype,
) -> io::Result<()> {
    let name = format!("{module}/{}", tensor.name);
    let inputs: u64 = tensor.shape[1..].iter().product();
    let count: u64 = tensor.shape.iter().product();
    let (offset, scale) = match tensor.shape.len() {
        1 if tensor.name.ends_with(".weight") => (1.0, 0.2),
        1 => (0.0, 0.1),
        _ => (0.0, (3.0 / inputs as f64).sqrt() as f32),
    };
    let mut block = Vec::with_capacity(1 << 16);
    for i in 0..count {
        let index = match transposed {
            true => (i % tensor.shape[0]) * inputs + i / tensor.shape[0],
            false => i,
        };
        let value = offset + scale * random(&name, index);
        match dtype {
            Dtype::F16 => block.extend(half::f16::from_f32(value).to_le_bytes()),
            Dtype::BF16 => block.extend(half::bf16::from_f32(value).to_le_bytes()),
            _ => block.extend(value.to_le_bytes()),
        }
        if block.len() >= 1 << 15 {
            out.write_all(&block)?;
            block.clear();
        }
    }
    out.write_all(&block)
}

fn text_json(config: &TextConfig) -> Value {
    let (class, kind) = match config.projection {
        Some(_) => ("CLIPTextModelWithProjection", "clip_text_model"),
        None => ("CLIPTextModel", "clip_text_model"),
    };
    json!({
        "architectures": [class],
        "model_type": kind,
        "vocab_size": config.vocab,
        "max_position_embeddings": config.positions,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "intermediate_size": config.inner,
        "hidden_act": if config.activation == Activation::Gelu { "gelu" } else { "quick_gelu" },
        "layer_norm_eps": config.eps,
        "eos_token_id": config.end,
        "bos_token_id": config.end.saturating_sub(1),
        "projection_dim": config.projection.unwrap_or(config.width),
    })
}

fn unet_json(config: &UnetConfig) -> Value {
    let attends: Vec<bool> = config.blocks.iter().map(|block| block.depth > 0).collect();
    let down = attends.iter().map(|attends| {
        if *attends {
            "CrossAttnDownBlock2D"
        } else {
            "DownBlock2D"
        }
    });
    let up = attends.iter().rev().map(|attends| {
        if *attends {
            "CrossAttnUpBlock2D"
        } else {
            "UpBlock2D"
        }
    });
    let mut depths: Vec<u32> = config
        .blocks
        .iter()
        .map(|block| block.depth.max(1))
        .collect();
    if let Some(last) = depths.last_mut() {
        *last = config.mid_depth;
    }
    let mut json = json!({
        "_class_name": "UNet2DConditionModel",
        "act_fn": "silu",
        "attention_head_dim": config.blocks.iter().map(|block| block.heads).collect::<Vec<_>>(),
        "block_out_channels": config.blocks.iter().map(|block| block.channels).collect::<Vec<_>>(),
        "cross_attention_dim": config.context,
        "down_block_types": down.collect::<Vec<_>>(),
        "up_block_types": up.collect::<Vec<_>>(),
        "flip_sin_to_cos": true,
        "freq_shift": config.freq_shift,
        "in_channels": config.inputs,
        "out_channels": config.channels,
        "layers_per_block": config.layers,
        "norm_eps": config.eps,
        "norm_num_groups": config.groups,
        "sample_size": config.sample_size,
        "transformer_layers_per_block": depths,
        "use_linear_projection": config.linear_projection,
        "time_cond_proj_dim": config.guidance,
    });
    if let Some(added) = config.added {
        json["addition_embed_type"] = json!("text_time");
        json["addition_time_embed_dim"] = json!(added.number);
        json["projection_class_embeddings_input_dim"] = json!(added.inputs);
    }
    json
}

fn vae_json(config: &VaeConfig) -> Value {
    let all = |name: &str| vec![name.to_owned(); config.blocks.len()];
    json!({
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": config.blocks,
        "down_block_types": all("DownEncoderBlock2D"),
        "up_block_types": all("UpDecoderBlock2D"),
        "force_upcast": config.force_f32,
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": config.latent,
        "layers_per_block": config.layers,
        "mid_block_add_attention": config.attention,
        "norm_num_groups": config.groups,
        "sample_size": config.sample_size,
        "scaling_factor": config.scale,
        "use_quant_conv": config.quant,
        "use_post_quant_conv": config.quant,
    })
}

fn scheduler_json(config: &SamplerConfig) -> Value {
    let prediction = match config.prediction_type {
        Prediction::Epsilon => "epsilon",
        Prediction::VPrediction => "v_prediction",
        Prediction::Sample => "sample",
    };
    json!({
        "_class_name": "DDIMScheduler",
        "beta_start": config.beta_start,
        "beta_end": config.beta_end,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": config.num_train_timesteps,
        "prediction_type": prediction,
        "set_alpha_to_one": config.set_alpha_to_one,
        "clip_sample": config.clip_sample,
        "steps_offset": config.steps_offset,
    })
}
