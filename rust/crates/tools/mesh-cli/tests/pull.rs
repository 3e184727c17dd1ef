//! `hydramesh models pull` as a process, against a hub on this machine.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::time::{Duration, Instant};

use mesh_store::{Manifest, Store};
use mesh_testkit::hub::{Access, Fault, Site, TestHub};
use tempfile::TempDir;
use tokio::process::{Child, Command};

const ID: &str = "acme/Tiny";

struct Rig {
    hub: TestHub,
    dir: TempDir,
    environment: BTreeMap<&'static str, String>,
}

impl Rig {
    async fn new() -> Self {
        let hub = TestHub::start().await.unwrap();
        let dir = tempfile::tempdir().unwrap();
        let home = dir.path().display().to_string();
        let environment = BTreeMap::from([
            ("HF_ENDPOINT", hub.endpoint()),
            ("HF_HOME", home.clone()),
            ("HOME", home),
            (
                "HYDRAMESH_STORE",
                dir.path().join("store").display().to_string(),
            ),
        ]);
        Self {
            hub,
            dir,
            environment,
        }
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_hydramesh"));
        command
            .args(["models", "pull"])
            .args(arguments)
            .env_clear()
            .envs(&self.environment)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        command
    }

    async fn pull(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().await.unwrap()
    }

    fn store(&self) -> PathBuf {
        self.dir.path().join("store")
    }
}

fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut bytes = vec![0; len];
    fastrand::Rng::with_seed(seed).fill(&mut bytes);
    bytes
}

/// A safetensors file with one tensor of noise.
fn safetensors(tensor: &str, len: usize) -> Vec<u8> {
    let mut header = format!(
        "{{\"{tensor}\":{{\"dtype\":\"U8\",\"shape\":[{len}],\"data_offsets\":[0,{len}]}}}}"
    );
    header.push_str(&" ".repeat(header.len().next_multiple_of(8) - header.len()));
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.into_bytes());
    bytes.extend(noise(len, len as u64));
    bytes
}

fn files() -> Vec<(&'static str, Vec<u8>)> {
    let index = br#"{"weight_map":{"model.layers.0.w":"a.safetensors","model.layers.1.w":"b.safetensors"}}"#;
    vec![
        ("a.safetensors", safetensors("model.layers.0.w", 3_500_001)),
        ("b.safetensors", safetensors("model.layers.1.w", 2_000_003)),
        ("config.json", b"{}".to_vec()),
        ("model.safetensors.index.json", index.to_vec()),
        ("tokenizer.json", noise(60_000, 9)),
    ]
}

fn text(output: &Output) -> (String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (text(&output.stdout), text(&output.stderr))
}

const KILLS: u32 = 50;
/// Bytes that the hub sends over each of two connections.
const PIECE: usize = 8 << 10;
const PAUSE: Duration = Duration::from_millis(8);
/// Bytes that a kill may cost.
const LOST: u64 = 256 << 10;
/// A process lives at most so long after its first bytes.
const LIFE: Duration = Duration::from_millis(350);

