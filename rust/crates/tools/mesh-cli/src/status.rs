//! `hydramesh status`: the head's registry and rings as tables.

use mesh_api::{Gossip, Mesh, ModelHolder, ModelSeeker, ServedModel, SharedModel, Worker, paths};

use crate::admin::print;
use crate::args::{HeadArgs, StatusArgs};
use crate::ask::http_client;
use crate::failure::Failure;
use crate::output::{Terminal, bytes, cell, table};
use crate::rings;

pub(crate) async fn run(
    head: &HeadArgs,
    args: StatusArgs,
    terminal: Terminal,
) -> Result<(), Failure> {
    let client = http_client(head)?;
    loop {
        let answer = client.get(paths::MESH).await?;
        if args.watch.is_some() && !args.json {
            // Home and clear, so that the table stands still.
            print!("\x1b[H\x1b[2J");
        }
        print(&answer, args.json, |mesh| show(&mesh, terminal))?;
        let Some(interval) = args.watch else {
            return Ok(());
        };
        tokio::select! {
            () = tokio::time::sleep(interval) => {}
            _ = tokio::signal::ctrl_c() => return Ok(()),
        }
    }
}

fn show(mesh: &Mesh, terminal: Terminal) -> String {
    let mut text = format!(
        "{}: {}, {} running, {} queued\n",
        terminal.bold(&mesh.mesh),
        match mesh.workers.len() {
            1 => "1 worker".to_owned(),
            n => format!("{n} workers"),
        },
        mesh.requests.running,
        mesh.requests.queued
    );
    for warning in &mesh.warnings {
        // Names that workers gave themselves are in it.
        let plain = warning.replace(char::is_control, " ");
        text += &format!("warning: {plain}\n");
    }
    if let Some(gossip) = &mesh.gossip {
        text += &fleet(gossip);
    }
    if mesh.workers.is_empty() {
        text +=
            "No worker has joined. `hydramesh token create` makes a token with which one can.\n";
        return text;
    }
    let rows: Vec<Vec<String>> = mesh.workers.iter().flat_map(rows).collect();
    text += "\n";
    text += &table(&WORKER_HEADINGS, &rows);
    text += &splits(mesh);
    text += &unused(mesh);
    text += &absent(mesh);
    text += &rings::show(mesh, terminal);
    text += &models(&mesh.models);
    text
}

/// The fleet pulse, in one line.
fn fleet(gossip: &Gossip) -> String {
    let fleet = &gossip.fleet;
    let mut parts = vec![match fleet.nodes {
        1 => "1 machine".to_owned(),
        nodes => format!("{nodes} machines"),
    }];
    if let Some(load) = fleet.load_percent {
        parts.push(format!(
            "load {:.0} % (at most {:.0} %)",
            load.mean, load.most
        ));
    }
    if let Some(temperature) = fleet.temperature_celsius {
        parts.push(format!("up to {:.0} °C", temperature.most));
    }
    if fleet.memory_total > 0 {
        let (free, all) = (bytes(fleet.memory_available), bytes(fleet.memory_total));
        parts.push(format!("{free} of {all} memory free"));
    }
    if fleet.disk_total > 0 {
        let (free, all) = (bytes(fleet.disk_available), bytes(fleet.disk_total));
        parts.push(format!("{free} of {all} disk free"));
    }
    if fleet.on_battery > 0 {
        let lowest = fleet.lowest_battery_percent.unwrap_or_default();
        parts.push(format!(
            "{} on battery (lowest {lowest} %)",
            fleet.on_battery
        ));
    }
    if gossip.threats > 0 {
        parts.push(format!("{} threats reported", gossip.threats));
    }
    format!("fleet: {}\n", parts.join(", "))
}

const WORKER_HEADINGS: [&str; 8] = [
    "WORKER", "STATE", "MODEL", "RUNNING", "DECODE", "PREFILL", "MEMORY", "LINK",
];

