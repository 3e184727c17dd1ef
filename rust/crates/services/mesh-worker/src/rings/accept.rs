//! Streams that other workers open.

use std::sync::Arc;
use std::time::Instant;

use dcf::MsgType;
use mesh_net::quic::{Link, Listener, MsgStream, probe};
use mesh_net::trust::Role;
use mesh_proto::RingHello;
use mesh_worker_core::deployments::STRAY_PATIENCE;
use tokio::runtime::Handle;

use super::context::Rings;
use super::streams;
use crate::models;

/// Takes in links and their streams; what concerns models is served on `main`.
pub(super) async fn accept(rings: Arc<Rings>, listener: Listener, main: Handle) {
    while let Some(link) = listener.accept().await {
        if link.role() != Role::Worker {
            tracing::warn!(peer = link.node_name(), "only workers have business here");
            continue;
        }
        tokio::spawn(accept_streams(rings.clone(), link, main.clone()));
    }
}

async fn accept_streams(rings: Arc<Rings>, link: Link, main: Handle) {
    while let Ok(mut stream) = link.accept().await {
        let (rings, link, main) = (rings.clone(), link.clone(), main.clone());
        tokio::spawn(async move {
            let hello = match streams::first(&mut stream).await {
                Ok(first) if models::is_ours(first.kind) => {
                    let node = link.node_id().to_owned();
                    main.spawn(models::serve(rings.models.clone(), node, first, stream));
                    return;
                }
                Ok(first) if first.kind == MsgType::PROBE => {
                    if let Err(error) = probe::answer(&first, stream).await {
                        tracing::debug!(peer = link.node_name(), %error, "probe not answered");
                    }
                    return;
                }
                Ok(first) => streams::hello(first),
                Err(broken) => Err(broken),
            };
            match hello {
                Ok(hello) => {
                    let peer = link.node_id().to_owned();
                    deliver(&rings, hello, peer, stream).await;
                }
                Err(broken) => {
                    tracing::debug!(
                        peer = link.node_name(),
                        reason = broken.text,
                        "stream refused"
                    );
                    streams::refuse(stream);
                }
            }
        });
    }
}

/// A stream of another member, for a ring that the head may be about to name.
async fn deliver(rings: &Rings, hello: RingHello, peer: String, stream: MsgStream) {
    let (refused, waits) = rings.core().change(|core| {
        let deployments = &mut core.deployments;
        let refused = deployments.stream_came(hello, peer, stream, Instant::now());
        (refused, deployments.has_strays())
    });
    refused.into_iter().for_each(streams::refuse);
    if waits {
        tokio::time::sleep(STRAY_PATIENCE).await;
        let now = Instant::now();
        let expired = rings
            .core()
            .with(|core| core.deployments.expire_strays(now));
        expired.into_iter().for_each(streams::refuse);
    }
}
