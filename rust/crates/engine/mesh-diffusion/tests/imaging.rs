//! The workload of images on a model in closed form: what it predicts depends on all that a real model's does.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::StreamExt;
use futures::executor::block_on;
use mesh_diffusion::imaging::Scheduler;
use mesh_diffusion::noise::Noise;
use mesh_diffusion::sampler::{Plan, PlanOptions, Sampler};
use mesh_diffusion::{
    ClipTokenizer, Conditioning, Diffuser, DiffuserInfo, Image, ImageEvent, ImageRequest, Imaging,
    ImagingOptions, InitImage, LatentShape, Progress, Prompt, SamplerConfig, SamplerKind,
    TextEmbedding,
};
use mesh_engine::{
    Engine, RequestError, RequestStatus, Schedule, StageError, StepOutcome, Workload,
};

/// A model by formula.
struct Formula {
    info: DiffuserInfo,
}

/// A prompt with this word makes the model fail.
const FAIL: &str = "fail";
/// A prompt with this word makes its predictions infinite.
const INFINITE: &str = "infinite";

impl Formula {
    fn new() -> Self {
        Formula {
            info: DiffuserInfo {
                family: "formula".to_owned(),
                default_size: 64,
                size_multiple: 8,
                min_size: 32,
                max_size: 256,
                latent_channels: 4,
                pixels_per_latent: 8,
                sampler: SamplerConfig::stable_diffusion(Default::default()),
                default_sampler: SamplerKind::DpmPlusPlus2M,
                default_steps: 5,
                default_guidance: 7.5,
                weight_bytes: 0,
                memory_base: 1 << 20,
                memory_per_pixel: 1 << 10,
                memory_limit: Some(40 << 20),
            },
        }
    }
}

/// One row per token: its id and its weight.
fn embed(prompt: &Prompt) -> TextEmbedding {
    let rows = prompt.ids(prompt.end).into_iter().zip(prompt.weights());
    let hidden: Vec<f32> = rows
        .flat_map(|(ids, weights)| ids.into_iter().zip(weights))
        .flat_map(|(id, weight)| [id as f32, weight])
        .collect();
    TextEmbedding {
        tokens: hidden.len() / 2,
        width: 2,
        hidden,
        pooled: Vec::new(),
    }
}

fn mean(text: &TextEmbedding) -> f32 {
    let rows = text.hidden.chunks_exact(2).map(|row| row[0] * row[1]);
    rows.sum::<f32>() / text.tokens as f32
}

impl Diffuser for Formula {
    fn info(&self) -> &DiffuserInfo {
        &self.info
    }

    fn encode(
        &mut self,
        prompt: &Prompt,
        negative: Option<&Prompt>,
    ) -> Result<Conditioning, StageError> {
        assert!(negative.is_none_or(|negative| negative.chunks.len() == prompt.chunks.len()));
        let prompt = embed(prompt);
        let bytes: Vec<u8> = prompt.hidden.chunks(2).map(|row| row[0] as u8).collect();
        let says = |word: &str| bytes.windows(4).any(|part| part == &ids(word)[..4]);
        if says(FAIL) {
            return Err(StageError::Malformed("spilt ink".to_owned()));
        }
        let mut conditioning = Conditioning {
            prompt,
            negative: negative.map(embed),
        };
        if says(INFINITE) {
            conditioning.prompt.hidden[0] = f32::INFINITY;
        }
        Ok(conditioning)
    }

    fn denoise(
        &mut self,
        latents: &[f32],
        shape: LatentShape,
        timestep: f32,
        conditioning: &Conditioning,
        guidance: f32,
    ) -> Result<Vec<f32>, StageError> {
        assert_eq!(latents.len(), shape.len());
        let mut angle = mean(&conditioning.prompt);
        if let Some(negative) = &conditioning.negative {
            angle = mean(negative) + guidance * (angle - mean(negative));
        }
        let value = |(place, x): (usize, &f32)| {
            let wave = (0.01 * angle + 0.001 * timestep + place as f32).cos();
            0.5 * x / (1.0 + 0.1 * x.abs()) + 0.3 * wave
        };
        Ok(latents.iter().enumerate().map(value).collect())
    }

