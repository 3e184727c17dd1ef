//! Duties of every service to its operator: a checked configuration, a drain, metrics, health.

use std::process::{Command, Output};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use arcanum_tests::clients::greedy;
use arcanum_tests::{alone, first_model};
use mesh_api::{CompletionRequest, TokenList};
use mesh_testkit::{Mesh, paths};
use nix::sys::signal::Signal;

const SERVICES: [&str; 3] = ["mesh-head", "mesh-worker", "mesh-shim"];

fn run(program: &str, arguments: &[&str]) -> Result<Output> {
    Ok(Command::new(paths::bin_dir()?.join(program))
        .args(arguments)
        .output()?)
}

#[test]
fn every_service_explains_itself() -> Result<()> {
    for program in SERVICES {
        let help = run(program, &["--help"])?;
        let text = String::from_utf8_lossy(&help.stdout);
        ensure!(help.status.success(), "{program} --help: {:?}", help.status);
        for flag in [
            "--config",
            "--state-dir",
            "--http",
            "--set",
            "--check-config",
            "--print-config",
            "--log-format",
        ] {
            ensure!(text.contains(flag), "{program} --help does not name {flag}");
        }
        let version = run(program, &["--version"])?;
        ensure!(
            String::from_utf8_lossy(&version.stdout).starts_with(program),
            "{program} --version"
        );
    }
    Ok(())
}

#[test]
fn an_unknown_key_is_an_error_that_names_the_nearest_one() -> Result<()> {
    let file = tempfile::NamedTempFile::new()?;
    std::fs::write(&file, "[http]\nlissten = \"127.0.0.1:0\"\n")?;
    let path = file.path().to_str().context("UTF-8")?;
    for program in SERVICES {
        let checked = run(program, &["--config", path, "--check-config"])?;
        let words = String::from_utf8_lossy(&checked.stderr);
        ensure!(!checked.status.success(), "{program} takes an unknown key");
        ensure!(
            words.contains("lissten") && words.contains("http.listen") && words.contains(path),
            "{program}: {words}"
        );
    }
    Ok(())
}

#[test]
fn a_printed_configuration_can_be_read_again_and_holds_no_secret() -> Result<()> {
    let dir = tempfile::tempdir()?;
    for program in SERVICES {
        let set: &[&str] = match program {
            "mesh-worker" => &[
                "--set",
                "models=/models/a.gguf",
                "--set",
                "head=head.example:7780",
                "--set",
                "join_token=hydra1.secret",
            ],
            _ => &[],
        };
        let printed = run(program, &[&["--print-config"], set].concat())?;
        let text = String::from_utf8_lossy(&printed.stdout).into_owned();
        ensure!(
            printed.status.success(),
            "{program} --print-config: {}",
            String::from_utf8_lossy(&printed.stderr)
        );
        ensure!(
            !text.contains("hydra1.secret"),
            "{program} prints a secret:\n{text}"
        );
        let path = dir.path().join(format!("{program}.toml"));
        std::fs::write(&path, &text)?;
        let path = path.to_str().context("UTF-8")?;
        let again = run(program, &["--config", path, "--print-config"])?;
        ensure!(
            String::from_utf8_lossy(&again.stdout) == text,
            "{program}: the printed configuration reads differently"
        );
    }
    Ok(())
}

#[test]
fn a_wrong_configuration_is_printed_before_it_is_refused() -> Result<()> {
    let wrong = [
        ("mesh-head", "request_timeout=0", "request_timeout"),
        ("mesh-worker", "slots=0", "models"),
        ("mesh-shim", "heads=nobody", "nobody"),
    ];
    for (program, set, named) in wrong {
        for (flag, prints) in [("--print-config", true), ("--check-config", false)] {
            let output = run(program, &["--set", set, flag])?;
            let (printed, words) = (
                String::from_utf8_lossy(&output.stdout),
                String::from_utf8_lossy(&output.stderr),
            );
            ensure!(output.status.code() == Some(1), "{program} {flag}: {words}");
            ensure!(printed.contains("drain_limit") == prints, "{printed}");
            ensure!(
                words.starts_with(&format!("{program}: ")) && words.contains(named),
                "{program} {flag}: {words}"
            );
        }
    }
    Ok(())
}

