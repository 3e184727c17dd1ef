//! `hydramesh status`: the head's registry as a table.

use serde_json::Value;

use crate::args::StatusArgs;
use crate::ask::http_client;
use crate::failure::Failure;
use crate::output::{Terminal, bytes, table};

pub(crate) async fn run(args: StatusArgs, terminal: Terminal) -> Result<(), Failure> {
    let client = http_client(&args.head)?;
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
    let running: u64 = workers
        .iter()
        .filter_map(|worker| worker["running"].as_u64())
        .sum();
    let mut text = format!(
        "{}: {}, {} running, {} queued\n",
        terminal.bold(mesh),
        match workers.len() {
            1 => "1 worker".to_owned(),
            n => format!("{n} workers"),
        },
        running,
        registry["queued"].as_u64().unwrap_or(0)
    );
    if workers.is_empty() {
        text +=
            "No worker has joined. `hydramesh token create` makes a token with which one can.\n";
        return text;
    }
    let rows: Vec<Vec<String>> = workers.iter().flat_map(rows).collect();
    text += "\n";
    text += &table(
        &[
            "WORKER", "STATE", "MODEL", "RUNNING", "DECODE", "PREFILL", "MEMORY", "RTT",
        ],
        &rows,
    );
    text
}

/// One row per model; a worker without models has one, too.
fn rows(worker: &Value) -> Vec<Vec<String>> {
    let text = |value: &Value| value.as_str().unwrap_or("-").to_owned();
    let rate = |value: &Value| match value.as_f64() {
        Some(rate) if rate > 0.0 => format!("{rate:.0} tok/s"),
        _ => "-".to_owned(),
    };
    let slots = worker["slots"]
        .as_u64()
        .map_or(String::new(), |slots| format!("/{slots}"));
    let running = worker["running"]
        .as_u64()
        .map_or("-".to_owned(), |running| format!("{running}{slots}"));
    let memory = worker["resident_bytes"]
        .as_u64()
        .filter(|&size| size > 0)
        .map_or("-".to_owned(), bytes);
    let rtt = worker["rtt_ms"]
        .as_f64()
        .map_or("-".to_owned(), |rtt| format!("{rtt:.1} ms"));
    let row = |model: &Value| {
        vec![
            text(&worker["name"]),
            text(&worker["state"]),
            text(&model["name"]),
            running.clone(),
            rate(&model["decode_tps"]),
            rate(&model["prefill_tps"]),
            memory.clone(),
            rtt.clone(),
        ]
    };
    match worker["models"].as_array() {
        Some(models) if !models.is_empty() => models.iter().map(row).collect(),
        _ => vec![row(&Value::Null)],
    }
}
