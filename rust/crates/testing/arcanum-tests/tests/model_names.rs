//! A name on the hub means what the hub says, against claims of mesh members and other sources of the bytes.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use arcanum_tests::alone;
use arcanum_tests::liar::{FalseOffer, Liar};
use arcanum_tests::mesh_state::unready_until;
use mesh_api::{NameConflict, PinDecision, paths};
use mesh_model::synth::{Shape, Tokens, random_model_bytes, write_folder};
use mesh_model::{Architecture, GgmlType, Model};
use mesh_store::{Digest, Manifest};
use mesh_testkit::hub::TestHub;
use mesh_testkit::process::Launcher;
use mesh_testkit::{Mesh, Service};
use tempfile::TempDir;

const HUB: &str = "acme/Tiny-GGUF:Q4_0";
const FILE: &str = "Tiny-Q4_0.gguf";
const LIMIT: Duration = Duration::from_secs(60);

fn model() -> Vec<u8> {
    random_model_bytes(
        &Shape::tiny(Architecture::Llama),
        GgmlType::Q4_0,
        Tokens::Bytes,
    )
}

/// A folder with a model file of which the last bytes are others.
fn altered() -> Result<TempDir> {
    let folder = tempfile::tempdir()?;
    let mut bytes = model();
    let last = bytes.len() - 2;
    bytes[last] ^= 0x55;
    std::fs::write(folder.path().join(FILE), bytes)?;
    Ok(folder)
}

fn manifest(name: &str, folder: &Path, files: &[&str]) -> Result<Manifest> {
    let files: Vec<PathBuf> = files.iter().map(PathBuf::from).collect();
    Ok(Manifest::of_files(name, folder, &files, &|_| ())?)
}

async fn mesh(endpoint: &str) -> Result<Mesh> {
    let launcher = Launcher::of_this_build()?.with_environment("HF_ENDPOINT", endpoint);
    Mesh::builder().launcher(launcher).start().await
}

fn worker(name: &str, hub: bool) -> String {
    format!(
        "models = [{name:?}]\nthreads = 1\n[ring]\nlisten = \"127.0.0.1:0\"\n[store]\npeers = true\nhub = {hub}\n"
    )
}

/// Digests of the blobs that a worker has.
fn blobs(worker: &Service) -> Result<Vec<String>> {
    let listed = std::fs::read_dir(worker.state_dir().join("store/blobs"))?;
    let names = listed.map(|item| Ok(item?.file_name().to_string_lossy().into_owned()));
    names.collect()
}

