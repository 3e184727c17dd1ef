//! States of a mesh: what the head says about its workers, and whether all services are alive.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use mesh_testkit::{Mesh, Service};

/// The configuration of a worker that has nothing to load; it looks for models in `folder`.
pub fn idle_worker(folder: &Path) -> String {
    format!(
        "models = []\nlocal_models = {:?}\n",
        folder.display().to_string()
    )
}

/// The registry, once `holds` is true of it.
///
/// # Errors
/// After a minute, with `what` was waited for and the ends of the logs.
pub async fn registry_until(
    mesh: &Mesh,
    what: &str,
    holds: impl Fn(&mesh_api::Mesh) -> bool,
) -> Result<mesh_api::Mesh> {
    let begun = Instant::now();
    loop {
        let registry = mesh.registry().await?;
        if holds(&registry) {
            return Ok(registry);
        }
        let logs: String = mesh.workers.iter().map(Service::log_end).collect();
        ensure!(
            begun.elapsed() < LIMIT,
            "not within {LIMIT:?}: {what}: {registry:?}\n{}\n{logs}",
            mesh.head.log_end()
        );
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// A worker's reasons for not being ready, once they contain `wanted`.
///
/// # Errors
/// After a minute and a half, with its reasons and the end of its log.
pub async fn unready_until(worker: &Service, wanted: &str) -> Result<String> {
    let begun = Instant::now();
    loop {
        let url = format!("http://{}/ready", worker.address("http")?);
        let text = reqwest::get(url).await?.text().await?;
        if text.contains(wanted) {
            return Ok(text);
        }
        let limit = LIMIT * 3 / 2;
        ensure!(begun.elapsed() < limit, "{text}\n{}", worker.log_end());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Number of workers in a registry.
pub fn worker_count(registry: &mesh_api::Mesh) -> usize {
    registry.workers.len()
}

/// Checks that the head, all workers and the shim run, and that none has panicked.
///
/// # Errors
/// The name of the first that does not, and the end of its log.
pub fn ensure_alive(mesh: &mut Mesh) -> Result<()> {
    let services = mesh.shim.iter_mut().chain(&mut mesh.workers);
    for service in services.chain([&mut mesh.head]) {
        let name = service.name().to_owned();
        ensure!(
            service.is_running(),
            "{name} is gone:\n{}",
            service.log_end()
        );
        ensure!(
            !service.log().contains("panicked"),
            "{name} panicked:\n{}",
            service.log_end()
        );
    }
    Ok(())
}

const LIMIT: Duration = Duration::from_secs(60);
