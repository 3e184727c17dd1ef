//! Rings: `hydramesh plan`, `drain`, `undrain`, `rebalance`, and their part of `hydramesh status`.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::admin::Admin;
use crate::args::{DrainArgs, HeadArgs, PlanArgs, RebalanceArgs, UndrainArgs};
use crate::failure::{Exit, Failure};
use crate::output::{Terminal, plain, table};

pub(crate) async fn plan(head: &HeadArgs, args: PlanArgs) -> Result<(), Failure> {
    let admin = Admin::new(head)?;
    let path = format!("/v1/mesh/plan?model={}", escape(&args.model));
    let answer = admin.get(&path).await?;
    if args.json {
        println!("{answer}");
    } else {
        print!("{}", show_plan(&answer));
    }
    Ok(())
}

pub(crate) async fn drain(head: &HeadArgs, args: DrainArgs) -> Result<(), Failure> {
    let admin = Admin::new(head)?;
    let body = json!({ "worker": args.node });
    let mut answer = admin.post("/v1/mesh/drain", &body).await?;
    if args.wait {
        let until = Instant::now() + args.timeout;
        let mut told = String::new();
        while !is_empty(&answer) {
            let waits = show_drain(&answer);
            if waits != told && !args.json {
                print!("{waits}");
                told = waits;
            }
            if Instant::now() >= until {
                return Err(Failure::new(
                    Exit::Timeout,
                    format!("{} is not empty yet", args.node),
                )
                .hint("It stays drained; --timeout gives it longer, `hydramesh status` shows what it holds."));
            }
            tokio::select! {
                () = tokio::time::sleep(LOOK) => {}
                _ = tokio::signal::ctrl_c() => {
                    return Err(Failure::new(Exit::Interrupted, "interrupted; the worker stays drained"));
                }
            }
            // A worker that is drained already is only looked at again.
            answer = match admin
                .get("/v1/mesh")
                .await
                .map(|mesh| of_worker(&mesh, &answer))
            {
                Ok(Some(worker)) => worker,
                Ok(None) => {
                    println!("{} has left the mesh.", text(&answer["worker"]));
                    return Ok(());
                }
                Err(failure) => return Err(failure),
            };
        }
    }
    if args.json {
        println!("{answer}");
    } else {
        print!("{}", show_drain(&answer));
    }
    Ok(())
}

pub(crate) async fn undrain(head: &HeadArgs, args: UndrainArgs) -> Result<(), Failure> {
    let admin = Admin::new(head)?;
    let body = json!({ "worker": args.node });
    let answer = admin.post("/v1/mesh/undrain", &body).await?;
    if args.json {
        println!("{answer}");
    } else if answer["draining"] == true {
        println!(
            "{} drains by itself: it is about to stop.",
            text(&answer["worker"])
        );
    } else if answer["worker"].is_null() {
        println!("{} is not connected. It is used when it comes.", args.node);
    } else {
        println!("{} is in service.", text(&answer["worker"]));
    }
    Ok(())
}

pub(crate) async fn rebalance(head: &HeadArgs, args: RebalanceArgs) -> Result<(), Failure> {
    let admin = Admin::new(head)?;
    let mut body = json!({ "dry_run": args.dry_run });
    if let Some(model) = &args.model {
        body["model"] = model.as_str().into();
    }
    let answer = admin.post("/v1/mesh/rebalance", &body).await?;
    if args.json {
        println!("{answer}");
    } else {
        print!("{}", show_comparisons(&answer));
    }
    Ok(())
}

/// Rings, and models without one, under the workers of `hydramesh status`.
pub(crate) fn show(mesh: &Value, terminal: Terminal) -> String {
    let mut shown = String::new();
    for ring in list(&mesh["rings"]) {
        let planned = ring["planned_token_ms"].as_f64().unwrap_or(0.0);
        shown += &format!(
            "\n{}: {}, epoch {}, {} requests at once, context {}, planned {planned:.1} ms a token\n",
            terminal.bold(&format!("Ring of {}", text(&ring["model"]))),
            text(&ring["state"]),
            ring["epoch"],
            ring["slots"],
            ring["context"],
        );
        if ring["state"] != "serving" && ring["reason"].as_str().is_some_and(|why| !why.is_empty())
        {
            shown += &format!("  {}\n", text(&ring["reason"]));
        }
        let rows: Vec<Vec<String>> = list(&ring["stages"])
            .iter()
            .enumerate()
            .map(stage)
            .collect();
        shown += &table(
            &[
                "STAGE", "LAYERS", "WORKER", "STATE", "STEP", "STANDBY", "STATE", "BEHIND",
            ],
            &rows,
        );
        for left in list(&ring["left_out"]) {
            shown += &format!(
                "left out: {}, {}\n",
                text(&left["worker"]),
                text(&left["reason"])
            );
        }
    }
    for unformed in list(&mesh["unformed"]) {
        shown += &format!(
            "\n{}: {}\n",
            terminal.yellow(&format!("No ring of {}", text(&unformed["model"]))),
            text(&unformed["reason"])
        );
    }
    if let Some(last) = list(&mesh["recoveries"]).last() {
        shown += &format!(
            "\nLast recovery, {:.0} s ago: {}, a gap of {:.0} ms, {} rows again, {} requests ran\n",
            last["seconds_ago"].as_f64().unwrap_or(0.0),
            text(&last["model"]),
            last["gap_ms"].as_f64().unwrap_or(0.0),
            last["rows"],
            last["requests"]
        );
    }
    shown
}

