//! Tests of the whole worker: the engine of one of two models dies, and the memory of a device runs out.

use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use dcf::MsgType;
use mesh_engine::{
    LogitRows, Segment, SlotId, Stage, StageError, StageInfo, StageInput, StageOutput,
};
use mesh_model::synth::{Shape, Tokens as Vocabulary, random_model};
use mesh_model::{Architecture, GgmlType};
use mesh_net::quic::{Link, MsgStream};
use mesh_proto::{Done, Generate, GenerateParams, ModelCard, Prompt, Served, Tokens};
use mesh_testkit::paths;
use prost::Message as _;
use tokio::time::timeout;

use self::common::{ANY, Head, PATIENCE};
use crate::codec::message;
use crate::{Config, Worker};

#[path = "../tests/common/mod.rs"]
#[allow(dead_code, reason = "other tests use more of it")]
mod common;

const DOOMED: &str = "doomed";
const STEADY: &str = "steady";
const CROWDED: &str = "crowded";

/// The doomed model's engine panics at its next step.
static NOW: AtomicBool = AtomicBool::new(false);

/// The stage of a model by this name, for [`crate::generate::load`].
pub(crate) fn stage_of(name: &str, stage: Box<dyn Stage>) -> Box<dyn Stage> {
    match name {
        DOOMED | CROWDED => Box::new(Doomed(stage)),
        _ => stage,
    }
}

struct Doomed(Box<dyn Stage>);

impl Doomed {
    /// Fills all slots, whatever the plan was, until the device has no memory left.
    fn fill(&mut self) -> StageError {
        let info = self.0.info().clone();
        let tokens = vec![1; info.max_rows as usize];
        for slot in 0..info.slots {
            for position in (0..info.context).step_by(info.max_rows as usize) {
                let segment = Segment {
                    slot,
                    position,
                    rows: info.max_rows.min(info.context - position),
                    logits: LogitRows::None,
                };
                let tokens = &tokens[..segment.rows as usize];
                if let Err(error) = self.0.forward(&[segment], StageInput::Tokens(tokens)) {
                    return error;
                }
            }
        }
        panic!("the device has room for all slots: {info:?}");
    }
}

/// The crowded model's device is filled at this step from now on, counted down; 0 is never.
static FILL_IN: AtomicU32 = AtomicU32::new(0);

impl Stage for Doomed {
    fn info(&self) -> &StageInfo {
        self.0.info()
    }

    fn forward(
        &mut self,
        segments: &[Segment],
        input: StageInput<'_>,
    ) -> Result<StageOutput<'_>, StageError> {
        assert!(!NOW.swap(false, Ordering::SeqCst), "as the test wants it");
        let countdown = |left: u32| left.checked_sub(1);
        if FILL_IN.fetch_update(Ordering::SeqCst, Ordering::SeqCst, countdown) == Ok(1) {
            return Err(self.fill());
        }
        self.0.forward(segments, input)
    }

    fn kv_len(&self, slot: SlotId) -> u32 {
        self.0.kv_len(slot)
    }

    fn truncate(&mut self, slot: SlotId, len: u32) {
        self.0.truncate(slot, len);
    }

    fn copy_prefix(&mut self, from: SlotId, to: SlotId, len: u32) -> Result<(), StageError> {
        self.0.copy_prefix(from, to, len)
    }

    fn kv_export(&self, slot: SlotId, rows: Range<u32>) -> Result<Vec<u8>, StageError> {
        self.0.kv_export(slot, rows)
    }

    fn kv_import(&mut self, slot: SlotId, position: u32, bytes: &[u8]) -> Result<(), StageError> {
        self.0.kv_import(slot, position, bytes)
    }
}

fn config(state_dir: &Path, models: Vec<String>, head: &Head) -> Config {
    let mut config = Config {
        state_dir: state_dir.to_owned(),
        models,
        ort_library: Some(paths::ort_library().unwrap()),
        threads: 1,
        slots: 1,
        context: 256,
        head: Some(head.address().to_string()),
        join_token: Some(head.token()),
        ..Config::default()
    };
    (config.http.listen, config.dcf.listen) = (ANY, ANY);
    config
}

fn names(models: Vec<ModelCard>) -> Vec<String> {
    models.into_iter().map(|card| card.name).collect()
}

/// The names in the next word of what is served.
async fn served(control: &mut MsgStream) -> Vec<String> {
    names(cards(control).await)
}

async fn cards(control: &mut MsgStream) -> Vec<ModelCard> {
    loop {
        let message = timeout(PATIENCE, control.recv()).await.unwrap();
        let message = message.unwrap().expect("the control stream goes on");
        if message.kind == MsgType::SERVED {
            return Served::decode(message.payload).unwrap().models;
        }
    }
}

