//! An embedding model without a mesh: texts in, vectors out, the similarity of each text to the first one
//! printed.
//!
//! ```text
//! cargo run --release -p mesh-engine-ort --example embedder -- FOLDER "a lighthouse" "a beacon" "a whale"
//! ```
//!
//! FOLDER holds a BERT-family encoder as it comes from Hugging Face. `ORT_DYLIB_PATH` names ONNX Runtime's
//! library.

use std::error::Error;
use std::path::Path;

use mesh_engine::Encoder;
use mesh_engine_ort::{OrtEncoder, OrtOptions};
use mesh_model::EncoderModel;

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [folder, texts @ ..] = &args[..] else {
        return Err("usage: embedder FOLDER TEXT...".into());
    };
    let vectors = embed(Path::new(folder), texts, OrtOptions::default())?;
    for (text, vector) in texts.iter().zip(&vectors) {
        // Vectors have length 1, so the cosine is the inner product.
        let cosine: f32 = vector.iter().zip(&vectors[0]).map(|(a, b)| a * b).sum();
        println!("{cosine:.3}  {text}");
    }
    Ok(())
}

/// One vector per text, each of length 1.
pub(crate) fn embed(
    folder: &Path,
    texts: &[String],
    options: OrtOptions,
) -> Result<Vec<Vec<f32>>, Box<dyn Error>> {
    let model = EncoderModel::open(folder)?;
    let mut encoder = OrtEncoder::load(&model, &options)?;
    let dimensions = encoder.info().dimensions;
    let tokenised = texts
        .iter()
        .map(|text| Ok(model.tokenise(text, None)?.tokens))
        .collect::<Result<Vec<Vec<u32>>, Box<dyn Error>>>()?;
    let sequences: Vec<&[u32]> = tokenised.iter().map(Vec::as_slice).collect();
    let vectors = encoder.encode(&sequences)?;
    Ok(vectors.chunks(dimensions).map(<[f32]>::to_vec).collect())
}
