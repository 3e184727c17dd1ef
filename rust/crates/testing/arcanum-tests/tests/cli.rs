//! The `hydramesh` command as users and scripts see it.

use std::io::Write;
use std::process::{Command, Output, Stdio};

use anyhow::{Context, Result, ensure};
use arcanum_tests::alone;
use mesh_testkit::{Mesh, paths};
use serde_json::Value;

fn hydramesh(arguments: &[&str]) -> Result<Output> {
    Ok(command(arguments)?.stdin(Stdio::null()).output()?)
}

fn command(arguments: &[&str]) -> Result<Command> {
    let mut command = Command::new(paths::bin_dir()?.join("hydramesh"));
    command.args(arguments);
    for name in [
        "HYDRAMESH_URL",
        "HYDRAMESH_DCF",
        "HYDRAMESH_API_KEY_FILE",
        "HYDRAMESH_ADMIN_KEY_FILE",
    ] {
        command.env_remove(name);
    }
    Ok(command)
}

fn piped(arguments: &[&str], input: &str) -> Result<Output> {
    let mut child = command(arguments)?
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    child
        .stdin
        .take()
        .context("a pipe")?
        .write_all(input.as_bytes())?;
    Ok(child.wait_with_output()?)
}

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn expect_exit(output: &Output, code: i32) -> Result<()> {
    ensure!(
        output.status.code() == Some(code),
        "exit {:?} instead of {code}\n{}\n{}",
        output.status,
        stdout(output),
        stderr(output)
    );
    Ok(())
}

#[test]
fn help_names_every_command_and_the_exit_codes() -> Result<()> {
    let help = hydramesh(&["--help"])?;
    expect_exit(&help, 0)?;
    for word in [
        "demo",
        "ask",
        "chat",
        "status",
        "models",
        "token",
        "bench",
        "probe",
        "profile",
        "boot-config",
        "completions",
        "Exit codes",
    ] {
        ensure!(
            stdout(&help).contains(word),
            "{word} is not in\n{}",
            stdout(&help)
        );
    }
    for command in ["demo", "ask", "chat", "status", "bench"] {
        let help = hydramesh(&[command, "--help"])?;
        expect_exit(&help, 0)?;
        ensure!(
            stdout(&help).contains("Example"),
            "{command} --help has no examples"
        );
    }
    for shell in ["bash", "zsh", "fish"] {
        let completions = hydramesh(&["completions", shell])?;
        expect_exit(&completions, 0)?;
        ensure!(stdout(&completions).contains("hydramesh"), "{shell}");
    }
    Ok(())
}

#[test]
fn each_kind_of_failure_has_its_exit_code() -> Result<()> {
    expect_exit(&hydramesh(&["sing"])?, 2)?;
    expect_exit(&hydramesh(&["ask", "--timeout", "soon", "hi"])?, 2)?;
    expect_exit(&hydramesh(&["ask"])?, 2)?;
    // An unused port: bound once, and released.
    let free = std::net::UdpSocket::bind("127.0.0.1:0")?
        .local_addr()?
        .to_string();
    let unreachable = hydramesh(&["ask", "--to", &free, "hi"])?;
    expect_exit(&unreachable, 3)?;
    ensure!(
        stderr(&unreachable).contains(&free),
        "{}",
        stderr(&unreachable)
    );
    let url = format!("http://{free}");
    for arguments in [
        &["status", "--url", &url][..],
        &["ask", "--http", "--url", &url, "hi"],
        &["chat", "--url", &url],
    ] {
        expect_exit(&hydramesh(arguments)?, 3)?;
    }
    expect_exit(&hydramesh(&["status", "--url", "ftp://example.org"])?, 2)?;
    // A head that listens and says nothing.
    let silent = std::net::UdpSocket::bind("127.0.0.1:0")?;
    let address = silent.local_addr()?.to_string();
    expect_exit(
        &hydramesh(&["ask", "--to", &address, "--timeout", "300ms", "hi"])?,
        5,
    )?;
    drop(silent);
    expect_exit(
        &hydramesh(&["token", "create", "--admin-key-file", "/nonexistent/key"])?,
        6,
    )?;
    expect_exit(&hydramesh(&["models", "verify", "/nonexistent.gguf"])?, 1)?;
    Ok(())
}

