//! A model reaches the mesh once, and each worker gets the parts it needs.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use arcanum_tests::liar::Liar;
use arcanum_tests::mesh_state::unready_until;
use arcanum_tests::{RingView, alone};
use mesh_api::{
    ChatCompletionRequest, CreateEmbeddingRequest, CreateEmbeddingResponse, Embedding,
    GenerationOptions, TextInput,
};
use mesh_store::{Digest, Manifest};
use mesh_testkit::hub::TestHub;
use mesh_testkit::process::Launcher;
use mesh_testkit::{Mesh, Service, paths};

const MODEL: &str = "tests/smollm2";
const FILE: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";
const NAME: &str = "SmolLM2-135M-Instruct.Q4_1";
const LIMIT: Duration = Duration::from_secs(90);

/// A hub with the model, and a mesh whose workers know of no other hub.
async fn mesh_with_hub(head: &str) -> Result<(TestHub, Mesh)> {
    let hub = TestHub::start().await?;
    hub.publish_files(MODEL, &[(FILE, &paths::smollm2()?)])?;
    let launcher = Launcher::of_this_build()?.with_environment("HF_ENDPOINT", &hub.endpoint());
    let mesh = Mesh::builder()
        .launcher(launcher)
        .head_config(head)
        .start()
        .await?;
    Ok((hub, mesh))
}

/// A worker's configuration: its models, and how it is found.
fn worker(what: &str) -> String {
    format!(
        "{what}\nthreads = 1\n[ring]\nlisten = \"127.0.0.1:0\"\nformat = \"file\"\n[store]\npeers = true\n"
    )
}

fn in_parts() -> String {
    worker("models = []").replace("[ring]\n", &format!("[ring]\nmodels = [{MODEL:?}]\n"))
}

fn whole() -> String {
    worker(&format!("models = [{MODEL:?}]"))
}

