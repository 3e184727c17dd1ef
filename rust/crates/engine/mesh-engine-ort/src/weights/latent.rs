//! The matrices of latent attention.

use half::{bf16, f16};
use mesh_kernels::{QMatrix, WeightType};
use mesh_model::{GgmlType, Tensor};

use super::Loader;
use crate::latent::LatentWeights;
use crate::options::LoadError;

impl Loader<'_> {
    /// The norms and matrices of a layer's latent attention, except its first projection.
    pub(super) fn latent(&self, layer: u32) -> Result<LatentWeights, LoadError> {
        let name = |suffix: &str| format!("blk.{layer}.{suffix}");
        let has_query = (self.config.latent).is_some_and(|latent| latent.query_rank.is_some());
        let query = match has_query {
            true => Some((
                self.norm(&name("attn_q_a_norm.weight"))?,
                self.matrix(&name("attn_q_b.weight"))?,
            )),
            false => None,
        };
        let whole = name("attn_kv_b.weight");
        let by_head = self.tensors.get(&whole).is_some();
        Ok(LatentWeights {
            query,
            norm: self.norm(&name("attn_kv_a_norm.weight"))?,
            expand: match by_head {
                true => self.matrix(&whole)?,
                false => {
                    let keys = self.keys_of_stack(&name("attn_k_b.weight"));
                    let values = self.values_of_stack(&name("attn_v_b.weight"));
                    let matrices = [keys, values].into_iter();
                    self.under_each_other(matrices, || name("attn_{k,v}_b.weight"))?
                }
            },
            by_head,
        })
    }

    /// The matrix that makes keys, of a stack `[plain, rank, heads]`, in which each head's is transposed. Its
    /// blocks go across the new rows, so it becomes floats.
    fn keys_of_stack(&self, name: &str) -> Result<QMatrix, LoadError> {
        let stack = self.tensor(name)?;
        let &[plain, rank, heads] = stack.dims else {
            return Err(LoadError::MissingTensor(name.into()));
        };
        let (plain, rank, heads) = (plain as usize, rank as usize, heads as usize);
        let floats = self.vector(name)?;
        let ty = transposed_type(stack.ty);
        let mut bytes = Vec::with_capacity(floats.len() * ty.type_size());
        for head in floats.chunks_exact((plain * rank).max(1)) {
            for row in 0..plain {
                let values = head.iter().skip(row).step_by(plain);
                match ty {
                    GgmlType::F32 => values.for_each(|x| bytes.extend(x.to_le_bytes())),
                    GgmlType::BF16 => {
                        values.for_each(|x| bytes.extend(bf16::from_f32(*x).to_le_bytes()));
                    }
                    _ => values.for_each(|x| bytes.extend(f16::from_f32(*x).to_le_bytes())),
                }
            }
        }
        self.packed_bytes(name, ty, (plain * heads, rank), &bytes)
    }

    /// The matrix that makes values, of a stack `[rank, value, heads]`: its rows are as they should be.
    fn values_of_stack(&self, name: &str) -> Result<QMatrix, LoadError> {
        let stack = self.tensor(name)?;
        let &[rank, value, heads] = stack.dims else {
            return Err(LoadError::MissingTensor(name.into()));
        };
        let dims = [rank, value * heads];
        self.packed(
            name,
            Tensor {
                dims: &dims,
                ..stack
            },
        )
    }
}

/// The type of a matrix of type `ty` once it is transposed: the same for floats, and f16 for others.
pub(crate) fn transposed_type(ty: WeightType) -> WeightType {
    match ty {
        GgmlType::F32 | GgmlType::BF16 => ty,
        _ => GgmlType::F16,
    }
}
