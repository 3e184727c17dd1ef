//! The command line: options, arguments and subcommands.

mod audit;
mod keys;
mod members;
mod models;
mod pull;

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Parser, Subcommand, ValueEnum, ValueHint};
use clap_complete::Shell;
use mesh_base::units;
use mesh_machine::boot::choice::{Backend, Wish};

pub(crate) use audit::{AuditCommand, TrailArgs};
pub(crate) use keys::{DelegateArgs, KeysCommand};
pub(crate) use members::{
    DrainArgs, IdentityCommand, IntermediateCommand, NodesCommand, RebalanceArgs, RootCommand,
    TokenCommand, UndrainArgs,
};
pub(crate) use models::{ModelsCommand, PinsCommand, PlacesArgs, VerifyArgs};
pub(crate) use pull::PullArgs;

const EXIT_CODES: &str = "\
Exit codes:
    0  done
    1  failed
    2  the arguments or the request make no sense
    3  the mesh cannot be reached
    4  no worker, all workers busy, or no such model, node or token
    5  no answer in time
    6  missing or insufficient key
  130  interrupted with Ctrl-C";

/// One inference mesh out of the machines you have.
#[derive(Debug, Parser)]
#[command(
    name = "hydramesh",
    version,
    propagate_version = true,
    max_term_width = 100,
    after_help = format!("Start with `hydramesh demo`.\n\n{EXIT_CODES}")
)]
pub struct Args {
    /// When to use colour
    #[arg(long, global = true, value_enum, default_value_t, value_name = "WHEN")]
    pub color: Color,

    /// Address and keys of the head.
    #[command(flatten)]
    pub head: HeadArgs,

    /// The command to run.
    #[command(subcommand)]
    pub command: Command,
}

/// When to use colour.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum Color {
    /// On a terminal, unless NO_COLOR is set.
    #[default]
    Auto,
    /// Always.
    Always,
    /// Never.
    Never,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Start a mesh on this machine, ask a model that several workers hold, kill one in mid-answer, see the answer arrive
    Demo(DemoArgs),
    /// Ask one question
    Ask(AskArgs),
    /// Turn texts into vectors with an embedding model
    Embed(EmbedArgs),
    /// Make an image of a text
    Image(ImageArgs),
    /// Talk: a conversation in the terminal
    Chat(ChatArgs),
    /// Show the mesh: its workers and rings, their models, load and speed
    Status(StatusArgs),
    /// Show which workers would hold which layers of a model, and why not others
    Plan(PlanArgs),
    /// Take a worker out of service: its parts of rings move elsewhere first
    Drain(DrainArgs),
    /// Put a drained worker back into service
    Undrain(UndrainArgs),
    /// Replace rings by better ones, where the mesh has changed
    Rebalance(RebalanceArgs),
    /// Models on this machine: what there is, whether it is whole and signed, what may go
    #[command(subcommand)]
    Models(ModelsCommand),
    /// Show the mesh's nodes, throw one out, let it in again
    #[command(subcommand)]
    Nodes(NodesCommand),
    /// Show or rotate the ML-DSA identity of a node on this machine
    #[command(subcommand)]
    Identity(IdentityCommand),
    /// Show or rotate the mesh root, which issues all certificates
    #[command(subcommand)]
    Root(RootCommand),
    /// Make, show and withdraw join tokens for new workers; inspect and narrow tokens of any kind
    #[command(subcommand)]
    Token(TokenCommand),
    /// Issue, show and revoke curtain tokens: rights of clients for a limited time
    #[command(subcommand)]
    Keys(KeysCommand),
    /// The audit trail: verify it, show records, export it, prove a record
    #[command(subcommand)]
    Audit(AuditCommand),
    /// Measure: a model file on this machine, or a running mesh
    Bench(BenchArgs),
    /// Look at this machine's hardware, and say which backend fits it and why
    Probe(ProbeArgs),
    /// Measure this machine: memory, disk, GPUs, and how fast it runs a model's layers
    Profile(ProfileArgs),
    /// Decide what a live image does: reads the kernel command line and a partition, writes a folder for the units
    BootConfig(BootConfigArgs),
    /// Print completions for a shell
    #[command(
        after_help = "Example:\n  hydramesh completions bash > ~/.local/share/bash-completion/completions/hydramesh"
    )]
    Completions {
        /// The shell
        shell: Shell,
    },
}

