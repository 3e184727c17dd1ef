//! Settings from the environment variables of the hub's own programs.

use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use hf_hub::Cache;
use mesh_base::files::{Readers, exposure};
use reqwest::Url;
use zeroize::Zeroizing;

use crate::error::HubError;
use crate::retry::RetryPolicy;

/// A token. It is neither shown nor logged, and wiped when it is dropped.
#[derive(Clone)]
pub struct Secret(Zeroizing<String>);

impl Secret {
    /// Wraps `text`, to keep it out of logs.
    pub fn new(text: impl Into<String>) -> Self {
        Secret(Zeroizing::new(text.into()))
    }

    /// The secret text itself.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[secret]")
    }
}

/// Settings of a hub client.
#[derive(Debug, Clone)]
pub struct Settings {
    /// URL of the hub: `HF_ENDPOINT`.
    pub endpoint: Url,
    /// The token, and its origin for messages.
    pub token: Option<(Secret, String)>,
    /// No network access: `HF_HUB_OFFLINE`.
    pub offline: bool,
    /// Cache of other programs' downloads: `HF_HUB_CACHE`, `HF_HOME`. `None` if no home folder is known.
    pub cache: Option<Cache>,
    /// Number of concurrent connections.
    pub connections: usize,
    /// Silence in the middle of an answer after which the connection is given up.
    pub stall: Duration,
    /// Limits on retries and pauses.
    pub retry: RetryPolicy,
}

/// Default URL of the hub.
const ENDPOINT: &str = "https://huggingface.co";

/// Longest token file that is read.
const MAX_TOKEN: u64 = 4096;

impl Settings {
    /// From this process's environment.
    ///
    /// # Errors
    /// If a variable makes no sense, or a token file that one names cannot be read.
    pub fn from_env() -> Result<Self, HubError> {
        Self::from_lookup(|name| std::env::var_os(name), std::env::home_dir())
    }

    /// From variables that `lookup` knows, in a home folder. Of the token, the first of these counts:
    /// `HF_TOKEN`, the file that `HF_TOKEN_FILE` or `HF_TOKEN_PATH` names, `token` in `HF_HOME` (where `hf
    /// auth login` puts it) unless `HF_HUB_DISABLE_IMPLICIT_TOKEN` is set.
    ///
    /// # Errors
    /// As [`Settings::from_env`].
    pub fn from_lookup(
        lookup: impl Fn(&str) -> Option<OsString>,
        home: Option<PathBuf>,
    ) -> Result<Self, HubError> {
        let lookup = |name: &str| lookup(name).filter(|value| !value.is_empty());
        let folder = |name: &str| lookup(name).map(PathBuf::from);
        let hf_home = folder("HF_HOME")
            .or_else(|| folder("XDG_CACHE_HOME").map(|cache| cache.join("huggingface")))
            .or_else(|| home.map(|home| home.join(".cache/huggingface")));
        let cache = folder("HF_HUB_CACHE")
            .or_else(|| folder("HUGGINGFACE_HUB_CACHE"))
            .or_else(|| hf_home.as_ref().map(|home| home.join("hub")))
            .map(Cache::new);
        // hf-hub knows where the token lies beside a cache; HF_HUB_CACHE moves the cache alone.
        let login = hf_home.map(|home| Cache::new(home.join("hub")));
        let flag = |name: &'static str| match lookup(name) {
            None => Ok(false),
            Some(value) => truth(&value).ok_or_else(|| {
                let reason = "neither 1 (or true, yes, on) nor 0 (or false, no, off)";
                bad(name, value.to_string_lossy(), reason)
            }),
        };

        let mut files = ["HF_TOKEN_FILE", "HF_TOKEN_PATH"].into_iter();
        let token = if let Some(value) = lookup("HF_TOKEN") {
            // Whatever it is, it was meant to be secret.
            let no_text = |_| bad("HF_TOKEN", "…", "no text");
            Some((value.into_string().map_err(no_text)?, "HF_TOKEN".to_owned()))
        } else if let Some((setting, path)) = files.find_map(|name| Some((name, folder(name)?))) {
            let origin = format!("{} ({setting})", path.display());
            let text = read_token(&path).map_err(|source| HubError::TokenFile {
                setting,
                path,
                source,
            })?;
            Some((text, origin))
        } else if flag("HF_HUB_DISABLE_IMPLICIT_TOKEN")? {
            None
        } else {
            // The default token file: it may be missing.
            let path = login.map(|login| login.token_path());
            path.and_then(|path| Some((read_token(&path).ok()?, path.display().to_string())))
        };
        let token = token
            .map(|(text, origin)| (text.trim().to_owned(), origin))
            .filter(|(text, _)| !text.is_empty());
        if let Some((text, origin)) = &token
            && !text.bytes().all(|byte| byte.is_ascii_graphic())
        {
            let value = format!("the contents of {origin}");
            let reason = "no token: those consist of letters, digits and underscores";
            return Err(bad("the token", value, reason));
        }
        Ok(Settings {
            endpoint: endpoint(lookup("HF_ENDPOINT"))?,
            token: token.map(|(text, origin)| (Secret::new(text), origin)),
            offline: flag("HF_HUB_OFFLINE")?,
            cache,
            connections: 4,
            stall: Duration::from_secs(30),
            retry: RetryPolicy::default(),
        })
    }

    /// Default settings for a hub at `endpoint`.
    ///
    /// # Errors
    /// If `endpoint` is not a URL.
    pub fn at(endpoint: &str) -> Result<Self, HubError> {
        let lookup = |name: &str| (name == "HF_ENDPOINT").then(|| endpoint.into());
        Self::from_lookup(lookup, None)
    }
}

