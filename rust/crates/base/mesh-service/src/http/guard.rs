//! Rejects requests of web pages that reach the service through its user's browser, except pages of named
//! origins.
//!
//! A browser sends what a page tells it to. Three things give a page away that it cannot change: the name in
//! `Host`, under which it was made to look like ours (DNS rebinding); its `Origin`; and a content type that
//! needs no permission. Programs other than browsers send none of them, or our own.

use std::collections::HashSet;
use std::net::IpAddr;
use std::sync::Arc;

use axum::Router;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Uri, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};

use super::error_body;
use super::origin::Origin;

/// The rules by which a service accepts requests.
#[derive(Clone, Default)]
pub struct Guard {
    /// Names in `Host` besides addresses and `localhost`; `None` lets all through.
    hosts: Option<HashSet<String>>,
    /// Pages of other origins.
    origins: HashSet<String>,
    /// Pages of all origins may send requests.
    any_origin: bool,
    /// Ends of paths that take forms as well as JSON.
    forms: Vec<&'static str>,
    /// Decides if names count at the moment; without it they do.
    names_count: Option<Arc<dyn Fn() -> bool + Send + Sync>>,
}

/// Reasons why a request is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
enum Rejection {
    #[error(
        "this service does not go by the name {0:?}; use its address or this machine's host name, or add the name to http.hosts"
    )]
    Host(String),
    #[error(
        "web pages of {0:?} may not use this service; add that origin to http.cors to allow it"
    )]
    Origin(String),
    #[error(
        "the body has the content type {0:?}; send JSON, with the header `content-type: application/json`"
    )]
    ContentType(String),
    #[error(
        "a web page must say that its body is JSON, with the header `content-type: application/json`"
    )]
    NoContentType,
    #[error("the body has the content encoding {0:?}; send it as it is")]
    Encoding(String),
}

impl Guard {
    /// Accepts requests for an address, for `localhost`, for this machine's name or for one of `names`.
    pub fn of_names(names: &[String]) -> Self {
        let own = own_name();
        let short = own.split('.').next().unwrap_or_default();
        let mut hosts: HashSet<String> = names.iter().map(|name| plain_name(name)).collect();
        for name in [own.as_str(), short] {
            if !name.is_empty() {
                hosts.insert(name.to_owned());
                hosts.insert(format!("{name}.local"));
            }
        }
        Self {
            hosts: Some(hosts),
            ..Self::default()
        }
    }

    /// A guard for a service that publishes information only. Beyond loopback any name is accepted; on
    /// loopback a foreign name is taken for that of a web page.
    pub fn of_listener(address: IpAddr, names: &[String]) -> Self {
        if address.is_loopback() {
            Self::of_names(names)
        } else {
            Self::of_any_name()
        }
    }

    /// Checks names only while `names_count` returns true. It is called for every request.
    #[must_use]
    pub fn only_while(mut self, names_count: impl Fn() -> bool + Send + Sync + 'static) -> Self {
        self.names_count = Some(Arc::new(names_count));
        self
    }

    /// Accepts requests for any name: a service that needs a key is safe from pages under foreign names.
    pub fn of_any_name() -> Self {
        Self::default()
    }

    /// Also accepts requests from pages of these origins, with the CORS headers that browsers need.
    #[must_use]
    pub fn with_origins(mut self, origins: &[Origin]) -> Self {
        self.any_origin |= origins.iter().any(|origin| origin.as_str() == "*");
        let names = origins.iter().map(ToString::to_string);
        self.origins.extend(names);
        self
    }

    /// Also takes forms with files (`multipart/form-data`) at paths that end so.
    #[must_use]
    pub fn with_forms_at(mut self, end: &'static str) -> Self {
        self.forms.push(end);
        self
    }

    /// Wraps `router` with this guard.
    pub fn before(self, router: Router) -> Router {
        Router::new()
            .fallback_service(router)
            .layer(middleware::from_fn_with_state(Arc::new(self), guard))
    }

