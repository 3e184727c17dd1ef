//! The plan of a booting machine: its role, the missing settings, and help for a person.

use std::fmt;
use std::path::{Path, PathBuf};

use mesh_model::gguf::split;
use mesh_model::image::is_image_model;

use super::choice::{Backend, Choice, Wish, choose};
use super::join::{HeadAddress, JoinError, Role, SettingSource, Settings, Token, command_line_has};
use crate::hardware::Hardware;

/// Input of a plan besides the hardware.
#[derive(Debug, Clone, Default)]
pub struct BootInputs {
    /// Settings typed by a person, as `key=value` lines.
    pub typed: Option<String>,
    /// The kernel's command line.
    pub command_line: String,
    /// Mount point of the partition, if there is one.
    pub partition: Option<PathBuf>,
    /// Folder of the services' state, where it outlives a restart.
    pub state: Option<PathBuf>,
    /// Backends that the machine has programs for; `None` is all.
    pub backends: Option<Vec<Backend>>,
    /// Its workers have libtorch, and so make images.
    pub makes_images: bool,
}

/// Role and settings of a booting machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// Role in the mesh.
    pub role: Role,
    /// The chosen backend with its reason.
    pub choice: Choice,
    /// The head's address and its origin.
    pub head: Option<(HeadAddress, SettingSource)>,
    /// The join token and its origin.
    pub token: Option<(Token, SettingSource)>,
    /// Public key that may log in over ssh.
    pub ssh_key: Option<String>,
    /// Name of this node.
    pub name: Option<String>,
    /// Keyboard layout of the consoles.
    pub keymap: Option<String>,
    /// Model files of the partition, to serve whole.
    pub models: Vec<PathBuf>,
    /// Model files of the partition, to hold layers of together with other workers.
    pub ring_models: Vec<PathBuf>,
    /// Models of the partition to make images with.
    pub image_models: Vec<PathBuf>,
    /// The same, where no worker of this machine makes images.
    pub unused_image_models: Vec<PathBuf>,
    /// True if the worker has a certificate from an earlier boot, and so needs no token.
    pub joined: bool,
    /// Mistakes in ignored sources.
    pub mistakes: Vec<(SettingSource, JoinError)>,
}

/// A missing setting without which a role cannot start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Missing {
    /// The head's address is missing.
    Head,
    /// The join token is missing.
    Token,
    /// The worker has no models, neither whole nor in a ring.
    Model,
}

impl Plan {
    /// Combines the hardware and the settings of all sources.
    pub fn new(hardware: &Hardware, told: &BootInputs) -> Self {
        let mut mistakes = Vec::new();
        let mut read = |source, settings: Result<Settings, JoinError>| {
            let settings = settings.unwrap_or_else(|mistake| {
                mistakes.push((source, mistake));
                Settings::default()
            });
            (source, settings)
        };
        let typed = told.typed.as_deref().unwrap_or_default();
        // The first that says something wins.
        let command_line = Settings::from_command_line(&told.command_line);
        let partition = told.partition.as_deref();
        let on_partition =
            partition.map_or_else(|| Ok(Settings::default()), Settings::from_partition);
        let sources = [
            read(SettingSource::Console, Settings::from_lines(typed)),
            read(SettingSource::CommandLine, command_line),
            read(SettingSource::Partition, on_partition),
        ];
        let files = |name, is_model: fn(&Path) -> bool| {
            partition.map_or_else(Vec::new, |partition| {
                models(&partition.join(name), is_model)
            })
        };
        let folder = |name| files(name, is_gguf);
        let of_images = files(IMAGES, is_image_model);
        let (image_models, unused_image_models) = match told.makes_images {
            true => (of_images, Vec::new()),
            false => (Vec::new(), of_images),
        };
        let mut ring_models = [folder(RING), folder(OLD_RING)].concat();
        ring_models.truncate(MOST_MODELS);
        let backends = told.backends.as_ref();
        let without = |backend| backends.is_some_and(|backends| !backends.contains(&backend));
        let wish = Wish {
            backend: first(&sources, |settings| settings.backend).and_then(|(backend, _)| backend),
            nomodeset: command_line_has(&told.command_line, "nomodeset"),
            nvidia_legacy: command_line_has(&told.command_line, "hydramesh.nvidia_legacy"),
            without_nvidia: without(Backend::Nvidia),
            without_rocm: without(Backend::Rocm),
            without_webgpu: without(Backend::WebGpu),
        };
        let state = told.state.as_deref();
        let role = first(&sources, |settings| settings.role);
        Self {
            role: role.map(|(role, _)| role).unwrap_or_default(),
            choice: choose(hardware, wish),
            head: first(&sources, |settings| settings.head.clone()),
            token: first(&sources, |settings| settings.token.clone()),
            ssh_key: first(&sources, |settings| settings.ssh_key.clone()).map(|(key, _)| key),
            name: first(&sources, |settings| settings.name.clone()).map(|(name, _)| name),
            keymap: first(&sources, |settings| settings.keymap.clone()).map(|(keymap, _)| keymap),
            models: folder(MODELS),
            ring_models,
            image_models,
            unused_image_models,
            joined: state.is_some_and(|state| state.join(CERTIFICATE).is_file()),
            mistakes,
        }
    }

