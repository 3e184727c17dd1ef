//! The OpenAPI document, made of the types.

use schemars::generate::SchemaSettings;
use schemars::transform::{RecursiveTransform, Transform};
use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde_json::{Map, Value, json};

use crate::fields::{self, Neutral};
use crate::{
    ChatCompletion, ChatCompletionChunk, ChatCompletionRequest, Completion, CompletionRequest,
    CreateEmbeddingRequest, CreateEmbeddingResponse, CreateImageRequest, CreateKeyRequest,
    CreateTokenRequest, DrainProgress, EditImageRequest, ErrorResponse, ExpelRequest, Health,
    ImageStreamEvent, ImagesResponse, KeyCreated, KeyList, KeyRequest, ListModelsResponse, Mesh,
    Model, NodeChange, NodeList, NodeRequest, PinDecision, PinList, PlanResponse, Readiness,
    RebalanceRequest, RebalanceResponse, RevokedKey, RevokedToken, Root, RotateRootRequest,
    TokenCreated, TokenList, TokenRequest, WorkerRequest, paths, schema,
};

/// Who may call an operation.
#[derive(Clone, Copy, PartialEq)]
enum Access {
    /// Everyone.
    Open,
    /// Everyone, unless the head has API keys and does not exempt the path (`http.open`).
    Optional,
    /// Everyone, unless the head has API keys.
    Clients,
    /// Holders of the admin key.
    Administrators,
}

/// An operation, without its bodies.
struct Operation {
    method: &'static str,
    path: &'static str,
    id: &'static str,
    summary: &'static str,
    access: Access,
    /// Statuses of errors.
    errors: &'static [u16],
}

const fn get(path: &'static str, id: &'static str, summary: &'static str) -> Operation {
    Operation {
        method: "get",
        path,
        id,
        summary,
        access: Access::Clients,
        errors: &[],
    }
}

const fn post(path: &'static str, id: &'static str, summary: &'static str) -> Operation {
    Operation {
        method: "post",
        ..get(path, id, summary)
    }
}

impl Operation {
    const fn access(self, access: Access) -> Self {
        Self { access, ..self }
    }

    const fn errors(self, errors: &'static [u16]) -> Self {
        Self { errors, ..self }
    }
}

/// Errors of requests that workers answer, besides those of bodies.
const OF_REQUESTS: &[u16] = &[404, 429, 500, 502, 504];

/// Errors of all requests with bodies.
const OF_BODIES: &[u16] = &[400, 408, 413, 415, 503];

/// The document as text, with a line break at its end.
pub fn document() -> String {
    let mut document = Document::new();
    document.add_openai();
    document.add_state();
    document.add_administration();
    let mut text = Vec::new();
    let formatter = serde_json::ser::PrettyFormatter::with_indent(b" ");
    let mut serializer = serde_json::Serializer::with_formatter(&mut text, formatter);
    serde::Serialize::serialize(&document.finish(), &mut serializer)
        .expect("a JSON value is JSON and a Vec takes all of it");
    text.push(b'\n');
    String::from_utf8(text).expect("JSON is UTF-8")
}

struct Document {
    paths: Map<String, Value>,
    requests: SchemaGenerator,
    responses: SchemaGenerator,
    /// Responses to requests that fail.
    errors: Map<String, Value>,
    /// Schemas besides those of the generators.
    named: Map<String, Value>,
}

impl Document {
    fn new() -> Self {
        let settings = || {
            SchemaSettings::draft2020_12().with(|settings| {
                settings.definitions_path = "/components/schemas".into();
                settings.meta_schema = None;
            })
        };
        Self {
            paths: Map::new(),
            requests: settings().for_deserialize().into_generator(),
            responses: settings().for_serialize().into_generator(),
            errors: Map::new(),
            named: Map::from_iter([("Empty".to_owned(), schema::empty())]),
        }
    }