    fn decode(&mut self, latents: &[f32], shape: LatentShape) -> Result<Image, StageError> {
        let (width, height) = (shape.width * 8, shape.height * 8);
        let pixel = |at: usize| {
            let (row, column) = (at / width / 8, at % width / 8);
            let value = |c: usize| latents[(c * shape.height + row) * shape.width + column];
            [0, 1, 2].map(|c| (128.0 + 60.0 * value(c)) as u8)
        };
        Ok(Image {
            width: width as u32,
            height: height as u32,
            rgb: (0..width * height).flat_map(pixel).collect(),
        })
    }

    fn encode_image(&mut self, image: &Image, noise: &[f32]) -> Result<Vec<f32>, StageError> {
        let mean = |at: usize| f32::from(image.rgb[at * 7 % image.rgb.len()]) / 127.5 - 1.0;
        let sample = |(at, noise): (usize, &f32)| mean(at) + 0.1 * noise;
        Ok(noise.iter().enumerate().map(sample).collect())
    }
}

/// Tokens of an ASCII word as bytes, without its last letter, whose token has the mark of a word's end.
fn ids(word: &str) -> Vec<u8> {
    let printable = word.bytes().map(|byte| byte - b'!');
    printable.collect()
}

/// A vocabulary of single bytes: printable ASCII comes first, so the token of a letter is its distance from `!`.
fn tokenizer() -> Arc<ClipTokenizer> {
    let printable = |byte: u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    let plain = (0..=255u8).filter(|&byte| printable(byte)).map(char::from);
    let others = (0..68).filter_map(|i| char::from_u32(0x100 + i));
    let bytes: Vec<char> = plain.chain(others).collect();
    let mut vocab: HashMap<String, usize> = HashMap::new();
    for (id, byte) in bytes.iter().enumerate() {
        vocab.insert(byte.to_string(), id);
        vocab.insert(format!("{byte}</w>"), 256 + id);
    }
    vocab.insert("<|startoftext|>".to_owned(), 512);
    vocab.insert("<|endoftext|>".to_owned(), 513);
    let vocab = serde_json::to_vec(&vocab).unwrap();
    Arc::new(ClipTokenizer::from_vocab(&vocab, b"#version: 0.2\n").unwrap())
}

fn request(prompt: &str) -> ImageRequest {
    ImageRequest {
        id: prompt.to_owned(),
        prompt: prompt.to_owned(),
        negative_prompt: "blurry".to_owned(),
        width: 64,
        height: 48,
        steps: 5,
        guidance: 4.0,
        seed: 9,
        sampler: SamplerKind::EulerAncestral,
        karras: false,
        init: None,
        resume: None,
        deadline: None,
    }
}

/// A request that starts from a picture.
fn from_picture(strength: f32, mask: bool) -> ImageRequest {
    let rgb = (0..64 * 48 * 3).map(|i| (i * 31 % 256) as u8).collect();
    let (width, height) = (64, 48);
    let mask = mask.then(|| {
        (0..64 * 48)
            .map(|i| if i % 64 < 20 { 0 } else { 255 })
            .collect()
    });
    ImageRequest {
        init: Some(InitImage {
            image: Image { width, height, rgb },
            strength,
            mask,
        }),
        ..request("a cat")
    }
}

fn imaging() -> Imaging<Formula> {
    Imaging::new(Formula::new(), tokenizer(), ImagingOptions::default())
}

fn engine() -> Engine<Imaging<Formula>> {
    Engine::start_with("images", |_| Ok(imaging())).unwrap()
}

