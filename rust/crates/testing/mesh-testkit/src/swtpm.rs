//! A TPM 2.0 in software: swtpm, which `scripts/fetch.py swtpm` puts into the cache.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use tempfile::TempDir;

use crate::paths;

/// A running TPM with a seed of its own, gone when this is dropped. It talks to one program at a time.
pub struct Swtpm {
    program: Child,
    dir: TempDir,
}

impl Swtpm {
    /// Starts one, as if a machine had been switched on. `None` where the program has not been fetched; the
    /// reason is printed, with the name of the test.
    ///
    /// # Panics
    /// If it does not start.
    pub fn start(test: &str) -> Option<Self> {
        let program = match paths::swtpm() {
            Ok(program) => program,
            Err(error) => {
                // Past the capture of tests that pass: a skipped one should be seen.
                let text = format!("skipped without a TPM in software: {test} ({error})\n");
                let _ = std::io::stderr().write_all(text.as_bytes());
                return None;
            }
        };
        Some(Self::run(&program).expect("swtpm starts"))
    }

    fn run(program: &Path) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        Ok(Self {
            program: spawn(program, dir.path())?,
            dir,
        })
    }

    /// Switches it off and on: its registers begin anew, and no key is loaded.
    ///
    /// # Panics
    /// If it does not start.
    pub fn restart(&mut self) {
        self.stop();
        let started = paths::swtpm().and_then(|program| spawn(&program, self.dir.path()));
        self.program = started.expect("swtpm starts again");
    }

    fn stop(&mut self) {
        let _ = self.program.kill();
        let _ = self.program.wait();
        let _ = std::fs::remove_file(self.socket());
    }

    /// Its socket, which takes commands as a device file does.
    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("tpm")
    }

    /// Extends a register of the SHA-256 bank, as firmware does with what it starts. Waits until no other
    /// program is connected.
    ///
    /// # Panics
    /// If the TPM refuses.
    pub fn extend(&self, pcr: u8, digest: [u8; 32]) {
        // TPM2_PCR_Extend with the empty password (TPM 2.0 part 3, section 22.2).
        let mut command = vec![0x80, 0x02, 0, 0, 0, 65, 0, 0, 0x01, 0x82, 0, 0, 0, pcr];
        command.extend([0, 0, 0, 9, 0x40, 0, 0, 0x09, 0, 0, 0, 0, 0]);
        command.extend([0, 0, 0, 1, 0, 0x0b]);
        command.extend(digest);
        let mut answer = [0; 10];
        let mut exchange = || -> std::io::Result<()> {
            let mut stream = UnixStream::connect(self.socket())?;
            stream.write_all(&command)?;
            stream.read_exact(&mut answer)
        };
        exchange().expect("the TPM answers");
        assert_eq!(answer[6..], [0; 4], "the TPM extends its register");
    }
}

impl Drop for Swtpm {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Starts the program with its state and its socket in this folder.
fn spawn(program: &Path, dir: &Path) -> Result<Child> {
    let libraries = program.parent().and_then(Path::parent);
    let libraries = libraries
        .context("the program lies in a folder")?
        .join("lib");
    let socket = dir.join("tpm");
    let mut child = Command::new(program)
        .args(["socket", "--tpm2", "--flags"])
        .arg("not-need-init,startup-clear")
        .args(["--tpmstate", &format!("dir={}", dir.display())])
        .arg("--server")
        .arg(format!("type=unixio,path={}", socket.display()))
        .env("LD_LIBRARY_PATH", libraries)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    let start = Instant::now();
    while !socket.exists() {
        let ended = child.try_wait()?;
        ensure!(ended.is_none(), "it ended: {ended:?}");
        if start.elapsed() > START_LIMIT {
            child.kill()?;
            child.wait()?;
            bail!("it does not listen");
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(child)
}

const START_LIMIT: Duration = Duration::from_secs(10);
