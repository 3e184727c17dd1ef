//! gpt-oss's experts as its folders have them: all in one tensor, gate and up in turns.

use std::io::{self, Write};

use super::output::{put, unknown};
use crate::gguf::{GgmlType, Tensor, Tensors, expert_name};
use crate::hf::{self, ExpertNaming};
use crate::safetensors::{Dtype, Planned};

/// A tensor of the folder.
pub(super) struct Fused<'a> {
    /// Of each expert its matrices that are stored in turns.
    experts: Vec<Vec<Tensor<'a>>>,
    form: Form,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Form {
    /// Inputs and outputs exchanged.
    Columns,
    /// Element by element.
    Elements,
    /// The codes of MXFP4 weights, and their scales.
    Codes,
    Scales,
}

/// Plans the tensors for the stacked `matrix`: for a gate those of gate and up, for an up none. MXFP4 weights
/// stay as they are.
pub(super) fn plan<'a>(
    tensors: &'a Tensors,
    count: usize,
    matrix: &str,
    dtype: Dtype,
) -> io::Result<Vec<(Planned, Fused<'a>)>> {
    let Some(matrices) = in_turns(matrix) else {
        return Ok(Vec::new());
    };
    let part = |matrix: &String, expert| {
        let part = tensors.expert(matrix, expert);
        part.ok_or_else(|| unknown(format!("expert {expert} of {matrix}")))
    };
    let of = |expert| matrices.iter().map(|matrix| part(matrix, expert)).collect();
    let experts: Vec<Vec<Tensor<'a>>> = (0..count).map(of).collect::<io::Result<_>>()?;
    let first = part(&matrices[0], 0)?;
    let [inputs, outputs] = [0, 1].map(|at| first.dims[at]);
    let (count, rows) = (count as u64, outputs * matrices.len() as u64);
    let name = hf::their_name(&expert_name(matrix, 0), ExpertNaming::GptOss);
    let name = name.ok_or_else(|| unknown(format!("experts {matrix}")))?;
    let planned = |ending: &str, dtype, shape: Vec<u64>, form| {
        let name = format!("{name}{ending}");
        let experts = experts.clone();
        (Planned { name, dtype, shape }, Fused { experts, form })
    };
    Ok(match first.ty {
        GgmlType::MXFP4 => {
            let shape = vec![count, rows, inputs / 32];
            let codes = [&shape[..], &[16]].concat();
            vec![
                planned("_blocks", Dtype::U8, codes, Form::Codes),
                planned("_scales", Dtype::U8, shape, Form::Scales),
            ]
        }
        _ => vec![planned("", dtype, vec![count, inputs, rows], Form::Columns)],
    })
}

/// Plans the tensor for the stack of biases of the gate's `matrix`, which the up's are part of.
pub(super) fn plan_biases<'a>(
    tensors: &'a Tensors,
    matrix: &str,
) -> io::Result<Option<(Planned, Fused<'a>)>> {
    let Some(matrices) = in_turns(matrix) else {
        return Ok(None);
    };
    let names = matrices.iter().map(|matrix| format!("{matrix}_exps.bias"));
    let stacks: Option<Vec<Tensor<'a>>> = names.map(|name| tensors.get(&name)).collect();
    let stacks = stacks.ok_or_else(|| unknown(format!("biases of {matrix}")))?;
    let name = hf::their_name(&format!("{matrix}_exps.bias"), ExpertNaming::GptOss);
    let name = name.ok_or_else(|| unknown(format!("biases of {matrix}")))?;
    let [outputs, count] = [0, 1].map(|at| stacks[0].dims[at]);
    let plan = Planned {
        name,
        dtype: Dtype::F32,
        shape: vec![count, outputs * matrices.len() as u64],
    };
    let fused = Fused {
        experts: vec![stacks],
        form: Form::Elements,
    };
    Ok(Some((plan, fused)))
}

impl Fused<'_> {
    /// Writes the tensor's elements as `dtype`.
    pub(super) fn write(&self, dtype: Dtype, out: &mut dyn Write) -> io::Result<()> {
        for matrices in &self.experts {
            match self.form {
                Form::Columns | Form::Elements => write_floats(matrices, self.form, dtype, out)?,
                Form::Codes | Form::Scales => write_blocks(matrices, self.form, out)?,
            }
        }
        Ok(())
    }
}

fn write_floats(
    matrices: &[Tensor<'_>],
    form: Form,
    dtype: Dtype,
    out: &mut dyn Write,
) -> io::Result<()> {
    let values = matrices.iter().map(Tensor::to_f32);
    let values: Vec<Vec<f32>> = values.collect::<Result<_, _>>().map_err(io::Error::other)?;
    let elements = values[0].len();
    let inputs = matrices[0].dims[0] as usize;
    let place = |i: usize| match form {
        Form::Columns => i % (elements / inputs) * inputs + i / (elements / inputs),
        _ => i,
    };
    let turns: Vec<f32> = (0..elements)
        .flat_map(|i| values.iter().map(move |values| values[place(i)]))
        .collect();
    put(&turns, dtype, out)
}

fn write_blocks(matrices: &[Tensor<'_>], form: Form, out: &mut dyn Write) -> io::Result<()> {
    let data = matrices.iter().map(|matrix| matrix.data.read());
    let data = data
        .collect::<Result<Vec<_>, _>>()
        .map_err(io::Error::other)?;
    let size = GgmlType::MXFP4.type_size();
    let row = matrices[0].dims[0] as usize / 32 * size;
    for at in (0..data[0].len()).step_by(row) {
        for block in data.iter().flat_map(|data| data[at..at + row].chunks(size)) {
            let (scale, codes) = block.split_at(1);
            match form {
                Form::Scales => out.write_all(scale)?,
                _ => out.write_all(&side_by_side(codes))?,
            }
        }
    }
    Ok(())
}

/// A block's codes, each beside the next, from ggml's, which have code i beside code i + 16.
fn side_by_side(codes: &[u8]) -> [u8; 16] {
    let code = |i: usize| codes[i % 16] >> (4 * (i / 16)) & 15;
    std::array::from_fn(|i| code(2 * i) | code(2 * i + 1) << 4)
}

/// The matrices that are stored in turns with this one; none if it is not the first of them.
fn in_turns(matrix: &str) -> Option<Vec<String>> {
    match matrix.strip_suffix("ffn_gate") {
        Some(layer) => Some(vec![matrix.to_owned(), format!("{layer}ffn_up")]),
        None if matrix.ends_with("ffn_up") => None,
        None => Some(vec![matrix.to_owned()]),
    }
}