    fn add_openai(&mut self) {
        let chat = post(
            paths::CHAT_COMPLETIONS,
            "createChatCompletion",
            "Answers a chat.",
        );
        let body = self.request::<ChatCompletionRequest>("ChatCompletionRequest", &fields::CHAT);
        let whole = self.envelope::<ChatCompletion<'_>>("ChatCompletion");
        let whole = self.or_error(&whole);
        let chunk = self.envelope::<ChatCompletionChunk<'_>>("ChatCompletionChunk");
        let answer = generated(&whole, &chunk);
        self.add(chat.errors(OF_REQUESTS), Some(body), answer);

        let text = post(paths::COMPLETIONS, "createCompletion", "Continues texts.");
        let body = self.request::<CompletionRequest>("CompletionRequest", &fields::COMPLETIONS);
        let chunk = self.envelope::<Completion<'_>>("Completion");
        let answer = generated(&self.or_error(&chunk), &chunk);
        self.add(text.errors(OF_REQUESTS), Some(body), answer);

        let embed = post(
            paths::EMBEDDINGS,
            "createEmbedding",
            "Turns texts into vectors.",
        );
        let body =
            self.request::<CreateEmbeddingRequest>("CreateEmbeddingRequest", &fields::EMBEDDINGS);
        let whole = self.response::<CreateEmbeddingResponse<'_>>();
        let answer = json_content(&self.or_error(&whole));
        self.add(embed.errors(OF_REQUESTS), Some(body), answer);

        let draw = post(paths::IMAGES, "createImage", "Makes images of a text.");
        let body = self.request::<CreateImageRequest>("CreateImageRequest", &fields::IMAGES);
        let whole = self.response::<ImagesResponse>();
        let event = self.response::<ImageStreamEvent>();
        let answer = generated(&self.or_error(&whole), &event);
        self.add(draw.errors(OF_REQUESTS), Some(body), answer);
        let edit = post(
            paths::IMAGE_EDITS,
            "createImageEdit",
            "Changes an image as a text says.",
        );
        let body = self.request::<EditImageRequest>("EditImageRequest", &fields::IMAGE_EDITS);
        let event = self.edit_events(&event);
        let answer = generated(&self.or_error(&whole), &event);
        self.add(edit.errors(OF_REQUESTS), Some(body.clone()), answer);
        let form = json!({
            "schema": body,
            "encoding": {
                "image": {"contentType": "image/png, image/jpeg, image/webp"},
                "mask": {"contentType": "image/png, image/webp"},
            },
        });
        let content = &mut self.paths[paths::IMAGE_EDITS]["post"]["requestBody"]["content"];
        content["multipart/form-data"] = form;

        let summary = "An image that was asked for as a URL, until its time is over.";
        let file = get(paths::IMAGE_FILE, "getImageFile", summary).access(Access::Open);
        let png =
            json!({"image/png": {"schema": {"type": "string", "contentMediaType": "image/png"}}});
        self.add(file.errors(&[404]), None, png);
        let name = parameter("name", "path", "Name of the image in its URL.");
        self.parameter(paths::IMAGE_FILE, name);

        let summary = "Lists the models that requests can name.";
        self.show::<ListModelsResponse>(get(paths::MODELS, "listModels", summary));
        let one = get(paths::MODEL, "retrieveModel", "Describes a model.");
        self.show::<Model>(one.errors(&[400, 404]));
        let name = parameter("name", "path", "Name of the model; it may have slashes.");
        self.parameter(paths::MODEL, name);
    }

    fn add_state(&mut self) {
        let summary = "Describes workers, rings and shared models.";
        self.show::<Mesh>(get(paths::MESH, "getMesh", summary));

        let summary = "Tells whether the head is alive.";
        let health = get(paths::HEALTH, "getHealth", summary).access(Access::Open);
        let schema = self.show::<Health>(health);
        self.unavailable(paths::HEALTH, "A loop of the head is stuck.", &schema);

        let summary = "Tells whether the mesh, or one model, answers.";
        let ready = get(paths::READY, "getReadiness", summary).access(Access::Optional);
        let schema = self.show::<Readiness>(ready);
        self.unavailable(paths::READY, "No worker answers.", &schema);
        let text = "Name of a model. Needs a key unless `http.open` has `ready`.";
        let mut model = parameter("model", "query", text);
        model["required"] = false.into();
        model["schema"] = json!({"type": "string"});
        self.parameter(paths::READY, model);

        let summary = "Metrics for Prometheus, as text or as OpenMetrics.";
        let metrics = get(paths::METRICS, "getMetrics", summary).access(Access::Optional);
        let text = json!({"schema": {"type": "string"}});
        let content = json!({"text/plain": text, "application/openmetrics-text": text});
        self.add(metrics, None, content);

        let document = get(paths::OPENAPI, "getOpenApi", "This document.").access(Access::Open);
        self.add(document, None, json_content(&json!({"type": "object"})));
    }

