//! `mesh-worker health`: asks a running worker over HTTP, for container health checks.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;
use std::time::Duration;

use mesh_service::addresses;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// Why a worker is not healthy.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Unhealthy {
    /// It has written no addresses.
    #[error("no worker runs with the state directory {dir}: {source}")]
    NotRunning {
        /// The state directory.
        dir: String,
        /// What the system said.
        source: io::Error,
    },
    /// It does not answer.
    #[error("the worker at http://{address}{path} does not answer: {reason}")]
    Silent {
        /// Its address.
        address: SocketAddr,
        /// What was asked for.
        path: &'static str,
        /// What happened instead.
        reason: String,
    },
    /// It says no.
    #[error("the worker is not well: {answer}")]
    Refused {
        /// Its own words.
        answer: String,
    },
}

/// Asks the worker with this state directory for `path`; returns its words.
pub async fn ask(state_dir: &Path, path: &'static str) -> Result<String, Unhealthy> {
    let not_running = |source| Unhealthy::NotRunning {
        dir: state_dir.display().to_string(),
        source,
    };
    let bound = addresses::read(state_dir).map_err(not_running)?;
    let missing = || {
        not_running(io::Error::new(
            io::ErrorKind::NotFound,
            "it has no HTTP address",
        ))
    };
    let address = reachable(*bound.get("http").ok_or_else(missing)?);
    let silent = |reason: String| Unhealthy::Silent {
        address,
        path,
        reason,
    };
    let answer = tokio::time::timeout(TIMEOUT, get(address, path)).await;
    let answer = answer.map_err(|_| silent("no answer in time".to_owned()))?;
    let answer = answer.map_err(|error| silent(error.to_string()))?;
    let (head, body) = answer
        .split_once("\r\n\r\n")
        .ok_or_else(|| silent("its answer is not HTTP".to_owned()))?;
    if head.split(' ').nth(1) == Some("200") {
        Ok(body.to_owned())
    } else {
        Err(Unhealthy::Refused {
            answer: body.to_owned(),
        })
    }
}

async fn get(address: SocketAddr, path: &str) -> io::Result<String> {
    let mut stream = TcpStream::connect(address).await?;
    let request = format!("GET {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut answer = String::new();
    stream.take(LONGEST).read_to_string(&mut answer).await?;
    Ok(answer)
}

/// Who listens everywhere is asked on loopback.
fn reachable(address: SocketAddr) -> SocketAddr {
    let ip = match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    SocketAddr::new(ip, address.port())
}

const TIMEOUT: Duration = Duration::from_secs(5);
const LONGEST: u64 = 64 << 10;