async fn wait_for_ring(mesh: &Mesh, stages: usize) -> Result<RingView> {
    let begun = Instant::now();
    loop {
        let seen = mesh.registry().await?;
        let rings = RingView::all(seen.clone());
        let found = rings
            .into_iter()
            .find(|ring| ring.serves() && ring.stages.len() == stages);
        if let Some(ring) = found {
            return Ok(ring);
        }
        if begun.elapsed() > LIMIT {
            bail!("no ring of {stages} stages: {seen:#?}\n{}", logs(mesh));
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn logs(mesh: &Mesh) -> String {
    let services = std::iter::once(&mesh.head).chain(&mesh.workers);
    services
        .map(|service| format!("--- {} ---\n{}\n", service.name(), service.log_end()))
        .collect()
}

/// The value of a worker's metric; 0 if it is not there.
async fn metric(worker: &Service, name: &str) -> Result<u64> {
    let text = worker.http()?.get_text("/metrics").await?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(&format!("hydramesh_worker_{name} ")));
    Ok(line.map_or(Ok(0.0), str::parse::<f64>)? as u64)
}

async fn sum(mesh: &mut Mesh, name: &str) -> Result<u64> {
    let mut sum = 0;
    for worker in &mut mesh.workers {
        if worker.is_running() {
            sum += metric(worker, name).await?;
        }
    }
    Ok(sum)
}

/// The manifest that a worker keeps.
fn manifest_of(worker: &Service) -> Result<Manifest> {
    let folder = worker.state_dir().join("store/manifests");
    for item in std::fs::read_dir(&folder).with_context(|| folder.display().to_string())? {
        let path = item?.path();
        if path
            .extension()
            .is_some_and(|extension| extension == "json")
        {
            return Ok(Manifest::parse(&std::fs::read(path)?)?);
        }
    }
    bail!("no manifest in {}", folder.display())
}

async fn ask(mesh: &Mesh, model: &str) -> Result<String> {
    let options = GenerationOptions {
        model: Some(model.to_owned()),
        max_tokens: Some(12),
        temperature: Some(0.0),
        ..GenerationOptions::default()
    };
    let request = ChatCompletionRequest::question("Name three rivers.", options);
    let answer = mesh.client()?.complete(&request).await?;
    let choice = answer.choices.into_iter().next().context("no choice")?;
    Ok(choice.message.content.into_owned())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cold_ring_moves_a_model_once_and_a_warm_restart_moves_nothing() -> Result<()> {
    let _alone = alone();
    let head =
        "[ring]\nobjective = \"throughput\"\nstages = 3\nstandbys = false\ngather = \"500ms\"\n";
    let (hub, mut mesh) = mesh_with_hub(head).await?;
    let begun = Instant::now();
    for _ in 0..3 {
        mesh.start_worker(&in_parts()).await?;
    }
    let ring = wait_for_ring(&mesh, 3).await?;
    ensure!(ring.distinct_members() == 3, "{}", ring.layout());
    let cold = begun.elapsed();
    let text = ask(&mesh, &ring.model).await?;

    let bytes = std::fs::metadata(paths::smollm2()?)?.len();
    let manifest = manifest_of(&mesh.workers[0])?;
    let total = manifest.layers();
    let layers: u64 = ring
        .stages
        .iter()
        .map(|stage| {
            let pieces = manifest.pieces_for(stage.layers[0]..stage.layers[1], total);
            manifest.bytes_of(&pieces)
        })
        .sum();
    let downloaded = hub.bytes_sent();
    let origin = sum(&mut mesh, "model_origin_bytes_total").await?;
    let peers = sum(&mut mesh, "model_peer_bytes_total").await?;
    println!(
        "cold: a ring of 3 serves after {cold:?}; the hub sent {downloaded} bytes ({:.4} x the file's {bytes}), workers sent \
         each other {peers} bytes ({:.4} x the {layers} of all layers)",
        downloaded as f64 / bytes as f64,
        peers as f64 / layers as f64,
    );
    ensure!(
        downloaded as f64 <= 1.02 * bytes as f64,
        "more than one download"
    );
    ensure!(origin >= bytes, "the worker that went counted {origin}");
    ensure!(peers as f64 <= 1.02 * layers as f64, "more than the layers");
    ensure!(peers > 0, "nothing came from peers");

    // All stop and start again: the model is here.
    hub.reset_counts();
    let limit = Duration::from_secs(30);
    let ends = mesh
        .workers
        .iter_mut()
        .map(|worker| worker.terminate(limit));
    for ended in futures::future::join_all(ends).await {
        ensure!(ended?.success(), "{}", logs(&mesh));
    }
    let begun = Instant::now();
    let restarts = mesh.workers.iter_mut().map(|worker| worker.restart(None));
    for restarted in futures::future::join_all(restarts).await {
        restarted?;
    }
    let ring = wait_for_ring(&mesh, 3).await?;
    let warm = begun.elapsed();
    let moved = sum(&mut mesh, "model_peer_bytes_total").await? + hub.bytes_sent();
    println!("warm: a ring of 3 serves after {warm:?}, {moved} bytes were moved");
    ensure!(moved == 0, "{moved} bytes were moved, {}", ring.layout());
    ensure!(ask(&mesh, &ring.model).await? == text, "another answer");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_sends_bad_pieces_is_dropped_and_reported_and_the_load_ends_well()
-> Result<()> {
    let _alone = alone();
    let (hub, mut mesh) = mesh_with_hub("").await?;
    mesh.start_worker(&whole()).await?;
    mesh.wait_for_workers(1).await?;
    let text = ask(&mesh, NAME).await?;
    let downloaded = hub.bytes_sent();
    let liar = Liar::join(&mesh, "liar", manifest_of(&mesh.workers[0])?).await?;
    mesh.start_worker(&whole()).await?;
    mesh.workers[1].wait_for("/ready").await?;
    ensure!(liar.sent() > 0, "nobody asked the liar");
    ensure!(metric(&mesh.workers[1], "model_bad_pieces_total").await? == 1);
    ensure!(
        hub.bytes_sent() == downloaded,
        "somebody went to the hub again"
    );
    let blob = Digest::of_file(&paths::smollm2()?)?;
    let path = mesh.workers[1]
        .state_dir()
        .join(format!("store/blobs/{blob}"));
    ensure!(Digest::of_file(&path)? == blob, "the file is another one");
    let seen = mesh.registry().await?;
    let mut holders = seen.models.iter().flat_map(|model| &model.holders);
    let accused = holders.find(|holder| holder.worker == "liar");
    ensure!(
        accused.is_some_and(|liar| liar.accused_by == ["worker-2"]),
        "not reported: {:?}",
        seen.models
    );
    let metrics = mesh.client()?.get_text("/metrics").await?;
    let reported = "hydramesh_head_model_sources_reported_total{worker=\"liar\"} 1";
    ensure!(metrics.contains(reported), "{metrics}");
    ensure!(ask(&mesh, NAME).await? == text);

    // After a restart it has all the files it needs.
    mesh.workers[1].terminate(Duration::from_secs(30)).await?;
    let begun = Instant::now();
    mesh.workers[1].restart(None).await?;
    mesh.workers[1].wait_for("/ready").await?;
    let warm = begun.elapsed();
    let moved = metric(&mesh.workers[1], "model_peer_bytes_total").await?;
    println!(
        "warm: a worker with the whole model is ready after {warm:?}, {moved} bytes were moved"
    );
    ensure!(
        moved == 0 && hub.bytes_sent() == downloaded,
        "bytes were moved"
    );
    mesh.shutdown().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_serves_what_a_short_name_stands_for_and_says_which_one_was_meant() -> Result<()> {
    let _alone = alone();
    let (hub, mut mesh) = mesh_with_hub("").await?;
    hub.publish_files(
        "bartowski/SmolLM2-135M-Instruct-GGUF",
        &[("SmolLM2-135M-Instruct-Q4_K_M.gguf", &paths::smollm2()?)],
    )?;
    mesh.start_worker(&worker("models = [\"smollm2:135m\"]"))
        .await?;
    mesh.wait_for_workers(1).await?;
    ask(&mesh, "SmolLM2-135M-Instruct-Q4_K_M").await?;

    // Another worker might have a model called so.
    let mistyped = worker("models = [\"smolm2-135m\"]");
    let second = mesh.start_worker(&mistyped).await?;
    let reason = unready_until(&mesh.workers[second], "no worker has it yet").await?;
    ensure!(reason.contains("smolm2-135m"), "{reason}");
    ensure!(
        reason.contains("names like it are smollm2:135m"),
        "{reason}"
    );

    // No model has this name.
    let refused = worker("models = [\"smollm2:136m\"]");
    let error = match mesh.start_worker(&refused).await {
        Err(error) => format!("{error:#}"),
        // It ends when its addresses are known already.
        Ok(third) => {
            let third = &mut mesh.workers[third];
            let ended = third.wait_for_end(Duration::from_secs(30)).await?;
            ensure!(!ended.success(), "it ended well");
            third.log()
        }
    };
    ensure!(error.contains("no model \"smollm2:136m\""), "{error}");
    ensure!(error.contains("smollm2:135m"), "{error}");
    mesh.shutdown().await
}

/// Name of the worker that downloads the model from outside the mesh.
async fn who_downloads(mesh: &Mesh) -> Result<String> {
    let begun = Instant::now();
    loop {
        let seen = mesh.registry().await?;
        if let Some(worker) = seen.models.iter().find_map(|model| model.origin.clone()) {
            return Ok(worker);
        }
        ensure!(
            begun.elapsed() < LIMIT,
            "nobody downloads: {:?}\n{}",
            seen.models,
            logs(mesh)
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn when_the_worker_that_downloads_is_killed_another_one_takes_over() -> Result<()> {
    let _alone = alone();
    let (hub, mut mesh) = mesh_with_hub("").await?;
    let bytes = std::fs::metadata(paths::smollm2()?)?.len();
    hub.pace(Some((1 << 20, Duration::from_millis(20))));
    for _ in 0..3 {
        mesh.start_worker(&whole()).await?;
    }
    hub.wait_for_bytes(bytes / 3).await;
    let first = who_downloads(&mesh).await?;
    let others = sum(&mut mesh, "model_peer_bytes_total").await?;
    ensure!(others == 0, "there is nothing to send yet");
    let victim = mesh
        .workers
        .iter_mut()
        .find(|worker| worker.name() == first);
    victim.context("no such worker")?.crash()?;
    let before = hub.bytes_sent();
    hub.pace(None);
    mesh.wait_for_workers(2).await?;
    let again = hub.bytes_sent() - before;
    println!(
        "{first} was killed after {before} bytes; {again} more were sent to the one that took over"
    );
    ensure!(
        again as f64 <= 1.02 * bytes as f64 + (8 << 20) as f64,
        "both others went"
    );
    let seen = mesh.registry().await?;
    let model = seen.models.first().context("no model")?;
    ensure!(model.holders.len() >= 2, "{seen:#?}");
    ask(&mesh, NAME).await?;
    mesh.shutdown().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_requires_signatures_takes_a_model_when_the_operator_has_signed_it() -> Result<()> {
    let _alone = alone();
    let (hub, mut mesh) = mesh_with_hub("").await?;
    mesh.start_worker(&whole()).await?;
    mesh.wait_for_workers(1).await?;
    let downloaded = hub.bytes_sent();
    let keys = tempfile::tempdir()?;
    let (operator, stranger) = (
        mesh_store::SigningKey::generate(),
        mesh_store::SigningKey::generate(),
    );
    let trusted = keys.path().join("operator.pub");
    operator.public().write_new(&trusted)?;
    let strict = format!(
        "{}require_signature = true\ntrusted_keys = [{:?}]\n",
        whole(),
        trusted.display().to_string()
    );
    mesh.start_worker(&strict).await?;
    let refusal = unready_until(&mesh.workers[1], "store.require_signature").await?;
    println!("without a signature: {refusal}");

    // Signed by a stranger, then by the operator.
    sign(&mut mesh.workers[0], &stranger).await?;
    let refusal = unready_until(&mesh.workers[1], "no signature of a trusted key").await?;
    println!("with a stranger's: {refusal}");
    ensure!(refusal.contains(NAME), "{refusal}");
    sign(&mut mesh.workers[0], &operator).await?;
    mesh.wait_for_workers(2).await?;
    ensure!(
        hub.bytes_sent() == downloaded,
        "somebody went to the hub again"
    );
    mesh.shutdown().await
}

/// Signs the model that a worker has, and starts it again.
async fn sign(worker: &mut Service, key: &mesh_store::SigningKey) -> Result<()> {
    worker.terminate(Duration::from_secs(30)).await?;
    let store = mesh_store::Store::open(worker.state_dir().join("store"))?;
    let fingerprint = manifest_of(worker)?.fingerprint();
    let mut signed = store.manifest(&fingerprint)?.context("no manifest")?;
    let signature = key.sign(&signed.manifest);
    signed.add(signature);
    store.put_manifest(&signed)?;
    worker.restart(None).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_model_that_appears_in_the_folder_is_served_and_one_that_vanishes_is_not() -> Result<()> {
    let _alone = alone();
    let folder = tempfile::tempdir()?;
    let mut mesh = Mesh::builder().start().await?;
    let local = format!(
        "models = []\nlocal_models = {:?}\nthreads = 1\n",
        folder.path().display().to_string()
    );
    mesh.start_worker(&local).await?;
    mesh.workers[0].wait_for("/ready").await?;
    let path = folder.path().join("appears.gguf");
    link(&paths::smollm2()?, &path)?;
    served(&mesh, "appears", true).await?;
    ask(&mesh, "appears").await?;
    std::fs::remove_file(&path)?;
    served(&mesh, "appears", false).await?;
    mesh.shutdown().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_without_an_address_finds_its_head_on_the_lan() -> Result<()> {
    let _alone = alone();
    let folder = tempfile::tempdir()?;
    let head = "mdns = true\n[quic]\nlisten = \"0.0.0.0:0\"\n[dcf]\nworkers = \"0.0.0.0:0\"\n";
    let mesh = Mesh::builder().head_config(head).start().await?;
    let toml = format!(
        "mdns = true\nmodels = []\nlocal_models = {:?}\n",
        folder.path().display().to_string()
    );
    let token = mesh.join_token().await?;
    let mut config = mesh.worker_configuration("lost", &toml, &token)?;
    config.remove("head");
    let worker = mesh
        .launcher()
        .start("mesh-worker", "lost", &config)
        .await?;
    let begun = Instant::now();
    loop {
        let seen = mesh.registry().await?;
        if seen.workers.iter().any(|worker| worker.name == "lost") {
            println!("found after {:?}", begun.elapsed());
            return Ok(());
        }
        if begun.elapsed() > Duration::from_secs(20) {
            let log = worker.log_end();
            // A machine without multicast; other errors would have other messages.
            ensure!(log.contains("no address yet"), "{log}");
            println!("no multicast here, nothing was tested");
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn embedding_models_come_from_the_hub_from_other_workers_and_from_the_watched_folder()
-> Result<()> {
    let _alone = alone();
    let (hub, mut mesh) = mesh_with_hub("").await?;
    let here = paths::minilm()?;
    let files = files_of(&here)?;
    let published: Vec<(&str, &Path)> = files
        .iter()
        .map(|(name, path)| (name.as_str(), path.as_path()))
        .collect();
    hub.publish_files("tests/minilm", &published)?;
    for _ in 0..2 {
        mesh.start_worker(&worker("models = [\"tests/minilm\"]"))
            .await?;
    }
    mesh.wait_for_workers(2).await?;
    served(&mesh, "minilm", true).await?;
    let from_hub = embed(&mesh, "minilm").await?;
    let bytes = files.iter().try_fold(0, |sum, (_, path)| {
        anyhow::Ok(sum + std::fs::metadata(path)?.len())
    })?;
    // Listings and small files may be asked for by both.
    let (sent, most) = (hub.bytes_sent(), bytes + bytes / 50);
    ensure!(sent <= most, "{sent} bytes sent for {bytes}");

    let folder = tempfile::tempdir()?;
    let local = format!(
        "models = []\nlocal_models = {:?}\nthreads = 1\n",
        folder.path().display().to_string()
    );
    mesh.start_worker(&local).await?;
    let appears = folder.path().join("appears");
    for (name, path) in &files {
        let to = appears.join(name);
        std::fs::create_dir_all(to.parent().context("a folder")?)?;
        link(path, &to)?;
    }
    served(&mesh, "appears", true).await?;
    ensure!(embed(&mesh, "appears").await? == from_hub);
    std::fs::remove_dir_all(&appears)?;
    served(&mesh, "appears", false).await?;
    mesh.shutdown().await
}

/// All files below a folder, each with its path from there.
fn files_of(folder: &Path) -> Result<Vec<(String, PathBuf)>> {
    let mut files = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(next) = folders.pop() {
        for item in std::fs::read_dir(next)? {
            let path = item?.path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let name = path.strip_prefix(folder)?.to_str().context("a name")?;
            files.push((name.to_owned(), path));
        }
    }
    Ok(files)
}

async fn embed(mesh: &Mesh, model: &str) -> Result<Vec<Embedding<'static>>> {
    let texts = ["Die Ente schwimmt.", "The duck swims."].map(str::to_owned);
    let request = CreateEmbeddingRequest {
        input: TextInput::Texts(texts.to_vec()),
        model: Some(model.to_owned()),
        ..CreateEmbeddingRequest::default()
    };
    let answer = mesh
        .client()?
        .post(mesh_api::paths::EMBEDDINGS, &request)
        .await?;
    let answer: CreateEmbeddingResponse<'static> = answer;
    ensure!(answer.data.len() == 2, "{answer:?}");
    Ok(answer.data)
}

/// Waits until the head lists a model, or no longer does.
async fn served(mesh: &Mesh, name: &str, wanted: bool) -> Result<()> {
    let begun = Instant::now();
    loop {
        let models = mesh.client()?.models().await?;
        if models.iter().any(|model| model == name) == wanted {
            return Ok(());
        }
        ensure!(begun.elapsed() < LIMIT, "{models:?}\n{}", logs(mesh));
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// The same bytes under another name.
fn link(from: &Path, to: &Path) -> Result<()> {
    std::fs::hard_link(from, to).or_else(|_| std::fs::copy(from, to).map(|_| ()))?;
    Ok(())
}
