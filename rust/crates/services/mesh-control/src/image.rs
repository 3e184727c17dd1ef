//! The state of an image in progress: the last step that another worker can continue from, and the file.
//!
//! Its life across worker deaths is that of an answer ([`super::request::Lifecycle`]); a step takes the place
//! of a token there. Workers are not trusted: whatever they send stays within the size of the image.

use bytes::{Bytes, BytesMut};
use mesh_proto::{
    ImageCard, ImageData, ImageStep, ImageTask, ModelKind, image_file_bytes, image_state_bytes,
    preview_bytes, preview_is_due,
};

use crate::registry::Registry;

/// An image on its way from workers.
#[derive(Debug)]
pub struct ArrivingImage {
    width: u32,
    height: u32,
    steps: Steps,
    most_bytes: usize,
    previews: u32,
    /// Step of the last preview that was passed on.
    previewed: u32,
    /// The attempt that messages belong to, and its last step.
    attempt: (u32, u32),
    last: Option<ImageStep>,
    file: BytesMut,
}

impl ArrivingImage {
    /// An image of this task.
    pub fn new(task: &ImageTask) -> Self {
        let (width, height) = (task.width, task.height);
        let texts = task.prompt.len() + task.negative_prompt.len();
        Self {
            width,
            height,
            steps: match task.init {
                None => Steps::Exactly(task.steps),
                Some(_) => Steps::AtMost(task.steps),
            },
            most_bytes: image_file_bytes(width, height, texts),
            previews: task.previews,
            previewed: 0,
            attempt: (0, 0),
            last: None,
            file: BytesMut::new(),
        }
    }

    /// Steps in all; as many as were asked for while no worker has left any out.
    pub fn steps(&self) -> u32 {
        match self.steps {
            Steps::Exactly(steps) | Steps::AtMost(steps) => steps,
        }
    }

    /// The step that the next worker goes on after.
    pub fn last(&self) -> Option<&ImageStep> {
        self.last.as_ref()
    }

    /// Most bytes that the latents and the file of an image take, and its previews with their text in base64.
    pub fn memory(task: &ImageTask) -> u64 {
        let (width, height) = (task.width, task.height);
        let texts = task.prompt.len() + task.negative_prompt.len();
        let state = image_state_bytes(width, height);
        let previews = match task.previews {
            0 => 0,
            _ => image_file_bytes(width, height, 0).saturating_mul(4),
        };
        let file = image_file_bytes(width, height, texts);
        state.saturating_add(file).saturating_add(previews) as u64
    }

    /// Most payload bytes of one message of a worker.
    pub fn message_bytes(&self) -> usize {
        let part = mesh_proto::IMAGE_PART;
        let step = image_state_bytes(self.width, self.height) + self.most_preview();
        step.max(part) + 1024
    }