fn run(request: ImageRequest) -> (Vec<Progress>, Result<Image, RequestError>) {
    let engine = engine();
    let events: Vec<ImageEvent> = block_on(engine.handle().submit(request).collect());
    let mut steps = Vec::new();
    let mut end = None;
    for event in events {
        assert!(end.is_none(), "an event after the last one");
        match event {
            ImageEvent::Step(progress) => steps.push(progress),
            ImageEvent::Done(result) => end = Some(result),
        }
    }
    (steps, end.unwrap())
}

/// Why a request is refused.
fn refused(request: ImageRequest) -> String {
    let (steps, end) = run(request);
    assert_eq!(steps, []);
    end.unwrap_err().to_string()
}

#[test]
fn a_picture_is_the_one_of_sampler_and_noise() {
    let wanted = request("a (red:1.5) cat");
    let (steps, image) = run(wanted.clone());
    let numbers: Vec<(u32, u32)> = steps.iter().map(|p| (p.step, p.steps)).collect();
    assert_eq!(numbers, [(1, 5), (2, 5), (3, 5), (4, 5), (5, 5)]);

    let mut model = Formula::new();
    let tokenizer = tokenizer();
    let prompt = Prompt::new(&tokenizer, &wanted.prompt).unwrap();
    let negative = Prompt::new(&tokenizer, &wanted.negative_prompt).unwrap();
    let conditioning = model.encode(&prompt, Some(&negative)).unwrap();
    let options = PlanOptions {
        kind: wanted.sampler,
        karras: false,
        steps: 5,
        strength: None,
    };
    let plan = Plan::new(&model.info.sampler, options).unwrap();
    let shape = model.info.latent_shape(64, 48);
    assert_eq!((shape.channels, shape.height, shape.width), (4, 6, 8));
    let mut noise = Noise::new(9);
    let mut sampler = Sampler::from_noise(plan, noise.normal(shape.len()));
    while let Some(timestep) = sampler.timestep() {
        let scaled = sampler.scaled();
        let prediction = model
            .denoise(&scaled, shape, timestep, &conditioning, 4.0)
            .unwrap();
        let fresh = noise.normal(shape.len());
        sampler.advance(&prediction, Some(&fresh)).unwrap();
    }
    assert_eq!(
        image.unwrap(),
        model.decode(sampler.latents(), shape).unwrap()
    );
}

#[test]
fn a_request_goes_on_elsewhere_bit_for_bit_after_any_step() {
    let mut requests: Vec<ImageRequest> = SamplerKind::ALL
        .into_iter()
        .map(|sampler| ImageRequest {
            sampler,
            ..request("a cat")
        })
        .collect();
    requests.push(ImageRequest {
        sampler: SamplerKind::DpmPlusPlus2M,
        karras: true,
        guidance: 1.0,
        ..request("a cat")
    });
    for (strength, mask) in [(0.6, false), (0.6, true), (1.0, true)] {
        requests.push(from_picture(strength, mask));
    }
    for request in requests {
        let (steps, image) = run(request.clone());
        let image = image.unwrap();
        for (done, progress) in steps.iter().enumerate() {
            let resumed = ImageRequest {
                resume: Some(progress.clone()),
                ..request.clone()
            };
            let (later, again) = run(resumed);
            assert!(later == steps[done + 1..], "{request:?} after {progress:?}");
            assert!(again.unwrap() == image, "{request:?} after {progress:?}");
        }
    }
}

#[test]
fn everything_in_a_request_has_its_effect() {
    let (_, image) = run(request("a cat"));
    let image = image.unwrap();
    let others = [
        request("a dog"),
        request("a (cat:1.4)"),
        ImageRequest {
            negative_prompt: String::new(),
            ..request("a cat")
        },
        ImageRequest {
            guidance: 1.0,
            ..request("a cat")
        },
        ImageRequest {
            guidance: 9.0,
            ..request("a cat")
        },
        ImageRequest {
            seed: 10,
            ..request("a cat")
        },
        ImageRequest {
            steps: 6,
            ..request("a cat")
        },
        ImageRequest {
            sampler: SamplerKind::Euler,
            ..request("a cat")
        },
        from_picture(0.6, false),
    ];
    let mut seen = vec![image];
    for other in others {
        let name = format!("{other:?}");
        let (_, image) = run(other);
        let image = image.unwrap();
        assert!(!seen.contains(&image), "{name}");
        seen.push(image);
    }
    assert!(run(request("a cat")).1.unwrap() == seen[0]);
}

