//! Writes a model file with random weights: `random_model qwen2-1.5b Q4_0 tokenizer-of.gguf out.gguf`.

use std::error::Error;
use std::path::Path;

use mesh_model::synth::{Shape, Tokens, random_model};
use mesh_model::{GgmlType, Gguf};

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [shape, ty, tokenizer, out] = &arguments[..] else {
        return Err(
            "usage: random_model qwen2-1.5b|smollm2-135m TYPE TOKENIZER.gguf OUT.gguf".into(),
        );
    };
    let shape = match shape.as_str() {
        "qwen2-1.5b" => Shape::qwen2_1_5b(),
        "smollm2-135m" => Shape::smollm2_135m(),
        other => {
            return Err(format!("unknown shape {other:?}: give qwen2-1.5b or smollm2-135m").into());
        }
    };
    let ty = GgmlType::ALL
        .into_iter()
        .find(|known| known.name().eq_ignore_ascii_case(ty))
        .ok_or_else(|| format!("unknown type {ty:?}: give one of {:?}", GgmlType::ALL))?;
    let tokenizer = Gguf::open(tokenizer)?;
    random_model(&shape, ty, Tokens::CopyOf(&tokenizer), Path::new(out))?;
    Ok(())
}
