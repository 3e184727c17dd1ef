//! The two servers: API and `resolve`, and the store of large files.

use std::convert::Infallible;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{Path, Query, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use bytes::Bytes;
use serde_json::{Value, json};

use super::repos::{Access, Content, Files, StoredFile};
use super::{Fault, HubState, Site};

const ERROR_CODE: HeaderName = HeaderName::from_static("x-error-code");
const ERROR_MESSAGE: HeaderName = HeaderName::from_static("x-error-message");
const REPO_COMMIT: HeaderName = HeaderName::from_static("x-repo-commit");
const LINKED_ETAG: HeaderName = HeaderName::from_static("x-linked-etag");
const LINKED_SIZE: HeaderName = HeaderName::from_static("x-linked-size");

/// Piece of a body where no pace is set.
const PIECE: usize = 64 << 10;
/// Time in which data handed to the network is written.
const FLUSHED: Duration = Duration::from_millis(20);

pub(super) fn api(shared: Arc<HubState>) -> Router {
    Router::new()
        .route("/api/models/{org}/{repo}", get(info_of_main))
        .route("/api/models/{org}/{repo}/revision/{revision}", get(info))
        .route("/api/models/{org}/{repo}/tree/{revision}", get(tree))
        .route("/{org}/{repo}/resolve/{revision}/{*path}", get(resolve))
        .with_state(shared)
}

pub(super) fn store(shared: Arc<HubState>) -> Router {
    Router::new()
        .route("/large/{sha256}", get(large))
        .with_state(shared)
}

type Parameters = Query<std::collections::HashMap<String, String>>;

async fn info_of_main(
    state: State<Arc<HubState>>,
    Path((org, repo)): Path<(String, String)>,
    parameters: Parameters,
    headers: HeaderMap,
) -> Response {
    let path = Path((org, repo, "main".to_owned()));
    info(state, path, parameters, headers).await
}

async fn info(
    State(shared): State<Arc<HubState>>,
    Path((org, repo, revision)): Path<(String, String, String)>,
    Query(parameters): Parameters,
    headers: HeaderMap,
) -> Response {
    let id = format!("{org}/{repo}");
    let (commit, files, access) = match open(&shared, &id, &revision, &headers, RepoPart::Listing) {
        Ok(opened) => opened,
        Err(HubError::Renamed(new)) => {
            let query = match parameters.get("blobs") {
                Some(value) => format!("?blobs={value}"),
                None => String::new(),
            };
            let path = format!("/api/models/{new}/revision/{}", escape(&revision));
            return redirect(307, &(path + &query));
        }
        Err(HubError::Answer(answer)) => return *answer,
    };
    let blobs = parameters
        .get("blobs")
        .is_some_and(|value| value == "true" || value == "1")
        && !shared.lock().names_only;
    let siblings: Vec<Value> = files
        .iter()
        .map(|(path, file)| sibling(path, file, blobs))
        .collect();
    let gated = match access {
        Access::Gated => json!("auto"),
        _ => json!(false),
    };
    let body = json!({
        "id": id, "modelId": id, "author": org, "sha": commit, "private": access == Access::Private,
        "gated": gated, "disabled": false, "tags": [], "siblings": siblings,
    });
    axum::Json(body).into_response()
}

fn sibling(path: &str, file: &StoredFile, blobs: bool) -> Value {
    let mut sibling = json!({"rfilename": path});
    if blobs {
        sibling["size"] = file.content.len().into();
        sibling["blobId"] = file.blob_id.as_str().into();
        if let Some(sha256) = &file.sha256 {
            sibling["lfs"] = json!({
                "sha256": sha256, "size": file.content.len(), "pointerSize": file.pointer_bytes,
            });
        }
    }
    sibling
}

async fn tree(
    State(shared): State<Arc<HubState>>,
    Path((org, repo, revision)): Path<(String, String, String)>,
    headers: HeaderMap,
) -> Response {
    let id = format!("{org}/{repo}");
    let files = match open(&shared, &id, &revision, &headers, RepoPart::Listing) {
        Ok((_, files, _)) => files,
        Err(HubError::Renamed(new)) => {
            return redirect(
                307,
                &format!("/api/models/{new}/tree/{}", escape(&revision)),
            );
        }
        Err(HubError::Answer(answer)) => return *answer,
    };
    let entries: Vec<Value> = files
        .iter()
        .map(|(path, file)| {
            let mut entry = json!({
                "type": "file", "oid": file.blob_id, "size": file.content.len(), "path": path,
            });
            if let Some(sha256) = &file.sha256 {
                entry["lfs"] = json!({
                    "oid": sha256, "size": file.content.len(), "pointerSize": file.pointer_bytes,
                });
            }
            entry
        })
        .collect();
    axum::Json(entries).into_response()
}

async fn resolve(
    State(shared): State<Arc<HubState>>,
    Path((org, repo, revision, path)): Path<(String, String, String, String)>,
    method: Method,
    headers: HeaderMap,
) -> Response {
    let id = format!("{org}/{repo}");
    let (commit, files, _) = match open(&shared, &id, &revision, &headers, RepoPart::Files) {
        Ok(opened) => opened,
        Err(HubError::Renamed(new)) => {
            return redirect(
                307,
                &format!("/{new}/resolve/{}/{}", escape(&revision), path),
            );
        }
        Err(HubError::Answer(answer)) => return *answer,
    };
    let Some(file) = files.get(&path) else {
        return refuse(404, Some("EntryNotFound"), "Entry not found");
    };
    let fault = shared.fault(Site::Resolve, &path);
    let mut answer = if let Some(Fault::Status(status, retry_after)) = &fault {
        let request = asked(&headers, file.content.len());
        count(&shared, Site::Resolve, &path, &method, request);
        return fail(*status, retry_after.as_deref());
    } else if let Some(sha256) = &file.sha256 {
        let request = asked(&headers, file.content.len());
        count(&shared, Site::Resolve, &path, &method, request);
        // A real one is signed and expires; here it only shows that the query travels.
        let to = format!("http://{}/large/{sha256}?signature=7", shared.store);
        let mut answer = redirect(302, &to);
        let etag = match fault {
            Some(Fault::OtherEtag) => "0".repeat(64),
            _ => sha256.clone(),
        };
        set(&mut answer, LINKED_ETAG, &format!("\"{etag}\""));
        set(&mut answer, LINKED_SIZE, &file.content.len().to_string());
        answer
    } else {
        serve(
            &shared,
            Site::Resolve,
            &path,
            file,
            &method,
            &headers,
            fault,
        )
    };
    set(&mut answer, REPO_COMMIT, &commit);
    answer
}

async fn large(
    State(shared): State<Arc<HubState>>,
    Path(sha256): Path<String>,
    Query(parameters): Parameters,
    method: Method,
    headers: HeaderMap,
) -> Response {
    if method == Method::HEAD {
        return refuse(403, None, "the signature is for GET");
    }
    if headers.contains_key(header::AUTHORIZATION) {
        shared.lock().leaked_tokens += 1;
        return refuse(400, None, "only one way to authenticate is allowed");
    }
    if parameters.get("signature").map(String::as_str) != Some("7") {
        return refuse(403, None, "no signature");
    }
    let found = shared.lock().repos.large(&sha256).cloned();
    let Some((path, file)) = found else {
        return refuse(404, None, "no such file");
    };
    let fault = shared.fault(Site::Store, &path);
    if let Some(Fault::Status(status, retry_after)) = &fault {
        let request = asked(&headers, file.content.len());
        count(&shared, Site::Store, &path, &method, request);
        return fail(*status, retry_after.as_deref());
    }
    serve(&shared, Site::Store, &path, &file, &method, &headers, fault)
}

/// The requested part of a repository: a gated one shows its listing to every client.
#[derive(Clone, Copy, PartialEq, Eq)]
enum RepoPart {
    Listing,
    Files,
}

enum HubError {
    Renamed(String),
    Answer(Box<Response>),
}

fn open(
    shared: &HubState,
    id: &str,
    revision: &str,
    headers: &HeaderMap,
    part: RepoPart,
) -> Result<(String, Arc<Files>, Access), HubError> {
    let answer = |status, code, message: &str| {
        Err(HubError::Answer(Box::new(refuse(status, code, message))))
    };
    if part == RepoPart::Listing {
        shared.count(Site::Api, id, |count| count.gets += 1);
        if let Some(Fault::Status(status, retry_after)) = shared.fault(Site::Api, id) {
            let failed = fail(status, retry_after.as_deref());
            return Err(HubError::Answer(Box::new(failed)));
        }
    }
    let state = shared.lock();
    let token = headers
        .get(header::AUTHORIZATION)
        .and_then(|value| value.to_str().ok())
        .map(|value| value.trim_start_matches("Bearer "));
    let opens: &[String] = match token.map(|token| state.tokens.get(token)) {
        None => &[],
        Some(Some(opens)) => opens,
        Some(None) => {
            let message = "Invalid credentials in Authorization header";
            return answer(401, None, message);
        }
    };
    if let Some(new) = state.repos.renamed(id) {
        return Err(HubError::Renamed(new.to_owned()));
    }
    let admitted = opens.iter().any(|opened| opened == id);
    let repo = match state.repos.get(id) {
        Some(repo) if repo.access != Access::Private || admitted => repo,
        // The hub does not tell strangers whether there is a private one.
        _ if token.is_none() => return answer(401, Some("RepoNotFound"), "Repository not found"),
        _ => return answer(404, Some("RepoNotFound"), "Repository not found"),
    };
    if part == RepoPart::Files && repo.access == Access::Gated && !admitted {
        return match token {
            None => answer(
                401,
                Some("GatedRepo"),
                &format!(
                    "Access to model {id} is restricted. You must have access to it and be authenticated to access it. Please log in."
                ),
            ),
            Some(_) => answer(
                403,
                Some("GatedRepo"),
                &format!(
                    "Access to model {id} is restricted and you are not in the authorized list."
                ),
            ),
        };
    }
    match repo.at(revision) {
        Some((commit, files)) => Ok((commit, files, repo.access)),
        None => answer(
            404,
            Some("RevisionNotFound"),
            &format!("Invalid rev id: {revision}"),
        ),
    }
}

/// A file, or a range of it, with the faults set for it.
fn serve(
    shared: &Arc<HubState>,
    site: Site,
    path: &str,
    file: &StoredFile,
    method: &Method,
    headers: &HeaderMap,
    fault: Option<Fault>,
) -> Response {
    let total = file.content.len();
    let request = asked(headers, total);
    count(shared, site, path, method, request.clone());
    let Some(mut range) = request else {
        let mut answer = refuse(416, None, "range not satisfiable");
        set(
            &mut answer,
            header::CONTENT_RANGE,
            &format!("bytes */{total}"),
        );
        return answer;
    };
    let mut partial = headers.contains_key(header::RANGE);
    match fault {
        Some(Fault::WholeFile) => (range, partial) = (0..total, false),
        Some(Fault::WrongRange) => range = (range.start + 1).min(range.end)..range.end,
        _ => {}
    }
    let etag = match fault {
        Some(Fault::OtherEtag) => "0".repeat(40),
        _ => file.etag().to_owned(),
    };
    let body = if *method == Method::HEAD {
        Body::empty()
    } else {
        let file = ResponseContext {
            shared: shared.clone(),
            site,
            path: path.to_owned(),
            content: file.content.clone(),
        };
        Body::from_stream(send(file, range.clone(), fault))
    };
    let mut answer = Response::new(body);
    if partial {
        *answer.status_mut() = StatusCode::PARTIAL_CONTENT;
        let content_range = format!("bytes {}-{}/{total}", range.start, range.end.max(1) - 1);
        set(&mut answer, header::CONTENT_RANGE, &content_range);
    }
    set(&mut answer, header::ACCEPT_RANGES, "bytes");
    let length = (range.end - range.start).to_string();
    set(&mut answer, header::CONTENT_LENGTH, &length);
    set(&mut answer, header::ETAG, &format!("\"{etag}\""));
    answer
}

/// The range that a request wants; the whole file without one; `None` where it lies outside.
fn asked(headers: &HeaderMap, total: u64) -> Option<Range<u64>> {
    let Some(value) = headers.get(header::RANGE) else {
        return Some(0..total);
    };
    let (first, last) = value
        .to_str()
        .ok()?
        .strip_prefix("bytes=")?
        .split_once('-')?;
    if first.is_empty() {
        return Some(total.saturating_sub(last.parse().ok()?)..total);
    }
    let first: u64 = first.parse().ok()?;
    let end = match last {
        "" => total,
        last => last.parse::<u64>().ok()?.saturating_add(1).min(total),
    };
    (first < end).then_some(first..end)
}

fn count(shared: &HubState, site: Site, path: &str, method: &Method, range: Option<Range<u64>>) {
    shared.count(site, path, |count| {
        if *method == Method::HEAD {
            count.heads += 1;
        } else {
            count.gets += 1;
            count.ranges.extend(range);
        }
    });
}

struct ResponseContext {
    shared: Arc<HubState>,
    site: Site,
    path: String,
    content: Content,
}

/// The body: pieces at the set pace, counted, cut or held up where a fault says so.
fn send(
    file: ResponseContext,
    range: Range<u64>,
    fault: Option<Fault>,
) -> impl futures::Stream<Item = io::Result<Bytes>> {
    let start = range.start;
    futures::stream::unfold(Some((file, range.start)), move |state| {
        let fault = fault.clone();
        let end = range.end;
        async move {
            let (file, at) = state?;
            if at >= end {
                return None;
            }
            let (piece, pause) = file.shared.lock().pace.unwrap_or((PIECE, Duration::ZERO));
            if !pause.is_zero() {
                tokio::time::sleep(pause).await;
            }
            let mut len = (end - at).min(piece as u64);
            match fault {
                Some(Fault::CutAfter(limit)) if at - start >= limit => {
                    // An error in the middle of a body closes the connection, and unwritten data is lost with
                    // it.
                    tokio::time::sleep(FLUSHED).await;
                    let cut = io::Error::new(io::ErrorKind::ConnectionReset, "cut by the test");
                    return Some((Err(cut), None));
                }
                Some(Fault::StallAfter(limit)) if at - start >= limit => {
                    std::future::pending::<Infallible>().await;
                }
                Some(Fault::CutAfter(limit) | Fault::StallAfter(limit)) => {
                    len = len.min(limit - (at - start));
                }
                _ => {}
            }
            let bytes = match file.content.read(at, len as usize) {
                Ok(bytes) => bytes,
                Err(error) => return Some((Err(error), None)),
            };
            let bytes = match fault {
                Some(Fault::WrongByteAt(wrong)) if (at..at + len).contains(&wrong) => {
                    let mut changed = bytes.to_vec();
                    changed[(wrong - at) as usize] ^= 0x40;
                    changed.into()
                }
                _ => bytes,
            };
            file.shared.sent(file.site, &file.path, len);
            Some((Ok(bytes), Some((file, at + len))))
        }
    })
}

fn fail(status: u16, retry_after: Option<&str>) -> Response {
    let mut answer = refuse(status, None, "the test wants it so");
    if let Some(retry_after) = retry_after {
        set(&mut answer, header::RETRY_AFTER, retry_after);
    }
    answer
}

fn refuse(status: u16, code: Option<&str>, message: &str) -> Response {
    let status = StatusCode::from_u16(status).expect("a status code");
    let mut answer = (status, axum::Json(json!({"error": message}))).into_response();
    if let Some(code) = code {
        set(&mut answer, ERROR_CODE, code);
    }
    set(&mut answer, ERROR_MESSAGE, message);
    answer
}

fn redirect(status: u16, to: &str) -> Response {
    let mut answer = Response::new(Body::empty());
    *answer.status_mut() = StatusCode::from_u16(status).expect("a status code");
    set(&mut answer, header::LOCATION, to);
    answer
}

fn set(answer: &mut Response, name: HeaderName, value: &str) {
    let value = HeaderValue::from_str(value).expect("visible ASCII");
    answer.headers_mut().insert(name, value);
}

/// A revision as one segment of a path.
fn escape(revision: &str) -> String {
    revision.replace('/', "%2F")
}