#[test]
fn a_mask_keeps_what_it_covers() {
    let wanted = from_picture(1.0, true);
    let (_, image) = run(wanted.clone());
    let image = image.unwrap();
    let mut model = Formula::new();
    let shape = model.info.latent_shape(64, 48);
    let noise = Noise::new(9).normal(shape.len());
    let latents = model
        .encode_image(&wanted.init.unwrap().image, &noise)
        .unwrap();
    let kept = model.decode(&latents, shape).unwrap();
    // The mask keeps columns below 20, and a latent is kept by its left column: those below 24.
    for (at, (found, of)) in image.rgb.chunks(3).zip(kept.rgb.chunks(3)).enumerate() {
        if at % 64 < 24 {
            assert_eq!(found, of, "pixel {at}");
        }
    }
    assert!(image != kept);
}

#[test]
fn requests_take_turns_step_by_step() {
    let mut work = imaging();
    let now = Instant::now();
    for key in 0..3 {
        work.scheduler().submit(key, request("a cat"), now);
    }
    let status = |work: &mut Imaging<Formula>, key| work.scheduler().status(key);
    assert_eq!(status(&mut work, 1), Some(RequestStatus::Decoding));
    assert_eq!(
        status(&mut work, 2),
        Some(RequestStatus::Queued { ahead: 0 })
    );
    let load = work.scheduler().load();
    assert_eq!(
        (load.running, load.queued, load.prefill_backlog),
        (2, 1, 15)
    );
    let mut order = Vec::new();
    while work.begin(now) {
        assert!(!work.begin(now), "one turn at a time");
        assert!(matches!(work.poll(now), StepOutcome::Completed));
        while let Some((key, event)) = work.scheduler().next_event() {
            order.push((key, matches!(event, ImageEvent::Done(Ok(_)))));
        }
    }
    let mut expected: Vec<(u64, bool)> = (0..5).flat_map(|_| [(0, false), (1, false)]).collect();
    expected.extend([(0, true), (1, true)]);
    expected.extend([(2, false); 5]);
    expected.push((2, true));
    // The third may begin between the ends of the others.
    let of = |order: &[(u64, bool)], wanted: &[u64]| -> Vec<(u64, bool)> {
        order
            .iter()
            .copied()
            .filter(|(key, _)| wanted.contains(key))
            .collect()
    };
    assert_eq!(of(&order, &[0, 1]), of(&expected, &[0, 1]));
    assert_eq!(of(&order, &[2]), of(&expected, &[2]));
    let load = work.scheduler().load();
    assert_eq!((load.totals.finished, load.totals.decode_rows), (3, 15));
    assert!(work.scheduler().is_idle() && load.decode_tps > 0.0);
}

#[test]
fn a_cancelled_request_ends_with_its_step() {
    let mut work = imaging();
    let now = Instant::now();
    work.scheduler().submit(1, request("a cat"), now);
    work.scheduler().submit(2, request("a dog"), now);
    assert!(work.begin(now));
    work.poll(now);
    assert!(work.begin(now));
    // Its step was begun and is not run any more.
    work.scheduler().cancel(2);
    work.scheduler().cancel(1);
    assert!(matches!(work.poll(now), StepOutcome::Completed));
    assert!(work.scheduler().is_idle() && !work.begin(now));
    assert_eq!(work.scheduler().next_event(), None);
    assert_eq!(work.scheduler().load().totals.cancelled, 2);

    let engine = engine();
    let handle = engine.handle();
    let mut stream = handle.submit(ImageRequest {
        steps: 150,
        ..request("a cat")
    });
    assert!(matches!(block_on(stream.next()), Some(ImageEvent::Step(_))));
    drop(stream);
    block_on(handle.drain());
    assert_eq!(handle.load().totals.cancelled, 1);
    let after = block_on(handle.submit(request("a cat")).last_event());
    assert_eq!(after, ImageEvent::Done(Err(RequestError::Draining)));
}