    /// Takes in a step of this attempt; its preview if that is the next one to show. A worker that cannot use the state
    /// of the worker before it begins anew, so steps count from the beginning of the attempt; a preview of a step that
    /// was passed already is not shown again.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn step(&mut self, attempt: u32, mut step: ImageStep) -> Result<Option<Bytes>, String> {
        self.begin(attempt);
        let before = self.attempt.1;
        let wanted = match self.steps {
            Steps::Exactly(steps) => steps,
            // Its worker knows how many are left out.
            Steps::AtMost(most) => step.steps.clamp(1, most.max(1)),
        };
        if step.steps != wanted || step.step <= before || step.step > wanted {
            return Err(format!(
                "the worker sent step {} of {} after step {before} of {wanted}",
                step.step, step.steps
            ));
        }
        let most = image_state_bytes(self.width, self.height);
        if step.state.len() > most {
            let sent = step.state.len();
            return Err(format!(
                "the worker sent {sent} bytes of latents where {most} are the most"
            ));
        }
        if !self.file.is_empty() {
            return Err("the worker sent a step after the image".to_owned());
        }
        let preview = std::mem::take(&mut step.preview);
        let most = self.most_preview();
        if !preview.is_empty() && preview.len() != most {
            let sent = preview.len();
            return Err(format!(
                "the worker sent a preview of {sent} bytes where {most} were asked for"
            ));
        }
        let due = preview_is_due(step.step, wanted, self.previews);
        let fresh = due && !preview.is_empty() && step.step > self.previewed;
        if fresh {
            self.previewed = step.step;
        }
        self.steps = Steps::Exactly(wanted);
        self.attempt.1 = step.step;
        self.last = Some(step);
        Ok(fresh.then_some(preview))
    }

    fn most_preview(&self) -> usize {
        match self.previews {
            0 => 0,
            _ => preview_bytes(self.width, self.height),
        }
    }

    /// Takes in a part of the file; the file when this was the last part.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn data(&mut self, attempt: u32, part: &ImageData) -> Result<Option<Bytes>, String> {
        self.begin(attempt);
        let (have, total) = (self.file.len(), part.total as usize);
        if total > self.most_bytes {
            let (width, height) = (self.width, self.height);
            return Err(format!(
                "the worker sent {total} bytes for an image of {width}x{height} pixels"
            ));
        }
        let end = have + part.data.len();
        if part.offset as usize != have || part.data.is_empty() || end > total {
            return Err(format!(
                "the worker sent {} bytes at {} of {total} where byte {have} was next",
                part.data.len(),
                part.offset
            ));
        }
        self.file.extend_from_slice(&part.data);
        if end < total {
            return Ok(None);
        }
        let file = std::mem::take(&mut self.file).freeze();
        match png_size(&file) {
            Some(size) if size == (self.width, self.height) => Ok(Some(file)),
            Some((width, height)) => Err(format!(
                "the worker sent an image of {width}x{height} pixels instead of {}x{}",
                self.width, self.height
            )),
            None => Err("the worker sent something else than a PNG file".to_owned()),
        }
    }

    /// Forgets the steps of the attempts before this one, if this one brought none; true if there were any.
    pub fn forget_before(&mut self, attempt: u32) -> bool {
        self.begin(attempt);
        self.attempt.1 == 0 && self.last.take().is_some()
    }

    fn begin(&mut self, attempt: u32) {
        if self.attempt.0 != attempt {
            self.attempt = (attempt, 0);
            self.file.clear();
        }
    }
}

/// Number of an image's steps.
#[derive(Debug, Clone, Copy)]
enum Steps {
    Exactly(u32),
    /// Fewer where an image to start from replaces the first ones.
    AtMost(u32),
}

/// Sizes and defaults of a model, for requests that leave them open: those of a worker that has the weights that the
/// name stands for, else of any. They are limited to what requests may ask for.
pub fn card_of(registry: &Registry, name: &str) -> Option<ImageCard> {
    let weights = registry.weights_of(name);
    let models = registry.iter().flat_map(|worker| &worker.models);
    let makes =
        models.filter(|model| model.card.name == name && model.card.kind() == ModelKind::Image);
    let cards = makes.map(|model| &model.card);
    let best = cards.min_by_key(|card| weights.is_some_and(|used| used != card.fingerprint))?;
    Some(plausible(best.image.clone().unwrap_or_default()))
}

/// Defaults of a model of which none are known.
pub fn default_card() -> ImageCard {
    plausible(ImageCard::default())
}

fn plausible(said: ImageCard) -> ImageCard {
    let side = |side: u32| match side / 8 * 8 {
        side @ 64..=2048 => side,
        _ => DEFAULT_SIDE,
    };
    let guidance = match said.guidance {
        guidance if guidance > 0.0 && guidance <= 50.0 => guidance,
        _ => DEFAULT_GUIDANCE,
    };
    ImageCard {
        width: side(said.width),
        height: side(said.height),
        steps: match said.steps {
            steps @ 1..=150 => steps,
            _ => DEFAULT_STEPS,
        },
        guidance,
        sampler: match said.sampler.len() {
            1..=64 => said.sampler,
            _ => DEFAULT_SAMPLER.to_owned(),
        },
        most_pixels: said.most_pixels,
        least_side: said.least_side / 8 * 8,
    }
}

