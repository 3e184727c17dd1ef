//! Made-up models for tests.

use std::sync::Arc;

use mesh_proto::NodeAddr;
use mesh_store::{Digest, Manifest, ManifestFile, Named, Piece, SignedManifest};

use crate::piece_map::PieceMap;
use crate::rules::Rules;

/// The bytes of piece `piece`, all of them as large as this one.
pub(crate) fn piece(piece: u32) -> Vec<u8> {
    vec![piece as u8; 4]
}

/// A manifest of one file with these many pieces.
pub(crate) fn manifest(name: &str, pieces: u32) -> Manifest {
    let all: Vec<u8> = (0..pieces).flat_map(piece).collect();
    Manifest {
        version: 1,
        name: name.to_owned(),
        files: vec![ManifestFile {
            path: "m.bin".to_owned(),
            bytes: all.len() as u64,
            sha256: Digest::of(&all),
            pieces: (0..pieces)
                .map(|number| Piece {
                    offset: u64::from(number) * 4,
                    bytes: 4,
                    sha256: Digest::of(piece(number)),
                })
                .collect(),
            tensors: Vec::new(),
        }],
    }
}

/// The pieces of such a model.
pub(crate) fn map(name: &str, pieces: u32) -> Arc<PieceMap> {
    Arc::new(PieceMap::new(SignedManifest::unsigned(manifest(
        name, pieces,
    ))))
}

/// A name in the store of some model.
pub(crate) fn named(name: &str, source: Option<&str>, vouched: Option<&str>) -> Named {
    Named {
        name: name.to_owned(),
        fingerprint: Digest::of(b""),
        source: source.map(str::to_owned),
        vouched: vouched.map(str::to_owned),
    }
}

/// A worker that shares, belongs to a head and may ask the hub.
pub(crate) fn rules() -> Rules {
    Rules {
        store: true,
        peers: true,
        hub: true,
        has_head: true,
        ..Rules::default()
    }
}

/// The worker `node`.
pub(crate) fn seat(node: &str) -> NodeAddr {
    NodeAddr {
        node_id: node.to_owned(),
        name: format!("worker {node}"),
        address: "127.0.0.1:9".to_owned(),
        addresses: Vec::new(),
    }
}
