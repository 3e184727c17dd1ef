//! `hydramesh keys`: curtain tokens and API keys, from the head's admin API.

use std::path::Path;

use data_encoding::BASE64;
use mesh_api::{CreateKeyRequest, Key, KeyCreated, KeyList, KeyRequest, paths};
use mesh_base::clock::utc_of;
use mesh_identity::PublicKey;
use serde_json::Value;

use crate::admin::{Admin, print, read};
use crate::args::{HeadArgs, KeysCommand};
use crate::failure::{Exit, Failure};
use crate::nodes::date;
use crate::output::{plain, table};

pub(crate) async fn run(head: &HeadArgs, command: KeysCommand) -> Result<(), Failure> {
    let admin = Admin::new(head)?;
    match command {
        KeysCommand::Create {
            tenant,
            tier,
            rights,
            expires,
            subject,
            note,
            holder_key,
            json,
        } => {
            let holder = holder_key.as_deref().map(public_key).transpose()?;
            let request = CreateKeyRequest {
                tenant,
                tier: tier.map(|tier| tier.to_string()),
                subject,
                rights: rights.iter().map(ToString::to_string).collect(),
                ttl_seconds: expires.map(|time| time.as_secs().max(1)),
                holder_key: holder.map(|key| BASE64.encode(key.as_bytes())),
                note,
            };
            let answer = admin.post(paths::KEYS, &request).await?;
            print(&answer, json, |created: KeyCreated| created.token + "\n")
        }
        KeysCommand::List { all, json } => {
            let answer = admin.get(paths::KEYS).await?;
            print(&answer, json, |list: KeyList| listed(&list.keys, all))
        }
        KeysCommand::Show { id, json } => {
            let answer: Value = admin.get(paths::KEYS).await?;
            let list: KeyList = read(&answer)?;
            let found = find(&list.keys, &id)?;
            // With all fields that the head gave, also those that this version does not know.
            let keys = answer["keys"].as_array().into_iter().flatten();
            let mut raw = keys.filter(|one| one["id"] == *found.id);
            let raw = raw.next().cloned().unwrap_or_default();
            print(&raw, json, |key: Key| shown(&key))
        }
        KeysCommand::Revoke { id, json } => {
            let request = KeyRequest { id: id.clone() };
            let answer = admin.post(paths::REVOKE_KEY, &request).await?;
            let shown = |_: Value| {
                format!(
                    "The token {} is revoked, and all that follow from it.\n",
                    plain(&id)
                )
            };
            print(&answer, json, shown)
        }
    }
}

/// The public key in a file, base64.
pub(crate) fn public_key(path: &Path) -> Result<PublicKey, Failure> {
    let shown = path.display();
    let text = std::fs::read_to_string(path);
    let text = text.map_err(|error| Failure::usage(format!("public key {shown}: {error}")))?;
    let bytes = BASE64.decode(text.trim().as_bytes()).ok();
    let key = bytes.and_then(|bytes| PublicKey::from_bytes(&bytes).ok());
    key.ok_or_else(|| {
        Failure::usage(format!("{shown} holds no ML-DSA-65 public key in base64"))
            .hint("hydramesh token holder-key --key FILE makes a key and prints its public half.")
    })
}

fn listed(keys: &[Key], all: bool) -> String {
    let rows: Vec<Vec<String>> = keys
        .iter()
        .filter(|key| all || key.state == "open")
        .map(|key| {
            vec![
                plain(&key.id),
                plain(&key.kind),
                plain(&key.state),
                plain(key.tenant.as_deref().unwrap_or("-")),
                plain(&key.tier),
                plain(&key.rights.join(",")),
                date(key.expires_at),
                plain(&key.note),
            ]
        })
        .collect();
    if rows.is_empty() {
        return "No curtain token or API key is good now. `hydramesh keys create` issues a token.\n".to_owned();
    }
    let headings = [
        "ID", "KIND", "STATE", "TENANT", "TIER", "RIGHTS", "EXPIRES", "NOTE",
    ];
    table(&headings, &rows)
}

fn find<'a>(keys: &'a [Key], wanted: &str) -> Result<&'a Key, Failure> {
    let begins = |key: &&Key| {
        key.id == wanted || (wanted.len() >= SHORTEST_ID && key.id.starts_with(wanted))
    };
    let found: Vec<&Key> = keys.iter().filter(begins).collect();
    match found[..] {
        [key] => Ok(key),
        [] => Err(Failure::new(
            Exit::NoWorker,
            format!(
                "no curtain token or API key has the id {wanted:?}; `hydramesh keys list --all` shows them"
            ),
        )),
        _ => Err(Failure::failed(format!(
            "several ids begin with {wanted:?}: give more digits"
        ))),
    }
}

fn shown(key: &Key) -> String {
    let day = |time: Option<u64>| time.map(utc_of);
    let some = |text: &str| Some(plain(text)).filter(|text| !text.is_empty());
    let rows = [
        ("id", some(&key.id)),
        ("kind", some(&key.kind)),
        ("state", some(&key.state)),
        ("tenant", key.tenant.as_deref().and_then(some)),
        ("tier", some(&key.tier)),
        ("rights", some(&key.rights.join(", "))),
        ("subject", some(&key.subject)),
        ("note", some(&key.note)),
        ("issued", day(key.created_at)),
        ("expires", day(key.expires_at)),
        ("revoked", day(key.revoked_at)),
        ("asked for with", key.parent.as_deref().and_then(some)),
        ("holder key", key.holder.as_deref().and_then(some)),
    ];
    lines(rows)
}

/// A line for each value that is there.
pub(crate) fn lines<const N: usize>(rows: [(&str, Option<String>); N]) -> String {
    let line = |(name, value): (&str, Option<String>)| Some(format!("{name:<16}{}\n", value?));
    rows.into_iter().filter_map(line).collect()
}

const SHORTEST_ID: usize = 8;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_that_are_good_are_listed_and_one_is_found_by_its_first_digits() {
        let key = |id: &str, state: &'static str| Key {
            id: id.to_owned(),
            kind: "token".into(),
            state: state.into(),
            tenant: Some("lab".to_owned()),
            tier: "goodlife".to_owned(),
            rights: vec!["infer:Qwen*".to_owned(), "embed".to_owned()],
            expires_at: Some(1_795_910_400),
            ..Key::default()
        };
        let keys = [key("aa11aa11aa11", "open"), key("bb22bb22bb22", "revoked")];
        let open = listed(&keys, false);
        for part in [
            "aa11aa11aa11",
            "infer:Qwen*,embed",
            "lab",
            "goodlife",
            "2026-11-29",
        ] {
            assert!(open.contains(part), "{part} is not in\n{open}");
        }
        assert!(!open.contains("bb22") && listed(&keys, true).contains("revoked"));
        assert!(listed(&[], true).contains("keys create"));
        assert_eq!(find(&keys, "bb22bb22").unwrap().state, "revoked");
        assert!(find(&keys, "bb22").is_err());
        let one = shown(&keys[0]);
        assert!(
            one.contains("tenant          lab\n") && !one.contains("subject"),
            "{one}"
        );
    }
}
