//! Loads models for images.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::StreamExt;
use mesh_diffusion::checkpoint::Checkpoint;
use mesh_diffusion::imaging::{
    Conditioning, Diffuser, DiffuserInfo, Image, ImageEvent, ImageRequest, Imaging, ImagingOptions,
    LatentShape,
};
use mesh_diffusion::prompt::Prompt;
use mesh_diffusion::tokenizer::ClipTokenizer;
use mesh_engine::{Engine, EngineHandle, StageError};
use mesh_engine_ort::Backend;
use mesh_engine_tch::{Device, Offload, Options, TchDiffuser, WeightForm};
use mesh_machine::Memory;
use mesh_model::model::model_name;
use mesh_proto::{ImageCard, ModelCard, ModelKind};
use mesh_store::Hasher;
use mesh_store::manifest::model_files;

use crate::config::{Config, ImageOffload, ImageWeights, ImagesConfig};
use crate::error::WorkerError;
use crate::precedence;
use crate::served::ServedModel;

/// Loads the model at `path`, starts its engine and lets it make a small image, which also measures its speed. It is called as
/// its file or folder is unless there is a `name`.
pub(crate) fn load(
    path: &Path,
    name: Option<&str>,
    _: Option<&str>,
    config: &Config,
) -> Result<ServedModel, WorkerError> {
    let started = Instant::now();
    let name = name.map_or_else(|| model_name(path), str::to_owned);
    let failed = |reason: String| WorkerError::Imaging {
        name: name.clone(),
        reason,
    };
    let checkpoint = Checkpoint::open(path).map_err(|error| failed(error.to_string()))?;
    let checkpoint = Arc::new(checkpoint);
    let end = checkpoint.config().text.first().map_or(0, |text| text.end);
    let tokenizer = tokenizer(path, end, config).map_err(failed)?;
    let options = options(config, &checkpoint).map_err(failed)?;
    let model = TchDiffuser::load(&checkpoint, &options);
    let model = model.map_err(|error| failed(error.to_string()))?;
    let fingerprint = fingerprint(path, config);
    let fingerprint = fingerprint.map_err(|error| WorkerError::fingerprint(path, &error))?;
    let file_bytes = checkpoint.bytes();
    drop(checkpoint);
    let model = Quiet {
        model,
        nice: config.images.nice,
    };
    let turns = ImagingOptions {
        queue_limit: config.queue_limit,
        ..ImagingOptions::default()
    };
    let patience = config.images.patience;
    let start = |_| {
        let imaging = Imaging::new(model, Arc::new(tokenizer), turns);
        Ok(imaging.giving_way(precedence::is_taken, patience))
    };
    let engine = Engine::start_with(&name, start).map_err(|source| WorkerError::Start {
        name: name.clone(),
        source,
    })?;
    let handle = engine.handle();
    let speed = warm_up(&handle, &name)?;
    let info = handle.info();
    let card = ModelCard {
        architecture: info.family.clone(),
        fingerprint,
        // One image at a time is as fast as several in turns, and the head's queue is the fair one.
        slots: 1,
        decode_tps: speed,
        prefill_tps: speed,
        file_bytes,
        kind: ModelKind::Image.into(),
        image: Some(image_card(info, config)),
        name,
        ..ModelCard::default()
    };
    tracing::info!(
        model = card.name,
        family = info.family,
        seconds = started.elapsed().as_secs_f64(),
        weight_mib = info.weight_bytes >> 20,
        units_per_second = speed,
        "image model loaded"
    );
    let backend = match options.device {
        Device::Gpu(_) => "cuda",
        _ => "cpu",
    };
    Ok(ServedModel::new(path, (), engine, card, backend))
}