fn endpoint(value: Option<OsString>) -> Result<Url, HubError> {
    let text = match &value {
        Some(value) => value.to_string_lossy(),
        None => ENDPOINT.into(),
    };
    let shown = || text.chars().take(200).collect::<String>();
    let failed = |reason| bad("HF_ENDPOINT", shown(), reason);
    let url = Url::parse(&text)
        .map_err(|_| failed("no URL; write one such as https://huggingface.co"))?;
    if !matches!(url.scheme(), "https" | "http") || url.host_str().is_none() {
        return Err(failed("no https:// or http:// address"));
    }
    if !url.username().is_empty() || url.password().is_some() {
        let reason = "a URL with a password; give the token by HF_TOKEN";
        return Err(bad("HF_ENDPOINT", "…", reason));
    }
    if url.query().is_some() || url.fragment().is_some() {
        return Err(failed("a URL with ? or #, which an endpoint has not"));
    }
    Ok(url)
}

fn bad(name: &'static str, value: impl Into<String>, reason: &'static str) -> HubError {
    let value = value.into();
    HubError::Setting {
        name,
        value,
        reason,
    }
}

fn truth(value: &OsString) -> Option<bool> {
    match value.to_str()?.to_ascii_lowercase().as_str() {
        "1" | "true" | "yes" | "on" => Some(true),
        "0" | "false" | "no" | "off" => Some(false),
        _ => None,
    }
}

fn read_token(path: &Path) -> std::io::Result<String> {
    use std::io::Read;

    let mut text = String::new();
    std::fs::File::open(path)?
        .take(MAX_TOKEN)
        .read_to_string(&mut text)?;
    if let Some(exposed) = exposure(path, Readers::Group) {
        tracing::warn!("{exposed}");
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(variables: &[(&str, &str)]) -> Result<Settings, HubError> {
        Settings::from_lookup(
            |name| {
                let found = variables.iter().find(|(known, _)| *known == name)?;
                Some(found.1.into())
            },
            None,
        )
    }

    fn token(settings: &Settings) -> Option<(&str, &str)> {
        let (secret, origin) = settings.token.as_ref()?;
        Some((secret.expose(), origin))
    }

    #[test]
    fn nothing_set_is_the_public_hub_without_a_token() {
        let settings = settings(&[]).unwrap();
        assert_eq!(settings.endpoint.as_str(), "https://huggingface.co/");
        assert!(settings.token.is_none() && !settings.offline && settings.cache.is_none());
    }

    #[test]
    fn the_token_comes_from_the_first_place_that_has_one() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("t");
        std::fs::write(&file, "hf_file\n").unwrap();
        std::fs::write(dir.path().join("token"), "hf_login").unwrap();
        let file = file.to_str().unwrap();
        let home = dir.path().to_str().unwrap();
        let all = [
            ("HF_TOKEN", "hf_env"),
            ("HF_TOKEN_FILE", file),
            ("HF_HOME", home),
        ];
        assert_eq!(
            token(&settings(&all).unwrap()),
            Some(("hf_env", "HF_TOKEN"))
        );
        assert_eq!(token(&settings(&all[1..]).unwrap()).unwrap().0, "hf_file");
        let login = settings(&all[2..]).unwrap();
        assert_eq!(token(&login).unwrap().0, "hf_login");
        assert_eq!(login.cache.unwrap().path(), &dir.path().join("hub"));
        let implicit = [("HF_HOME", home), ("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")];
        assert_eq!(token(&settings(&implicit).unwrap()), None);
    }

    #[test]
    fn a_token_file_that_is_named_must_be_there() {
        let error = settings(&[("HF_TOKEN_FILE", "/nonexistent/t")]).unwrap_err();
        let message = error.to_string();
        assert!(message.contains("/nonexistent/t") && message.contains("HF_TOKEN_FILE"));
    }

    #[test]
    fn a_token_is_not_shown() {
        let settings = settings(&[("HF_TOKEN", "hf_verysecret")]).unwrap();
        assert!(!format!("{settings:?}").contains("verysecret"));
        let error = self::settings(&[("HF_TOKEN", "hf_very secret")]).unwrap_err();
        assert!(!error.to_string().contains("very"), "{error}");
        let error =
            self::settings(&[("HF_ENDPOINT", "https://me:verysecret@hub.test")]).unwrap_err();
        assert!(!error.to_string().contains("very"), "{error}");
    }

    #[test]
    fn settings_that_make_no_sense_are_named() {
        for (name, value) in [
            ("HF_ENDPOINT", "huggingface.co"),
            ("HF_ENDPOINT", "file:///etc"),
            ("HF_ENDPOINT", "https://hub.test/?a=b"),
            ("HF_HUB_OFFLINE", "perhaps"),
        ] {
            let error = settings(&[(name, value)]).unwrap_err();
            assert!(error.to_string().contains(name), "{error}");
        }
        assert!(settings(&[("HF_HUB_OFFLINE", "ON")]).unwrap().offline);
        assert!(!settings(&[("HF_HUB_OFFLINE", "")]).unwrap().offline);
    }
}