/// A command, what the printed configuration shows for it, and the warning: none for the variables of earlier deployments.
const OLD_NAMES: [(&str, &str, &str); 16] = [
    (
        "mesh-shim --http-listen 127.0.0.1:9",
        "listen = \"127.0.0.1:9\"",
        "use --http",
    ),
    ("mesh-shim --head a:1", "heads = [\"a:1\"]", ""),
    (
        "mesh-shim --set drain_timeout=7s",
        "drain_limit = \"7s\"",
        "use `drain_limit`",
    ),
    (
        "HYDRAMESH_SHIM__DRAIN_TIMEOUT=7s mesh-shim",
        "drain_limit = \"7s\"",
        "use `drain_limit`",
    ),
    (
        "mesh-shim --set ingress_port=9",
        "listen = \"[::]:9\"",
        "set the port in `listen`",
    ),
    (
        "HYDRAMESH_SHIM__INGRESS_PORT=9 mesh-shim",
        "listen = \"[::]:9\"",
        "set the port in `listen`",
    ),
    ("SHIM_INGRESS_PORT=9 mesh-shim", "listen = \"[::]:9\"", ""),
    ("SHIM_NODE_TARGET=a:1 mesh-shim", "heads = [\"a:1\"]", ""),
    (
        "mesh-head --set dcf.unverified_networks=10.0.0.0/8",
        "unverified_networks = [\"10.0.0.0/8\"]",
        "use `unverified_networks`",
    ),
    ("DCF_CLIENT_PORT=9 mesh-head", "clients = \"[::]:9\"", ""),
    ("DCF_WORKER_PORT=9 mesh-head", "workers = \"[::]:9\"", ""),
    (
        "DCF_HEALTH_PORT=9 mesh-head",
        "listen = \"127.0.0.1:9\"",
        "",
    ),
    (
        "DCF_WORKER_TIMEOUT=7 mesh-head",
        "worker_timeout = \"7s\"",
        "",
    ),
    (
        "DCF_REQUEST_TIMEOUT=7 mesh-head",
        "request_timeout = \"7s\"",
        "",
    ),
    (
        "DCF_HEALTH_PORT=9 mesh-worker --model m --head h:1",
        "listen = \"127.0.0.1:9\"",
        "",
    ),
    (
        "TORCH_DEVICE=cpu mesh-worker --model m --head h:1",
        "backend = \"cpu\"",
        "",
    ),
];

#[test]
fn old_names_of_flags_keys_and_variables_still_work() -> Result<()> {
    for (command, shown, warning) in OLD_NAMES {
        let mut words = command.split(' ').peekable();
        let variable = words.next_if(|word| !word.starts_with("mesh-"));
        let program = words.next().context("a program")?;
        let output = Command::new(paths::bin_dir()?.join(program))
            .args(words)
            .arg("--print-config")
            .envs(variable.and_then(|word| word.split_once('=')))
            .output()?;
        let printed = String::from_utf8_lossy(&output.stdout);
        let words = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{command}: {words}");
        // On one line, in either list format of the printer.
        let printed = printed.replace("[\n    ", "[").replace(",\n]", "]");
        ensure!(
            printed.contains(shown),
            "{command}: no {shown} in {printed}"
        );
        ensure!(
            words.contains("warning") != warning.is_empty() && words.contains(warning),
            "{command}: {words}"
        );
    }
    Ok(())
}

