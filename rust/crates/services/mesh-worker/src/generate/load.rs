//! Loads chat models.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use mesh_engine::{Engine, EngineHandle, Event, Request, SchedulerConfig, StageInfo};
use mesh_engine_ort::{
    DeviceOptions, Opened, OrtOptions, Reclaim, Split, WeightCache, WeightFormat,
};
use mesh_machine::Memory;
use mesh_model::{Model, Tokenizer};
use mesh_proto::ModelCard;

use crate::config::Config;
use crate::error::WorkerError;
use crate::served::ServedModel;
use crate::templates::{TemplateError, Templates};
use crate::vram::{Vram, device_options};

/// Loads the model at `path` and lets it answer once. It is called as its file is unless there is a
/// `name`; its fingerprint is computed unless it is known. Blocks.
pub(crate) fn load(
    path: &Path,
    name: Option<&str>,
    known: Option<&str>,
    config: &Config,
    templates: &Templates,
    vram: &Vram,
) -> Result<ServedModel, WorkerError> {
    let started = Instant::now();
    // Loading takes a multiple of the memory that serving does.
    let _reclaim = Reclaim;
    let model = Model::open(path)?;
    let name = name.map_or_else(|| model.name(), str::to_owned);
    if let Some(known) = known {
        model.know_fingerprint(known);
    }
    let stop = AtomicBool::new(false);
    let cache = config.fingerprints();
    let fingerprint = std::thread::scope(|scope| {
        // Reading the whole file takes as long as packing its weights: side by side.
        let fingerprint = scope.spawn(|| match known {
            Some(known) => Ok(known.to_owned()),
            // Of a folder it is made of the digests of its files.
            None if path.is_dir() => model
                .fingerprint()
                .map(str::to_owned)
                .map_err(std::io::Error::other),
            None => cache.fingerprint_until(path, &stop),
        });
        let stage = load_stage(&model, &name, config, vram.options(path, config));
        // No one needs the fingerprint of a model that does not load.
        let stage = stage.inspect_err(|_| stop.store(true, Ordering::Relaxed))?;
        let panicked = |_| Err(std::io::Error::other("it panicked"));
        let fingerprint = fingerprint.join().unwrap_or_else(panicked);
        let fingerprint = fingerprint.map_err(|error| WorkerError::fingerprint(path, &error))?;
        Ok::<_, WorkerError>((stage, fingerprint))
    });
    let (opened, fingerprint) = fingerprint?;
    learn_turn_end(&model, &name, templates);
    // Before its first step: should memory be short then, the next load knows of it.
    vram.placed(path, opened.split.as_ref());
    let info = opened.stage.info().clone();
    let scheduler = SchedulerConfig {
        kv_tokens: Some(kv_tokens(
            config,
            &info,
            opened.split.as_ref(),
            Path::new("/"),
        )),
        ..config.scheduler()
    };
    let start = |source| WorkerError::Start {
        name: name.clone(),
        source,
    };
    let stage = opened.stage;
    #[cfg(test)]
    let stage = crate::engine_death::stage_of(&name, stage);
    let engine = Engine::start(&name, stage, Arc::new(model.clone()), scheduler).map_err(start)?;
    let handle = engine.handle();
    warm_up(&handle, &name, model.tokenizer())?;
    let measured = handle.load();

    let context = u32::try_from(measured.kv_tokens_total).unwrap_or(u32::MAX);
    let context = context.min(info.context);
    if context < info.context {
        tracing::warn!(
            model = name,
            context,
            wanted = info.context,
            "memory for keys and values is short, so conversations are: set kv_memory, or give the worker more memory"
        );
    }
    let card = ModelCard {
        context,
        slots: info.slots,
        decode_tps: measured.decode_tps,
        prefill_tps: measured.prefill_tps,
        layer_start: info.layers.start,
        layer_end: info.layers.end,
        ..card(&name, &model, &fingerprint)
    };
    tracing::info!(
        model = card.name,
        backend = %opened.provider,
        seconds = started.elapsed().as_secs_f64(),
        weight_mib = info.weight_bytes >> 20,
        kv_tokens = measured.kv_tokens_total,
        decode_tokens_per_second = measured.decode_tps,
        prefill_tokens_per_second = measured.prefill_tps,
        "model loaded"
    );
    let backend = opened.provider.name();
    let served = ServedModel::new(path, model.into(), engine, card, backend);
    Ok(served.placed(opened.split))
}

/// Logs the faults of a model's chat template once, and finds the token that it puts behind an answer.
pub(crate) fn learn_turn_end(model: &Model, name: &str, templates: &Templates) {
    let template = model.template();
    if template.is_fallback() {
        tracing::warn!(
            model = name,
            format = template.name(),
            "the model brings no chat template: conversations are written in a format that it may not know"
        );
    }
    match futures::executor::block_on(templates.render(template, Model::turn_probe())) {
        Ok(rendered) => {
            if let Some(token) = model.learn_turn_end(&rendered.text) {
                tracing::warn!(
                    model = name,
                    token,
                    "the model's file does not say so, but its chat template ends answers with this token"
                );
            }
        }
        Err(error @ TemplateError::Invalid(_)) => {
            tracing::error!(model = name, %error, "conversations with this model are refused");
        }
        Err(error) => tracing::debug!(model = name, %error, "the chat template has no answers"),
    }
    match futures::executor::block_on(templates.render(template, Model::text_probe())) {
        Ok(rendered) => model.learn_keeps_text(&rendered.text),
        Err(error) => {
            tracing::debug!(model = name, %error, "the chat template takes no long conversation")
        }
    }
}

