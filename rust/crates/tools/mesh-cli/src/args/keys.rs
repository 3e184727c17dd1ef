//! Commands about curtain tokens: `hydramesh keys`, and those of `hydramesh token` that need no head.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Subcommand, ValueHint};
use mesh_curtain::{Right, Tier};

use super::parse_duration;

/// What to do with curtain tokens and API keys.
#[derive(Debug, Subcommand)]
pub enum KeysCommand {
    /// Issue a curtain token: rights for a limited time, sent like an API key
    #[command(after_help = "\
The token is printed once and kept nowhere. Clients send it as `Authorization: Bearer TOKEN`. Rights: infer:MODEL (a trailing * \
stands for any rest), embed, image, admin, federate, join.

Examples:
  hydramesh keys create --tenant lab --right 'infer:Qwen3*' --right embed --expires 30d > lab.token
  hydramesh keys create --tier master --right admin --expires 8h --note \"maintenance\"
  hydramesh keys create --tenant lab --holder-key lab.pub > lab.token    # the lab narrows it for its people")]
    Create {
        /// Customer or group that it is for: letters, digits and any of . _ - [default: the head's]
        #[arg(long, value_name = "NAME")]
        tenant: Option<String>,
        /// How far it is trusted: grimoire-public, goodlife or master [default: grimoire-public]
        #[arg(long, value_name = "TIER")]
        tier: Option<Tier>,
        /// A right; may be given several times [default: infer:*, embed and image]
        #[arg(long = "right", value_name = "RIGHT")]
        rights: Vec<Right>,
        /// How long it is good for, such as 12h, 30d [default: the head's, 90 days]
        #[arg(long, value_name = "TIME", value_parser = parse_duration)]
        expires: Option<Duration>,
        /// Person or program that it is for
        #[arg(long, value_name = "TEXT", default_value = "")]
        subject: String,
        /// A note for the list of keys
        #[arg(long, value_name = "TEXT", default_value = "")]
        note: String,
        /// Public key of a holder, as `hydramesh token holder-key` prints it: the token is then for delegation only
        #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
        holder_key: Option<PathBuf>,
        /// Print the head's own JSON
        #[arg(long)]
        json: bool,
    },
    /// Show the curtain tokens and API keys that are good now; never their texts
    #[command(after_help = "\
Examples:
  hydramesh keys list
  hydramesh keys list --all --json | jq -r '.keys[] | select(.state == \"revoked\") | .id'")]
    List {
        /// Also those that are revoked or have expired
        #[arg(long)]
        all: bool,
        /// Print the head's own JSON
        #[arg(long)]
        json: bool,
    },
    /// Show all that the head knows about one of them
    #[command(after_help = "Example:\n  hydramesh keys show 3f9ac1d2")]
    Show {
        /// Its id, or the first 8 digits of it, as `hydramesh keys list` shows them
        #[arg(value_name = "ID")]
        id: String,
        /// Print the head's own JSON
        #[arg(long)]
        json: bool,
    },
    /// Refuse a curtain token from now on, and all that follow from it
    #[command(after_help = "\
A token that a holder has narrowed can be revoked by its own id, which `hydramesh token inspect` shows. An API key is revoked by \
removing its line from http.api_keys_file.

Example:
  hydramesh keys revoke 8f0c1a7be2d439568f0c1a7be2d43956")]
    Revoke {
        /// Its id, as `hydramesh keys list` shows it
        #[arg(value_name = "ID")]
        id: String,
        /// Print the head's own JSON
        #[arg(long)]
        json: bool,
    },
}

/// A token to narrow.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
For holders: the token was issued with `--holder-key`, and KEY is that key. The new token has no more rights, ends no later and \
is of the same tenant. Whoever gets it cannot use the wider one.

Example:
  hydramesh token delegate lab.token --key lab.key --right infer:Qwen3-0.6B --expires 7d --subject anna > anna.token")]
pub struct DelegateArgs {
    /// File with the token, or - for standard input
    #[arg(value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub token: PathBuf,
    /// The holder's key
    #[arg(long, value_name = "KEY", value_hint = ValueHint::FilePath)]
    pub key: PathBuf,
    /// A right; may be given several times [default: those of the token]
    #[arg(long = "right", value_name = "RIGHT")]
    pub rights: Vec<Right>,
    /// A tier that is not higher [default: that of the token]
    #[arg(long, value_name = "TIER")]
    pub tier: Option<Tier>,
    /// How long it is good for, at most as long as the token [default: as long]
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    pub expires: Option<Duration>,
    /// Person or program that it is for
    #[arg(long, value_name = "TEXT", default_value = "")]
    pub subject: String,
    /// Public key of a next holder: the new token is then for delegation only
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub holder_key: Option<PathBuf>,
}