#[test]
fn models_are_listed_shown_and_verified() -> Result<()> {
    let model = paths::smollm2()?;
    let dir = model
        .parent()
        .and_then(|dir| dir.to_str())
        .context("a folder")?;
    let list = hydramesh(&["models", "list", dir])?;
    expect_exit(&list, 0)?;
    ensure!(
        stdout(&list).contains("SmolLM2-135M-Instruct.Q4_1") && stdout(&list).contains("llama"),
        "{}",
        stdout(&list)
    );
    let list: Value =
        serde_json::from_str(&stdout(&hydramesh(&["models", "list", dir, "--json"])?))?;
    ensure!(list[0]["name"] == "SmolLM2-135M-Instruct.Q4_1", "{list}");
    let shown: Value = serde_json::from_str(&stdout(&hydramesh(&[
        "models", "show", "smollm2", "--dir", dir, "--json",
    ])?))?;
    ensure!(
        shown["layers"] == 30 && shown["weights"] == "Q4_1" && shown["chat_template"] == true,
        "{shown}"
    );
    let sha = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53";
    let verified = hydramesh(&["models", "verify", "smollm2", "--dir", dir, "--sha256", sha])?;
    expect_exit(&verified, 0)?;
    ensure!(stdout(&verified).starts_with(sha), "{}", stdout(&verified));
    let other = hydramesh(&[
        "models",
        "verify",
        "smollm2",
        "--dir",
        dir,
        "--sha256",
        &sha.replace('b', "c"),
    ])?;
    expect_exit(&other, 1)?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mesh_is_asked_talked_to_and_shown() -> Result<()> {
    let _alone = alone();
    let mesh = Mesh::builder()
        .workers(1)
        .worker_config("threads = 0\n")
        .shim()
        .start()
        .await?;
    let url = format!("http://{}", mesh.head.address("http")?);
    let shim = mesh
        .shim
        .as_ref()
        .context("a shim")?
        .address("ingress")?
        .to_string();
    let question = "Who wrote Hamlet?";
    let greedy = ["--temperature", "0", "--max-tokens", "16"];

    let plain = hydramesh(&[&["ask", "--to", &shim, "--stats", question], &greedy[..]].concat())?;
    expect_exit(&plain, 0)?;
    ensure!(stdout(&plain).contains("Shakespeare"), "{}", stdout(&plain));
    ensure!(
        stderr(&plain).contains("first token after") && stderr(&plain).contains("per second"),
        "{}",
        stderr(&plain)
    );
    let http = hydramesh(&[&["ask", "--http", "--url", &url, question], &greedy[..]].concat())?;
    ensure!(
        stdout(&http) == stdout(&plain),
        "over HTTP: {:?}, over DCF: {:?}",
        stdout(&http),
        stdout(&plain)
    );
    let head = mesh.head.address("quic")?.to_string();
    let state_dir = mesh.head.state_dir();
    let (root, key) = (state_dir.join("root.crt"), state_dir.join("admin.key"));
    let (root, key) = (
        root.to_str().context("UTF-8")?,
        key.to_str().context("UTF-8")?,
    );
    let sealed = [
        "ask",
        "--sealed",
        &head,
        "--root",
        root,
        "--api-key-file",
        key,
        question,
    ];
    let sealed = hydramesh(&[&sealed, &greedy[..]].concat())?;
    ensure!(stdout(&sealed) == stdout(&plain), "sealed: {sealed:?}");
    let other_root = "5d".repeat(32);
    let stranger = [
        "ask",
        "--sealed",
        &head,
        "--root",
        &other_root,
        "--api-key-file",
        key,
        "hi",
    ];
    expect_exit(&hydramesh(&stranger)?, 6)?;
    // Where no shim was named and none is on this machine, the head is asked. (One at the usual port may be: it answers, too.)
    let without = hydramesh(&[&["ask", "--url", &url, question], &greedy[..]].concat())?;
    expect_exit(&without, 0)?;
    let piped_in = piped(
        &[&["ask", "--to", &shim, "--json", "-"], &greedy[..]].concat(),
        question,
    )?;
    let object: Value = serde_json::from_str(&stdout(&piped_in))?;
    ensure!(
        object["text"].as_str().map(|text| format!("{text}\n")) == Some(stdout(&plain)),
        "{object}"
    );
    let unknown = hydramesh(&["ask", "--to", &shim, "--model", "gpt-9", "hi"])?;
    expect_exit(&unknown, 4)?;
    let unknown = hydramesh(&["ask", "--http", "--url", &url, "--model", "gpt-9", "hi"])?;
    expect_exit(&unknown, 4)?;

    let talk = piped(
        &[&["chat", "--url", &url], &greedy[..]].concat(),
        "My name is Ada.\n/stats\nWhat is my name?\n/reset\n/sing\n/quit\nnever asked\n",
    )?;
    expect_exit(&talk, 0)?;
    ensure!(
        stdout(&talk).contains("there is no /sing"),
        "{}",
        stdout(&talk)
    );
    ensure!(
        stderr(&talk).contains("first token after"),
        "{}",
        stderr(&talk)
    );

    let status = hydramesh(&["status", "--url", &url])?;
    expect_exit(&status, 0)?;
    ensure!(
        stdout(&status).contains("worker-1") && stdout(&status).contains("ready"),
        "{}",
        stdout(&status)
    );
    let status: Value =
        serde_json::from_str(&stdout(&hydramesh(&["status", "--url", &url, "--json"])?))?;
    ensure!(status["workers"][0]["name"] == "worker-1", "{status}");

    let key = mesh.head.state_dir().join("admin.key");
    let key = key.to_str().context("UTF-8")?;
    let token = hydramesh(&[
        "token",
        "create",
        "--url",
        &url,
        "--admin-key-file",
        key,
        "--ttl",
        "10m",
    ])?;
    expect_exit(&token, 0)?;
    ensure!(stdout(&token).starts_with("hydra1."), "{}", stdout(&token));
    let admin = |words: &[&str]| {
        let place = ["--url", &*url, "--admin-key-file", key];
        hydramesh(&[words, &place[..]].concat())
    };
    let listed = admin(&["token", "list", "--json"])?;
    expect_exit(&listed, 0)?;
    let tokens: Value = serde_json::from_str(&stdout(&listed))?;
    let tokens = tokens["tokens"].as_array().context("a list")?;
    let open = tokens.iter().find(|token| token["state"] == "open");
    let id = open
        .and_then(|token| token["id"].as_str())
        .context("an open token")?;
    ensure!(stdout(&admin(&["token", "list"])?).contains(id));
    expect_exit(&admin(&["token", "revoke", id])?, 0)?;
    expect_exit(&admin(&["token", "revoke", id])?, 4)?;
    let nodes = admin(&["nodes", "list"])?;
    expect_exit(&nodes, 0)?;
    ensure!(stdout(&nodes).contains("worker-1"), "{}", stdout(&nodes));
    expect_exit(&admin(&["nodes", "expel", "nobody"])?, 4)?;
    expect_exit(&admin(&["nodes", "readmit", "worker-1"])?, 4)?;
    let wrong = tempfile::NamedTempFile::new()?;
    std::fs::write(&wrong, "wrong\n")?;
    let wrong = wrong.path().to_str().context("UTF-8")?;
    expect_exit(
        &hydramesh(&["token", "create", "--url", &url, "--admin-key-file", wrong])?,
        6,
    )?;

    let measured = hydramesh(&[
        "bench",
        "--mesh",
        "--url",
        &url,
        "--rounds",
        "1",
        "--tokens",
        "8",
        "--prompt-tokens",
        "16",
        "--json",
    ])?;
    expect_exit(&measured, 0)?;
    let measured: Value = serde_json::from_str(&stdout(&measured))?;
    ensure!(
        measured["decode_tokens_per_second"].as_f64() > Some(0.0),
        "{measured}"
    );
    mesh.shutdown().await
}

#[test]
fn an_engine_is_measured_without_a_mesh() -> Result<()> {
    let _alone = alone();
    let model = paths::smollm2()?;
    let runtime = paths::ort_library()?;
    let measured = hydramesh(&[
        "bench",
        model.to_str().context("UTF-8")?,
        "--runtime",
        runtime.to_str().context("UTF-8")?,
        "--rounds",
        "1",
        "--tokens",
        "8",
        "--prompt-tokens",
        "16",
        "--concurrency",
        "2",
        "--json",
    ])?;
    expect_exit(&measured, 0)?;
    let measured: Value = serde_json::from_str(&stdout(&measured))?;
    ensure!(
        measured["prefill_tokens_per_second"].as_f64() > Some(0.0),
        "{measured}"
    );
    Ok(())
}

#[test]
fn the_demo_shows_what_it_promises() -> Result<()> {
    let _alone = alone();
    let cache = paths::cache_dir();
    let demo = hydramesh(&["demo", "--cache", cache.to_str().context("UTF-8")?])?;
    expect_exit(&demo, 0)?;
    let text = stdout(&demo);
    ensure!(text.matches("first token after").count() == 2, "{text}");
    ensure!(
        text.contains("is killed here]")
            && text.contains("the text is the same as without the death"),
        "{text}"
    );
    ensure!(text.matches("exit code 0").count() == 3, "{text}");
    let unfetched = hydramesh(&["demo", "--cache", "/nonexistent"])?;
    expect_exit(&unfetched, 1)?;
    ensure!(
        stderr(&unfetched).contains("make fetch"),
        "{}",
        stderr(&unfetched)
    );
    Ok(())
}
