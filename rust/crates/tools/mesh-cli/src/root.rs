//! `hydramesh root`: the mesh root, from the head's admin API.

use mesh_api::{Root, RotateRootRequest, paths};
use mesh_base::clock;
use serde_json::Value;

use crate::admin::{Admin, print};
use crate::args::{HeadArgs, RootCommand};
use crate::failure::Failure;
use crate::output::plain;

pub(crate) async fn run(head: &HeadArgs, command: RootCommand) -> Result<(), Failure> {
    match command {
        RootCommand::Show { json } => {
            let answer: Value = Admin::new(head)?.get(paths::ROOT).await?;
            print(&answer, json, |root: Root| shown(&root))
        }
        RootCommand::Rotate { overlap, json } => {
            let request = RotateRootRequest {
                overlap_seconds: overlap.map(|overlap| overlap.as_secs()),
            };
            let answer: Value = Admin::new(head)?.post(paths::ROTATE_ROOT, &request).await?;
            print(&answer, json, |root: Root| shown(&root) + ADVICE)
        }
    }
}

fn shown(root: &Root) -> String {
    let mut text = format!(
        "mesh    {}\nroot    {}\n",
        plain(&root.mesh),
        plain(&root.root)
    );
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
