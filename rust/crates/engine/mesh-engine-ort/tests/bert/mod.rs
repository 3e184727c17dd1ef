//! Small random encoders on disk, and their vectors by definition, in f64.

use std::collections::HashMap;
use std::fs::File;
use std::io::Write;
use std::path::Path;

use mesh_model::safetensors::{Dtype, Planned, write};
use serde_json::json;

#[derive(Debug, Clone)]
pub(crate) struct Tiny {
    pub(crate) kind: &'static str,
    pub(crate) hidden: usize,
    pub(crate) heads: usize,
    pub(crate) activation: &'static str,
    pub(crate) cls: bool,
    pub(crate) normalise: bool,
    /// Prefix of the tensors' names.
    pub(crate) prefix: &'static str,
}

impl Default for Tiny {
    fn default() -> Self {
        Tiny {
            kind: "bert",
            hidden: 64,
            heads: 2,
            activation: "gelu",
            cls: false,
            normalise: false,
            prefix: "",
        }
    }
}

const VOCAB: usize = 40;
const WIDE: usize = 48;
const LAYERS: usize = 2;
const POSITIONS: usize = 24;

pub(crate) struct Reference {
    tiny: Tiny,
    tensors: HashMap<String, (Vec<usize>, Vec<f64>)>,
}

impl Tiny {
    /// Writes the model's files to `folder`.
    pub(crate) fn write(&self, folder: &Path) -> Reference {
        let hidden = self.hidden;
        let config = json!({
            "model_type": self.kind, "hidden_size": hidden, "num_hidden_layers": LAYERS,
            "num_attention_heads": self.heads, "intermediate_size": WIDE, "vocab_size": VOCAB,
            "max_position_embeddings": POSITIONS, "type_vocab_size": 2, "layer_norm_eps": 1e-5,
            "hidden_act": self.activation, "pad_token_id": 1,
        });
        let module = |path: &str, kind: &str| json!({"path": path, "type": format!("sentence_transformers.models.{kind}")});
        let mut modules = vec![module("", "Transformer"), module("1_Pooling", "Pooling")];
        if self.normalise {
            modules.push(module("2_Normalize", "Normalize"));
        }
        let pooling =
            json!({"pooling_mode_cls_token": self.cls, "pooling_mode_mean_tokens": !self.cls});
        let mut vocab: serde_json::Map<String, serde_json::Value> =
            (2..VOCAB).map(|i| (format!("w{i}"), json!(i))).collect();
        vocab.insert("[UNK]".into(), json!(0));
        vocab.insert("w1".into(), json!(1));
        let special = |name: &str, id: u32| json!({"id": name, "ids": [id], "tokens": [name]});
        let tokenizer = json!({
            "version": "1.0",
            "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "[UNK]"},
            "pre_tokenizer": {"type": "Whitespace"},
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "w2", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
                    {"SpecialToken": {"id": "w3", "type_id": 0}}],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
                "special_tokens": {"w2": special("w2", 2), "w3": special("w3", 3)},
            },
        });
        std::fs::create_dir_all(folder.join("1_Pooling")).unwrap();
        for (name, value) in [
            ("config.json", config),
            ("modules.json", json!(modules)),
            ("1_Pooling/config.json", pooling),
            ("tokenizer.json", tokenizer),
        ] {
            std::fs::write(folder.join(name), value.to_string()).unwrap();
        }
        let tensors = self.tensors();
        let planned: Vec<Planned> = tensors
            .iter()
            .map(|(name, (shape, _))| Planned {
                name: format!("{}{name}", self.prefix),
                dtype: Dtype::F32,
                shape: shape.iter().map(|&n| n as u64).collect(),
            })
            .collect();
        let mut file = File::create(folder.join("model.safetensors")).unwrap();
        write(&mut file, &planned, |tensor, out: &mut dyn Write| {
            let (_, data) = &tensors[&tensor.name[self.prefix.len()..]];
            data.iter()
                .try_for_each(|x| out.write_all(&(*x as f32).to_le_bytes()))
        })
        .unwrap();
        Reference {
            tiny: self.clone(),
            tensors,
        }
    }

    fn tensors(&self) -> HashMap<String, (Vec<usize>, Vec<f64>)> {
        let hidden = self.hidden;
        let mut state = 7_u64;
        let mut tensors = HashMap::new();
        let mut add = |name: String, shape: &[usize]| {
            let count = shape.iter().product();
            let data = (0..count).map(|_| {
                state = state
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1_442_695_040_888_963_407);
                // Rounded to f32, the format of the file.
                f64::from(((state >> 40) as f32 / (1 << 23) as f32 - 1.0) * 0.4)
            });
            tensors.insert(name, (shape.to_vec(), data.collect()));
        };
        for (name, rows) in [("word", VOCAB), ("position", POSITIONS), ("token_type", 2)] {
            add(
                format!("embeddings.{name}_embeddings.weight"),
                &[rows, hidden],
            );
        }
        let mut norms = vec!["embeddings.LayerNorm".to_owned()];
        for layer in 0..LAYERS {
            let at = |part: &str| format!("encoder.layer.{layer}.{part}");
            for (part, outputs, inputs) in [
                ("attention.self.query", hidden, hidden),
                ("attention.self.key", hidden, hidden),
                ("attention.self.value", hidden, hidden),
                ("attention.output.dense", hidden, hidden),
                ("intermediate.dense", WIDE, hidden),
                ("output.dense", hidden, WIDE),
            ] {
                add(at(&format!("{part}.weight")), &[outputs, inputs]);
                add(at(&format!("{part}.bias")), &[outputs]);
            }
            norms.extend([at("attention.output.LayerNorm"), at("output.LayerNorm")]);
        }
        for norm in norms {
            add(format!("{norm}.weight"), &[hidden]);
            add(format!("{norm}.bias"), &[hidden]);
        }
        tensors
    }
}