async fn conflict(mesh: &Mesh, name: &str) -> Result<NameConflict> {
    let begun = Instant::now();
    loop {
        let seen = mesh.registry().await?;
        let wanted = |conflict: &&NameConflict| {
            conflict.name.eq_ignore_ascii_case(name) && conflict.claims.len() == 2
        };
        if let Some(found) = seen.name_conflicts.iter().find(wanted) {
            let mut warnings = seen.warnings.iter();
            let told = warnings.any(|warning| warning.contains("different models"));
            ensure!(told, "{:?}", seen.warnings);
            return Ok(found.clone());
        }
        ensure!(begun.elapsed() < LIMIT, "{seen:#?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_altered_file_that_a_peer_offers_under_a_hub_name_is_refused_and_the_hubs_is_served()
-> Result<()> {
    let _alone = alone();
    let hub = TestHub::start().await?;
    hub.publish("acme/Tiny-GGUF", &[(FILE, model())]);
    let mut mesh = mesh(&hub.endpoint()).await?;
    let folder = altered()?;
    let lie = FalseOffer {
        manifest: manifest("Tiny-Q4_0", folder.path(), &[FILE])?,
        names: vec!["Tiny-Q4_0".into(), HUB.into()],
        files: Some(folder.path().into()),
    };
    let liar = Liar::join_with(&mesh, "liar", lie).await?;
    mesh.start_worker(&worker(HUB, true)).await?;
    mesh.workers[0].wait_for("/ready").await?;
    ensure!(liar.sent() == 0, "pieces were asked for");
    ensure!(blobs(&mesh.workers[0])? == [Digest::of(model()).to_string()]);
    let found = conflict(&mesh, HUB).await?;
    ensure!(!found.decided, "{found:#?}");
    let metrics = mesh.client()?.get_text("/metrics").await?;
    ensure!(
        metrics.contains("\nhydramesh_head_model_name_conflicts "),
        "{metrics}"
    );
    ensure!(
        !metrics.contains("\nhydramesh_head_model_name_conflicts 0"),
        "{metrics}"
    );

    // A worker that cannot ask the hub takes neither, and gives the reason.
    let second = mesh.start_worker(&worker(HUB, false)).await?;
    let text = unready_until(&mesh.workers[second], "nobody vouches").await?;
    for part in [
        "store.hub",
        "not signed",
        "several models",
        "models pins set",
    ] {
        ensure!(text.contains(part), "{part}: {text}");
    }
    // Until an operator says which one it is.
    let good = Digest::of(manifest_of(&mesh.workers[0])?);
    pin(&mesh, HUB, &good.to_string()).await?;
    mesh.workers[second].wait_for("/ready").await?;
    ensure!(blobs(&mesh.workers[second])? == [Digest::of(model()).to_string()]);
    ensure!(liar.sent() == 0, "pieces were asked for");
    mesh.shutdown().await
}

fn manifest_of(worker: &Service) -> Result<Vec<u8>> {
    let mut listed = std::fs::read_dir(worker.state_dir().join("store/manifests"))?;
    Ok(std::fs::read(
        listed.next().context("no manifest")??.path(),
    )?)
}

async fn pin(mesh: &Mesh, name: &str, fingerprint: &str) -> Result<()> {
    let decision = PinDecision {
        name: name.to_owned(),
        fingerprint: Some(fingerprint.to_owned()),
    };
    let pinned: PinDecision = mesh.admin()?.post(paths::PINS, &decision).await?;
    ensure!(pinned == decision, "{pinned:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_manifest_that_tells_the_hubs_digest_and_pieces_of_another_file_is_found_out()
-> Result<()> {
    let _alone = alone();
    let hub = TestHub::start().await?;
    hub.publish("acme/Tiny-GGUF", &[(FILE, model())]);
    let mut mesh = mesh(&hub.endpoint()).await?;
    let folder = altered()?;
    let mut manifest = manifest("Tiny-Q4_0", folder.path(), &[FILE])?;
    manifest.files[0].sha256 = Digest::of(model());
    let lie = FalseOffer {
        manifest,
        names: vec![HUB.into()],
        files: Some(folder.path().into()),
    };
    let liar = Liar::join_with(&mesh, "liar", lie).await?;
    mesh.start_worker(&worker(HUB, true)).await?;
    mesh.workers[0].wait_for("/ready").await?;
    ensure!(liar.sent() > 0, "the lie was not tried");
    ensure!(blobs(&mesh.workers[0])? == [Digest::of(model()).to_string()]);
    // After a restart it uses the files it has, without a download.
    let downloaded = hub.bytes_sent();
    mesh.workers[0].terminate(Duration::from_secs(30)).await?;
    mesh.workers[0].restart(None).await?;
    mesh.workers[0].wait_for("/ready").await?;
    ensure!(hub.bytes_sent() == downloaded, "it went to the hub again");
    mesh.shutdown().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_small_file_of_a_folder_that_a_peer_altered_is_found_out() -> Result<()> {
    let _alone = alone();
    let hub = TestHub::start().await?;
    let dir = tempfile::tempdir()?;
    let gguf = dir.path().join("model.gguf");
    std::fs::write(&gguf, model())?;
    let (good, bad) = (dir.path().join("good"), dir.path().join("bad"));
    for folder in [&good, &bad] {
        write_folder(
            &Model::open(&gguf)?,
            mesh_model::safetensors::Dtype::F32,
            1,
            folder,
        )?;
    }
    let config = std::fs::read_to_string(bad.join("tokenizer_config.json"))?;
    let other = config
        .replacen("false", "true ", 1)
        .replacen("true,", "null,", 1);
    ensure!(other != config && other.len() == config.len(), "{config}");
    std::fs::write(bad.join("tokenizer_config.json"), other)?;
    let mut names: Vec<String> = Vec::new();
    for item in std::fs::read_dir(&good)? {
        names.push(item?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    let paths: Vec<PathBuf> = names.iter().map(|name| good.join(name)).collect();
    let published: Vec<(&str, &Path)> = names
        .iter()
        .map(String::as_str)
        .zip(paths.iter().map(PathBuf::as_path))
        .collect();
    hub.publish_files("acme/tiny", &published)?;
    let mut mesh = mesh(&hub.endpoint()).await?;
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let lie = FalseOffer {
        manifest: manifest("tiny", &bad, &names)?,
        names: vec!["acme/tiny".into()],
        files: Some(bad.clone()),
    };
    let _liar = Liar::join_with(&mesh, "liar", lie).await?;
    mesh.start_worker(&worker("acme/tiny", true)).await?;
    mesh.workers[0].wait_for("/ready").await?;
    let wanted = Digest::of_file(&good.join("tokenizer_config.json"))?.to_string();
    let seen = blobs(&mesh.workers[0])?;
    ensure!(seen.contains(&wanted), "{seen:?}");
    let wrong = Digest::of_file(&bad.join("tokenizer_config.json"))?.to_string();
    ensure!(!seen.contains(&wrong), "{seen:?}");
    ensure!(
        mesh.workers[0].log().contains("is another file"),
        "{}",
        mesh.workers[0].log_end()
    );
    mesh.shutdown().await
}
