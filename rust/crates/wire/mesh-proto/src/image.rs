//! Bodies of the messages about images: 0x2A to 0x2C.

use prost::Message;
use prost::bytes::Bytes;

use crate::ModelCard;

messages! {
    /// The part of a card about a model that makes images.
    pub struct ImageCard {
        /// Width of an image whose request sets no size, in pixels.
        width: u32 = [uint32, tag = 1],
        /// Height of such an image, in pixels.
        height: u32 = [uint32, tag = 2],
        /// Denoising steps of a request that sets none.
        steps: u32 = [uint32, tag = 3],
        /// Guidance of a request that sets none.
        guidance: f32 = [float, tag = 4],
        /// Name of the sampler of a request that sets none.
        sampler: String = [string, tag = 5],
        /// Most pixels of an image that the worker's memory allows; 0 is unknown.
        most_pixels: u64 = [uint64, tag = 6],
        /// Least width and height; 0 is unknown.
        least_side: u32 = [uint32, tag = 7],
    }

    /// An image to make (DCF 0x2A), head to worker, first message of its stream. Answered by [`ImageStep`]s and the [`ImageData`] of
    /// one PNG file, or an Error. Everything in it is set: two workers with the same weights make the same image of it.
    pub struct ImageTask {
        /// Request id, for logs of all services.
        request_id: String = [string, tag = 1],
        /// Name of the model.
        model: String = [string, tag = 2],
        /// Description of the image.
        prompt: String = [string, tag = 3],
        /// Description of what the image is to be unlike; may be empty.
        negative_prompt: String = [string, tag = 4],
        /// Width in pixels, a multiple of 8.
        width: u32 = [uint32, tag = 5],
        /// Height in pixels, a multiple of 8.
        height: u32 = [uint32, tag = 6],
        /// Denoising steps.
        steps: u32 = [uint32, tag = 7],
        /// Weight of the prompt against the negative prompt; 1 leaves the latter out.
        guidance: f32 = [float, tag = 8],
        /// Seed of the noise.
        seed: u64 = [uint64, tag = 9],
        /// Name of the sampler.
        sampler: String = [string, tag = 10],
        /// Noise levels after Karras et al. instead of evenly spaced timesteps.
        karras: bool = [bool, tag = 11],
        /// The last step done elsewhere. The worker goes on after it; one that cannot use the state begins anew.
        resume: Option<ImageStep> = [message, optional, tag = 12],
        /// Milliseconds the worker may spend from now; 0 is without limit.
        deadline_ms: u64 = [uint64, tag = 13],
        /// Interval of progress reports, as in [`crate::Generate::progress_ms`].
        progress_ms: u32 = [uint32, tag = 14],
        /// The image to start from; absent starts from noise. Its pixels follow the task as [`ImageData`]s.
        init: Option<InitialImage> = [message, optional, tag = 15],
        /// Previews to send with the steps, as [`preview_is_due`] spreads them; 0 is without.
        previews: u32 = [uint32, tag = 16],
    }

    /// An image to start from. Its pixels have [`initial_image_bytes`] bytes: three a pixel, row by row; then, where there is a
    /// mask, a bit a pixel, the first one highest, that is set where the image is to be changed. A row begins with no new byte.
    pub struct InitialImage {
        /// Share of the steps that are run, over 0 up to 1; 1 keeps nothing of the image but for what a mask keeps.
        strength: f32 = [float, tag = 1],
        /// A mask follows the pixels.
        masked: bool = [bool, tag = 2],
    }

    /// A denoising step is done (DCF 0x2B), worker to head.
    pub struct ImageStep {
        /// Steps done, from 1.
        step: u32 = [uint32, tag = 1],
        /// Steps in all.
        steps: u32 = [uint32, tag = 2],
        /// State from which another worker continues: latents, memory of the sampler, place in the noise. Opaque to the head; at most
        /// [`image_state_bytes`] bytes.
        state: Bytes = [bytes = "bytes", tag = 3],
        /// The image as the model sees it after this step, where one was asked for: three bytes a pixel, an eighth of the image's
        /// width and height. Empty where there is none.
        preview: Bytes = [bytes = "bytes", tag = 4],
    }

    /// A part of the finished PNG file, worker to head, or of the pixels to start from, head to worker (DCF 0x2C). Parts come in
    /// order; the last one ends at `total`.
    pub struct ImageData {
        /// Place of the first byte in the file.
        offset: u32 = [uint32, tag = 1],
        /// Bytes of the whole file.
        total: u32 = [uint32, tag = 2],
        /// At most [`IMAGE_PART`] bytes.
        data: Bytes = [bytes = "bytes", tag = 3],
    }
}

