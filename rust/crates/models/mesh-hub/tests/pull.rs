//! Models from a hub into a store.

mod common;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use common::{ID, Notes, client, noise, settings};
use mesh_hub::{Hub, HubError, HubName, PullOptions, Pulled, Watch, pull};
use mesh_model::synth::{Shape, Tokens, random_model_bytes};
use mesh_model::{Architecture, GgmlType, Gguf};
use mesh_store::{Limits, Store};
use mesh_testkit::hub::{Fault, Site, TestHub};
use tempfile::TempDir;

const FILE: &str = "tiny-Q8_0.gguf";

struct Rig {
    hub: TestHub,
    dir: TempDir,
    content: Vec<u8>,
}

impl Rig {
    /// A hub with a GGUF model, and an empty store.
    async fn new() -> Self {
        let hub = TestHub::start().await.unwrap();
        let shape = Shape {
            layers: 6,
            ..Shape::tiny(Architecture::Llama)
        };
        let content = random_model_bytes(&shape, GgmlType::Q8_0, Tokens::Bytes);
        hub.publish(ID, &[(FILE, content.clone()), ("README.md", b"x".to_vec())]);
        Self {
            hub,
            dir: tempfile::tempdir().unwrap(),
            content,
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
        self.pull_as(&client(&self.hub), name, None).await
    }

    async fn pull_as(
        &self,
        client: &Hub,
        name: &str,
        layers: Option<std::ops::Range<u32>>,
    ) -> Result<Pulled, HubError> {
        let name: HubName = name.parse().unwrap();
        let options = PullOptions { layers };
        pull(client, &self.store(), &name, &options, Arc::new(())).await
    }
}

fn folder_files() -> Vec<(&'static str, Vec<u8>)> {
    let mut weights = Vec::new();
    let planned = [
        tensor("model.layers.0.a", 150_000),
        tensor("model.layers.1.a", 150_000),
    ];
    write_safetensors(&mut weights, &planned);
    let mut more = Vec::new();
    write_safetensors(&mut more, &[tensor("lm_head.weight", 2000)]);
    let index = br#"{"weight_map":{"model.layers.0.a":"model-1.safetensors","model.layers.1.a":"model-1.safetensors","lm_head.weight":"model-2.safetensors"}}"#;
    vec![
        ("config.json", b"{\"model_type\":\"llama\"}".to_vec()),
        ("tokenizer.json", noise(20_000, 3)),
        ("model-1.safetensors", weights),
        ("model-2.safetensors", more),
        ("model.safetensors.index.json", index.to_vec()),
        ("notes.txt", b"not needed".to_vec()),
    ]
}

fn tensor(name: &str, len: u64) -> mesh_model::safetensors::Planned {
    mesh_model::safetensors::Planned {
        name: name.to_owned(),
        dtype: mesh_model::safetensors::Dtype::F32,
        shape: vec![len],
    }
}

fn write_safetensors(out: &mut Vec<u8>, tensors: &[mesh_model::safetensors::Planned]) {
    mesh_model::safetensors::write(out, tensors, |tensor, out| {
        out.write_all(&noise(tensor.bytes() as usize, tensor.name.len() as u64))
    })
    .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gguf_model_arrives_byte_for_byte_and_is_known_by_its_name() {
    let rig = Rig::new().await;
    let pulled = rig.pull(ID).await.unwrap();
    let path = pulled.path.unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), rig.content);
    assert_eq!(pulled.name, "tiny-Q8_0");
    assert_eq!(pulled.layers, 6);
    assert_eq!(pulled.fetched, rig.content.len() as u64);

    let models = rig.store().models().unwrap();
    let [model] = &models[..] else {
        panic!("{models:?}");
    };
    assert_eq!(Some(model.fingerprint), pulled.fingerprint);
    assert_eq!(model.names[0].name, ID);
    let source = model.names[0].source.as_ref().unwrap();
    let hub = client(&rig.hub);
    let endpoint = &hub.settings().endpoint;
    assert_eq!(*source, format!("{endpoint}{ID}/tree/{}", pulled.commit));