    fn check(&self, method: &Method, uri: &Uri, headers: &HeaderMap) -> Result<(), Rejection> {
        // Paths that only report health accept any name: load balancers use names of their own.
        let is_health = matches!(uri.path(), "/health" | "/ready");
        if !is_health {
            self.check_host(uri, headers)?;
        }
        if let Some(origin) = headers.get(header::ORIGIN) {
            let origin = text(origin);
            if !self.allows(&origin) && !is_same_origin(&origin, uri, headers) {
                return Err(Rejection::Origin(origin));
            }
        }
        if *method == Method::POST {
            let path = uri.path().trim_end_matches('/');
            let forms = self.forms.iter().any(|end| path.ends_with(end));
            check_body(headers, forms)?;
        }
        Ok(())
    }

    fn check_host(&self, uri: &Uri, headers: &HeaderMap) -> Result<(), Rejection> {
        let Some(known) = &self.hosts else {
            return Ok(());
        };
        if self
            .names_count
            .as_ref()
            .is_some_and(|they_count| !they_count())
        {
            return Ok(());
        }
        let in_headers = headers.get_all(header::HOST).iter().map(text);
        let in_uri = uri.authority().map(ToString::to_string);
        for host in in_headers.chain(in_uri) {
            let name = plain_name(&host);
            let is_local = name == "localhost" || name.ends_with(".localhost");
            if !is_local && !is_address(&name) && !known.contains(&name) {
                return Err(Rejection::Host(host));
            }
        }
        Ok(())
    }

    fn allows(&self, origin: &str) -> bool {
        self.any_origin || self.origins.contains(&origin.to_ascii_lowercase())
    }

    /// The CORS header value with which a browser lets pages of this origin read the answer.
    fn permission(&self, origin: Option<&HeaderValue>) -> Option<HeaderValue> {
        origin.filter(|origin| self.allows(&text(origin))).cloned()
    }
}

impl Rejection {
    fn answer(&self) -> Response {
        let (status, code) = match self {
            Rejection::Host(_) => (StatusCode::FORBIDDEN, "host_not_allowed"),
            Rejection::Origin(_) => (StatusCode::FORBIDDEN, "origin_not_allowed"),
            Rejection::ContentType(_) | Rejection::NoContentType | Rejection::Encoding(_) => {
                (StatusCode::UNSUPPORTED_MEDIA_TYPE, "unsupported_media_type")
            }
        };
        let body = error_body(&self.to_string(), "invalid_request_error", code);
        (status, body).into_response()
    }
}

async fn guard(State(guard): State<Arc<Guard>>, request: Request, next: Next) -> Response {
    let origin = request.headers().get(header::ORIGIN).cloned();
    let permission = guard.permission(origin.as_ref());
    let checked = guard.check(request.method(), request.uri(), request.headers());
    let mut response = match checked {
        Err(rejection) => {
            tracing::debug!(refused = %rejection, "request refused");
            rejection.answer()
        }
        Ok(()) if is_preflight(&request) => preflight(&request),
        Ok(()) => next.run(request).await,
    };
    let headers = response.headers_mut();
    if let Some(permission) = permission {
        headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, permission);
        let exposed = HeaderValue::from_static(EXPOSED);
        headers.insert(header::ACCESS_CONTROL_EXPOSE_HEADERS, exposed);
    }
    if guard.any_origin || !guard.origins.is_empty() {
        headers.append(header::VARY, HeaderValue::from_static("origin"));
    }
    response
}

fn is_preflight(request: &Request) -> bool {
    let headers = request.headers();
    *request.method() == Method::OPTIONS
        && headers.contains_key(header::ORIGIN)
        && headers.contains_key(header::ACCESS_CONTROL_REQUEST_METHOD)
}

/// The answer to a browser that asks whether a page may ask. Which headers the page wants to send is its own affair.
fn preflight(request: &Request) -> Response {
    // Some clients take nothing but 200.
    let mut response = StatusCode::OK.into_response();
    let headers = response.headers_mut();
    let mut set = |name: HeaderName, value| headers.insert(name, HeaderValue::from_static(value));
    set(header::ACCESS_CONTROL_ALLOW_METHODS, "GET, POST");
    set(header::ACCESS_CONTROL_MAX_AGE, MAX_AGE);
    let asked = request.headers();
    if asked.contains_key(REQUEST_PRIVATE_NETWORK) {
        set(ALLOW_PRIVATE_NETWORK, "true");
    }
    if let Some(wanted) = asked.get(header::ACCESS_CONTROL_REQUEST_HEADERS) {
        headers.insert(header::ACCESS_CONTROL_ALLOW_HEADERS, wanted.clone());
    }
    response
}

