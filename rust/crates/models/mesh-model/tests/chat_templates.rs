//! Public chat templates against `transformers`, which rendered the same conversations
//! (scripts/fetch_templates.py).

use std::collections::BTreeMap;

use mesh_model::chat::{ChatError, ChatTemplate, RenderRequest};
use mesh_testkit::paths::fetched;
use serde::Deserialize;

#[derive(Deserialize)]
struct Golden {
    template: String,
    /// The template's text, if it is not a file.
    source: Option<String>,
    request: Option<RenderRequest>,
    text: Option<String>,
    error: Option<String>,
}

#[test]
fn public_templates_render_as_in_transformers() {
    let golden = fetched("chat-templates/golden.json").unwrap();
    let folder = golden.parent().unwrap();
    let golden = std::fs::read(&golden).unwrap();
    let golden: Vec<Golden> = serde_json::from_slice(&golden).unwrap();
    let mut templates: BTreeMap<&str, Result<ChatTemplate, ChatError>> = BTreeMap::new();
    let mut wrong: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    let mut compared = 0;
    for one in &golden {
        let template = templates.entry(&one.template).or_insert_with(|| {
            let source = match &one.source {
                Some(source) => source.clone(),
                None => std::fs::read_to_string(folder.join(&one.template)).unwrap(),
            };
            let template = ChatTemplate::new(&source, "<s>", "</s>");
            // The clock of those who wrote the golden file.
            template.map(|template| template.at(1_709_211_909))
        });
        let Some(request) = &one.request else {
            continue;
        };
        compared += 1;
        let ours = match template {
            Ok(template) => template.write(request).map(|rendered| rendered.text),
            Err(error) => {
                wrong
                    .entry(&one.template)
                    .or_default()
                    .push(error.to_string());
                continue;
            }
        };
        let same = match (&ours, &one.text) {
            (Ok(ours), Some(theirs)) => ours == theirs,
            (Err(_), None) => true,
            // Some templates fail without tools; writing such a prompt anyway does no harm.
            (Ok(_), None) => !one
                .error
                .as_ref()
                .is_some_and(|e| e.starts_with("TemplateError")),
            _ => false,
        };
        if !same {
            let theirs = one.text.as_ref().or(one.error.as_ref());
            let text = format!("{request:?}\n  ours   {ours:?}\n  theirs {theirs:?}");
            wrong.entry(&one.template).or_default().push(text);
        }
    }
    for (template, cases) in &wrong {
        eprintln!("{template}: {} differ, such as {}", cases.len(), cases[0]);
    }
    assert!(compared > 5_000, "{compared}");
    assert!(
        wrong.is_empty(),
        "{} of {} templates render otherwise",
        wrong.len(),
        templates.len()
    );
}