#[derive(Debug, clap::Args)]
#[command(after_help = "\
A head, a shim and six workers start as processes of their own on loopback, on free ports. Three workers hold a part of the \
model's layers each, the others stand by. One question goes over DCF/UDP through the shim, one over HTTP. While the second \
answer arrives, a worker that holds layers is killed; the answer goes on, and is compared with an undisturbed one.

Examples:
  hydramesh demo
  hydramesh demo --keep          # leave it running, and print how to talk to it
  hydramesh demo --image --model /srv/models/stable-diffusion-v1-5")]
pub struct DemoArgs {
    /// Leave the mesh running until Ctrl-C
    #[arg(long)]
    pub keep: bool,

    /// Show an image instead: its worker is killed in the middle, and another one finishes it (wants workers with libtorch)
    #[arg(long, conflicts_with = "keep")]
    pub image: bool,

    /// Folder with the model and ONNX Runtime, as `make fetch` fills it
    #[arg(long, value_name = "DIR", env = "HYDRAMESH_CACHE", default_value = ".cache", value_hint = ValueHint::DirPath)]
    pub cache: PathBuf,

    /// Model file to serve instead of the one in the cache
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub model: Option<PathBuf>,
}

/// Where a head is and what it wants to see. These may stand before the command, too.
#[derive(Debug, Clone, Default, clap::Args)]
#[command(next_help_heading = "The head")]
pub struct HeadArgs {
    /// The head's HTTP address [default: http://127.0.0.1:8080]
    #[arg(long, global = true, value_name = "URL", env = "HYDRAMESH_URL", value_hint = ValueHint::Url)]
    pub url: Option<String>,

    /// PEM file with the authority of the head's HTTPS certificate [default: those that this machine trusts]
    #[arg(long, global = true, value_name = "FILE", env = "HYDRAMESH_CA_FILE", value_hint = ValueHint::FilePath)]
    pub ca_file: Option<PathBuf>,

    /// File with an API key, where the head wants one
    #[arg(long, global = true, value_name = "FILE", env = "HYDRAMESH_API_KEY_FILE", value_hint = ValueHint::FilePath)]
    pub api_key_file: Option<PathBuf>,

    /// File with the head's admin key, for plan, drain, undrain, rebalance, nodes, root, token and models
    /// pins [default: admin.key in the head's state folder]
    #[arg(long, global = true, value_name = "FILE", env = "HYDRAMESH_ADMIN_KEY_FILE", value_hint = ValueHint::FilePath)]
    pub admin_key_file: Option<PathBuf>,

    /// The head's state folder, where its admin key lies [default: /var/lib/hydramesh/head]
    #[arg(long, global = true, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub state_dir: Option<PathBuf>,
}

impl HeadArgs {
    /// The head's HTTP address.
    pub fn url(&self) -> &str {
        self.url.as_deref().unwrap_or("http://127.0.0.1:8080")
    }

    /// The head's state folder.
    pub fn state_dir(&self) -> &Path {
        let folder = self.state_dir.as_deref();
        folder.unwrap_or(Path::new("/var/lib/hydramesh/head"))
    }

    /// The head's admin key.
    pub fn admin_key(&self) -> PathBuf {
        let named = self.admin_key_file.clone();
        named.unwrap_or_else(|| self.state_dir().join("admin.key"))
    }
}

/// How an answer is made.
#[derive(Debug, Clone, clap::Args)]
pub struct SamplingArgs {
    /// Model name [default: the head's choice]
    #[arg(long, short, value_name = "NAME")]
    pub model: Option<String>,

    /// Most tokens of the answer
    #[arg(long, short = 'n', value_name = "N")]
    pub max_tokens: Option<u32>,

    /// Randomness: 0 always takes the likeliest token
    #[arg(long, short, value_name = "T", allow_negative_numbers = true)]
    pub temperature: Option<f64>,

    /// Choose among the likeliest tokens that together have this probability
    #[arg(long, value_name = "P")]
    pub top_p: Option<f64>,

    /// The same seed gives the same answer
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,
}