impl Reference {
    /// The vector of one sequence.
    pub(crate) fn vector(&self, tokens: &[u32]) -> Vec<f64> {
        let hidden = self.tiny.hidden;
        let first = if self.tiny.kind == "bert" { 0 } else { 2 };
        let row = |name: &str, row: usize| {
            let table = self.data(&format!("embeddings.{name}_embeddings.weight"));
            table[row * hidden..][..hidden].to_vec()
        };
        let mut x: Vec<Vec<f64>> = tokens
            .iter()
            .enumerate()
            .map(|(i, &token)| {
                let parts = [
                    row("word", token as usize),
                    row("position", first + i),
                    row("token_type", 0),
                ];
                (0..hidden)
                    .map(|c| parts.iter().map(|part| part[c]).sum())
                    .collect()
            })
            .map(|row: Vec<f64>| self.norm("embeddings.LayerNorm", &row))
            .collect();
        for layer in 0..LAYERS {
            x = self.layer(layer, &x);
        }
        let mut vector = if self.tiny.cls {
            x[0].clone()
        } else {
            (0..hidden)
                .map(|c| x.iter().map(|row| row[c]).sum::<f64>() / x.len() as f64)
                .collect()
        };
        if self.tiny.normalise {
            let length = vector.iter().map(|x| x * x).sum::<f64>().sqrt();
            vector.iter_mut().for_each(|x| *x /= length);
        }
        vector
    }

    fn layer(&self, layer: usize, x: &[Vec<f64>]) -> Vec<Vec<f64>> {
        let at = |part: &str| format!("encoder.layer.{layer}.{part}");
        let dim = self.tiny.hidden / self.tiny.heads;
        let project = |part: &str| -> Vec<Vec<f64>> {
            x.iter().map(|row| self.dense(&at(part), row)).collect()
        };
        let (q, k, v) = (
            project("attention.self.query"),
            project("attention.self.key"),
            project("attention.self.value"),
        );
        x.iter()
            .enumerate()
            .map(|(i, row)| {
                let mut gathered = vec![0.0; self.tiny.hidden];
                for head in 0..self.tiny.heads {
                    let columns = head * dim..(head + 1) * dim;
                    let scores: Vec<f64> = k
                        .iter()
                        .map(|k| {
                            let dot: f64 = columns.clone().map(|c| q[i][c] * k[c]).sum();
                            (dot / (dim as f64).sqrt()).exp()
                        })
                        .collect();
                    let sum: f64 = scores.iter().sum();
                    for c in columns {
                        gathered[c] = scores
                            .iter()
                            .zip(&v)
                            .map(|(score, v)| score / sum * v[c])
                            .sum();
                    }
                }
                let attended = add(row, &self.dense(&at("attention.output.dense"), &gathered));
                let row = self.norm(&at("attention.output.LayerNorm"), &attended);
                let middle: Vec<f64> = self
                    .dense(&at("intermediate.dense"), &row)
                    .into_iter()
                    .map(|x| match self.tiny.activation {
                        "relu" => x.max(0.0),
                        "gelu_new" => {
                            let u =
                                (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x.powi(3));
                            0.5 * x * (1.0 + u.tanh())
                        }
                        _ => 0.5 * x * (1.0 + erf(x / 2.0_f64.sqrt())),
                    })
                    .collect();
                let out = add(&row, &self.dense(&at("output.dense"), &middle));
                self.norm(&at("output.LayerNorm"), &out)
            })
            .collect()
    }

    fn dense(&self, name: &str, x: &[f64]) -> Vec<f64> {
        let (weight, bias) = (
            self.data(&format!("{name}.weight")),
            self.data(&format!("{name}.bias")),
        );
        let rows = weight.chunks_exact(x.len());
        rows.zip(bias)
            .map(|(row, bias)| row.iter().zip(x).map(|(w, x)| w * x).sum::<f64>() + bias)
            .collect()
    }

    fn norm(&self, name: &str, x: &[f64]) -> Vec<f64> {
        let (weight, bias) = (
            self.data(&format!("{name}.weight")),
            self.data(&format!("{name}.bias")),
        );
        let mean = x.iter().sum::<f64>() / x.len() as f64;
        let variance = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / x.len() as f64;
        let unit = x.iter().map(|x| (x - mean) / (variance + 1e-5).sqrt());
        unit.zip(weight)
            .zip(bias)
            .map(|((x, w), b)| x * w + b)
            .collect()
    }

    fn data(&self, name: &str) -> &[f64] {
        &self.tensors[name].1
    }
}

fn add(a: &[f64], b: &[f64]) -> Vec<f64> {
    a.iter().zip(b).map(|(a, b)| a + b).collect()
}

/// The error function by its series.
fn erf(x: f64) -> f64 {
    let (mut term, mut sum) = (x, x);
    for n in 1..200 {
        term *= -x * x / f64::from(n);
        sum += term / f64::from(2 * n + 1);
    }
    sum * 2.0 / std::f64::consts::PI.sqrt()
}
