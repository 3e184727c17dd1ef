//! A tiny model against the contract of `mesh_testkit::conformance::diffuser`, on the CPU or on the
//! GPU if `HYDRAMESH_TEST_GPU` is `cuda`.

use std::sync::Arc;

use mesh_diffusion::checkpoint::Checkpoint;
use mesh_diffusion::config::Family;
use mesh_diffusion::{ClipTokenizer, synth};
use mesh_engine_tch::{Device, Options, TchDiffuser};
use mesh_model::safetensors::Dtype;
use mesh_testkit::conformance::diffuser::Subject;

/// A vocabulary of single bytes, in words' ends and elsewhere, without merges.
fn tokenizer() -> Arc<ClipTokenizer> {
    let (vocab, merges) = synth::tokenizer_files(1000);
    Arc::new(ClipTokenizer::from_vocab(&vocab, merges).unwrap())
}

#[test]
fn models_of_images_keep_the_contract() {
    let device = match std::env::var("HYDRAMESH_TEST_GPU").as_deref() {
        Ok("cuda") => Device::Gpu(0),
        _ => Device::Cpu,
    };
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("model");
    synth::write_folder(&synth::tiny(Family::Sd1), &folder, Dtype::F32).unwrap();
    let options = Options {
        device,
        threads: 2,
        ..Options::default()
    };
    Subject {
        name: format!("Stable Diffusion 1 on {device:?}"),
        open: &|| {
            let checkpoint = Arc::new(Checkpoint::open(&folder).unwrap());
            Box::new(TchDiffuser::load(&checkpoint, &options).unwrap())
        },
        tokenizer: tokenizer(),
        size: (64, 64),
    }
    .check();
}