    fn add_administration(&mut self) {
        let errors = &[404, 409, 500];
        let summary = "Lists join tokens, without their secrets.";
        let list = get(paths::TOKENS, "listTokens", summary).errors(&[500]);
        self.administer::<(), TokenList>(list);
        let create = post(paths::TOKENS, "createToken", "Creates a join token.");
        self.administer::<CreateTokenRequest, TokenCreated>(create.errors(&[409, 500]));
        let summary = "Revokes an open join token.";
        let revoke = post(paths::REVOKE_TOKEN, "revokeToken", summary).errors(errors);
        self.administer::<TokenRequest, RevokedToken>(revoke);

        let root = get(paths::ROOT, "getRoot", "Shows the mesh root.");
        self.administer::<(), Root>(root);
        let rotate = post(paths::ROTATE_ROOT, "rotateRoot", "Rotates the mesh root.");
        self.administer::<RotateRootRequest, Root>(rotate.errors(&[409, 500]));
        let summary = "Lists curtain tokens and API keys, without their texts.";
        self.administer::<(), KeyList>(get(paths::KEYS, "listKeys", summary));
        let create = post(paths::KEYS, "createKey", "Issues a curtain token.");
        self.administer::<CreateKeyRequest, KeyCreated>(create.errors(&[409, 500]));
        let summary = "Revokes a curtain token, and all that follow from it.";
        let revoke = post(paths::REVOKE_KEY, "revokeKey", summary).errors(errors);
        self.administer::<KeyRequest, RevokedKey>(revoke);

        let summary = "Lists all nodes that the head knows.";
        let list = get(paths::NODES, "listNodes", summary).errors(&[500]);
        self.administer::<(), NodeList>(list);
        let expel = post(paths::EXPEL, "expelNode", "Expels a node from the mesh.");
        self.administer::<ExpelRequest, NodeChange>(expel.errors(errors));
        let summary = "Approves a node that waits to join.";
        let approve = post(paths::APPROVE, "approveNode", summary).errors(errors);
        self.administer::<NodeRequest, NodeChange>(approve);
        let summary = "Ends the expulsion or the quarantine of a node.";
        let readmit = post(paths::READMIT, "readmitNode", summary).errors(errors);
        self.administer::<NodeRequest, NodeChange>(readmit);

        let list = get(paths::PINS, "listPins", "Lists the pins of model names.");
        self.administer::<(), PinList>(list);
        let summary = "Pins a model's name, or releases its pin.";
        let pin = post(paths::PINS, "setPin", summary).errors(&[409]);
        self.administer::<PinDecision, PinDecision>(pin);

        let summary = "Drains a worker: it gets nothing new and hands its stages over.";
        let drain = post(paths::DRAIN, "drainWorker", summary).errors(errors);
        self.administer::<WorkerRequest, DrainProgress>(drain);
        let undrain = post(
            paths::UNDRAIN,
            "undrainWorker",
            "Ends the drain of a worker.",
        );
        self.administer::<WorkerRequest, DrainProgress>(undrain.errors(&[404, 500]));

        let summary = "Shows the ring that would be formed for a model.";
        let plan = get(paths::PLAN, "planRing", summary).errors(&[400, 404, 503]);
        self.administer::<(), PlanResponse>(plan);
        let model = parameter("model", "query", "Name of the model.");
        self.parameter(paths::PLAN, model);
        let summary = "Compares rings with fresh plans and replaces those that are clearly worse.";
        let rebalance = post(paths::REBALANCE, "rebalanceRings", summary).errors(&[409]);
        self.administer::<RebalanceRequest, RebalanceResponse>(rebalance);
    }