#[tokio::test(flavor = "multi_thread")]
async fn a_pull_killed_fifty_times_ends_byte_identical_and_fetches_little_twice() {
    let rig = Rig::new().await;
    let files = files();
    rig.hub.publish(ID, &files);
    rig.hub.pace(Some((PIECE, PAUSE)));
    let local = rig.dir.path().join("Tiny");
    std::fs::create_dir(&local).unwrap();
    for (path, content) in &files {
        std::fs::write(local.join(path), content).unwrap();
    }
    let expected = Manifest::of_path("Tiny", &local, &|_| ()).unwrap();
    let whole: u64 = files.iter().map(|(_, content)| content.len() as u64).sum();

    let mut random = fastrand::Rng::with_seed(0x5eed);
    let mut completed = 0;
    let mut kills = 0;
    while kills < KILLS {
        let mut child = rig.command(&[ID]).spawn().unwrap();
        // Most when something has arrived, some before.
        if random.u8(..5) > 0 {
            first_bytes(&rig.hub, &mut child).await;
        }
        tokio::time::sleep(LIFE.mul_f64(random.f64())).await;
        match child.try_wait().unwrap() {
            None => {
                child.kill().await.unwrap();
                kills += 1;
            }
            Some(status) => {
                // It was quicker. Kills in its last moments, and then from the beginning.
                assert!(
                    status.success(),
                    "{:?}",
                    text(&child.wait_with_output().await.unwrap())
                );
                check(&rig.store(), &expected, &files);
                std::fs::remove_dir_all(rig.store()).unwrap();
                completed += 1;
            }
        }
    }
    let before = rig.hub.bytes_sent();
    rig.hub.pace(None);
    let last = rig.pull(&[ID]).await;
    assert!(last.status.success(), "{:?}", text(&last));
    check(&rig.store(), &expected, &files);
    assert_eq!(rig.hub.leaked_tokens(), 0);

    // A kill loses the bytes that had not reached the disk. Without resume nothing would be kept.
    let last = rig.hub.bytes_sent() - before;
    let kept = (whole * (completed + 1)).saturating_sub(last);
    let lost = before.saturating_sub(kept) / u64::from(KILLS);
    println!(
        "{completed} ends between {kills} kills: of {before} bytes {kept} stayed, {lost} were lost a kill"
    );
    assert!(kept > before / 10, "of {before} bytes only {kept} stayed");
    assert!(lost < LOST, "{lost} bytes were lost with every kill");
}

/// Waits until the hub sends something to this process, or it ends.
async fn first_bytes(hub: &TestHub, child: &mut Child) {
    let before = hub.bytes_sent();
    tokio::select! {
        () = hub.wait_for_bytes(before + 1) => {}
        _ = child.wait() => {}
        () = tokio::time::sleep(Duration::from_secs(5)) => {}
    }
}