#[derive(Debug, clap::Args)]
#[command(after_help = "\
The question goes as one datagram to a shim (or a head); the answer is printed while it grows. With --http or --url, and \
without --to also if HYDRAMESH_URL is set or this machine has no shim, it goes to the head's HTTP API instead.

Examples:
  hydramesh ask \"Why is the sky blue?\"
  hydramesh ask --stats --max-tokens 64 Tell me a story
  git log -5 --oneline | hydramesh ask --system \"Summarise.\" -
  hydramesh ask --json --http \"Name three rivers.\" | jq -r .text
  hydramesh ask --url http://attic:8080 \"Name three rivers.\"
  hydramesh ask --sealed attic --root root.crt --api-key-file lab.token \"Name three rivers.\"")]
pub struct AskArgs {
    /// The question; `-` or nothing reads it from standard input
    #[arg(value_name = "QUESTION")]
    pub question: Vec<String>,

    /// UDP address of a shim or head; port 9999 if none is given [default: 127.0.0.1:9999]
    #[arg(long, value_name = "HOST[:PORT]", env = "HYDRAMESH_DCF")]
    pub to: Option<String>,

    /// Ask over HTTP instead of DCF/UDP, as --url does
    #[arg(long)]
    pub http: bool,

    /// QUIC address of a head: ask over sealed DCF/UDP, with the key or token in --api-key-file; port 7780 if
    /// none is given
    #[arg(long, value_name = "HOST[:PORT]", conflicts_with_all = ["to", "http"], requires = "root")]
    pub sealed: Option<String>,

    /// Mesh root by which the head is recognised: its root.crt, or the digest that `hydramesh root show`
    /// prints
    #[arg(long, value_name = "FILE|DIGEST", env = "HYDRAMESH_ROOT", value_hint = ValueHint::FilePath)]
    pub root: Option<String>,

    /// Instructions that go before the question
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,

    /// Text that ends the answer (may be repeated)
    #[arg(long, value_name = "TEXT")]
    pub stop: Vec<String>,

    /// How long to wait for the whole answer, such as 90s or 2m [default: as long as the mesh works on it]
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    pub timeout: Option<Duration>,

    /// Print time to first token and tokens per second to standard error
    #[arg(long)]
    pub stats: bool,

    /// Print one JSON object with the answer and its times, when it is complete
    #[arg(long)]
    pub json: bool,

    #[command(flatten)]
    pub sampling: SamplingArgs,
}

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Within the conversation: /help, /reset, /system TEXT, /stats, /quit. Ctrl-C stops an answer, Ctrl-D ends the program. With \
standard input from a pipe, each line is one turn.

Examples:
  hydramesh chat
  hydramesh chat --system \"Answer in one sentence.\" --temperature 0")]
pub struct ChatArgs {
    /// Instructions for the whole conversation
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,

    /// Print time to first token and tokens per second after each answer
    #[arg(long)]
    pub stats: bool,

    #[command(flatten)]
    pub sampling: SamplingArgs,
}

#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  hydramesh status\n  hydramesh status --json | jq '.workers[].state'\n  hydramesh status --watch 2s"
)]
pub struct StatusArgs {
    /// Print the head's own JSON
    #[arg(long)]
    pub json: bool,

    /// Show it again every TIME until Ctrl-C
    #[arg(long, value_name = "TIME", value_parser = parse_duration, num_args = 0..=1, default_missing_value = "2s")]
    pub watch: Option<Duration>,
}

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Prints one line per text, in their order: the numbers of its vector.

Examples:
  hydramesh embed \"a lighthouse\" \"a whale\"
  hydramesh embed --input-type query \"Who wrote Hamlet?\"
  cut -f2 titles.tsv | hydramesh embed --json - > vectors.jsonl")]
pub struct EmbedArgs {
    /// The texts; `-` or nothing reads one per line from standard input
    #[arg(value_name = "TEXT")]
    pub text: Vec<String>,

    /// Model name [default: the first embedding model of the mesh]
    #[arg(long, short, value_name = "NAME")]
    pub model: Option<String>,

    /// Cut vectors to so many numbers, and scale them to length 1 again
    #[arg(long, value_name = "N")]
    pub dimensions: Option<u32>,

    /// What the texts are, where the model tells kinds apart, such as `query` or `passage`
    #[arg(long, value_name = "NAME")]
    pub input_type: Option<String>,

