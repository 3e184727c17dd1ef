//! Rings: `hydramesh plan`, `drain`, `undrain`, `rebalance`, and their part of `hydramesh status`.

use std::time::{Duration, Instant};

use mesh_api::{
    DrainProgress, Mesh, PlanResponse, RebalanceRequest, RebalanceResponse, RingComparison,
    RingStage, Worker, WorkerRequest, paths,
};
use serde_json::json;

use crate::admin::{Admin, print, read};
use crate::args::{DrainArgs, HeadArgs, PlanArgs, RebalanceArgs, UndrainArgs};
use crate::failure::{Exit, Failure};
use crate::output::{Terminal, cell, plain, table};

pub(crate) async fn plan(head: &HeadArgs, args: PlanArgs) -> Result<(), Failure> {
    let admin = Admin::new(head)?;
    let path = format!("{}?model={}", paths::PLAN, escape(&args.model));
    print(&admin.get(&path).await?, args.json, show_plan)
}

pub(crate) async fn drain(head: &HeadArgs, args: DrainArgs) -> Result<(), Failure> {
    let admin = Admin::new(head)?;
    let body = WorkerRequest {
        worker: args.node.clone(),
    };
    let mut answer = admin.post(paths::DRAIN, &body).await?;
    let mut drain: DrainProgress = read(&answer)?;
    if args.wait {
        let until = Instant::now() + args.timeout;
        let mut told = String::new();
        while !is_empty(&drain) {
            let waits = show_drain(&drain);
            if waits != told && !args.json {
                print!("{waits}");
                told = waits;
            }
            if Instant::now() >= until {
                let text = format!("{} is not empty yet", args.node);
                return Err(Failure::new(Exit::Timeout, text)
                    .hint("It stays drained; --timeout gives it longer, `hydramesh status` shows what it holds."));
            }
            tokio::select! {
                () = tokio::time::sleep(LOOK) => {}
                _ = tokio::signal::ctrl_c() => {
                    return Err(Failure::new(Exit::Interrupted, "interrupted; the worker stays drained"));
                }
            }
            // A worker that is drained already is only looked at again.
            let mesh: Mesh = admin.get(paths::MESH).await?;
            let Some(worker) = of_worker(&mesh, &drain) else {
                println!("{} has left the mesh.", name(drain.worker.as_deref()));
                return Ok(());
            };
            drain = worker;
            answer = json!(drain);
        }
    }
    print(&answer, args.json, |drain| show_drain(&drain))
}

pub(crate) async fn undrain(head: &HeadArgs, args: UndrainArgs) -> Result<(), Failure> {
    let admin = Admin::new(head)?;
    let body = WorkerRequest {
        worker: args.node.clone(),
    };
    let answer = admin.post(paths::UNDRAIN, &body).await?;
    print(&answer, args.json, |worker: DrainProgress| {
        match worker.worker {
            Some(name) if worker.draining => {
                format!("{} drains by itself: it is about to stop.\n", plain(&name))
            }
            Some(name) => format!("{} is in service.\n", plain(&name)),
            None => format!(
                "{} is not connected. It is used when it comes.\n",
                args.node
            ),
        }
    })
}

pub(crate) async fn rebalance(head: &HeadArgs, args: RebalanceArgs) -> Result<(), Failure> {
    let admin = Admin::new(head)?;
    let body = RebalanceRequest {
        model: args.model,
        dry_run: args.dry_run,
    };
    let answer = admin.post(paths::REBALANCE, &body).await?;
    print(&answer, args.json, show_comparisons)
}

/// Rings, and models without one, under the workers of `hydramesh status`.
pub(crate) fn show(mesh: &Mesh, terminal: Terminal) -> String {
    let mut shown = String::new();
    for ring in &mesh.rings {
        shown += &format!(
            "\n{}: {}, epoch {}, {} requests at once, context {}, planned {:.1} ms a token\n",
            terminal.bold(&format!("Ring of {}", plain(&ring.model))),
            plain(&ring.state),
            ring.epoch,
            ring.slots,
            ring.context,
            ring.planned_token_ms,
        );
        if ring.state != "serving" && !ring.reason.is_empty() {
            shown += &format!("  {}\n", plain(&ring.reason));
        }
        let rows: Vec<Vec<String>> = ring.stages.iter().enumerate().map(stage).collect();
        shown += &table(&STAGE_HEADINGS, &rows);
        for left in &ring.left_out {
            let (worker, reason) = (plain(&left.worker), plain(&left.reason));
            shown += &format!("left out: {worker}, {reason}\n");
        }
    }
    for unformed in &mesh.unformed {
        shown += &format!(
            "\n{}: {}\n",
            terminal.yellow(&format!("No ring of {}", plain(&unformed.model))),
            plain(&unformed.reason)
        );
    }
    if let Some(last) = mesh.recoveries.last() {
        shown += &format!(
            "\nLast recovery, {:.0} s ago: {}, a gap of {:.0} ms, {} rows again, {} requests ran\n",
            last.seconds_ago.unwrap_or(0.0),
            plain(&last.model),
            last.gap_ms,
            last.rows,
            last.requests
        );
    }
    shown
}

const STAGE_HEADINGS: [&str; 8] = [
    "STAGE", "LAYERS", "WORKER", "STATE", "STEP", "STANDBY", "STATE", "BEHIND",
];

