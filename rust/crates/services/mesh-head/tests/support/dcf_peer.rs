//! A raw DCF peer, written from the protocol alone.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::net::UdpSocket;

/// A socket that speaks to a head.
pub(crate) struct DcfPeer {
    pub(crate) socket: UdpSocket,
    pub(crate) head: SocketAddr,
}

impl DcfPeer {
    pub(crate) async fn toward(head: SocketAddr) -> Self {
        Self {
            socket: UdpSocket::bind("127.0.0.1:0").await.unwrap(),
            head,
        }
    }

    pub(crate) async fn send(&self, kind: u8, sequence: u32, payload: &[u8]) {
        self.send_raw(&datagram(kind, sequence, payload)).await;
    }

    pub(crate) async fn send_raw(&self, bytes: &[u8]) {
        self.socket.send_to(bytes, self.head).await.unwrap();
    }

    /// Kind, sequence and payload of the next datagram.
    pub(crate) async fn receive(&self) -> (u8, u32, Vec<u8>) {
        let received = self.receive_within(Duration::from_secs(10)).await;
        received.expect("a datagram within 10 s")
    }

    pub(crate) async fn receive_within(&self, limit: Duration) -> Option<(u8, u32, Vec<u8>)> {
        let buffer = self.receive_raw(limit).await?;
        let len = buffer.len();
        let sequence = u32::from_be_bytes(buffer[1..5].try_into().unwrap());
        let payload_len = u32::from_be_bytes(buffer[13..17].try_into().unwrap()) as usize;
        assert_eq!(len, 17 + payload_len);
        Some((buffer[0], sequence, buffer[17..len].to_vec()))
    }

    pub(crate) async fn receive_raw(&self, limit: Duration) -> Option<Vec<u8>> {
        let mut buffer = vec![0; 65_536];
        let received = tokio::time::timeout(limit, self.socket.recv_from(&mut buffer)).await;
        let (len, _) = received.ok()?.unwrap();
        buffer.truncate(len);
        Some(buffer)
    }

    /// Kind, sequence and payload of the next datagram, which is of v5.1.
    pub(crate) async fn receive_new(&self) -> (u8, u32, Vec<u8>) {
        let received = self.receive_raw(Duration::from_secs(10)).await;
        let bytes = received.expect("a datagram within 10 s");
        assert_eq!(bytes[0], 0x51, "{bytes:?}");
        let sequence = u32::from_be_bytes(bytes[2..6].try_into().unwrap());
        let payload_len = u32::from_be_bytes(bytes[14..18].try_into().unwrap()) as usize;
        assert_eq!(bytes.len(), 18 + payload_len);
        (bytes[1], sequence, bytes[18..].to_vec())
    }

    /// Sends a v5.1 datagram.
    pub(crate) async fn send_new(&self, kind: u8, sequence: u32, payload: &[u8]) {
        let bytes = [&[0x51], &datagram(kind, sequence, payload)[..]].concat();
        self.send_raw(&bytes).await;
    }

    pub(crate) async fn nothing_comes(&self) {
        let received = self.receive_within(Duration::from_millis(300)).await;
        assert_eq!(received, None);
    }
}

pub(crate) fn datagram(kind: u8, sequence: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = vec![kind];
    bytes.extend(sequence.to_be_bytes());
    bytes.extend(1_700_000_000_000_000_u64.to_be_bytes());
    bytes.extend(u32::try_from(payload.len()).unwrap().to_be_bytes());
    bytes.extend(payload);
    bytes
}
