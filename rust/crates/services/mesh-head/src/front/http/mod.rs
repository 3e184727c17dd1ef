//! The OpenAI API, health and administration.
//!
//! Wire-compatible with the OpenAI clients: fields, errors and streams are theirs, and answers carry
//! `timings`. `fields::known` lists the fields that are read, refused and ignored; openapi.json has them all
//! for programs.

mod admin;
mod answer;
mod curtain;
mod error;
mod evidence;
mod hold;
mod ignored;
mod images;
mod intake;
mod keys;
mod meant;
mod models;
mod nodes;
mod papers;
mod ready;
mod rings;
mod root;
mod state;
mod tokens;

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::SystemTime;

use arcanum_attestor::Attestor;
use axum::body::Body;
use axum::extract::{ConnectInfo, DefaultBodyLimit, Request, State};
use axum::handler::Handler;
use axum::http::{HeaderValue, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodFilter, MethodRouter, get, on};
use axum::{Extension, Router};
use mesh_api::{Code, paths};
use mesh_base::clock::unix_seconds;
use mesh_service::health;
use mesh_service::http::Guard;
use mesh_service::metrics::Metrics;
use tower::ServiceExt as _;

pub(crate) use error::ApiError;
pub(crate) use keys::{Admitted, Client, ConcurrencyLimit, Denied, Keys, KeysError, Pass};
use mesh_control::fair::{Ingress, Source};
use mesh_control::image_files::ImageFiles;
use mesh_control::registry::Registry;
use mesh_curtain::Need;
use mesh_net::trust::NodeIdentity;
pub(crate) use models::served_as;

use crate::api::embeddings::AskedEmbeddings;
use crate::api::generate::{self, Asked};
use crate::flight::embed;
use crate::flight::generate::submit;
use crate::flight::task::GenerateTask;
use crate::ids;
use crate::mesh::Mesh;
use crate::metrics::Front;
use crate::refusals::Refused;
use answer::Answering;
use ignored::Ignored;
use ready::Told;
use state::{Api, RequestId};

pub(crate) fn router(
    mesh: Arc<Mesh>,
    keys: Keys,
    authority: Arc<Attestor>,
    identity: NodeIdentity,
    concurrency: Arc<ConcurrencyLimit>,
    metrics: Arc<Metrics>,
) -> Router {
    let told = Told {
        mesh: mesh.clone(),
        keys: keys.clone(),
    };
    let health = health::router(mesh.health.clone(), metrics)
        .route_layer(middleware::from_fn_with_state(told, ready::of_model));
    let body_limit = usize::try_from(mesh.config.http.body_limit).unwrap_or(usize::MAX);
    // A reload may bring keys or take them away.
    let known_keys = keys.clone();
    let guard = Guard::of_names(&mesh.config.http.hosts)
        .only_while(move || !known_keys.are_needed())
        .with_origins(&mesh.config.http.cors)
        .with_forms_at("/images/edits");
    let image_memory = usize::try_from(mesh.config.http.image_memory).unwrap_or(usize::MAX);
    let images = ImageFiles::new(image_memory, mesh.config.http.image_lifetime);
    let api = Api {
        mesh,
        keys: Arc::new(keys),
        authority,
        own_id: identity.node_id().into(),
        identity,
        concurrency,
        images: Arc::new(Mutex::new(images)),
    };
    let administration =
        of(for_administrators()).route_layer(middleware::from_fn(administrators_only));
    let routes = of(for_clients())
        .merge(administration)
        .route_layer(middleware::from_fn_with_state(api.clone(), authenticate))
        // Its name is secret, and browsers show it without a key.
        .route(paths::IMAGE_FILE, get(images::file))
        .with_state(api)
        .route(paths::OPENAPI, get(openapi))
        .merge(health)
        .fallback(no_such_path)
        .method_not_allowed_fallback(wrong_method)
        .layer(DefaultBodyLimit::max(body_limit))
        .layer(middleware::from_fn(with_request_id));
    // Around the router, because requests within it are routed already.
    guard.before(Router::new().fallback_service(routes.map_request(meant::as_meant)))
}

/// A method, its path and its handler.
type Route = (MethodFilter, &'static str, MethodRouter<Api>);

fn route<H: Handler<T, Api>, T: 'static>(
    method: MethodFilter,
    path: &'static str,
    handler: H,
) -> Route {
    (method, path, on(method, handler))
}

fn for_clients() -> Vec<Route> {
    vec![
        route(GET, paths::MODELS, models::list),
        route(GET, paths::MODEL, models::show),
        route(POST, paths::CHAT_COMPLETIONS, chat),
        route(POST, paths::COMPLETIONS, completions),
        route(POST, paths::EMBEDDINGS, embed),
        route(POST, paths::IMAGES, images::generate),
        route(POST, paths::IMAGE_EDITS, images::edit),
        route(GET, paths::MESH, admin::show),
    ]
}