    /// How long to wait for the vectors, such as 90s or 2m [default: as long as the mesh works on them]
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    pub timeout: Option<Duration>,

    /// Print a JSON object per text
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, clap::Args)]
#[command(after_help = "\
The image is written as a PNG file, whose path and seed are printed. A worker that dies meanwhile costs one step at most. Size, \
steps, guidance and sampler are the model's own where they are not set.

Examples:
  hydramesh image \"a lighthouse in a storm, oil painting\" -o lighthouse.png
  hydramesh image --size 768x512 --steps 30 --seed 7 --negative \"blurry\" \"a fox in the snow\"
  hydramesh image -n 4 -o fox.png \"a fox in the snow\"          # fox-1.png to fox-4.png
  hydramesh image --init fox.jpg --strength 0.6 \"a fox, watercolour\"
  hydramesh image --init fox.png --mask sky.png \"a starry sky\"   # sky.png is transparent where the sky is
  hydramesh image -o - \"a fox\" | feh -")]
pub struct ImageArgs {
    /// Description of the image; `-` or nothing reads it from standard input
    #[arg(value_name = "TEXT")]
    pub prompt: Vec<String>,

    /// File to write; `-` is standard output [default: image-SEED.png]
    #[arg(long, short, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub output: Option<PathBuf>,

    /// Model name [default: the first image model of the mesh]
    #[arg(long, short, value_name = "NAME")]
    pub model: Option<String>,

    /// Description of what the image is to be unlike
    #[arg(long, value_name = "TEXT")]
    pub negative: Option<String>,

    /// Width and height in pixels, multiples of 8, such as 512x768
    #[arg(long, value_name = "WxH")]
    pub size: Option<String>,

    /// Denoising steps: more take longer and show more detail
    #[arg(long, value_name = "N")]
    pub steps: Option<u32>,

    /// Weight of the text: more follows it closer
    #[arg(long, value_name = "G")]
    pub guidance: Option<f32>,

    /// The same seed gives the same image
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,

    /// Sampler: dpmpp_2m, euler, euler_a, ddim or lcm
    #[arg(long, value_name = "NAME")]
    pub sampler: Option<String>,

    /// Noise levels after Karras et al
    #[arg(long)]
    pub karras: bool,

    /// Image to start from: a PNG, JPEG or WebP file
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub init: Option<PathBuf>,

    /// PNG file of the same size that is transparent where the image is to be changed
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, requires = "init")]
    pub mask: Option<PathBuf>,

    /// How much of the image to start from is lost, over 0 up to 1 [default: 0.8, with a mask 1]
    #[arg(long, value_name = "S", requires = "init")]
    pub strength: Option<f32>,

    /// Number of images, with the seeds after the first one's
    #[arg(long, short = 'n', value_name = "N", value_parser = clap::value_parser!(u32).range(1..=10))]
    pub count: Option<u32>,

    /// How long to wait for all of it, such as 90s or 10m [default: as long as the mesh works on it]
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    pub timeout: Option<Duration>,

    /// Show no pictures in the terminal. Terminals of kitty's or iTerm2's kind show how the image comes about
    #[arg(long)]
    pub no_preview: bool,

    /// Print a JSON object per image
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, clap::Args)]
#[command(after_help = "\
The plan is that of a ring formed now, with the memory of the model's present ring counted as free; nothing is changed. With \
--machines no head is asked: the plan is for that many equal machines, by the header of the model at a path, and its speed an \
estimate from the bytes that a token reads.

Examples:
  hydramesh plan SmolLM2-135M-Instruct
  hydramesh plan --machines 3 --memory 8GiB Qwen3-30B-A3B-Q4_K_M.gguf
  hydramesh plan --json big-model | jq '.plan.stages[].layers'")]
pub struct PlanArgs {
    /// Name of a model of which workers offer layers (`ring.models` in their configuration); with --machines the path of a model
    #[arg(value_name = "MODEL")]
    pub model: String,

    /// Print the head's own JSON
    #[arg(long)]
    pub json: bool,

    /// Plan for so many equal machines instead of asking the head
    #[arg(long, value_name = "N", requires = "memory", value_parser = clap::value_parser!(u16).range(1..=64))]
    pub machines: Option<u16>,

