//! A single HTTP request to a local service, for health checks of containers and the head's own commands.
//!
//! This does not justify a client library. The service is found by its state directory (see
//! [`addresses`](crate::addresses)).

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::addresses;

/// Errors of a request to a local service.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AskError {
    /// The service's address file cannot be read.
    #[error(
        "{path}: {source}: is the service running with this state directory, and with `http.listen` set?"
    )]
    NotRunning {
        /// Path of the address file.
        path: String,
        /// Error from the operating system.
        source: io::Error,
    },
    /// The service does not answer.
    #[error("http://{address}{path} does not answer: {reason}")]
    Silent {
        /// Address of the service.
        address: SocketAddr,
        /// Path of the request.
        path: String,
        /// Description of the failure.
        reason: String,
    },
    /// The service answered with an error status.
    #[error("the service says no ({status}): {answer}")]
    Refused {
        /// HTTP status.
        status: u16,
        /// Body of the answer.
        answer: String,
    },
}

/// Sends GET for a path to the service with this state directory; returns the body of the answer.
///
/// # Errors
/// If it does not run, does not answer within 5 s, or answers with another status than success.
pub async fn get(state_dir: &Path, path: &str) -> Result<String, AskError> {
    send(state_dir, path, |host| {
        format!("GET {path} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n")
    })
    .await
}

/// Posts JSON to a path that needs a key.
///
/// # Errors
/// As [`get`].
pub async fn post(state_dir: &Path, path: &str, key: &str, json: &str) -> Result<String, AskError> {
    let length = json.len();
    send(state_dir, path, |host| {
        format!(
            "POST {path} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\nauthorization: Bearer {key}\r\n\
             content-type: application/json\r\ncontent-length: {length}\r\n\r\n{json}"
        )
    })
    .await
}

async fn send(
    state_dir: &Path,
    path: &str,
    request: impl FnOnce(SocketAddr) -> String,
) -> Result<String, AskError> {
    let not_running = |source| AskError::NotRunning {
        path: addresses::path(state_dir).display().to_string(),
        source,
    };
    let bound = addresses::read(state_dir).map_err(not_running)?;
    let no_http = || io::Error::new(io::ErrorKind::NotFound, "it names no HTTP address");
    let address = reachable(*bound.get("http").ok_or_else(|| not_running(no_http()))?);
    let silent = |reason: String| AskError::Silent {
        address,
        path: path.to_owned(),
        reason,
    };
    let answer = tokio::time::timeout(LIMIT, exchange(address, &request(address))).await;
    let answer = answer
        .map_err(|_| silent("no answer in time".to_owned()))?
        .map_err(|error| silent(error.to_string()))?;
    let (status, body) = parse(&answer).ok_or_else(|| silent("that is not HTTP".to_owned()))?;
    match status {
        200..=299 => Ok(body.to_owned()),
        _ => Err(AskError::Refused {
            status,
            answer: body.to_owned(),
        }),
    }
}

async fn exchange(address: SocketAddr, request: &str) -> io::Result<String> {
    let mut stream = TcpStream::connect(address).await?;
    stream.write_all(request.as_bytes()).await?;
    let mut answer = String::new();
    stream.take(LONGEST).read_to_string(&mut answer).await?;
    Ok(answer)
}

/// Parses status and body of an answer that ends with the connection.
fn parse(answer: &str) -> Option<(u16, &str)> {
    let (head, body) = answer.split_once("\r\n\r\n")?;
    let status = head.strip_prefix("HTTP/1.1 ")?.get(..3)?.parse().ok()?;
    Some((status, body))
}

/// Replaces an unspecified address by loopback, to connect to a service that listens on all addresses.
fn reachable(mut address: SocketAddr) -> SocketAddr {
    if address.ip().is_unspecified() {
        address.set_ip(match address {
            SocketAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
            SocketAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
        });
    }
    address
}

const LIMIT: Duration = Duration::from_secs(5);
const LONGEST: u64 = 1 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_taken_apart() {
        let answer = parse("HTTP/1.1 503 Service Unavailable\r\nx: y\r\n\r\n{}");
        assert_eq!(answer, Some((503, "{}")));
        assert_eq!(parse("SSH-2.0-OpenSSH"), None);
    }

    #[tokio::test]
    async fn what_does_not_run_is_said() {
        let dir = tempfile::tempdir().expect("a folder");
        let error = get(dir.path(), "/health").await.expect_err("nothing runs");
        assert!(error.to_string().contains("addresses.json"), "{error}");
        // A service that ended without removing its file.
        let closed = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = closed.local_addr().expect("bound");
        drop(closed);
        addresses::write(dir.path(), &[("http".to_owned(), address)].into()).expect("written");
        let error = get(dir.path(), "/health").await.expect_err("nothing there");
        assert!(matches!(error, AskError::Silent { .. }), "{error}");
    }
}
