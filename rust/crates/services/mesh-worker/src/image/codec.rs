//! From an ImageTask message to an engine's request, and from its events to ImageSteps and the parts of a PNG file.

use std::time::Instant;

use bytes::Bytes;
use dcf::MsgType;
use mesh_diffusion::imaging::{Image, ImageEvent, ImageRequest, Imaging, InitImage, Progress};
use mesh_diffusion::{DiffuserInfo, SamplerKind};
use mesh_engine::{EngineHandle, Load, RequestError};
use mesh_proto::{
    ImageData, ImageStep, ImageTask, InitialImage, PREVIEW_SHARE, initial_image_bytes,
    preview_is_due,
};
use prost::Message as _;

use super::load::Quiet;
use crate::codec::{Bodies, Codec, ModelEngine, PrepareError, TaskHeader, deadline};
use crate::config::SamplingDefaults;
use crate::templates::Templates;

impl Codec for Imaging<Quiet> {
    const TASK: MsgType = MsgType::IMAGE_TASK;
    const PRECEDES: bool = false;
    const MODEL: &'static str = "an image model";

    type Task = ImageTask;
    type Model = ();
    /// With the pixels to start from.
    type Written = (ImageTask, Bytes);
    type Reply = Reply;

    fn header(task: &ImageTask) -> TaskHeader<'_> {
        TaskHeader {
            id: &task.request_id,
            model: &task.model,
            progress_ms: task.progress_ms,
        }
    }

    fn check(_: &ModelEngine<Self>, task: &ImageTask) -> Result<(), PrepareError> {
        let state = task.resume.as_ref().map_or(0, |step| step.state.len());
        let most = mesh_proto::image_state_bytes(task.width, task.height);
        if state > most {
            let text = format!("the state to go on after has {state} bytes, more than {most}");
            return Err(PrepareError::Invalid(text));
        }
        sampler(task).map(|_| ())
    }

    fn upload_bytes(task: &ImageTask) -> usize {
        task.upload_bytes()
    }

    fn with_upload((_, pixels): &mut (ImageTask, Bytes), upload: Bytes) {
        *pixels = upload;
    }

    /// The latents are not prepared, and do not count.
    fn bytes(task: &ImageTask) -> usize {
        task.prompt.len() + task.negative_prompt.len()
    }

    async fn write(
        _: &ModelEngine<Self>,
        _: &Templates,
        task: ImageTask,
    ) -> Result<(ImageTask, Bytes), PrepareError> {
        Ok((task, Bytes::new()))
    }

    fn request(
        _: &ModelEngine<Self>,
        _: &SamplingDefaults,
        (task, pixels): (ImageTask, Bytes),
        arrived: Instant,
    ) -> Result<(ImageRequest, Reply), PrepareError> {
        let sampler = sampler(&task)?;
        let reply = Reply {
            parameters: parameters(&task, sampler),
            previews: task.previews,
            width: task.width,
            height: task.height,
        };
        let init = task.init.as_ref();
        let init = init
            .map(|init| initial_image(&task, init, &pixels))
            .transpose()?;
        let resume = task.resume.map(|step| Progress {
            step: step.step,
            steps: step.steps,
            state: step.state.into(),
            preview: None,
        });
        let request = ImageRequest {
            id: task.request_id,
            prompt: task.prompt,
            negative_prompt: task.negative_prompt,
            width: task.width,
            height: task.height,
            steps: task.steps,
            guidance: task.guidance,
            seed: task.seed,
            sampler,
            karras: task.karras,
            init,
            resume,
            previews: task.previews > 0,
            deadline: deadline(arrived, task.deadline_ms),
        };
        Ok((request, reply))
    }

    async fn encode(reply: &Reply, event: ImageEvent) -> Result<Bodies, RequestError> {
        let image = match event {
            ImageEvent::Step(progress) => {
                let preview = reply.preview(&progress);
                let step = ImageStep {
                    step: progress.step,
                    steps: progress.steps,
                    state: progress.state.into(),
                    preview,
                };
                return Ok(vec![(MsgType::IMAGE_STEP, step.encode_to_vec())]);
            }
            ImageEvent::Done(image) => image?,
        };
        let file = png(image, reply.parameters.clone()).await?;
        let parts = ImageData::parts(file.into());
        let body = |part: ImageData| (MsgType::IMAGE_DATA, part.encode_to_vec());
        Ok(parts.map(body).collect())
    }

    /// The engine's speed is in steps of any size; the card has it in the head's units, and then the head measures it.
    fn load(engine: &EngineHandle<Self>) -> Load {
        Load {
            decode_tps: 0.0,
            prefill_tps: 0.0,
            // In steps, too, and the head knows what it asked for.
            prefill_backlog: 0,
            ..engine.load()
        }
    }

    fn max_rows(_: &DiffuserInfo) -> usize {
        1
    }
}

