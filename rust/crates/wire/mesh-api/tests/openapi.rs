//! The committed document against the types.

use std::collections::BTreeSet;

use mesh_api::OPENAPI;
use mesh_api::fields::{CHAT, COMPLETIONS, EMBEDDINGS, IMAGES};
use serde_json::{Value, json};

#[test]
fn the_committed_document_is_current() {
    let made = mesh_api::openapi::document();
    assert!(
        made == OPENAPI,
        "openapi.json is not current: write it with `cargo run -p mesh-api --features schema --bin openapi -- --write`"
    );
}

#[test]
fn every_reference_has_its_component_and_every_component_is_used() {
    let document: Value = serde_json::from_str(OPENAPI).unwrap();
    let mut named = BTreeSet::new();
    references(&document, &mut named);
    let components = ["responses", "schemas"].into_iter().flat_map(|kind| {
        let components = document["components"][kind].as_object().unwrap();
        components
            .keys()
            .map(move |name| format!("#/components/{kind}/{name}"))
    });
    let components: BTreeSet<String> = components.collect();
    assert_eq!(named, components);
}

fn references(value: &Value, named: &mut BTreeSet<String>) {
    match value {
        Value::Object(map) => {
            if let Some(Value::String(reference)) = map.get("$ref") {
                named.insert(reference.clone());
            }
            map.values().for_each(|value| references(value, named));
        }
        Value::Array(list) => list.iter().for_each(|value| references(value, named)),
        _ => {}
    }
}

#[test]
fn every_property_and_operation_is_described() {
    let document: Value = serde_json::from_str(OPENAPI).unwrap();
    for (path, operations) in document["paths"].as_object().unwrap() {
        for (method, operation) in operations.as_object().unwrap() {
            assert!(operation["summary"].is_string(), "{method} {path}");
            assert!(operation["security"].is_array(), "{method} {path}");
        }
    }
    for (name, schema) in document["components"]["schemas"].as_object().unwrap() {
        for (field, property) in schema["properties"].as_object().into_iter().flatten() {
            let is_of_message = name == "Message" && property["$ref"].is_string();
            assert!(
                property["description"].is_string() || is_of_message,
                "{name}.{field}"
            );
        }
    }
}

#[test]
fn the_tables_and_the_types_have_no_field_in_common() {
    for (table, request) in [
        (CHAT, "ChatCompletionRequest"),
        (COMPLETIONS, "CompletionRequest"),
        (EMBEDDINGS, "CreateEmbeddingRequest"),
        (IMAGES, "CreateImageRequest"),
    ] {
        let document: Value = serde_json::from_str(OPENAPI).unwrap();
        let properties = &document["components"]["schemas"][request]["properties"];
        for (name, refused) in table.refused() {
            let text = properties[name]["description"].as_str().unwrap();
            let told = text.contains(refused.remedy) || text == "Has no effect.";
            assert!(told, "{request}.{name}: {text}");
        }
        for name in table.harmless() {
            assert_eq!(
                properties[name]["description"], "Has no effect.",
                "{request}.{name}"
            );
        }
    }
}

#[test]
fn bodies_are_required_where_fields_are_and_their_failures_are_listed() {
    let document: Value = serde_json::from_str(OPENAPI).unwrap();
    let mut optional = Vec::new();
    for (path, operations) in document["paths"].as_object().unwrap() {
        let operation = &operations["post"];
        let Some(required) = operation["requestBody"]["required"].as_bool() else {
            continue;
        };
        if !required {
            optional.push(path.as_str());
        }
        for status in ["400", "408", "413", "415", "503"] {
            assert!(
                operation["responses"][status].is_object(),
                "{path} {status}"
            );
        }
    }
    optional.sort_unstable();
    assert_eq!(optional, ["/v1/mesh/rebalance", "/v1/mesh/tokens"]);
}

#[test]
fn answers_that_may_be_late_may_be_errors() {
    let document: Value = serde_json::from_str(OPENAPI).unwrap();
    for path in [
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/embeddings",
        "/v1/images/generations",
    ] {
        let content = &document["paths"][path]["post"]["responses"]["200"]["content"];
        let any = content["application/json"]["schema"]["anyOf"].as_array();
        let error = json!({"$ref": "#/components/schemas/ErrorResponse"});
        assert!(any.is_some_and(|any| any.contains(&error)), "{path}");
    }
}

#[test]
fn limits_of_the_head_are_in_the_schemas() {
    let document: Value = serde_json::from_str(OPENAPI).unwrap();
    let schemas = &document["components"]["schemas"];
    let field = |request: &str, name: &str| schemas[request]["properties"][name].clone();
    let stop = field("ChatCompletionRequest", "stop_token_ids");
    assert_eq!(stop["items"]["maximum"], u32::MAX);
    for (request, name, most, least_text) in [
        ("CompletionRequest", "prompt", 128, Value::Null),
        ("CreateEmbeddingRequest", "input", 2048, json!(1)),
    ] {
        let shapes = field(request, name)["anyOf"].clone();
        assert_eq!(shapes[0]["minLength"], least_text, "{name}");
        assert_eq!(shapes[2]["items"]["maximum"], u32::MAX, "{name}");
        for shape in [&shapes[1], &shapes[3]] {
            assert_eq!(
                (&shape["minItems"], &shape["maxItems"]),
                (&json!(1), &json!(most)),
                "{name}"
            );
        }
    }
}
