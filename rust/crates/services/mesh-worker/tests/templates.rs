//! Chat templates that take too much, run as workers run them: in processes of their own.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use mesh_model::chat::{ChatTemplate, Message, RenderRequest};
use mesh_model::safetensors::Dtype;
use mesh_model::{Architecture, GgmlType, Model, synth};
use mesh_worker::templates::{TemplateError, Templates};

fn apart() -> Templates {
    Templates::apart(PathBuf::from(env!("CARGO_BIN_EXE_mesh-worker")))
}

fn template(source: &str) -> ChatTemplate {
    ChatTemplate::new(source, "<s>", "</s>").unwrap()
}

fn conversation(messages: Vec<Message>) -> RenderRequest {
    RenderRequest {
        messages,
        ..RenderRequest::default()
    }
}

fn hello() -> RenderRequest {
    conversation(vec![Message::new("user", "Wie geht's? Grüße 🦆")])
}

const PLAIN: &str = "{{ bos_token }}{% for message in messages %}{% if message.role == 'system' %}\
    {{ raise_exception('no system here') }}{% endif %}{{ message.role }}: {{ message.content }}{{ eos_token }}{% endfor %}";

#[tokio::test]
async fn a_template_gives_the_same_prompt_and_the_same_refusal_as_in_this_process() {
    let (apart, here, template) = (apart(), Templates::here(), template(PLAIN));
    for messages in [
        hello(),
        conversation(vec![Message::new("user", "x".repeat(1 << 20))]),
        conversation(Vec::new()),
    ] {
        let prompt = apart.render(&template, messages.clone()).await.unwrap();
        assert_eq!(prompt, here.render(&template, messages).await.unwrap());
    }
    let system = || conversation(vec![Message::new("system", "be brief")]);
    let refused = apart.render(&template, system()).await.unwrap_err();
    assert_eq!(
        refused.to_string(),
        here.render(&template, system())
            .await
            .unwrap_err()
            .to_string()
    );
    assert!(refused.to_string().contains("no system here"), "{refused}");
}

#[tokio::test]
async fn a_template_that_wants_ever_more_memory_is_stopped_and_the_next_one_is_not() {
    let templates = apart();
    let good = template(PLAIN);
    let texts = "{% set n = namespace(x='abc') %}{% for i in range(60) %}{% set n.x = ";
    for grown in [
        "n.x ~ n.x",
        "n.x + n.x",
        "n.x | replace('b', n.x)",
        "n.x.replace('b', n.x)",
    ] {
        let before = mesh_service::metrics::resident_bytes().unwrap();
        let begun = Instant::now();
        let source = format!("{texts}{grown} %}}{{% endfor %}}{{{{ n.x | length }}}}");
        let error = templates
            .render(&template(&source), hello())
            .await
            .unwrap_err();
        assert!(
            matches!(error, TemplateError::TooLarge),
            "{grown}: {error:?}"
        );
        assert!(begun.elapsed() < Duration::from_secs(10), "{grown}");
        let after = mesh_service::metrics::resident_bytes().unwrap();
        assert!(after.saturating_sub(before) < 64 << 20, "{grown}");
        templates.render(&good, hello()).await.unwrap();
    }
    // Captured text is not output and has no limit of its own; lists in lists are written by a function that
    // calls itself.
    for source in [
        "{% set n = namespace(x='abc') %}{% for i in range(60) %}{% set y %}{{ n.x }}{{ n.x }}{% endset %}{% set n.x = y %}\
         {% endfor %}{{ n.x | length }}",
        "{% set n = namespace(x=[]) %}{% for i in range(90000) %}{% set n.x = [n.x] %}{% endfor %}{{ n.x }}",
    ] {
        let error = templates.render(&template(source), hello()).await;
        assert!(matches!(error, Err(TemplateError::TooLarge)), "{error:?}");
    }
}

#[tokio::test]
async fn a_template_whose_steps_take_long_is_stopped() {
    let templates = apart();
    let source = "{% set x = 'ab' * 4000000 %}{% for i in range(90000) %}{% set y = x | replace('c', 'd') %}{% endfor %}";
    let begun = Instant::now();
    let error = templates
        .render(&template(source), hello())
        .await
        .unwrap_err();
    assert!(matches!(error, TemplateError::TooSlow), "{error:?}");
    assert!(begun.elapsed() < Duration::from_secs(15));
    templates.render(&template(PLAIN), hello()).await.unwrap();
}

#[tokio::test]
async fn a_program_that_is_missing_is_named() {
    let templates = Templates::apart(PathBuf::from("/nonexistent/mesh-worker"));
    let error = templates
        .render(&template(PLAIN), hello())
        .await
        .unwrap_err();
    assert!(error.is_internal());
    assert!(
        error.to_string().contains("/nonexistent/mesh-worker"),
        "{error}"
    );
}

/// A template from a file is not parsed in this process, where its use of memory and time is not limited.
#[tokio::test]
async fn a_template_of_a_file_that_cannot_be_parsed_ends_no_process_but_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let gguf = dir.path().join("tiny.gguf");
    let shape = synth::Shape::tiny(Architecture::Llama);
    let bytes = synth::random_model_bytes(&shape, GgmlType::Q4_0, synth::Tokens::Bytes);
    std::fs::write(&gguf, bytes).unwrap();
    let folder = dir.path().join("folder");
    synth::write_folder(&Model::open(&gguf).unwrap(), Dtype::F32, 1, &folder).unwrap();
    let templates = apart();
    for (source, why) in [
        (format!("{{{{ {}1 }}}}", "-".repeat(6_000)), "operators"),
        (format!("{{{{ {}x }}}}", "not ".repeat(20_000)), "operators"),
        ("{% if %}".to_owned(), "unexpected end of block"),
        ("{{ 'x' * 9999999 }}".repeat(10_000), "stopped"),
    ] {
        std::fs::write(folder.join("chat_template.jinja"), &source).unwrap();
        let model = Model::open(&folder).unwrap();
        let error = templates
            .render(model.template(), hello())
            .await
            .unwrap_err();
        let invalid = matches!(error, TemplateError::Invalid(_));
        assert_eq!(invalid, why != "stopped", "{error}");
        assert!(error.to_string().contains(why), "{why}: {error}");
    }
    templates.render(&template(PLAIN), hello()).await.unwrap();
}
