//! File of the pins of model names. The file is read at the start and written whenever a name is pinned or
//! released.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};

use mesh_api::Pin;
use mesh_control::tracker::Pins;

use crate::locks::lock;

#[derive(Debug, Default, Serialize, Deserialize)]
struct Saved {
    pins: Vec<Pin>,
}

/// The file, and the next content to write to it.
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

    /// Reads the pins from the file. A damaged file is set aside, not written over: what it pinned would be
    /// forgotten otherwise.
    ///
    /// # Errors
    /// If the file cannot be read, or not be set aside. What is in it may be sound.
    pub(crate) fn load(&self) -> io::Result<Pins> {
        let text = self.read().map_err(|error| self.unusable(&error))?;
        match parse(text.as_deref()) {
            Ok(kept) => Ok(Pins::of(kept.pins)),
            Err(error) => {
                let aside = self.path.with_extension("json.damaged");
                std::fs::rename(&self.path, &aside).map_err(|error| self.unusable(&error))?;
                tracing::error!(
                    path = %self.path.display(),
                    error,
                    "pins of models' names cannot be read: names are pinned again as models are got; look at {} and pin what was there with \
                     `hydramesh models pins set`",
                    aside.display()
                );
                Ok(Pins::default())
            }
        }
    }

    /// Reads the file, or enough of it to see that it is too long. `None` if it is not there.
    fn read(&self) -> io::Result<Option<Vec<u8>>> {
        let file = match File::open(&self.path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let mut text = Vec::new();
        file.take(MOST_BYTES + 1).read_to_end(&mut text)?;
        Ok(Some(text))
    }

    fn unusable(&self, error: &io::Error) -> io::Error {
        let path = self.path.display();
        let text = format!(
            "the pins of models' names in {path} cannot be read: {error}; give the head's user the file, or move it away to pin anew"
        );
        io::Error::new(error.kind(), text)
    }

    /// Writes the pins soon, in the background; the latest ones win.
    pub(crate) fn keep(&self, pins: &Pins) {
        *lock(&self.next) = Some(pins.list().cloned().collect());
        let file = self.clone();
        let write = move || {
            let _one = lock(&file.writing);
            let Some(pins) = lock(&file.next).take() else {
                return;
            };
            let written = serde_json::to_vec_pretty(&Saved { pins })
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

fn parse(text: Option<&[u8]>) -> Result<Saved, String> {
    match text {
        None => Ok(Saved::default()),
        Some(text) if text.len() as u64 > MOST_BYTES => {
            Err(format!("it has over {MOST_BYTES} bytes"))
        }
        Some(text) => serde_json::from_slice(text).map_err(|error| error.to_string()),
    }
}

/// In the state directory.
const FILE: &str = "model-pins.json";
/// More than as many pins as there may be have.
const MOST_BYTES: u64 = 16 << 20;

#[cfg(test)]
mod tests {
    use super::*;
    use mesh_control::tracker::Tracker;

    #[test]
    fn pins_outlast_a_restart_and_a_broken_file_is_set_aside() {
        let dir = tempfile::tempdir().expect("a directory");
        let file = PinsFile::new(dir.path());
        assert_eq!(file.load().expect("none"), Pins::default());
        let mut tracker = Tracker::new();
        tracker
            .pin("org/model:Q8_0", &"a".repeat(64))
            .expect("pinned");
        file.keep(tracker.pins());
        let read = PinsFile::new(dir.path()).load().expect("read");
        assert_eq!(&read, tracker.pins());
        let pin = read.get("ORG/Model:q8_0").expect("whatever its case");
        assert!(pin.operator);
        std::fs::write(dir.path().join(FILE), "{\"pins\": [1]}").expect("written");
        assert_eq!(file.load().expect("set aside"), Pins::default());
        assert!(dir.path().join("model-pins.json.damaged").exists());
    }

    #[test]
    fn pins_of_a_later_version_and_a_disk_that_fails_lose_nothing() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join(FILE);
        let a = "a".repeat(64);
        let pin =
            format!(r#"{{"name":"m","fingerprint":"{a}","worker":"","operator":true,"later":1}}"#);
        std::fs::write(&path, format!(r#"{{"pins":[{pin}],"later":2}}"#)).expect("written");
        let file = PinsFile::new(dir.path());
        assert!(file.load().expect("read").get("m").is_some());
        // Something that cannot be read, for whatever reason, is not moved away.
        std::fs::remove_file(&path).expect("removed");
        std::fs::create_dir(&path).expect("made");
        let error = file.load().expect_err("unreadable").to_string();
        assert!(error.contains(FILE) && path.is_dir(), "{error}");
    }
}
