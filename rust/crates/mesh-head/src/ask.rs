//! One HTTP request to our own head: enough for a health check, and no reason for a client library.

use std::net::SocketAddr;

use anyhow::{Context, Result};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// What the head answered.
pub(crate) struct Answer {
    /// HTTP status.
    pub(crate) status: u16,
    /// The body.
    pub(crate) body: String,
}

/// Asks for a path.
pub(crate) async fn get(head: SocketAddr, path: &str) -> Result<Answer> {
    send(
        head,
        &format!("GET {path} HTTP/1.1\r\nhost: {head}\r\nconnection: close\r\n\r\n"),
    )
    .await
}

/// Sends JSON to a path that wants a key.
pub(crate) async fn post(head: SocketAddr, path: &str, key: &str, json: &str) -> Result<Answer> {
    let length = json.len();
    let request = format!(
        "POST {path} HTTP/1.1\r\nhost: {head}\r\nconnection: close\r\nauthorization: Bearer {key}\r\n\
         content-type: application/json\r\ncontent-length: {length}\r\n\r\n{json}"
    );
    send(head, &request).await
}

async fn send(head: SocketAddr, request: &str) -> Result<Answer> {
    let mut stream = TcpStream::connect(head)
        .await
        .with_context(|| format!("no head listens at {head}"))?;
    stream.write_all(request.as_bytes()).await?;
    let mut answer = String::new();
    stream.take(LONGEST).read_to_string(&mut answer).await?;
    parse(&answer).with_context(|| format!("{head} does not speak HTTP"))
}

/// Status and body of an answer whose end is the end of the connection.
fn parse(answer: &str) -> Option<Answer> {
    let (head, body) = answer.split_once("\r\n\r\n")?;
    let status = head.strip_prefix("HTTP/1.1 ")?.get(..3)?.parse().ok()?;
    Some(Answer {
        status,
        body: body.to_owned(),
    })
}

const LONGEST: u64 = 1 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_taken_apart() {
        let answer = parse("HTTP/1.1 503 Service Unavailable\r\nx: y\r\n\r\n{}").unwrap();
        assert_eq!((answer.status, answer.body.as_str()), (503, "{}"));
        assert!(parse("SSH-2.0-OpenSSH").is_none());
    }
}