/// Needed to encode the events of one image.
pub(crate) struct Reply {
    /// Text of the PNG file that says how the image was made.
    parameters: String,
    /// Previews that the head wants.
    previews: u32,
    /// Pixels of the image.
    width: u32,
    height: u32,
}

impl Reply {
    /// The preview of a step that is to have one, in an eighth of the image's size.
    fn preview(&self, progress: &Progress) -> Bytes {
        let due = preview_is_due(progress.step, progress.steps, self.previews);
        let Some(preview) = progress.preview.as_ref().filter(|_| due) else {
            return Bytes::new();
        };
        let share = PREVIEW_SHARE as u32;
        let (width, height) = (self.width / share, self.height / share);
        // Latents of other models may be finer or coarser.
        let (pixels, _) = preview.rgb.as_chunks::<3>();
        let pixel = |row: u32, column: u32| {
            let row = row * preview.height / height;
            let column = column * preview.width / width;
            let at = (row * preview.width + column) as usize;
            pixels.get(at).copied().unwrap_or_default()
        };
        let rows = (0..height).flat_map(|row| (0..width).map(move |column| (row, column)));
        rows.flat_map(|(row, column)| pixel(row, column)).collect()
    }
}

/// The pixels to start from and the mask, of bytes that came with a task.
fn initial_image(
    task: &ImageTask,
    init: &InitialImage,
    bytes: &Bytes,
) -> Result<InitImage, PrepareError> {
    let (wanted, came) = (task.upload_bytes(), bytes.len());
    if wanted != came {
        let text = format!("{came} bytes of pixels came instead of {wanted}");
        return Err(PrepareError::Invalid(text));
    }
    let (rgb, mask) = bytes.split_at(initial_image_bytes(task.width, task.height, false));
    let bit = |byte: u8, at: usize| if byte >> (7 - at) & 1 == 1 { 255 } else { 0 };
    let mask = init.masked.then(|| {
        let bits = mask
            .iter()
            .flat_map(|&byte| (0..8).map(move |at| bit(byte, at)));
        bits.take(rgb.len() / 3).collect()
    });
    let image = Image {
        width: task.width,
        height: task.height,
        rgb: rgb.to_vec(),
    };
    let strength = init.strength;
    Ok(InitImage {
        image,
        strength,
        mask,
    })
}

fn sampler(task: &ImageTask) -> Result<SamplerKind, PrepareError> {
    let known = task.sampler.parse::<SamplerKind>();
    known.map_err(|error| PrepareError::Invalid(error.to_string()))
}

/// The file of an image. It takes milliseconds to compress, in which other streams go on.
async fn png(image: Image, parameters: String) -> Result<Vec<u8>, RequestError> {
    let failed = |reason: String| {
        RequestError::Stage(mesh_engine::StageError::Backend {
            backend: "png",
            message: reason,
        })
    };
    let encoding =
        tokio::task::spawn_blocking(move || mesh_diffusion::png::encode(&image, Some(&parameters)));
    let encoded = encoding.await.map_err(|error| failed(error.to_string()))?;
    encoded.map_err(|error| failed(error.to_string()))
}