/// Asks a model for a few tokens; an error's text if none come.
async fn ask(link: &Link, model: &str) -> Result<Done, String> {
    let generate = Generate {
        request_id: format!("of {model}"),
        model: model.to_owned(),
        prompt: Some(Prompt::Text("Once upon a time".to_owned())),
        params: Some(GenerateParams {
            max_tokens: Some(4),
            ..GenerateParams::default()
        }),
        ..Generate::default()
    };
    let mut stream = link.open().await.unwrap();
    stream
        .send(message(MsgType::GENERATE, &generate))
        .await
        .unwrap();
    loop {
        let message = timeout(PATIENCE, stream.recv()).await.unwrap();
        let Some(message) = message.map_err(|failure| failure.to_string())? else {
            return Err("the stream ended".to_owned());
        };
        match message.kind {
            MsgType::DONE => return Ok(Done::decode(message.payload).unwrap()),
            MsgType::ERROR => return Err(message.error_body().unwrap().text.into_owned()),
            _ => {}
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_death_of_an_engine_withdraws_its_own_model_until_it_is_loaded_again() {
    let dir = tempfile::tempdir().unwrap();
    let models = [DOOMED, STEADY].map(|name| {
        let path = dir.path().join(format!("{name}.gguf"));
        std::os::unix::fs::symlink(paths::smollm2().unwrap(), &path).unwrap();
        path.display().to_string()
    });
    let head = Head::start().await;
    let state = tempfile::tempdir().unwrap();
    let config = config(state.path(), models.to_vec(), &head);
    let starting = timeout(PATIENCE, Worker::start(config));
    let (worker, (link, mut control, hello)) = tokio::join!(starting, head.accept());
    let worker = worker.unwrap().unwrap();
    assert_eq!(names(hello.models), [DOOMED, STEADY]);
    assert!(ask(&link, DOOMED).await.is_ok());

    NOW.store(true, Ordering::SeqCst);
    let error = ask(&link, DOOMED).await.expect_err("its engine is dead");
    assert_eq!(served(&mut control).await, [STEADY], "after {error:?}");
    let done = ask(&link, STEADY).await.expect("the other one answers");
    assert_eq!(done.completion_tokens, 4);
    let error = ask(&link, DOOMED).await.expect_err("it is not served");
    assert!(error.contains(DOOMED), "{error}");

    let mut again = served(&mut control).await;
    again.sort();
    assert_eq!(again, [DOOMED, STEADY]);
    assert!(ask(&link, DOOMED).await.is_ok());
    assert!(link.close_reason().is_none(), "it is the same link");
    worker.shutdown().await.unwrap();
}

/// The greedy answer behind `generated`, as far as it comes, and the error that ends it.
async fn answer(link: &Link, generated: &[u32]) -> (Vec<u32>, Option<String>) {
    let generate = Generate {
        request_id: "stream".to_owned(),
        model: CROWDED.to_owned(),
        prompt: Some(Prompt::Text("Once upon a time".to_owned())),
        params: Some(GenerateParams {
            max_tokens: Some(ANSWER),
            temperature: Some(0.0),
            ignore_eos: true,
            ..GenerateParams::default()
        }),
        generated: generated.to_vec(),
        ..Generate::default()
    };
    let mut stream = link.open().await.unwrap();
    let asked = stream.send(message(MsgType::GENERATE, &generate)).await;
    asked.unwrap();
    let mut tokens = Vec::new();
    loop {
        let message = timeout(PATIENCE, stream.recv()).await.unwrap();
        let Some(message) = message.unwrap() else {
            return (tokens, Some("the stream ended".to_owned()));
        };
        match message.kind {
            MsgType::TOKENS => tokens.extend(Tokens::decode(message.payload).unwrap().tokens),
            MsgType::DONE => return (tokens, None),
            MsgType::ERROR => {
                let text = message.error_body().unwrap().text.into_owned();
                return (tokens, Some(text));
            }
            _ => {}
        }
    }
}

const ANSWER: u32 = 30;

/// The head does as much as this test: it asks again with the tokens so far.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_goes_on_after_a_device_ran_out_of_memory_with_fewer_layers_there() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(format!("{CROWDED}.gguf"));
    let shape = Shape {
        layers: 8,
        context: 1024,
        ..Shape::tiny(Architecture::Llama)
    };
    // Floats, with which a layer computes the same on the device and on the CPU, but for the last digits.
    random_model(&shape, GgmlType::F32, Vocabulary::Bytes, &path).unwrap();
    let head = Head::start().await;
    let state = tempfile::tempdir().unwrap();
    let config = Config {
        backend: "ort-cpu".parse().unwrap(),
        vram_limit: Some(24 << 20),
        slots: 4,
        context: 1024,
        ..config(state.path(), vec![path.display().to_string()], &head)
    };
    let starting = timeout(PATIENCE, Worker::start(config));
    let (worker, (link, mut control, hello)) = tokio::join!(starting, head.accept());
    let worker = worker.unwrap().unwrap();
    let before = hello.models[0].split.clone().expect("a part on the device");
    assert!(
        before.device_layers > 1 && before.cpu_layers > 0,
        "{before:?}"
    );
    let (whole, error) = answer(&link, &[]).await;
    assert_eq!((whole.len() as u32, error), (ANSWER, None));

    FILL_IN.store(10, Ordering::SeqCst);
    let (first, error) = answer(&link, &[]).await;
    let error = error.expect("no memory is left");
    assert!(
        first.len() > 2 && whole.starts_with(&first),
        "{first:?}: {error}"
    );
    let mut served = cards(&mut control).await;
    assert!(served.is_empty(), "{served:?} after {error:?}");
    while served.is_empty() {
        served = cards(&mut control).await;
    }
    let after = served[0].split.clone().expect("a part on the device");
    assert!(
        after.device_layers < before.device_layers,
        "{before:?}, {after:?}"
    );
    assert_eq!(after.device_layers + after.cpu_layers, 8);
    let (rest, error) = answer(&link, &first).await;
    assert_eq!(error, None);
    assert_eq!([first, rest].concat(), whole);
    worker.shutdown().await.unwrap();
}
