//! Images: made on a worker, step by step, and gone on with on another one after the last step when it dies.

use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use dcf::{ErrorCode, MsgType};
use mesh_api::paths;
use mesh_control::fair::{Ingress, Source};
use mesh_control::image::{ArrivingImage, step_units};
use mesh_control::placement::Refusal;
use mesh_control::request::{AnswerError, Bounds, Failure, Lifecycle, Step};
use mesh_control::router::Requirements;
use mesh_proto::{Done, ImageCard, ImageData, ImageStep, ImageTask, InitialImage, ModelKind};
use tracing::{debug, info};

use super::attempts::Flight;
use super::codec::{AttemptTerms, Codec};
use super::event::Event;
use super::outcome::Account;
use super::task::{ImageRequest, MadeImage};
use crate::api::preview::Preview;
use crate::ids;
use crate::mesh::connection::{FromWorker, WorkerRequest};
use crate::mesh::{Lease, Mesh, message};
use crate::metrics::Front;
use crate::workers::requests::read;

/// Makes an image. Dropping the future cancels it. The memory of its latents and its file is added to `lease`;
/// `tell` hears of its waits and steps.
///
/// # Errors
/// Why there is no image.
pub(crate) async fn make(
    mesh: &Arc<Mesh>,
    front: Front,
    request: ImageRequest,
    lease: &mut Lease,
    tell: impl FnMut(Event) + Send,
) -> Result<MadeImage, AnswerError> {
    let id = request.id.clone();
    let mut account = Account::new(
        mesh,
        front,
        ("image", &id),
        (request.origin, request.holder.clone()),
        request.model.as_ref(),
    );
    let result = run(mesh, request, lease, tell).await;
    if result.is_ok() {
        mesh.metrics.images.inc();
    }
    account.settle(&id, &result, "image");
    result
}

async fn run(
    mesh: &Arc<Mesh>,
    mut request: ImageRequest,
    lease: &mut Lease,
    tell: impl FnMut(Event) + Send,
) -> Result<MadeImage, AnswerError> {
    if mesh.shutdown.is_draining() {
        return Err(AnswerError::ShuttingDown);
    }
    let named = request.model.take();
    let model = named.or_else(|| mesh.first_imager()).unwrap_or_default();
    let card = card(mesh, &model, request.plain.is_some())?;
    let task = task(request.clone(), &model, &card);
    let most = card.most_pixels;
    if most > 0 && u64::from(task.width) * u64::from(task.height) > most {
        return Err(AnswerError::invalid(format!(
            "an image of {}x{} pixels needs more memory than the workers with {model:?} have, which is enough for {most} pixels; ask for \
             a smaller 'size'",
            task.width, task.height
        )));
    }
    lease.add(ArrivingImage::memory(&task))?;
    let upload = request.init.map_or_else(Bytes::new, |init| init.pixels);
    let units = step_units(task.width, task.height);
    let ask = Requirements {
        model: model.clone(),
        kind: ModelKind::Image,
        prompt_tokens: units,
        answer_tokens: units.saturating_mul(task.steps),
        plain: request.plain.is_some(),
        revision: task.revision(),
        source: Source {
            ingress: Ingress::Images,
            origin: request.origin,
        },
        ..Requirements::default()
    };
    let codec = ImageCodec {
        mesh,
        arriving: ArrivingImage::new(&task),
        task,
        upload,
        plain: request.plain,
        units,
        file: None,
        worker: String::new(),
        tell,
    };
    let mut flight = Flight::new(mesh, ask, Bounds::default(), codec);
    let complete = flight.run().await?;
    let codec = flight.codec;
    let task = codec.task;
    debug!(
        request = task.request_id,
        worker = codec.worker,
        steps = task.steps,
        seconds = complete.total.as_secs_f64(),
        "image made"
    );
    Ok(MadeImage {
        model,
        png: codec.file.expect("an image is complete when it is here"),
        width: task.width,
        height: task.height,
        steps: codec.arriving.steps(),
        seed: task.seed,
        worker: codec.worker,
        reruns: complete.reruns,
        total: complete.total,
    })
}

/// Sizes and defaults of the model. Those of a model that nobody serves now are any: it is waited for or refused later.
fn card(mesh: &Mesh, model: &str, plain: bool) -> Result<ImageCard, AnswerError> {
    let makes = match mesh.replicas(model).kind {
        Some(ModelKind::Image) => None,
        Some(ModelKind::Chat) => Some(("text", paths::CHAT_COMPLETIONS)),
        Some(ModelKind::Embed) => Some(("embeddings", paths::EMBEDDINGS)),
        None if model.is_empty() && !plain => {
            let model = "an image model".into();
            return Err(Refusal::NoWorker { model }.into());
        }
        None => None,
    };
    if let Some((what, path)) = makes {
        return Err(AnswerError::invalid(format!(
            "the model {model:?} makes {what}, not images; POST {path} asks for that, and GET /v1/models says which model makes what"
        )));
    }
    let known = mesh.image_card(model);
    Ok(known.unwrap_or_else(mesh_control::image::default_card))
}

/// The task in which nothing is left open: every worker makes the same image of it.
fn task(request: ImageRequest, model: &str, card: &ImageCard) -> ImageTask {
    let (width, height) = request.size.unwrap_or((card.width, card.height));
    let own = || card.sampler.clone();
    ImageTask {
        request_id: request.id,
        model: model.to_owned(),
        prompt: request.prompt,
        negative_prompt: request.negative_prompt,
        width,
        height,
        steps: request.steps.unwrap_or(card.steps),
        guidance: request.guidance.unwrap_or(card.guidance),
        // Short, so that people can note it.
        seed: request.seed.unwrap_or_else(|| ids::unique() >> 32),
        sampler: request.sampler.unwrap_or_else(own),
        karras: request.karras,
        init: request.init.map(|init| InitialImage {
            strength: init.strength,
            masked: init.masked,
        }),
        previews: request.previews,
        ..ImageTask::default()
    }
}

