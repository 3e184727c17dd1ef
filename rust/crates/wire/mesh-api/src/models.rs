//! Models, health and readiness.

use serde::{Deserialize, Serialize};

/// The models that requests can name.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct ListModelsResponse {
    /// Always `list`.
    #[serde(default)]
    pub object: String,
    /// The models, by name.
    // No default: an answer without it is not a list of models.
    pub data: Vec<Model>,
}

/// A model that requests can name.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct Model {
    /// Its name.
    pub id: String,
    /// Always `model`.
    pub object: String,
    /// Start of the head, in seconds since 1970.
    pub created: u64,
    /// Always `hydramesh`.
    pub owned_by: String,
    /// Most tokens of prompt and answer together.
    pub context_length: u32,
    /// Architecture, such as `llama`.
    pub architecture: String,
    /// Format of the weights, such as `Q4_0`.
    pub quantization: String,
    /// Size of its files, in bytes.
    pub file_bytes: u64,
    /// `chat`, `embed` or `image`.
    pub kind: String,
    /// Numbers of a vector, for models of the kind `embed`.
    pub dimensions: Option<u32>,
}

/// Liveness.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct Health {
    /// `ok` or `stuck`.
    pub status: String,
    /// The loop that does not turn.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// Readiness of the mesh, or of one model.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default)]
pub struct Readiness {
    /// `ready` or `unready`.
    pub status: String,
    /// Cause of not being ready; only callers that may know it get it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Rings that do not serve, each as a sentence, where another model answers.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub not_serving: Vec<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_without_models_is_not_a_list() {
        let read = serde_json::from_str::<ListModelsResponse>;
        assert!(read(r#"{"data": []}"#).unwrap().data.is_empty());
        assert!(read("{}").is_err());
    }
}