/// Models of which a GPU has some layers and the CPU the rest.
fn splits(mesh: &Mesh) -> String {
    let served = mesh
        .workers
        .iter()
        .flat_map(|worker| worker.models.iter().map(move |model| (worker, model)));
    let lines = served.filter_map(|(worker, model)| {
        let split = model.split.as_ref()?;
        if split.cpu_layers == 0 && split.expert_layers == 0 {
            return None;
        }
        let experts = match split.expert_layers {
            0 => String::new(),
            count => format!(" and the experts of {count} others"),
        };
        Some(format!(
            "{} on {}: {} layers on {} ({}), {}{experts} on the CPU ({})\n",
            model.name,
            worker.name,
            split.device_layers,
            model.backend.as_deref().unwrap_or("a GPU"),
            bytes(split.device_bytes),
            split.cpu_layers,
            bytes(split.cpu_bytes),
        ))
    });
    lines.collect()
}

/// Workers that are connected and get no requests, and why. Warnings name those in quarantine.
fn unused(mesh: &Mesh) -> String {
    let held = mesh.workers.iter().filter(|worker| worker.state == "held");
    let lines = held.filter_map(|worker| {
        let reason = worker.not_used.as_ref()?.replace(char::is_control, " ");
        Some(format!("{} gets no requests: {reason}\n", worker.name))
    });
    lines.collect()
}

/// Workers that are drained and not connected: they would get nothing when they come.
fn absent(mesh: &Mesh) -> String {
    let is_here = |node: &String| {
        let mut workers = mesh.workers.iter();
        workers.any(|worker| worker.node_id.as_ref() == Some(node))
    };
    let absent = mesh.drained.iter().filter(|(node, _)| !is_here(node));
    let absent: Vec<&str> = absent.map(|(_, name)| name.as_str()).collect();
    match absent.is_empty() {
        true => String::new(),
        false => format!("drained and not connected: {}\n", absent.join(", ")),
    }
}

/// Models that workers share: their holders, and the workers that wait for them.
fn models(models: &[SharedModel]) -> String {
    if models.is_empty() {
        return String::new();
    }
    let list = |texts: Vec<String>| cell((!texts.is_empty()).then(|| texts.join(", ")));
    let rows = models.iter().map(|model| {
        vec![
            model.name.clone(),
            size(model.bytes),
            list(model.holders.iter().map(holder).collect()),
            list(model.seekers.iter().map(seeker).collect()),
            cell(model.origin.clone()),
        ]
    });
    let rows: Vec<Vec<String>> = rows.collect();
    let heads = ["SHARED MODEL", "SIZE", "HELD BY", "SOUGHT BY", "FETCHED BY"];
    format!("\n{}", table(&heads, &rows))
}

/// Bytes in words, if they are known.
fn size(size: u64) -> String {
    cell((size > 0).then(|| bytes(size)))
}

fn holder(holder: &ModelHolder) -> String {
    let ModelHolder {
        worker, pieces, of, ..
    } = holder;
    let mut text = match pieces < of {
        true => format!("{worker} ({pieces} of {of} pieces)"),
        false => worker.clone(),
    };
    if !holder.accused_by.is_empty() {
        text += &format!(" (sent bad pieces to {})", holder.accused_by.join(", "));
    }
    text
}

fn seeker(seeker: &ModelSeeker) -> String {
    let mut text = match seeker.bytes_total {
        0 => seeker.worker.clone(),
        total => {
            let percent = 100.0 * seeker.bytes as f64 / total as f64;
            format!("{} ({percent:.0} %)", seeker.worker)
        }
    };
    if let Some(error) = &seeker.error {
        text += &format!(" ({error})");
    }
    text
}

