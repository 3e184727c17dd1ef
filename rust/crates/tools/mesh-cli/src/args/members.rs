//! Commands about the members of the mesh: `hydramesh drain`, `undrain`, `rebalance`, `identity`, `nodes`,
//! `root`, `token`.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Subcommand, ValueHint};

use super::keys::DelegateArgs;
use super::parse_duration;

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Running requests finish on the worker. Each of its stages goes to a standby that has caught up. If no worker has room for a \
stage, the drain is refused and nothing changes. The worker stays drained across restarts of itself and of the head, until \
`hydramesh undrain`. Only workers of DCF v5.0.0 and v5.1, which have no identity, are forgotten.

Examples:
  hydramesh drain attic --wait && ssh attic poweroff
  hydramesh undrain attic")]
pub struct DrainArgs {
    /// Name or node id of a worker, as `hydramesh status` shows them
    #[arg(value_name = "NODE")]
    pub node: String,

    /// Wait until it holds and runs nothing any more
    #[arg(long)]
    pub wait: bool,

    /// How long to wait at most
    #[arg(long, value_name = "TIME", default_value = "10m", value_parser = parse_duration)]
    pub timeout: Duration,

    /// Print the head's own JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  hydramesh undrain attic")]
pub struct UndrainArgs {
    /// Name or node id of a worker, as `hydramesh status` shows them
    #[arg(value_name = "NODE")]
    pub node: String,

    /// Print the head's own JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, clap::Args)]
#[command(after_help = "\
The head does this by itself when a worker joins or leaves, at most once a minute; this asks it to do it now. A ring is replaced \
if a fresh plan beats it by more than `ring.margin`: beside the old one where memory allows both, else in its place.

Examples:
  hydramesh rebalance --dry-run
  hydramesh rebalance SmolLM2-135M-Instruct")]
pub struct RebalanceArgs {
    /// Name of the model [default: all that have a ring]
    #[arg(value_name = "MODEL")]
    pub model: Option<String>,

    /// Say what would be done, and change nothing
    #[arg(long)]
    pub dry_run: bool,