/// A page can make a browser send text and forms without asking; JSON it cannot. Where forms are taken, those of a
/// browser need an `Origin`, which was checked.
fn check_body(headers: &HeaderMap, forms: bool) -> Result<(), Rejection> {
    let encoding = headers.get(header::CONTENT_ENCODING).map(text);
    if let Some(encoding) = encoding.filter(|encoding| !encoding.eq_ignore_ascii_case("identity")) {
        return Err(Rejection::Encoding(encoding));
    }
    let by_browser = headers.keys().any(|name| {
        [header::ORIGIN, header::REFERER].contains(name) || name.as_str().starts_with("sec-fetch-")
    });
    let Some(kind) = headers.get(header::CONTENT_TYPE).map(text) else {
        let length = headers.get(header::CONTENT_LENGTH);
        let empty = length.is_some_and(|length| length == "0");
        return match by_browser && !empty {
            true => Err(Rejection::NoContentType),
            false => Ok(()),
        };
    };
    let (essence, _) = kind.split_once(';').unwrap_or((&kind, ""));
    let essence = essence.trim().to_ascii_lowercase();
    let is_json = essence == "application/json"
        || (essence.starts_with("application/") && essence.ends_with("+json"));
    let is_form = forms
        && essence == "multipart/form-data"
        && (!by_browser || headers.contains_key(header::ORIGIN));
    match is_json || is_form {
        true => Ok(()),
        false => Err(Rejection::ContentType(kind)),
    }
}

/// True if the page came from this service, directly or through a proxy that has a name of its own.
fn is_same_origin(origin: &str, uri: &Uri, headers: &HeaderMap) -> bool {
    // A browser sets this itself, and knows better than names that a proxy has changed.
    let site = headers.get("sec-fetch-site");
    if site.is_some_and(|site| site == "same-origin") {
        return true;
    }
    let Some((scheme, authority)) = origin.split_once("://") else {
        return false;
    };
    let default_port = match scheme {
        "http" => ":80",
        "https" => ":443",
        _ => return false,
    };
    let full = |authority: &str| {
        let name = authority.strip_suffix(default_port);
        name.unwrap_or(authority).to_ascii_lowercase()
    };
    let theirs = full(authority);
    let host = headers.get(header::HOST).map(text);
    let host = host.or_else(|| uri.authority().map(ToString::to_string));
    // A page needs permission to send this one, and gets none.
    let forwarded = headers.get("x-forwarded-host").map(text);
    let mut ours = host.into_iter().chain(forwarded);
    ours.any(|ours| full(&ours) == theirs)
}

/// A name without port, brackets and final dot, in lower case.
fn plain_name(host: &str) -> String {
    let host = host.trim();
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None if host.matches(':').count() > 1 => host,
        None => host.rsplit_once(':').map_or(host, |(name, _)| name),
    };
    name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase()
}

/// This machine's name.
fn own_name() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    name.trim().to_ascii_lowercase()
}

fn is_address(name: &str) -> bool {
    // A zone is a matter of the client's.
    let (address, _) = name.split_once('%').unwrap_or((name, ""));
    address.parse::<IpAddr>().is_ok()
}

fn text(value: &HeaderValue) -> String {
    String::from_utf8_lossy(value.as_bytes()).into_owned()
}

/// Headers of answers that pages may read, besides those that they always may.
const EXPOSED: &str = "x-request-id, x-hydramesh-ignored, retry-after";
/// Seconds for which a browser need not ask again.
const MAX_AGE: &str = "600";
const REQUEST_PRIVATE_NETWORK: HeaderName =
    HeaderName::from_static("access-control-request-private-network");
const ALLOW_PRIVATE_NETWORK: HeaderName =
    HeaderName::from_static("access-control-allow-private-network");

#[cfg(test)]
mod tests {
    use axum::body::Body;
    use axum::routing::{get, post};
    use tower::ServiceExt;

    use super::*;

    fn router(guard: Guard) -> Router {
        guard.before(
            Router::new()
                .route("/health", get(|| async { "alive" }))
                .route("/ask", get(|| async { "got" }).post(|| async { "asked" }))
                .route("/other", post(|| async { "asked" })),
        )
    }

