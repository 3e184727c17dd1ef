//! Serving an `axum` router until the drain, then letting open requests finish.

use std::future::IntoFuture;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use axum::Router;
use axum::serve::ListenerExt;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

/// Binds a listener; the error names the address.
pub async fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    mesh_base::listen::tcp(address).map_err(|error| {
        io::Error::new(
            error.kind(),
            format!("cannot listen on {address}/tcp: {error}"),
        )
    })
}

/// Serves `router` until `draining`; then takes no new connection and gives open requests `limit` to finish.
///
/// Handlers find the peer's address as `ConnectInfo<SocketAddr>`.
pub async fn serve(
    listener: TcpListener,
    router: Router,
    draining: CancellationToken,
    limit: Duration,
) -> io::Result<()> {
    // A streamed token is a small write that must not wait for the previous one's acknowledgement.
    let listener = listener.tap_io(|stream| {
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, "TCP_NODELAY refused");
        }
    });
    let service = router.into_make_service_with_connect_info::<SocketAddr>();
    let server =
        axum::serve(listener, service).with_graceful_shutdown(draining.clone().cancelled_owned());
    tokio::select! {
        result = server.into_future() => result,
        () = async { draining.cancelled().await; tokio::time::sleep(limit).await } => {
            tracing::warn!(limit_seconds = limit.as_secs_f64(), "requests still open at the end of the drain are cut");
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::extract::ConnectInfo;
    use axum::routing::get;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;

    async fn slow(ConnectInfo(peer): ConnectInfo<SocketAddr>) -> String {
        tokio::time::sleep(Duration::from_millis(100)).await;
        format!("hello {}", peer.ip())
    }

    #[tokio::test]
    async fn an_open_request_finishes_during_the_drain_and_new_connections_are_refused() {
        let listener = bind(([127, 0, 0, 1], 0).into()).await.expect("bind");
        let address = listener.local_addr().expect("address");
        let draining = CancellationToken::new();
        let router = Router::new().route("/", get(slow));
        let server = tokio::spawn(serve(
            listener,
            router,
            draining.clone(),
            Duration::from_secs(5),
        ));

        let mut client = TcpStream::connect(address).await.expect("connect");
        client
            .write_all(b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
            .await
            .expect("send");
        tokio::time::sleep(Duration::from_millis(30)).await;
        draining.cancel();
        let mut answer = String::new();
        client.read_to_string(&mut answer).await.expect("answer");
        assert!(answer.ends_with("hello 127.0.0.1"), "{answer}");
        server.await.expect("join").expect("served");
        assert!(TcpStream::connect(address).await.is_err());
    }

    #[tokio::test]
    async fn a_request_beyond_the_limit_is_cut() {
        let listener = bind(([127, 0, 0, 1], 0).into()).await.expect("bind");
        let address = listener.local_addr().expect("address");
        let draining = CancellationToken::new();
        let router = Router::new().route("/", get(std::future::pending::<String>));
        let server = tokio::spawn(serve(
            listener,
            router,
            draining.clone(),
            Duration::from_millis(50),
        ));
        let mut client = TcpStream::connect(address).await.expect("connect");
        client
            .write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
            .await
            .expect("send");
        tokio::time::sleep(Duration::from_millis(20)).await;
        draining.cancel();
        tokio::time::timeout(Duration::from_secs(2), server)
            .await
            .expect("in time")
            .expect("join")
            .expect("served");
    }

    #[tokio::test]
    async fn a_taken_port_is_named() {
        let listener = bind(([127, 0, 0, 1], 0).into()).await.expect("bind");
        let address = listener.local_addr().expect("address");
        let error = bind(address).await.expect_err("taken").to_string();
        assert!(error.contains(&address.to_string()), "{error}");
    }
}