#[test]
fn deadlines_and_full_queues_end_requests() {
    let mut scheduler_of = imaging();
    let now = Instant::now();
    let late = now + Duration::from_secs(5);
    let with_deadline = ImageRequest {
        deadline: Some(late),
        ..request("a cat")
    };
    scheduler_of.scheduler().submit(1, with_deadline, now);
    for _ in 0..3 {
        assert!(scheduler_of.begin(now));
        scheduler_of.poll(now);
    }
    assert!(!scheduler_of.begin(late));
    let mut last = None;
    while let Some((_, event)) = scheduler_of.scheduler().next_event() {
        last = Some(event);
    }
    let error = RequestError::PictureLate { done: 2, steps: 5 };
    assert_eq!(last, Some(ImageEvent::Done(Err(error))));

    let options = ImagingOptions {
        slots: 1,
        queue_limit: 2,
    };
    let mut scheduler = Scheduler::new(Formula::new().info, tokenizer(), options);
    for key in 0..4 {
        scheduler.submit(key, request("a cat"), now);
    }
    let error = RequestError::QueueFull { limit: 2 };
    assert_eq!(
        scheduler.next_event(),
        Some((3, ImageEvent::Done(Err(error))))
    );
    scheduler.end_all(&RequestError::Draining);
    assert!(scheduler.is_idle());
    assert_eq!(std::iter::from_fn(|| scheduler.next_event()).count(), 3);
}

#[test]
fn requests_that_cannot_work_are_refused_with_the_reason() {
    let cat = || request("a cat");
    let text = refused(ImageRequest { width: 60, ..cat() });
    assert_eq!(
        text,
        "width is 60, but must be a multiple of 8 from 32 to 256"
    );
    assert!(
        refused(ImageRequest {
            height: 264,
            ..cat()
        })
        .starts_with("height is 264")
    );
    assert!(refused(ImageRequest { width: 0, ..cat() }).starts_with("width is 0"));
    assert!(
        refused(ImageRequest {
            height: u32::MAX - 7,
            ..cat()
        })
        .starts_with("height is")
    );
    let text = refused(ImageRequest {
        width: 256,
        height: 256,
        ..cat()
    });
    assert!(
        text.contains("takes 65 MiB") && text.contains("has 40 MiB"),
        "{text}"
    );
    assert!(refused(ImageRequest { steps: 0, ..cat() }).starts_with("steps is 0"));
    assert!(
        refused(ImageRequest {
            steps: 151,
            ..cat()
        })
        .contains("1 to 150")
    );
    for guidance in [-1.0, 101.0, f32::NAN, f32::INFINITY] {
        assert!(refused(ImageRequest { guidance, ..cat() }).contains("guidance is"));
    }
    assert!(
        refused(ImageRequest {
            karras: true,
            ..cat()
        })
        .contains("no Karras spacing")
    );
    let text = refused(request(&"cat, ".repeat(500)));
    assert!(
        text.starts_with("the prompt: it has over 600 tokens"),
        "{text}"
    );
    let negative_prompt = "(".repeat(40);
    let text = refused(ImageRequest {
        negative_prompt,
        ..cat()
    });
    assert!(
        text.starts_with("the negative prompt: its brackets"),
        "{text}"
    );

    assert!(refused(from_picture(0.0, false)).contains("strength is 0"));
    assert!(refused(from_picture(0.1, false)).contains("leaves none to run"));
    let with = |change: fn(&mut InitImage)| {
        let mut request = from_picture(0.5, true);
        change(request.init.as_mut().unwrap());
        refused(request)
    };
    let text = with(|init| init.image.width = 32);
    assert!(
        text.contains("32×48 pixels, but the request's size is 64×48"),
        "{text}"
    );
    assert!(with(|init| init.image.rgb.truncate(9)).contains("has 9 bytes"));
    assert!(with(|init| init.mask = Some(vec![0; 7])).contains("the mask has 7 bytes"));
}

