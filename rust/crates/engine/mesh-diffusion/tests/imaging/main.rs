//! The workload of images on a model in closed form: what it predicts depends on all that a real model's does.

mod formula;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use futures::StreamExt;
use futures::executor::block_on;
use mesh_diffusion::imaging::Scheduler;
use mesh_diffusion::noise::Noise;
use mesh_diffusion::sampler::{Plan, PlanOptions, Sampler};
use mesh_diffusion::{
    Diffuser, Image, ImageEvent, ImageRequest, Imaging, ImagingOptions, InitImage, Progress,
    Prompt, SamplerKind,
};
use mesh_engine::{Engine, RequestError, RequestStatus, Schedule, StepOutcome, Workload};

use self::formula::{
    FAIL, Formula, INFINITE, engine, engine_of, from_picture, imaging, request, tokenizer,
};

fn run(request: ImageRequest) -> (Vec<Progress>, Result<Image, RequestError>) {
    run_on(&engine(), request)
}

/// An engine whose model takes a mask and a masked picture.
fn inpainting() -> Engine<Imaging<Formula>> {
    let mut model = Formula::new();
    model.info.inpaints = true;
    engine_of(model)
}

fn run_on(
    engine: &Engine<Imaging<Formula>>,
    request: ImageRequest,
) -> (Vec<Progress>, Result<Image, RequestError>) {
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
    let engines = [engine(), inpainting()];
    for (request, engine) in requests
        .iter()
        .flat_map(|request| engines.iter().map(move |engine| (request, engine)))
    {
        let (steps, image) = run_on(engine, request.clone());
        let image = image.unwrap();
        for (done, progress) in steps.iter().enumerate() {
            let resumed = ImageRequest {
                resume: Some(progress.clone()),
                ..request.clone()
            };
            let (later, again) = run_on(engine, resumed);
            assert!(later == steps[done + 1..], "{request:?} after {progress:?}");
            assert!(again.unwrap() == image, "{request:?} after {progress:?}");
        }
    }
}

