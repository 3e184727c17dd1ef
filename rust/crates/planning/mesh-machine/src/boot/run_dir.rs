//! The folder in which a plan is written, and in which the services' units look.
//!
//! | file | content |
//! |---|---|
//! | `role-head`, `role-shim`, `role-worker-cpu`, `role-worker-nvidia`, `role-worker-rocm`, `role-worker-webgpu` | empty; the one of the unit that starts |
//! | `service.env` | the environment by which the service is configured |
//! | `join-token` | the token, mode 0600 |
//! | `authorized_keys` | the key that was given at boot; sshd runs only if it is there |
//! | `keymap` | the keyboard layout for the consoles, if one was named |
//! | `ready` | empty; there when nothing is missing |
//! | `summary` | the plan in words, for the console |

use std::fs::{DirBuilder, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::choice::Backend;
use super::join::Role;
use super::plan::Plan;

/// A file that could not be written.
#[derive(Debug, thiserror::Error)]
#[error("{}: {source}", path.display())]
pub struct WriteError {
    path: PathBuf,
    source: io::Error,
}

impl WriteError {
    fn at(path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self { path, source }
    }
}

/// Writes `plan` into `dir`, which is created if missing. Files of an earlier plan are removed.
///
/// # Errors
/// The file that could not be removed or written.
pub fn write(plan: &Plan, dir: &Path) -> Result<(), WriteError> {
    let made = DirBuilder::new().recursive(true).mode(0o755).create(dir);
    made.map_err(WriteError::at(dir))?;
    for name in names() {
        remove(&dir.join(name))?;
    }
    let file = |name: &str, mode, content: &str| create(&dir.join(name), mode, content);
    if let Some(key) = &plan.ssh_key {
        file(KEYS, 0o644, &format!("{key}\n"))?;
    }
    // Single quotes: systemd takes the text between them literally. No value contains one.
    let quoted = |(name, value): &(String, String)| format!("{name}='{value}'\n");
    let environment: String = plan.environment().iter().map(quoted).collect();
    file(ENVIRONMENT, 0o644, &environment)?;
    if let Some(keymap) = &plan.keymap {
        file(KEYMAP, 0o644, &format!("{keymap}\n"))?;
    }
    if let Some((token, _)) = plan.token.as_ref().filter(|_| plan.role == Role::Worker) {
        file(TOKEN, 0o600, &format!("{}\n", token.secret()))?;
    }
    file(SUMMARY, 0o644, &plan.to_string())?;
    if plan.missing().is_empty() {
        file(READY, 0o644, "")?;
        file(&marker(plan), 0o644, "")?;
    }
    Ok(())
}

/// The file that lets the plan's unit start.
pub fn marker(plan: &Plan) -> String {
    match plan.role {
        Role::Worker => plan.choice.backend.worker_marker(),
        role => format!("role-{role}"),
    }
}

/// Everything that a plan can leave.
fn names() -> impl Iterator<Item = String> {
    let roles = ["role-head", "role-shim"];
    let fixed = [ENVIRONMENT, TOKEN, KEYS, KEYMAP, READY, SUMMARY];
    let fixed = roles.into_iter().chain(fixed).map(str::to_owned);
    fixed.chain(Backend::ALL.into_iter().map(Backend::worker_marker))
}

fn remove(path: &Path) -> Result<(), WriteError> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(WriteError::at(path)(error)),
        _ => Ok(()),
    }
}

/// Creates a new file; fails if the path exists, also as a link.
fn create(path: &Path, mode: u32, content: &str) -> Result<(), WriteError> {
    let mut options = OpenOptions::new();
    let opened = options.write(true).create_new(true).mode(mode).open(path);
    opened
        .and_then(|mut file| file.write_all(content.as_bytes()))
        .map_err(WriteError::at(path))
}

const ENVIRONMENT: &str = "service.env";
const TOKEN: &str = "join-token";
const KEYS: &str = "authorized_keys";
const KEYMAP: &str = "keymap";
const READY: &str = "ready";
const SUMMARY: &str = "summary";
