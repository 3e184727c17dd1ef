//! The rights of a caller: those of a curtain token, of an API key's entry, or the usual ones.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use mesh_api::Code;
use mesh_base::clock::unix_seconds;
use mesh_curtain::{Grant, Need, Right, RightError, Rights, Tier, TierError, TokenId};

use super::error::ApiError;
use crate::audit::Holder;
use crate::refusals::Refused;
use crate::sanctum::Limits;

/// What a caller may do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Papers {
    kind: Kind,
    /// For records.
    id: Option<Arc<str>>,
    pub(crate) tenant: Option<String>,
    pub(crate) tier: Tier,
    pub(crate) rights: Rights,
    /// Seconds since the Unix epoch.
    expires: Option<u64>,
    /// The issued token that the one shown follows from, or is.
    issued: Option<TokenId>,
}

/// The part of an API key's line behind the key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) tenant: Option<String>,
    pub(crate) tier: Tier,
    pub(crate) rights: Rights,
    pub(crate) expires: Option<u64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Nothing,
    AdminKey,
    /// An API key without rights of its own, as earlier versions know them.
    PlainKey,
    Key,
    Token,
}

impl Papers {
    /// Those of a caller without a key, where none is needed.
    pub(crate) fn nothing() -> Self {
        Self {
            kind: Kind::Nothing,
            id: None,
            tenant: None,
            tier: Tier::GrimoirePublic,
            rights: Rights::of_clients(),
            expires: None,
            issued: None,
        }
    }

    pub(crate) fn of_admin() -> Self {
        Self {
            kind: Kind::AdminKey,
            id: Some("admin".into()),
            tier: Tier::Master,
            rights: Rights::all(),
            ..Self::nothing()
        }
    }

    pub(crate) fn of_key(id: &str, entry: Option<&Entry>) -> Self {
        let plain = Self {
            kind: Kind::PlainKey,
            id: Some(id.into()),
            ..Self::nothing()
        };
        let Some(entry) = entry else { return plain };
        Self {
            kind: Kind::Key,
            tenant: entry.tenant.clone(),
            tier: entry.tier,
            rights: entry.rights.clone(),
            expires: entry.expires,
            ..plain
        }
    }

    pub(crate) fn of_token(grant: Grant) -> Self {
        Self {
            kind: Kind::Token,
            id: Some(grant.id().to_string().into()),
            issued: Some(grant.issued_id()),
            tenant: Some(grant.tenant),
            tier: grant.tier,
            rights: grant.rights,
            expires: Some(grant.expires),
        }
    }

    /// Admits what the rights allow.
    ///
    /// # Errors
    /// The error names the right that is missing.
    pub(crate) fn require(&self, need: Need<'_>) -> Result<(), ApiError> {
        if self.rights.serve(need) {
            return Ok(());
        }
        let id = self.id.as_deref().unwrap_or_default();
        let own = match self.kind {
            // As earlier versions say it.
            Kind::Nothing | Kind::PlainKey | Kind::AdminKey => {
                let text = "this needs the admin key, which stands in admin.key in the head's state directory, or a token with \
                            the right admin";
                return Err(ApiError::new(Code::InvalidApiKey, text));
            }
            Kind::Key => format!("the API key {id}"),
            Kind::Token => format!("the token {id}"),
        };
        let text = format!(
            "this needs the right {need}, and {own} has {}; ask the head's operator for a token with it",
            self.rights
        );
        Err(ApiError::new(Code::MissingRight, text))
    }

    /// The refusal of a request beyond these rights, for the audit trail; `None` for callers without a key.
    pub(crate) fn too_narrow(&self, door: &'static str) -> Option<Refused> {
        let reason = "missing right";
        let id = self.id.as_deref()?.to_owned();
        Some(Refused { door, reason, id })
    }

    /// Time until they end; `None` if they do not.
    pub(crate) fn time_left(&self, now: SystemTime) -> Option<Duration> {
        let left = self.expires?.saturating_sub(unix_seconds(now));
        Some(Duration::from_secs(left))
    }

    /// True if every model is open to it.
    pub(crate) fn is_for_all_models(&self) -> bool {
        self.rights.contains(&Right::Infer("*".to_owned()))
    }

    /// The name under which requests are recorded.
    pub(crate) fn holder(&self) -> Option<Holder> {
        let id = self.id.clone()?;
        Some(Holder {
            id,
            tier: self.tier,
        })
    }