    async fn ask(guard: &Guard, method: &str, path: &str, headers: &[(&str, &str)]) -> Response {
        let mut request = Request::builder().method(method).uri(path);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = request.body(Body::from("{}")).unwrap();
        router(guard.clone()).oneshot(request).await.unwrap()
    }

    #[tokio::test]
    async fn names_count_while_they_are_said_to() {
        let keyless = Arc::new(std::sync::atomic::AtomicBool::new(false));
        let now = keyless.clone();
        let guard =
            Guard::of_names(&[]).only_while(move || now.load(std::sync::atomic::Ordering::Relaxed));
        let foreign = [("host", "evil.example")];
        assert_eq!(ask(&guard, "GET", "/ask", &foreign).await.status(), 200);
        keyless.store(true, std::sync::atomic::Ordering::Relaxed);
        assert_eq!(ask(&guard, "GET", "/ask", &foreign).await.status(), 403);
    }

    #[tokio::test]
    async fn only_own_names_are_answered_to() {
        let guard = Guard::of_names(&["Mesh.example.org".to_owned()]);
        let own = own_name();
        let short = own.split('.').next().unwrap().to_owned();
        for (host, status) in [
            ("127.0.0.1:8080", 200),
            ("192.168.1.5", 200),
            ("[::1]:8080", 200),
            ("[fe80::1]", 200),
            ("localhost", 200),
            ("LOCALHOST.:8080", 200),
            ("app.localhost:3000", 200),
            (&own, 200),
            (&format!("{short}.local:8080"), 200),
            ("mesh.example.org:8080", 200),
            ("evil.example", 403),
            ("127.0.0.1.evil.example:8080", 403),
            ("localhost.evil.example", 403),
            ("", 403),
        ] {
            for method in ["GET", "POST"] {
                let answer = ask(&guard, method, "/ask", &[("host", host)]).await;
                assert_eq!(answer.status(), status, "{method} {host:?}");
            }
        }
        let hosts = [("host", "127.0.0.1"), ("host", "evil.example")];
        assert_eq!(ask(&guard, "GET", "/ask", &hosts).await.status(), 403);
        let absolute = ask(
            &guard,
            "GET",
            "http://evil.example/ask",
            &[("host", "127.0.0.1")],
        )
        .await;
        assert_eq!(absolute.status(), 403);
        assert_eq!(
            ask(&guard, "GET", "/health", &[("host", "balancer.example")])
                .await
                .status(),
            200
        );
        assert_eq!(
            ask(
                &Guard::of_any_name(),
                "GET",
                "/ask",
                &[("host", "evil.example")]
            )
            .await
            .status(),
            200
        );
        assert_eq!(ask(&guard, "GET", "/ask", &[]).await.status(), 200);
    }

    #[tokio::test]
    async fn pages_of_others_are_refused() {
        let guard = Guard::of_names(&[]);
        let json = ("content-type", "application/json");
        for (origin, host, more, status) in [
            ("http://127.0.0.1:8080", "127.0.0.1:8080", None, 200),
            ("http://localhost", "localhost:80", None, 200),
            ("https://evil.example", "127.0.0.1:8080", None, 403),
            ("http://127.0.0.1:3000", "127.0.0.1:8080", None, 403),
            ("null", "127.0.0.1:8080", None, 403),
            ("file://", "127.0.0.1:8080", None, 403),
            (
                "https://chat.example",
                "127.0.0.1:8080",
                Some(("x-forwarded-host", "chat.example")),
                200,
            ),
            (
                "https://chat.example",
                "127.0.0.1:8080",
                Some(("sec-fetch-site", "same-origin")),
                200,
            ),
            (
                "https://chat.example",
                "127.0.0.1:8080",
                Some(("sec-fetch-site", "cross-site")),
                403,
            ),
        ] {
            let mut headers = vec![("origin", origin), ("host", host), json];
            headers.extend(more);
            for (method, path) in [("POST", "/ask"), ("GET", "/ask"), ("GET", "/health")] {
                let answer = ask(&guard, method, path, &headers).await;
                assert_eq!(answer.status(), status, "{method} {origin}");
                assert!(!answer.headers().contains_key("access-control-allow-origin"));
            }
        }
    }

