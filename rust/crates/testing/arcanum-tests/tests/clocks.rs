//! Machines whose clocks are wrong, by libfaketime: a head, a worker, and clocks that are set while they run.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use arcanum_tests::alone;
use arcanum_tests::mesh_state::{idle_worker, registry_until, worker_count};
use mesh_base::files;
use mesh_testkit::Mesh;
use mesh_testkit::process::Launcher;

/// A clock that the test sets, for the services that its launcher starts.
struct Clock {
    _dir: tempfile::TempDir,
    file: PathBuf,
    launcher: Launcher,
}

impl Clock {
    /// `None` where libfaketime is not installed.
    fn new(offset: &str) -> Result<Option<Self>> {
        let folders = ["x86_64-linux-gnu", "aarch64-linux-gnu"];
        let library = |folder: &str| format!("/usr/lib/{folder}/faketime/libfaketime.so.1");
        let found = folders
            .into_iter()
            .map(library)
            .find(|path| Path::new(path).exists());
        let Some(library) = found else {
            println!(
                "libfaketime is missing (Debian: apt-get install faketime); nothing was tested"
            );
            return Ok(None);
        };
        let dir = tempfile::tempdir()?;
        let file = dir.path().join("offset");
        let launcher = Launcher::of_this_build()?
            .with_environment("LD_PRELOAD", &library)
            .with_environment("FAKETIME_TIMESTAMP_FILE", file.to_str().context("UTF-8")?)
            // Read again for every question about the time, so that a clock can be set while a service runs.
            .with_environment("FAKETIME_NO_CACHE", "1")
            .with_environment("FAKETIME_DONT_FAKE_MONOTONIC", "1")
            .with_environment("NO_FAKE_STAT", "1");
        let clock = Self {
            _dir: dir,
            file,
            launcher,
        };
        clock.set(offset)?;
        Ok(Some(clock))
    }

    /// `+730d` is two years ahead, `+0` right.
    fn set(&self, offset: &str) -> Result<()> {
        // In one step: a service must not find it empty.
        Ok(files::replace(
            &self.file,
            offset.as_bytes(),
            files::PRIVATE,
        )?)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_head_that_first_started_two_years_ahead_is_joined_once_its_clock_is_right() -> Result<()>
{
    let _alone = alone();
    let Some(clock) = Clock::new("+730d")? else {
        return Ok(());
    };
    let folder = tempfile::tempdir()?;
    let mut mesh = Mesh::builder()
        .launcher(clock.launcher.clone())
        .start()
        .await?;
    // One joins meanwhile, with the right time: it gets a certificate from the future.
    let right = Launcher::of_this_build()?;
    mesh.start_worker_by(&right, &idle_worker(folder.path()))
        .await?;
    registry_until(&mesh, "a worker joins a head from the future", |r| {
        worker_count(r) == 1
    })
    .await?;

    clock.set("+0")?;
    mesh.restart_head(Duration::ZERO).await?;
    let log = mesh.head.log();
    ensure!(log.contains("a new one is issued"), "{log}");
    mesh.start_worker_by(&right, &idle_worker(folder.path()))
        .await?;
    let registry = registry_until(&mesh, "both are there", |r| worker_count(r) == 2).await?;
    ensure!(registry.warnings.is_empty(), "{registry:?}");
    mesh.shutdown().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn workers_with_wrong_clocks_join_and_the_operator_hears_of_them() -> Result<()> {
    let _alone = alone();
    // 1970 after a dead battery, and five years ahead.
    let today = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs() / 86_400;
    let (Some(past), Some(future)) = (
        Clock::new(&format!("-{}d", today - 2))?,
        Clock::new("+1826d")?,
    ) else {
        return Ok(());
    };
    let folder = tempfile::tempdir()?;
    let mut mesh = Mesh::builder().start().await?;
    for clock in [&past, &future] {
        mesh.start_worker_by(&clock.launcher, &idle_worker(folder.path()))
            .await?;
    }
    let registry = registry_until(&mesh, "both join", |r| worker_count(r) == 2).await?;
    let warnings = registry.warnings.join("\n");
    for part in [
        "years behind by this head's",
        "years ahead by this head's",
        "timedatectl",
    ] {
        ensure!(warnings.contains(part), "{part} is not in {warnings}");
    }
    for worker in &mesh.workers {
        let log = worker.log();
        ensure!(log.contains("this machine's clock is"), "{log}");
    }
    // A new link takes the certificate that the head's clock agrees with.
    mesh.restart_head(Duration::ZERO).await?;
    registry_until(&mesh, "both come back", |r| worker_count(r) == 2).await?;
    mesh.shutdown().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clocks_that_are_set_while_services_run_cut_nothing() -> Result<()> {
    let _alone = alone();
    let (Some(of_head), Some(of_worker)) = (Clock::new("+0")?, Clock::new("+0")?) else {
        return Ok(());
    };
    let folder = tempfile::tempdir()?;
    let mut mesh = Mesh::builder()
        .launcher(of_head.launcher.clone())
        .head_config("worker_timeout = \"2s\"")
        .start()
        .await?;
    mesh.start_worker_by(&of_worker.launcher, &idle_worker(folder.path()))
        .await?;
    let registry = registry_until(&mesh, "the worker joins", |r| worker_count(r) == 1).await?;
    let id = registry.workers[0].id;
    for (head, worker) in [
        ("+0", "+1000d"),
        ("+0", "-1000d"),
        ("+400d", "+0"),
        ("-400d", "+0"),
        ("+0", "+0"),
    ] {
        of_head.set(head)?;
        of_worker.set(worker)?;
        tokio::time::sleep(Duration::from_millis(2_600)).await;
        let registry = mesh.registry().await?;
        ensure!(
            worker_count(&registry) == 1 && registry.workers[0].id == id,
            "{head} and {worker}: the link was cut: {registry:?}\n{}",
            mesh.workers[0].log_end()
        );
    }
    let renewals = mesh.workers[0].log().matches("certificate renewed").count();
    ensure!(renewals < 10, "{renewals} renewals");
    // So does a link that is made then, by machines that disagree about the date.
    of_worker.set("+1000d")?;
    mesh.restart_head(Duration::ZERO).await?;
    registry_until(&mesh, "the worker comes back", |r| worker_count(r) == 1).await?;
    mesh.shutdown().await
}