fn stage((index, stage): (usize, &RingStage)) -> Vec<String> {
    let (member, standby) = (&stage.member, stage.standby.as_ref());
    let [first, end] = stage.layers;
    vec![
        index.to_string(),
        format!("{first}-{}", end.saturating_sub(1)),
        plain(&member.worker),
        plain(&member.phase),
        cell((member.step_ms > 0.0).then(|| format!("{:.2} ms", member.step_ms))),
        name(standby.map(|standby| &*standby.worker)),
        name(standby.map(|standby| &*standby.phase)),
        cell(standby.map(|_| format!("{} rows", stage.lag_rows))),
    ]
}

fn show_plan(answer: PlanResponse) -> String {
    format!(
        "{} with a context of {} tokens:\n\n{}",
        plain(&answer.model),
        answer.context,
        // It is the head's own table: its line ends stay.
        answer.text
    )
}

fn show_drain(drain: &DrainProgress) -> String {
    let worker = name(drain.worker.as_deref());
    if is_empty(drain) {
        return format!("{worker} is drained: it holds and runs nothing.\n");
    }
    let mut shown = format!("{worker} drains: {} requests run on it.\n", drain.assigned);
    for held in &drain.holds {
        let [first, end] = held.layers;
        shown += &format!(
            "  {} layers {first}-{} as {}: waits for {}\n",
            plain(&held.model),
            end.saturating_sub(1),
            plain(&held.part),
            plain(&held.waits_for)
        );
    }
    shown
}

fn show_comparisons(answer: RebalanceResponse) -> String {
    if answer.rings.is_empty() {
        return "No ring serves at the moment.\n".to_owned();
    }
    let done = match answer.dry_run {
        true => "would be done",
        false => "done",
    };
    let ring = |ring: &RingComparison| {
        let (old, new) = (&ring.old, &ring.new);
        format!(
            "{}\nnow: {}\n     {:.2} ms a token, up to {:.1} tokens a second\nfresh plan: {:.2} ms a token, up to {:.1} tokens a \
             second, a gain of {:.0} %\n\n{}\n{done}: {}\n",
            plain(&ring.model),
            plain(&old.layout),
            old.token_ms,
            old.tokens_per_second,
            new.token_ms,
            new.tokens_per_second,
            ring.gain * 100.0,
            new.text,
            plain(&ring.verdict)
        )
    };
    answer.rings.iter().map(ring).collect()
}

/// True if a drained worker holds and runs nothing.
fn is_empty(drain: &DrainProgress) -> bool {
    drain.holds.is_empty() && drain.assigned == 0
}

/// The worker of `/v1/mesh` that the head drains, in the form of its answer.
fn of_worker(mesh: &Mesh, drain: &DrainProgress) -> Option<DrainProgress> {
    let same = |worker: &&Worker| match &drain.node_id {
        Some(node) => worker.node_id.as_ref() == Some(node),
        None => Some(&worker.name) == drain.worker.as_ref(),
    };
    let worker = mesh.workers.iter().find(same)?;
    Some(DrainProgress {
        worker: Some(worker.name.clone()),
        node_id: worker.node_id.clone(),
        draining: worker.state == "draining",
        assigned: worker.assigned,
        holds: worker.holds.clone(),
    })
}

/// Names and reasons come from other machines: nothing of them may steer a terminal.
fn name(name: Option<&str>) -> String {
    cell(name.map(plain))
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

    fn part(worker: &str, phase: &str) -> serde_json::Value {
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
        let shown = show(&read(&mesh).unwrap(), Terminal::new(Color::Never));
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
        assert_eq!(show(&Mesh::default(), Terminal::new(Color::Never)), "");
    }

    #[test]
    fn a_drain_says_what_it_waits_for_until_it_holds_nothing() {
        let held = json!({"model": "big", "layers": [0, 14], "part": "member", "waits_for": "cellar to load the layers"});
        let answer = json!({"worker": "attic", "node_id": "aa", "assigned": 2, "holds": [held]});
        let mut answer = read(&answer).unwrap();
        assert_eq!(
            show_drain(&answer),
            "attic drains: 2 requests run on it.\n  big layers 0-13 as member: waits for cellar to load the layers\n"
        );
        let mesh = json!({"workers": [
            {"name": "attic", "node_id": "bb", "state": "ready", "assigned": 5, "holds": []},
            {"name": "attic", "node_id": "aa", "state": "draining", "assigned": 0, "holds": []},
        ]});
        let mesh = read(&mesh).unwrap();
        answer = of_worker(&mesh, &answer).expect("it is there");
        assert!(is_empty(&answer));
        assert_eq!(
            show_drain(&answer),
            "attic is drained: it holds and runs nothing.\n"
        );
        assert_eq!(of_worker(&Mesh::default(), &answer), None);
    }

    #[test]
    fn a_comparison_shows_both_sides_and_what_follows() {
        let answer = json!({"dry_run": true, "rings": [{
            "model": "big", "gain": 0.42, "verdict": "the new ring is formed beside the old one",
            "old": {"layout": "0..15 barn, 15..30 pi", "token_ms": 20.0, "tokens_per_second": 80.0},
            "new": {"token_ms": 11.6, "tokens_per_second": 120.0, "text": "STAGE  LAYERS\n"},
        }]});
        let shown = show_comparisons(read(&answer).unwrap());
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
            show_comparisons(RebalanceResponse::default()),
            "No ring serves at the moment.\n"
        );
    }

    #[test]
    fn model_names_are_escaped_in_queries() {
        assert_eq!(escape("Smol-LM_2.5~x"), "Smol-LM_2.5~x");
        assert_eq!(escape("a b/ü&=%"), "a%20b%2F%C3%BC%26%3D%25");
    }
}
