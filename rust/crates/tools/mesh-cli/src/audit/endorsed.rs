//! Whose trail it is: the identity that endorses its keys, and the mesh root that signed the document about
//! that identity.

use std::path::{Path, PathBuf};

use data_encoding::HEXLOWER;
use mesh_audit::archive::Archive;
use mesh_audit::verify::{Finding, Report};
use mesh_base::clock;
use mesh_net::trust::{read_papers, root_digest};
use serde_json::{Value, json};

use super::{failed, read_text};
use crate::failure::Failure;
use crate::output::plain;

/// The endorsement of a trail's keys.
#[derive(Default)]
pub(super) struct Endorsed {
    /// Id of the node.
    node: Option<String>,
    signed: Option<Signed>,
}

/// The mesh root's document about the node.
struct Signed {
    name: String,
    mesh: String,
    root: String,
    not_before: u64,
    not_after: u64,
    /// True if the root is the one that was given.
    pinned: bool,
}

/// Checks who endorses a trail's keys; anything that does not fit becomes a finding. `document` is used
/// instead of the one beside the trail. With a `root` (its certificate), the document has to be there and of
/// this root.
pub(super) fn check(
    report: &mut Report,
    archive: &Archive,
    document: Option<&Path>,
    root: Option<&PathBuf>,
) -> Result<Endorsed, Failure> {
    let mut endorsed = Endorsed::default();
    let root = root.map(|path| root_digest(&read_text(path)?).map_err(failed));
    let root = root.transpose()?;
    let papers = match document {
        Some(path) => {
            let read = std::fs::read(path);
            Some(read.map_err(|error| failed(format!("{}: {error}", path.display())))?)
        }
        None => archive.document().map_err(failed)?,
    };
    let mut wrong = |file: &str, text: String| {
        report.findings.push(Finding {
            file: file.into(),
            bytes: None,
            records: None,
            text,
        });
    };
    let Some(key) = &report.identity else {
        if root.is_some() || document.is_some() {
            wrong("keys", "no node endorses the keys".to_owned());
        }
        return Ok(endorsed);
    };
    let node = HEXLOWER.encode(&mesh_audit::keys::node_id(key));
    endorsed.node = Some(node.clone());
    let Some(papers) = papers else {
        if root.is_some() {
            let text = format!("there is no document of the mesh root about {node}");
            wrong(DOCUMENT, text);
        }
        return Ok(endorsed);
    };
    let said = match read_papers(&papers) {
        Ok(said) => said,
        Err(error) => {
            wrong(DOCUMENT, error.to_string());
            return Ok(endorsed);
        }
    };
    if said.key.as_bytes() != &key[..] {
        let text = format!(
            "it is about {}, and {node} endorses the keys",
            said.node_id()
        );
        wrong(DOCUMENT, text);
        return Ok(endorsed);
    }
    if said.role != "head" {
        wrong(DOCUMENT, format!("{node} is a {}, not a head", said.role));
    }
    let digest = HEXLOWER.encode(&said.root);
    if root.is_some_and(|root| root != said.root) {
        wrong(DOCUMENT, format!("another mesh root signed it: {digest}"));
    }
    endorsed.signed = Some(Signed {
        name: said.name,
        mesh: said.mesh,
        root: digest,
        not_before: said.not_before,
        not_after: said.not_after,
        pinned: root == Some(said.root),
    });
    Ok(endorsed)
}

impl Endorsed {
    /// Lines for people.
    pub(super) fn as_text(&self) -> String {
        let Some(node) = &self.node else {
            return "  keys not endorsed by a node\n".to_owned();
        };
        let mut text = format!("  keys endorsed by node {node}\n");
        match &self.signed {
            Some(signed) => {
                let (name, mesh) = (plain(&signed.name), plain(&signed.mesh));
                let dates = (
                    clock::utc_of(signed.not_before),
                    clock::utc_of(signed.not_after),
                );
                text += &format!(
                    "  which is the head {name} of the mesh {mesh}, by a document of {} to {}\n",
                    dates.0, dates.1
                );
                let pinned = match signed.pinned {
                    true => ", the one that was given",
                    false => " (not compared: --root names the right one)",
                };
                text += &format!("  signed by the mesh root {}{pinned}\n", signed.root);
            }
            None => text += "  without a document of the mesh root about that node\n",
        }
        text
    }

    pub(super) fn as_json(&self) -> Value {
        let Some(node) = &self.node else {
            return Value::Null;
        };
        let signed = self.signed.as_ref().map(|signed| {
            json!({
                "name": signed.name,
                "mesh": signed.mesh,
                "root": signed.root,
                "root_compared": signed.pinned,
                "not_before": signed.not_before,
                "not_after": signed.not_after,
            })
        });
        json!({ "node": node, "document": signed })
    }
}

const DOCUMENT: &str = "identity.doc";
