//! The carriers: batched UDP, QUIC links with mesh-issued certificates, join tokens.
