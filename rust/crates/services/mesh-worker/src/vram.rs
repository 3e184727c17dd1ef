//! Memory of this machine's GPU: the limit that all models of the worker share, and the split of each.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use mesh_engine_ort::overflow::plan::after_failure;
use mesh_engine_ort::{DeviceMemory, DeviceOptions, Provider, Split};

use crate::config::Config;
use crate::lock::lock;

/// The account of GPU memory, and what failures have taught.
pub(crate) struct Vram {
    memory: DeviceMemory,
    models: Mutex<HashMap<PathBuf, Last>>,
}

/// The last load of a model.
#[derive(Default)]
struct Last {
    split: Option<Split>,
    /// Most layers, after an allocation that failed while the model ran.
    most: Option<u32>,
}

impl Vram {
    /// An account with the worker's limit.
    pub(crate) fn new(config: &Config) -> Vram {
        Vram {
            memory: DeviceMemory::new(config.vram_limit),
            models: Mutex::default(),
        }
    }

    /// Limits for loading the model at `path`: fewer layers than the last time if an allocation failed then.
    pub(crate) fn options(&self, path: &Path, config: &Config) -> DeviceOptions {
        let mut models = lock(&self.models);
        let last = models.entry(path.to_owned()).or_default();
        let failed = last.split.take();
        let failed = failed.filter(|split| split.memory.is_exhausted());
        if let Some(split) = failed {
            let layers = split.device_layers.len() as u32;
            let most = after_failure(layers, 1);
            tracing::warn!(
                path = %path.display(),
                layers,
                most,
                "the GPU's memory ran out while the model ran: fewer of its layers go there"
            );
            last.most = Some(most);
        }
        DeviceOptions {
            memory: self.memory.another(),
            most_layers: last.most,
            ..device_options(config)
        }
    }

    /// The model at `path` is loaded like this.
    pub(crate) fn placed(&self, path: &Path, split: Option<&Split>) {
        let mut models = lock(&self.models);
        models.entry(path.to_owned()).or_default().split = split.cloned();
    }
}

/// Limits of a stage that is alone on the GPU.
pub(crate) fn device_options(config: &Config) -> DeviceOptions {
    DeviceOptions {
        memory: DeviceMemory::new(config.vram_limit),
        free: Some(free),
        kv_memory: config.kv_memory,
        most_layers: None,
    }
}

fn free(provider: Provider) -> Option<u64> {
    mesh_machine::free_vram(Path::new("/"), provider)
}

#[cfg(test)]
mod tests {
    use mesh_engine::{LogitRows, Segment, StageError, StageInput};
    use mesh_engine_ort::{Backend, Opened, OrtOptions, open};
    use mesh_model::synth::{Shape, Tokens, random_model};
    use mesh_model::{Architecture, GgmlType, Model};
    use mesh_testkit::paths;

    use super::*;

    const SLOTS: u32 = 4;
    const CONTEXT: u32 = 1024;

    fn opened(model: &Model, device: DeviceOptions) -> Opened {
        let options = OrtOptions {
            library: Some(paths::ort_library().unwrap()),
            threads: 2,
            slots: SLOTS,
            context: CONTEXT,
            device,
            ..OrtOptions::default()
        };
        open(model, 0..model.config().layers, options, Backend::OrtCpu).unwrap()
    }

    /// Fills all slots, whatever the plan was.
    fn fill(opened: &mut Opened) -> Result<(), StageError> {
        let rows = opened.stage.info().max_rows;
        let tokens: Vec<u32> = (0..rows).map(|i| i % 200).collect();
        for slot in 0..SLOTS {
            for position in (0..CONTEXT).step_by(rows as usize) {
                let segment = Segment {
                    slot,
                    position,
                    rows,
                    logits: LogitRows::None,
                };
                opened
                    .stage
                    .forward(&[segment], StageInput::Tokens(&tokens))?;
            }
        }
        Ok(())
    }

    #[test]
    fn a_model_that_ran_out_of_memory_comes_back_with_fewer_layers_there() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.gguf");
        let shape = Shape {
            layers: 8,
            context: CONTEXT,
            ..Shape::tiny(Architecture::Llama)
        };
        random_model(&shape, GgmlType::Q4_0, Tokens::Bytes, &path).unwrap();
        let model = Model::open(&path).unwrap();
        let config = Config {
            vram_limit: Some(16 << 20),
            ..Config::default()
        };
        let vram = Vram::new(&config);
        let mut layers = Vec::new();
        loop {
            let mut opened = opened(&model, vram.options(&path, &config));
            vram.placed(&path, opened.split.as_ref());
            let Some(split) = opened.split.clone() else {
                break;
            };
            layers.push(split.device_layers.len());
            match fill(&mut opened) {
                Ok(()) => break,
                Err(error) => assert!(matches!(error, StageError::OutOfMemory { .. }), "{error}"),
            }
        }
        assert!(layers.len() > 1, "memory ran out with {layers:?}");
        assert!(layers.is_sorted_by(|more, less| more > less), "{layers:?}");
        // What was learnt holds, and another model is not affected.
        assert_eq!(
            vram.options(&path, &config).most_layers,
            layers.last().map(|layers| *layers as u32)
        );
        let other = vram.options(Path::new("/other.gguf"), &config);
        assert_eq!(other.most_layers, None);
    }
}