    /// Memory of each machine; 1 GiB of it is left to the system
    #[arg(long, value_name = "SIZE", requires = "machines", value_parser = units::parse_bytes)]
    pub memory: Option<u64>,

    /// Bytes of memory that each machine reads in a second
    #[arg(long, value_name = "SIZE", requires = "machines", default_value = "15GB", value_parser = units::parse_bytes)]
    pub bandwidth: u64,

    /// Tokens of one request
    #[arg(long, value_name = "TOKENS", requires = "machines", default_value_t = 4096, value_parser = clap::value_parser!(u32).range(1..))]
    pub context: u32,
}

#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "\
Without --mesh, the model is loaded into this process and measured without a network. With it, a running mesh is asked over HTTP.

Examples:
  hydramesh bench .cache/models/SmolLM2-135M-Instruct.Q4_1.gguf
  hydramesh bench --mesh --concurrency 8 --url http://127.0.0.1:8080")]
pub struct BenchArgs {
    /// The model file
    #[arg(value_name = "FILE", required_unless_present = "mesh", conflicts_with = "mesh", value_hint = ValueHint::FilePath)]
    pub file: Option<PathBuf>,

    /// Measure a running mesh
    #[arg(long)]
    pub mesh: bool,

    /// Tokens of the prompt
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub prompt_tokens: u32,

    /// Tokens of each answer
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(2..=100_000))]
    pub tokens: u32,

    /// Answers at once
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1_000))]
    pub concurrency: u32,

    /// Rounds; the best one counts
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1_000))]
    pub rounds: u32,

    /// Threads of the engine [default: all]
    #[arg(long, value_name = "N", conflicts_with = "mesh")]
    pub threads: Option<usize>,

    /// ONNX Runtime's library
    #[arg(long, value_name = "FILE", env = "ORT_DYLIB_PATH", value_hint = ValueHint::FilePath)]
    pub runtime: Option<PathBuf>,

    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Reads sysfs and procfs alone: no driver is loaded, nothing is changed, no rights are needed.

Examples:
  hydramesh probe
  hydramesh probe --json | jq -r .choice.backend")]
pub struct ProbeArgs {
    /// Print JSON
    #[arg(long)]
    pub json: bool,

    /// The backend that is wished for: auto, cpu, nvidia or rocm
    #[arg(long, value_name = "BACKEND", default_value = "auto", value_parser = parse_wish)]
    pub backend: Wish,

    /// Where sys, proc and dev lie
    #[arg(long, value_name = "DIR", default_value = "/", value_hint = ValueHint::DirPath)]
    pub root: PathBuf,
}

#[derive(Debug, clap::Args)]
#[command(after_help = "\
This is what a worker tells its head, which decides by it who holds which layers of a model. Without a model it takes half a \
second; with one, its layers are loaded and timed in the file's own weight format and as 8-bit integers.

Examples:
  hydramesh profile
  hydramesh profile models/SmolLM2-135M-Instruct.Q4_1.gguf
  hydramesh profile --json | jq .memory_bandwidth")]
pub struct ProfileArgs {
    /// A model file: its layers are timed, and the disk it lies on
    #[arg(value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub file: Option<PathBuf>,

    /// Threads that compute [default: all]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=4_096))]
    pub threads: Option<u16>,

    /// Folder in which the measurements are kept, such as a worker's state folder [default: measure each time]
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub state_dir: Option<PathBuf>,

    /// ONNX Runtime's library
    #[arg(long, value_name = "FILE", env = "ORT_DYLIB_PATH", value_hint = ValueHint::FilePath)]
    pub runtime: Option<PathBuf>,

    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, clap::Args)]
#[command(after_help = "\
The keys are head, token, role, backend, ssh_key, name and keymap: hydramesh.head=… on the kernel command line, head = \"…\" in \
hydramesh.toml on the partition, head=… in the typed lines. What was typed wins, then the command line. Something missing is no \
failure: it is said, with the remedy, and no service is started. The token is written to a file of mode 0600 and printed nowhere.

Example:
  hydramesh boot-config --partition /mnt --run-dir /run/hydramesh")]
pub struct BootConfigArgs {
    /// Folder that is written for the services' units
    #[arg(long, value_name = "DIR", default_value = "/run/hydramesh", value_hint = ValueHint::DirPath)]
    pub run_dir: PathBuf,