/// The codec: ImageTask out, ImageSteps and ImageData back, or the whole file to a plain task. The last step goes to the
/// next worker, which goes on after it.
struct ImageCodec<'a, T> {
    mesh: &'a Mesh,
    task: ImageTask,
    /// Pixels that every attempt begins with.
    upload: Bytes,
    plain: Option<Bytes>,
    /// Units of work of one step.
    units: u32,
    arriving: ArrivingImage,
    file: Option<Bytes>,
    /// Name of the worker that has it.
    worker: String,
    tell: T,
}

impl<T: FnMut(Event) + Send> ImageCodec<'_, T> {
    fn stepped(&mut self, attempt: u32, step: ImageStep) -> Result<u32, Failure> {
        let (number, steps) = (step.step, step.steps);
        let taken = self.arriving.step(attempt, step);
        let preview = taken.map_err(Failure::Nonsense)?;
        let preview = preview.map(|rgb| Preview {
            width: self.task.width,
            height: self.task.height,
            rgb,
        });
        self.mesh.metrics.image_steps.inc();
        (self.tell)(Event::Stepped {
            step: number,
            steps,
            preview,
        });
        Ok(self.units)
    }
}

impl<T: FnMut(Event) + Send> Codec for ImageCodec<'_, T> {
    const ENDED_EARLY: &'static str = "the worker ended the stream before the image was complete";
    const HAS_TOKENS: bool = true;

    fn id(&self) -> &str {
        &self.task.request_id
    }

    fn request(&self, start: &AttemptTerms<'_>) -> WorkerRequest {
        let task = ImageTask {
            model: start.placed.model.clone(),
            resume: self.arriving.last().cloned(),
            deadline_ms: start.deadline_ms,
            progress_ms: start.progress_ms,
            ..self.task.clone()
        };
        WorkerRequest {
            message: message(MsgType::IMAGE_TASK, start.resume.attempt, &task),
            upload: self.upload.clone(),
            plain: self.plain.clone(),
        }
    }

    fn message_bytes(&self, _: &Bounds) -> usize {
        self.arriving.message_bytes()
    }

    fn read(
        &mut self,
        incoming: FromWorker,
        attempt: u32,
        answer: &mut Lifecycle,
        now: Instant,
    ) -> Option<Step> {
        let message = match incoming {
            FromWorker::Message(message) => message,
            FromWorker::Whole(file) => {
                self.file = Some(file);
                return Some(answer.done(attempt, Done::default(), now));
            }
            FromWorker::End => return None,
        };
        let came = match message.kind {
            MsgType::IMAGE_STEP => {
                let step = read(message).and_then(|step| self.stepped(attempt, step));
                step.map(|units| answer.stepped(attempt, units, now))
            }
            MsgType::IMAGE_DATA => {
                let part = read(message).and_then(|part: ImageData| {
                    let taken = self.arriving.data(attempt, &part);
                    taken.map_err(Failure::Nonsense)
                });
                part.map(|file| match file {
                    Some(file) => {
                        self.file = Some(file);
                        answer.done(attempt, Done::default(), now)
                    }
                    None => answer.stepped(attempt, 0, now),
                })
            }
            // A newer worker may say more than this head understands.
            _ => return None,
        };
        Some(came.unwrap_or_else(|failure| answer.failed(attempt, failure)))
    }

    /// A worker that cannot go on after the state of another one may well make the image from the beginning.
    fn failed(&mut self, attempt: u32, failure: Failure) -> Failure {
        let Failure::Error { code, text } = &failure else {
            return failure;
        };
        if *code != ErrorCode::INVALID_PAYLOAD || !self.arriving.forget_before(attempt) {
            return failure;
        }
        Failure::Error {
            code: ErrorCode::INFERENCE_FAILED,
            text: format!("it does not go on after the steps so far: {text}"),
        }
    }

    fn has_begun(&self, _: &Lifecycle) -> bool {
        self.arriving.last().is_some()
    }

    fn tell(&mut self, event: Event) {
        if let Event::Placed(placed) = &event {
            self.worker.clone_from(&placed.name);
        }
        (self.tell)(event);
    }

    fn log_rerun(&self, worker: &str, _: &Lifecycle) {
        info!(
            request = self.task.request_id,
            worker,
            step = self.arriving.last().map_or(0, |step| step.step),
            steps = self.task.steps,
            "run again elsewhere after the steps so far"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_request_leaves_open_is_as_the_model_says() {
        let card = ImageCard {
            width: 512,
            height: 768,
            steps: 4,
            guidance: 1.5,
            sampler: "lcm".into(),
            ..ImageCard::default()
        };
        let open = task(ImageRequest::default(), "m", &card);
        assert_eq!(
            (open.width, open.height, open.steps, open.guidance),
            (512, 768, 4, 1.5)
        );
        assert_eq!(open.sampler, "lcm");
        assert!(u32::try_from(open.seed).is_ok());
        let set = ImageRequest {
            size: Some((64, 64)),
            steps: Some(9),
            guidance: Some(0.0),
            seed: Some(u64::MAX),
            sampler: Some("euler".into()),
            ..ImageRequest::default()
        };
        let set = task(set, "m", &card);
        assert_eq!((set.width, set.steps, set.guidance), (64, 9, 0.0));
        assert_eq!((set.seed, &*set.sampler), (u64::MAX, "euler"));
    }
}
