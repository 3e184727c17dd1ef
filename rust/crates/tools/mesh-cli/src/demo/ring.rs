//! The demo's ring: wait until it can lose a member, choose one, watch it continue.

use std::time::{Duration, Instant};

use mesh_api::RingStage;
use mesh_launcher::Mesh;

use super::LOOK;
use crate::failure::Failure;

/// Longest time to form and load a ring, on a slow disk.
const FORM_LIMIT: Duration = Duration::from_secs(90);
/// Longest time for the driver's report of a recovery to reach the head, once the answer has continued.
const RECOVERY_LIMIT: Duration = Duration::from_secs(10);

/// Waits until a ring serves and each of its stages has a standby that has loaded. Returns `/v1/mesh`.
pub(super) async fn wait_for_standbys(mesh: &mut Mesh) -> Result<mesh_api::Mesh, Failure> {
    let covered = |stage: &RingStage| {
        let standby = stage.standby.as_ref();
        standby.is_some_and(|standby| standby.phase == "ready")
    };
    let holds = |registry: &mesh_api::Mesh| {
        let stages = stages_of(registry);
        serves(registry) && !stages.is_empty() && stages.iter().all(covered)
    };
    wait(mesh, FORM_LIMIT, "no ring with standbys serves", holds).await
}

/// Waits until the ring serves again after a loss and says how it went. Returns `/v1/mesh`.
pub(super) async fn wait_for_recovery(mesh: &mut Mesh) -> Result<mesh_api::Mesh, Failure> {
    let holds = |registry: &mesh_api::Mesh| serves(registry) && !registry.recoveries.is_empty();
    wait(mesh, RECOVERY_LIMIT, "the ring did not recover", holds).await
}

/// The worker of a stage in the middle, as an index of `mesh.workers`.
pub(super) async fn member(mesh: &Mesh) -> Result<usize, Failure> {
    let registry = mesh.registry().await?;
    let stages = stages_of(&registry);
    let stage = stages
        .get(stages.len() / 2)
        .ok_or_else(|| Failure::failed(format!("no ring has stages: {registry:?}")))?;
    let member = &stage.member.worker;
    let mut workers = mesh.workers.iter();
    workers
        .position(|worker| worker.name() == member)
        .ok_or_else(|| {
            Failure::failed(format!(
                "the head names a worker {member:?} that is not ours"
            ))
        })
}

pub(super) fn stages(registry: &mesh_api::Mesh) -> Vec<String> {
    let line = |stage: &RingStage| {
        let [first, end] = stage.layers;
        let last = end.saturating_sub(1);
        let range = match first == last {
            true => first.to_string(),
            false => format!("{first}-{last}"),
        };
        let standby = match &stage.standby {
            Some(standby) => format!("{} stands by", standby.worker),
            None => "nobody stands by".to_owned(),
        };
        format!("layers {range:<6} {}, {standby}", stage.member.worker)
    };
    stages_of(registry).iter().map(line).collect()
}

/// The ring's own measurement of its last recovery.
pub(super) fn recovery(registry: &mesh_api::Mesh) -> String {
    match registry.recoveries.last() {
        Some(last) => {
            let (rows, gap) = (last.rows, last.gap_ms);
            let noun = if rows == 1 { "row" } else { "rows" };
            format!("ring recovered in {gap:.0} ms ({rows} {noun} recomputed)")
        }
        None => "the ring did not report its recovery".to_owned(),
    }
}

fn stages_of(registry: &mesh_api::Mesh) -> &[RingStage] {
    registry.rings.first().map_or(&[], |ring| &ring.stages)
}

fn serves(registry: &mesh_api::Mesh) -> bool {
    let ring = registry.rings.first();
    ring.is_some_and(|ring| ring.state == "serving")
}

/// Looks at `/v1/mesh` until `holds` says so.
async fn wait(
    mesh: &mut Mesh,
    limit: Duration,
    otherwise: &str,
    holds: impl Fn(&mesh_api::Mesh) -> bool,
) -> Result<mesh_api::Mesh, Failure> {
    let until = Instant::now() + limit;
    loop {
        let registry = mesh.registry().await?;
        if holds(&registry) {
            return Ok(registry);
        }
        if Instant::now() >= until {
            let (seconds, why) = (limit.as_secs(), why_not(&registry));
            return Err(Failure::failed(format!(
                "{otherwise} after {seconds} s: {why}"
            )));
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// The head's own reason, where it has one.
fn why_not(registry: &mesh_api::Mesh) -> String {
    let unformed = registry.unformed.first().map(|unformed| &unformed.reason);
    let ring = registry.rings.first().map(|ring| &ring.reason);
    match unformed.or(ring) {
        Some(reason) => reason.clone(),
        None => format!("{registry:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admin::read;
    use serde_json::json;

    #[test]
    fn a_stage_is_a_line_with_its_layers_its_worker_and_who_stands_by() {
        let registry = json!({"rings": [{"stages": [
            {"layers": [0, 10], "member": {"worker": "a"}, "standby": {"worker": "b"}},
            {"layers": [10, 29], "member": {"worker": "c"}, "standby": null},
            {"layers": [29, 30], "member": {"worker": "d"}, "standby": {"worker": "b"}},
        ]}]});
        assert_eq!(
            stages(&read(&registry).unwrap()),
            [
                "layers 0-9    a, b stands by",
                "layers 10-28  c, nobody stands by",
                "layers 29     d, b stands by"
            ]
        );
        assert!(stages(&mesh_api::Mesh::default()).is_empty());
    }

    #[test]
    fn the_heads_reason_is_told_where_it_has_one() {
        assert_eq!(
            why_not(&read(&json!({"unformed": [{"reason": "add a node"}], "rings": []})).unwrap()),
            "add a node"
        );
        assert_eq!(
            why_not(&read(&json!({"rings": [{"reason": "loading"}]})).unwrap()),
            "loading"
        );
    }
}