    /// The missing settings without which the role cannot start.
    pub fn missing(&self) -> Vec<Missing> {
        let worker = self.role == Role::Worker;
        let no_model =
            self.models.is_empty() && self.ring_models.is_empty() && self.image_models.is_empty();
        let wanted = [
            (
                Missing::Head,
                self.role != Role::Head && self.head.is_none(),
            ),
            (
                Missing::Token,
                worker && self.token.is_none() && !self.joined,
            ),
            (Missing::Model, worker && no_model),
        ];
        let missing = wanted.into_iter().filter(|(_, missing)| *missing);
        missing.map(|(what, _)| what).collect()
    }

    /// Environment variables that configure the role's service: names and values.
    pub fn environment(&self) -> Vec<(String, String)> {
        let mut variables = Vec::new();
        let mut set = |name: &str, value: String| variables.push((name.to_owned(), value));
        match self.role {
            Role::Worker => {
                if let Some((head, _)) = &self.head {
                    set("HYDRAMESH_WORKER__HEAD", head.to_string());
                }
                if let Some(name) = &self.name {
                    set("HYDRAMESH_WORKER__NODE_NAME", name.clone());
                }
                let paths =
                    |files: &[PathBuf]| list(files.iter().map(|path| path.display().to_string()));
                let whole = [&self.models[..], &self.image_models].concat();
                // With models of rings alone the list of models is set to empty, which the image's own configuration
                // cannot know.
                if !whole.is_empty() || !self.ring_models.is_empty() {
                    set("HYDRAMESH_WORKER__MODELS", paths(&whole));
                }
                if !self.ring_models.is_empty() {
                    set("HYDRAMESH_WORKER__RING__MODELS", paths(&self.ring_models));
                }
            }
            Role::Head => {
                if let Some(name) = &self.name {
                    set("HYDRAMESH_HEAD__MESH_NAME", name.clone());
                }
            }
            Role::Shim => {
                if let Some((head, _)) = self.head.clone() {
                    let (host, port) = (head.host, CLIENT_PORT);
                    let clients = HeadAddress { host, port }.to_string();
                    set("HYDRAMESH_SHIM__HEADS", list([clients].into_iter()));
                }
            }
        }
        variables
    }
}

