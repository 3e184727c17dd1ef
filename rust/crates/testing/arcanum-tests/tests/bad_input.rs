//! Every kind of bad input, and the error that a user sees.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use arcanum_tests::clients::greedy;
use arcanum_tests::{alone, first_model};
use mesh_api::{CompletionRequest, CreateTokenRequest, Readiness, TokenCreated};
use mesh_testkit::client::http::HttpError;
use mesh_testkit::v5::{Datagram, RESULT, TASK, V5Client};
use mesh_testkit::{Launcher, Mesh, paths};
use serde_json::{Value, json};

const LIMIT: Duration = Duration::from_secs(60);
const SILENCE: Duration = Duration::from_millis(500);
const SMALL: &str = "threads = 1\nslots = 1\ncontext = 256\n[sampling]\nmax_tokens = 8\n";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn datagrams_that_cannot_be_answered_get_an_error_that_says_why() -> Result<()> {
    let _alone = alone();
    let mesh = Mesh::builder()
        .workers(1)
        .worker_config(SMALL)
        .shim()
        .start()
        .await?;
    let head = mesh.head.address("dcf.clients")?;
    let shim = mesh.shim.as_ref().context("a shim")?.address("ingress")?;
    let task = |payload: &[u8]| Datagram::new(TASK, 1, payload).encode();
    let long = "word ".repeat(13_000);
    // The datagrams sent, with code and text of the expected Error.
    let table: Vec<(&str, Vec<u8>, u8, &str)> = vec![
        ("an empty task", task(b""), 1, "empty"),
        ("bad UTF-8", task(b"abc\xff\xfe"), 1, "not UTF-8"),
        ("bad JSON", task(br#"{"prompt": "#), 1, "JSON"),
        (
            "JSON without a prompt",
            task(br#"{"max_tokens": 3}"#),
            1,
            "neither 'prompt' nor 'messages'",
        ),
        (
            "a parameter of the wrong type",
            task(br#"{"prompt": "x", "max_tokens": "many"}"#),
            1,
            "max_tokens",
        ),
        (
            "an unknown model",
            task(br#"{"prompt": "x", "model": "gpt-9"}"#),
            0x41,
            "\"gpt-9\" does not exist",
        ),
        ("a context too long", task(long.as_bytes()), 0x42, "256"),
    ];
    for target in [head, shim] {
        for (index, (name, datagram, code, words)) in table.iter().enumerate() {
            let client = V5Client::new(target)?;
            let mut datagram = datagram.clone();
            datagram[1..5].copy_from_slice(&(index as u32 + 10).to_be_bytes());
            client.send_raw(&datagram)?;
            let answer = client
                .receive(LIMIT)?
                .with_context(|| format!("{name}: no answer"))?;
            let (got, text) = answer
                .error()
                .with_context(|| format!("{name}: no error but {answer:?}"))?;
            ensure!(
                got == *code && text.contains(words),
                "{name} at {target}: error {got:#04x} {text:?}"
            );
            ensure!(
                answer.sequence == index as u32 + 10,
                "{name}: sequence {}",
                answer.sequence
            );
        }
    }
    let client = V5Client::new(head)?;
    client.send_raw(&Datagram::new(0x7E, 3, "?").encode())?;
    let (code, text) = client
        .receive(LIMIT)?
        .context("an answer")?
        .error()
        .context("an error")?;
    ensure!(
        code == 1 && text.contains("0x7e is not known"),
        "unknown type: {code} {text:?}"
    );
    mesh.shutdown().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn datagrams_that_are_not_whole_are_dropped_and_counted_and_extra_bytes_ignored() -> Result<()>
{
    let _alone = alone();
    let mesh = Mesh::builder()
        .workers(1)
        .worker_config(SMALL)
        .shim()
        .start()
        .await?;
    let head = mesh.head.address("dcf.clients")?;
    let shim = mesh.shim.as_ref().context("a shim")?.address("ingress")?;
    let whole = Datagram::new(TASK, 2, "hello").encode();
    for target in [head, shim] {
        let client = V5Client::new(target)?;
        for cut in [0, 1, 16, 17, whole.len() - 1] {
            client.send_raw(&whole[..cut])?;
        }
        let mut lying = whole.clone();
        lying[13..17].copy_from_slice(&u32::MAX.to_be_bytes());
        client.send_raw(&lying)?;
        let answer = client.receive(SILENCE)?;
        ensure!(
            answer.is_none(),
            "{target} answered a truncated datagram with {answer:?}"
        );
    }
    let metrics = mesh.client()?.get_text("/metrics").await?;
    let counted = metrics
        .lines()
        .find(|line| {
            line.starts_with("hydramesh_head_datagrams_total")
                && line.contains("\"clients\"")
                && line.contains("malformed")
        })
        .and_then(|line| line.rsplit(' ').next()?.parse::<u64>().ok());
    ensure!(
        counted == Some(6),
        "malformed datagrams counted: {counted:?}"
    );

    // Bytes after the payload are not part of it.
    let mut trailing = whole;
    trailing[1..5].copy_from_slice(&8_u32.to_be_bytes());
    trailing.extend_from_slice(&[0xEE; 1_000]);
    let client = V5Client::new(head)?;
    client.send_raw(&trailing)?;
    let answer = client.receive(LIMIT)?.context("an answer")?;
    ensure!((answer.kind, answer.sequence) == (RESULT, 8), "{answer:?}");
    mesh.shutdown().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bad_requests_over_http_get_openai_errors() -> Result<()> {
    let _alone = alone();
    let mesh = Mesh::builder()
        .workers(1)
        .worker_config(SMALL)
        .start()
        .await?;
    let client = mesh.client()?;
    let model = first_model(&client).await?;
    let user = |text: &str| json!([{"role": "user", "content": text}]);
    let table: Vec<(&str, Value, u16, &str, &str)> = vec![
        (
            "an unknown model",
            json!({"model": "gpt-9", "messages": user("x")}),
            404,
            "model_not_found",
            "gpt-9",
        ),
        (
            "no messages",
            json!({"model": model, "messages": null, "prompt": null}),
            400,
            "invalid_value",
            "messages",
        ),
        (
            "an unknown role",
            json!({"model": model, "messages": [{"role": "king", "content": "x"}]}),
            400,
            "invalid_value",
            "role",
        ),
        (
            "a temperature of 9",
            json!({"model": model, "messages": user("x"), "temperature": 9}),
            400,
            "invalid_value",
            "temperature",
        ),
        (
            "tools",
            json!({"model": model, "messages": user("x"), "tools": [{}]}),
            400,
            "unsupported_parameter",
            "tools",
        ),
        (
            "a context too long",
            json!({"model": model, "messages": user(&"word ".repeat(400))}),
            400,
            "context_length_exceeded",
            "256",
        ),
    ];
    for (name, body, status, code, words) in table {
        match client
            .post::<Value>(mesh_api::paths::CHAT_COMPLETIONS, &body)
            .await
        {
            Err(HttpError::Api {
                status: got,
                code: Some(got_code),
                message,
                ..
            }) => ensure!(
                got == status && got_code == code && message.contains(words),
                "{name}: HTTP {got} {got_code} {message:?}"
            ),
            other => anyhow::bail!("{name}: {other:?}"),
        }
    }
    mesh.shutdown().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mesh_without_a_worker_and_one_whose_workers_are_all_busy_say_so() -> Result<()> {
    let _alone = alone();
    let mut mesh = Mesh::builder()
        .head_config("queue_limit = 1\nworker_ahead = 0\n")
        .start()
        .await?;
    let dcf = V5Client::new(mesh.head.address("dcf.clients")?)?;
    let (code, text) = dcf.ask(1, "hello?", LIMIT)?.error().context("an error")?;
    ensure!(
        code == 5 && text.contains("no worker"),
        "no worker: {code} {text:?}"
    );
    let client = mesh.client()?;
    let ready = client.get::<Readiness>(mesh_api::paths::READY).await;
    ensure!(
        matches!(&ready, Err(HttpError::Api { status: 503, message, .. }) if message.contains("no worker")),
        "/ready without a worker: {ready:?}"
    );

    mesh.start_worker(SMALL).await?;
    mesh.wait_for_workers(1).await?;
    let model = first_model(&client).await?;
    let long = CompletionRequest::new("Once", greedy(&model, 200));
    // One runs, one waits: the third is one too many.
    let mut streams = Vec::new();
    let mut refused = None;
    for _ in 0..4 {
        let client = client.clone();
        let long = long.clone();
        streams.push(tokio::spawn(async move { client.complete(&long).await }));
        tokio::time::sleep(Duration::from_millis(150)).await;
    }
    for stream in streams {
        if let Err(HttpError::Api {
            status,
            code,
            message,
            ..
        }) = stream.await?
        {
            refused = Some((status, code, message));
        }
    }
    let (status, code, message) = refused.context("nobody was refused")?;
    ensure!(
        status == 503
            && code.as_deref() == Some("overloaded")
            && message.contains("all workers are busy"),
        "busy: HTTP {status} {code:?} {message:?}"
    );
    mesh.shutdown().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn workers_rejoin_a_head_that_restarts() -> Result<()> {
    let _alone = alone();
    let mut mesh = Mesh::builder()
        .workers(2)
        .worker_config(SMALL)
        .start()
        .await?;
    mesh.restart_head(Duration::from_secs(1)).await?;
    mesh.wait_for_workers(2).await?;
    let client = V5Client::new(mesh.head.address("dcf.clients")?)?;
    let answer = client.ask(3, "hello", LIMIT)?;
    ensure!(answer.kind == RESULT, "{answer:?}");
    mesh.shutdown().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_join_token_is_good_once_and_for_its_own_mesh() -> Result<()> {
    let _alone = alone();
    let mut mesh = Mesh::builder().start().await?;
    let other = Mesh::builder().start().await?;

    let token = mesh.join_token().await?;
    mesh.start_worker_with_token(SMALL, &token).await?;
    mesh.wait_for_workers(1).await?;

    let used = refused_worker(&mesh, &token).await?;
    ensure!(
        used.contains("this token was used by") && used.contains("hydramesh token create"),
        "used token:\n{used}"
    );
    let foreign = refused_worker(&mesh, &other.join_token().await?).await?;
    ensure!(
        foreign.contains("this token is for another mesh"),
        "foreign token:\n{foreign}"
    );
    let made_up = refused_worker(&mesh, "hydra1.nonsense").await?;
    ensure!(made_up.contains("join token"), "made-up token:\n{made_up}");
    ensure!(
        mesh.usable_workers().await?.len() == 1,
        "a worker without a good token is in the mesh"
    );

    let request = CreateTokenRequest::default();
    let admin = mesh
        .client()?
        .post::<TokenCreated>(mesh_api::paths::TOKENS, &request)
        .await;
    ensure!(
        matches!(admin, Err(HttpError::Api { status: 401, .. })),
        "a token without the admin key: {admin:?}"
    );
    other.shutdown().await?;
    mesh.shutdown().await
}

/// Starts a worker that must be refused, and returns its output when it ends.
async fn refused_worker(mesh: &Mesh, token: &str) -> Result<String> {
    let launcher = Launcher::of_this_build()?;
    let config = mesh.worker_configuration("refused", SMALL, token)?;
    match launcher.start("mesh-worker", "refused", &config).await {
        // It may have come as far as listening before it was turned away.
        Ok(mut worker) => {
            let status = worker.wait_for_end(LIMIT).await?;
            ensure!(!status.success(), "a refused worker ends with {status}");
            Ok(worker.log())
        }
        Err(error) => Ok(format!("{error:#}")),
    }
}

#[test]
fn a_damaged_model_file_is_named_with_what_is_wrong() -> Result<()> {
    let whole = fs::read(paths::smollm2()?)?;
    let dir = tempfile::tempdir()?;
    let write = |name: &str, bytes: &[u8]| -> Result<PathBuf> {
        let path = dir.path().join(name);
        fs::write(&path, bytes)?;
        Ok(path)
    };
    let cut = write("cut.gguf", &whole[..whole.len() / 2])?;
    let mut lying = whole[..4 << 20].to_vec();
    // The number of metadata pairs.
    lying[16..24].copy_from_slice(&u64::MAX.to_le_bytes());
    let lying = write("lying.gguf", &lying)?;
    let other = write("other.gguf", b"PK\x03\x04 this is no model at all")?;
    let empty = write("empty.gguf", b"")?;
    let missing = dir.path().join("missing.gguf");

    let bin = paths::bin_dir()?;
    for path in [&cut, &lying, &other, &empty, &missing] {
        let shown = Command::new(bin.join("hydramesh"))
            .args(["models", "verify"])
            .arg(path)
            .output()?;
        let words = String::from_utf8_lossy(&shown.stderr).into_owned();
        ensure!(
            shown.status.code() == Some(1),
            "{}: exit {:?}",
            path.display(),
            shown.status.code()
        );
        says_what_is_wrong(path, &words)?;

        // It stays up so that the model can be mended, unless no model could be.
        let log = dir.path().join("log");
        let output = fs::File::create(&log)?;
        let mut worker = Command::new(bin.join("mesh-worker"))
            .arg("--model")
            .arg(path)
            .args(["--set", "legacy.head=127.0.0.1:9", "--state-dir"])
            .arg(dir.path().join("state"))
            .args(["--http", "127.0.0.1:0", "--dcf", "127.0.0.1:0"])
            .env("ORT_DYLIB_PATH", paths::ort_library()?)
            .stdout(output.try_clone()?)
            .stderr(output)
            .spawn()?;
        let name = path.file_stem().and_then(|name| name.to_str());
        let name = name.context("a name")?;
        let deadline = Instant::now() + Duration::from_secs(60);
        let status = loop {
            let said = fs::read_to_string(&log)?.contains(name);
            match worker.try_wait()? {
                None if (said && *path != missing) || Instant::now() > deadline => {
                    worker.kill()?;
                    worker.wait()?;
                    break None;
                }
                None => std::thread::sleep(Duration::from_millis(50)),
                ended => break ended,
            }
        };
        ensure!(
            (*path == missing) == status.is_some_and(|status| !status.success()),
            "{}: {status:?}",
            path.display()
        );
        let words = fs::read_to_string(&log)?;
        says_what_is_wrong(path, &words)?;
    }
    Ok(())
}

fn says_what_is_wrong(path: &Path, words: &str) -> Result<()> {
    let name = path
        .file_stem()
        .and_then(|name| name.to_str())
        .context("a name")?;
    ensure!(words.contains(name), "{name} is not named in {words:?}");
    ensure!(!words.contains("panicked"), "{words}");
    Ok(())
}