fn image_card(info: &DiffuserInfo, config: &Config) -> ImageCard {
    let own = &config.images;
    let pixels = |limit: u64| {
        let room = limit.saturating_sub(info.memory_base);
        room / info.memory_per_pixel.max(1)
    };
    ImageCard {
        width: info.default_size,
        height: info.default_size,
        steps: match own.steps {
            0 => info.default_steps,
            steps => steps,
        },
        // 0 would be unset; both are without guidance.
        guidance: own.guidance.unwrap_or(info.default_guidance).max(1.0),
        sampler: info.default_sampler.name().to_owned(),
        most_pixels: info.memory_limit.map_or(0, pixels),
        least_side: info.min_size,
    }
}

/// The device, and the memory for weights and images. A model whose weights alone do not fit is refused before they are read.
fn options(config: &Config, checkpoint: &Checkpoint) -> Result<Options, String> {
    let device = match config.backend {
        Backend::Auto => Device::Auto,
        // libtorch has no WebGPU.
        Backend::Cpu | Backend::OrtCpu | Backend::WebGpu => Device::Cpu,
        // ROCm's devices have CUDA's names in libtorch.
        Backend::Cuda | Backend::MiGraphX => Device::Gpu(0),
    };
    let mut options = form(&config.images);
    options.device = device;
    options.threads = config.threads;
    // A GPU has memory of its own.
    if device != Device::Cpu && Device::gpus() > 0 {
        let weights = options.weight_bytes(checkpoint);
        options.memory_limit = config.images.memory.map(|memory| memory + weights);
        return Ok(options);
    }
    options.device = match device {
        Device::Auto => Device::Cpu,
        named => named,
    };
    let free = Memory::read(Path::new("/")).available;
    if let (Some(free), ImageOffload::Auto) = (free, config.images.offload) {
        options = options.within(checkpoint, free.saturating_sub(ROOM));
    }
    let weights = options.weight_bytes(checkpoint);
    if let Some(free) = free.filter(|free| *free < weights) {
        return Err(format!(
            "its weights take {} MiB and {} MiB of memory are free; free some, serve a smaller model, or let parts of it be read \
             for their use with `images.offload`",
            weights >> 20,
            free >> 20
        ));
    }
    let left = free.map(|free| (free - weights) / 4 * 3);
    let images = config.images.memory.or(left);
    options.memory_limit = images.map(|images| images.saturating_add(weights));
    Ok(options)
}

/// Form of the weights as configured.
fn form(images: &ImagesConfig) -> Options {
    Options {
        weights: match images.weights {
            ImageWeights::Auto => WeightForm::Auto,
            ImageWeights::Full => WeightForm::Full,
            ImageWeights::File => WeightForm::File,
            ImageWeights::Int8 => WeightForm::Int8,
        },
        offload: match images.offload {
            ImageOffload::Auto | ImageOffload::None => Offload::None,
            ImageOffload::Modules => Offload::Modules,
            ImageOffload::Sequential => Offload::Sequential,
        },
        ..Options::default()
    }
}

/// The tokenizer of a model: in a folder of its own, or beside the one file. All models of the three families have CLIP's, so a
/// file without one takes that of a model beside it or in a folder of models.
fn tokenizer(path: &Path, end: u32, config: &Config) -> Result<ClipTokenizer, String> {
    if path.is_dir() {
        return ClipTokenizer::open(&path.join("tokenizer")).map_err(|error| error.to_string());
    }
    let beside = path.parent().unwrap_or(Path::new(".")).to_owned();
    let has_one = |folder: &Path| {
        let has = |name: &str| folder.join(name).is_file();
        (has("vocab.json") && has("merges.txt")) || has("tokenizer.json")
    };
    for folder in [beside.join("tokenizer"), beside.clone()] {
        if has_one(&folder) {
            return ClipTokenizer::open(&folder).map_err(|error| error.to_string());
        }
    }
    let mut folders = vec![beside.clone()];
    folders.extend(config.folders());
    folders.push(config.store_dir().join("models"));
    for folder in folders.iter().flat_map(|folder| neighbours(folder)) {
        match ClipTokenizer::open(&folder) {
            // The vocabulary of this model.
            Ok(tokenizer) if tokenizer.end() == end => {
                tracing::info!(from = %folder.display(), model = %path.display(), "the model takes another one's tokenizer");
                return Ok(tokenizer);
            }
            _ => {}
        }
    }
    let looked = folders.iter().map(|folder| folder.display().to_string());
    Err(format!(
        "{} is one file, which has no tokenizer, and no model in {} has one with its vocabulary: put vocab.json and merges.txt of \
         CLIP (openai/clip-vit-large-patch14, or the folder tokenizer of any Stable Diffusion model) into {}",
        path.display(),
        looked.collect::<Vec<_>>().join(", "),
        beside.display()
    ))
}

