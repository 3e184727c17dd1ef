//! The committed document against the types.

use std::collections::BTreeSet;

use mesh_api::OPENAPI;
use mesh_api::fields::{CHAT, COMPLETIONS, EMBEDDINGS};
use serde_json::Value;

#[test]
fn the_committed_document_is_current() {
    let made = mesh_api::openapi::document();
    assert!(
        made == OPENAPI,
        "openapi.json is not current: make it with `cargo run -p mesh-api --features schema --bin openapi`"
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
    ] {
        let document: Value = serde_json::from_str(OPENAPI).unwrap();
        let properties = &document["components"]["schemas"][request]["properties"];
        for refused in table.refused() {
            let text = properties[refused.name]["description"].as_str().unwrap();
            let told = text.contains(refused.remedy) || text == "Has no effect.";
            assert!(told, "{request}.{}: {text}", refused.name);
        }
        for name in table.harmless {
            assert_eq!(
                properties[*name]["description"], "Has no effect.",
                "{request}.{name}"
            );
        }
    }
}