#[test]
fn a_model_for_inpainting_draws_as_diffusers_does_and_gets_the_mask() {
    for strength in [1.0, 0.6] {
        let wanted = from_picture(strength, true);
        let (_, image) = run_on(&inpainting(), wanted.clone());
        let mut model = Formula::new();
        model.info.inpaints = true;
        let tokenizer = tokenizer();
        let prompt = Prompt::new(&tokenizer, &wanted.prompt).unwrap();
        let negative = Prompt::new(&tokenizer, &wanted.negative_prompt).unwrap();
        let mut conditioning = model.encode(&prompt, Some(&negative)).unwrap();
        let plan = PlanOptions {
            kind: wanted.sampler,
            karras: wanted.karras,
            steps: wanted.steps,
            strength: Some(strength),
        };
        let plan = Plan::new(&model.info.sampler, plan).unwrap();
        let shape = model.info.latent_shape(64, 48);
        let mut noise = Noise::new(wanted.seed);
        let mut fresh = || noise.normal(shape.len());
        let init = wanted.init.unwrap();
        let mut sampler = match strength < 1.0 {
            true => {
                let latents = model.encode_image(&init.image, None, &fresh()).unwrap();
                Sampler::from_image(plan, &latents, &fresh()).unwrap()
            }
            false => Sampler::from_noise(plan, fresh()),
        };
        let mask = init.mask.as_deref();
        let masked = model.encode_image(&init.image, mask, &fresh()).unwrap();
        // The mask keeps columns below 20, and a latent is kept by its left column.
        let painted = (0..48).map(|at| if at % 8 < 3 { 0.0 } else { 1.0 });
        conditioning.beside = painted.chain(masked).collect();
        while let Some(timestep) = sampler.timestep() {
            let scaled = sampler.scaled();
            let predicted = model
                .denoise(&scaled, shape, timestep, &conditioning, wanted.guidance)
                .unwrap();
            let noise = sampler.takes_noise().then(&mut fresh);
            sampler.advance(&predicted, noise.as_deref()).unwrap();
        }
        let mut expected = model.decode(sampler.latents(), shape).unwrap();
        // What the mask keeps stays exact.
        let pixels = expected.rgb.chunks_mut(3).zip(init.image.rgb.chunks(3));
        for ((pixel, own), mask) in pixels.zip(mask.unwrap()) {
            if *mask < 128 {
                pixel.copy_from_slice(own);
            }
        }
        assert!(image.unwrap() == expected, "strength {strength}");
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
    let init = wanted.init.unwrap();
    let latents = model.encode_image(&init.image, None, &noise).unwrap();
    let kept = model.decode(&latents, shape).unwrap();
    // The mask keeps columns below 20. Their pixels are the picture's own; a latent is kept by its left column: those below 24.
    let found = image.rgb.chunks(3).zip(kept.rgb.chunks(3));
    for (at, ((found, of), own)) in found.zip(init.image.rgb.chunks(3)).enumerate() {
        match at % 64 {
            0..20 => assert_eq!(found, own, "pixel {at}"),
            20..24 => assert_eq!(found, of, "pixel {at}"),
            _ => {}
        }
    }
    assert!(image != kept);
}

#[test]
fn previews_come_near_the_picture_and_change_nothing() {
    for sampler in SamplerKind::ALL {
        let plain = ImageRequest {
            sampler,
            steps: 20,
            ..request("a cat")
        };
        let (without, image) = run(plain.clone());
        assert!(without.iter().all(|progress| progress.preview.is_none()));
        let wanted = ImageRequest {
            previews: true,
            ..plain
        };
        let (steps, again) = run(wanted.clone());
        assert!(again.unwrap() == image.unwrap(), "{sampler}");
        let previews: Vec<&Image> = steps.iter().flat_map(|step| &step.preview).collect();
        assert_eq!(previews.len(), 20, "{sampler}");
        let last = previews[19];
        assert_eq!((last.width, last.height, last.rgb.len()), (8, 6, 144));
        let distance = |preview: &Image| {
            let pairs = preview.rgb.iter().zip(&last.rgb);
            pairs.map(|(a, b)| u32::from(a.abs_diff(*b))).sum::<u32>()
        };
        assert!(distance(previews[17]) < distance(previews[2]), "{sampler}");
        // Another worker's is the same.
        let resumed = ImageRequest {
            resume: Some(steps[7].clone()),
            ..wanted
        };
        assert!(run(resumed).0 == steps[8..], "{sampler}");
    }
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

    let slow = Formula {
        pause: Duration::from_millis(5),
        ..Formula::new()
    };
    let engine = engine_of(slow);
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
fn a_turn_waits_for_others_as_long_as_it_has_patience() {
    static OTHERS: AtomicBool = AtomicBool::new(true);
    let run = || OTHERS.load(Ordering::Relaxed);
    let mut work = imaging().giving_way(run, Duration::from_secs(5));
    let begun = Instant::now();
    work.scheduler().submit(1, request("a cat"), begun);
    let poll = |work: &mut Imaging<Formula>, after: u64| {
        let now = begun + Duration::from_secs(after);
        assert!(work.begin(now));
        work.poll(now)
    };
    for after in [0, 1, 4] {
        assert!(matches!(poll(&mut work, after), StepOutcome::Resumed));
    }
    assert!(matches!(poll(&mut work, 5), StepOutcome::Completed));
    assert!(matches!(poll(&mut work, 5), StepOutcome::Resumed), "anew");
    OTHERS.store(false, Ordering::Relaxed);
    for _ in 0..3 {
        assert!(matches!(poll(&mut work, 6), StepOutcome::Completed));
    }
    // Meanwhile a request can be cancelled.
    OTHERS.store(true, Ordering::Relaxed);
    assert!(matches!(poll(&mut work, 7), StepOutcome::Resumed));
    work.scheduler().cancel(1);
    assert!(!work.begin(begun));
}

#[test]
fn deadlines_and_full_queues_end_requests() {
    let mut work = imaging();
    let now = Instant::now();
    let late = now + Duration::from_secs(5);
    let with_deadline = ImageRequest {
        deadline: Some(late),
        ..request("a cat")
    };
    work.scheduler().submit(1, with_deadline, now);
    for _ in 0..3 {
        assert!(work.begin(now));
        work.poll(now);
    }
    assert!(!work.begin(late));
    let mut last = None;
    while let Some((_, event)) = work.scheduler().next_event() {
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

    let mut scheduler = Scheduler::new(Formula::new().info, tokenizer(), ImagingOptions::default());
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
