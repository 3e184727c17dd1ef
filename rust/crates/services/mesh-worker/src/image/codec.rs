//! From an ImageTask message to an engine's request, and from its events to ImageSteps and the parts of a PNG file.

use std::time::Instant;

use dcf::MsgType;
use mesh_diffusion::imaging::{Image, ImageEvent, ImageRequest, Imaging, Progress};
use mesh_diffusion::{DiffuserInfo, SamplerKind};
use mesh_engine::{EngineHandle, Load, RequestError};
use mesh_proto::{ImageData, ImageStep, ImageTask};
use prost::Message as _;

use super::load::Quiet;
use crate::codec::{Bodies, Codec, ModelEngine, PrepareError, TaskHeader, deadline};
use crate::config::SamplingDefaults;
use crate::templates::Templates;

impl Codec for Imaging<Quiet> {
    const TASK: MsgType = MsgType::IMAGE_TASK;
    const MODEL: &'static str = "an image model";

    type Task = ImageTask;
    type Model = ();
    type Written = ImageTask;
    /// Text of the PNG file that says how the image was made.
    type Reply = String;

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

    /// The latents are not prepared, and do not count.
    fn bytes(task: &ImageTask) -> usize {
        task.prompt.len() + task.negative_prompt.len()
    }

    async fn write(
        _: &ModelEngine<Self>,
        _: &Templates,
        task: ImageTask,
    ) -> Result<ImageTask, PrepareError> {
        Ok(task)
    }

    fn request(
        _: &ModelEngine<Self>,
        _: &SamplingDefaults,
        task: ImageTask,
        arrived: Instant,
    ) -> Result<(ImageRequest, String), PrepareError> {
        let sampler = sampler(&task)?;
        let parameters = parameters(&task, sampler);
        let resume = task.resume.map(|step| Progress {
            step: step.step,
            steps: step.steps,
            state: step.state.into(),
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
            init: None,
            resume,
            deadline: deadline(arrived, task.deadline_ms),
        };
        Ok((request, parameters))
    }

    async fn encode(parameters: &String, event: ImageEvent) -> Result<Bodies, RequestError> {
        let image = match event {
            ImageEvent::Step(progress) => {
                let step = ImageStep {
                    step: progress.step,
                    steps: progress.steps,
                    state: progress.state.into(),
                };
                return Ok(vec![(MsgType::IMAGE_STEP, step.encode_to_vec())]);
            }
            ImageEvent::Done(image) => image?,
        };
        let file = png(image, parameters.clone()).await?;
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
    format!(
        "{}{negative}\nSteps: {}, Sampler: {sampler}{karras}, CFG scale: {}, Seed: {}, Size: {}x{}, Model: {}",
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
        let parameters = parameters(&task(), SamplerKind::Euler);
        let bodies = Imaging::<Quiet>::encode(&parameters, ImageEvent::Done(Ok(image))).await;
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
        };
        let bodies = Imaging::<Quiet>::encode(&parameters, ImageEvent::Step(progress)).await;
        let (kind, body) = bodies.unwrap().remove(0);
        assert_eq!(kind, MsgType::IMAGE_STEP);
        assert_eq!(ImageStep::decode(&body[..]).unwrap().step, 2);
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
