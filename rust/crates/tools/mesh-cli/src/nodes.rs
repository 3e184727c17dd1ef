//! `hydramesh nodes`: the members of the mesh and the expelled nodes.

use mesh_api::{ExpelRequest, Node, NodeChange, NodeList, NodeRequest, paths};
use mesh_base::clock;

use crate::admin::{Admin, print};
use crate::args::{HeadArgs, NodesCommand};
use crate::failure::Failure;
use crate::output::{cell, plain, table};

pub(crate) async fn run(head: &HeadArgs, command: NodesCommand) -> Result<(), Failure> {
    let admin = Admin::new(head)?;
    match command {
        NodesCommand::List { json } => {
            let answer = admin.get(paths::NODES).await?;
            print(&answer, json, |list: NodeList| show(&list.nodes))
        }
        NodesCommand::Expel { node, reason, json } => {
            let request = ExpelRequest { node, reason };
            let answer = admin.post(paths::EXPEL, &request).await?;
            print(&answer, json, |node: NodeChange| {
                let links = match node.was_connected {
                    Some(true) => "Its links are closed.",
                    _ => "It was not connected.",
                };
                format!("{} is expelled. {links}\n", name(&node.name, &node.node_id))
            })
        }
        NodesCommand::Readmit { node, json } => {
            let answer = admin.post(paths::READMIT, &NodeRequest { node }).await?;
            print(&answer, json, |node: NodeChange| {
                format!("{} may connect again.\n", name(&node.name, &node.node_id))
            })
        }
    }
}

fn show(nodes: &[Node]) -> String {
    if nodes.is_empty() {
        return "No node has joined. `hydramesh token create` makes a token with which one can.\n"
            .to_owned();
    }
    let rows = nodes.iter().map(|node| {
        vec![
            name(&node.name, &node.node_id),
            plain(&node.node_id).chars().take(SHOWN_DIGITS).collect(),
            plain(&node.state),
            date(node.member_since),
            plain(node.address.as_deref().unwrap_or("-")),
            match &node.reason {
                Some(reason) if node.expelled_at.is_some() => {
                    format!("{} {}", date(node.expelled_at), plain(reason))
                }
                _ => date(node.expelled_at),
            },
        ]
    });
    let rows: Vec<Vec<String>> = rows.collect();
    let headings = ["NODE", "ID", "STATE", "SINCE", "ADDRESS", "EXPELLED"];
    table(&headings, &rows)
}

/// The name, or the known part of the id.
fn name(name: &str, node_id: &str) -> String {
    plain(if name.is_empty() { node_id } else { name })
}

pub(crate) fn date(seconds: Option<u64>) -> String {
    cell(seconds.map(clock::utc_of))
}

/// First digits of an id, enough for `nodes expel`.
const SHOWN_DIGITS: usize = 16;

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::admin::read;

    #[test]
    fn nodes_are_shown_with_what_they_are_and_control_nothing() {
        let answer = json!({"nodes": [
            {"node_id": "ab".repeat(32), "name": "attic", "state": "connected", "member_since": 1_795_910_400,
             "address": "10.0.0.7:40000"},
            {"node_id": "cd".repeat(32), "name": "", "state": "expelled", "expelled_at": 1_795_910_400,
             "reason": "sold\u{1b}[31m"},
        ]});
        let list: NodeList = read(&answer).unwrap();
        let shown = show(&list.nodes);
        for part in [
            "NODE",
            "attic",
            "abababababababab ",
            "connected",
            "10.0.0.7:40000",
            "expelled",
            "2026-11-29",
            "sold[31m",
        ] {
            assert!(shown.contains(part), "{part} is not in\n{shown}");
        }
        assert!(!shown.contains('\u{1b}'));
        assert!(show(&[]).contains("token create"));
    }
}