fn for_administrators() -> Vec<Route> {
    vec![
        route(GET, paths::ROOT, root::show),
        route(POST, paths::ROTATE_ROOT, root::rotate),
        route(GET, paths::TOKENS, tokens::list),
        route(POST, paths::TOKENS, tokens::create),
        route(POST, paths::REVOKE_TOKEN, tokens::revoke),
        route(GET, paths::KEYS, curtain::list),
        route(POST, paths::KEYS, curtain::create),
        route(POST, paths::REVOKE_KEY, curtain::revoke),
        route(GET, paths::NODES, nodes::list),
        route(POST, paths::APPROVE, nodes::approve),
        route(POST, paths::EXPEL, nodes::expel),
        route(POST, paths::READMIT, nodes::readmit),
        route(GET, paths::PINS, admin::pins),
        route(POST, paths::PINS, admin::pin),
        route(POST, paths::DRAIN, rings::drain),
        route(POST, paths::UNDRAIN, rings::undrain),
        route(GET, paths::PLAN, rings::plan),
        route(POST, paths::REBALANCE, rings::rebalance),
    ]
}

fn of(routes: Vec<Route>) -> Router<Api> {
    let added = |router: Router<Api>, (_, path, handler): Route| router.route(path, handler);
    routes.into_iter().fold(Router::new(), added)
}

async fn chat(
    state: State<Api>,
    client: Extension<Client>,
    id: Extension<RequestId>,
    body: Body,
) -> Result<Response, ApiError> {
    answer(generate::Api::Chat, state, client, id, body).await
}

async fn completions(
    state: State<Api>,
    client: Extension<Client>,
    id: Extension<RequestId>,
    body: Body,
) -> Result<Response, ApiError> {
    answer(generate::Api::Completions, state, client, id, body).await
}

async fn answer(
    which: generate::Api,
    State(api): State<Api>,
    Extension(client): Extension<Client>,
    Extension(id): Extension<RequestId>,
    body: Body,
) -> Result<Response, ApiError> {
    let (body, mut lease) = intake::body(&api, &client, body).await?;
    let choices_limit = api.mesh.config.http.choices_limit;
    let parse = move |body: &[u8]| Asked::parse(which, body, choices_limit);
    let mut asked = intake::parsed(&api.mesh, body, parse).await??;
    asked.model = asked.model.map(|name| models::served_as(&api.mesh, name));
    if !client.papers.is_for_all_models() {
        // The default may change until the request is placed.
        asked.model = asked.model.or_else(|| api.mesh.default_model());
        let model = asked.model.as_deref().unwrap_or("*");
        client.papers.require(Need::Infer(model))?;
    }
    lease.set(asked.memory(context_of(&api.mesh, asked.model.clone())))?;
    let pass = api.enter(&client, asked.answers())?.holding(lease);
    let ignored = Ignored::new(&api, &asked.ignored)?;
    // Workers that take plain tasks cannot stream and know few parameters: where there is another, it answers.
    let plain = api.mesh.with_registry(Registry::takes_only_plain);
    let source = Source {
        ingress: Ingress::Http,
        origin: client.origin(),
    };
    let receivers = asked.tasks(&id.0, plain).into_iter().map(|task| {
        let task = GenerateTask {
            source,
            salt: client.salt,
            holder: client.papers.holder(),
            ..task
        };
        submit(&api.mesh, Front::Http, task)
    });
    let receivers = receivers.collect();
    let answering = Answering::new(&asked, unix_seconds(SystemTime::now()), receivers, pass);
    let answer = if asked.stream {
        answering.stream(api.mesh.config.http.keep_alive).await
    } else {
        hold::whole(answering.gather(), api.hold()).await
    };
    answer.map(|response| ignored.named_in(response))
}

async fn embed(
    State(api): State<Api>,
    Extension(client): Extension<Client>,
    Extension(id): Extension<RequestId>,
    body: Body,
) -> Result<Response, ApiError> {
    // Its texts are held for as long as it runs, and once more on their way to workers: as much as the body
    // was counted for.
    client.papers.require(Need::Embed)?;
    let (body, mut lease) = intake::body(&api, &client, body).await?;
    let mut asked = intake::parsed(&api.mesh, body, AskedEmbeddings::parse).await??;
    let pass = api.enter(&client, 1)?;
    let ignored = Ignored::new(&api, &asked.ignored)?;
    let mut task = std::mem::take(&mut asked.task);
    task.id = id.0;
    task.model = task.model.map(|name| models::served_as(&api.mesh, name));
    task.origin = client.origin();
    task.holder = client.papers.holder();
    let hold = api.hold();
    let answer = async move {
        let _pass = pass;
        let embedded = embed::embed(&api.mesh, Front::Http, task, &mut lease).await;
        embedded
            .map(|embedded| hold::counted(asked.answer(&embedded), lease))
            .map_err(|error| ApiError::from(&error))
    };
    let answer = hold::whole(answer, hold).await;
    answer.map(|response| ignored.named_in(response))
}

