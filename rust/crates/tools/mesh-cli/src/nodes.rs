//! `hydramesh nodes`: the members of the mesh and the expelled nodes.

use mesh_base::clock;
use serde_json::{Value, json};

use crate::admin::Admin;
use crate::args::{HeadArgs, NodesCommand};
use crate::failure::Failure;
use crate::output::{plain, table};

pub(crate) async fn run(head: &HeadArgs, command: NodesCommand) -> Result<(), Failure> {
    let admin = Admin::new(head)?;
    let (answer, as_json, shown) = match command {
        NodesCommand::List { json } => {
            let answer = admin.get("/v1/mesh/nodes").await?;
            let shown = show(&answer);
            (answer, json, shown)
        }
        NodesCommand::Expel { node, reason, json } => {
            let body = json!({ "node": node, "reason": reason });
            let answer = admin.post("/v1/mesh/nodes/expel", &body).await?;
            let links = match answer["was_connected"] == true {
                true => " Its links are closed.",
                false => " It was not connected.",
            };
            let shown = format!("{} is expelled.{links}\n", name(&answer));
            (answer, json, shown)
        }
        NodesCommand::Readmit { node, json } => {
            let body = json!({ "node": node });
            let answer = admin.post("/v1/mesh/nodes/readmit", &body).await?;
            let shown = format!("{} may connect again.\n", name(&answer));
            (answer, json, shown)
        }
    };
    if as_json {
        println!("{answer}");
    } else {
        print!("{shown}");
    }
    Ok(())
}

fn show(answer: &Value) -> String {
    let nodes = answer["nodes"].as_array().map(Vec::as_slice);
    let nodes = nodes.unwrap_or_default();
    if nodes.is_empty() {
        return "No node has joined. `hydramesh token create` makes a token with which one can.\n"
            .to_owned();
    }
    let rows = nodes.iter().map(|node| {
        let id = plain(node["node_id"].as_str().unwrap_or("-"));
        vec![
            name(node),
            id.chars().take(SHOWN_DIGITS).collect(),
            plain(node["state"].as_str().unwrap_or("-")),
            date(&node["member_since"]),
            plain(node["address"].as_str().unwrap_or("-")),
            match node["expelled_at"].as_u64() {
                Some(_) => format!(
                    "{} {}",
                    date(&node["expelled_at"]),
                    plain(node["reason"].as_str().unwrap_or_default())
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
fn name(node: &Value) -> String {
    match node["name"].as_str() {
        Some(name) if !name.is_empty() => plain(name),
        _ => plain(node["node_id"].as_str().unwrap_or("-")),
    }
}

pub(crate) fn date(seconds: &Value) -> String {
    match seconds.as_u64() {
        Some(seconds) => clock::utc_of(seconds),
        None => "-".to_owned(),
    }
}

/// First digits of an id, enough for `nodes expel`.
const SHOWN_DIGITS: usize = 16;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_are_shown_with_what_they_are_and_control_nothing() {
        let answer = json!({"nodes": [
            {"node_id": "ab".repeat(32), "name": "attic", "state": "connected", "member_since": 1_795_910_400,
             "address": "10.0.0.7:40000"},
            {"node_id": "cd".repeat(32), "name": "", "state": "expelled", "expelled_at": 1_795_910_400,
             "reason": "sold\u{1b}[31m"},
        ]});
        let shown = show(&answer);
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
        assert!(show(&json!({})).contains("token create"));
    }
}
