//! Names of tensors in files, from the names of diffusers and transformers.
//!
//! The layout of single files is that of the programs that the models were trained with (`ldm` and `sgm`); its block
//! numbers are a running index over residual blocks and changes of resolution.

use crate::config::UnetConfig;

/// A place where a tensor may lie in a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Origin {
    /// Name in the file.
    pub(crate) name: String,
    /// Its number among the equal parts of the file's tensor along the first dimension, and their number.
    pub(crate) part: Option<(usize, usize)>,
    /// True if a matrix lies in the file with both dimensions exchanged.
    pub(crate) transposed: bool,
}

impl Origin {
    fn named(name: impl Into<String>) -> Self {
        Origin {
            name: name.into(),
            part: None,
            transposed: false,
        }
    }

    /// The same name.
    pub(super) fn plain(name: &str) -> Vec<Origin> {
        vec![Origin::named(name)]
    }

    /// Shapes that the file's tensor may have, if the network wants `shape`; the usual one first. A matrix may be stored as a
    /// convolution of kernel 1.
    pub(crate) fn shape_in_file(&self, shape: &[u64]) -> Vec<Vec<u64>> {
        let mut stored = shape.to_vec();
        if self.transposed {
            stored.reverse();
        }
        if let (Some((_, parts)), Some(first)) = (self.part, stored.first_mut()) {
            *first *= parts as u64;
        }
        let conv = (stored.len() == 2 && self.part.is_none()).then(|| [&*stored, &[1, 1]].concat());
        let matrix = stored
            .strip_suffix(&[1, 1])
            .filter(|rest| rest.len() == 2)
            .map(<[u64]>::to_vec);
        [Some(stored.clone()), conv, matrix]
            .into_iter()
            .flatten()
            .collect()
    }
}

/// Places of a tensor of an autoencoder in a folder. Folders of before 2023 have other names in the middle's attention.
pub(super) fn vae_origins(name: &str) -> Vec<Origin> {
    let old = [
        ("to_q", "query"),
        ("to_k", "key"),
        ("to_v", "value"),
        ("to_out.0", "proj_attn"),
    ];
    let renamed = old
        .iter()
        .filter(|(new, _)| name.contains(&format!(".{new}.")));
    let renamed = renamed.map(|(new, old)| Origin::named(name.replace(new, old)));
    std::iter::once(Origin::named(name))
        .chain(renamed)
        .collect()
}

/// Place of a tensor of the autoencoder in a single file, for `resolutions` resolutions.
pub(super) fn single_vae(name: &str, resolutions: usize) -> Vec<Origin> {
    let words: Vec<&str> = name.split('.').collect();
    let number = |word: &str| word.parse::<usize>().unwrap_or(0);
    let rest = |from: usize| {
        words[from..]
            .join(".")
            .replace("conv_shortcut", "nin_shortcut")
    };
    let place = match *words.as_slice() {
        [side, "down_blocks", i, "resnets", j, ..] => {
            format!("{side}.down.{i}.block.{j}.{}", rest(5))
        }
        [side, "down_blocks", i, "downsamplers", _, ..] => {
            format!("{side}.down.{i}.downsample.{}", rest(5))
        }
        // Numbered from the finest.
        [side, "up_blocks", i, "resnets", j, ..] => {
            format!(
                "{side}.up.{}.block.{j}.{}",
                resolutions - 1 - number(i),
                rest(5)
            )
        }
        [side, "up_blocks", i, "upsamplers", _, ..] => {
            format!(
                "{side}.up.{}.upsample.{}",
                resolutions - 1 - number(i),
                rest(5)
            )
        }
        [side, "mid_block", "resnets", j, ..] => {
            format!("{side}.mid.block_{}.{}", number(j) + 1, rest(4))
        }
        [side, "mid_block", "attentions", _, ..] => {
            let rest = rest(4)
                .replace("group_norm", "norm")
                .replace("to_out.0", "proj_out");
            format!("{side}.mid.attn_1.{}", rest.replace("to_", ""))
        }
        [side, "conv_norm_out", ..] => format!("{side}.norm_out.{}", rest(2)),
        _ => name.into(),
    };
    Origin::plain(&format!("first_stage_model.{place}"))
}

