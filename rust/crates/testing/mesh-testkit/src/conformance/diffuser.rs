//! The contract of a [`Diffuser`]: a picture depends on its request alone, goes on elsewhere after any step, and bad
//! calls harm nothing.

use std::sync::Arc;

use futures::StreamExt;
use futures::executor::block_on;
use futures::future::join_all;
use mesh_diffusion::{
    ClipTokenizer, Conditioning, Diffuser, Image, ImageEvent, ImageRequest, Imaging,
    ImagingOptions, Progress, Prompt, SamplerKind, TextEmbedding,
};
use mesh_engine::{Engine, RequestError, RequestStream, StageError};

use super::same;

/// A way to compute a model of images.
pub struct Subject<'a> {
    /// Name in messages.
    pub name: String,
    /// Opens the model.
    pub open: &'a dyn Fn() -> Box<dyn Diffuser>,
    /// Reads its prompts.
    pub tokenizer: Arc<ClipTokenizer>,
    /// Width and height of the pictures.
    pub size: (u32, u32),
}

type Work = Engine<Imaging<Box<dyn Diffuser>>>;

impl Subject<'_> {
    /// Runs all checks.
    ///
    /// # Panics
    /// If one of them fails.
    pub fn check(&self) {
        let mut model = (self.open)();
        self.refusals(&mut *model);
        let work = self.engine(model);
        let known: Vec<_> = [SamplerKind::EulerAncestral, SamplerKind::DpmPlusPlus2M]
            .into_iter()
            .map(|sampler| {
                let request = ImageRequest {
                    sampler,
                    ..self.request("a cat", 3)
                };
                let (steps, image) = self.run(&work, request.clone());
                (request, steps, image)
            })
            .collect();
        let again = self.run(&work, known[0].0.clone());
        same(&self.name, "the same again", &again.1, &known[0].2);
        self.together(&work, &known);
        self.cancelled(&work, &known[0]);
        drop(work);
        // Elsewhere, after each step.
        let work = self.engine((self.open)());
        for (request, steps, image) in &known {
            for (done, progress) in steps.iter().enumerate() {
                let (later, found) = self.run(
                    &work,
                    ImageRequest {
                        resume: Some(progress.clone()),
                        ..request.clone()
                    },
                );
                same(
                    &self.name,
                    "steps after a resumption",
                    &later[..],
                    &steps[done + 1..],
                );
                self.same_picture("a resumed picture", &found, image);
            }
        }
    }

    /// Several at once are what each is alone.
    fn together(&self, work: &Work, known: &[(ImageRequest, Vec<Progress>, Image)]) {
        let handle = work.handle();
        let streams = known
            .iter()
            .map(|(request, ..)| handle.submit(request.clone()));
        let ends = block_on(join_all(streams.map(RequestStream::last_event)));
        for (end, (.., image)) in ends.iter().zip(known) {
            match end {
                ImageEvent::Done(Ok(found)) => self.same_picture("one of several", found, image),
                other => panic!("{}: {other:?}", self.name),
            }
        }
    }

    /// Requests that are cancelled in the middle leave their turns to the next one.
    fn cancelled(&self, work: &Work, known: &(ImageRequest, Vec<Progress>, Image)) {
        let handle = work.handle();
        let mut long: Vec<_> = (0..3)
            .map(|_| handle.submit(self.request("a dog", 50)))
            .collect();
        let first = block_on(long[0].next());
        assert!(
            matches!(first, Some(ImageEvent::Step(_))),
            "{}: {first:?}",
            self.name
        );
        drop(long);
        let (_, found) = self.run(work, known.0.clone());
        self.same_picture("after cancellations", &found, &known.2);
        let load = handle.load();
        let left = (load.running, load.queued, load.prefill_backlog);
        same(&self.name, "work in progress", left, (0, 0, 0));
        same(&self.name, "cancelled requests", load.totals.cancelled, 3);
    }

    fn refusals(&self, model: &mut dyn Diffuser) {
        let shape = model.info().latent_shape(self.size.0, self.size.1);
        let prompt = Prompt::new(&self.tokenizer, "a cat").expect("a short prompt");
        let conditioning = model.encode(&prompt, None).expect("a valid prompt");
        let latents = vec![0.25; shape.len()];
        let mut denoise = |latents: &[f32], conditioning: &Conditioning| {
            model.denoise(latents, shape, 481.0, conditioning, 2.0)
        };
        let expected = denoise(&latents, &conditioning).expect("a valid call");
        let narrow = Conditioning {
            prompt: TextEmbedding {
                width: conditioning.prompt.width / 2,
                ..conditioning.prompt.clone()
            },
            ..conditioning.clone()
        };
        for found in [
            denoise(&latents[1..], &conditioning),
            denoise(&latents, &narrow),
        ] {
            assert!(
                matches!(found, Err(StageError::Malformed(_))),
                "{}: {found:?}",
                self.name
            );
        }
        same(
            &self.name,
            "noise after refusals",
            denoise(&latents, &conditioning),
            Ok(expected),
        );
        let short = model.decode(&latents[1..], shape);
        assert!(
            short.is_err(),
            "{}: a picture of too few latents",
            self.name
        );
    }

    fn request(&self, prompt: &str, steps: u32) -> ImageRequest {
        ImageRequest {
            id: prompt.to_owned(),
            prompt: prompt.to_owned(),
            negative_prompt: "blurry".to_owned(),
            width: self.size.0,
            height: self.size.1,
            steps,
            guidance: 4.0,
            seed: 9,
            sampler: SamplerKind::EulerAncestral,
            karras: false,
            init: None,
            previews: false,
            resume: None,
            deadline: None,
        }
    }

    fn engine(&self, model: Box<dyn Diffuser>) -> Work {
        let options = ImagingOptions::default();
        let imaging = Imaging::new(model, Arc::clone(&self.tokenizer), options);
        Engine::start_with("conformance", |_| Ok(imaging)).expect("the system gives a thread")
    }

    fn run(&self, work: &Work, request: ImageRequest) -> (Vec<Progress>, Image) {
        let events: Vec<ImageEvent> = block_on(work.handle().submit(request).collect());
        let mut steps = Vec::new();
        let mut end: Option<Result<Image, RequestError>> = None;
        for event in events {
            match event {
                ImageEvent::Step(progress) => steps.push(progress),
                ImageEvent::Done(result) => end = Some(result),
            }
        }
        match end {
            Some(Ok(image)) => (steps, image),
            other => panic!("{}: {other:?}", self.name),
        }
    }

    /// Compares bytes: the debug form of a picture has none.
    #[track_caller]
    fn same_picture(&self, check: &str, found: &Image, expected: &Image) {
        assert!(found == expected, "{}: {check} is another", self.name);
    }
}