#[test]
fn states_of_other_requests_and_damaged_ones_are_refused() {
    let wanted = ImageRequest {
        sampler: SamplerKind::DpmPlusPlus2M,
        ..request("a cat")
    };
    let (steps, _) = run(wanted.clone());
    let progress = steps[1].clone();
    let resume = |request: &ImageRequest, progress: Progress| {
        refused(ImageRequest {
            resume: Some(progress),
            ..request.clone()
        })
    };
    let others = [
        request("a dog"),
        ImageRequest {
            seed: 8,
            ..wanted.clone()
        },
        ImageRequest {
            width: 48,
            height: 64,
            ..wanted.clone()
        },
        ImageRequest {
            guidance: 5.0,
            ..wanted.clone()
        },
        ImageRequest {
            steps: 6,
            ..wanted.clone()
        },
        ImageRequest {
            karras: true,
            ..wanted.clone()
        },
        from_picture(0.6, true),
    ];
    for other in others {
        let text = resume(&other, progress.clone());
        assert!(text.contains("another request or model"), "{text}");
    }
    let text = resume(
        &wanted,
        Progress {
            step: 3,
            ..progress.clone()
        },
    );
    assert!(
        text.contains("step 3 of 5, but its state step 2 of 5"),
        "{text}"
    );
    resume(
        &wanted,
        Progress {
            steps: 9,
            ..progress.clone()
        },
    );

    let scheduler = || Scheduler::new(Formula::new().info, tokenizer(), ImagingOptions::default());
    let mut scheduler = scheduler();
    let mut submit = |state: Vec<u8>| {
        let resume = Some(Progress {
            state,
            ..progress.clone()
        });
        scheduler.submit(
            1,
            ImageRequest {
                resume,
                ..wanted.clone()
            },
            Instant::now(),
        );
        scheduler.cancel(1);
        scheduler.next_event();
    };
    let state = &progress.state;
    for length in (0..state.len()).step_by(7).chain(0..64) {
        submit(state[..length].to_vec());
    }
    for at in 0..64 {
        for value in [0, 1, 127, 128, 255] {
            let mut changed = state.clone();
            changed[at] = value;
            submit(changed);
        }
    }
    submit(Vec::new());
    submit(vec![255; state.len()]);
}

#[test]
fn a_model_that_fails_ends_its_request_alone() {
    let engine = engine();
    let handle = engine.handle();
    let failed = handle.submit(request(FAIL));
    let good = handle.submit(request("a cat"));
    let ImageEvent::Done(Err(error)) = block_on(failed.last_event()) else {
        panic!("the model fails");
    };
    assert!(error.to_string().contains("spilt ink"), "{error}");
    assert!(matches!(
        block_on(good.last_event()),
        ImageEvent::Done(Ok(_))
    ));
    // Numbers that a request drives out of bounds do not count against the model, however many there are.
    for _ in 0..5 {
        let ImageEvent::Done(Err(error)) = block_on(handle.submit(request(INFINITE)).last_event())
        else {
            panic!("the prediction is not finite");
        };
        assert!(error.to_string().contains("not finite"), "{error}");
    }
    assert_eq!(handle.death(), None);
}

#[test]
fn parameters_are_written_as_web_interfaces_read_them() {
    let mut wanted = from_picture(0.75, false);
    wanted.sampler = SamplerKind::DpmPlusPlus2M;
    wanted.karras = true;
    let expected = "a cat\nNegative prompt: blurry\nSteps: 5, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 4, Seed: 9, \
                    Size: 64x48, Denoising strength: 0.75";
    assert_eq!(wanted.parameters(), expected);
}
