//! `hydramesh nodes`: the members of the mesh and the expelled nodes.

use mesh_api::{ExpelRequest, Node, NodeChange, NodeList, NodeRequest, paths};
use mesh_base::clock;

use crate::admin::{Admin, read};
use crate::args::{HeadArgs, NodesCommand};
use crate::failure::Failure;
use crate::output::{plain, table};

pub(crate) async fn run(head: &HeadArgs, command: NodesCommand) -> Result<(), Failure> {
    let admin = Admin::new(head)?;
    let (answer, as_json, shown) = match command {
        NodesCommand::List { json } => {
            let answer = admin.get(paths::NODES).await?;
            let list: NodeList = read(&answer)?;
            (answer, json, show(&list.nodes))
        }
        NodesCommand::Expel { node, reason, json } => {
            let answer = admin
                .post(paths::EXPEL, &ExpelRequest { node, reason })
                .await?;
            let node: NodeChange = read(&answer)?;
            let links = match node.was_connected {
                Some(true) => " Its links are closed.",
                _ => " It was not connected.",
            };
            let name = name(&node.name, &node.node_id);
            (answer, json, format!("{name} is expelled.{links}\n"))
        }
        NodesCommand::Readmit { node, json } => {
            let answer = admin.post(paths::READMIT, &NodeRequest { node }).await?;
            let node: NodeChange = read(&answer)?;
            let name = name(&node.name, &node.node_id);
            (answer, json, format!("{name} may connect again.\n"))
        }
    };
    if as_json {
        println!("{answer}");
    } else {
        print!("{shown}");
    }
    Ok(())
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
            match node.expelled_at {
                Some(_) => format!(
                    "{} {}",
                    date(node.expelled_at),
                    plain(node.reason.as_deref().unwrap_or_default())
                )
                .trim_end()
                .to_owned(),
                None => "-".to_owned(),
            },
        ]
    });
    let rows: Vec<Vec<String>> = rows.collect();
    table(
        &["NODE", "ID", "STATE", "SINCE", "ADDRESS", "EXPELLED"],
        &rows,
    )
}

/// The name, or the known part of the id.
fn name(name: &str, node_id: &str) -> String {
    plain(if name.is_empty() { node_id } else { name })
}

pub(crate) fn date(seconds: Option<u64>) -> String {
    seconds.map_or_else(|| "-".to_owned(), clock::utc_of)
}

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
        assert!(show(&[]).contains("token create"));
    }
}