/// One row per model; a worker without models has one, too.
fn rows(worker: &Worker) -> Vec<Vec<String>> {
    let rate = |rate: f64| cell((rate > 0.0).then(|| format!("{rate:.0} tok/s")));
    let mut link = cell(worker.round_trip_ms.map(|rtt| format!("{rtt:.1} ms")));
    let to_head = worker.paths.iter().find(|path| path.worker.is_none());
    if let Some(rate) = to_head.and_then(|path| path.bytes_per_second) {
        link += &format!(", {}/s", bytes(rate as u64));
    }
    // The purposes it is reserved for follow its state.
    let state = match worker.reserved_for.as_slice() {
        [] => worker.state.to_string(),
        purposes => format!("{}, for {}", worker.state, purposes.join(" and ")),
    };
    let row = |model: Option<&ServedModel>| {
        let of = |show: &dyn Fn(&ServedModel) -> String| cell(model.map(show));
        let slots = of(&|model| model.slots.to_string());
        vec![
            worker.name.clone(),
            state.clone(),
            of(&|model| model.name.clone()),
            format!("{} of {slots}", worker.running),
            of(&|model| match is_for_images(model) {
                true => step_time(model.decode_tokens_per_second),
                false => rate(model.decode_tokens_per_second),
            }),
            of(&|model| match is_for_images(model) {
                true => cell(None),
                false => rate(model.prefill_tokens_per_second),
            }),
            size(worker.resident_bytes),
            link.clone(),
        ]
    };
    match worker.models.as_slice() {
        [] => vec![row(None)],
        models => models.iter().map(|model| row(Some(model))).collect(),
    }
}

fn is_for_images(model: &ServedModel) -> bool {
    model.kind == "image"
}

/// Time of a step at 512 by 512 pixels, of which a speed counts squares of 64 by 64.
fn step_time(speed: f64) -> String {
    cell((speed > 0.0).then(|| format!("{:.1} s/step", 64.0 / speed)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admin::read;
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
        let shown = show(&read(&registry).unwrap(), Terminal::new(Color::Never));
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
        let text = show(&read(&registry).unwrap(), Terminal::new(Color::Never));
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
        let text = show(&read(&registry).unwrap(), Terminal::new(Color::Never));
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
        let text = show(&read(&registry).unwrap(), Terminal::new(Color::Never));
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
    fn the_speed_of_an_image_model_is_the_time_of_a_step() {
        let model = json!({"name": "sd", "kind": "image", "decode_tokens_per_second": 32.0, "prefill_tokens_per_second": 32.0});
        let registry = json!({"workers": [{"name": "gpu", "state": "ready", "models": [model]}]});
        let text = show(&read(&registry).unwrap(), Terminal::new(Color::Never));
        assert!(
            text.contains("2.0 s/step") && !text.contains("tok/s"),
            "{text}"
        );
    }

    #[test]
    fn the_split_of_a_model_is_shown_where_it_has_one() {
        let model = |name: &str, cpu: u32, experts: u32| {
            json!({"name": name, "backend": "cuda", "split": {
                "device_layers": 20, "cpu_layers": cpu, "expert_layers": experts,
                "device_bytes": 3u64 << 30, "cpu_bytes": 1u64 << 30,
            }})
        };
        let models = [
            model("whole", 0, 0),
            model("split", 8, 0),
            model("moe", 0, 20),
        ];
        let registry = json!({"workers": [{"name": "pc", "models": models}]});
        let text = show(&read(&registry).unwrap(), Terminal::new(Color::Never));
        assert!(text.contains("split on pc: 20 layers on cuda ("), "{text}");
        assert!(text.contains("), 8 on the CPU ("), "{text}");
        assert!(
            text.contains(", 0 and the experts of 20 others on the CPU"),
            "{text}"
        );
        assert!(!text.contains("whole on pc"), "{text}");
    }

    #[test]
    fn what_a_worker_is_kept_for_is_shown() {
        let state = |reserved: &[&str]| {
            let worker = Worker {
                state: "ready".into(),
                reserved_for: reserved.iter().map(|&purpose| purpose.into()).collect(),
                ..Worker::default()
            };
            rows(&worker)[0][1].clone()
        };
        assert_eq!(state(&[]), "ready");
        assert_eq!(state(&["embeddings"]), "ready, for embeddings");
        assert_eq!(state(&["chat", "images"]), "ready, for chat and images");
    }
}
