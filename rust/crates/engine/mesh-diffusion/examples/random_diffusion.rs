//! Writes a model with random weights: `random_diffusion tiny FOLDER` for the tests' models, `random_diffusion demo FOLDER` for
//! that of `make demo-image` (without its tokenizer), or `random_diffusion sd15 FOLDER` for one with the shape of Stable
//! Diffusion 1.5 and f16 weights.
//!
//! `scripts/diffusion_goldens.py` and `scripts/bench_diffusers.py` have diffusers read what this writes.

use std::path::Path;

use mesh_diffusion::config::Family;
use mesh_diffusion::synth;
use mesh_model::safetensors::Dtype;

fn main() -> std::io::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [kind, folder] = arguments.as_slice() else {
        eprintln!("usage: random_diffusion tiny|demo|sd15 FOLDER");
        std::process::exit(2);
    };
    let folder = Path::new(folder);
    std::fs::create_dir_all(folder)?;
    match kind.as_str() {
        "tiny" => {
            for (name, family) in [
                ("sd1", Family::Sd1),
                ("sd2", Family::Sd2),
                ("xl", Family::Xl),
            ] {
                let config = synth::tiny(family);
                synth::write_folder(
                    &synth::inpainting(config.clone()),
                    &folder.join(format!("{name}-inpainting")),
                    Dtype::F32,
                )?;
                synth::write_folder(&config, &folder.join(name), Dtype::F32)?;
                synth::write_single(
                    &config,
                    &folder.join(format!("{name}.safetensors")),
                    Dtype::F32,
                )?;
            }
            synth::write_tiny_vae(&synth::tiny_vae(), &folder.join("taesd"), Dtype::F32)
        }
        "demo" => {
            // With CLIP's whole vocabulary, so that any prompt has tokens.
            let mut config = synth::tiny(Family::Sd1);
            for encoder in &mut config.text {
                (encoder.vocab, encoder.end) = (49_408, 49_407);
            }
            synth::write_folder(&config, folder, Dtype::F32)
        }
        "sd15" => synth::write_folder(&synth::stable_diffusion_1_5(), folder, Dtype::F16),
        _ => {
            eprintln!("unknown model {kind:?}: use tiny, demo or sd15");
            std::process::exit(2);
        }
    }
}
