//! The demo's ring: wait until it can lose a member, choose one, watch it continue.

use std::time::{Duration, Instant};

use mesh_launcher::Mesh;
use serde_json::Value;

use super::LOOK;
use crate::failure::Failure;

/// Longest time to form and load a ring, on a slow disk.
const FORM_LIMIT: Duration = Duration::from_secs(90);
/// Longest time for the driver's report of a recovery to reach the head, once the answer has continued.
const RECOVERY_LIMIT: Duration = Duration::from_secs(10);

/// Waits until a ring serves and each of its stages has a standby that has loaded. Returns `/v1/mesh`.
pub(super) async fn wait_for_standbys(mesh: &mut Mesh) -> Result<Value, Failure> {
    wait(
        mesh,
        FORM_LIMIT,
        "no ring with standbys serves",
        |registry| {
            let ring = &registry["rings"][0];
            let stages = list(&ring["stages"]);
            ring["state"] == "serving"
                && !stages.is_empty()
                && stages
                    .iter()
                    .all(|stage| stage["standby"]["phase"] == "ready")
        },
    )
    .await
}

/// Waits until the ring serves again after a loss and says how it went. Returns `/v1/mesh`.
pub(super) async fn wait_for_recovery(mesh: &mut Mesh) -> Result<Value, Failure> {
    wait(
        mesh,
        RECOVERY_LIMIT,
        "the ring did not recover",
        |registry| {
            registry["rings"][0]["state"] == "serving" && !list(&registry["recoveries"]).is_empty()
        },
    )
    .await
}

/// The worker of a stage in the middle, as an index of `mesh.workers`.
pub(super) async fn member(mesh: &Mesh) -> Result<usize, Failure> {
    let registry = mesh.registry().await?;
    let stages = list(&registry["rings"][0]["stages"]);
    let member = stages
        .get(stages.len() / 2)
        .and_then(|stage| stage["member"]["worker"].as_str())
        .ok_or_else(|| Failure::failed(format!("no ring has stages: {registry}")))?;
    mesh.workers
        .iter()
        .position(|worker| worker.name() == member)
        .ok_or_else(|| {
            Failure::failed(format!(
                "the head names a worker {member:?} that is not ours"
            ))
        })
}

/// A line for each stage.
pub(super) fn stages(registry: &Value) -> Vec<String> {
    let line = |stage: &Value| {
        let (first, end) = (number(&stage["layers"][0]), number(&stage["layers"][1]));
        let last = end.saturating_sub(1);
        let range = if first == last {
            first.to_string()
        } else {
            format!("{first}-{last}")
        };
        let standby = match stage["standby"]["worker"].as_str() {
            Some(standby) => format!("{standby} stands by"),
            None => "nobody stands by".to_owned(),
        };
        let member = stage["member"]["worker"].as_str().unwrap_or("-");
        format!("layers {range:<6} {member}, {standby}")
    };
    list(&registry["rings"][0]["stages"])
        .iter()
        .map(line)
        .collect()
}

/// The ring's own measurement of its last recovery.
pub(super) fn recovery(registry: &Value) -> String {
    match list(&registry["recoveries"]).last() {
        Some(last) => {
            let rows = number(&last["rows"]);
            let gap = last["gap_ms"].as_f64().unwrap_or(0.0);
            let noun = if rows == 1 { "row" } else { "rows" };
            format!("ring recovered in {gap:.0} ms ({rows} {noun} recomputed)")
        }
        None => "the ring did not report its recovery".to_owned(),
    }
}

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or(0)
}

/// Looks at `/v1/mesh` until `holds` says so.
async fn wait(
    mesh: &mut Mesh,
    limit: Duration,
    otherwise: &str,
    holds: impl Fn(&Value) -> bool,
) -> Result<Value, Failure> {
    let until = Instant::now() + limit;
    loop {
        let registry = mesh.registry().await?;
        if holds(&registry) {
            return Ok(registry);
        }
        if Instant::now() >= until {
            return Err(Failure::failed(format!(
                "{otherwise} after {} s: {}",
                limit.as_secs(),
                why_not(&registry)
            )));
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// The head's own reason, where it has one.
fn why_not(registry: &Value) -> String {
    let unformed = registry["unformed"][0]["reason"].as_str();
    match unformed.or(registry["rings"][0]["reason"].as_str()) {
        Some(reason) => reason.to_owned(),
        None => registry.to_string(),
    }
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map(Vec::as_slice).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_stage_is_a_line_with_its_layers_its_worker_and_who_stands_by() {
        let registry = json!({"rings": [{"stages": [
            {"layers": [0, 10], "member": {"worker": "a"}, "standby": {"worker": "b"}},
            {"layers": [10, 29], "member": {"worker": "c"}, "standby": null},
            {"layers": [29, 30], "member": {"worker": "d"}, "standby": {"worker": "b"}},
        ]}]});
        assert_eq!(
            stages(&registry),
            [
                "layers 0-9    a, b stands by",
                "layers 10-28  c, nobody stands by",
                "layers 29     d, b stands by"
            ]
        );
        assert!(stages(&json!({})).is_empty());
    }

    #[test]
    fn the_heads_reason_is_told_where_it_has_one() {
        assert_eq!(
            why_not(&json!({"unformed": [{"reason": "add a node"}], "rings": []})),
            "add a node"
        );
        assert_eq!(
            why_not(&json!({"rings": [{"reason": "loading"}]})),
            "loading"
        );
    }
}
