//! Programs that started a mesh and are told to end: no service, no network namespace and no folder stays behind.

use std::fs::{self, File};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use arcanum_tests::alone;
use mesh_testkit::paths;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// A debug build learns the undisturbed answers first, on a busy machine.
const START_LIMIT: Duration = Duration::from_secs(240);
const END_LIMIT: Duration = Duration::from_secs(30);

#[test]
fn a_soak_that_is_interrupted_leaves_nothing_behind() -> Result<()> {
    let program = env!("CARGO_BIN_EXE_arcanum-soak");
    leaves_nothing_behind(program, &[], "mesh-worker", Signal::SIGINT, 130)
}

#[test]
fn an_attack_that_is_terminated_leaves_nothing_behind() -> Result<()> {
    let program = env!("CARGO_BIN_EXE_arcanum-attack");
    let arguments = ["--calm", "600"];
    // The shim comes last, when workers run on machines of their own.
    leaves_nothing_behind(program, &arguments, "mesh-shim", Signal::SIGTERM, 143)
}

/// Starts `program`, signals it once it has a service called `last`, and looks for leftovers.
fn leaves_nothing_behind(
    program: &str,
    arguments: &[&str],
    last: &str,
    signal: Signal,
    code: i32,
) -> Result<()> {
    let _alone = alone();
    // Built here, if they are not there, so that their build does not count as the program's start.
    let services = paths::bin_dir()?;
    let folder = tempfile::tempdir()?;
    let temporary = folder.path().join("tmp");
    fs::create_dir(&temporary)?;
    let words = folder.path().join("words");
    let file = File::create(&words)?;
    let mut child = Command::new(program)
        .args(arguments)
        .arg("--out")
        .arg(folder.path().join("table.md"))
        .env("HYDRAMESH_BIN_DIR", services)
        .env("TMPDIR", &temporary)
        .stdin(Stdio::null())
        .stdout(file.try_clone()?)
        .stderr(file)
        .spawn()
        .with_context(|| format!("starting {program}"))?;
    let services = wait_for_service(&mut child, last);
    let sent = kill(Pid::from_raw(child.id().try_into()?), signal);
    let status = wait_for_end(&mut child);
    let words = fs::read_to_string(&words)?;
    let services = services.context(words.clone())?;
    sent?;
    ensure!(
        status?.code() == Some(code),
        "not exit code {code}: {words}"
    );
    for (pid, name) in services {
        let path = Path::new("/proc").join(pid.to_string());
        ensure!(!path.exists(), "{name} still runs: {words}");
    }
    // Without iproute2 there were no namespaces.
    for list in [&["netns", "list"][..], &["-o", "link", "show"]] {
        let listed = Command::new("ip").args(list).output();
        let listed = listed.map_or_else(|_| Vec::new(), |output| output.stdout);
        let listed = String::from_utf8_lossy(&listed).into_owned();
        let prefix = format!("hm{}x", child.id());
        ensure!(!listed.contains(&prefix), "left behind: {listed}");
    }
    let left: Vec<_> = fs::read_dir(&temporary)?
        .flatten()
        .map(|entry| entry.file_name())
        .filter(|name| name != "hydramesh-tests.lock")
        .collect();
    ensure!(left.is_empty(), "left behind: {left:?}");
    Ok(())
}

/// Ids and names of the children, once one of them is called `last`.
fn wait_for_service(child: &mut Child, last: &str) -> Result<Vec<(u32, String)>> {
    let started = Instant::now();
    loop {
        let children = children(child.id());
        if children.iter().any(|(_, name)| name == last) {
            return Ok(children);
        }
        if let Some(status) = child.try_wait()? {
            bail!("ended with {status} before it had a {last}");
        }
        ensure!(
            started.elapsed() < START_LIMIT,
            "no {last} among {children:?}"
        );
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn wait_for_end(child: &mut Child) -> Result<ExitStatus> {
    let started = Instant::now();
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        if started.elapsed() > END_LIMIT {
            child.kill()?;
            child.wait()?;
            bail!("still ran {END_LIMIT:?} after the signal");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The processes that `parent` started, from `/proc/PID/stat`: `ID (NAME) STATE PARENT …`.
fn children(parent: u32) -> Vec<(u32, String)> {
    let child = |entry: fs::DirEntry| {
        let pid: u32 = entry.file_name().to_str()?.parse().ok()?;
        let stat = fs::read_to_string(entry.path().join("stat")).ok()?;
        let (before, after) = stat.rsplit_once(')')?;
        let (_, name) = before.split_once('(')?;
        let its_parent: u32 = after.split_whitespace().nth(1)?.parse().ok()?;
        (its_parent == parent).then(|| (pid, name.to_owned()))
    };
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(child).collect()
}
