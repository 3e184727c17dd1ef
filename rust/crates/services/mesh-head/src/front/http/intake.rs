//! Reads bodies of requests within their client's share of the head's memory, and parses them where they hold
//! up no other request.

use axum::body::{Body, Bytes};
use axum::extract::rejection::BytesRejection;
use axum::http::StatusCode;
use futures::StreamExt;
use mesh_api::Code;
use mesh_service::http::{NoRoom, TooSlow, cause_of};

use super::error::ApiError;
use super::keys::Client;
use super::state::Api;
use crate::api::parse;
use crate::mesh::{Lease, Mesh};

/// Reads a body. Its memory is taken as it comes. The rest of one that is refused is read by the server, so that
/// the client reads why.
pub(super) async fn body(
    api: &Api,
    client: &Client,
    body: Body,
) -> Result<(Bytes, Lease), ApiError> {
    let limit = api.mesh.config.http.body_limit;
    let mut parts = body.into_data_stream();
    let mut lease = api.mesh.lease(client.origin(), LEAST)?;
    let mut read: Vec<u8> = Vec::new();
    let (mut bytes, mut leased) = (0, LEAST);
    while let Some(part) = parts.next().await {
        let part = part.map_err(|error| unreadable(&error))?;
        bytes += part.len() as u64;
        if bytes > limit {
            return Err(too_large(limit));
        }
        // The parsed request follows the body and has as many bytes.
        if 2 * bytes > leased {
            let exact = 2 * bytes - leased;
            let ample = exact.max(leased);
            // Seldom, if there is room for that; else no more than it needs.
            let added = lease.add(ample).map(|()| ample);
            leased += added.or_else(|_| lease.add(exact).map(|()| exact))?;
        }
        // Not by doubling, and never beyond what was leased for it.
        if read.capacity() - read.len() < part.len() {
            let room = usize::try_from(leased / 2).unwrap_or(usize::MAX);
            let spare = room
                .saturating_sub(read.len())
                .min(GROWTH.max(read.len() / 4));
            read.reserve_exact(part.len().max(spare));
        }
        read.extend_from_slice(&part);
    }
    lease.set((2 * bytes).max(LEAST))?;
    Ok((read.into(), lease))
}

/// A body that axum read, for an administrator.
pub(super) type Received = Result<Bytes, BytesRejection>;

/// The body, or the error that tells why there is none.
pub(super) fn received(api: &Api, body: Received) -> Result<Bytes, ApiError> {
    body.map_err(|error| match error.status() {
        StatusCode::PAYLOAD_TOO_LARGE => too_large(api.mesh.config.http.body_limit),
        _ => unreadable(&error),
    })
}

fn too_large(limit: u64) -> ApiError {
    let text = format!("the body is over the limit of {limit} bytes (http.body_limit)");
    ApiError::new(Code::RequestTooLarge, text)
}

fn unreadable(error: &(dyn std::error::Error + 'static)) -> ApiError {
    if let Some(slow) = cause_of::<TooSlow>(error) {
        return ApiError::new(Code::RequestTimeout, slow.to_string());
    }
    if let Some(full) = cause_of::<NoRoom>(error) {
        return ApiError::passing(Code::Overloaded, full.to_string());
    }
    let text = format!("the body cannot be read: {error}");
    ApiError::new(Code::InvalidBody, text)
}

/// Bytes by which room for a long body grows.
const GROWTH: usize = 128 << 10;
/// Least bytes that a request is charged.
const LEAST: u64 = 4 << 10;

pub(super) async fn parsed<T: Send + 'static>(
    mesh: &Mesh,
    body: Bytes,
    parse: impl FnOnce(&[u8]) -> T + Send + 'static,
) -> Result<T, ApiError> {
    let parsed = parse::parsed(&mesh.reading, body, parse).await;
    parsed.map_err(|_| ApiError::new(Code::InternalError, "the request could not be read"))
}

#[cfg(test)]
mod tests {
    use axum::extract::{FromRequest as _, Request};
    use futures::stream;

    use super::*;

    #[tokio::test]
    async fn the_cause_of_a_body_that_axum_could_not_read_is_found() {
        let parts = stream::iter([Err::<Bytes, _>(axum::Error::new(NoRoom))]);
        let request = Request::new(Body::from_stream(parts));
        let error = Bytes::from_request(request, &()).await.unwrap_err();
        let told = unreadable(&error);
        assert_eq!(told.status, StatusCode::SERVICE_UNAVAILABLE);
        assert_eq!(told.code, Code::Overloaded);
    }
}