    /// Print the head's own JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Subcommand)]
pub enum IdentityCommand {
    /// Print the node id, and what the mesh root says of it
    #[command(after_help = "\
The same as `mesh-worker identity show`, for any state directory.

Example:
  hydramesh identity show --state-dir /var/lib/hydramesh/worker")]
    Show {
        /// State directory of a worker or head
        #[arg(long, value_name = "DIR", default_value = "/var/lib/hydramesh/worker", value_hint = ValueHint::DirPath)]
        state_dir: PathBuf,
    },
    /// Make a new key, which takes the place of the old one when the node starts again
    #[command(after_help = "\
For a key that somebody may have copied. The node keeps its name and its membership; the old id is refused everywhere from then on.
Run it as root or as the node's user.

Example:
  hydramesh identity rotate --state-dir /var/lib/hydramesh/worker && systemctl restart hydramesh-worker")]
    Rotate {
        /// State directory of a worker or head
        #[arg(long, value_name = "DIR", default_value = "/var/lib/hydramesh/worker", value_hint = ValueHint::DirPath)]
        state_dir: PathBuf,
    },
}

/// Steps to an intermediate.
#[derive(Debug, Subcommand)]
pub enum IntermediateCommand {
    /// At the head: make keys, and print a request for the machine that has root.key
    #[command(after_help = "\
Run it as root or as the head's user. The request holds no secret.

Example:
  hydramesh root intermediate request > request.pem")]
    Request {
        /// State directory of the head
        #[arg(long, value_name = "DIR", default_value = "/var/lib/hydramesh/head", value_hint = ValueHint::DirPath)]
        state_dir: PathBuf,
    },
    /// Where root.key is: sign a request, and print the intermediate
    #[command(after_help = "\
It needs no network. What it prints holds no secret.

Example:
  hydramesh root intermediate sign --root-key /mnt/usb/root.key request.pem > intermediate.pem")]
    Sign {
        /// The root's keys
        #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
        root_key: PathBuf,
        /// Time for which the intermediate is good, 1d to 3650d
        #[arg(long, value_name = "TIME", value_parser = parse_duration, default_value = "365d")]
        life: Duration,
        /// The request
        #[arg(value_hint = ValueHint::FilePath)]
        request: PathBuf,
    },
    /// At the head: put the signed intermediate into use when the head starts again
    #[command(after_help = "\
Example:
  hydramesh root intermediate install intermediate.pem
  rm /var/lib/hydramesh/head/root.key && systemctl restart hydramesh-head     # once root.key is backed up")]
    Install {
        /// State directory of the head
        #[arg(long, value_name = "DIR", default_value = "/var/lib/hydramesh/head", value_hint = ValueHint::DirPath)]
        state_dir: PathBuf,
        /// What `sign` printed
        #[arg(value_hint = ValueHint::FilePath)]
        signed: PathBuf,
    },
}

/// What to do with nodes.
#[derive(Debug, Subcommand)]
pub enum RootCommand {
    /// Print the digest of the mesh root, and that of the former one while it is accepted
    Show {
        /// Print the head's own JSON
        #[arg(long)]
        json: bool,
    },
    /// Keep the root's keys on another machine: the head issues by an intermediate that the root has signed
    /// there
    #[command(subcommand)]
    Intermediate(IntermediateCommand),
    /// Put a new root into the place of the present one; both are accepted for a while
    #[command(after_help = "\
Both roots sign the change. Workers that are connected learn of it over their links, get certificates of the new root and go on. Those \
that are away get them when they connect before the end of the overlap; later ones need a new token. New tokens pin the new root.

Workers of earlier versions know the former root only: update them before its time is over.

Examples:
  hydramesh root rotate
  hydramesh root rotate --overlap 7d")]
    Rotate {
        /// Time for which the former root is accepted, 1m to 400d [default: the head's `trust.root_overlap`,
        /// 30 days]
        #[arg(long, value_name = "TIME", value_parser = parse_duration)]
        overlap: Option<Duration>,

        /// Print the head's own JSON
        #[arg(long)]
        json: bool,
    },
}

#[derive(Debug, Subcommand)]
pub enum NodesCommand {
    /// Show all nodes: connected, absent, expelled, waiting for approval
    #[command(after_help = "\
Names and ids are those of the nodes' certificates, which the head issued.

Examples:
  hydramesh nodes list
  hydramesh nodes list --json | jq -r '.nodes[] | select(.state == \"expelled\") | .name'")]
    List {
        /// Print the head's own JSON
        #[arg(long)]
        json: bool,
    },
    /// Show all that the head knows about one node
    #[command(after_help = "\
Examples:
  hydramesh nodes show attic
  hydramesh nodes show 3f9ac1d2 --json | jq .former_ids")]
    Show {
        /// Name or id of a node, as `hydramesh nodes list` shows them
        #[arg(value_name = "NODE")]
        node: String,
        /// Print the head's own JSON
        #[arg(long)]
        json: bool,
    },
    /// Let a node join that has shown a token and waits
    #[command(after_help = "\
With `trust.approval = \"manual\"` at the head, a node with a valid token waits. It prints its id in its log; compare that before you \
approve it. It joins by itself within a minute. `hydramesh nodes revoke` refuses it for good.

Example:
  hydramesh nodes approve 3f9ac1d2")]
    Approve {
        /// Id or name of a node that waits, as `hydramesh nodes list` shows them
        #[arg(value_name = "NODE")]
        node: String,
        /// Print the head's own JSON
        #[arg(long)]
        json: bool,
    },
    /// Throw a node out of the mesh, now and for good
    #[command(after_help = "\
Its links end, at the head and at other workers; requests that run on it go on elsewhere. Neither its certificate nor a new join \
token lets it in again before `hydramesh nodes readmit`. It need not be connected.

Examples:
  hydramesh nodes expel attic --reason \"sold\"
  hydramesh nodes revoke 3f9ac1d2    # the same under another name; also refuses a node that waits")]
    #[command(visible_alias = "revoke")]
    Expel {
        /// Name or id of a node, as `hydramesh nodes list` shows them
        #[arg(value_name = "NODE")]
        node: String,
        /// Why, for the log and for the node itself: one line
        #[arg(long, value_name = "TEXT", default_value = "")]
        reason: String,
        /// Print the head's own JSON
        #[arg(long)]
        json: bool,
    },
    /// Let an expelled node in again, or end a node's quarantine
    #[command(after_help = "\
An expelled node connects by itself within five minutes, or when it is restarted. One that was away for more than 37 days needs a new \
token as well.

Example:
  hydramesh nodes readmit attic")]
    Readmit {
        /// Name or id of a node that is expelled or in quarantine, as `hydramesh nodes list` and `hydramesh status` show them
        #[arg(value_name = "NODE")]
        node: String,
        /// Print the head's own JSON
        #[arg(long)]
        json: bool,
    },
}

/// What to do with join tokens, and with curtain tokens where no head is needed.
#[derive(Debug, Subcommand)]
pub enum TokenCommand {
    /// Make a token with which one worker can join, once, or several workers once each
    #[command(after_help = "\
The token names this mesh's root certificate, so that the worker cannot join another by mistake. It is a secret until it is \
used.

Examples:
  hydramesh token create > join-token          # on the head's machine, as its user
  hydramesh token create --nodes 12 --ttl 2h --note \"second shelf\"
  mesh-worker --set join_token_file=join-token --set head=192.168.1.10:7780")]
    Create {
        /// How long the token is good for, such as 30m, 12h [default: the head's]
        #[arg(long, value_name = "TIME", value_parser = parse_duration)]
        ttl: Option<Duration>,
        /// Number of workers that can join with it
        #[arg(long, value_name = "N", default_value_t = 1)]
        nodes: u32,
        /// Role of the nodes that join with it: worker is the only one
        #[arg(long, value_name = "ROLE", default_value = "worker")]
        role: String,
        /// A note for the list of tokens
        #[arg(long, value_name = "TEXT", default_value = "")]
        note: String,
        /// Print the head's own JSON
        #[arg(long)]
        json: bool,
    },
    /// Show the open tokens: id, age, end, note; never the secret
    #[command(after_help = "\
Tokens that `token offer` hands over by a code are among them.

Examples:
  hydramesh token list
  hydramesh token list --all --json | jq '.tokens[].used_by'")]
    List {
        /// Also those that were used or have expired
        #[arg(long)]
        all: bool,
        /// Print the head's own JSON
        #[arg(long)]
        json: bool,
    },
    /// Withdraw an open token: nobody can join with it any more
    #[command(after_help = "\
A node that has joined with it stays a member: see `hydramesh nodes expel`.

Example:
  hydramesh token revoke 8f0c1a7be2d43956")]
    Revoke {
        /// Its id, as `hydramesh token list` shows it
        #[arg(value_name = "ID")]
        id: String,
        /// Print the head's own JSON
        #[arg(long)]
        json: bool,
    },
    /// Make a token and hand it over the LAN to whoever types the code that this prints
    #[command(after_help = "\
For a machine at which nobody wants to type 87 characters: `hydramesh token fetch`, or key c on the live image, asks for the code. \
The offer is found by multicast DNS and ends when it was taken, after three wrong codes, or in time. The firewall has to let \
TCP port 7782 and UDP port 5353 in.

Example:
  hydramesh token offer --state-dir /var/lib/hydramesh/head")]
    Offer {
        /// How long the offer stands, at most 15m
        #[arg(long, value_name = "TIME", value_parser = parse_duration, default_value = "5m")]
        patience: Duration,
        /// Address to listen on
        #[arg(long, value_name = "ADDRESS", default_value = "[::]:7782")]
        listen: SocketAddr,
        /// The head's port for workers
        #[arg(long, value_name = "PORT", default_value_t = mesh_machine::boot::join::HEAD_PORT)]
        head_port: u16,
    },
    /// Take the token that a head on this LAN offers
    #[command(after_help = "\
Prints head=HOST:PORT and token=TOKEN. The code is read from standard input where it is not named, so that it is in no list of \
processes.

Example:
  hydramesh token fetch K7QXM-4TR9H")]
    Fetch {
        /// What the head shows
        code: Option<String>,
        /// Where the offer is, where multicast DNS does not find it
        #[arg(long, value_name = "ADDRESS")]
        at: Option<SocketAddr>,
    },
    /// Say what a token allows, without a head: join tokens and curtain tokens
    #[command(after_help = "\
Reads the token and prints its contents, never its secret. Signatures are not verified: only the mesh's head does that.

Examples:
  hydramesh token inspect lab.token
  pass show mesh/token | hydramesh token inspect -")]
    Inspect {
        /// File with the token, or - for standard input
        #[arg(value_name = "FILE", value_hint = ValueHint::FilePath)]
        token: PathBuf,
    },
    /// Narrow a curtain token for somebody else, without a head
    Delegate(DelegateArgs),
    /// Make the key of a holder of curtain tokens, where there is none, and print its public half
    #[command(after_help = "Example:\n  hydramesh token holder-key --key lab.key > lab.pub")]
    HolderKey {
        /// The key's file
        #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
        key: PathBuf,
    },
}
