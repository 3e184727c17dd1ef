//! Model files with malicious chat templates, planted in a folder that a worker watches.

use std::fs;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use mesh_base::files;
use serde_json::json;

use super::{Tally, exchange};
use crate::targets::Targets;

/// Plants one file after the other, and asks for their models.
pub(super) async fn templates(targets: Arc<Targets>, tally: Tally) {
    let templates = [
        ("planted-minus", format!("{{{{ {}1 }}}}", "-".repeat(6_000))),
        (
            "planted-not",
            format!("{{{{ {}1 }}}}", "not ".repeat(20_000)),
        ),
        ("planted-loop", LOOP.to_owned()),
    ];
    for (name, template) in &templates {
        let planted = {
            let (targets, name, template) = (targets.clone(), *name, template.clone());
            tokio::task::spawn_blocking(move || plant(&targets, name, &template)).await
        };
        tally.count(match planted {
            Ok(Ok(())) => "planted".to_owned(),
            Ok(Err(error)) => format!("{error:#}"),
            Err(error) => error.to_string(),
        });
        tokio::time::sleep(Duration::from_secs(3)).await;
    }
    for round in 0.. {
        let (name, _) = &templates[round % templates.len()];
        let body = json!({
            "model": name, "max_tokens": 4, "messages": [{"role": "user", "content": "hi"}],
        });
        let outcome = exchange(
            &targets,
            "/v1/chat/completions",
            body.to_string().as_bytes(),
        )
        .await;
        tally.count(outcome);
        tokio::time::sleep(Duration::from_secs(2)).await;
    }
}

/// The model's file with another template, which appears whole.
fn plant(targets: &Targets, name: &str, template: &str) -> Result<()> {
    let mut bytes =
        fs::read(&targets.model_file).with_context(|| targets.model_file.display().to_string())?;
    replace_template(&mut bytes, template)?;
    let path = targets.models_dir.join(format!("{name}.gguf"));
    files::replace(&path, &bytes, files::PUBLIC).with_context(|| path.display().to_string())
}

/// Writes another chat template into a GGUF file. The data behind the header keeps its offset modulo 32, so
/// that offsets of tensors stay right.
fn replace_template(file: &mut Vec<u8>, template: &str) -> Result<()> {
    const KEY: &[u8] = b"tokenizer.chat_template";
    const STRING: u32 = 8;
    let at = file
        .windows(KEY.len() + 4)
        .position(|window| window.starts_with(KEY) && window.ends_with(&STRING.to_le_bytes()))
        .context("no chat template in the file")?;
    let length_at = at + KEY.len() + 4;
    let length = file
        .get(length_at..length_at + 8)
        .and_then(|bytes| bytes.try_into().ok())
        .map(u64::from_le_bytes)
        .context("the file ends in its template")?;
    let length = usize::try_from(length)?;
    let padding = (32 + length % 32 - template.len() % 32) % 32;
    let template = format!("{template}{}", " ".repeat(padding));
    let mut value = (template.len() as u64).to_le_bytes().to_vec();
    value.extend(template.as_bytes());
    file.splice(length_at..length_at + 8 + length, value);
    Ok(())
}

/// Two loops of 100,000 rounds, one in the other.
const LOOP: &str =
    "{% for a in range(100000) %}{% for b in range(100000) %}{{ a * b }}{% endfor %}{% endfor %}";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_template_is_replaced_and_nothing_behind_it_moves_within_its_block() {
        let mut file = b"GGUF....tokenizer.chat_template".to_vec();
        file.extend(8u32.to_le_bytes());
        file.extend(5u64.to_le_bytes());
        file.extend(b"short|behind");
        let before = file.len();
        replace_template(&mut file, &"-".repeat(100)).expect("replaced");
        assert_eq!((file.len() - before) % 32, 0);
        assert!(file.ends_with(b" |behind"));
    }
}