    #[tokio::test]
    async fn bodies_are_json() {
        let guard = Guard::of_any_name();
        let cases: [(&[(&str, &str)], u16); 10] = [
            (&[], 200),
            (&[("content-type", "application/json; charset=utf-8")], 200),
            (&[("content-type", "Application/JSON")], 200),
            (&[("content-type", "application/vnd.api+json")], 200),
            (&[("content-type", "text/plain")], 415),
            (
                &[("content-type", "application/x-www-form-urlencoded")],
                415,
            ),
            (&[("content-type", "")], 415),
            (&[("sec-fetch-mode", "no-cors")], 415),
            (&[("referer", "http://x/")], 415),
            (&[("content-encoding", "gzip")], 415),
        ];
        for (headers, status) in cases {
            let answer = ask(&guard, "POST", "/ask", headers).await;
            assert_eq!(answer.status(), status, "{headers:?}");
        }
    }

    #[tokio::test]
    async fn forms_are_taken_where_they_are_named() {
        let form = ("content-type", "multipart/form-data; boundary=x");
        let guard = Guard::of_names(&[]).with_forms_at("/ask");
        let own = [form, ("host", "localhost")];
        assert_eq!(ask(&guard, "POST", "/ask", &own).await.status(), 200);
        let elsewhere = Guard::of_names(&[]).with_forms_at("/other");
        assert_eq!(ask(&elsewhere, "POST", "/ask", &own).await.status(), 415);
        for (more, status) in [
            (("origin", "http://localhost"), 200),
            (("origin", "https://evil.example"), 403),
            (("origin", "null"), 403),
            (("referer", "https://evil.example/"), 415),
            (("sec-fetch-site", "cross-site"), 415),
        ] {
            let headers = [own[0], own[1], more];
            let answer = ask(&guard, "POST", "/ask", &headers).await;
            assert_eq!(answer.status(), status, "{more:?}");
        }
        let plain = [("content-type", "text/plain")];
        assert_eq!(ask(&guard, "POST", "/ask", &plain).await.status(), 415);
    }

    #[tokio::test]
    async fn pages_that_are_named_may_ask_and_read() {
        let origins = ["https://chat.example".parse().unwrap()];
        let guard = Guard::of_names(&[]).with_origins(&origins);
        let asking = [
            ("origin", "https://chat.example"),
            ("host", "127.0.0.1:8080"),
            ("access-control-request-method", "POST"),
            (
                "access-control-request-headers",
                "authorization, content-type",
            ),
            ("access-control-request-private-network", "true"),
        ];
        let answer = ask(&guard, "OPTIONS", "/ask", &asking).await;
        let header = |name: &str| answer.headers()[name].to_str().unwrap();
        assert_eq!(answer.status(), 200);
        assert_eq!(
            header("access-control-allow-origin"),
            "https://chat.example"
        );
        assert_eq!(
            header("access-control-allow-headers"),
            "authorization, content-type"
        );
        assert_eq!(header("access-control-allow-private-network"), "true");
        assert!(header("access-control-allow-methods").contains("POST"));
        assert_eq!(
            (header("access-control-max-age"), header("vary")),
            ("600", "origin")
        );
        let posted = [asking[0], asking[1], ("content-type", "application/json")];
        let answer = ask(&guard, "POST", "/ask", &posted).await;
        assert_eq!(answer.status(), 200);
        assert!(
            answer.headers()["access-control-expose-headers"]
                .to_str()
                .unwrap()
                .contains("x-request-id")
        );
        // A refusal can be read, too.
        let plain = [asking[0], asking[1], ("content-type", "text/plain")];
        let answer = ask(&guard, "POST", "/ask", &plain).await;
        assert_eq!(
            (
                answer.status().as_u16(),
                answer.headers().contains_key("access-control-allow-origin")
            ),
            (415, true)
        );
        let mut other = asking;
        other[0].1 = "https://evil.example";
        assert_eq!(ask(&guard, "OPTIONS", "/ask", &other).await.status(), 403);
        let all = Guard::of_names(&[]).with_origins(&["*".parse().unwrap()]);
        let answer = ask(&all, "OPTIONS", "/ask", &other).await;
        let allowed = &answer.headers()["access-control-allow-origin"];
        assert_eq!(
            (answer.status().as_u16(), allowed.to_str().unwrap()),
            (200, "https://evil.example")
        );
    }
}
