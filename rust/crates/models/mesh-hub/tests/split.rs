//! Split GGUF files from a hub into a store.

mod common;

use std::ops::Range;
use std::sync::Arc;

use common::client;
use mesh_hub::{HubError, PullOptions, Pulled, pull};
use mesh_model::synth::{Shape, Split, Tokens, random_model_bytes, split_bytes};
use mesh_model::{Architecture, GgmlType, Gguf, Model};
use mesh_store::{Limits, Store};
use mesh_testkit::hub::{Fault, Site, TestHub};
use tempfile::TempDir;

/// A hub, an empty store, and a model.
struct Rig {
    hub: TestHub,
    dir: TempDir,
    gguf: Gguf,
}

impl Rig {
    async fn new() -> Self {
        let shape = Shape {
            layers: 6,
            ..Shape::tiny(Architecture::Llama)
        };
        let content = random_model_bytes(&shape, GgmlType::Q8_0, Tokens::Bytes);
        Self {
            hub: TestHub::start().await.unwrap(),
            dir: tempfile::tempdir().unwrap(),
            gguf: Gguf::from_bytes(content).unwrap(),
        }
    }

    fn store(&self) -> Store {
        let limits = Limits {
            bytes: None,
            keep_free: 0,
        };
        Store::open_with(self.dir.path().join("store"), limits).unwrap()
    }

    async fn pull(&self, name: &str) -> Result<Pulled, HubError> {
        self.pull_layers(name, None).await
    }

    async fn pull_layers(
        &self,
        name: &str,
        layers: Option<Range<u32>>,
    ) -> Result<Pulled, HubError> {
        let (hub, name) = (client(&self.hub), name.parse().unwrap());
        let options = PullOptions { layers };
        pull(&hub, &self.store(), &name, &options, Arc::new(())).await
    }

    /// The parts of the model with their paths in the repository.
    fn parts(&self) -> Vec<(String, Vec<u8>)> {
        let split = Split {
            tensors: 20,
            keys_first: true,
        };
        let parts = split_bytes(&self.gguf, split).unwrap();
        let count = parts.len();
        let name = |index: usize| format!("Q8_0/big-Q8_0-{:05}-of-{count:05}.gguf", index + 1);
        let parts = parts.into_iter().enumerate();
        parts.map(|(index, bytes)| (name(index), bytes)).collect()
    }

    fn publish(&self, repo: &str, parts: &[(String, Vec<u8>)]) {
        let files: Vec<(&str, Vec<u8>)> = parts
            .iter()
            .map(|(path, bytes)| (path.as_str(), bytes.clone()))
            .collect();
        self.hub.publish(repo, &files);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_parts_of_a_split_file_arrive_as_one_model() {
    let rig = Rig::new().await;
    let parts = rig.parts();
    rig.publish("acme/big", &parts);
    let bytes: u64 = parts.iter().map(|(_, bytes)| bytes.len() as u64).sum();
    // Interrupted in the middle of a part, it goes on there.
    let (path, content) = &parts[2];
    let half = content.len() as u64 / 2;
    rig.hub.fail(Site::Store, path, Fault::CutAfter(half));
    for _ in 0..3 {
        rig.hub.fail(Site::Store, path, Fault::Status(503, None));
    }
    rig.pull("acme/big:Q8_0").await.unwrap_err();
    let pulled = rig.pull("acme/big:Q8_0").await.unwrap();
    // What was on its way when the other part failed comes again.
    let sent = rig.hub.bytes_sent();
    assert!(sent >= bytes && sent < bytes + half, "{sent} of {bytes}");
    assert_eq!(
        (&*pulled.name, pulled.bytes, pulled.layers),
        ("big-Q8_0", bytes, 6)
    );
    let path = pulled.path.unwrap();
    assert!(path.ends_with(&parts[0].0), "{path:?}");
    let opened = Model::open(&path).unwrap();
    assert_eq!(opened.name(), "big-Q8_0");
    for tensor in rig.gguf.tensors().iter() {
        let found = opened.tensors().get(tensor.name).unwrap();
        assert_eq!(found.data.read().unwrap(), tensor.data.read().unwrap());
    }
    // Any part means all of them.
    let again = rig.pull(&format!("acme/big:{}", parts[3].0)).await.unwrap();
    assert_eq!((again.fetched, again.fingerprint), (0, pulled.fingerprint));
}

#[tokio::test(flavor = "multi_thread")]
async fn of_some_layers_in_parts_only_their_bytes_are_fetched() {
    let rig = Rig::new().await;
    let parts = rig.parts();
    rig.publish("acme/big", &parts);
    let pulled = rig.pull_layers("acme/big", Some(2..3)).await.unwrap();
    assert_eq!((pulled.layers, pulled.fetched), (6, rig.hub.bytes_sent()));
    let wanted = rig
        .gguf
        .tensors()
        .iter()
        .filter(|t| t.name.starts_with("blk.2."));
    let wanted: u64 = wanted.map(|tensor| tensor.data.len() as u64).sum();
    // And the header of every part, of which the reader fetches a quarter of a megabyte at once.
    let headers = parts.len() as u64 * (256 << 10);
    assert!(
        pulled.present > wanted && pulled.present < wanted + headers,
        "{pulled:?}"
    );
    let whole = rig.pull("acme/big").await.unwrap();
    assert_eq!(rig.hub.bytes_sent(), whole.bytes);
    assert!(whole.path.is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_foreign_part_is_refused_and_no_model_is_made_of_it() {
    let rig = Rig::new().await;
    let mut parts = rig.parts();
    // As long, of another cut.
    let copy = parts[1].1.clone();
    parts[2].1 = copy;
    rig.publish("acme/mixed", &parts);
    let error = rig.pull("acme/mixed").await.unwrap_err().to_string();
    assert!(error.contains("contains part 2"), "{error}");
    assert!(error.contains("its name is that of part 3"), "{error}");
    assert!(rig.store().models().unwrap().is_empty());
}
