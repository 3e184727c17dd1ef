//! A range of layers as a graph of ONNX Runtime's own operators, which execution providers for GPUs run too.
//!
//! One run computes consecutive rows of one sequence:
//!
//! | input | type | shape |
//! |---|---|---|
//! | `hidden` | f32 | `[1, rows, hidden]` |
//! | `last_position` | i32 | `[1]`: position of the last row |
//! | `length` | i32 | `[1]`: rows of the sequence after the run |
//! | `kept` | i64 | `[kept]`: rows that become logits; only at the end of the model |
//! | `past_key.N`, `past_value.N` | T | `[1, kv_heads, capacity, head_dim]` |
//!
//! | output | type | shape |
//! |---|---|---|
//! | `output` | f32 | `[1, rows, hidden]`, or `[1, kept, vocab]` at the end of the model |
//! | `present_key.N`, `present_value.N` | T | on the memory of the past ones |
//!
//! T is f16 on GPUs and f32 on CPUs. The residual stream is f32 on both: some networks' hidden rows do not
//! fit f16. Embeddings are looked up by the host: a row of a few kilobytes goes over, and the table takes no
//! memory of the GPU.

use std::collections::HashMap;
use std::ops::Range;

use mesh_model::{Activation, ModelConfig, Rope, RopeStyle, Tensors};
use ort::value::{DynTensor, Tensor};

use super::builder::GraphBuilder;
use super::matrix::{Constants, FileMatrix, MatrixForm};
use super::tensors::Precision;
use crate::onnx::{Attribute, Dim, ElementType, ModelProto, NodeProto, ValueInfo};
use crate::options::LoadError;

pub(super) const HIDDEN: &str = "hidden";
pub(super) const LAST_POSITION: &str = "last_position";
pub(super) const LENGTH: &str = "length";
pub(super) const KEPT: &str = "kept";
pub(super) const OUTPUT: &str = "output";

/// The names of a layer's past and present, keys and values; layers are counted from the stage's first.
pub(super) fn kv_names(layer: usize) -> [(String, String); 2] {
    ["key", "value"].map(|what| {
        (
            format!("past_{what}.{layer}"),
            format!("present_{what}.{layer}"),
        )
    })
}

/// A graph and the constants that it names.
pub(super) struct Lowered {
    /// An encoded `ModelProto`.
    pub(super) model: Vec<u8>,
    pub(super) weights: Vec<(String, DynTensor)>,
    /// Bytes of the constants.
    pub(super) bytes: u64,
}

/// The parts of layers that a device computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Parts {
    /// All of them, and the output matrix where they end the model.
    Whole,
    /// All but mixtures of experts and the output matrix, which the CPU computes. The graph is of one layer: between
    /// two of them rows go to the CPU and back.
    WithoutExperts,
}

impl Parts {
    /// Those of `layers` that a graph computes if the CPU computes the rest.
    pub(crate) fn of(config: &ModelConfig, mut layers: Range<u32>) -> Parts {
        match layers.any(|layer| config.mixture_of(layer).is_some()) {
            true => Parts::WithoutExperts,
            false => Parts::Whole,
        }
    }
}

/// Inputs for building a graph.
pub(super) struct LoweringPlan<'a> {
    pub(super) tensors: &'a Tensors,
    pub(super) config: &'a ModelConfig,
    pub(super) layers: Range<u32>,
    pub(super) precision: Precision,
    /// Positions that the rotary embedding's tables have.
    pub(super) positions: usize,
    /// Threads that read the weights.
    pub(super) threads: usize,
    /// The parts of the layers that the graph has.
    pub(super) parts: Parts,
}

