//! Paths as clients write them: with a slash too many, with `/v1` twice or not at all.

use axum::extract::Request;
use axum::http::Uri;

/// The request with the path that was meant.
pub(super) fn as_meant(mut request: Request) -> Request {
    let uri = request.uri();
    if let Some(path) = meant(uri.path()) {
        let query = uri
            .query()
            .map_or_else(String::new, |query| format!("?{query}"));
        if let Ok(uri) = format!("{path}{query}").parse::<Uri>() {
            *request.uri_mut() = uri;
        }
    }
    request
}

/// The canonical form of a path; `None` if the path has that form already.
fn meant(path: &str) -> Option<String> {
    let mut parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty()).collect();
    while parts.starts_with(&["v1", "v1"]) {
        parts.remove(0);
    }
    let short = matches!(
        &parts[..],
        ["chat", "completions"]
            | ["completions" | "embeddings"]
            | ["models", ..]
            | ["images", "generations" | "edits"]
    );
    if short {
        parts.insert(0, "v1");
    }
    let path_meant = format!("/{}", parts.join("/"));
    (path_meant != path).then_some(path_meant)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slashes_and_versions_too_many_or_too_few_are_mended() {
        for (path, expected) in [
            ("/v1/models/", "/v1/models"),
            ("//v1//chat/completions", "/v1/chat/completions"),
            ("/v1/v1/embeddings", "/v1/embeddings"),
            ("/chat/completions", "/v1/chat/completions"),
            ("/models/Qwen/Qwen3-0.6B", "/v1/models/Qwen/Qwen3-0.6B"),
            ("/images/generations", "/v1/images/generations"),
            ("/images/edits/", "/v1/images/edits"),
            ("/health/", "/health"),
        ] {
            assert_eq!(meant(path).as_deref(), Some(expected), "{path}");
        }
        for path in [
            "/",
            "/v1/models",
            "/health",
            "/v2/models",
            "/v1/models/a%20b",
        ] {
            assert_eq!(meant(path), None, "{path}");
        }
        let request = Request::builder()
            .uri("http://h:1/v1/v1/models/?a=b")
            .body(axum::body::Body::empty());
        let request = as_meant(request.expect("a request"));
        assert_eq!(request.uri(), "/v1/models?a=b");
    }
}
