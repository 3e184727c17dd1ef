use mesh_api::OPENAPI;
use serde_json::{Value, json};

use super::*;

fn unknown(api: Api, body: &Value) -> Result<Vec<String>, Invalid> {
    let names = check(api, Fields::new(body.as_object().unwrap()))?;
    Ok(names.into_iter().map(str::to_owned).collect())
}

const ALL: [Api; 5] = [
    Api::Chat,
    Api::Completions,
    Api::Embeddings,
    Api::Images,
    Api::ImageEdits,
];

#[test]
fn every_refused_field_may_be_null_and_its_refusal_names_the_remedy() {
    for api in ALL {
        for (name, rule) in api.fields().1.refused() {
            let null = json!({name: null});
            assert_eq!(unknown(api, &null), Ok(Vec::new()), "{api:?} {name}");
            let asking = json!({name: "something else entirely"});
            if let Err(invalid) = unknown(api, &asking) {
                assert_eq!(invalid.param, name);
                assert!(invalid.unsupported && invalid.message.len() > name.len() + 30);
            } else {
                assert_eq!(rule.remedy, "", "{api:?} {name}");
            }
        }
    }
}

#[test]
fn values_that_ask_for_nothing_are_taken() {
    let chat = json!({
        "tools": [], "tool_choice": "none", "functions": [], "response_format": {"type": "text"}, "grammar": "", "json_schema": {},
        "guided_json": null, "structured_outputs": {}, "modalities": ["text"], "best_of": 1, "mirostat": 0, "typical_p": 1.0,
        "xtc_probability": 0, "samplers": [], "skip_special_tokens": true, "top_n_sigma": -1, "dry_multiplier": 0.0, "echo": false,
        "reasoning_format": "auto", "logits_processors": [], "documents": [], "length_penalty": 1, "verbosity": "medium",
        "user": "u", "metadata": {}, "store": false, "service_tier": "auto", "parallel_tool_calls": true, "cache_prompt": true,
        "id_slot": -1, "speculative.n_max": 4, "prediction": {"type": "content", "content": "x"}, "keep_alive": "5m",
    });
    assert_eq!(unknown(Api::Chat, &chat), Ok(Vec::new()));
    let embeddings = json!({
        "input": "x", "truncate": true, "normalize": true, "truncate_prompt_tokens": -1, "embedding_types": ["float"], "options": {},
    });
    assert_eq!(unknown(Api::Embeddings, &embeddings), Ok(Vec::new()));
    assert_eq!(
        unknown(Api::Embeddings, &json!({"truncate": "END"})),
        Ok(Vec::new())
    );
    let images = json!({
        "prompt": "x", "quality": "standard", "style": "vivid", "background": "auto", "output_format": "png", "partial_images": 0,
        "batch_size": 1, "n_iter": 1, "clip_skip": 1, "eta": 0, "subseed": -1, "lora": [], "restore_faces": false, "moderation": "low",
    });
    assert_eq!(unknown(Api::Images, &images), Ok(Vec::new()));
}

#[test]
fn what_would_change_the_answer_is_refused() {
    for (api, body) in [
        (Api::Chat, json!({"tools": [{"type": "function"}]})),
        (Api::Chat, json!({"tool_choice": "required"})),
        (Api::Chat, json!({"structural_tag": "x"})),
        (Api::Chat, json!({"format": "json"})),
        (Api::Completions, json!({"grammar_lazy": true})),
        (Api::Completions, json!({"suffix": "x"})),
        (Api::Completions, json!({"prompt_logprobs": 0})),
        (Api::Completions, json!({"truncate_prompt_tokens": 5})),
        (Api::Completions, json!({"skip_special_tokens": false})),
        (Api::Chat, json!({"mirostat": 2})),
        (Api::Chat, json!({"chat_template": "{{ messages }}"})),
        (Api::Embeddings, json!({"truncate": false})),
        (Api::Embeddings, json!({"truncate": "START"})),
        (Api::Embeddings, json!({"embedding_types": ["int8"]})),
        (Api::Images, json!({"image": "data:image/png;base64,"})),
        (Api::Images, json!({"mask": "data:image/png;base64,"})),
        (Api::ImageEdits, json!({"images": [{"image_url": "x"}]})),
        (Api::ImageEdits, json!({"input_fidelity": "high"})),
        (Api::Images, json!({"output_format": "webp"})),
        (Api::Images, json!({"clip_skip": 2})),
        (Api::Images, json!({"batch_size": 4})),
    ] {
        let name = body.as_object().unwrap().keys().next().unwrap().clone();
        assert_eq!(unknown(api, &body).unwrap_err().param, name, "{body}");
    }
}

#[test]
fn a_field_stands_in_one_table_and_in_the_openapi_document() {
    let document: Value = serde_json::from_str(OPENAPI).unwrap();
    for (api, request) in [
        (Api::Chat, "ChatCompletionRequest"),
        (Api::Completions, "CompletionRequest"),
        (Api::Embeddings, "CreateEmbeddingRequest"),
        (Api::Images, "CreateImageRequest"),
        (Api::ImageEdits, "EditImageRequest"),
    ] {
        let (read, table) = api.fields();
        let mut names: Vec<&str> = names(read).chain(table.harmless()).collect();
        names.extend(table.refused().map(|(name, _)| name));
        names.sort_unstable();
        let twice: Vec<_> = names.windows(2).filter(|pair| pair[0] == pair[1]).collect();
        assert!(twice.is_empty(), "{api:?} {twice:?}");
        let documented = &document["components"]["schemas"][request]["properties"];
        let documented = documented.as_object().unwrap().keys();
        let mut documented: Vec<&str> = documented.map(String::as_str).collect();
        documented.sort_unstable();
        assert_eq!(names, documented, "{api:?}");
    }
}

#[test]
fn unknown_fields_are_named() {
    for api in ALL {
        let body = json!({"frobnicate": 1, "model": "m"});
        assert_eq!(unknown(api, &body), Ok(vec!["frobnicate".to_owned()]));
    }
}
