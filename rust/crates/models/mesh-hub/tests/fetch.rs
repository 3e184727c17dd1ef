//! Requests and ranges against a hub that misbehaves.

#![allow(
    clippy::single_range_in_vec_init,
    reason = "one range is meant, not its numbers"
)]

mod common;

use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{ID, Memory, Notes, client, client_with_token, noise};
use mesh_hub::{Hub, HubError, Repo, RepoFile};
use mesh_testkit::hub::{Access, Fault, Site, TestHub};

const LEN: usize = 300_000;
const FILE: &str = "tiny-Q8_0.gguf";

/// A hub with one large and one small file.
async fn hub() -> (TestHub, Vec<u8>) {
    let hub = TestHub::start().await.unwrap();
    let content = noise(LEN, 1);
    let readme = b"a model".to_vec();
    hub.publish(ID, &[(FILE, content.clone()), ("README.md", readme)]);
    (hub, content)
}

async fn open(client: &Hub) -> Repo {
    client.open(ID, "main", &()).await.unwrap()
}

/// All of `path`, as it arrives.
async fn fetch(client: &Hub, path: &str, notes: &Arc<Notes>) -> Result<Vec<u8>, HubError> {
    let repo = open(client).await;
    let file = repo.file(path).expect("it is listed");
    let len = file.bytes.unwrap();
    let sink = Memory::of(len as usize);
    let (kept, watch) = (Arc::new(sink.clone()), notes.clone());
    client
        .fetch(&repo, file, [0..len], kept, watch)
        .await
        .map(|()| sink.bytes())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repository_is_pinned_to_the_commit_of_its_revision() {
    let (hub, content) = hub().await;
    let client = client(&hub);
    let first = open(&client).await;
    let file = first.file(FILE).unwrap();
    assert_eq!(file.bytes, Some(LEN as u64));
    assert_eq!(file.sha256, Some(mesh_store::Digest::of(&content)));
    let readme = first.file("README.md").unwrap();
    // git hash-object of "a model"
    assert_eq!(
        readme.blob_id.as_deref(),
        Some("00aa772976d1cf5b5113836858c0bf077a8050d0"),
    );

    // The branch moves on; what was opened does not.
    let second = hub.publish(ID, &[(FILE, noise(LEN, 2))]);
    hub.point(ID, "v1", &first.commit);
    assert_ne!(first.commit, second);
    let sink = Memory::of(LEN);
    let kept = Arc::new(sink.clone());
    client
        .fetch(&first, file, [0..LEN as u64], kept, Arc::new(()))
        .await
        .unwrap();
    assert_eq!(sink.bytes(), content);
    for (revision, commit) in [
        ("main", &second),
        ("v1", &first.commit),
        (&*second, &second),
    ] {
        let repo = client.open(ID, revision, &()).await.unwrap();
        assert_eq!(&repo.commit, commit, "{revision}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_token_goes_to_the_hub_and_not_to_where_it_redirects() {
    let (hub, content) = hub().await;
    hub.restrict(ID, Access::Private);
    hub.admit("hf_right", &[ID]);
    let client = client_with_token(&hub, "hf_right");
    let fetched = fetch(&client, FILE, &Arc::default()).await.unwrap();
    assert_eq!(fetched, content);
    assert_eq!(hub.leaked_tokens(), 0);
    assert_eq!(hub.count(Site::Store, FILE).gets, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn only_the_ranges_that_are_wanted_are_asked_for() {
    let (hub, content) = hub().await;
    let client = client(&hub);
    let repo = open(&client).await;
    let file = repo.file(FILE).unwrap();
    let sink = Memory::of(LEN);
    // The first two nearly touch.
    let ranges = [1000..2000, 2500..3000, 200_000..200_001];
    let kept = Arc::new(sink.clone());
    client
        .fetch(&repo, file, ranges, kept, Arc::new(()))
        .await
        .unwrap();
    let count = hub.count(Site::Store, FILE);
    let mut asked = count.ranges.clone();
    asked.sort_by_key(|range| range.start);
    assert_eq!(asked, [1000..3000, 200_000..200_001]);
    assert_eq!(count.bytes, 2001);
    let bytes = sink.bytes();
    assert_eq!(bytes[1000..3000], content[1000..3000]);
    assert_eq!(bytes[200_000], content[200_000]);
    assert!(bytes[3000..200_000].iter().all(|&byte| byte == 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_manifest_tells_is_enough_to_fetch_from_its_source() {
    let (hub, content) = hub().await;
    let client = client(&hub);
    let repo = open(&client).await;
    let dir = tempfile::tempdir().unwrap();
    for (path, content) in [(FILE, &*content), ("README.md", &b"a model"[..])] {
        std::fs::write(dir.path().join(path), content).unwrap();
    }
    let paths: [std::path::PathBuf; 2] = [FILE.into(), "README.md".into()];
    // No tensors are looked for in what does not begin like a GGUF file.
    let manifest = mesh_store::Manifest::of_files("tiny", dir.path(), &paths, &|_| ()).unwrap();
    let files = manifest.files.iter().map(|file| RepoFile {
        path: file.path.clone(),
        bytes: Some(file.bytes),
        sha256: Some(file.sha256),
        blob_id: None,
    });
    let known = Repo {
        files: files.collect(),
        ..repo
    };
    hub.reset_counts();
    for (path, content) in [(FILE, &*content), ("README.md", &b"a model"[..])] {
        let sink = Memory::of(content.len());
        let kept = Arc::new(sink.clone());
        let all = 0..content.len() as u64;
        client
            .fetch(&known, known.file(path).unwrap(), [all], kept, Arc::new(()))
            .await
            .unwrap();
        assert_eq!(sink.bytes(), content);
    }
    assert_eq!(hub.count(Site::Api, ID).gets, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_cut_off_goes_on_where_it_was() {
    let (hub, content) = hub().await;
    for _ in 0..3 {
        hub.fail(Site::Store, FILE, Fault::CutAfter(70_000));
    }
    let notes = Arc::new(Notes::default());
    let fetched = fetch(&client(&hub), FILE, &notes).await.unwrap();
    assert_eq!(fetched, content);
    let count = hub.count(Site::Store, FILE);
    assert_eq!(count.gets, 4);
    assert_eq!(count.bytes, LEN as u64, "nothing twice: {:?}", count.ranges);
    assert_eq!(notes.pauses.lock().unwrap().len(), 3);
    assert_eq!(*notes.arrived.lock().unwrap(), LEN as u64);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stalled_connection_is_given_up_and_taken_up_again() {
    let (hub, content) = hub().await;
    hub.fail(Site::Store, FILE, Fault::StallAfter(100_000));
    let notes = Arc::new(Notes::default());
    let started = Instant::now();
    let fetched = fetch(&client(&hub), FILE, &notes).await.unwrap();
    assert_eq!(fetched, content);
    assert!(started.elapsed() >= Duration::from_millis(400));
    assert_eq!(hub.count(Site::Store, FILE).bytes, LEN as u64);
    let pauses = notes.pauses.lock().unwrap();
    assert!(pauses[0].0.contains("nothing came"), "{pauses:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pause_that_the_hub_asks_for_is_made() {
    let (hub, content) = hub().await;
    let second = || Some("1".to_owned());
    hub.fail(Site::Api, ID, Fault::Status(429, second()));
    hub.fail(Site::Resolve, FILE, Fault::Status(503, None));
    hub.fail(Site::Store, FILE, Fault::Status(500, None));
    let notes = Arc::new(Notes::default());
    let started = Instant::now();
    let fetched = fetch(&client(&hub), FILE, &notes).await.unwrap();
    assert_eq!(fetched, content);
    assert!(started.elapsed() >= Duration::from_secs(1));
    assert_eq!(hub.count(Site::Api, ID).gets, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_does_not_get_better_ends_with_its_reason() {
    let (hub, _) = hub().await;
    let client = client(&hub);
    let fail = |fault| hub.always_fail(Site::Store, FILE, fault);
    let error = async || {
        fetch(&client, FILE, &Arc::default())
            .await
            .unwrap_err()
            .to_string()
    };

    // A day is longer than anybody waits.
    fail(Some(Fault::Status(429, Some("86400".to_owned()))));
    let message = error().await;
    assert!(
        message.contains("86400 s") && message.contains("HF_TOKEN"),
        "{message}"
    );

    fail(Some(Fault::Status(502, None)));
    let message = error().await;
    assert!(
        message.contains("502") && message.contains("4 times"),
        "{message}"
    );

    // Cut at once each time: no progress, however often.
    fail(Some(Fault::CutAfter(10)));
    let message = error().await;
    assert!(message.contains("4 times in a row"), "{message}");

    fail(Some(Fault::WrongRange));
    let message = error().await;
    assert!(
        message.contains("bytes from 1 where bytes from 0"),
        "{message}"
    );

    fail(None);
    hub.fail(Site::Resolve, FILE, Fault::OtherEtag);
    let message = error().await;
    assert!(message.contains("another file than it was"), "{message}");

    let address = hub.endpoint();
    drop(hub);
    tokio::time::sleep(Duration::from_millis(50)).await;
    let message = error_of_opening(&client, ID, "main").await;
    assert!(
        message.contains(&address) && message.contains("refused"),
        "{message}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_without_ranges_is_borne_where_it_costs_little() {
    let (hub, content) = hub().await;
    hub.always_fail(Site::Store, FILE, Some(Fault::WholeFile));
    hub.fail(Site::Store, FILE, Fault::CutAfter(80_000));
    let fetched = fetch(&client(&hub), FILE, &Arc::default()).await.unwrap();
    assert_eq!(fetched, content);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_renamed_repository_is_found_under_its_new_name() {
    let (hub, content) = hub().await;
    hub.rename(ID, "acme/Tiny-2");
    let client = client(&hub);
    let repo = open(&client).await;
    assert_eq!(repo.id, "acme/Tiny-2");
    assert_eq!(
        fetch(&client, FILE, &Arc::default()).await.unwrap(),
        content
    );
}

async fn error_of_opening(client: &Hub, id: &str, revision: &str) -> String {
    let opened = client.open(id, revision, &()).await;
    opened.unwrap_err().to_string()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_refusal_says_what_to_do() {
    let (hub, _) = hub().await;
    let page = format!("{}/{ID}", hub.endpoint());
    let tokens = format!("{}/settings/tokens", hub.endpoint());
    hub.admit("hf_other", &[]);
    let nobody = client(&hub);
    let other = client_with_token(&hub, "hf_other");
    let holds = |message: &str, parts: &[&str]| {
        for part in parts {
            assert!(message.contains(part), "{part:?} in: {message}");
        }
        assert!(!message.contains("hf_"), "a token: {message}");
    };

    let message = error_of_opening(&nobody, "acme/none", "main").await;
    holds(&message, &["acme/none", "HF_TOKEN", &tokens]);
    let message = error_of_opening(&other, "acme/none", "main").await;
    holds(&message, &["acme/none", "check the name", &tokens]);
    let message = error_of_opening(&nobody, ID, "v9").await;
    holds(&message, &["v9", &page]);
    let message = error_of_opening(&client_with_token(&hub, "hf_wrong"), ID, "main").await;
    holds(&message, &["from HF_TOKEN", "expired or revoked", &tokens]);

    hub.restrict(ID, Access::Private);
    let message = error_of_opening(&nobody, ID, "main").await;
    holds(&message, &["private", "HF_TOKEN", &tokens]);

    // The listing of a gated one is public, its files are not.
    hub.restrict(ID, Access::Gated);
    let error = fetch(&nobody, FILE, &Arc::default()).await.unwrap_err();
    assert!(matches!(error, HubError::GatedWithoutToken { .. }) && error.is_refusal());
    holds(&error.to_string(), &["licence", &page, "HF_TOKEN", &tokens]);
    let error = fetch(&other, FILE, &Arc::default()).await.unwrap_err();
    assert!(matches!(error, HubError::LicenceNotAccepted { .. }));
    holds(&error.to_string(), &["accept the licence", &page]);
    hub.admit("hf_other", &[ID]);
    assert!(fetch(&other, FILE, &Arc::default()).await.is_ok());

    hub.restrict(ID, Access::Public);
    hub.fail(Site::Resolve, FILE, Fault::Status(451, None));
    let message = fetch(&nobody, FILE, &Arc::default()).await.unwrap_err();
    holds(&message.to_string(), &["451", "the test wants it so"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn offline_nothing_is_asked() {
    let (hub, _) = hub().await;
    let mut settings = common::settings(&hub);
    settings.offline = true;
    let client = Hub::new(settings).unwrap();
    let message = error_of_opening(&client, ID, "main").await;
    assert!(message.contains("HF_HUB_OFFLINE"), "{message}");
    assert_eq!(hub.count(Site::Api, ID).gets, 0);
}