impl ImageData {
    /// A file or pixels in parts. 4 GiB or more have none.
    pub fn parts(file: Bytes) -> impl Iterator<Item = ImageData> {
        let total = u32::try_from(file.len()).unwrap_or(0);
        let offsets = (0..total).step_by(IMAGE_PART);
        offsets.map(move |offset| {
            let begin = offset as usize;
            let end = (begin + IMAGE_PART).min(file.len());
            ImageData {
                offset,
                total,
                data: file.slice(begin..end),
            }
        })
    }
}

impl crate::Hello {
    /// All models that the worker serves. Those that make images stand in a field of their own, because a head that does not know
    /// the kind would take them for models that make text.
    pub fn all_models(&self) -> Vec<ModelCard> {
        [&self.models[..], &self.image_models].concat()
    }
}

impl crate::Served {
    /// All models that the worker serves, as [`crate::Hello::all_models`].
    pub fn all_models(&self) -> Vec<ModelCard> {
        [&self.models[..], &self.image_models].concat()
    }
}

/// Parts the cards of models that make images from the others.
pub fn part_cards(cards: Vec<ModelCard>) -> (Vec<ModelCard>, Vec<ModelCard>) {
    let makes_images = |card: &ModelCard| card.kind() == crate::ModelKind::Image;
    cards.into_iter().partition(|card| !makes_images(card))
}

impl ImageTask {
    /// Lowest [`crate::Hello::request_revision`] of a worker that acts upon all of it. Previews may be left out.
    pub fn revision(&self) -> u32 {
        if self.init.is_some() { 2 } else { 0 }
    }

    /// Bytes of pixels that follow the task.
    pub fn upload_bytes(&self) -> usize {
        let of = |init: &InitialImage| initial_image_bytes(self.width, self.height, init.masked);
        self.init.as_ref().map_or(0, of)
    }
}

/// Bytes of the pixels of an [`InitialImage`] of this size.
pub fn initial_image_bytes(width: u32, height: u32, masked: bool) -> usize {
    let pixels = (width as usize).saturating_mul(height as usize);
    let mask = if masked { pixels.div_ceil(8) } else { 0 };
    pixels.saturating_mul(3).saturating_add(mask)
}

/// Bytes of a preview of an image of this size.
pub fn preview_bytes(width: u32, height: u32) -> usize {
    (width as usize / PREVIEW_SHARE) * (height as usize / PREVIEW_SHARE) * 3
}

/// Whether one of `previews` belongs to this step. They part the steps evenly, and none is as late as the image itself.
pub fn preview_is_due(step: u32, steps: u32, previews: u32) -> bool {
    let until = |step: u32| u64::from(step) * (u64::from(previews) + 1) / u64::from(steps.max(1));
    (1..steps).contains(&step) && until(step) > until(step - 1)
}

/// Pixels of an image's side for one of its preview's.
pub const PREVIEW_SHARE: usize = 8;

/// Bytes of a PNG file in one [`ImageData`] at most: short enough that the other streams of a link are not held up.
pub const IMAGE_PART: usize = 256 << 10;

/// Most bytes of [`ImageStep::state`] for an image of this size: four arrays of the latents of a model with four channels in f32, which
/// have an eighth of the image's width and height, and room for what describes them and for small images of other models.
pub fn image_state_bytes(width: u32, height: u32) -> usize {
    let pixels = (width as usize).saturating_mul(height as usize);
    pixels.saturating_add(256 << 10)
}