fn stage((index, stage): (usize, &Value)) -> Vec<String> {
    let (member, standby) = (&stage["member"], &stage["standby"]);
    let step = match member["step_ms"].as_f64() {
        Some(ms) if ms > 0.0 => format!("{ms:.2} ms"),
        _ => "-".to_owned(),
    };
    let behind = match stage["lag_rows"].as_u64() {
        Some(rows) if !standby.is_null() => format!("{rows} rows"),
        _ => "-".to_owned(),
    };
    let last = stage["layers"][1].as_u64().unwrap_or(0).saturating_sub(1);
    vec![
        index.to_string(),
        format!("{}-{last}", stage["layers"][0]),
        text(&member["worker"]),
        text(&member["phase"]),
        step,
        text(&standby["worker"]),
        text(&standby["phase"]),
        behind,
    ]
}

fn show_plan(answer: &Value) -> String {
    format!(
        "{} with a context of {} tokens:\n\n{}",
        text(&answer["model"]),
        answer["context"],
        // It is the head's own table: its line ends stay.
        answer["text"].as_str().unwrap_or_default()
    )
}

fn show_drain(answer: &Value) -> String {
    let worker = text(&answer["worker"]);
    if is_empty(answer) {
        return format!("{worker} is drained: it holds and runs nothing.\n");
    }
    let mut shown = format!(
        "{worker} drains: {} requests run on it.\n",
        answer["assigned"].as_u64().unwrap_or(0)
    );
    for held in list(&answer["holds"]) {
        let last = held["layers"][1].as_u64().unwrap_or(0).saturating_sub(1);
        shown += &format!(
            "  {} layers {}-{last} as {}: waits for {}\n",
            text(&held["model"]),
            held["layers"][0],
            text(&held["part"]),
            text(&held["waits_for"])
        );
    }
    shown
}

fn show_comparisons(answer: &Value) -> String {
    let rings = list(&answer["rings"]);
    if rings.is_empty() {
        return "No ring serves at the moment.\n".to_owned();
    }
    let mut shown = String::new();
    for ring in rings {
        let ms = |side: &str| ring[side]["token_ms"].as_f64().unwrap_or(0.0);
        let rate = |side: &str| ring[side]["tokens_per_second"].as_f64().unwrap_or(0.0);
        shown += &format!(
            "{}\nnow: {}\n     {:.2} ms a token, up to {:.1} tokens a second\nfresh plan: {:.2} ms a token, up to {:.1} tokens a \
             second, a gain of {:.0} %\n\n{}\n{}: {}\n",
            text(&ring["model"]),
            text(&ring["old"]["layout"]),
            ms("old"),
            rate("old"),
            ms("new"),
            rate("new"),
            ring["gain"].as_f64().unwrap_or(0.0) * 100.0,
            ring["new"]["text"].as_str().unwrap_or_default(),
            if answer["dry_run"] == true {
                "would be done"
            } else {
                "done"
            },
            text(&ring["verdict"])
        );
    }
    shown
}

/// True if a drained worker holds and runs nothing.
fn is_empty(worker: &Value) -> bool {
    list(&worker["holds"]).is_empty() && worker["assigned"].as_u64().unwrap_or(0) == 0
}

/// The entry of `/v1/mesh` of the worker that the head drains, in the words of its answer.
fn of_worker(mesh: &Value, drained: &Value) -> Option<Value> {
    let same = |worker: &&Value| match drained["node_id"].as_str() {
        Some(node) => worker["node_id"] == node,
        None => worker["name"] == drained["worker"],
    };
    let worker = list(&mesh["workers"]).iter().find(same)?;
    Some(json!({
        "worker": worker["name"],
        "node_id": worker["node_id"],
        "draining": worker["state"] == "draining",
        "assigned": worker["assigned"],
        "holds": worker["holds"],
    }))
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map(Vec::as_slice).unwrap_or_default()
}