    /// The limits of tokens that are asked for with these.
    pub(crate) fn limits(&self) -> Limits {
        match self.kind {
            Kind::AdminKey => Limits::none(),
            _ => Limits {
                parent: self.issued,
                tenant: self.tenant.clone(),
                tier: self.tier,
                rights: self.rights.clone(),
                expires: self.expires,
            },
        }
    }
}

impl Entry {
    /// Reads a line of the file of API keys: the key, and its entry if there is one. Without words of the form `name=value`
    /// the whole line is the key, as in earlier versions.
    ///
    /// # Errors
    /// What is wrong with the entry; the key is not in it.
    pub(crate) fn read(line: &str) -> Result<(&str, Option<Self>), String> {
        let Some((key, rest)) = line.split_once(char::is_whitespace) else {
            return Ok((line, None));
        };
        let words: Vec<&str> = rest.split_whitespace().collect();
        if !words.iter().any(|word| word.contains('=')) {
            return Ok((line, None));
        }
        let mut entry = Self {
            tenant: None,
            tier: Tier::default(),
            rights: Rights::of_clients(),
            expires: None,
        };
        for word in words {
            let (name, value) = word.split_once('=').unwrap_or((word, ""));
            match name {
                "tenant" => entry.tenant = Some(value.to_owned()),
                "tier" => {
                    entry.tier = value
                        .parse()
                        .map_err(|error: TierError| error.to_string())?
                }
                "rights" => {
                    entry.rights = value
                        .parse()
                        .map_err(|error: RightError| error.to_string())?
                }
                "expires" => entry.expires = Some(read_date(value)?),
                _ => {
                    return Err(format!(
                        "unknown setting {name:?} behind a key: use tenant=, tier=, rights= and expires="
                    ));
                }
            }
        }
        if entry.rights.contains(&Right::Admin) && entry.tier < Tier::Master {
            return Err("the right admin needs tier=master".to_owned());
        }
        Ok((key, Some(entry)))
    }
}

/// `2027-01-31`: the key is good until this day begins, in UTC.
fn read_date(text: &str) -> Result<u64, String> {
    let seconds = mesh_base::clock::seconds_of_day(text);
    seconds.ok_or_else(|| format!("invalid date in expires={text}: use YYYY-MM-DD"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_a_key_with_or_without_an_entry() {
        assert_eq!(Entry::read("sk-one"), Ok(("sk-one", None)));
        // Earlier versions take a line with blanks for a key.
        assert_eq!(Entry::read("correct horse"), Ok(("correct horse", None)));
        let line = "sk-two tenant=lab  tier=goodlife rights=infer:Qwen*,embed expires=2027-01-31";
        let (key, entry) = Entry::read(line).unwrap();
        let entry = entry.unwrap();
        assert_eq!(
            (key, entry.tenant.as_deref(), entry.tier),
            ("sk-two", Some("lab"), Tier::Goodlife)
        );
        assert_eq!(entry.rights.to_string(), "infer:Qwen*,embed");
        assert_eq!(entry.expires, Some(1_801_353_600));
        let (_, entry) = Entry::read("sk tenant=lab").unwrap();
        assert_eq!(entry.unwrap().rights, Rights::of_clients());
        for (line, part) in [
            ("sk-x tennant=lab", "tennant"),
            ("sk-x tier=gold", "gold"),
            ("sk-x rights=", "unknown right"),
            ("sk-x rights=admin", "tier=master"),
            ("sk-x expires=tomorrow", "YYYY-MM-DD"),
            ("sk-x tenant=lab more", "more"),
        ] {
            let error = Entry::read(line).unwrap_err();
            assert!(error.contains(part) && !error.contains("sk-x"), "{error}");
        }
    }

    #[test]
    fn a_missing_right_is_named_and_plain_keys_hear_what_they_always_heard() {
        let (_, entry) = Entry::read("sk rights=embed").unwrap();
        let papers = Papers::of_key("ab12", entry.as_ref());
        papers.require(Need::Embed).unwrap();
        let error = papers.require(Need::Infer("tiny")).unwrap_err();
        assert_eq!(
            (error.status.as_u16(), error.code.as_str()),
            (403, "missing_right")
        );
        assert!(
            error
                .message
                .contains("the right infer:tiny, and the API key ab12 has embed"),
            "{}",
            error.message
        );
        for papers in [Papers::nothing(), Papers::of_key("ab12", None)] {
            papers.require(Need::Infer("tiny")).unwrap();
            let error = papers.require(Need::Admin).unwrap_err();
            assert_eq!(
                (error.status.as_u16(), error.code.as_str()),
                (401, "invalid_api_key")
            );
        }
        Papers::of_admin().require(Need::Admin).unwrap();
    }
}
