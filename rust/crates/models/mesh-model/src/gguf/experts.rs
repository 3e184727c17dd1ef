//! The matrices of a mixture of experts.
//!
//! GGUF files have the experts' matrices stacked in one tensor of three dimensions. Older files, and folders
//! in Hugging Face's form, have a tensor for each expert.

use super::tensors::{Tensor, Tensors};

/// Name of the tensor that stacks the experts' `matrix`, such as `blk.3.ffn_gate`.
pub fn stack_name(matrix: &str) -> String {
    format!("{matrix}_exps.weight")
}

/// Name of the tensor that one expert's `matrix` has where they are not stacked.
pub fn expert_name(matrix: &str, expert: usize) -> String {
    format!("{matrix}.{expert}.weight")
}

/// True for the tensors of a layer that hold matrices or biases of experts, stacked or one by one. A token reads only
/// those of the experts that it uses.
pub fn is_of_experts(name: &str) -> bool {
    let suffix = name
        .strip_prefix("blk.")
        .and_then(|rest| rest.split_once('.'))
        .and_then(|(_, rest)| rest.strip_suffix(".weight").or(rest.strip_suffix(".bias")));
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    suffix.is_some_and(|suffix| {
        let single = suffix.split_once('.');
        suffix.ends_with("_exps") || single.is_some_and(|(_, expert)| is_number(expert))
    })
}

impl Tensors {
    /// One expert's `matrix`, such as `blk.3.ffn_gate`: a part of the stack, which then gives the name, or a
    /// tensor of its own. `None` if there is none.
    pub fn expert(&self, matrix: &str, expert: usize) -> Option<Tensor<'_>> {
        let Some(stack) = self.get(&stack_name(matrix)) else {
            return self.get(&expert_name(matrix, expert));
        };
        let &[_, _, experts] = stack.dims else {
            return None;
        };
        // A row is whole blocks, so an expert is whole bytes.
        let len = stack
            .data
            .len()
            .checked_div(usize::try_from(experts).ok()?)?;
        Some(Tensor {
            dims: &stack.dims[..2],
            data: stack.data.part(expert.checked_mul(len)?, len)?,
            ..stack
        })
    }
}
