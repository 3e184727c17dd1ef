//! A split GGUF file is served like the file that was cut: from a folder, from the hub, from other workers,
//! and in a ring whose members fetch the layers that they hold.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use arcanum_tests::clients::assert_same_tokens;
use arcanum_tests::mesh_state::unready_until;
use arcanum_tests::{ChatQuestion, Cluster, RingView, StreamedAnswer, alone};
use mesh_model::synth::{Shape, Split, Tokens, random_model, write_split};
use mesh_model::{Architecture, GgmlType, Gguf};
use mesh_store::Store;
use mesh_testkit::hub::TestHub;
use mesh_testkit::process::Launcher;
use mesh_testkit::{Mesh, Service};
use tempfile::TempDir;

const STEM: &str = "Tiny-Q8_0";
const HUB: &str = "acme/Tiny-GGUF:Q8_0";
const LIMIT: Duration = Duration::from_secs(60);

/// A model, whole and in parts of which the first holds no tensors.
struct Models {
    dir: TempDir,
    whole: PathBuf,
    parts: Vec<PathBuf>,
}

impl Models {
    fn new() -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let whole = dir.path().join("whole.gguf");
        let shape = Shape {
            layers: 6,
            ..Shape::tiny(Architecture::Llama)
        };
        random_model(&shape, GgmlType::Q8_0, Tokens::Bytes, &whole)?;
        let folder = dir.path().join("parts");
        std::fs::create_dir(&folder)?;
        let split = Split {
            tensors: 15,
            keys_first: true,
        };
        let parts = write_split(&Gguf::open(&whole)?, split, &folder, STEM)?;
        ensure!(parts.len() > 4, "{parts:?}");
        Ok(Models { dir, whole, parts })
    }

    /// The whole file's answer.
    async fn expected(&self) -> Result<StreamedAnswer> {
        let mut cluster = Cluster::builder()
            .model(&self.whole)
            .whole(1)
            .start()
            .await?;
        cluster.mesh.wait_for_workers(1).await?;
        let answer = ask().ask(&cluster.client()?).await?;
        ensure!(!answer.transcript.tokens.is_empty());
        cluster.shutdown().await?;
        Ok(answer)
    }

    fn bytes(&self) -> Result<u64> {
        let lengths = self.parts.iter().map(|part| Ok(part.metadata()?.len()));
        lengths.sum()
    }

    /// A hub that has the parts in a folder of their own.
    async fn hub(&self) -> Result<TestHub> {
        let hub = TestHub::start().await?;
        let names: Vec<String> = self
            .parts
            .iter()
            .map(|part| format!("Q8_0/{}", part.file_name().unwrap_or_default().display()))
            .collect();
        let files: Vec<(&str, &Path)> = names
            .iter()
            .map(String::as_str)
            .zip(self.parts.iter().map(PathBuf::as_path))
            .collect();
        hub.publish_files("acme/Tiny-GGUF", &files)?;
        Ok(hub)
    }
}

fn ask() -> ChatQuestion {
    ChatQuestion::greedy("Name three rivers.", 40)
}

async fn check(mesh: &Mesh, expected: &StreamedAnswer) -> Result<()> {
    let answer = ask().ask(&mesh.client()?).await?;
    assert_same_tokens(&expected.transcript, &answer.transcript)
}

async fn mesh(hub: &TestHub, head: &str) -> Result<Mesh> {
    let launcher = Launcher::of_this_build()?.with_environment("HF_ENDPOINT", &hub.endpoint());
    Mesh::builder()
        .launcher(launcher)
        .head_config(head)
        .start()
        .await
}

fn worker(models: &str, in_ring: &str) -> String {
    format!(
        "models = [{models}]\nthreads = 1\n[ring]\nlisten = \"127.0.0.1:0\"\nformat = \"file\"\nmodels = [{in_ring}]\n\
         [store]\npeers = true\n"
    )
}

fn logs(mesh: &Mesh) -> String {
    let services = std::iter::once(&mesh.head).chain(&mesh.workers);
    services
        .map(|service| format!("--- {} ---\n{}\n", service.name(), service.log_end()))
        .collect()
}