/// Place of a tensor of the UNet in a single file.
pub(super) fn single_unet(name: &str, config: &UnetConfig) -> Vec<Origin> {
    let words: Vec<&str> = name.split('.').collect();
    let number = |word: &str| word.parse::<usize>().unwrap_or(0);
    let layers = config.layers as usize;
    let rest = |from: usize| words[from..].join(".");
    let resnet = |from: usize| {
        let (part, rest) = (words[from], words[from + 1..].join("."));
        let part = match part {
            "norm1" => "in_layers.0",
            "conv1" => "in_layers.2",
            "time_emb_proj" => "emb_layers.1",
            "norm2" => "out_layers.0",
            "conv2" => "out_layers.3",
            _ => "skip_connection",
        };
        format!("{part}.{rest}")
    };
    let place = match *words.as_slice() {
        ["time_embedding", "linear_1", ..] => format!("time_embed.0.{}", rest(2)),
        ["time_embedding", "linear_2", ..] => format!("time_embed.2.{}", rest(2)),
        ["time_embedding", "cond_proj", ..] => format!("time_embed.cond_proj.{}", rest(2)),
        ["add_embedding", "linear_1", ..] => format!("label_emb.0.0.{}", rest(2)),
        ["add_embedding", "linear_2", ..] => format!("label_emb.0.2.{}", rest(2)),
        ["conv_in", ..] => format!("input_blocks.0.0.{}", rest(1)),
        ["conv_norm_out", ..] => format!("out.0.{}", rest(1)),
        ["conv_out", ..] => format!("out.2.{}", rest(1)),
        ["down_blocks", i, part, j, ..] => {
            let at = 1 + number(i) * (layers + 1) + number(j);
            match part {
                "resnets" => format!("input_blocks.{at}.0.{}", resnet(4)),
                "attentions" => format!("input_blocks.{at}.1.{}", rest(4)),
                _ => format!(
                    "input_blocks.{}.0.op.{}",
                    (number(i) + 1) * (layers + 1),
                    rest(5)
                ),
            }
        }
        ["mid_block", "resnets", j, ..] => format!("middle_block.{}.{}", 2 * number(j), resnet(3)),
        ["mid_block", "attentions", _, ..] => format!("middle_block.1.{}", rest(3)),
        ["up_blocks", i, part, j, ..] => {
            let at = number(i) * (layers + 1) + number(j);
            match part {
                "resnets" => format!("output_blocks.{at}.0.{}", resnet(4)),
                "attentions" => format!("output_blocks.{at}.1.{}", rest(4)),
                _ => {
                    let block = config.blocks.iter().rev().nth(number(i));
                    let behind = if block.is_some_and(|block| block.depth > 0) {
                        2
                    } else {
                        1
                    };
                    let at = number(i) * (layers + 1) + layers;
                    format!("output_blocks.{at}.{behind}.{}", rest(4))
                }
            }
        }
        _ => name.into(),
    };
    Origin::plain(&format!("model.diffusion_model.{place}"))
}

/// Place of a tensor of OpenCLIP's text encoder in a single file, below `prefix`.
pub(super) fn single_open_clip(name: &str, prefix: &str) -> Vec<Origin> {
    let name = name.strip_prefix("text_model.").unwrap_or(name);
    let words: Vec<&str> = name.split('.').collect();
    let mut part = None;
    let mut transposed = false;
    let place = match *words.as_slice() {
        ["embeddings", "token_embedding", ..] => "token_embedding.weight".into(),
        ["embeddings", ..] => "positional_embedding".into(),
        ["final_layer_norm", kind] => format!("ln_final.{kind}"),
        ["text_projection", ..] => {
            transposed = true;
            "text_projection".into()
        }
        ["encoder", "layers", layer, ref inner @ ..] => {
            let inner = match *inner {
                ["layer_norm1", kind] => format!("ln_1.{kind}"),
                ["layer_norm2", kind] => format!("ln_2.{kind}"),
                ["mlp", "fc1", kind] => format!("mlp.c_fc.{kind}"),
                ["mlp", "fc2", kind] => format!("mlp.c_proj.{kind}"),
                ["self_attn", "out_proj", kind] => format!("attn.out_proj.{kind}"),
                // The three matrices lie in one, below each other.
                ["self_attn", matrix, kind] => {
                    let at = ["q_proj", "k_proj", "v_proj"]
                        .iter()
                        .position(|name| *name == matrix);
                    part = at.map(|at| (at, 3));
                    format!("attn.in_proj_{kind}")
                }
                _ => inner.join("."),
            };
            format!("transformer.resblocks.{layer}.{inner}")
        }
        _ => name.into(),
    };
    vec![Origin {
        name: format!("{prefix}{place}"),
        part,
        transposed,
    }]
}