/// Names and reasons come from other machines: nothing of them may steer a terminal.
fn text(value: &Value) -> String {
    match value.as_str() {
        Some(text) => plain(text),
        None => "-".to_owned(),
    }
}

/// Escapes a query value: everything but letters, digits and a few marks as `%XX`.
fn escape(text: &str) -> String {
    let escaped = |byte: u8| match byte {
        b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => {
            char::from(byte).to_string()
        }
        _ => format!("%{byte:02X}"),
    };
    text.bytes().map(escaped).collect()
}

/// Interval between looks at a drain.
const LOOK: Duration = Duration::from_millis(500);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::Color;

    fn part(worker: &str, phase: &str) -> Value {
        json!({"worker": worker, "node_id": worker, "address": "10.0.0.1:7781", "phase": phase, "step_ms": 4.25})
    }

    #[test]
    fn a_ring_is_shown_with_its_stages_and_their_standbys() {
        let mesh = json!({
            "rings": [{
                "model": "big", "epoch": 2, "state": "recovering", "reason": "worker attic is lost", "slots": 8, "context": 4096,
                "planned_token_ms": 12.34,
                "stages": [
                    {"layers": [0, 14], "member": part("barn", "ready"), "standby": part("cellar", "loading"), "lag_rows": 7},
                    {"layers": [14, 30], "member": part("shed\u{1b}[31m", "ready"), "standby": null, "lag_rows": 0},
                ],
                "left_out": [{"worker": "pi", "reason": "which would make a token 83 ms instead of 12 ms"}],
            }],
            "unformed": [{"model": "huge", "reason": "add a node"}],
            "recoveries": [{"model": "big", "seconds_ago": 3.2, "gap_ms": 412.0, "rows": 9, "requests": 1}],
        });
        let shown = show(&mesh, Terminal::new(Color::Never));
        assert_eq!(
            shown,
            "
Ring of big: recovering, epoch 2, 8 requests at once, context 4096, planned 12.3 ms a token
  worker attic is lost
STAGE  LAYERS  WORKER    STATE  STEP     STANDBY  STATE    BEHIND
0      0-13    barn      ready  4.25 ms  cellar   loading  7 rows
1      14-29   shed[31m  ready  4.25 ms  -        -        -
left out: pi, which would make a token 83 ms instead of 12 ms

No ring of huge: add a node

Last recovery, 3 s ago: big, a gap of 412 ms, 9 rows again, 1 requests ran
"
        );
        assert_eq!(show(&json!({}), Terminal::new(Color::Never)), "");
    }

    #[test]
    fn a_drain_says_what_it_waits_for_until_it_holds_nothing() {
        let held = json!({"model": "big", "layers": [0, 14], "part": "member", "waits_for": "cellar to load the layers"});
        let mut answer =
            json!({"worker": "attic", "node_id": "aa", "assigned": 2, "holds": [held]});
        assert_eq!(
            show_drain(&answer),
            "attic drains: 2 requests run on it.\n  big layers 0-13 as member: waits for cellar to load the layers\n"
        );
        let mesh = json!({"workers": [
            {"name": "attic", "node_id": "bb", "state": "ready", "assigned": 5, "holds": []},
            {"name": "attic", "node_id": "aa", "state": "draining", "assigned": 0, "holds": []},
        ]});
        answer = of_worker(&mesh, &answer).expect("it is there");
        assert!(is_empty(&answer));
        assert_eq!(
            show_drain(&answer),
            "attic is drained: it holds and runs nothing.\n"
        );
        assert_eq!(of_worker(&json!({"workers": []}), &answer), None);
    }

    #[test]
    fn a_comparison_shows_both_sides_and_what_follows() {
        let answer = json!({"dry_run": true, "rings": [{
            "model": "big", "gain": 0.42, "verdict": "the new ring is formed beside the old one",
            "old": {"layout": "0..15 barn, 15..30 pi", "token_ms": 20.0, "tokens_per_second": 80.0},
            "new": {"token_ms": 11.6, "tokens_per_second": 120.0, "text": "STAGE  LAYERS\n"},
        }]});
        let shown = show_comparisons(&answer);
        for part in [
            "0..15 barn, 15..30 pi",
            "20.00 ms",
            "11.60 ms",
            "a gain of 42 %",
            "STAGE  LAYERS\n",
            "would be done: the new ring",
        ] {
            assert!(shown.contains(part), "{part} is not in\n{shown}");
        }
        assert_eq!(
            show_comparisons(&json!({"rings": []})),
            "No ring serves at the moment.\n"
        );
    }

    #[test]
    fn model_names_are_escaped_in_queries() {
        assert_eq!(escape("Smol-LM_2.5~x"), "Smol-LM_2.5~x");
        assert_eq!(escape("a b/ü&=%"), "a%20b%2F%C3%BC%26%3D%25");
    }
}
