//! `hydramesh status`: the head's registry and rings as tables.

use serde_json::Value;

use crate::args::{HeadArgs, StatusArgs};
use crate::ask::http_client;
use crate::failure::Failure;
use crate::output::{Terminal, bytes, table};
use crate::rings;

pub(crate) async fn run(
    head: &HeadArgs,
    args: StatusArgs,
    terminal: Terminal,
) -> Result<(), Failure> {
    let client = http_client(head)?;
    loop {
        let registry = client.get("/v1/mesh").await?;
        if args.json {
            println!("{registry}");
        } else {
            if args.watch.is_some() {
                // Home and clear, so that the table stands still.
                print!("\x1b[H\x1b[2J");
            }
            print!("{}", show(&registry, terminal));
        }
        let Some(interval) = args.watch else {
            return Ok(());
        };
        tokio::select! {
            () = tokio::time::sleep(interval) => {}
            _ = tokio::signal::ctrl_c() => return Ok(()),
        }
    }
}

fn show(registry: &Value, terminal: Terminal) -> String {
    let workers = registry["workers"]
        .as_array()
        .map(Vec::as_slice)
        .unwrap_or_default();
    let mesh = registry["mesh"].as_str().unwrap_or("mesh");
    let mut text = format!(
        "{}: {}, {} running, {} queued\n",
        terminal.bold(mesh),
        match workers.len() {
            1 => "1 worker".to_owned(),
            n => format!("{n} workers"),
        },
        registry["requests"]["running"].as_u64().unwrap_or(0),
        registry["requests"]["queued"].as_u64().unwrap_or(0)
    );
    for warning in registry["warnings"].as_array().into_iter().flatten() {
        // Names that workers gave themselves are in it.
        let plain = warning
            .as_str()
            .unwrap_or_default()
            .replace(char::is_control, " ");
        text += &format!("warning: {plain}\n");
    }
    if workers.is_empty() {
        text +=
            "No worker has joined. `hydramesh token create` makes a token with which one can.\n";
        return text;
    }
    let rows: Vec<Vec<String>> = workers.iter().flat_map(rows).collect();
    text += "\n";
    text += &table(
        &[
            "WORKER", "STATE", "MODEL", "RUNNING", "DECODE", "PREFILL", "MEMORY", "LINK",
        ],
        &rows,
    );
    text += &unused(registry);
    text += &absent(registry);
    text += &rings::show(registry, terminal);
    text += &models(registry);
    text
}

/// Workers that are connected and get no requests, and why. Warnings name those in quarantine.
fn unused(registry: &Value) -> String {
    let workers = registry["workers"].as_array().into_iter().flatten();
    let held = workers.filter(|worker| worker["state"] == "held");
    let lines = held.filter_map(|worker| {
        let reason = worker["not_used"].as_str()?.replace(char::is_control, " ");
        let name = worker["name"].as_str().unwrap_or("-");
        Some(format!("{name} gets no requests: {reason}\n"))
    });
    lines.collect()
}

/// Workers that are drained and not connected: they would get nothing when they come.
fn absent(registry: &Value) -> String {
    let workers = registry["workers"].as_array().into_iter().flatten();
    let here: Vec<&str> = workers
        .filter_map(|worker| worker["node_id"].as_str())
        .collect();
    let drained = registry["drained"].as_object().into_iter().flatten();
    let absent: Vec<&str> = drained
        .filter(|(node, _)| !here.contains(&node.as_str()))
        .filter_map(|(_, name)| name.as_str())
        .collect();
    match absent.is_empty() {
        true => String::new(),
        false => format!("drained and not connected: {}\n", absent.join(", ")),
    }
}

