//! Public chat templates against `transformers`, which rendered the same conversations (scripts/fetch_templates.py).

use std::collections::BTreeMap;

use mesh_model::chat::{ChatTemplate, RenderRequest};
use mesh_testkit::paths::fetched;
use serde::Deserialize;

#[derive(Deserialize)]
struct Golden {
    template: String,
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
    let mut templates: BTreeMap<&str, ChatTemplate> = BTreeMap::new();
    let mut wrong: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    let mut compared = 0;
    for one in &golden {
        let template = templates.entry(&one.template).or_insert_with(|| {
            let source = std::fs::read_to_string(folder.join(&one.template)).unwrap();
            // The clock of those who wrote the golden file.
            let template = ChatTemplate::new(&source, "<s>", "</s>");
            template.map_or_else(
                |error| panic!("{}: {error}", one.template),
                |template| template.at(1_709_211_909),
            )
        });
        let Some(request) = &one.request else {
            continue;
        };
        compared += 1;
        let ours = template.write(request).map(|rendered| rendered.text);
        let same = match (&ours, &one.text) {
            (Ok(ours), Some(theirs)) => ours == theirs,
            (Err(_), None) => true,
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
