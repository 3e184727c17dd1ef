//! `hydramesh models`.

use std::path::PathBuf;

use clap::{Subcommand, ValueHint};

use mesh_base::units;

use super::PullArgs;

/// Where models are looked for.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct PlacesArgs {
    /// Folders with models, where names are looked up [default: .cache/models and local-models]
    #[arg(long = "dir", value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub dirs: Vec<PathBuf>,

    /// The store's folder [default: ~/.local/share/hydramesh/models]
    #[arg(long, value_name = "DIR", env = "HYDRAMESH_STORE", value_hint = ValueHint::DirPath)]
    pub store: Option<PathBuf>,
}

/// What to do with models.
#[derive(Debug, Subcommand)]
pub enum ModelsCommand {
    /// Fetch a model from the Hugging Face hub into the store
    Pull(PullArgs),
    /// List the models in folders and in the store: how much of each is here, who signed it, when it was used
    #[command(after_help = "\
PRESENT is how much of a model's bytes is on this machine: a worker that computes some layers holds only what those need. LOADED \
models are in use by a process and stay.

Examples:
  hydramesh models list
  hydramesh models list ~/models
  hydramesh models list --store /var/lib/hydramesh/worker/store --json")]
    List {
        /// Folders to look in [default: .cache/models and local-models]
        #[arg(value_name = "DIR", value_hint = ValueHint::DirPath)]
        dirs: Vec<PathBuf>,
        /// The store's folder [default: ~/.local/share/hydramesh/models]
        #[arg(long, value_name = "DIR", env = "HYDRAMESH_STORE", value_hint = ValueHint::DirPath)]
        store: Option<PathBuf>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Show what a name means and what the model is: architecture, size, context, pieces here, signatures
    #[command(after_help = "\
A name is a path; a model's name in a folder or in the store, or its beginning; the beginning of a fingerprint; a short name such as \
qwen2.5:7b; or a name on the hub, ORGANISATION/MODEL with @REVISION, :QUANTISATION or :FILE behind it.

Examples:
  hydramesh models show smollm2
  hydramesh models show qwen2.5:7b
  hydramesh models show bartowski/Qwen2.5-7B-Instruct-GGUF:Q4_K_M")]
    Show {
        /// What to show
        #[arg(value_name = "MODEL", value_hint = ValueHint::FilePath)]
        model: String,
        #[command(flatten)]
        places: PlacesArgs,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Check that a model is whole: every piece that is here, and its signatures
    #[command(after_help = "\
A model in the store is compared piece by piece with its manifest. A file elsewhere is hashed, and opened as a worker would. The exit \
code is 1 where something is not as it should be, and what it is is named.

Examples:
  hydramesh models verify qwen3-8b
  hydramesh models verify model.gguf --sha256 b179c95…
  hydramesh models verify qwen3-8b --trusted-key operator.pem.pub --require-signature")]
    Verify(VerifyArgs),
    /// Remove a model from the store; files that another model has, too, stay
    #[command(after_help = "\
A model that a process has loaded is not removed. Files outside the store are yours; remove them yourself.

Example:
  hydramesh models rm qwen3-8b")]
    Rm {
        /// What to remove
        #[arg(value_name = "MODEL")]
        model: String,
        /// The store's folder [default: ~/.local/share/hydramesh/models]
        #[arg(long, value_name = "DIR", env = "HYDRAMESH_STORE", value_hint = ValueHint::DirPath)]
        store: Option<PathBuf>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Remove from the store what nobody needs: leftovers of crashes, and with --limit models that were not used for longest
    #[command(after_help = "\
What is loaded or being fetched stays, whatever the limit.

Examples:
  hydramesh models gc --dry-run
  hydramesh models gc --limit 50GB")]
    Gc {
        /// Most that the store may take afterwards, such as 50GB or 20GiB
        #[arg(long, value_name = "SIZE", value_parser = units::parse_bytes)]
        limit: Option<u64>,
        /// Only say what would be removed
        #[arg(long)]
        dry_run: bool,
        /// The store's folder [default: ~/.local/share/hydramesh/models]
        #[arg(long, value_name = "DIR", env = "HYDRAMESH_STORE", value_hint = ValueHint::DirPath)]
        store: Option<PathBuf>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Sign a model's manifest with the operator's key, for meshes that require signatures
    #[command(after_help = "\
The manifest names every file with its SHA-256, so that the signature covers all bytes of the model. It is kept in the store, beside the \
manifest; workers pass both on. A model outside the store is read once for that, and stays where it is.

Examples:
  hydramesh models sign qwen3-8b --key operator.pem
  hydramesh models sign model.gguf --key operator.pem --store /var/lib/hydramesh/worker/store")]
    Sign {
        /// What to sign
        #[arg(value_name = "MODEL", value_hint = ValueHint::FilePath)]
        model: String,
        /// File with the private key, as `hydramesh models key` makes it
        #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
        key: PathBuf,
        #[command(flatten)]
        places: PlacesArgs,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Make the operator's key for signing models: a private file, and beside it the public one for the nodes
    #[command(after_help = "\
The key is an ML-DSA-65 key (FIPS 204) in PEM. Keep FILE off the nodes; give them FILE with .pub behind it, as `store.trusted_keys`.

Example:
  hydramesh models key operator.pem     # writes operator.pem and operator.pem.pub")]
    Key {
        /// The private key's file, which must not exist yet
        #[arg(value_name = "FILE", value_hint = ValueHint::FilePath)]
        file: PathBuf,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Show and decide what models' names mean in the mesh
    #[command(after_help = "\
The first model that a worker gets under a name keeps it in this mesh. Workers that can ask the hub, or have a signature, go by those; \
all others go by the pin. Needs the head's admin key.

Examples:
  hydramesh models pins
  hydramesh models pins set Qwen/Qwen3-0.6B-GGUF:Q8_0 2f1c…
  hydramesh models pins release Qwen/Qwen3-0.6B-GGUF:Q8_0")]
    Pins {
        /// What to do; without it, list them.
        #[command(subcommand)]
        command: Option<PinsCommand>,
        /// Print the head's own JSON
        #[arg(long, global = true)]
        json: bool,
    },
}

#[derive(Debug, clap::Args)]
pub struct VerifyArgs {
    /// What to check
    #[arg(value_name = "MODEL", value_hint = ValueHint::FilePath)]
    pub model: String,
    #[command(flatten)]
    pub places: PlacesArgs,
    /// The SHA-256 that the file should have, in hex
    #[arg(long, value_name = "HEX")]
    pub sha256: Option<String>,
    /// File with a public key whose signatures count (may be repeated)
    #[arg(long = "trusted-key", value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub trusted_keys: Vec<PathBuf>,
    /// Fail if no trusted key signed it
    #[arg(long, requires = "trusted_keys")]
    pub require_signature: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Subcommand)]
pub enum PinsCommand {
    /// List the names that are pinned, and those that several models claim
    List,
    /// Decide which model a name means, whoever claims it
    Set {
        /// The name, as workers ask for it
        #[arg(value_name = "NAME")]
        name: String,
        /// The model's fingerprint, as `hydramesh models show` tells it
        #[arg(value_name = "FINGERPRINT")]
        fingerprint: String,
    },
    /// Let a name mean again what is got under it next
    Release {
        /// The name
        #[arg(value_name = "NAME")]
        name: String,
    },
}
