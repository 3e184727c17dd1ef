//! The dialling side of links.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use dcf::{ErrorCode, MsgType};
use mesh_base::addresses::race;
use mesh_base::listen;
use quinn::crypto::rustls::QuicClientConfig;
use quinn::{ClientConfig, Connection};

use super::config::LinkConfig;
use super::endpoint::LinkEndpoint;
use super::error::{Closed, ConnectError};
use super::link::{Link, close, peer_certificate};
use super::stream::RecvHalf;
use super::tls::{self, LINK_PROTOCOL};
use crate::trust::{EXPELLED, Member, NodeIdentity, Role, TrustError};

/// Makes links from one UDP socket.
#[derive(Clone, Debug)]
pub struct Connector {
    carrier: LinkEndpoint,
    identity: NodeIdentity,
    config: LinkConfig,
}

impl Connector {
    /// A connector on a local address; port 0 takes a free one.
    pub fn bind(
        address: SocketAddr,
        identity: NodeIdentity,
        config: LinkConfig,
    ) -> Result<Self, ConnectError> {
        Ok(Self {
            carrier: LinkEndpoint::bind(address, None)?,
            identity,
            config,
        })
    }

    /// A connector on any free port, for peers of the address family of `peer`.
    pub fn toward(
        peer: SocketAddr,
        identity: NodeIdentity,
        config: LinkConfig,
    ) -> Result<Self, ConnectError> {
        Self::bind(listen::toward(peer), identity, config)
    }

    /// Connects to the first of these addresses of one node that answers, as [`race`] tries them, from a socket of its own.
    /// Returns that address, too.
    pub async fn to_any(
        addresses: &[SocketAddr],
        role: Role,
        identity: &NodeIdentity,
        config: &LinkConfig,
    ) -> Result<(SocketAddr, Self, Link), ConnectError> {
        let attempt = |address| async move {
            let connector = Self::toward(address, identity.clone(), config.clone())?;
            let link = connector.connect(address, role).await?;
            Ok((connector, link))
        };
        let (address, (connector, link)) = race(addresses, attempt)
            .await
            .map_err(ConnectError::of_all)?;
        Ok((address, connector, link))
    }

    /// Connects to a node that must have this role. Returns when both sides have admitted each other.
    pub async fn connect(&self, address: SocketAddr, role: Role) -> Result<Link, ConnectError> {
        let client = tls::client(&self.identity, LINK_PROTOCOL, self.config.classical)?;
        let make = async {
            let connection = dial(&self.carrier, client, address, &self.config).await?;
            let peer = peer_member(&connection, address, role)?;
            if let Some(refusal) = self.identity.deny_list().refusal_of(&peer) {
                let text = refusal.to_string();
                close(&connection, EXPELLED, &text);
                return Err(ConnectError::Expelled { address, text });
            }
            let link = Link::new(connection.clone(), peer, self.config.max_message);
            let said_at = wait_for_admission(connection, address, &self.config).await?;
            if link.role() == Role::Head {
                self.identity.clock().heard(said_at);
            }
            Ok::<_, ConnectError>(link)
        };
        let link = within(self.config.handshake_timeout, address, make).await?;
        self.carrier.watch(&link);
        link.guarded_by(self.identity.deny_list());
        Ok(link)
    }

    /// Closes all links and waits until the peers know.
    pub async fn shutdown(&self, code: ErrorCode, text: &str) {
        self.carrier.shutdown(code, text).await;
    }
}

/// Connects to the head of the node's mesh with default settings, from a socket of its own.
pub async fn connect(head: SocketAddr, identity: &NodeIdentity) -> Result<Link, ConnectError> {
    Connector::toward(head, identity.clone(), LinkConfig::default())?
        .connect(head, Role::Head)
        .await
}

/// Opens a QUIC connection to `address`; the TLS configuration determines the accepted peers.
pub(super) async fn dial(
    carrier: &LinkEndpoint,
    tls: QuicClientConfig,
    address: SocketAddr,
    config: &LinkConfig,
) -> Result<Connection, ConnectError> {
    let mut client = ClientConfig::new(Arc::new(tls));
    client.transport_config(config.transport());
    // The name is neither sent nor checked: certificates name nodes, not addresses.
    carrier
        .endpoint
        .connect_with(client, address, "hydramesh")
        .map_err(|error| ConnectError::Address {
            address,
            reason: error.to_string(),
        })?
        .await
        .map_err(|error| ConnectError::new(address, error))
}

pub(super) async fn within<T, E: From<ConnectError>>(
    limit: Duration,
    address: SocketAddr,
    work: impl Future<Output = Result<T, E>>,
) -> Result<T, E> {
    match tokio::time::timeout(limit, work).await {
        Ok(result) => result,
        Err(_) => Err(ConnectError::NoAnswer { address }.into()),
    }
}

/// The peer's certificate contents, if the peer is the expected one.
pub(super) fn peer_member(
    connection: &Connection,
    address: SocketAddr,
    role: Role,
) -> Result<Member, ConnectError> {
    let certificate = peer_certificate(connection)
        .ok_or_else(|| TrustError::Mismatch("the peer showed no certificate".to_owned()))?;
    let peer = Member::from_certificate(&certificate)?;
    if peer.role != role {
        let text = "you are not whom I called";
        close(connection, ErrorCode::UNAUTHORIZED, text);
        return Err(ConnectError::WrongRole {
            address,
            expected: role,
            found: peer.role,
        });
    }
    Ok(peer)
}

/// Waits for the peer's Ack, by which it admits this node; returns its time by the peer's clock.
async fn wait_for_admission(
    connection: Connection,
    address: SocketAddr,
    config: &LinkConfig,
) -> Result<u64, ConnectError> {
    let stream = connection.accept_uni().await;
    let stream = stream.map_err(|error| ConnectError::new(address, error))?;
    match RecvHalf::new(stream, config.max_message).recv().await {
        Ok(Some(message)) if message.kind == MsgType::ACK => Ok(message.timestamp_us),
        _ => Err(match connection.close_reason() {
            Some(error) => ConnectError::new(address, error),
            None => ConnectError::Failed {
                address,
                reason: Closed::Failed("the peer did not say that it admits this node".to_owned()),
            },
        }),
    }
}
