//! `hydramesh audit`.

use std::path::PathBuf;

use clap::{Subcommand, ValueHint};
use mesh_audit::home::Tier;

/// Which trail is meant.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct TrailArgs {
    /// An exported trail, or a folder with trails [default: `audit` in the head's state folder]
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub trail: Option<PathBuf>,

    /// The trail of this tier only: grimoire-public, goodlife or master
    #[arg(long, value_name = "TIER")]
    pub tier: Option<Tier>,
}

/// What to do with the audit trail.
#[derive(Debug, Subcommand)]
pub enum AuditCommand {
    /// Check every byte of the trails, and tell what was changed, removed or swapped
    #[command(after_help = "\
Without --key the public keys beside the trail are believed, which shows changes by everybody who does not have the head's secret \
keys. A checkpoint that was seen earlier (--since), or the epochs that a worker kept (--epochs), show whether the trail was cut or \
written anew. Exit code 1 means that something is wrong.

Examples:
  hydramesh audit verify
  hydramesh audit verify --root /var/lib/hydramesh/head/root.crt
  hydramesh audit verify --trail /mnt/export --key /mnt/usb/master.keys --since /mnt/usb/checkpoint
  hydramesh audit verify --epochs /mnt/usb/audit-epochs.json
  hydramesh audit verify --json | jq '.[].findings'")]
    Verify {
        #[command(flatten)]
        trail: TrailArgs,
        /// File with verifier keys that the trail has to be signed with, such as its file `keys` (may be repeated)
        #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
        key: Vec<PathBuf>,
        /// File with the key of an epoch, as `audit key` writes it: the codes of records since then are checked
        #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
        chain_key: Option<PathBuf>,
        /// File with the keys of a witness, whose cosignatures have to hold (may be repeated)
        #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
        witness: Vec<PathBuf>,
        /// A checkpoint that was seen earlier: the trail has to continue it (may be repeated)
        #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
        since: Vec<PathBuf>,
        /// Epochs that another node kept: its state folder, or its file audit-epochs.json (may be repeated)
        #[arg(long, value_name = "FILE|DIR", value_hint = ValueHint::AnyPath)]
        epochs: Vec<PathBuf>,
        /// The exported trail of another head: records that bind its heads are compared with it
        #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
        merged: Option<PathBuf>,
        /// The mesh root's document about the head (identity.doc), whose identity has to endorse the trail's
        /// keys [default: the one beside the trail]
        #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
        document: Option<PathBuf>,
        /// The certificate of the mesh root (root.crt) that has to have signed that document
        #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
        root: Option<PathBuf>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Print records
    #[command(after_help = "\
Records are shown as they are. `hydramesh audit verify` tells whether they are what was signed.

Examples:
  hydramesh audit show --tier master --last 20
  hydramesh audit show --kind token --json | jq .token")]
    Show {
        #[command(flatten)]
        trail: TrailArgs,
        /// The first record
        #[arg(long, value_name = "N", default_value_t = 0)]
        from: u64,
        /// Only so many records, the last ones
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
        last: Option<u32>,
        /// Only records of this kind, such as join, token or request
        #[arg(long, value_name = "KIND")]
        kind: Option<String>,
        /// Print each record's own JSON
        #[arg(long)]
        json: bool,
    },
    /// Copy trails to a new folder, without secrets: a log of C2SP tlog-tiles, fit for a web server
    #[command(after_help = "Example:\n  hydramesh audit export /mnt/usb/trails")]
    Export {
        #[command(flatten)]
        trail: TrailArgs,
        /// The new folder; each trail gets one of its own in it
        #[arg(value_name = "DIR", value_hint = ValueHint::DirPath)]
        to: PathBuf,
    },
    /// Prove that a record is in a trail, to somebody who has only the trail's public key; or check such a proof
    #[command(after_help = "\
Examples:
  hydramesh audit prove 4711 --tier master > record.tlog-proof
  hydramesh audit prove --check record.tlog-proof --key master.keys")]
    Prove {
        #[command(flatten)]
        trail: TrailArgs,
        /// Number of the record
        #[arg(
            value_name = "N",
            required_unless_present = "check",
            conflicts_with = "check"
        )]
        record: Option<u64>,
        /// A proof to check
        #[arg(long, value_name = "FILE", requires = "key", value_hint = ValueHint::FilePath)]
        check: Option<PathBuf>,
        /// File with the public keys of the trail
        #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
        key: Option<PathBuf>,
    },
    /// Begin an epoch with a fresh key of the chain, and write it to a file to be kept elsewhere (the head must not run)
    #[command(after_help = "\
Whoever has that file can check that no record since then was replaced, even by somebody who took all keys of the head later. Keep it \
on another machine: with it, records can be forged.

Example:
  hydramesh audit key --tier master /mnt/usb/chain.key")]
    Key {
        #[command(flatten)]
        trail: TrailArgs,
        /// The new file
        #[arg(value_name = "FILE", value_hint = ValueHint::FilePath)]
        file: PathBuf,
    },
    /// Witness another head's trail: cosign its checkpoint, if it continues what was cosigned before
    #[command(after_help = "\
The cosigned checkpoint goes to standard output; the other head keeps it with `audit cosign --keep FILE`.

Examples:
  hydramesh audit cosign --trail /mnt/attic/master --name barn/witness --witness-dir ~/.local/share/hydramesh/witness > cosigned
  hydramesh audit cosign --tier master --keep cosigned")]
    Cosign {
        #[command(flatten)]
        trail: TrailArgs,
        /// Name of the witness, such as barn/witness
        #[arg(
            long,
            value_name = "NAME",
            required_unless_present = "keep",
            conflicts_with = "keep"
        )]
        name: Option<String>,
        /// Folder with the witness's keys and its memory; made if it does not exist
        #[arg(long, value_name = "DIR", required_unless_present = "keep", conflicts_with = "keep", value_hint = ValueHint::DirPath)]
        witness_dir: Option<PathBuf>,
        /// A cosigned checkpoint, to be kept beside the trail
        #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
        keep: Option<PathBuf>,
    },
    /// After a partition: bind the head of another head's trail into this one (the head must not run)
    #[command(after_help = "Example:\n  hydramesh audit merge --tier master /mnt/attic/master")]
    Merge {
        #[command(flatten)]
        trail: TrailArgs,
        /// The other trail, exported
        #[arg(value_name = "DIR", value_hint = ValueHint::DirPath)]
        other: PathBuf,
    },
}