/// Models that workers share: their holders, and the workers that wait for them.
fn models(registry: &Value) -> String {
    let models = registry["models"].as_array().map(Vec::as_slice);
    let models = models.unwrap_or_default();
    if models.is_empty() {
        return String::new();
    }
    let list = |value: &Value, show: fn(&Value) -> String| {
        let items = value.as_array().into_iter().flatten();
        let texts: Vec<String> = items.map(show).collect();
        match texts.is_empty() {
            true => "-".to_owned(),
            false => texts.join(", "),
        }
    };
    let rows = models.iter().map(|model| {
        let size = model["bytes"].as_u64().filter(|&size| size > 0);
        vec![
            model["name"].as_str().unwrap_or("-").to_owned(),
            size.map_or("-".to_owned(), bytes),
            list(&model["holders"], holder),
            list(&model["seekers"], seeker),
            model["origin"].as_str().unwrap_or("-").to_owned(),
        ]
    });
    let rows: Vec<Vec<String>> = rows.collect();
    let heads = ["SHARED MODEL", "SIZE", "HELD BY", "SOUGHT BY", "FETCHED BY"];
    format!("\n{}", table(&heads, &rows))
}

fn holder(holder: &Value) -> String {
    let name = holder["worker"].as_str().unwrap_or("-");
    let (pieces, of) = (holder["pieces"].as_u64(), holder["of"].as_u64());
    let mut text = match (pieces, of) {
        (Some(pieces), Some(of)) if pieces < of => format!("{name} ({pieces} of {of} pieces)"),
        _ => name.to_owned(),
    };
    let accusers = holder["accused_by"].as_array().into_iter().flatten();
    let accusers: Vec<&str> = accusers.filter_map(Value::as_str).collect();
    if !accusers.is_empty() {
        text += &format!(" (sent bad pieces to {})", accusers.join(", "));
    }
    text
}

fn seeker(seeker: &Value) -> String {
    let name = seeker["worker"].as_str().unwrap_or("-");
    let here = seeker["bytes"].as_u64().unwrap_or(0);
    let mut text = match seeker["bytes_total"].as_u64() {
        Some(total) if total > 0 => {
            format!("{name} ({:.0} %)", 100.0 * here as f64 / total as f64)
        }
        _ => name.to_owned(),
    };
    if let Some(error) = seeker["error"].as_str() {
        text += &format!(" ({error})");
    }
    text
}

