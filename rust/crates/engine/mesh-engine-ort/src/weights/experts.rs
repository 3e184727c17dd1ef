//! The experts of a mixture and their router.

use mesh_kernels::{Expert, ExpertMatrix, Experts, QMatrix, WeightType};
use mesh_model::Mixture;
use mesh_model::gguf::expert_name;

use super::Loader;
use crate::options::LoadError;

impl Loader<'_> {
    pub(super) fn experts(&self, layer: u32, mixture: &Mixture) -> Result<Experts, LoadError> {
        let name = |which: &str| format!("blk.{layer}.{which}");
        let biases = |which: &str| -> Result<_, LoadError> {
            let stack = || self.vector(&format!("{}_exps.bias", name(which)));
            mixture.biases.then(stack).transpose()
        };
        let [gates, ups, downs] = ["ffn_gate", "ffn_up", "ffn_down"].map(biases);
        let (gates, ups, downs) = (gates?, ups?, downs?);
        let matrix = |which: &str, expert, biases: &Option<Vec<f32>>| {
            let name = expert_name(&name(which), expert);
            let Some(tensor) = self.tensors.expert(&format!("blk.{layer}.{which}"), expert) else {
                return Err(LoadError::MissingTensor(name));
            };
            let weights = self.packed(&name, tensor)?;
            let rows = |biases: &Vec<f32>| biases[expert * weights.n()..][..weights.n()].to_vec();
            let bias = biases.as_ref().map(rows);
            Ok(ExpertMatrix { weights, bias })
        };
        let experts = (0..mixture.experts).map(|expert| {
            Ok(Expert {
                gate: matrix("ffn_gate", expert, &gates)?,
                up: matrix("ffn_up", expert, &ups)?,
                down: matrix("ffn_down", expert, &downs)?,
            })
        });
        let experts = experts.collect::<Result<_, LoadError>>()?;
        Experts::new(experts).map_err(|error| LoadError::Tensor {
            name: format!("blk.{layer}.ffn_{{gate,up,down}}_exps.weight"),
            ty: "several".into(),
            message: error.to_string(),
        })
    }

    /// The matrix that scores experts, or the vector that scores the shared one, as floats: a small error in a
    /// score can choose another expert.
    pub(super) fn router(&self, name: &str) -> Result<QMatrix, LoadError> {
        let (inputs, outputs) = match *self.tensor(name)?.dims {
            [inputs] => (inputs, 1),
            [inputs, outputs] => (inputs, outputs),
            _ => return Err(LoadError::MissingTensor(name.into())),
        };
        let floats = self.vector(name)?;
        let bytes: Vec<u8> = floats.iter().flat_map(|x| x.to_le_bytes()).collect();
        let shape = (outputs as usize, inputs as usize);
        self.packed_bytes(name, WeightType::F32, shape, &bytes)
    }
}