/// The context of a model, or of the one that is meant if none is named.
fn context_of(mesh: &Mesh, model: Option<String>) -> Option<u32> {
    let model = model.or_else(|| mesh.default_model())?;
    mesh.with_registry(|registry| registry.context_of(&model))
}

async fn openapi() -> impl IntoResponse {
    let json = HeaderValue::from_static("application/json");
    ([(header::CONTENT_TYPE, json)], mesh_api::OPENAPI)
}

/// Admits callers that may use the API, and notes which caller it is.
async fn authenticate(
    State(api): State<Api>,
    mut request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    let admitted = api.keys.admit(request.headers(), SystemTime::now());
    let address = request.extensions().get::<ConnectInfo<SocketAddr>>();
    let address = address.map(|info| info.0.ip().to_canonical());
    let from = address.unwrap_or(Ipv4Addr::UNSPECIFIED.into());
    let refused = |refused: Option<Refused>| {
        if let Some(refused) = refused {
            api.mesh.audit.refused_credential(refused, from);
        }
    };
    let admitted = admitted.map_err(|denied| {
        refused(denied.refused(DOOR));
        let code = match denied {
            Denied::Organization { .. } => Code::WrongTenant,
            _ => Code::InvalidApiKey,
        };
        ApiError::new(code, denied.to_string())
    })?;
    let client = Client {
        caller: admitted.caller,
        address,
        salt: admitted.salt,
        papers: admitted.papers,
    };
    let papers = client.papers.clone();
    request.extensions_mut().insert(client);
    let response = next.run(request).await;
    if response.extensions().get::<Code>() == Some(&Code::MissingRight) {
        refused(papers.too_narrow(DOOR));
    }
    Ok(response)
}

async fn administrators_only(
    Extension(client): Extension<Client>,
    request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    let need = match request.uri().path() {
        paths::TOKENS | paths::REVOKE_TOKEN => Need::Join,
        _ => Need::Admin,
    };
    client.papers.require(need)?;
    Ok(next.run(request).await)
}

/// Takes the client's request id, or makes one, and sends it back.
async fn with_request_id(mut request: Request, next: Next) -> Response {
    let sent = request.headers().get(REQUEST_ID);
    let sent = sent.and_then(|value| value.to_str().ok());
    let usable = |id: &&str| {
        !id.is_empty() && id.len() <= 128 && id.bytes().all(|byte| byte.is_ascii_graphic())
    };
    let sent = sent.filter(usable).map(str::to_owned);
    let id = sent.unwrap_or_else(|| ids::fresh("req"));
    request.extensions_mut().insert(RequestId(id.clone()));
    let mut response = next.run(request).await;
    if let Ok(value) = HeaderValue::from_str(&id) {
        response.headers_mut().insert(REQUEST_ID, value);
    }
    response
}

async fn no_such_path(request: Request) -> Response {
    let path = request.uri().path();
    let text = format!("there is no {path} here; the API begins with /v1/");
    ApiError::new(Code::UnknownUrl, text).into_response()
}

async fn wrong_method(request: Request) -> Response {
    let (method, path) = (request.method(), request.uri().path());
    let text = format!("{method} is not allowed on {path}");
    ApiError::new(Code::MethodNotAllowed, text).into_response()
}

const GET: MethodFilter = MethodFilter::GET;
const POST: MethodFilter = MethodFilter::POST;
/// The name of this door in the audit trail.
const DOOR: &str = "http";
const REQUEST_ID: &str = "x-request-id";

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn the_document_has_all_operations_of_the_router_and_their_access() {
        let document: Value = serde_json::from_str(mesh_api::OPENAPI).unwrap();
        let mut documented = BTreeMap::new();
        for (path, operations) in document["paths"].as_object().unwrap() {
            for (method, operation) in operations.as_object().unwrap() {
                let security = operation["security"].clone();
                documented.insert((path.clone(), method.clone()), security);
            }
        }

        let (open, optional) = (json!([]), json!([{}, {"key": []}]));
        let key = |(method, path, _): Route| (method, path, optional.clone());
        let admin = |(method, path, _): Route| (method, path, json!([{"admin": []}]));
        let routed = for_clients().into_iter().map(key);
        let routed = routed.chain(for_administrators().into_iter().map(admin));
        let routed = routed.chain([
            (GET, paths::OPENAPI, open.clone()),
            (GET, paths::IMAGE_FILE, open.clone()),
            (GET, paths::HEALTH, open),
            // `http.open` says whether these need a key.
            (GET, paths::READY, optional.clone()),
            (GET, paths::METRICS, optional.clone()),
        ]);
        let routed = routed.map(|(method, path, security)| {
            let method = if method == GET { "get" } else { "post" };
            ((path.replace("{*", "{"), method.to_owned()), security)
        });
        assert_eq!(routed.collect::<BTreeMap<_, _>>(), documented);
    }
}
