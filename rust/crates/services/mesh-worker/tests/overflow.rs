//! A worker whose model is larger than the memory that it may take on the device. The device is ONNX Runtime's
//! own CPU kernels, which run the graph for GPUs.

#[allow(dead_code, reason = "other tests use more of it")]
mod common;

use std::collections::BTreeMap;
use std::path::Path;

use dcf::{Message, MsgType};
use mesh_net::quic::{Link, timestamp_us};
use mesh_proto::{Done, Generate, GenerateParams, Prompt, Tokens};
use mesh_service::ask;
use mesh_testkit::paths;
use mesh_worker::{Config, Worker};
use prost::Message as _;
use tokio::time::timeout;

use common::{ANY, Head, PATIENCE};

const LIMIT: u64 = 48 << 20;

fn config(state_dir: &Path, head: &Head) -> Config {
    let mut config = Config {
        state_dir: state_dir.to_owned(),
        models: vec![paths::smollm2().unwrap().display().to_string()],
        ort_library: Some(paths::ort_library().unwrap()),
        backend: "ort-cpu".parse().unwrap(),
        vram_limit: Some(LIMIT),
        threads: 1,
        slots: 2,
        context: 256,
        head: Some(head.address().to_string()),
        join_token: Some(head.token()),
        ..Config::default()
    };
    (config.http.listen, config.dcf.listen) = (ANY, ANY);
    config
}

/// The tokens of a greedy answer that goes on behind `generated`.
async fn answer(link: &Link, generated: Vec<u32>) -> Vec<u32> {
    let first = generated.len();
    let generate = Generate {
        request_id: "test".to_owned(),
        prompt: Some(Prompt::Text("The capital of France is".to_owned())),
        params: Some(GenerateParams {
            max_tokens: Some(12),
            temperature: Some(0.0),
            ignore_eos: true,
            ..GenerateParams::default()
        }),
        generated,
        ..Generate::default()
    };
    let mut stream = link.open().await.unwrap();
    let body = generate.encode_to_vec();
    let message = Message::new(MsgType::GENERATE, 5, timestamp_us(), body);
    stream.send(message).await.unwrap();
    let mut tokens = Vec::new();
    loop {
        let message = timeout(PATIENCE, stream.recv()).await.unwrap();
        let message = message.unwrap().expect("an end");
        match message.kind {
            MsgType::TOKENS => {
                let new = Tokens::decode(message.payload).unwrap();
                assert_eq!(new.index as usize, first + tokens.len());
                tokens.extend(new.tokens);
            }
            MsgType::DONE => {
                let done = Done::decode(message.payload).unwrap();
                assert_eq!(done.completion_tokens, 12);
                return tokens;
            }
            _ => panic!("{:?}", message.error_body()),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_model_larger_than_the_limit_is_served_from_both_memories() {
    let head = Head::start().await;
    let state = tempfile::tempdir().unwrap();
    let starting = timeout(PATIENCE, Worker::start(config(state.path(), &head)));
    let (worker, (link, _control, hello)) = tokio::join!(starting, head.accept());
    let worker = worker.unwrap().unwrap();
    assert_eq!(hello.models.len(), 1);
    assert_eq!(hello.models[0].layer_end, 30, "a whole model to the head");
    let split = hello.models[0].split.clone().expect("its parts");
    let whole = answer(&link, Vec::new()).await;
    assert_eq!(whole.len(), 12);
    // A request that was interrupted elsewhere continues here.
    assert_eq!(answer(&link, whole[..5].to_vec()).await, whole[5..]);

    let text = ask::get(state.path(), "/metrics").await.unwrap();
    let figures: BTreeMap<&str, f64> = text
        .lines()
        .filter_map(|line| {
            let (name, value) = line
                .strip_prefix("hydramesh_worker_model_")?
                .rsplit_once(' ')?;
            Some((name.split_once('{')?.0, value.parse().ok()?))
        })
        .collect();
    let figure = |name: &str| {
        figures
            .get(name)
            .copied()
            .unwrap_or_else(|| panic!("{name}: {text}"))
    };
    let (layers, spilled) = (figure("device_layers"), figure("spilled_layers"));
    assert!(layers >= 1.0 && spilled >= 1.0, "{figures:?}");
    assert_eq!(layers + spilled, 30.0);
    let said = [split.device_layers, split.cpu_layers, split.expert_layers];
    assert_eq!(said.map(f64::from), [layers, spilled, 0.0]);
    assert!(split.device_bytes <= LIMIT && split.cpu_bytes > 1 << 20);
    let bytes = figure("device_bytes");
    assert!(bytes > 0.0 && bytes <= LIMIT as f64, "{figures:?}");
    assert!(figure("spilled_bytes") > 1e6, "{figures:?}");
    // Each computed row of f32 went over once: those of the warm-up, of the prompts and of the answers.
    let row = 4.0 * 576.0;
    let moved = figure("moved_bytes_total");
    assert!(moved >= 12.0 * row && moved % row == 0.0, "{figures:?}");
    worker.shutdown().await.unwrap();
}