/// Most bytes of the PNG file of an image of this size whose texts have `texts` bytes: three a pixel, a byte a row, and what a file has
/// around them, where nothing can be compressed. The texts may stand in the file.
pub fn image_file_bytes(width: u32, height: u32, texts: usize) -> usize {
    let (width, height) = (width as usize, height as usize);
    let rows = width.saturating_mul(3).saturating_add(1);
    let rows = rows.saturating_mul(height);
    // A stored block of deflate has 5 bytes more per 16 KiB at worst, and a text chunk may write a character in 6 bytes.
    let more = (rows / 1024).saturating_add(texts.saturating_mul(6));
    rows.saturating_add(more).saturating_add(16 << 10)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{Hello, ModelKind, Served};

    fn step() -> impl Strategy<Value = ImageStep> {
        let bytes = || prop::collection::vec(any::<u8>(), 0..300);
        (any::<u32>(), any::<u32>(), bytes(), bytes()).prop_map(|(step, steps, state, preview)| {
            ImageStep {
                step,
                steps,
                state: state.into(),
                preview: preview.into(),
            }
        })
    }

    fn task() -> impl Strategy<Value = ImageTask> {
        let numbers = (
            any::<u32>(),
            any::<u32>(),
            any::<u32>(),
            any::<u64>(),
            any::<bool>(),
        );
        let texts = (".*", ".*", "[a-z+]*");
        (numbers, texts, -1e9f32..1e9, prop::option::of(step())).prop_map(
            |(
                (width, height, steps, seed, karras),
                (prompt, negative_prompt, sampler),
                guidance,
                resume,
            )| {
                ImageTask {
                    request_id: "req".into(),
                    model: "m".into(),
                    prompt,
                    negative_prompt,
                    width,
                    height,
                    steps,
                    guidance,
                    seed,
                    sampler,
                    karras,
                    resume,
                    deadline_ms: seed / 2,
                    progress_ms: width,
                    init: karras.then_some(InitialImage {
                        strength: guidance,
                        masked: seed % 2 == 0,
                    }),
                    previews: height,
                }
            },
        )
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn a_task_comes_out_as_it_went_in(task in task()) {
            let bytes = task.encode_to_vec();
            prop_assert_eq!(ImageTask::decode(&bytes[..]), Ok(task));
        }

        #[test]
        fn no_bytes_make_the_reader_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = ImageTask::decode(&bytes[..]);
            let _ = ImageStep::decode(&bytes[..]);
            let _ = ImageData::decode(&bytes[..]);
        }

        #[test]
        fn a_file_is_cut_without_loss(len in 1usize..3 * IMAGE_PART) {
            let file: Bytes = (0..len).map(|i| i as u8).collect();
            let mut joined = Vec::new();
            for part in ImageData::parts(file.clone()) {
                prop_assert_eq!(part.offset as usize, joined.len());
                prop_assert_eq!(part.total as usize, len);
                prop_assert!(!part.data.is_empty() && part.data.len() <= IMAGE_PART);
                joined.extend_from_slice(&part.data);
            }
            prop_assert_eq!(&joined[..], &file[..]);
        }
    }

    #[test]
    fn a_head_that_knows_no_images_sees_only_the_other_models() {
        let card = |name: &str, kind: ModelKind| ModelCard {
            name: name.into(),
            kind: kind.into(),
            ..ModelCard::default()
        };
        let cards = vec![
            card("text", ModelKind::Chat),
            card("picture", ModelKind::Image),
            card("vector", ModelKind::Embed),
        ];
        let (models, image_models) = part_cards(cards);
        let names = |cards: &[ModelCard]| {
            let names = cards.iter().map(|card| card.name.clone());
            names.collect::<Vec<_>>()
        };
        assert_eq!(names(&models), ["text", "vector"]);
        let hello = Hello {
            models: models.clone(),
            image_models: image_models.clone(),
            ..Hello::default()
        };
        let served = Served {
            models,
            image_models,
        };
        for all in [hello.all_models(), served.all_models()] {
            assert_eq!(names(&all), ["text", "vector", "picture"]);
        }
    }

    #[test]
    fn previews_part_the_steps_and_leave_out_the_last() {
        let due = |steps, previews| {
            let steps_of = (0..=steps + 1).filter(|step| preview_is_due(*step, steps, previews));
            steps_of.collect::<Vec<_>>()
        };
        assert_eq!(due(20, 3), [5, 10, 15]);
        assert_eq!(due(20, 1), [10]);
        assert_eq!(due(5, 2), [2, 4]);
        assert_eq!(due(2, 3), [1]);
        for none in [due(20, 0), due(1, 3), due(0, 3)] {
            assert!(none.is_empty(), "{none:?}");
        }
        assert!(!preview_is_due(u32::MAX, u32::MAX, u32::MAX));
    }

    #[test]
    fn the_pixels_to_start_from_have_the_size_of_the_image() {
        let task = |masked| ImageTask {
            width: 72,
            height: 64,
            init: Some(InitialImage {
                strength: 0.5,
                masked,
            }),
            ..ImageTask::default()
        };
        assert_eq!(task(false).upload_bytes(), 72 * 64 * 3);
        assert_eq!(task(true).upload_bytes(), 72 * 64 * 3 + 9 * 64);
        assert_eq!((task(true).revision(), task(false).revision()), (2, 2));
        let plain = ImageTask::default();
        assert_eq!((plain.upload_bytes(), plain.revision()), (0, 0));
        assert_eq!(preview_bytes(72, 64), 9 * 8 * 3);
    }

    #[test]
    fn limits_hold_what_an_image_needs() {
        // 512 by 512: two arrays of latents.
        assert!(image_state_bytes(512, 512) >= 2 * 4 * 64 * 64 * 4);
        assert!(image_file_bytes(512, 512, 0) >= 512 * 512 * 3 + 512);
        assert_eq!(image_state_bytes(2048, 2048), (4 << 20) + (256 << 10));
        assert!(image_file_bytes(u32::MAX, u32::MAX, usize::MAX) > 0);
    }
}
