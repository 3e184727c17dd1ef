//! The models of the mesh, and the names that clients call them by.

use std::collections::BTreeMap;

use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use axum::{Extension, Json};
use mesh_api::{Code, ListModelsResponse, Model};
use mesh_base::clock::unix_seconds;
use mesh_control::placement::Refusal;
use mesh_control::request::AnswerError;
use mesh_curtain::Need;
use mesh_proto::{ModelCard, ModelKind};

use super::error::ApiError;
use super::keys::Client;
use super::state::Api;
use crate::mesh::Mesh;

/// `GET /v1/models`.
pub(super) async fn list(
    State(api): State<Api>,
    Extension(client): Extension<Client>,
) -> Json<ListModelsResponse> {
    let mut models = models(&api);
    models.retain(|_, card| client.papers.rights.serve(need_of(card)));
    Json(ListModelsResponse {
        object: "list".to_owned(),
        data: models.values().map(|card| model(&api, card)).collect(),
    })
}

/// `GET /v1/models/NAME`.
pub(super) async fn show(
    State(api): State<Api>,
    Extension(client): Extension<Client>,
    name: Result<Path<String>, PathRejection>,
) -> Result<Json<Model>, ApiError> {
    let Path(name) = name.map_err(|error| ApiError {
        status: error.status(),
        param: Some("model".into()),
        ..ApiError::new(Code::InvalidValue, error.to_string())
    })?;
    let found = models(&api)
        .get(&served_as(&api.mesh, name.clone()))
        .filter(|card| client.papers.rights.serve(need_of(card)))
        .map(|card| model(&api, card));
    found.map(Json).ok_or_else(|| {
        let error = AnswerError::from(Refusal::UnknownModel { model: name });
        ApiError::from(&error)
    })
}

/// Every model that requests can name: those served now, and those of rings that recover.
fn models(api: &Api) -> BTreeMap<String, ModelCard> {
    api.mesh.with_rings(|rings, registry| {
        let mut cards = rings.cards();
        cards.extend(registry.models().into_values().cloned());
        let named = cards.into_iter().map(|card| (card.name.clone(), card));
        named.collect()
    })
}

/// The right to use a model.
fn need_of(card: &ModelCard) -> Need<'_> {
    match card.kind() {
        ModelKind::Chat => Need::Infer(&card.name),
        ModelKind::Embed => Need::Embed,
        ModelKind::Image => Need::Image,
    }
}

fn model(api: &Api, card: &ModelCard) -> Model {
    Model {
        id: card.name.clone(),
        object: "model".to_owned(),
        created: unix_seconds(api.mesh.started),
        owned_by: "hydramesh".to_owned(),
        context_length: card.context,
        architecture: card.architecture.clone(),
        quantization: card.quantization.clone(),
        file_bytes: card.file_bytes,
        kind: kind_name(card).to_owned(),
        dimensions: (card.dimensions > 0).then_some(card.dimensions),
    }
}

/// The name of the model that is meant. Clients of many servers put the server's name before it, and Ollama's
/// a tag behind it.
pub(crate) fn served_as(mesh: &Mesh, name: String) -> String {
    if mesh.knows_model(&name) {
        return name;
    }
    let meant = meant(&name).filter(|meant| mesh.knows_model(meant));
    meant.map_or_else(|| name.clone(), str::to_owned)
}

fn meant(name: &str) -> Option<&str> {
    let is_provider = |name: &str| {
        PROVIDERS
            .split_ascii_whitespace()
            .any(|known| known == name)
    };
    let untagged = name.strip_suffix(":latest").unwrap_or(name);
    let bare = match untagged.split_once('/') {
        Some((provider, rest)) if is_provider(provider) => rest,
        _ => untagged,
    };
    (bare != name).then_some(bare)
}

/// Names of servers with blanks between them.
const PROVIDERS: &str = "openai text-completion-openai custom_openai openai_like hosted_vllm vllm \
    ollama ollama_chat lm_studio lmstudio llamafile litellm_proxy hydramesh";

pub(super) fn kind_name(card: &ModelCard) -> &'static str {
    match card.kind() {
        ModelKind::Chat => "chat",
        ModelKind::Embed => "embed",
        ModelKind::Image => "image",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_clients_put_around_a_name_is_taken_off() {
        assert_eq!(meant("openai/Qwen/Qwen3-0.6B"), Some("Qwen/Qwen3-0.6B"));
        assert_eq!(meant("ollama/tiny:latest"), Some("tiny"));
        assert_eq!(meant("tiny:latest"), Some("tiny"));
        assert_eq!(meant("Qwen/Qwen3-0.6B"), None);
        assert_eq!(meant("tiny"), None);
    }
}
