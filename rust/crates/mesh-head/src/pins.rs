//! What names of models mean in this mesh. The file is read at the start and written whenever a name is pinned or released.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};

use crate::core::tracker::{Pin, Pins};

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Kept {
    pins: Vec<Pin>,
}

/// The file, and what is to be written to it.
#[derive(Debug, Clone)]
pub(crate) struct PinsFile {
    path: PathBuf,
    next: Arc<Mutex<Option<Vec<Pin>>>>,
    /// Held while it is written.
    writing: Arc<Mutex<()>>,
}

impl PinsFile {
    pub(crate) fn new(state_dir: &Path) -> Self {
        PinsFile {
            path: state_dir.join(FILE),
            next: Arc::default(),
            writing: Arc::default(),
        }
    }

    /// What was kept. One that cannot be read is set aside, not written over: what it pinned would be forgotten otherwise.
    pub(crate) fn load(&self) -> Pins {
        match self.read() {
            Ok(kept) => Pins::of(kept.pins),
            Err(error) => {
                let aside = self.path.with_extension("json.damaged");
                let moved = std::fs::rename(&self.path, &aside);
                tracing::error!(
                    path = %self.path.display(),
                    %error,
                    moved = moved.is_ok(),
                    "pins of models' names cannot be read: names are pinned again as models are got; look at {} and pin what was there with \
                     `hydramesh models pins set`",
                    aside.display()
                );
                Pins::default()
            }
        }
    }

    fn read(&self) -> io::Result<Kept> {
        match std::fs::metadata(&self.path) {
            Ok(found) if found.len() > MOST_BYTES => {
                return Err(io::Error::other(format!("it has over {MOST_BYTES} bytes")));
            }
            _ => {}
        }
        match std::fs::read(&self.path) {
            Ok(text) => Ok(serde_json::from_slice(&text)?),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Kept::default()),
            Err(error) => Err(error),
        }
    }

    /// Has it written soon; the latest pins are what is in it in the end.
    pub(crate) fn keep(&self, pins: &Pins) {
        *lock(&self.next) = Some(pins.list().cloned().collect());
        let file = self.clone();
        let write = move || {
            let _one = lock(&file.writing);
            let Some(pins) = lock(&file.next).take() else {
                return;
            };
            let written = serde_json::to_vec_pretty(&Kept { pins })
                .map_err(io::Error::from)
                .and_then(|text| mesh_service::files::write_private(&file.path, &text));
            if let Err(error) = written {
                tracing::error!(%error, "pins of models' names are not kept: after a restart they are those of before");
            }
        };
        match tokio::runtime::Handle::try_current() {
            Ok(runtime) => drop(runtime.spawn_blocking(write)),
            Err(_) => write(),
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// In the state directory.
const FILE: &str = "model-pins.json";
/// More than as many pins as there may be have.
const MOST_BYTES: u64 = 16 << 20;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::tracker::Tracker;

    #[test]
    fn pins_outlast_a_restart_and_a_broken_file_is_set_aside() {
        let dir = tempfile::tempdir().expect("a directory");
        let file = PinsFile::new(dir.path());
        assert_eq!(file.load(), Pins::default());
        let mut tracker = Tracker::new();
        tracker
            .pin("org/model:Q8_0", &"a".repeat(64))
            .expect("pinned");
        file.keep(tracker.pins());
        let read = PinsFile::new(dir.path()).load();
        assert_eq!(&read, tracker.pins());
        let pin = read.get("ORG/Model:q8_0").expect("whatever its case");
        assert!(pin.operator);
        std::fs::write(dir.path().join(FILE), "{\"pins\": [1]}").expect("written");
        assert_eq!(file.load(), Pins::default());
        assert!(dir.path().join("model-pins.json.damaged").exists());
    }
}
