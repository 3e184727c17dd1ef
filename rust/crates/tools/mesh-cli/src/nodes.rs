//! `hydramesh nodes`: the members of the mesh and the expelled nodes.

mod evidence;

use mesh_api::{ExpelRequest, Node, NodeChange, NodeList, NodeRequest, paths};
use mesh_base::clock;

use serde_json::Value;

use crate::admin::{Admin, print, read};
use crate::args::{HeadArgs, NodesCommand};
use crate::failure::{Exit, Failure};
use crate::output::{cell, plain, table};

pub(crate) async fn run(head: &HeadArgs, command: NodesCommand) -> Result<(), Failure> {
    let admin = Admin::new(head)?;
    match command {
        NodesCommand::List { json } => {
            let answer = admin.get(paths::NODES).await?;
            print(&answer, json, |list: NodeList| show(&list.nodes))
        }
        NodesCommand::Show { node, json } => {
            let answer: Value = admin.get(paths::NODES).await?;
            let list: NodeList = read(&answer)?;
            let found = find(&list.nodes, &node)?;
            // With all fields that the head gave, also those that this version does not know.
            let nodes = answer["nodes"].as_array().into_iter().flatten();
            let mut raw = nodes.filter(|one| one["node_id"] == *found.node_id);
            let raw = raw.next().cloned().unwrap_or_default();
            print(&raw, json, |node: Node| shown(&node))
        }
        NodesCommand::Approve { node, json } => {
            let answer = admin.post(paths::APPROVE, &NodeRequest { node }).await?;
            print(&answer, json, |node: NodeChange| {
                format!(
                    "{} is approved: it joins when it asks again, within a minute.\n",
                    name(&node.name, &node.node_id)
                )
            })
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
            date(node.member_since.or(node.waits_since)),
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

/// The node of this name or id, or whose id begins so.
fn find<'a>(nodes: &'a [Node], wanted: &str) -> Result<&'a Node, Failure> {
    let begins = |node: &&Node| wanted.len() >= SHORTEST_ID && node.node_id.starts_with(wanted);
    let named: Vec<&Node> = nodes
        .iter()
        .filter(|node| node.name == wanted || begins(node))
        .collect();
    match named[..] {
        [node] => Ok(node),
        [] => Err(Failure::new(
            Exit::NoWorker,
            format!("no node is called {wanted:?}; `hydramesh nodes list` shows them"),
        )),
        // An expelled node and its successor may have one name.
        _ => match named
            .iter()
            .filter(|node| node.expelled_at.is_none())
            .collect::<Vec<_>>()[..]
        {
            [node] => Ok(node),
            _ => Err(Failure::failed(format!(
                "several nodes are called {wanted:?}: give the first 8 digits of an id; `hydramesh nodes list` shows them"
            ))),
        },
    }
}

/// All that is known about a node, a line for each part.
fn shown(node: &Node) -> String {
    let text = |value: &Option<String>| value.as_deref().map(plain);
    let day = |value: Option<u64>| value.map(clock::utc_of);
    let ago = |value: Option<f64>| value.map(|seconds| format!("{seconds:.0} s ago"));
    let former = node.former_ids.iter().map(|id| plain(id));
    let former: Vec<String> = former.collect();
    let rows = [
        ("name", Some(plain(&node.name))),
        ("node id", Some(plain(&node.node_id))),
        ("state", Some(plain(&node.state))),
        (
            "algorithm",
            Some(text(&node.algorithm).unwrap_or_else(|| "none".to_owned())),
        ),
        ("certificate key", text(&node.key_id)),
        ("certificate ends", day(node.certificate_ends)),
        ("joined", day(node.member_since)),
        ("join token", text(&node.token)),
        ("waits since", day(node.waits_since)),
        ("address", text(&node.address)),
        ("connected", ago(node.connected_seconds)),
        ("last seen", ago(node.last_seen_seconds)),
        ("out since", day(node.expelled_at)),
        (
            "reason",
            text(&node.reason).filter(|reason| !reason.is_empty()),
        ),
        ("replaced by", text(&node.replaced_by)),
        ("former ids", (!former.is_empty()).then(|| former.join(" "))),
    ];
    let rows = rows
        .into_iter()
        .filter_map(|(name, value)| Some((name, value?)));
    let rows = rows.map(|(name, value)| (name.to_owned(), value));
    let evidence = node.evidence.as_ref().map(evidence::rows);
    let rows = rows.chain(evidence.into_iter().flatten());
    rows.map(|(name, value)| format!("{name:<17} {value}\n"))
        .collect()
}

/// The name, or the known part of the id.
fn name(name: &str, node_id: &str) -> String {
    plain(if name.is_empty() { node_id } else { name })
}

pub(crate) fn date(seconds: Option<u64>) -> String {
    cell(seconds.map(clock::utc_of))
}

/// Least number of first digits of an id that name a node.
const SHORTEST_ID: usize = 8;
/// First digits of an id, enough for `nodes expel`.
const SHOWN_DIGITS: usize = 16;

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

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
        let one = super::shown(find(&list.nodes, "attic").unwrap());
        for part in [
            "name              attic\n",
            "algorithm         none",
            "2026-11-29",
        ] {
            assert!(one.contains(part), "{part} is not in\n{one}");
        }
        let other = super::shown(find(&list.nodes, "cdcdcdcd").unwrap());
        assert!(
            other.contains("sold[31m") && !other.contains('\u{1b}'),
            "{other}"
        );
        assert!(find(&list.nodes, "abab").is_err() && find(&list.nodes, "barn").is_err());
        assert!(show(&[]).contains("token create"));
    }
}