    /// Adds an operation without a body, and returns the schema of its answer.
    fn show<R: JsonSchema>(&mut self, operation: Operation) -> Value {
        let schema = self.response::<R>();
        self.add(operation, None, json_content(&schema));
        schema
    }

    /// Adds an operation for administrators. The body `()` is none.
    fn administer<B: JsonSchema, R: JsonSchema>(&mut self, operation: Operation) {
        let body = match operation.method {
            "post" => Some(self.requests.subschema_for::<B>().into()),
            _ => None,
        };
        let content = json_content(&self.response::<R>());
        self.add(operation.access(Access::Administrators), body, content);
    }

    fn add(&mut self, operation: Operation, body: Option<Value>, content: Value) {
        let openai = [
            paths::CHAT_COMPLETIONS,
            paths::COMPLETIONS,
            paths::EMBEDDINGS,
            paths::IMAGES,
            paths::IMAGE_EDITS,
        ];
        let mut headers = json!({"x-request-id": {
            "description": "Id of the request in the logs of all services.", "schema": {"type": "string"},
        }});
        if openai.contains(&operation.path) {
            headers["x-hydramesh-ignored"] = json!({
                "description": "Unknown fields of the request.", "schema": {"type": "string"},
            });
        }
        let mut responses = Map::new();
        let done = json!({"description": "Done.", "headers": headers, "content": content});
        responses.insert("200".to_owned(), done);
        let error = json_content(&self.response::<ErrorResponse>());
        let of_all: &[u16] = match operation.access {
            Access::Open => &[403],
            Access::Optional | Access::Clients | Access::Administrators => &[401, 403],
        };
        let of_body: &[u16] = if body.is_some() { OF_BODIES } else { &[] };
        for status in of_all.iter().chain(of_body).chain(operation.errors) {
            let response = json!({"description": meaning(*status), "content": error});
            self.errors.insert(format!("Error{status}"), response);
            let reference = json!({"$ref": format!("#/components/responses/Error{status}")});
            responses.insert(status.to_string(), reference);
        }
        let security = match operation.access {
            Access::Open => json!([]),
            Access::Optional | Access::Clients => json!([{}, {"key": []}]),
            Access::Administrators => json!([{"admin": []}]),
        };
        let mut described = json!({
            "operationId": operation.id,
            "summary": operation.summary,
            "security": security,
            "responses": responses,
        });
        if let Some(schema) = body {
            // All their fields have defaults, and an empty body is an empty object.
            let optional = [paths::TOKENS, paths::REBALANCE];
            described["requestBody"] = json!({
                "required": !optional.contains(&operation.path), "content": json_content(&schema),
            });
        }
        let path = self.paths.entry(documented(operation.path));
        path.or_insert_with(|| json!({}))[operation.method] = described;
    }

    fn parameter(&mut self, path: &str, parameter: Value) {
        self.paths[&documented(path)]["get"]["parameters"] = json!([parameter]);
    }

    /// The response with the status 503 of a path.
    fn unavailable(&mut self, path: &str, description: &str, schema: &Value) {
        self.paths[path]["get"]["responses"]["503"] =
            json!({"description": description, "content": json_content(schema)});
    }

    fn response<T: JsonSchema>(&mut self) -> Value {
        self.responses.subschema_for::<T>().into()
    }

    /// A whole answer, or an error where the status was sent before the answer was there.
    fn or_error(&mut self, whole: &Value) -> Value {
        json!({
            "description": "The answer. A failure after `http.early_headers` comes as an ErrorResponse, with the status 200.",
            "anyOf": [whole, self.response::<ErrorResponse>()],
        })
    }

    /// The events of edits, which have other types than those of generations.
    fn edit_events(&mut self, generation: &Value) -> Value {
        let name = generation["$ref"].as_str().unwrap_or_default();
        let name = name.rsplit('/').next().unwrap_or_default();
        let events = self.responses.definitions().get(name);
        let events = events.map_or_else(String::new, Value::to_string);
        let events = events.replace("image_generation.", "image_edit.");
        let events = serde_json::from_str(&events).expect("a name in JSON was replaced");
        self.named.insert("ImageEditEvent".to_owned(), events);
        json!({"$ref": "#/components/schemas/ImageEditEvent"})
    }