/// One row per model; a worker without models has one, too.
fn rows(worker: &Value) -> Vec<Vec<String>> {
    let text = |value: &Value| value.as_str().unwrap_or("-").to_owned();
    let rate = |value: &Value| match value.as_f64() {
        Some(rate) if rate > 0.0 => format!("{rate:.0} tok/s"),
        _ => "-".to_owned(),
    };
    let count = |value: &Value| {
        value
            .as_u64()
            .map_or("-".to_owned(), |count| count.to_string())
    };
    let memory = worker["resident_bytes"]
        .as_u64()
        .filter(|&size| size > 0)
        .map_or("-".to_owned(), bytes);
    let mut link = worker["round_trip_ms"]
        .as_f64()
        .map_or("-".to_owned(), |rtt| format!("{rtt:.1} ms"));
    let mut paths = worker["paths"].as_array().into_iter().flatten();
    let to_head = paths.find(|path| path["worker"].is_null());
    if let Some(rate) = to_head.and_then(|path| path["bytes_per_second"].as_f64()) {
        link += &format!(", {}/s", bytes(rate as u64));
    }
    // The purposes it is reserved for follow its state.
    let kept: Vec<&str> = worker["reserved_for"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .collect();
    let state = match kept.as_slice() {
        [] => text(&worker["state"]),
        kept => format!("{}, for {}", text(&worker["state"]), kept.join(" and ")),
    };
    let row = |model: &Value| {
        vec![
            text(&worker["name"]),
            state.clone(),
            text(&model["name"]),
            format!(
                "{} of {}",
                count(&worker["running"]),
                count(&model["slots"])
            ),
            rate(&model["decode_tokens_per_second"]),
            rate(&model["prefill_tokens_per_second"]),
            memory.clone(),
            link.clone(),
        ]
    };
    match worker["models"].as_array() {
        Some(models) if !models.is_empty() => models.iter().map(row).collect(),
        _ => vec![row(&Value::Null)],
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::Color;
    use serde_json::json;

    #[test]
    fn a_worker_that_gets_no_requests_is_named_with_the_reason() {
        let registry = json!({
            "mesh": "attic",
            "warnings": ["worker `b` is in quarantine for another 60 s: its answers differ"],
            "workers": [
                {"name": "a", "state": "held", "not_used": "its answers\u{1b} differ from those of other workers"},
                {"name": "b", "state": "quarantined", "not_used": "in quarantine"},
                {"name": "c", "state": "ready", "not_used": null},
            ],
        });
        let shown = show(&registry, Terminal::new(Color::Never));
        assert!(
            shown.contains("a gets no requests: its answers  differ"),
            "{shown}"
        );
        assert!(
            shown.contains("quarantined") && shown.contains("warning: worker `b`"),
            "{shown}"
        );
        assert!(!shown.contains("c gets no requests"), "{shown}");
    }

    #[test]
    fn who_has_a_model_and_who_waits_for_it_is_shown() {
        let registry = json!({
            "workers": [{"name": "a"}],
            "models": [{
                "name": "m",
                "bytes": 100,
                "holders": [
                    {"worker": "a", "pieces": 9, "of": 9, "accused_by": []},
                    {"worker": "b", "pieces": 3, "of": 9, "accused_by": ["a"]},
                ],
                "seekers": [{"worker": "c", "bytes": 25, "bytes_total": 100, "error": "401"}],
                "origin": "c",
            }],
        });
        let text = show(&registry, Terminal::new(Color::Never));
        let line = text.lines().last().unwrap_or_default();
        assert!(line.starts_with("m "), "{text}");
        for part in [
            "a, b (3 of 9 pieces) (sent bad pieces to a)",
            "c (25 %) (401)",
        ] {
            assert!(line.contains(part), "{part} is not in {text}");
        }
        assert!(line.ends_with("c"), "{text}");
    }

    #[test]
    fn warnings_come_first() {
        let registry = json!({"mesh": "attic", "warnings": ["worker `a`: its clock\u{1b} is off"], "workers": []});
        let text = show(&registry, Terminal::new(Color::Never));
        assert_eq!(
            text.lines().nth(1),
            Some("warning: worker `a`: its clock  is off"),
            "{text}"
        );
    }

    #[test]
    fn a_worker_has_a_row_for_each_model() {
        let model = |name| json!({"name": name, "slots": 8, "decode_tokens_per_second": 61.4});
        let registry = json!({
            "mesh": "attic",
            "requests": {"queued": 2, "running": 3},
            "workers": [
                {"name": "laptop", "state": "ready", "running": 3, "models": [model("a"), model("b")]},
                {"name": "pi", "state": "joining", "models": []},
            ],
        });
        let text = show(&registry, Terminal::new(Color::Never));
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0], "attic: 2 workers, 3 running, 2 queued");
        assert!(
            lines[3].starts_with("laptop  ready    a      3 of 8   61 tok/s"),
            "{text}"
        );
        assert!(lines[5].starts_with("pi      joining  -"), "{text}");
        assert_eq!(lines.len(), 6);
    }

    #[test]
    fn what_a_worker_is_kept_for_is_shown() {
        let worker =
            |reserved: Value| json!({"name": "pi", "state": "ready", "reserved_for": reserved});
        let state = |reserved| rows(&worker(reserved))[0][1].clone();
        assert_eq!(state(json!([])), "ready");
        assert_eq!(state(json!(["embeddings"])), "ready, for embeddings");
        assert_eq!(
            state(json!(["chat", "images"])),
            "ready, for chat and images"
        );
    }
}
