//! Names with several addresses, machines whose address changes, and identities that two machines have.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use arcanum_tests::alone;
use arcanum_tests::clients::greedy;
use arcanum_tests::mesh_state::{idle_worker, registry_until, worker_count};
use mesh_api::{CompletionRequest, GenerationOptions};
use mesh_testkit::Mesh;
use mesh_testkit::namespaces::Namespaces;
use mesh_testkit::process::Launcher;
use nix::sys::signal::Signal;

const LIMIT: Duration = Duration::from_secs(60);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_name_is_tried_at_all_its_addresses_by_worker_shim_and_client() -> Result<()> {
    let _alone = alone();
    let hosts = tempfile::NamedTempFile::new()?;
    std::fs::write(
        &hosts,
        "127.0.0.1 localhost\n::1 both.test\n127.0.0.1 both.test\n",
    )?;
    let mount = format!(
        "mount --bind {} /etc/hosts && exec \"$0\" \"$@\"",
        hosts.path().display()
    );
    let wrapper = [
        "unshare",
        "--mount",
        "--propagation",
        "private",
        "sh",
        "-c",
        &mount,
    ];
    let wrapped = |program: &Path| {
        let mut command = Command::new(wrapper[0]);
        command.args(&wrapper[1..]).arg(program);
        command
    };
    if !wrapped(Path::new("true"))
        .status()
        .is_ok_and(|status| status.success())
    {
        println!("no name can be made up here (it needs root); nothing was tested");
        return Ok(());
    }
    let launcher = Launcher::of_this_build()?.wrapped(&wrapper);
    // Whichever address comes first, one of the two heads is not there.
    for host in ["127.0.0.1", "[::1]"] {
        let config = format!(
            "[dcf]\nclients = \"{host}:0\"\nworkers = \"{host}:0\"\n[quic]\nlisten = \"{host}:0\"\n"
        );
        let mut mesh = Mesh::builder()
            .launcher(launcher.clone())
            .head_config(&config)
            .start()
            .await?;
        let head = format!("both.test:{}", mesh.head.address("quic")?.port());
        let clients = format!("both.test:{}", mesh.head.address("dcf.clients")?.port());
        mesh.start_worker(&format!("head = {head:?}")).await?;
        mesh.wait_for_workers(1).await?;

        let mut shim = toml::Table::new();
        shim.insert("heads".into(), vec![clients.clone()].into());
        shim.insert("listen".into(), format!("{host}:0").into());
        mesh.start_shim(shim).await?;
        let shim = mesh.shim.as_ref().context("a shim")?.address("ingress")?;
        for to in [format!("both.test:{}", shim.port()), clients] {
            let asked = wrapped(&launcher.binary("hydramesh"))
                .args(["ask", "--to", &to, "--max-tokens", "2", "Hello"])
                .output()?;
            ensure!(
                asked.status.success(),
                "{to} with a head at {host}: {asked:?}"
            );
        }
        mesh.shutdown().await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_whose_address_changes_goes_on_with_its_answer_and_keeps_its_place() -> Result<()>
{
    let _alone = alone();
    let mut network = match Namespaces::new() {
        Ok(network) => network,
        Err(error) => {
            println!("not possible here: {error:#}");
            return Ok(());
        }
    };
    let machine = network.add()?;
    let own = network.own_address();
    let config = format!(
        "worker_timeout = \"3s\"\n[dcf]\nworkers = \"{own}:0\"\n[quic]\nlisten = \"{own}:0\"\n"
    );
    let mut mesh = Mesh::builder().head_config(&config).start().await?;
    let launcher = network.launcher(mesh.launcher(), machine);
    mesh.start_worker_by(&launcher, "threads = 1").await?;
    mesh.wait_for_workers(1).await?;
    let before = mesh.registry().await?;
    let id = before.workers[0].id;
    ensure!(
        before.workers[0]
            .address
            .contains(&network.address(machine))
    );

    let options = GenerationOptions {
        model: None,
        ..greedy("", 200)
    };
    let request = CompletionRequest::new("Once upon a time", options);
    let mut stream = mesh.client()?.stream(request).await?;
    let mut moved = None;
    let mut pieces = 0;
    while let Some(event) = stream.next().await? {
        drop(event);
        pieces += 1;
        if pieces == 20 {
            moved = Some(network.readdress(machine)?);
        }
    }
    let address = moved.context("the answer was too short")?;
    ensure!(pieces > 100, "{pieces} pieces");
    // Longer than the head waits for a silent worker.
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(5) {
        let registry = mesh.registry().await?;
        ensure!(
            worker_count(&registry) == 1 && registry.workers[0].id == id,
            "the worker was lost: {registry:?}\n{}",
            mesh.head.log_end()
        );
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    let registry = mesh.registry().await?;
    let worker = &registry.workers[0];
    ensure!(worker.address.contains(&address), "{registry:?}");
    ensure!(registry.requests.reruns == 0, "{registry:?}");
    ensure!(worker.last_seen_seconds < 3.0, "{registry:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_two_machines_with_one_identity_the_first_stays_and_both_hear_of_it() -> Result<()> {
    let _alone = alone();
    let folder = tempfile::tempdir()?;
    let mut mesh = Mesh::builder().start().await?;
    mesh.start_worker(&idle_worker(folder.path())).await?;
    let registry = registry_until(&mesh, "the first joins", |r| worker_count(r) == 1).await?;
    let id = registry.workers[0].id;

    let state = mesh.workers[0].state_dir();
    let names = [
        "identity.key",
        "identity.doc",
        "node.key",
        "node.crt",
        "root.crt",
    ];
    let identity = names.map(|name| state.join(name));
    let copied = mesh.launcher().with_state(&identity);
    mesh.start_worker_by(&copied, &idle_worker(folder.path()))
        .await?;
    let registry = registry_until(&mesh, "the duplicate is noticed", |r| {
        !r.duplicates.is_empty()
    })
    .await?;
    let mut warnings = registry.warnings.iter();
    let told = warnings.any(|warning| warning.contains("mesh-worker new-identity"));
    ensure!(told, "{registry:?}");
    // It used to be evicted every three seconds.
    tokio::time::sleep(Duration::from_secs(4)).await;
    let registry = mesh.registry().await?;
    ensure!(
        registry.workers[0].id == id,
        "the first was evicted: {registry:?}"
    );
    for (worker, words) in [
        (0, "the head reports a problem"),
        (1, "in use on another machine"),
    ] {
        let log = mesh.workers[worker].log();
        ensure!(log.contains(words), "{words} is not in {log}");
    }
    let metrics = mesh.client()?.get_text("/metrics").await?;
    ensure!(
        metrics.contains("hydramesh_head_duplicate_identities_total{"),
        "{metrics}"
    );
    let program = mesh.launcher().binary("hydramesh");
    let url = format!("http://{}", mesh.head.address("http")?);
    let status = Command::new(program)
        .args(["status", "--url", &url])
        .output()?;
    let text = String::from_utf8_lossy(&status.stdout).into_owned();
    ensure!(text.contains("warning: worker `worker-"), "{text}");

    // A new identity, as the message says.
    mesh.workers[1].signal(Signal::SIGTERM)?;
    mesh.workers[1].wait_for_end(LIMIT).await?;
    let renamed = Command::new(mesh.launcher().binary("mesh-worker"))
        .args(["new-identity", "--state-dir"])
        .arg(mesh.workers[1].state_dir())
        .output()?;
    ensure!(renamed.status.success(), "{renamed:?}");
    mesh.workers[1].restart(None).await?;
    registry_until(&mesh, "both are there", |r| worker_count(r) == 2).await?;

    // A worker that is killed and comes back does not count as a duplicate.
    let times = mesh.registry().await?.duplicates[0].times;
    mesh.workers[0].crash()?;
    mesh.workers[0].restart(None).await?;
    registry_until(&mesh, "the first comes back", |r| {
        worker_count(r) == 2 && r.workers.iter().all(|worker| worker.id != id)
    })
    .await?;
    ensure!(mesh.registry().await?.duplicates[0].times == times);
    mesh.shutdown().await
}