impl LoweringPlan<'_> {
    /// Fails if the operators cannot express the model.
    pub(super) fn check(&self) -> Result<(), LoadError> {
        let config = self.config;
        if config.latent.is_some() {
            return Err(LoadError::Unsupported {
                feature: "multi-head latent attention".into(),
            });
        }
        let mixture = Parts::of(config, self.layers.clone()) == Parts::WithoutExperts;
        for (found, feature) in [
            (
                mixture && self.parts == Parts::Whole,
                "a mixture of experts",
            ),
            (config.output_bias, "a bias on the output of attention"),
            (config.attention_sinks, "attention sinks"),
            (config.qk_norm_over_heads, "norms over all heads of a row"),
            (config.residual_scale != 1.0, "a factor on residual rows"),
        ] {
            if found {
                return Err(LoadError::Unsupported {
                    feature: feature.into(),
                });
            }
        }
        for (what, width) in [
            ("heads", config.head_dim),
            ("rotated parts", config.rope.dim),
        ] {
            if !width.is_multiple_of(16) {
                return Err(LoadError::Unsupported {
                    feature: format!("{what} of width {width}, which is no multiple of 16"),
                });
            }
        }
        Ok(())
    }

    /// Reads the weights and writes the graph.
    pub(super) fn lower(&self) -> Result<Lowered, LoadError> {
        let mut lowering = Lowering {
            plan: self,
            graph: GraphBuilder::new(self.precision),
            block_sums: HashMap::new(),
        };
        lowering.rope_tables()?;
        let mut x = HIDDEN.to_owned();
        for layer in 0..self.layers.len() {
            x = lowering.attention(layer, x)?;
            let number = self.layers.start + layer as u32;
            if self.parts == Parts::Whole || self.config.mixture_of(number).is_none() {
                x = lowering.feed_forward(layer, x)?;
            }
        }
        match self.is_last() {
            true => lowering.head(x)?,
            false => lowering
                .graph
                .node("Identity", "", &[&x], OUTPUT, Vec::new()),
        }
        self.tensors
            .check_unchanged()
            .map_err(|error| LoadError::Model(error.to_string()))?;
        Ok(lowering.finish())
    }

    /// True if the graph gives logits.
    pub(super) fn is_last(&self) -> bool {
        self.layers.end == self.config.layers && self.parts == Parts::Whole
    }
}

/// The graph as far as it is built.
struct Lowering<'a> {
    plan: &'a LoweringPlan<'a>,
    graph: GraphBuilder,
    /// Sums over blocks that are computed already, by value and block.
    block_sums: HashMap<(String, usize), String>,
}

