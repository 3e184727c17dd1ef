//! `hydramesh models pins`: the fingerprints that models' names stand for in the mesh, by the head's admin
//! API.

use serde_json::{Value, json};

use crate::admin::Admin;
use crate::args::{HeadArgs, PinsCommand};
use crate::failure::Failure;
use crate::output::table;

pub(super) async fn run(
    head: &HeadArgs,
    command: PinsCommand,
    as_json: bool,
) -> Result<(), Failure> {
    let admin = Admin::new(head)?;
    let (answer, shown) = match command {
        PinsCommand::List => {
            let answer = admin.get("/v1/mesh/pins").await?;
            let shown = show(&answer);
            (answer, shown)
        }
        PinsCommand::Set { name, fingerprint } => {
            let body = json!({ "name": name, "fingerprint": fingerprint.to_lowercase() });
            let answer = admin.post("/v1/mesh/pins", &body).await?;
            let shown = format!("{name} means {fingerprint} in this mesh, whoever claims it.\n");
            (answer, shown)
        }
        PinsCommand::Release { name } => {
            let body = json!({ "name": name });
            let answer = admin.post("/v1/mesh/pins", &body).await?;
            let shown = format!("{name} will mean what is got under it next.\n");
            (answer, shown)
        }
    };
    match as_json {
        true => println!("{answer}"),
        false => print!("{shown}"),
    }
    Ok(())
}

fn show(answer: &Value) -> String {
    let plain = |value: &Value| {
        let text = value.as_str().unwrap_or("-");
        text.replace(char::is_control, " ")
    };
    let pins = answer["pins"].as_array().map(Vec::as_slice);
    let rows = pins.unwrap_or_default().iter().map(|pin| {
        let by = match pin["operator"].as_bool() {
            Some(true) => "an operator".to_owned(),
            _ => format!("first from {}", plain(&pin["worker"])),
        };
        vec![plain(&pin["name"]), plain(&pin["fingerprint"]), by]
    });
    let rows: Vec<Vec<String>> = rows.collect();
    let mut text = match rows.is_empty() {
        true => "No name of a model is pinned yet.\n".to_owned(),
        false => table(&["NAME", "FINGERPRINT", "PINNED BY"], &rows),
    };
    for conflict in answer["name_conflicts"].as_array().into_iter().flatten() {
        let served = conflict["served"] == true;
        text += &format!(
            "warning: {} is {} for",
            plain(&conflict["name"]),
            if served { "served" } else { "claimed" }
        );
        let claims = conflict["claims"].as_object().into_iter().flatten();
        for (fingerprint, workers) in claims {
            let workers = workers.as_array().into_iter().flatten();
            let workers: Vec<String> = workers.map(plain).collect();
            text += &format!(" {:.12} by {};", fingerprint, workers.join(", "));
        }
        text.pop();
        if served {
            text += " (fingerprints of files, which cannot be pinned; stop one of them, or give its model another name)";
        }
        text += "\n";
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pins_and_conflicts_are_shown_without_control_characters() {
        let a = "a".repeat(64);
        let answer = json!({
            "pins": [
                {"name": "org/m", "fingerprint": a, "worker": "pi\u{1b}", "operator": false},
                {"name": "m", "fingerprint": a, "worker": "", "operator": true},
            ],
            "name_conflicts": [{"name": "m", "claims": {"aaaaaaaaaaaaaaaa": ["x", "y"], "bbbbbbbbbbbbbbbb": ["z"]}},
                {"name": "n", "served": true, "claims": {"cccccccccccccccc": ["x"], "dddddddddddddddd": ["z"]}}],
        });
        let text = show(&answer);
        for part in [
            "first from pi\n",
            "an operator",
            "warning: m is claimed for aaaaaaaaaaaa by x, y; bbbbbbbbbbbb by z\n",
            "warning: n is served for cccccccccccc by x; dddddddddddd by z (fingerprints of files, which cannot be pinned",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert!(show(&json!({})).contains("No name"));
    }
}