    /// Where the partition labelled HYDRAMESH is mounted
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub partition: Option<PathBuf>,

    /// Folder of the services' state, if it outlives a restart: who has joined needs no token
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub state_dir: Option<PathBuf>,

    /// Backends that this machine has programs for, parted by commas: cpu, nvidia, rocm, webgpu (default: all)
    #[arg(long, value_name = "BACKENDS", value_delimiter = ',')]
    pub backends: Option<Vec<Backend>>,

    /// Its workers have libtorch: models in the partition's folder images are served
    #[arg(long)]
    pub images: bool,

    /// File with key=value lines that were typed at the console; it may be absent
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub typed: Option<PathBuf>,

    /// Where sys, proc and dev lie
    #[arg(long, value_name = "DIR", default_value = "/", value_hint = ValueHint::DirPath)]
    pub root: PathBuf,
}

/// `auto`, `cpu`, `nvidia`, `rocm`, `webgpu`.
fn parse_wish(text: &str) -> Result<Wish, String> {
    Ok(Wish {
        backend: Wish::parse_backend(text)?,
        ..Wish::default()
    })
}

/// A time to wait: any duration but 0.
fn parse_duration(text: &str) -> Result<Duration, String> {
    match units::parse_duration(text)? {
        Duration::ZERO => Err(units::invalid_duration(text)),
        duration => Ok(duration),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_arguments_are_sound() {
        Args::command().debug_assert();
    }

    #[test]
    fn flags_that_say_where_the_head_is_may_come_first() {
        for words in [
            "--url http://a status",
            "status --url http://a",
            "--url=http://a --color never status --json",
            "--url http://a ask hi",
            "--url http://a chat",
            "--url http://a embed hi",
            "--url http://a plan m",
            "--url http://a drain n",
            "--url http://a undrain n",
            "--url http://a rebalance",
            "--url http://a bench --mesh",
            "--url http://a token create",
            "--url http://a token list --all",
            "--url http://a token revoke 1",
            "--url http://a nodes list",
            "nodes expel n --reason r --url http://a",
            "nodes readmit n --url http://a",
            "--admin-key-file k --url http://a token create",
            "token create --admin-key-file k --url http://a",
            "--state-dir d --url http://a drain n",
            "--api-key-file k --url http://a embed hi",
            "--url http://a models pins",
            "--url http://a models pins --json",
            "models pins list --json --url http://a",
            "models pins --json set n f --url http://a",
            "--admin-key-file k --url http://a models pins release n --json",
        ] {
            let words = words.split(' ');
            let args = Args::try_parse_from(std::iter::once("hydramesh").chain(words.clone()));
            let args = args.unwrap_or_else(|error| panic!("{words:?}: {error}"));
            assert_eq!(args.head.url(), "http://a");
        }
    }

    #[test]
    fn times_to_wait_are_longer_than_nothing() {
        assert_eq!(parse_duration("1.5"), Ok(Duration::from_millis(1500)));
        assert_eq!(parse_duration("90 s"), Ok(Duration::from_secs(90)));
        for bad in ["0", "0ms", "3 weeks"] {
            let error = parse_duration(bad).expect_err(bad);
            assert!(
                error.starts_with(&format!("invalid duration {bad:?}: use")),
                "{error}"
            );
        }
    }

    #[test]
    fn sizes_may_have_a_blank_before_their_unit() {
        for (size, expected) in [("20 GiB", 20 << 30), ("50GB", 50_000_000_000)] {
            let words = ["hydramesh", "models", "gc", "--limit", size];
            let args = Args::try_parse_from(words).expect(size);
            let Command::Models(ModelsCommand::Gc { limit, .. }) = args.command else {
                panic!("another command");
            };
            assert_eq!(limit, Some(expected));
        }
    }

    #[test]
    fn every_command_and_argument_is_explained() {
        fn check(command: &clap::Command) {
            assert!(command.get_about().is_some(), "{}", command.get_name());
            for argument in command.get_arguments() {
                assert!(
                    argument.get_help().is_some(),
                    "{} of {}",
                    argument.get_id(),
                    command.get_name()
                );
            }
            for command in command.get_subcommands() {
                check(command);
            }
        }
        check(&Args::command());
    }
}
