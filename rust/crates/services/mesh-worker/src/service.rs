//! The worker as a program: its flags, names of keys, subcommands, and start.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::Result;
use clap::Subcommand;
use mesh_net::trust;
use mesh_service::config::Loader;
use mesh_service::service::{Context, Running, Service};
use tokio::runtime::Builder;

use crate::config::Config;
use crate::templates::{self, Templates};
use crate::worker::{Live, Worker};

/// The worker's flags.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct Flags {
    /// The head's QUIC address
    #[arg(long, value_name = "HOST:PORT")]
    head: Option<String>,

    /// File with the join token, needed until this worker has joined
    #[arg(long, value_name = "FILE")]
    join_token_file: Option<PathBuf>,

    /// Model to serve: a file, a folder, or a name in the model folders, the mesh or the hub (may be repeated)
    #[arg(long = "model", value_name = "MODEL")]
    models: Vec<String>,

    /// Model of which to hold a range of layers, as the head decides (may be repeated)
    #[arg(long = "ring-model", value_name = "MODEL")]
    ring_models: Vec<String>,

    /// The same: the old name
    #[arg(long = "shard", value_name = "MODEL", hide = true)]
    shards: Vec<String>,

    /// Address for other workers, QUIC [default: [::]:7781]
    #[arg(long, value_name = "ADDRESS:PORT")]
    ring: Option<SocketAddr>,

    /// Threads that compute; 0 is one per core
    #[arg(long, value_name = "N")]
    threads: Option<usize>,

    /// Most memory of the GPU for weights and KV cache, such as 6GiB; the other layers run on the CPU
    #[arg(long, value_name = "SIZE")]
    vram_limit: Option<String>,

    /// Where to take plain DCF tasks, UDP [default: [::]:7779]
    #[arg(long, value_name = "ADDRESS:PORT")]
    dcf: Option<SocketAddr>,
}

/// The worker's subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Set this worker's identity aside, so that it joins with a new token as another one: for a machine
    /// whose state directory was copied from another worker's. Stop the worker first
    NewIdentity,
    /// This worker's ML-DSA identity
    Identity {
        /// What to do.
        #[command(subcommand)]
        command: IdentityCommand,
    },
    /// What the worker starts to run chat templates in
    #[command(name = templates::COMMAND, hide = true)]
    RenderTemplates,
}

/// Subcommands about the identity.
#[derive(Debug, Subcommand)]
pub enum IdentityCommand {
    /// Print the node id, and what the mesh root says of it
    Show,
    /// Make a new key, which takes the place of the old one at the next start: for a key that somebody may
    /// have copied
    Rotate,
}