/// How the image was made, in the form that AUTOMATIC1111's web interface reads. It must not differ between workers.
fn parameters(task: &ImageTask, sampler: SamplerKind) -> String {
    let negative = match task.negative_prompt.is_empty() {
        true => String::new(),
        false => format!("\nNegative prompt: {}", task.negative_prompt),
    };
    let karras = if task.karras {
        ", Schedule type: Karras"
    } else {
        ""
    };
    let strength = task.init.as_ref().map_or_else(String::new, |init| {
        format!(", Denoising strength: {}", init.strength)
    });
    format!(
        "{}{negative}\nSteps: {}, Sampler: {sampler}{karras}, CFG scale: {}, Seed: {}, Size: {}x{}, Model: {}{strength}",
        task.prompt, task.steps, task.guidance, task.seed, task.width, task.height, task.model
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn task() -> ImageTask {
        ImageTask {
            model: "sd".into(),
            prompt: "a fox".into(),
            width: 64,
            height: 32,
            steps: 7,
            guidance: 3.5,
            seed: 9,
            sampler: "euler".into(),
            ..ImageTask::default()
        }
    }

    #[test]
    fn the_file_says_how_it_was_made() {
        let text = parameters(&task(), SamplerKind::Euler);
        assert_eq!(
            text,
            "a fox\nSteps: 7, Sampler: euler, CFG scale: 3.5, Seed: 9, Size: 64x32, Model: sd"
        );
        let more = ImageTask {
            negative_prompt: "blurry".into(),
            karras: true,
            ..task()
        };
        let text = parameters(&more, SamplerKind::Euler);
        assert!(
            text.contains("\nNegative prompt: blurry\n") && text.contains("Karras"),
            "{text}"
        );
    }

    #[tokio::test]
    async fn an_image_becomes_the_parts_of_a_png_file() {
        let image = Image {
            width: 64,
            height: 32,
            rgb: vec![7; 64 * 32 * 3],
        };
        let reply = reply(1);
        let bodies = Imaging::<Quiet>::encode(&reply, ImageEvent::Done(Ok(image))).await;
        let bodies = bodies.unwrap();
        let mut file = Vec::new();
        for (kind, body) in bodies {
            assert_eq!(kind, MsgType::IMAGE_DATA);
            file.extend_from_slice(&ImageData::decode(&body[..]).unwrap().data);
        }
        assert!(
            file.starts_with(b"\x89PNG") && file.len() < mesh_proto::image_file_bytes(64, 32, 5)
        );
        let progress = Progress {
            step: 2,
            steps: 7,
            state: vec![1, 2],
            preview: None,
        };
        let bodies = Imaging::<Quiet>::encode(&reply, ImageEvent::Step(progress)).await;
        let (kind, body) = bodies.unwrap().remove(0);
        assert_eq!(kind, MsgType::IMAGE_STEP);
        assert_eq!(ImageStep::decode(&body[..]).unwrap().step, 2);
    }

    fn reply(previews: u32) -> Reply {
        Reply {
            parameters: parameters(&task(), SamplerKind::Euler),
            previews,
            width: 64,
            height: 32,
        }
    }

    #[test]
    fn the_steps_that_are_due_have_a_preview_of_an_eighth() {
        let of = |step: u32, width: u32, height: u32| Progress {
            step,
            steps: 7,
            state: Vec::new(),
            preview: Some(Image {
                width,
                height,
                rgb: (0..width * height * 3).map(|at| at as u8).collect(),
            }),
        };
        let preview = reply(1).preview(&of(4, 8, 4));
        assert_eq!(preview, (0..96).collect::<Vec<u8>>());
        assert!(reply(1).preview(&of(3, 8, 4)).is_empty());
        assert!(reply(0).preview(&of(4, 8, 4)).is_empty());
        // Finer latents, and coarser ones.
        for (width, height) in [(16, 8), (4, 2)] {
            let preview = reply(1).preview(&of(4, width, height));
            assert_eq!(preview.len(), mesh_proto::preview_bytes(64, 32));
            assert_eq!(preview[..3], [0, 1, 2]);
        }
    }

    #[test]
    fn pixels_and_mask_are_taken_apart() {
        let with = |masked: bool| ImageTask {
            init: Some(InitialImage {
                strength: 0.5,
                masked,
            }),
            ..task()
        };
        let mut bytes: Vec<u8> = vec![9; 64 * 32 * 3];
        let plain = with(false);
        let init = plain.init.as_ref().unwrap();
        let image = initial_image(&plain, init, &bytes.clone().into()).unwrap();
        assert_eq!((image.strength, image.mask), (0.5, None));
        bytes.extend([0b1010_0000; 64 * 32 / 8]);
        let masked = with(true);
        let init = masked.init.as_ref().unwrap();
        let image = initial_image(&masked, init, &bytes.clone().into()).unwrap();
        let mask = image.mask.unwrap();
        assert_eq!((mask.len(), &mask[..4]), (64 * 32, &[255, 0, 255, 0][..]));
        bytes.pop();
        assert!(initial_image(&masked, init, &bytes.into()).is_err());
    }

    #[test]
    fn a_sampler_that_does_not_exist_is_refused() {
        let wrong = ImageTask {
            sampler: "heun".into(),
            ..task()
        };
        assert!(sampler(&wrong).is_err() && sampler(&task()).is_ok());
    }
}