#[test]
fn a_head_open_to_all_must_be_meant() -> Result<()> {
    let refused = run("mesh-head", &["--http", "0.0.0.0:8080", "--check-config"])?;
    let words = String::from_utf8_lossy(&refused.stderr);
    ensure!(
        !refused.status.success() && words.contains("allow_unauthenticated"),
        "{words}"
    );
    let meant = run(
        "mesh-head",
        &[
            "--http",
            "0.0.0.0:8080",
            "--set",
            "http.allow_unauthenticated=true",
            "--check-config",
        ],
    )?;
    ensure!(
        meant.status.success(),
        "{}",
        String::from_utf8_lossy(&meant.stderr)
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sigterm_lets_running_answers_finish_and_takes_no_new_work() -> Result<()> {
    let _alone = alone();
    let mut mesh = Mesh::builder()
        .workers(1)
        .worker_config("threads = 1\n")
        .start()
        .await?;
    let client = mesh.client()?;
    let model = first_model(&client).await?;
    let request = CompletionRequest::new("Once upon a time", greedy(&model, 150));

    // A worker first: its answer ends whole, and it takes no other.
    let mut stream = client.stream(request.clone()).await?;
    stream.next().await?.context("a first piece")?;
    mesh.workers[0].signal(Signal::SIGTERM)?;
    let mut tokens = None;
    while let Some(piece) = stream.next().await? {
        if let Some(usage) = piece.usage {
            tokens = Some(usage.completion_tokens);
        }
    }
    ensure!(
        tokens == Some(150),
        "the drained worker's answer has {tokens:?} tokens"
    );
    let status = mesh.workers[0]
        .wait_for_end(Duration::from_secs(30))
        .await?;
    ensure!(
        status.success(),
        "the worker ended with {status}:\n{}",
        mesh.workers[0].log_end()
    );

    // Then the head: the stream that runs ends whole, a new connection is not taken.
    mesh.start_worker("threads = 1\n").await?;
    mesh.wait_for_workers(1).await?;
    let mut stream = client.stream(request).await?;
    stream.next().await?.context("a first piece")?;
    mesh.head.signal(Signal::SIGTERM)?;
    tokio::time::sleep(Duration::from_millis(200)).await;
    let late = client
        .complete(&CompletionRequest::new("late", greedy(&model, 1)))
        .await;
    ensure!(late.is_err(), "a draining head takes new work: {late:?}");
    let mut finish = None;
    while let Some(piece) = stream.next().await? {
        finish = piece.finish_reason.or(finish);
    }
    ensure!(
        finish.as_deref() == Some("length"),
        "the draining head's answer ended with {finish:?}"
    );
    let status = mesh.head.wait_for_end(Duration::from_secs(30)).await?;
    ensure!(
        status.success(),
        "the head ended with {status}:\n{}",
        mesh.head.log_end()
    );
    mesh.shutdown().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hung_worker_is_noticed_and_its_answer_goes_on_elsewhere() -> Result<()> {
    let _alone = alone();
    let mut mesh = Mesh::builder()
        .workers(2)
        .worker_config("threads = 1\n")
        .start()
        .await?;
    let client = mesh.client()?;
    let model = first_model(&client).await?;
    let request = CompletionRequest::new("Once upon a time", greedy(&model, 120));
    let mut undisturbed = client.complete(&request).await?.choices;
    let undisturbed = undisturbed.pop().context("an answer")?.text;

    let mut stream = client.stream(request).await?;
    let mut text = stream.next().await?.context("a first piece")?.text;
    let mut workers = mesh.registry().await?.workers.into_iter();
    let busy = workers.find(|worker| worker.assigned > 0);
    let busy = busy.context("nobody has it")?;
    let hung = mesh
        .workers
        .iter()
        .position(|worker| busy.name == worker.name())
        .context("ours")?;
    mesh.workers[hung].signal(Signal::SIGSTOP)?;
    let mut reruns = None;
    while let Some(piece) = stream.next().await? {
        text += &piece.text;
        if let Some(timings) = piece.timings {
            reruns = Some(timings.reruns);
        }
    }
    ensure!(
        undisturbed == text,
        "the answer differs:\n{undisturbed}\n{text:?}"
    );
    ensure!(reruns == Some(1), "it was run again {reruns:?} times");
    // It comes back by itself when it runs again.
    mesh.workers[hung].signal(Signal::SIGCONT)?;
    mesh.wait_for_workers(2).await?;
    mesh.shutdown().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn health_readiness_and_metrics_are_told_by_every_service() -> Result<()> {
    let _alone = alone();
    let mut mesh = Mesh::builder()
        .workers(1)
        .worker_config("threads = 1\n")
        .shim()
        .start()
        .await?;
    mesh.head.wait_for("/ready").await?;
    mesh.workers[0].wait_for("/ready").await?;
    let shim = mesh.shim.as_mut().context("a shim")?;
    shim.wait_for("/ready").await?;
    for service in [&mesh.head, &mesh.workers[0], shim] {
        let metrics = service.http()?.get_text("/metrics").await?;
        for line in ["# TYPE", "process_resident_memory_bytes"] {
            ensure!(
                metrics.contains(line),
                "{}: no {line} in\n{metrics}",
                service.name()
            );
        }
    }
    // As a container's health check asks: the program itself, beside the one that runs.
    for (program, service) in SERVICES
        .into_iter()
        .zip([&mesh.head, &mesh.workers[0], shim])
    {
        let (config, state_dir) = (service.config_path(), service.state_dir());
        let health = |state_dir: &std::path::Path| -> Result<Output> {
            let (config, dir) = (config.to_str(), state_dir.to_str());
            let (config, dir) = config.zip(dir).context("UTF-8")?;
            run(program, &["--config", config, "--state-dir", dir, "health"])
        };
        let well = health(&state_dir)?;
        ensure!(well.status.success(), "{program} health: {well:?}");
        let (config, dir) = (config.to_str(), state_dir.to_str());
        let (config, dir) = config.zip(dir).context("UTF-8")?;
        let ready = ["health", "--ready", "--state-dir", dir, "--config", config];
        let ready = run(program, &ready)?;
        let words = String::from_utf8_lossy(&ready.stdout);
        ensure!(
            ready.status.success() && words.contains("\"ready\""),
            "{program} health --ready: {ready:?}"
        );
        let nobody = health(&state_dir.join("nobody"))?;
        let words = String::from_utf8_lossy(&nobody.stderr);
        ensure!(
            !nobody.status.success() && words.contains("is the service running"),
            "{program} health: {nobody:?}"
        );
    }
    // A command of the head's own, by its flag's new and old name.
    let dir = mesh.head.state_dir();
    let dir = dir.to_str().context("UTF-8")?;
    for (flag, time, warns) in [("--ttl", "10m", false), ("--ttl-seconds", "600", true)] {
        let note = flag.trim_start_matches('-');
        let made = [
            "token",
            "create",
            "--state-dir",
            dir,
            "--note",
            note,
            flag,
            time,
        ];
        let made = run("mesh-head", &made)?;
        let words = String::from_utf8_lossy(&made.stderr);
        ensure!(made.status.success() && !made.stdout.is_empty(), "{made:?}");
        ensure!(words.contains("use --ttl") == warns, "{flag}: {words}");
        let listed: TokenList = mesh.admin()?.get(mesh_api::paths::TOKENS).await?;
        let token = listed.tokens.iter().find(|token| token.note == note);
        let token = token.with_context(|| format!("{flag}: {listed:?}"))?;
        ensure!((500..=600).contains(&token.expires_in_seconds), "{token:?}");
    }
    mesh.shutdown().await
}
