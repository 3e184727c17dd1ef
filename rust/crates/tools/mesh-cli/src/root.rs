//! `hydramesh root`: the mesh root, from the head's admin API.

use std::fs::File;
use std::io::Read as _;
use std::path::Path;
use std::time::{Duration, SystemTime};

use mesh_api::{Root, RotateRootRequest, paths};
use mesh_base::clock;
use mesh_net::trust::{
    TrustError, install_intermediate, request_intermediate, requested_intermediate,
    sign_intermediate,
};
use serde_json::Value;

use crate::admin::{Admin, print};
use crate::args::{HeadArgs, IntermediateCommand, RootCommand};
use crate::failure::Failure;
use crate::output::plain;

pub(crate) async fn run(head: &HeadArgs, command: RootCommand) -> Result<(), Failure> {
    match command {
        RootCommand::Show { json } => {
            let answer: Value = Admin::new(head)?.get(paths::ROOT).await?;
            print(&answer, json, |root: Root| shown(&root))
        }
        RootCommand::Intermediate(command) => intermediate(command),
        RootCommand::Rotate { overlap, json } => {
            let request = RotateRootRequest {
                overlap_seconds: overlap.map(|overlap| overlap.as_secs()),
            };
            let answer: Value = Admin::new(head)?.post(paths::ROTATE_ROOT, &request).await?;
            print(&answer, json, |root: Root| shown(&root) + ADVICE)
        }
    }
}

fn intermediate(command: IntermediateCommand) -> Result<(), Failure> {
    let now = SystemTime::now();
    let failed = |error: TrustError| Failure::failed(error.to_string());
    match command {
        IntermediateCommand::Request { state_dir } => {
            let request = request_intermediate(&state_dir).map_err(failed)?;
            let id = requested_intermediate(&request).map_err(failed)?;
            eprintln!("The request is for the key {id}; `sign` prints the same.");
            print!("{request}");
        }
        IntermediateCommand::Sign {
            root_key,
            life,
            request,
        } => {
            if !(SHORTEST_LIFE..=LONGEST_LIFE).contains(&life) {
                return Err(Failure::usage("an intermediate is good for 1d to 3650d"));
            }
            let request = read(&request)?;
            let id = requested_intermediate(&request).map_err(failed)?;
            eprintln!(
                "Signing for the key {id}: it must be the one that `request` printed at the head."
            );
            let signed = sign_intermediate(&root_key, &request, life, now);
            print!("{}", signed.map_err(failed)?);
        }
        IntermediateCommand::Install { state_dir, signed } => {
            let until = install_intermediate(&state_dir, &read(&signed)?, now).map_err(failed)?;
            println!(
                "The head issues certificates by this intermediate until {}, once root.key is gone from {} and the head was restarted.\n\
                 Update all workers first: those of earlier versions do not know intermediates. Keep a backup of root.key: only it signs the next one.",
                clock::utc_of(until),
                state_dir.display()
            );
        }
    }
    Ok(())
}

fn read(path: &Path) -> Result<String, Failure> {
    let failed =
        |error: std::io::Error| Failure::failed(format!("cannot read {}: {error}", path.display()));
    let mut text = String::new();
    let file = File::open(path).map_err(failed)?;
    file.take(LONGEST_FILE)
        .read_to_string(&mut text)
        .map_err(failed)?;
    Ok(text)
}

const SHORTEST_LIFE: Duration = Duration::from_secs(24 * 3600);
const LONGEST_LIFE: Duration = Duration::from_secs(3650 * 24 * 3600);
const LONGEST_FILE: u64 = 1 << 20;

fn shown(root: &Root) -> String {
    let mut text = format!(
        "mesh    {}\nroot    {}\n",
        plain(&root.mesh),
        plain(&root.root)
    );
    if let Some(until) = root.intermediate_until {
        text += &format!(
            "issues  by an intermediate, until {}\n",
            clock::utc_of(until)
        );
    }
    if let Some(former) = &root.former {
        text += &format!(
            "former  {}, accepted until {}\n",
            plain(&former.root),
            clock::utc_of(former.accepted_until)
        );
    }
    text
}

const ADVICE: &str = "\
Connected workers get certificates of the new root now, others when they connect before that date; after it they need a new token. \
Back up root.key again.
";