/// Description of a model without loading it.
pub(crate) fn card(name: &str, model: &Model, fingerprint: &str) -> ModelCard {
    let spans = model.tokenizer().spans();
    ModelCard {
        name: name.to_owned(),
        architecture: model.config().architecture.name().to_owned(),
        fingerprint: fingerprint.to_owned(),
        context: model.config().context,
        // Of a folder, its weights.
        file_bytes: model.tensors().file_len(),
        quantization: quantization(model),
        byte_spans: spans.map_or_else(Vec::new, |spans| spans.as_bytes().to_vec()),
        keeps_text: model.keeps_text(),
        ..ModelCard::default()
    }
}

pub(crate) fn options(config: &Config) -> OrtOptions {
    OrtOptions {
        library: config.ort_library.clone(),
        webgpu_library: config.webgpu_library.clone(),
        threads: config.threads,
        slots: config.slots,
        context: config.context,
        max_rows: config.step_rows,
        cache: (config.weights.cache > 0).then(|| WeightCache {
            folder: config.state_dir.join("weights"),
            limit: config.weights.cache,
        }),
        device: device_options(config),
        ..OrtOptions::default()
    }
}

fn load_stage(
    model: &Model,
    name: &str,
    config: &Config,
    device: DeviceOptions,
) -> Result<Opened, WorkerError> {
    let layers = 0..model.config().layers;
    let options = OrtOptions {
        weights: config.weights.format.of(model),
        device,
        ..options(config)
    };
    if options.weights != WeightFormat::File && model.known_fingerprint().is_none() {
        // Weights that were quantised before are found by it. If it cannot be had, the caller will say so.
        if let Ok(fingerprint) = config.fingerprints().fingerprint(model.path()) {
            model.know_fingerprint(&fingerprint);
        }
    }
    // The log already has the reason for which a GPU is not used.
    let opened = mesh_engine_ort::open(model, layers, options, config.backend);
    opened.map_err(|error| WorkerError::Load {
        name: name.to_owned(),
        source: Box::new(error),
    })
}

/// Lets the engine answer once: proof that a token comes out, and the first measurement of its speed.
pub(crate) fn warm_up(
    engine: &EngineHandle,
    name: &str,
    tokenizer: &Tokenizer,
) -> Result<(), WorkerError> {
    let vocab = tokenizer.vocab_size().max(1) as u32;
    let length = WARM_UP_PROMPT.min(engine.info().context / 2).max(1);
    // Any tokens will do; spread over the vocabulary they touch as much of the embedding as text does.
    let prompt = (0..length).map(|i| i.wrapping_mul(7919) % vocab).collect();
    let request = Request {
        ignore_eos: true,
        ..Request::greedy("warm-up", prompt, WARM_UP_ANSWER)
    };
    let reason = match futures::executor::block_on(engine.submit(request).last_event()) {
        Event::Done(done) if done.completion_tokens > 0 => return Ok(()),
        Event::Failed(error) => error.to_string(),
        other => format!("it ended with {other:?}"),
    };
    Err(WorkerError::Broken {
        name: name.to_owned(),
        reason,
    })
}

/// KV memory of one model, in tokens. `root` is `/` but in tests.
fn kv_tokens(config: &Config, info: &StageInfo, split: Option<&Split>, root: &Path) -> u64 {
    let on_device = split.and_then(|split| split.kv_tokens);
    let bytes_per_token = match (split, on_device, config.kv_memory) {
        // The rows on the device take none of this machine's free memory.
        (Some(split), Some(_), None) => split.cpu_kv_bytes_per_token,
        _ => info.kv_bytes_per_token,
    };
    let here = kv_tokens_here(config, bytes_per_token, root);
    here.min(on_device.unwrap_or(u64::MAX))
}

fn kv_tokens_here(config: &Config, bytes_per_token: u64, root: &Path) -> u64 {
    let models = config.models.len().max(1) as u64;
    let bytes = config
        .kv_memory
        .or_else(|| Some(Memory::read(root).available? / 2 / models));
    bytes.map_or(u64::MAX, |bytes| bytes / bytes_per_token.max(1))
}

/// The format of most bytes.
fn quantization(model: &Model) -> String {
    let mut bytes = std::collections::BTreeMap::<String, u64>::new();
    for tensor in model.tensors().iter() {
        *bytes.entry(format!("{:?}", tensor.ty)).or_default() += tensor.data.len() as u64;
    }
    let most = bytes.into_iter().max_by_key(|&(_, bytes)| bytes);
    most.map_or_else(String::new, |(name, _)| name)
}

/// Enough rows to measure prefill by, few enough to keep the start short.
const WARM_UP_PROMPT: u32 = 96;

const WARM_UP_ANSWER: u32 = 12;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kv_cache_takes_half_of_what_a_container_may_use() {
        let root = tempfile::tempdir().expect("a folder");
        for (path, text) in [
            (
                "proc/meminfo",
                "MemTotal: 64000 kB\nMemAvailable: 60000 kB\n",
            ),
            ("proc/self/cgroup", "0::/\n"),
            ("sys/fs/cgroup/memory.max", "8000000\n"),
            ("sys/fs/cgroup/memory.current", "5000000\n"),
            ("sys/fs/cgroup/memory.stat", "inactive_file 1000000\n"),
        ] {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().expect("a parent")).expect("a folder");
            std::fs::write(path, text).expect("written");
        }
        let mut config = Config {
            models: vec!["one".into()],
            ..Config::default()
        };
        assert_eq!(kv_tokens_here(&config, 1000, root.path()), 2000);
        config.models.push("two".into());
        assert_eq!(kv_tokens_here(&config, 1000, root.path()), 1000);
        config.kv_memory = Some(1 << 20);
        assert_eq!(kv_tokens_here(&config, 1 << 10, root.path()), 1 << 10);
    }
}
