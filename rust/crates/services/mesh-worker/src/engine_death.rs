//! A test of the whole worker: the engine of one of two models dies.

use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use dcf::MsgType;
use mesh_engine::{Segment, SlotId, Stage, StageError, StageInfo, StageInput, StageOutput};
use mesh_net::quic::{Link, MsgStream};
use mesh_proto::{Done, Generate, GenerateParams, ModelCard, Prompt, Served};
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

/// The doomed model's engine panics at its next step.
static NOW: AtomicBool = AtomicBool::new(false);

/// The stage of a model by this name, for [`crate::generate::load`].
pub(crate) fn stage_of(name: &str, stage: Box<dyn Stage>) -> Box<dyn Stage> {
    match name {
        DOOMED => Box::new(Doomed(stage)),
        _ => stage,
    }
}

struct Doomed(Box<dyn Stage>);

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
    loop {
        let message = timeout(PATIENCE, control.recv()).await.unwrap();
        let message = message.unwrap().expect("the control stream goes on");
        if message.kind == MsgType::SERVED {
            return names(Served::decode(message.payload).unwrap().models);
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