impl Service for Worker {
    const PROGRAM: &'static str = "mesh-worker";
    const ABOUT: &'static str =
        "A HydraMesh worker: loads models and answers what the head gives it";
    const LIVE_KEYS: &'static [&'static str] = &Live::KEYS;
    type Config = Config;
    type Flags = Flags;
    type Command = Command;

    fn layers(loader: Loader<Config>, flags: &Flags) -> Loader<Config> {
        let token_file = flags.join_token_file.as_ref().map(|path| path.display());
        // The list goes through text like every flag; commas separate.
        let list = |names: &[String]| (!names.is_empty()).then(|| names.join(","));
        loader
            .env("TORCH_DEVICE", "backend")
            .env("SD_MODEL_ID", "images.model")
            .env("LOCAL_MODEL_PATH", "images.model_path")
            .env("SD_INFERENCE_STEPS", "images.steps")
            .env("SD_GUIDANCE_SCALE", "images.guidance")
            .env("DCF_HEALTH_PORT", "http.listen:port")
            .flag("--head", "head", flags.head.as_ref())
            .flag("--join-token-file", "join_token_file", token_file)
            .flag("--model", "models", list(&flags.models))
            .renamed("shards", "ring.models")
            .old_flag(
                "--shard",
                "--ring-model",
                "ring.models",
                list(&flags.shards),
            )
            .flag("--ring-model", "ring.models", list(&flags.ring_models))
            .flag("--ring", "ring.listen", flags.ring)
            .flag("--threads", "threads", flags.threads)
            .flag("--vram-limit", "vram_limit", flags.vram_limit.as_ref())
            .flag("--dcf", "dcf.listen", flags.dcf)
    }

    fn check(config: &Config) -> Result<()> {
        Ok(config.check()?)
    }

    fn command(command: Command, config: impl FnOnce() -> Result<Config>) -> Result<()> {
        match command {
            Command::RenderTemplates => {
                Ok(templates::serve(io::stdin().lock(), io::stdout().lock())?)
            }
            Command::Identity { command } => {
                let state_dir = config()?.state_dir;
                let text = match command {
                    IdentityCommand::Show => trust::describe_identity(&state_dir)?,
                    IdentityCommand::Rotate => {
                        trust::rotate_and_describe(&state_dir, Self::PROGRAM)?
                    }
                };
                print!("{text}");
                Ok(())
            }
            Command::NewIdentity => {
                let state_dir = config()?.state_dir;
                match trust::set_aside(&state_dir)? {
                    Some(folder) => println!(
                        "The old identity is in {} now. Give this worker a token from `hydramesh token create` and start it.",
                        folder.display()
                    ),
                    None => println!("{} holds no identity.", state_dir.display()),
                }
                Ok(())
            }
        }
    }

    /// Engines bring their own threads; these only carry messages.
    fn runtime() -> Builder {
        let mut builder = Builder::new_multi_thread();
        builder.worker_threads(2);
        builder
    }

    async fn start(config: Config, context: Context) -> Result<Running<Config>> {
        let templates = Templates::apart(std::env::current_exe()?);
        let worker = Worker::start_with(
            config.with_image_model(),
            templates,
            context.shutdown,
            context.watchdog,
        )
        .await?;
        let live = worker.live().clone();
        Ok(Running::new(
            worker.addresses().clone(),
            move |fresh, report| live.reload(fresh, report),
            async { Ok(worker.wait().await?) },
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_of_gpu_memory_comes_from_a_flag_or_the_environment() {
        let limit = |flag: Option<&str>, variables: &[(&str, &str)]| {
            let flags = Flags {
                vram_limit: flag.map(str::to_owned),
                ..Flags::default()
            };
            let loader = Worker::layers(Loader::new("worker"), &flags);
            let loaded = loader.environment(variables.to_vec()).load();
            loaded.map(|loaded| loaded.value.vram_limit)
        };
        let variable = [("HYDRAMESH_WORKER__VRAM_LIMIT", "2GiB")];
        assert_eq!(limit(None, &[]).unwrap(), None);
        assert_eq!(limit(None, &variable).unwrap(), Some(2 << 30));
        assert_eq!(limit(Some("512MiB"), &variable).unwrap(), Some(512 << 20));
        let error = limit(Some("much"), &[]).unwrap_err().to_string();
        assert!(
            error.contains("--vram-limit") && error.contains("much"),
            "{error}"
        );
    }

    #[test]
    fn models_of_rings_may_be_named_under_old_names() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("worker.toml");
        std::fs::write(&path, "shards = [\"a\"]\n[ring]\nformat = \"int4\"\n").unwrap();
        let load = |flags: &Flags, variables: &[(&str, &str)]| {
            let loader = Worker::layers(Loader::new("worker"), flags).file(&path);
            loader.environment(variables.to_vec()).load().unwrap()
        };
        let by_file = load(&Flags::default(), &[]);
        assert_eq!(by_file.value.ring.models, ["a"]);
        assert_eq!(by_file.warnings.len(), 1, "{:?}", by_file.warnings);
        let variable = ("HYDRAMESH_WORKER__SHARDS", "b,c");
        let by_variable = load(&Flags::default(), &[variable]);
        assert_eq!(by_variable.value.ring.models, ["b", "c"]);
        let flags = Flags {
            shards: vec!["d".into()],
            ..Flags::default()
        };
        let by_flag = load(&flags, &[variable]);
        assert_eq!(by_flag.value.ring.models, ["d"]);
        assert_eq!(
            by_flag.warnings[0],
            "--shard is an old name: use --ring-model"
        );
        let flags = Flags {
            ring_models: vec!["e".into()],
            ..flags
        };
        assert_eq!(load(&flags, &[]).value.ring.models, ["e"]);
    }
}