/// Folders `tokenizer` of the models in a folder, in order.
fn neighbours(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let models = entries.take(MOST_NEIGHBOURS).map(|entry| entry.path());
    let mut found: Vec<PathBuf> = models
        .filter(|model| model.join(mesh_model::image::INDEX).is_file())
        .map(|model| model.join("tokenizer"))
        .filter(|tokenizer| tokenizer.is_dir())
        .collect();
    found.sort();
    found
}

/// SHA-256 over all that decides about an image, so that two workers with the same one make the same images.
fn fingerprint(path: &Path, config: &Config) -> std::io::Result<String> {
    let cache = config.fingerprints();
    // All other forms of weights give the same images.
    let rounded = config.images.weights == ImageWeights::Int8;
    if !path.is_dir() {
        let digest = cache.file(path)?;
        if !rounded {
            return Ok(digest);
        }
        let mut hasher = Hasher::default();
        hasher.update(format!("{digest}  {INT8}").as_bytes());
        return Ok(hasher.finish().to_string());
    }
    let all = model_files(path).map_err(std::io::Error::other)?;
    let decides = |file: &&PathBuf| {
        let folder = file.parent().map(|folder| folder.to_string_lossy());
        let folder = folder.unwrap_or_default();
        let modules = ["unet", "vae", "text_encoder", "tokenizer", "scheduler"];
        modules.iter().any(|module| folder.starts_with(module))
    };
    let mut files: Vec<&PathBuf> = all.iter().filter(decides).collect();
    files.sort();
    let mut hasher = Hasher::default();
    for file in files {
        let digest = cache.file(&path.join(file))?;
        hasher.update(format!("{digest}  {}\n", file.display()).as_bytes());
    }
    if rounded {
        hasher.update(INT8.as_bytes());
    }
    Ok(hasher.finish().to_string())
}

/// Proof that an image comes out, and the first measurement of the speed, in units as the head counts them.
fn warm_up(engine: &EngineHandle<Imaging<Quiet>>, name: &str) -> Result<f32, WorkerError> {
    let info = engine.info();
    let multiple = info.size_multiple.max(1);
    let side = (info.default_size / 2).max(info.min_size) / multiple * multiple;
    let side = side.max(info.min_size);
    let request = ImageRequest {
        id: "warm-up".to_owned(),
        prompt: "warm-up".to_owned(),
        negative_prompt: String::new(),
        width: side,
        height: side,
        steps: WARM_UP_STEPS,
        guidance: info.default_guidance,
        seed: 0,
        sampler: info.default_sampler,
        karras: false,
        init: None,
        resume: None,
        previews: false,
        deadline: None,
    };
    let making = async {
        let mut events = engine.submit(request);
        let mut times = Vec::new();
        while let Some(event) = events.next().await {
            match event {
                ImageEvent::Step(_) => times.push(Instant::now()),
                ImageEvent::Done(Ok(_)) => return Ok(times),
                ImageEvent::Done(Err(error)) => return Err(error.to_string()),
            }
        }
        Err("its engine ended".to_owned())
    };
    let times = futures::executor::block_on(making).map_err(|reason| WorkerError::Imaging {
        name: name.to_owned(),
        reason: format!("it makes no image: {reason}"),
    })?;
    let step = match times[..] {
        [.., before, last] => last - before,
        _ => Duration::from_secs(1),
    };
    let units = f64::from(side) * f64::from(side) / f64::from(UNIT * UNIT);
    Ok((units / step.as_secs_f64().max(1e-6)) as f32)
}