impl Lowering<'_> {
    /// hidden + attention(norm(hidden)).
    fn attention(&mut self, layer: usize, x: String) -> Result<String, LoadError> {
        let config = self.plan.config;
        let (heads, kv_heads, head_dim) = (config.heads, config.kv_heads, config.head_dim);
        let file = |suffix: &str| {
            let number = self.plan.layers.start as usize + layer;
            format!("blk.{number}.{suffix}")
        };
        let names = ["q", "k", "v"].map(|which| file(&format!("attn_{which}.weight")));
        let biases = ["q", "k", "v"].map(|which| file(&format!("attn_{which}.bias")));
        let norms = ["q", "k"].map(|which| file(&format!("attn_{which}_norm.weight")));
        let (norm, output) = (file("attn_norm.weight"), file("attn_output.weight"));
        let post_norm = file("post_attention_norm.weight");
        let number = self.plan.layers.start + layer as u32;
        let window = config.window_of(number);

        let normed = self.norm(&x, &norm)?;
        let normed = self.graph.narrow(normed);
        let forms = names
            .iter()
            .map(|name| Ok(MatrixForm::of(self.matrix(name)?.ty)))
            .collect::<Result<Vec<_>, LoadError>>()?;
        // The operator takes queries, keys and values side by side; head norms come between, so they need
        // them apart.
        let together = forms.iter().all(|form| *form == forms[0]) && !config.qk_norm;
        let mut qkv = if together {
            vec![self.project(&normed, &names.each_ref().map(String::as_str))?]
        } else {
            names
                .iter()
                .map(|name| self.project(&normed, &[name]))
                .collect::<Result<Vec<_>, _>>()?
        };
        if config.qkv_bias {
            let mut parts = biases
                .iter()
                .map(|name| self.vector(name))
                .collect::<Result<Vec<_>, _>>()?;
            if together {
                parts = vec![parts.concat()];
            }
            for (i, (value, bias)) in qkv.iter_mut().zip(parts).enumerate() {
                let bias = self
                    .graph
                    .numbers(format!("{}.{i}", biases[i]), &[bias.len()], bias)?;
                *value = self.graph.op("Add", "", &[value, &bias]);
            }
        }
        if config.qk_norm {
            for (i, count) in [heads, kv_heads].into_iter().enumerate() {
                let apart = self
                    .graph
                    .reshape(&qkv[i], &[0, 0, count as i64, head_dim as i64]);
                let weight = self.norm_weight(&norms[i])?;
                let weight = self
                    .graph
                    .numbers(norms[i].clone(), &[weight.len()], weight)?;
                let normed = self.rms_norm(&apart, &weight);
                qkv[i] = self
                    .graph
                    .reshape(&normed, &[0, 0, (count * head_dim) as i64]);
            }
        }
        let [(past_key, present_key), (past_value, present_value)] = kv_names(layer);
        let apart = |i: usize| qkv.get(i).cloned().unwrap_or_default();
        let rope = config.rope_of(number);
        let magnitude = rope.magnitude();
        let interleaved = rope.style == RopeStyle::Interleaved;
        let [cos, sin] = rope_names(window.is_some());
        let attended = format!("attention.{layer}");
        self.graph.nodes.push(NodeProto {
            operator: "GroupQueryAttention",
            domain: MICROSOFT,
            name: attended.clone(),
            inputs: vec![
                apart(0),
                apart(1),
                apart(2),
                past_key,
                past_value,
                LAST_POSITION.into(),
                LENGTH.into(),
                cos.into(),
                sin.into(),
            ],
            outputs: vec![attended.clone(), present_key, present_value],
            attributes: vec![
                ("num_heads", Attribute::Int(heads as i64)),
                ("kv_num_heads", Attribute::Int(kv_heads as i64)),
                ("do_rotary", Attribute::Int(1)),
                ("rotary_interleaved", Attribute::Int(interleaved.into())),
                // The magnitude belongs to queries and keys alike, so the scores take it squared.
                (
                    "scale",
                    Attribute::Float(magnitude * magnitude / config.query_scalar.sqrt()),
                ),
                // Positions that a row sees, its own among them; -1 means all.
                (
                    "local_window_size",
                    Attribute::Int(window.map_or(-1, i64::from)),
                ),
            ],
        });
        let projected = self.project(&attended, &[&output])?;
        self.added(&x, projected, &post_norm)
    }

    /// Adds the output of a half layer to the residual, after a norm where the network has one.
    fn added(&mut self, x: &str, y: String, post_norm: &str) -> Result<String, LoadError> {
        let mut y = self.graph.widen(y);
        if self.plan.config.post_norms {
            y = self.norm(&y, post_norm)?;
        }
        Ok(self.graph.op("Add", "", &[x, &y]))
    }

    /// hidden + down(activation(gate(norm(hidden))) · up(norm(hidden))).
    fn feed_forward(&mut self, layer: usize, x: String) -> Result<String, LoadError> {
        let number = self.plan.layers.start as usize + layer;
        let file = |suffix: &str| format!("blk.{number}.{suffix}.weight");
        let normed = self.norm(&x, &file("ffn_norm"))?;
        let normed = self.graph.narrow(normed);
        let gate = self.project(&normed, &[&file("ffn_gate")])?;
        let up = self.project(&normed, &[&file("ffn_up")])?;
        let gate = match self.plan.config.activation {
            // x · sigmoid(αx): with α = 1, SiLU.
            Activation::Silu => self.graph.with(
                "QuickGelu",
                MICROSOFT,
                &[&gate],
                vec![("alpha", Attribute::Float(1.0))],
            ),
            // Its tanh form.
            Activation::GeluTanh => self.graph.op("FastGelu", MICROSOFT, &[&gate]),
            Activation::ClampedSwiglu => {
                return Err(LoadError::Unsupported {
                    feature: "a clamped SwiGLU".into(),
                });
            }
        };
        let product = self.graph.op("Mul", "", &[&gate, &up]);
        let down = self.project(&product, &[&file("ffn_down")])?;
        self.added(&x, down, &file("post_ffw_norm"))
    }

    /// The rows that are asked for as logits.
    fn head(&mut self, x: String) -> Result<(), LoadError> {
        let kept = self
            .graph
            .with("Gather", "", &[&x, KEPT], vec![("axis", Attribute::Int(1))]);
        let normed = self.norm(&kept, "output_norm.weight")?;
        let normed = self.graph.narrow(normed);
        let matrix = match self.plan.config.tied_embeddings {
            true => "token_embd.weight",
            false => "output.weight",
        };
        let logits = self.project(&normed, &[matrix])?;
        let logits = self.graph.widen(logits);
        self.graph
            .node("Identity", "", &[&logits], OUTPUT, Vec::new());
        Ok(())
    }

    /// x · matricesᵀ, the matrices under each other; they have the same form.
    fn project(&mut self, x: &str, names: &[&str]) -> Result<String, LoadError> {
        let matrices = names
            .iter()
            .map(|name| self.matrix(name))
            .collect::<Result<Vec<_>, _>>()?;
        let (inputs, form) = (matrices[0].inputs, MatrixForm::of(matrices[0].ty));
        let outputs: usize = matrices.iter().map(|matrix| matrix.outputs).sum();
        let name = names.join("+");
        let constants = Constants::read(&matrices, self.plan.threads);
        drop(matrices);
        let MatrixForm::Blocks {
            bits,
            block,
            minimum,
        } = form
        else {
            let matrix = self
                .graph
                .numbers(name, &[inputs, outputs], constants.plain)?;
            return Ok(self.graph.op("MatMul", "", &[x, &matrix]));
        };
        let blocks = inputs / block;
        let codes = format!("{name}.codes");
        self.graph.bytes += constants.codes.len() as u64;
        let shape = [outputs, blocks, block * bits / 8];
        let tensor = Tensor::from_array((shape.to_vec(), constants.codes))?;
        self.graph
            .constant(codes.clone(), ElementType::U8, &shape, tensor.upcast());
        let scales = self.graph.numbers(
            format!("{name}.scales"),
            &[outputs, blocks],
            constants.scales,
        )?;
        let product = self.graph.with(
            "MatMulNBits",
            MICROSOFT,
            &[x, &codes, &scales],
            vec![
                ("K", Attribute::Int(inputs as i64)),
                ("N", Attribute::Int(outputs as i64)),
                ("bits", Attribute::Int(bits as i64)),
                ("block_size", Attribute::Int(block as i64)),
            ],
        );
        if !minimum {
            return Ok(product);
        }
        let sums = self.block_sums(x, blocks, block);
        let minima = self.graph.numbers(
            format!("{name}.minima"),
            &[blocks, outputs],
            constants.minima,
        )?;
        let rest = self.graph.op("MatMul", "", &[&sums, &minima]);
        Ok(self.graph.op("Add", "", &[&product, &rest]))
    }

    /// The sum of each block of each row.
    fn block_sums(&mut self, x: &str, blocks: usize, block: usize) -> String {
        let key = (x.to_owned(), block);
        if let Some(sums) = self.block_sums.get(&key) {
            return sums.clone();
        }
        let apart = self.graph.reshape(x, &[0, 0, blocks as i64, block as i64]);
        let axes = self.graph.integers(&[-1]);
        let sums = self.graph.with(
            "ReduceSum",
            "",
            &[&apart, &axes],
            vec![("keepdims", Attribute::Int(0))],
        );
        self.block_sums.insert(key, sums.clone());
        sums
    }

    /// RMS norm of residual rows, f32.
    fn norm(&mut self, x: &str, name: &str) -> Result<String, LoadError> {
        let weight = self.norm_weight(name)?;
        let weight = self
            .graph
            .add(Precision::F32, name.to_owned(), &[weight.len()], weight)?;
        Ok(self.rms_norm(x, &weight))
    }

    fn rms_norm(&mut self, x: &str, weight: &str) -> String {
        let eps = self.plan.config.norm_eps;
        self.graph.with(
            "SimplifiedLayerNormalization",
            "",
            &[x, weight],
            vec![
                ("axis", Attribute::Int(-1)),
                ("epsilon", Attribute::Float(eps)),
                ("stash_type", Attribute::Int(1)),
            ],
        )
    }

    /// The tables of every rotation that the stage's layers have.
    fn rope_tables(&mut self) -> Result<(), LoadError> {
        let config = self.plan.config;
        let mut done = [false; 2];
        for layer in self.plan.layers.clone() {
            let windowed = config.window_of(layer).is_some();
            if !std::mem::replace(&mut done[usize::from(windowed)], true) {
                self.rope_table(config.rope_of(layer), rope_names(windowed))?;
            }
        }
        Ok(())
    }

    /// Cosines and sines of every position, `[positions, rotated / 2]`.
    fn rope_table(&mut self, rope: &Rope, [cos, sin]: [&str; 2]) -> Result<(), LoadError> {
        let frequencies = rope.frequencies();
        let shape = [self.plan.positions, frequencies.len()];
        for (name, function) in [(cos, f64::cos as fn(f64) -> f64), (sin, f64::sin)] {
            let table: Vec<f32> = (0..self.plan.positions)
                .flat_map(|position| {
                    let angle = move |f: &f32| function(position as f64 * f64::from(*f)) as f32;
                    frequencies.iter().map(angle)
                })
                .collect();
            self.graph.numbers(name.to_owned(), &shape, table)?;
        }
        Ok(())
    }

    fn matrix(&self, name: &str) -> Result<FileMatrix<'_>, LoadError> {
        let tensor = self.tensor(name)?;
        let &[inputs, outputs] = tensor.dims else {
            return Err(LoadError::Tensor {
                name: name.into(),
                ty: tensor.ty.to_string(),
                message: format!("{} dimensions instead of 2", tensor.dims.len()),
            });
        };
        Ok(FileMatrix {
            ty: tensor.ty,
            inputs: inputs as usize,
            outputs: outputs as usize,
            data: tensor.data.read()?,
        })
    }

    fn norm_weight(&self, name: &str) -> Result<Vec<f32>, LoadError> {
        let mut weight = self.vector(name)?;
        let offset = self.plan.config.norm_offset;
        weight.iter_mut().for_each(|weight| *weight += offset);
        Ok(weight)
    }

    fn vector(&self, name: &str) -> Result<Vec<f32>, LoadError> {
        let tensor = self.tensor(name)?;
        tensor.to_f32().map_err(|error| LoadError::Tensor {
            name: name.into(),
            ty: tensor.ty.to_string(),
            message: error.to_string(),
        })
    }

    fn tensor(&self, name: &str) -> Result<mesh_model::Tensor<'_>, LoadError> {
        self.plan
            .tensors
            .get(name)
            .ok_or_else(|| LoadError::MissingTensor(name.into()))
    }

    fn finish(self) -> Lowered {
        let config = self.plan.config;
        let value = |name: &str, element, dims| ValueInfo {
            name: name.to_owned(),
            element,
            dims,
        };
        let one = || vec![Dim::Fixed(1)];
        let rows = |name, width| vec![Dim::Fixed(1), Dim::Named(name), Dim::Fixed(width)];
        let mut inputs = vec![
            value(HIDDEN, ElementType::F32, rows("rows", config.hidden)),
            value(LAST_POSITION, ElementType::I32, one()),
            value(LENGTH, ElementType::I32, one()),
        ];
        let mut outputs = Vec::new();
        if self.plan.is_last() {
            inputs.push(value(KEPT, ElementType::I64, vec![Dim::Named("kept")]));
            outputs.push(value(OUTPUT, ElementType::F32, rows("kept", config.vocab)));
        } else {
            outputs.push(value(OUTPUT, ElementType::F32, rows("rows", config.hidden)));
        }
        let element = self.plan.precision.element();
        for (past, present) in (0..self.plan.layers.len()).flat_map(kv_names) {
            let dims = || {
                vec![
                    Dim::Fixed(1),
                    Dim::Fixed(config.kv_heads),
                    Dim::Named("capacity"),
                    Dim::Fixed(config.head_dim),
                ]
            };
            inputs.push(value(&past, element, dims()));
            outputs.push(value(&present, element, dims()));
        }
        let model = ModelProto {
            opsets: &[("", 21), (MICROSOFT, 1)],
            nodes: self.graph.nodes,
            initializers: self.graph.initializers,
            inputs,
            outputs,
        };
        Lowered {
            model: model.encode(),
            weights: self.graph.weights,
            bytes: self.graph.bytes,
        }
    }
}

/// Domain of ONNX Runtime's own operators.
const MICROSOFT: &str = "com.microsoft";

/// Tables of cosines and sines: of layers with a window, and of the others.
fn rope_names(windowed: bool) -> [&'static str; 2] {
    match windowed {
        true => ["rope.window.cos", "rope.window.sin"],
        false => ["rope.cos", "rope.sin"],
    }
}