/// The plan as text for a person at the machine.
impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "Role: {}", self.role)?;
        // Heads and shims do not compute.
        if self.role == Role::Worker {
            let Choice {
                backend, reason, ..
            } = &self.choice;
            writeln!(f, "Backend: {backend}, since {reason}.")?;
            for left_out in &self.choice.left_out {
                writeln!(f, "  not used: {}: {}", left_out.gpu, left_out.why)?;
            }
        }
        if let Some((head, source)) = self.head.as_ref().filter(|_| self.role != Role::Head) {
            writeln!(f, "Head: {head} ({source})")?;
        }
        if self.role == Role::Worker {
            match &self.token {
                Some((_, source)) => writeln!(f, "Join token: given ({source})")?,
                None if self.joined => writeln!(f, "Join token: not needed, it has joined before")?,
                None => {}
            }
            for (what, files) in [
                ("Models", &self.models),
                ("Models held in parts", &self.ring_models),
                ("Models for images", &self.image_models),
                (
                    "Not used, since this image has no programs that make images (iso-nvidia and iso-all have them)",
                    &self.unused_image_models,
                ),
            ] {
                let names = files.iter().filter_map(|path| path.file_name());
                let names: Vec<_> = names.map(|name| name.to_string_lossy()).collect();
                if !names.is_empty() {
                    writeln!(f, "{what}: {}", names.join(", "))?;
                }
            }
        }
        for (source, mistake) in &self.mistakes {
            writeln!(f, "Not used, {source}: {mistake}")?;
        }
        for missing in self.missing() {
            writeln!(f, "Missing: {missing}")?;
        }
        Ok(())
    }
}

/// The missing setting with its remedy.
impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Head => {
                "the head's address. Type it here, boot with hydramesh.head=HOST:7780, or write head = \"HOST:7780\" into \
                 hydramesh.toml on a partition labelled HYDRAMESH."
            }
            Self::Token => {
                "a join token. On the head, `hydramesh token create` prints one: type it here, boot with \
                 hydramesh.token=TOKEN, or put it into the file join-token on a partition labelled HYDRAMESH."
            }
            Self::Model => {
                "a model. Put a .gguf file into the folder models on a partition labelled HYDRAMESH (into ring, to hold a part of it \
                 together with other workers; a model for images into images), attach it, and look again."
            }
        })
    }
}

fn first<T>(
    sources: &[(SettingSource, Settings)],
    field: impl Fn(&Settings) -> Option<T>,
) -> Option<(T, SettingSource)> {
    sources
        .iter()
        .find_map(|(source, settings)| Some((field(settings)?, *source)))
}

/// Models in a folder, by name, the first part for all of a split file; those whose names would need quoting are
/// not taken.
fn models(dir: &Path, is_model: fn(&Path) -> bool) -> Vec<PathBuf> {
    let plain = |c: char| c.is_ascii_alphanumeric() || " ._-+()".contains(c);
    let Ok(entries) = std::fs::read_dir(dir) else {
        return Vec::new();
    };
    let mut paths: Vec<PathBuf> = entries
        .flatten()
        .filter(|entry| {
            let name = entry.file_name();
            let name = name.to_string_lossy();
            // macOS leaves files named ._x beside each x on foreign disks.
            !name.starts_with('.') && name.chars().all(plain) && is_model(&entry.path())
        })
        .map(|entry| entry.path())
        .filter(|path| split::find(path).is_none_or(|first| first == *path))
        .collect();
    paths.sort();
    paths.truncate(MOST_MODELS);
    paths
}

fn is_gguf(path: &Path) -> bool {
    let extension = path.extension().and_then(|extension| extension.to_str());
    extension.is_some_and(|extension| extension.eq_ignore_ascii_case("gguf")) && path.is_file()
}

/// A TOML array of strings that need no escapes.
fn list(items: impl Iterator<Item = String>) -> String {
    let quoted: Vec<String> = items.map(|item| format!("\"{item}\"")).collect();
    format!("[{}]", quoted.join(", "))
}

impl Backend {
    /// Name of the worker's marker in the run folder.
    pub fn worker_marker(self) -> String {
        format!("role-worker-{self}")
    }
}

/// The worker's certificate below the state folder; it exists once the worker has joined.
const CERTIFICATE: &str = "worker/node.crt";
/// Folder of the partition with models to serve whole.
const MODELS: &str = "models";
/// Folder of the partition with models to hold layers of.
const RING: &str = "ring";
/// Its old name.
const OLD_RING: &str = "shards";
/// Folder of the partition with models to make images with.
const IMAGES: &str = "images";
const MOST_MODELS: usize = 16;
/// The head's port for DCF clients and shims.
const CLIENT_PORT: u16 = 7777;