    // The second time nothing moves but the listing.
    rig.hub.reset_counts();
    let again = rig.pull(ID).await.unwrap();
    assert_eq!((again.fetched, again.fingerprint), (0, pulled.fingerprint));
    assert_eq!(rig.hub.bytes_sent(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_folder_of_shards_arrives_with_what_describes_it() {
    let rig = Rig::new().await;
    let files = folder_files();
    rig.hub.publish("acme/Folder", &files);
    let pulled = rig.pull("acme/Folder").await.unwrap();
    let folder = pulled.path.unwrap();
    for (path, content) in &files {
        match *path {
            "notes.txt" => assert!(!folder.join(path).exists()),
            path => assert_eq!(
                &std::fs::read(folder.join(path)).unwrap(),
                content,
                "{path}"
            ),
        }
    }
    assert_eq!((&*pulled.name, pulled.layers), ("Folder", 2));

    // The same files in a folder that somebody made are the same model.
    let local = rig.dir.path().join("Folder");
    std::fs::create_dir(&local).unwrap();
    for (path, content) in files.iter().filter(|(path, _)| *path != "notes.txt") {
        std::fs::write(local.join(path), content).unwrap();
    }
    let manifest = mesh_store::Manifest::of_path("Folder", &local, &|_| ()).unwrap();
    assert_eq!(Some(manifest.fingerprint()), pulled.fingerprint);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hub_that_lists_names_only_is_asked_for_each_file() {
    let rig = Rig::new().await;
    rig.hub.list_names_only(true);
    rig.hub.publish("acme/Folder", &folder_files());
    for (name, file) in [(ID, FILE), ("acme/Folder", "tokenizer.json")] {
        let pulled = rig.pull(name).await.unwrap();
        assert_eq!(pulled.present, pulled.bytes);
        assert_eq!(rig.hub.count(Site::Resolve, file).heads, 1);
    }
    // What that tells is held against what arrives.
    rig.hub
        .publish("acme/more", &[("more.gguf", noise(70_000, 8))]);
    rig.hub
        .fail(Site::Store, "more.gguf", Fault::WrongByteAt(7));
    let error = rig.pull("acme/more").await.unwrap_err();
    assert!(matches!(error, HubError::Damaged { .. }), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_another_model_has_is_not_fetched_again() {
    let rig = Rig::new().await;
    rig.pull(ID).await.unwrap();
    rig.hub
        .publish("acme/copy", &[("copy-Q8_0.gguf", rig.content.clone())]);
    rig.hub.reset_counts();
    let pulled = rig.pull("acme/copy").await.unwrap();
    assert_eq!((&*pulled.name, pulled.fetched), ("copy-Q8_0", 0));
    assert_eq!(rig.hub.bytes_sent(), 0);
    assert_eq!(rig.store().models().unwrap().len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pull_that_failed_goes_on_where_it_was() {
    let rig = Rig::new().await;
    let half = rig.content.len() as u64 / 2;
    rig.hub.fail(Site::Store, FILE, Fault::CutAfter(half));
    for _ in 0..3 {
        rig.hub.fail(Site::Store, FILE, Fault::Status(503, None));
    }
    let error = rig.pull(ID).await.unwrap_err();
    assert!(
        error.to_string().contains("what was fetched is kept"),
        "{error}"
    );
    let pulled = rig.pull(ID).await.unwrap();
    assert_eq!(rig.hub.bytes_sent(), rig.content.len() as u64);
    assert_eq!(std::fs::read(pulled.path.unwrap()).unwrap(), rig.content);
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_bytes_are_refused_and_not_kept() {
    let rig = Rig::new().await;
    let len = rig.content.len() as u64;
    rig.hub
        .fail(Site::Store, FILE, Fault::WrongByteAt(len - 10));
    let error = rig.pull(ID).await.unwrap_err();
    assert!(
        matches!(&error, HubError::Damaged { path, .. } if path == FILE),
        "{error}"
    );
    assert!(rig.store().models().unwrap().is_empty());
    let pulled = rig.pull(ID).await.unwrap();
    assert_eq!(std::fs::read(pulled.path.unwrap()).unwrap(), rig.content);

    // Of a small file, git's blob id tells.
    rig.hub.publish("acme/Folder", &folder_files());
    rig.hub
        .fail(Site::Resolve, "tokenizer.json", Fault::WrongByteAt(5));
    let error = rig.pull("acme/Folder").await.unwrap_err();
    assert!(
        matches!(
            &error,
            HubError::Damaged {
                kind: "git blob id",
                ..
            }
        ),
        "{error}"
    );
    rig.pull("acme/Folder").await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn several_pulls_at_once_fetch_everything_once() {
    let rig = Rig::new().await;
    rig.hub.pace(Some((64 << 10, Duration::from_millis(5))));
    let clients = [client(&rig.hub), client(&rig.hub), client(&rig.hub)];
    let pulls = clients.iter().map(|client| rig.pull_as(client, ID, None));
    let pulled = futures::future::try_join_all(pulls).await.unwrap();
    assert!(
        pulled
            .iter()
            .all(|one| one.fingerprint == pulled[0].fingerprint)
    );
    assert_eq!(rig.hub.bytes_sent(), rig.content.len() as u64);
}

#[tokio::test(flavor = "multi_thread")]
async fn room_is_asked_for_before_anything_is_fetched() {
    let rig = Rig::new().await;
    rig.hub.publish("acme/Folder", &folder_files());
    let limits = Limits {
        bytes: Some(30_000),
        keep_free: 0,
    };
    let store = Store::open_with(rig.dir.path().join("small"), limits).unwrap();
    for name in [ID, "acme/Folder"] {
        rig.hub.reset_counts();
        let (hub, options) = (client(&rig.hub), PullOptions::default());
        let error = pull(&hub, &store, &name.parse().unwrap(), &options, Arc::new(()))
            .await
            .unwrap_err();
        assert!(error.to_string().contains("no room for"), "{error}");
        let weights: u64 = [
            FILE,
            "model-1.safetensors",
            "model-2.safetensors",
            "tokenizer.json",
        ]
        .iter()
        .map(|file| {
            rig.hub.count(Site::Store, file).bytes + rig.hub.count(Site::Resolve, file).bytes
        })
        .sum();
        assert_eq!(weights, 0, "{name}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn of_some_layers_only_their_bytes_are_fetched() {
    let rig = Rig::new().await;
    let gguf = Gguf::from_bytes(rig.content.clone()).unwrap();
    let wanted = |name: &str| {
        name.starts_with("blk.2.") || name.starts_with("blk.3.") || !name.contains('.')
    };
    let needed: u64 = gguf
        .tensors()
        .iter()
        .filter(|tensor| wanted(tensor.name))
        .map(|tensor| tensor.data.len() as u64)
        .sum();
    let client = client(&rig.hub);
    let pulled = rig.pull_as(&client, ID, Some(2..4)).await.unwrap();
    assert_eq!((pulled.layers, pulled.fingerprint), (6, None));
    let sent = rig.hub.bytes_sent();
    assert_eq!(sent, pulled.fetched);
    assert!(
        sent >= needed && sent < rig.content.len() as u64,
        "{sent} of {needed}"
    );

    // It opens like the whole file, and what was wanted is right.
    let partial = rig.dir.path().join("store/partial");
    let path = std::fs::read_dir(partial)
        .unwrap()
        .map(|item| item.unwrap().path())
        .find(|path| path.extension().is_none())
        .unwrap();
    let opened = Gguf::open(&path).unwrap();
    for tensor in gguf.tensors().iter().filter(|tensor| wanted(tensor.name)) {
        assert_eq!(
            opened
                .tensors()
                .get(tensor.name)
                .unwrap()
                .data
                .read()
                .unwrap(),
            tensor.data.read().unwrap(),
            "{}",
            tensor.name
        );
    }

    // Once more nothing moves; other layers come beside them; the rest completes it.
    rig.hub.reset_counts();
    let again = rig.pull_as(&client, ID, Some(2..4)).await.unwrap();
    assert_eq!((rig.hub.bytes_sent(), again.present), (0, sent));
    let more = rig.pull_as(&client, ID, Some(4..5)).await.unwrap();
    assert_eq!(more.present, sent + rig.hub.bytes_sent());
    assert_eq!(more.fetched, rig.hub.bytes_sent());
    let whole = rig.pull(ID).await.unwrap();
    assert_eq!(rig.hub.bytes_sent(), rig.content.len() as u64 - sent);
    assert_eq!(std::fs::read(whole.path.unwrap()).unwrap(), rig.content);

    let error = rig.pull_as(&client, ID, Some(5..9)).await.unwrap_err();
    assert!(error.to_string().contains("0..6"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn of_some_layers_in_shards_only_their_bytes_are_fetched() {
    let rig = Rig::new().await;
    rig.hub.publish("acme/Folder", &folder_files());
    let client = client(&rig.hub);
    let pulled = rig
        .pull_as(&client, "acme/Folder", Some(0..1))
        .await
        .unwrap();
    assert_eq!(pulled.layers, 2);
    // Layer 0 lies before layer 1, of which nothing was wanted.
    assert!(pulled.present < pulled.bytes - 500_000, "{pulled:?}");
    assert!(rig.hub.bytes_sent() < pulled.present + 1000);
    let error = rig.pull_as(&client, "acme/Folder", Some(1..3)).await;
    assert!(error.unwrap_err().to_string().contains("0..2"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_header_that_lies_is_an_error_at_once() {
    let rig = Rig::new().await;
    let mut lying = b"GGUF".to_vec();
    lying.extend(3u32.to_le_bytes());
    lying.extend(u64::MAX.to_le_bytes());
    lying.extend(noise(3_000_000, 4));
    let mut huge = (1u64 << 60).to_le_bytes().to_vec();
    huge.extend(noise(100_000, 5));
    rig.hub.publish("acme/lying", &[("a.gguf", lying)]);
    rig.hub
        .publish("acme/none", &[("a.gguf", noise(3_000_000, 6))]);
    let described = |weights| {
        [
            ("config.json", b"{}".to_vec()),
            ("tokenizer.json", b"{}".to_vec()),
            ("model.safetensors", weights),
        ]
    };
    rig.hub.publish("acme/huge", &described(huge));
    rig.hub.publish("acme/short", &described(b"abc".to_vec()));
    for name in ["acme/lying", "acme/none", "acme/huge", "acme/short"] {
        rig.hub.reset_counts();
        let error = rig
            .pull_as(&client(&rig.hub), name, Some(0..1))
            .await
            .unwrap_err();
        assert!(matches!(error, HubError::Header { .. }), "{name}: {error}");
        assert!(
            rig.hub.bytes_sent() < 600_000,
            "{name}: {}",
            rig.hub.bytes_sent()
        );
    }
}

/// A cache as other programs leave it.
fn cache(root: &Path, commit: &str, files: &[(&str, &[u8])]) {
    let repo = root.join("models--acme--tiny");
    std::fs::create_dir_all(repo.join("refs")).unwrap();
    std::fs::write(repo.join("refs/main"), commit).unwrap();
    let snapshot = repo.join("snapshots").join(commit);
    std::fs::create_dir_all(repo.join("blobs")).unwrap();
    std::fs::create_dir_all(&snapshot).unwrap();
    for (path, content) in files {
        let digest = mesh_store::Digest::of(content).to_string();
        std::fs::write(repo.join("blobs").join(&digest), content).unwrap();
        std::os::unix::fs::symlink(format!("../../blobs/{digest}"), snapshot.join(path)).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_other_programs_have_fetched_is_taken_from_their_cache() {
    let rig = Rig::new().await;
    let commit = client(&rig.hub).open(ID, "main", &()).await.unwrap().commit;
    let home = tempfile::tempdir().unwrap();
    cache(&home.path().join("hub"), &commit, &[(FILE, &rig.content)]);
    let variables = |name: &str| match name {
        "HF_HOME" => Some(home.path().into()),
        "HF_ENDPOINT" => Some(rig.hub.endpoint().into()),
        _ => None,
    };
    let settings = mesh_hub::Settings::from_lookup(variables, None).unwrap();
    let online = Hub::new(settings.clone()).unwrap();
    let pulled = rig.pull_as(&online, ID, None).await.unwrap();
    assert_eq!(rig.hub.bytes_sent(), 0);
    assert_eq!(std::fs::read(pulled.path.unwrap()).unwrap(), rig.content);

    // Without a network it is enough, too.
    let other = Rig::new().await;
    let mut settings = settings;
    settings.offline = true;
    let offline = Hub::new(settings).unwrap();
    let pulled = other.pull_as(&offline, ID, None).await.unwrap();
    assert_eq!(pulled.commit, commit);
    assert_eq!(std::fs::read(pulled.path.unwrap()).unwrap(), rig.content);

    // So is the store.
    std::fs::remove_dir_all(home.path().join("hub")).unwrap();
    let again = other.pull_as(&offline, ID, None).await.unwrap();
    assert_eq!((again.repo.as_str(), again.commit), (ID, commit));
    assert!(other.pull_as(&offline, "acme/other", None).await.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_watch_is_told_of_every_byte() {
    let rig = Rig::new().await;
    let notes = Arc::new(Notes::default());
    let watch: Arc<dyn Watch> = notes.clone();
    let hub = Hub::new(settings(&rig.hub)).unwrap();
    pull(
        &hub,
        &rig.store(),
        &ID.parse().unwrap(),
        &PullOptions::default(),
        watch,
    )
    .await
    .unwrap();
    let len = rig.content.len() as u64;
    assert_eq!(*notes.planned.lock().unwrap(), Some((len, 0)));
    assert_eq!(*notes.arrived.lock().unwrap(), len);
}
