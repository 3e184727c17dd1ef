//! Whole answers that take long: after a while the status, the headers and then blanks are sent, so that
//! clients and proxies that limit silence see that work goes on.
//!
//! JSON may begin with blanks. A failure after that can only be the error's body under the status 200; the
//! operator chooses how late that may be (`http.early_headers`).

use std::convert::Infallible;
use std::future::Future;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use futures::{StreamExt, stream};

use super::error::ApiError;
use crate::mesh::Lease;

/// Times at which a whole answer begins to be sent before it is complete.
#[derive(Debug, Clone, Copy)]
pub(super) struct Hold {
    /// Time before the first blank; 0 means never.
    pub after: Duration,
    /// Interval between two blanks.
    pub every: Duration,
}

/// The response with the JSON that `answer` comes to.
///
/// # Errors
/// Its failure, if that comes before the status is sent.
pub(super) async fn whole<B: Into<Bytes> + Send + 'static>(
    answer: impl Future<Output = Result<B, ApiError>> + Send + 'static,
    hold: Hold,
) -> Result<Response, ApiError> {
    let mut answer = Box::pin(answer);
    if hold.after.is_zero() {
        return answer.await.map(|body| json(body.into()));
    }
    if let Ok(early) = tokio::time::timeout(hold.after, &mut answer).await {
        return early.map(|body| json(body.into()));
    }
    let rest = stream::unfold(Some(answer), move |answer| async move {
        let mut answer = answer?;
        Some(match tokio::time::timeout(hold.every, &mut answer).await {
            Err(_) => (BLANK, Some(answer)),
            Ok(Ok(body)) => (body.into(), None),
            Ok(Err(error)) => (error.body().into(), None),
        })
    });
    let body = stream::iter([BLANK]).chain(rest).map(Ok::<_, Infallible>);
    Ok(json(Body::from_stream(body)))
}

/// A body whose memory counts until all of it is sent.
pub(super) fn counted(body: Vec<u8>, mut lease: Lease) -> Bytes {
    // It takes no more memory than was counted for it.
    let _ = lease.set(body.len() as u64);
    Bytes::from_owner(Counted {
        body,
        _lease: lease,
    })
}

struct Counted {
    body: Vec<u8>,
    _lease: Lease,
}

impl AsRef<[u8]> for Counted {
    fn as_ref(&self) -> &[u8] {
        &self.body
    }
}

fn json(body: impl Into<Body>) -> Response {
    let json = HeaderValue::from_static("application/json");
    ([(header::CONTENT_TYPE, json)], body.into()).into_response()
}

const BLANK: Bytes = Bytes::from_static(b" ");

#[cfg(test)]
mod tests {
    use axum::body::to_bytes;
    use axum::http::StatusCode;

    use super::*;

    async fn answer(
        after: Duration,
        result: Result<&'static str, &'static str>,
    ) -> Result<Vec<u8>, ApiError> {
        tokio::time::sleep(after).await;
        let failed = |text| ApiError::new(mesh_api::Code::WorkersFailed, text);
        result.map(Vec::from).map_err(failed)
    }

    const HOLD: Hold = Hold {
        after: Duration::from_millis(300),
        every: Duration::from_millis(100),
    };
    const LATE: Duration = Duration::from_millis(800);

    #[tokio::test]
    async fn a_quick_answer_or_failure_is_as_it_ever_was() {
        let response = whole(answer(Duration::ZERO, Ok("{}")), HOLD).await.unwrap();
        assert_eq!(to_bytes(response.into_body(), 99).await.unwrap(), "{}");
        let error = whole(answer(Duration::ZERO, Err("x")), HOLD).await;
        assert_eq!(error.unwrap_err().status, StatusCode::BAD_GATEWAY);
        let never = Hold {
            after: Duration::ZERO,
            ..HOLD
        };
        let error = whole(answer(LATE, Err("x")), never).await;
        assert_eq!(error.unwrap_err().status, StatusCode::BAD_GATEWAY);
    }

    #[tokio::test]
    async fn a_late_answer_is_preceded_by_blanks_and_a_late_failure_is_a_body() {
        let response = whole(answer(LATE, Ok("{\"a\":1}")), HOLD).await.unwrap();
        assert_eq!(response.status(), StatusCode::OK);
        assert_eq!(response.headers()["content-type"], "application/json");
        let body = to_bytes(response.into_body(), 99).await.unwrap();
        let text = std::str::from_utf8(&body).unwrap();
        assert!(text.starts_with("  "), "{text:?}");
        assert_eq!(text.trim_start(), "{\"a\":1}");
        let response = whole(answer(LATE, Err("gone")), HOLD).await.unwrap();
        let body = to_bytes(response.into_body(), 999).await.unwrap();
        let value: serde_json::Value = serde_json::from_slice(&body).unwrap();
        assert_eq!(value["error"]["code"], "workers_failed");
    }
}
