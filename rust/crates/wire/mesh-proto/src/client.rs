//! Sessions of clients that hold an API key or a curtain token.

use prost::Message;

messages! {
    /// A client asks for a session (DCF 0x34).
    pub struct ClientHello {
        /// Text of its API key or curtain token.
        credential: String = [string, tag = 1],
        /// Tenant that the client means to act for; empty if it names none.
        tenant: String = [string, tag = 2],
    }

    /// The session that the head opens (DCF 0x35).
    pub struct ClientWelcome {
        /// Number of the session, at the start of every sealed payload.
        session: u64 = [fixed64, tag = 1],
        /// Seconds after which it ends.
        lifetime_seconds: u32 = [uint32, tag = 2],
        /// Seconds without a message of the client after which it ends.
        idle_seconds: u32 = [uint32, tag = 3],
        /// UDP port of the head for sealed datagrams.
        port: u32 = [uint32, tag = 4],
        /// IP address of that port; empty if it is the one at which the client reached the head.
        address: String = [string, tag = 5],
    }
}