/// Defaults where no worker says any.
const DEFAULT_SIDE: u32 = 512;
const DEFAULT_STEPS: u32 = 20;
const DEFAULT_GUIDANCE: f32 = 7.5;
const DEFAULT_SAMPLER: &str = "dpmpp_2m";

/// Units of work of one step of an image of this size, which take the place of tokens where speeds are measured and
/// times estimated: 64 by 64 pixels each. A worker's speed on images is in units a second.
pub fn step_units(width: u32, height: u32) -> u32 {
    let pixels = u64::from(width) * u64::from(height);
    u32::try_from(pixels.div_ceil(64 * 64)).unwrap_or(u32::MAX)
}

/// Width and height in pixels in the header of a PNG file; `None` if it has none.
pub fn png_size(file: &[u8]) -> Option<(u32, u32)> {
    let header = file.strip_prefix(b"\x89PNG\r\n\x1a\n")?;
    let header = header.strip_prefix(b"\0\0\0\x0dIHDR")?;
    let number = |at: usize| Some(u32::from_be_bytes(*header.get(at..)?.first_chunk()?));
    Some((number(0)?, number(4)?))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The beginning of a PNG file of this size, with `more` bytes.
    fn png(width: u32, height: u32, more: usize) -> Bytes {
        let mut file = b"\x89PNG\r\n\x1a\n\0\0\0\x0dIHDR".to_vec();
        file.extend(width.to_be_bytes());
        file.extend(height.to_be_bytes());
        file.extend((0..more).map(|i| i as u8));
        file.into()
    }

    fn step(step: u32, bytes: usize) -> ImageStep {
        ImageStep {
            step,
            steps: 4,
            state: vec![step as u8; bytes].into(),
            preview: Bytes::new(),
        }
    }

    fn task() -> ImageTask {
        ImageTask {
            prompt: "0123456789".into(),
            width: 64,
            height: 64,
            steps: 4,
            ..ImageTask::default()
        }
    }

    fn image() -> ArrivingImage {
        ArrivingImage::new(&task())
    }

    #[test]
    fn the_last_step_is_kept_for_the_next_worker() {
        let mut image = image();
        assert_eq!(image.last(), None);
        for number in 1..=3 {
            assert_eq!(image.step(1, step(number, 100)), Ok(None));
        }
        assert_eq!(image.last().map(|step| step.step), Some(3));
        assert_eq!(image.step(2, step(4, 100)), Ok(None));
        let file = png(64, 64, 5000);
        let mut parts = ImageData::parts(file.clone());
        assert_eq!(image.data(2, &parts.next().unwrap()), Ok(Some(file)));
    }

    #[test]
    fn a_worker_that_cannot_use_the_state_begins_anew() {
        let mut image = image();
        image.step(1, step(3, 10)).unwrap();
        assert_eq!(image.step(2, step(1, 10)), Ok(None));
        assert_eq!(image.last().map(|step| step.step), Some(1));
    }

    #[test]
    fn a_state_that_a_worker_refuses_is_forgotten() {
        let mut image = image();
        assert!(!image.forget_before(1), "there is none");
        image.step(1, step(3, 10)).unwrap();
        assert!(!image.forget_before(1), "it is its own");
        assert!(image.forget_before(2) && image.last().is_none());
        assert_eq!(image.step(2, step(1, 10)), Ok(None));
    }

    #[test]
    fn a_file_cut_off_by_a_death_begins_anew() {
        let mut image = image();
        let file = png(64, 64, 900);
        let parts = |cut: usize| {
            let part = |range: std::ops::Range<usize>| ImageData {
                offset: range.start as u32,
                total: file.len() as u32,
                data: file.slice(range),
            };
            [part(0..cut), part(cut..file.len())]
        };
        assert_eq!(image.data(1, &parts(100)[0]), Ok(None));
        let [first, second] = parts(300);
        assert_eq!(image.data(2, &first), Ok(None));
        assert_eq!(image.data(2, &second), Ok(Some(file.clone())));
    }

    #[test]
    fn what_no_task_asks_for_is_refused() {
        let most = image_state_bytes(64, 64);
        for wrong in [
            step(0, 1),
            step(5, 1),
            step(1, most + 1),
            ImageStep {
                steps: 3,
                ..step(1, 1)
            },
            ImageStep {
                preview: vec![1].into(),
                ..step(1, 1)
            },
        ] {
            assert!(image().step(1, wrong.clone()).is_err(), "{wrong:?}");
        }
        let mut repeats = image();
        repeats.step(1, step(2, most)).unwrap();
        assert!(repeats.step(1, step(2, 1)).is_err());
        let part = |offset, total, data: Bytes| ImageData {
            offset,
            total,
            data,
        };
        let other = png(64, 32, 9);
        let junk = Bytes::from_static(&[7; 40]);
        for wrong in [
            part(1, 40, junk.slice(..10)),
            part(0, 40, Bytes::new()),
            part(0, 5, junk.clone()),
            part(0, u32::MAX, junk.clone()),
            part(0, 40, junk),
            part(0, other.len() as u32, other),
        ] {
            assert!(image().data(1, &wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn a_preview_is_passed_on_once_whatever_workers_die() {
        let mut image = ArrivingImage::new(&ImageTask {
            previews: 3,
            ..task()
        });
        let with = |number: u32| ImageStep {
            preview: vec![number as u8; 8 * 8 * 3].into(),
            ..step(number, 10)
        };
        assert_eq!(image.step(1, with(1)), Ok(Some(with(1).preview)));
        assert_eq!(image.step(1, with(2)), Ok(Some(with(2).preview)));
        // Another worker begins anew.
        assert_eq!(image.step(2, with(1)), Ok(None));
        assert_eq!(image.step(2, with(2)), Ok(None));
        assert_eq!(image.step(2, with(3)), Ok(Some(with(3).preview)));
        assert_eq!(image.step(3, with(3)), Ok(None));
        assert_eq!(image.step(3, with(4)), Ok(None), "the image itself follows");
        assert!(image.last().is_some_and(|step| step.preview.is_empty()));
        let wrong = ImageStep {
            preview: vec![1; 5].into(),
            ..step(1, 1)
        };
        let error = image.step(4, wrong).unwrap_err();
        assert!(error.contains("192 were asked for"), "{error}");
    }

    #[test]
    fn an_image_to_start_from_takes_fewer_steps_and_always_as_many() {
        let image = || {
            ArrivingImage::new(&ImageTask {
                init: Some(mesh_proto::InitialImage::default()),
                ..task()
            })
        };
        let of = |number: u32, steps: u32| ImageStep {
            steps,
            ..step(number, 1)
        };
        let mut one = image();
        assert_eq!(one.step(1, of(1, 3)), Ok(None));
        assert!(one.step(1, of(2, 4)).is_err());
        assert!(one.step(2, of(2, 2)).is_err());
        assert_eq!(one.step(2, of(2, 3)), Ok(None));
        for wrong in [of(1, 0), of(1, 5), of(4, 3)] {
            assert!(image().step(1, wrong.clone()).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn work_is_counted_in_squares_of_64_pixels() {
        assert_eq!(step_units(512, 512), 64);
        assert_eq!(step_units(1, 1), 1);
        assert_eq!(step_units(u32::MAX, u32::MAX), u32::MAX);
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn whatever_comes_memory_stays_within_the_image(
            messages in prop::collection::vec(
                (0u32..3, any::<bool>(), 0u32..6, 0u32..60_000, 0usize..40_000), 0..60,
            )
        ) {
            let mut image = image();
            for (attempt, is_step, step, total, bytes) in messages {
                if is_step {
                    let state = vec![1; bytes].into();
                    let preview = vec![1; total as usize % 200].into();
                    let _ = image.step(attempt, ImageStep { step, steps: 4, state, preview });
                } else {
                    let (offset, data) = (image.file.len() as u32, vec![2; bytes].into());
                    let _ = image.data(attempt, &ImageData { offset, total, data });
                }
                let last = image.last().map_or(0, |step| step.state.len());
                let held = (image.file.len() + last) as u64;
                prop_assert!(held <= ArrivingImage::memory(&task()));
            }
        }
    }
}
