//! Writes a model file with random weights: `random_model qwen2-1.5b Q4_0 tokenizer-of.gguf out.gguf`.

use std::error::Error;
use std::path::Path;

use mesh_model::synth::{Shape, Tokens, random_model};
use mesh_model::{GgmlType, Gguf};

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [shape, ty, tokenizer, out] = &arguments[..] else {
        return Err(
            "usage: random_model qwen2-1.5b|smollm2-135m|qwen3-30b-a3b:LAYERS|deepseek-v2-lite:LAYERS|\
             gpt-oss-20b:LAYERS TYPE TOKENIZER.gguf OUT.gguf"
                .into(),
        );
    };
    let shape = match shape.split_once(':').unwrap_or((shape, "")) {
        ("qwen2-1.5b", "") => Shape::qwen2_1_5b(),
        ("smollm2-135m", "") => Shape::smollm2_135m(),
        ("qwen3-30b-a3b", "") => Shape::qwen3_30b_a3b(48),
        ("qwen3-30b-a3b", layers) => Shape::qwen3_30b_a3b(layers.parse()?),
        ("deepseek-v2-lite", "") => Shape::deepseek_v2_lite(27),
        ("deepseek-v2-lite", layers) => Shape::deepseek_v2_lite(layers.parse()?),
        ("gpt-oss-20b", "") => Shape::gpt_oss_20b(24),
        ("gpt-oss-20b", layers) => Shape::gpt_oss_20b(layers.parse()?),
        _ => {
            let known = "qwen2-1.5b, smollm2-135m, qwen3-30b-a3b[:LAYERS], deepseek-v2-lite[:LAYERS] or \
                         gpt-oss-20b[:LAYERS]";
            return Err(format!("unknown shape {shape:?}: give {known}").into());
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