/// A model whose thread has a lower priority than those that make text: it is set where the thread first computes, and libtorch's
/// own threads inherit it from there.
pub(crate) struct Quiet {
    model: TchDiffuser,
    /// Nice value to add; 0 when that is done.
    nice: i32,
}

impl Quiet {
    fn quiet(&mut self) -> &mut TchDiffuser {
        let nice = std::mem::take(&mut self.nice);
        if nice > 0
            && let Err(error) = rustix::process::nice(nice)
        {
            tracing::debug!(%error, "images are made at the priority of text");
        }
        &mut self.model
    }
}

impl Diffuser for Quiet {
    fn info(&self) -> &DiffuserInfo {
        self.model.info()
    }

    fn encode(
        &mut self,
        prompt: &Prompt,
        negative: Option<&Prompt>,
    ) -> Result<Conditioning, StageError> {
        self.quiet().encode(prompt, negative)
    }

    fn denoise(
        &mut self,
        latents: &[f32],
        shape: LatentShape,
        timestep: f32,
        conditioning: &Conditioning,
        guidance: f32,
    ) -> Result<Vec<f32>, StageError> {
        let model = self.quiet();
        model.denoise(latents, shape, timestep, conditioning, guidance)
    }

    fn decode(&mut self, latents: &[f32], shape: LatentShape) -> Result<Image, StageError> {
        self.quiet().decode(latents, shape)
    }

    fn encode_image(
        &mut self,
        image: &Image,
        mask: Option<&[u8]>,
        noise: &[f32],
    ) -> Result<Vec<f32>, StageError> {
        self.quiet().encode_image(image, mask, noise)
    }
}

/// Entries of a folder of models that are looked at for a tokenizer.
const MOST_NEIGHBOURS: usize = 4096;

/// Mark of models whose weights are rounded to 8 bits.
const INT8: &str = "int8\n";

/// Memory that is left for an image when a model's weights are chosen by the memory that is free.
const ROOM: u64 = 1 << 30;

/// The second one shows the speed; the first pays for memory that it finds.
const WARM_UP_STEPS: u32 = 3;

/// Side of the square of pixels that is one unit of work in a step.
const UNIT: u32 = 64;

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// CLIP's vocabulary in small: bytes, and the marks of a text's start and end at `end`.
    fn write_tokenizer(folder: &Path, end: u32) {
        mesh_diffusion::synth::write_tokenizer(folder, end + 1).unwrap();
    }

    #[test]
    fn one_file_takes_the_tokenizer_of_a_model_with_its_vocabulary() {
        let (own, others) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let file = own.path().join("model.safetensors");
        fs::write(&file, "").unwrap();
        let config = Config {
            model_dirs: vec![others.path().into()],
            ..Config::default()
        };
        let error = tokenizer(&file, 513, &config).err().unwrap();
        for word in ["vocab.json", "merges.txt", "openai/clip-vit-large-patch14"] {
            assert!(error.contains(word), "{error}");
        }
        assert!(
            error.contains(&others.path().display().to_string()),
            "{error}"
        );

        let model = |name: &str, end: u32| {
            let model = others.path().join(name);
            write_tokenizer(&model.join("tokenizer"), end);
            fs::write(model.join(mesh_model::image::INDEX), "{}").unwrap();
        };
        model("another-vocabulary", 560);
        assert!(tokenizer(&file, 513, &config).is_err());
        model("the-same", 513);
        assert_eq!(tokenizer(&file, 513, &config).unwrap().end(), 513);
        // Its own comes first.
        write_tokenizer(own.path(), 570);
        assert_eq!(tokenizer(&file, 513, &config).unwrap().end(), 570);
    }
}