/// Waits until the head serves these models and no others.
async fn served(mesh: &Mesh, wanted: &[&str]) -> Result<()> {
    let begun = Instant::now();
    loop {
        let models = mesh.client()?.models().await?;
        if models == wanted {
            return Ok(());
        }
        ensure!(begun.elapsed() < LIMIT, "{models:?}\n{}", logs(mesh));
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Bytes of the model that are in a worker's store.
fn present(worker: &Service) -> Result<u64> {
    let store = Store::open(worker.state_dir().join("store"))?;
    let models = store.models()?;
    let [model] = &models[..] else {
        anyhow::bail!("{models:?}");
    };
    Ok(model.present)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn parts_in_a_folder_are_one_model_that_is_served_when_the_last_has_come() -> Result<()> {
    let _alone = alone();
    let models = Models::new()?;
    let expected = models.expected().await?;

    // Named by a part, whole and in a ring.
    let some = models.parts.last().context("parts")?;
    let mut cluster = Cluster::builder().model(some).whole(1).start().await?;
    cluster.mesh.wait_for_workers(1).await?;
    check(&cluster.mesh, &expected).await?;
    cluster.shutdown().await?;
    let mut cluster = Cluster::builder()
        .model(some)
        .ring_workers(3)
        .stages(3)
        .standbys(false)
        .start()
        .await?;
    let ring = cluster.wait_for_whole_ring().await?;
    ensure!(ring.stages.len() == 3, "{ring:?}");
    check(&cluster.mesh, &expected).await?;
    cluster.shutdown().await?;

    // In the watched folder.
    let folder = models.dir.path().join("watched");
    std::fs::create_dir(&folder)?;
    let mut mesh = Mesh::builder().start().await?;
    let local = format!(
        "models = []\nlocal_models = {:?}\nthreads = 1\n",
        folder.display().to_string()
    );
    mesh.start_worker(&local).await?;
    mesh.workers[0].wait_for("/ready").await?;
    let (last, others) = models.parts.split_last().context("parts")?;
    let put = |part: &PathBuf| {
        let name = part.file_name().unwrap_or_default();
        std::fs::copy(part, folder.join(name)).map(|_| folder.join(name))
    };
    for part in others {
        put(part)?;
    }
    let begun = Instant::now();
    while !mesh.workers[0].log().contains("parts is missing") {
        ensure!(begun.elapsed() < LIMIT, "{}", mesh.workers[0].log_end());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let put = put(last)?;
    served(&mesh, &[STEM]).await?;
    check(&mesh, &expected).await?;
    std::fs::remove_file(put)?;
    served(&mesh, &[]).await?;
    mesh.shutdown().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn parts_come_from_the_hub_once_and_then_from_other_workers() -> Result<()> {
    let _alone = alone();
    let models = Models::new()?;
    let expected = models.expected().await?;
    let hub = models.hub().await?;
    let mut mesh = mesh(&hub, "").await?;
    for _ in 0..2 {
        mesh.start_worker(&worker(&format!("{HUB:?}"), "")).await?;
        let newest = mesh.workers.last_mut().context("a worker")?;
        newest.wait_for("/ready").await?;
        ensure!(present(newest)? == models.bytes()?, "not all of it is here");
        ensure!(hub.bytes_sent() == models.bytes()?, "it was fetched again");
    }
    served(&mesh, &[STEM]).await?;
    check(&mesh, &expected).await?;
    // The answer of the worker that has it from the other one.
    mesh.workers[0].terminate(LIMIT).await?;
    check(&mesh, &expected).await?;

    // A hub that lacks a part says which one.
    let names = ["x-00001-of-00002.gguf", "x-00002-of-00002.gguf"];
    hub.publish_files("acme/half", &[(names[1], &models.parts[1])])?;
    let half = mesh.start_worker(&worker("\"acme/half\"", "")).await?;
    let text = unready_until(&mesh.workers[half], names[0]).await?;
    ensure!(text.contains("one of 2 parts"), "{text}");
    mesh.shutdown().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn members_of_a_ring_fetch_only_their_layers_of_the_parts() -> Result<()> {
    let _alone = alone();
    let models = Models::new()?;
    let expected = models.expected().await?;
    let hub = models.hub().await?;
    let head =
        "[ring]\nobjective = \"throughput\"\nstages = 3\nstandbys = false\ngather = \"500ms\"\n";
    let mut mesh = mesh(&hub, head).await?;
    for _ in 0..3 {
        mesh.start_worker(&worker("", &format!("{HUB:?}"))).await?;
    }
    let begun = Instant::now();
    let ring = loop {
        let rings = RingView::all(mesh.registry().await?);
        let whole = |ring: &RingView| ring.serves() && ring.stages.len() == 3;
        if let Some(ring) = rings.into_iter().find(whole) {
            break ring;
        }
        ensure!(begun.elapsed() < LIMIT, "{}", logs(&mesh));
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    check(&mesh, &expected).await?;
    let bytes = models.bytes()?;
    let sent = hub.bytes_sent();
    ensure!(sent == bytes, "the hub sent {sent} of {bytes}");
    let mut present: Vec<u64> = mesh.workers.iter().map(present).collect::<Result<_>>()?;
    println!(
        "of {bytes} bytes the members have {present:?}, {}",
        ring.layout()
    );
    present.sort_unstable();
    // One member brought the whole model.
    ensure!(present[2] == bytes && present[1] < bytes, "{present:?}");
    ensure!(present[0] + present[1] < bytes, "{present:?}");
    mesh.shutdown().await
}