    /// A component with a name of its own.
    fn envelope<T: JsonSchema>(&mut self, name: &str) -> Value {
        let schema = self.response::<T>();
        self.named.insert(name.to_owned(), schema);
        json!({"$ref": format!("#/components/schemas/{name}")})
    }

    /// A request whose table of fields adds to its schema.
    fn request<T: JsonSchema>(&mut self, name: &str, table: &fields::Table) -> Value {
        let reference = self.requests.subschema_for::<T>().into();
        let definitions = self.requests.definitions_mut();
        schema::add_fields(&mut definitions[name], table);
        reference
    }

    fn finish(mut self) -> Value {
        let mut schemas = self.responses.take_definitions(true);
        schemas.extend(self.requests.take_definitions(true));
        schemas.extend(self.named);
        for name in ["tool_calls", "function_call", "audio"] {
            schemas["Message"]["properties"][name] = schema::values(Neutral::Empty);
        }
        let mut document = json!({
            "openapi": "3.1.0",
            "info": {
                "title": "HydraMesh head",
                "version": env!("CARGO_PKG_VERSION"),
                "description": "The OpenAI API of a HydraMesh head, its state and its administration. Fields of the OpenAI API that \
                    would change the answer and are not supported are refused with 400; unknown fields are ignored and named \
                    in x-hydramesh-ignored.",
            },
            "paths": self.paths,
            "components": {
                "securitySchemes": {
                    "key": {
                        "type": "http",
                        "scheme": "bearer",
                        "description": "A key of `http.api_keys_file`, or the admin key. Without that file no key is needed.",
                    },
                    "admin": {
                        "type": "http",
                        "scheme": "bearer",
                        "description": "The key in `admin.key` in the head's state directory.",
                    },
                },
                "responses": self.errors,
                "schemas": schemas,
            },
        });
        // A field that the client may leave out need not say its default. Integers have no widths in JSON: that
        // of 32 bits becomes a bound.
        let mut plain = RecursiveTransform(|schema: &mut Schema| {
            if schema.get("default").is_some() {
                schema.remove("default");
            }
            let format = schema.remove("format");
            if format.is_some_and(|format| format == "uint32") && schema.get("maximum").is_none() {
                schema.insert("maximum".to_owned(), u32::MAX.into());
            }
        });
        let schemas = document["components"]["schemas"].as_object_mut();
        for (_, schema) in schemas.into_iter().flatten() {
            if let Ok(schema) = schema.try_into() {
                plain.transform(schema);
            }
        }
        document
    }
}

/// An answer that is whole or comes as a stream.
fn generated(whole: &Value, chunk: &Value) -> Value {
    json!({
        "application/json": {"schema": whole},
        "text/event-stream": {"schema": {
            "description": "Server-sent events. The data of each is a chunk or an error, that of the last is `[DONE]`. Comments say \
                why the request waits.",
            "x-event": chunk,
        }},
    })
}

fn json_content(schema: &Value) -> Value {
    json!({"application/json": {"schema": schema}})
}

fn parameter(name: &str, place: &str, description: &str) -> Value {
    json!({
        "name": name, "in": place, "required": true, "description": description,
        "schema": {"type": "string", "minLength": 1},
    })
}

/// A path of the router as OpenAPI writes it.
fn documented(path: &str) -> String {
    path.replace("{*", "{")
}

fn meaning(status: u16) -> &'static str {
    match status {
        400 => "A field is wrong or not supported; `param` names it.",
        401 => "Missing, wrong or insufficient API key or token.",
        403 => "The Host or Origin is not allowed, or the key or token lacks a right.",
        404 => "No such model, image, worker, node or token.",
        408 => "The body did not arrive in time.",
        409 => "The state of the mesh does not allow it.",
        413 => "The body exceeds `http.body_limit`.",
        415 => "The body is not JSON, nor a form where one is taken.",
        429 => {
            "Too many requests of this client are running; `Retry-After` says when to try again."
        }
        500 => "A fault of the head.",
        502 => "The request failed on several workers.",
        503 => {
            "No worker, all of them busy, no memory for the request, or a shutdown; `Retry-After` says when to try again."
        }
        504 => "No complete answer in time.",
        _ => "An error.",
    }
}