fn check(store: &Path, expected: &Manifest, files: &[(&str, Vec<u8>)]) {
    let store = Store::open(store).unwrap();
    let models = store.models().unwrap();
    let [model] = &models[..] else {
        panic!("{models:?}");
    };
    assert_eq!(model.signed.manifest, *expected);
    let folder = store.folder(&model.fingerprint).unwrap();
    for (path, content) in files {
        assert!(
            std::fs::read(folder.join(path)).unwrap() == *content,
            "{path} differs"
        );
    }
    let partial = std::fs::read_dir(store.root().join("partial")).unwrap();
    assert_eq!(partial.count(), 0, "something is left");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_script_gets_one_line_or_one_object_and_people_the_rest() {
    let rig = Rig::new().await;
    rig.hub.publish(ID, &files());
    let pulled = rig.pull(&[ID]).await;
    let (out, err) = text(&pulled);
    assert!(pulled.status.success(), "{err}");
    let folder = Path::new(out.trim_end());
    assert!(folder.join("config.json").is_file(), "{out}");
    assert!(
        err.contains("fetching acme/Tiny: 5.6 MB") && err.contains("Tiny is here"),
        "{err}"
    );

    let again = rig.pull(&["--json", ID]).await;
    let object: serde_json::Value = serde_json::from_slice(&again.stdout).unwrap();
    assert_eq!(object["fetched_bytes"], 0);
    assert_eq!(object["layers"], 2);
    assert_eq!(object["path"].as_str(), folder.to_str());
    assert_eq!(object["commit"].as_str().map(str::len), Some(40));

    let part = rig.pull(&["--json", ID, "--layers", "1..2"]).await;
    assert!(part.status.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pull_mends_a_manifest_that_was_altered_and_fetches_no_weights() {
    let rig = Rig::new().await;
    let files = files();
    rig.hub.publish(ID, &files);
    assert!(rig.pull(&[ID]).await.status.success());
    let store = Store::open(rig.store()).unwrap();
    let model = store.models().unwrap().remove(0);
    let path = format!("manifests/{}.json", model.fingerprint);
    std::fs::write(rig.store().join(path), "{}").unwrap();
    assert_eq!(store.contents().unwrap().damaged.len(), 1);
    let again = rig.pull(&["--json", ID]).await;
    assert!(again.status.success(), "{:?}", text(&again));
    let object: serde_json::Value = serde_json::from_slice(&again.stdout).unwrap();
    // Of small files the hub says no SHA-256.
    assert!(
        object["fetched_bytes"].as_u64().unwrap() < 100_000,
        "{object}"
    );
    check(&rig.store(), &model.signed.manifest, &files);
}

#[tokio::test(flavor = "multi_thread")]
async fn failures_have_exit_codes_and_say_what_to_do() {
    let mut rig = Rig::new().await;
    rig.hub.publish(ID, &files());
    let fails = async |rig: &Rig, arguments: &[&str], code: i32, parts: &[&str]| {
        let output = rig.pull(arguments).await;
        let (out, err) = text(&output);
        assert_eq!(output.status.code(), Some(code), "{err}");
        assert_eq!(out, "");
        for part in parts {
            assert!(err.contains(part), "{part:?} in: {err}");
        }
        assert!(!err.contains("hf_secret"), "a token: {err}");
    };
    fails(&rig, &["nonsense"], 2, &["ORGANISATION/MODEL"]).await;
    fails(&rig, &[ID, "--revision", "v7"], 2, &["no revision \"v7\""]).await;
    fails(&rig, &["acme/Tiny:Q4_0"], 2, &["no .gguf files"]).await;
    fails(&rig, &["acme/none"], 6, &["HF_TOKEN"]).await;

    rig.hub.restrict(ID, Access::Gated);
    fails(&rig, &[ID], 6, &["licence", "/acme/Tiny", "HF_TOKEN"]).await;
    rig.hub.admit("hf_secret", &[]);
    let token = rig.dir.path().join("my-token");
    std::fs::write(&token, "hf_secret\n").unwrap();
    rig.environment
        .insert("HF_TOKEN_FILE", token.display().to_string());
    fails(&rig, &[ID], 6, &["accept the licence", "my-token"]).await;
    rig.hub.admit("hf_secret", &[ID]);
    rig.hub.fail(
        Site::Resolve,
        "a.safetensors",
        Fault::Status(429, Some("100000".to_owned())),
    );
    fails(&rig, &[ID], 5, &["limits the rate", "100000 s"]).await;
    let pulled = rig.pull(&[ID]).await;
    assert!(pulled.status.success(), "{:?}", text(&pulled));

    rig.environment.insert("HF_HUB_OFFLINE", "1".to_owned());
    fails(&rig, &["acme/other"], 3, &["HF_HUB_OFFLINE"]).await;
    rig.environment.remove("HF_HUB_OFFLINE");
    rig.environment
        .insert("HF_TOKEN_FILE", "/nonexistent".to_owned());
    fails(&rig, &[ID], 1, &["/nonexistent", "HF_TOKEN_FILE"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn ctrl_c_keeps_what_has_arrived() {
    let rig = Rig::new().await;
    rig.hub.publish(ID, &files());
    // Slowly, so that almost all sent bytes have arrived.
    rig.hub.pace(Some((16 << 10, Duration::from_millis(20))));
    let child = rig.command(&[ID]).spawn().unwrap();
    rig.hub.wait_for_bytes(2_000_000).await;
    let pid = nix::unistd::Pid::from_raw(child.id().unwrap() as i32);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT).unwrap();
    let asked = Instant::now();
    let output = child.wait_with_output().await.unwrap();
    assert!(asked.elapsed() < Duration::from_secs(5));
    assert_eq!(output.status.code(), Some(130));
    assert!(text(&output).1.contains("goes on from there"));
    rig.hub.pace(None);
    rig.hub.reset_counts();
    assert!(rig.pull(&[ID]).await.status.success());
    assert!(rig.hub.bytes_sent() < 4_600_000, "{}", rig.hub.bytes_sent());
}
