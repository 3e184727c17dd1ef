//! `hydramesh models pins`: the fingerprints that models' names stand for in the mesh, by the head's admin
//! API.

use mesh_api::{PinDecision, PinList, paths};
use serde_json::Value;

use crate::admin::{Admin, print};
use crate::args::{HeadArgs, PinsCommand};
use crate::failure::Failure;
use crate::output::table;

pub(super) async fn run(
    head: &HeadArgs,
    command: PinsCommand,
    as_json: bool,
) -> Result<(), Failure> {
    let admin = Admin::new(head)?;
    let decide = async |name: &str, fingerprint: Option<String>| -> Result<Value, Failure> {
        let name = name.to_owned();
        let decision = PinDecision { name, fingerprint };
        admin.post(paths::PINS, &decision).await
    };
    match command {
        PinsCommand::List => {
            let answer = admin.get(paths::PINS).await?;
            print(&answer, as_json, |list| show(&list))
        }
        PinsCommand::Set { name, fingerprint } => {
            let answer = decide(&name, Some(fingerprint.to_lowercase())).await?;
            print(&answer, as_json, |_: Value| {
                format!("{name} means {fingerprint} in this mesh, whoever claims it.\n")
            })
        }
        PinsCommand::Release { name } => {
            let answer = decide(&name, None).await?;
            print(&answer, as_json, |_: Value| {
                format!("{name} will mean what is got under it next.\n")
            })
        }
    }
}

fn show(list: &PinList) -> String {
    let plain = |text: &str| text.replace(char::is_control, " ");
    let rows = list.pins.iter().map(|pin| {
        let by = match pin.operator {
            true => "an operator".to_owned(),
            false => format!("first from {}", plain(&pin.worker)),
        };
        vec![plain(&pin.name), plain(&pin.fingerprint), by]
    });
    let rows: Vec<Vec<String>> = rows.collect();
    let mut text = match rows.is_empty() {
        true => "No name of a model is pinned yet.\n".to_owned(),
        false => table(&["NAME", "FINGERPRINT", "PINNED BY"], &rows),
    };
    for conflict in &list.name_conflicts {
        let name = plain(&conflict.name);
        let how = if conflict.served { "served" } else { "claimed" };
        text += &format!("warning: {name} is {how} for");
        for (fingerprint, workers) in &conflict.claims {
            let workers: Vec<String> = workers.iter().map(|worker| plain(worker)).collect();
            text += &format!(" {:.12} by {};", fingerprint, workers.join(", "));
        }
        text.pop();
        if conflict.served {
            text += " (fingerprints of files, which cannot be pinned; stop one of them, or give its model another name)";
        }
        text += "\n";
    }
    text
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::admin::read;

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
        let text = show(&read(&answer).unwrap());
        for part in [
            "first from pi\n",
            "an operator",
            "warning: m is claimed for aaaaaaaaaaaa by x, y; bbbbbbbbbbbb by z\n",
            "warning: n is served for cccccccccccc by x; dddddddddddd by z (fingerprints of files, which cannot be pinned",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert!(show(&PinList::default()).contains("No name"));
    }
}
