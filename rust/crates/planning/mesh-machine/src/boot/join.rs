//! Settings for joining a mesh: typed at the console, on the kernel command line, or on a partition.
//!
//! All three know the same keys: `head`, `token`, `role`, `backend`, `ssh_key`, `name`, `keymap`. Typed
//! settings win over the command line, and that over the partition, key by key. A source with a mistake is
//! ignored as a whole, since half of a person's settings can be worse than none; the mistake is reported, and
//! the other sources still count.

use std::fmt;
use std::path::Path;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use super::choice::{Backend, Wish};
use crate::files::{ReadError, read_text};

/// Prefix of our keys on the kernel command line.
pub const PREFIX: &str = "hydramesh.";
/// Name of the settings file on the partition.
pub const SETTINGS_FILE: &str = "hydramesh.toml";
/// Name of a file on the partition that holds only the token.
pub const TOKEN_FILE: &str = "join-token";
/// The head's port for workers, where an address names none.
pub const HEAD_PORT: u16 = 7780;

/// Settings from one source; `None` where it does not contain the key.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Settings {
    /// Address of the head.
    pub head: Option<HeadAddress>,
    /// The secret that admits this machine.
    pub token: Option<Token>,
    /// Role of this machine.
    pub role: Option<Role>,
    /// The backend; the inner `None` is `auto`.
    pub backend: Option<Option<Backend>>,
    /// Public key that may log in over ssh: one line of an authorized_keys file.
    pub ssh_key: Option<String>,
    /// Name of this node.
    pub name: Option<String>,
    /// Keyboard layout of the consoles, as `loadkeys` names it.
    pub keymap: Option<String>,
}

/// Role of a machine in a mesh.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Role {
    /// Computes answers.
    #[default]
    Worker,
    /// Manages workers and routes requests.
    Head,
    /// Receives DCF clients over UDP.
    Shim,
}

/// `host:port`, with characters that need no quoting anywhere.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeadAddress {
    /// Name or address; IPv6 without brackets.
    pub host: String,
    /// UDP port for workers.
    pub port: u16,
}

/// A secret, shown only in the file that it is written to.
#[derive(Clone, PartialEq, Eq)]
pub struct Token(String);

/// Origin of a setting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SettingSource {
    /// Typed by a person at this machine.
    Console,
    /// The kernel's command line.
    CommandLine,
    /// The partition labelled HYDRAMESH.
    Partition,
}

/// A mistake in a source.
#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
pub enum JoinError {
    /// A key that does not exist.
    #[error("there is no `{0}`; there are {keys}", keys = KEYS.join(", "))]
    UnknownKey(String),
    /// The same key twice, with different values.
    #[error("`{0}` is given twice; keep one")]
    Twice(String),
    /// A key without a value.
    #[error("`{0}` has no value; write {0}=VALUE")]
    NoValue(String),
    /// An invalid value. The value of a token is not in the message.
    #[error("`{key}`: {reason}")]
    Value {
        /// Name of the key.
        key: String,
        /// Description of the error and the remedy.
        reason: String,
    },
    /// A file that cannot be used.
    #[error("{file}: {reason}")]
    File {
        /// Name of the file on the partition.
        file: &'static str,
        /// Description of the error.
        reason: String,
    },
}

impl Settings {
    /// Sets one key.
    ///
    /// # Errors
    /// [`JoinError`] if the key is unknown, was set to another value before, or the value is invalid.
    pub fn set(&mut self, key: &str, value: &str) -> Result<(), JoinError> {
        let value = value.trim();
        if value.is_empty() && KEYS.contains(&key) {
            return Err(JoinError::NoValue(key.to_owned()));
        }
        let fits = match key {
            "head" => put(&mut self.head, HeadAddress::parse(value)),
            "token" => put(&mut self.token, Token::parse(value)),
            "role" => put(&mut self.role, Role::parse(value)),
            "backend" => put(&mut self.backend, Wish::parse_backend(value)),
            "ssh_key" => put(&mut self.ssh_key, ssh_key(value)),
            "name" => put(&mut self.name, node_name(value)),
            "keymap" => put(&mut self.keymap, keymap(value)),
            _ => return Err(JoinError::UnknownKey(shown(key))),
        };
        let key = key.to_owned();
        match fits {
            Ok(true) => Ok(()),
            Ok(false) => Err(JoinError::Twice(key)),
            Err(reason) => Err(JoinError::Value { key, reason }),
        }
    }

    /// Reads typed `key=value` lines; empty lines and lines with `#` are ignored.
    ///
    /// # Errors
    /// As [`Settings::set`].
    pub fn from_lines(text: &str) -> Result<Self, JoinError> {
        let mut settings = Self::default();
        for line in text.lines().map(str::trim) {
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            match line.split_once('=') {
                Some((key, value)) => settings.set(key.trim(), value)?,
                None => return Err(JoinError::NoValue(shown(line))),
            }
        }
        Ok(settings)
    }

    /// Reads the settings on the kernel command line; other words are ignored.
    ///
    /// # Errors
    /// As [`Settings::set`].
    pub fn from_command_line(text: &str) -> Result<Self, JoinError> {
        let mut settings = Self::default();
        for word in command_line_words(text) {
            let Some(rest) = word.strip_prefix(PREFIX) else {
                continue;
            };
            match rest.split_once('=') {
                Some((key, value)) => settings.set(key, value)?,
                // For others, such as the live image's own shell.
                None if FLAGS.contains(&rest) => {}
                None if KEYS.contains(&rest) => return Err(JoinError::NoValue(word)),
                None => return Err(JoinError::UnknownKey(shown(rest))),
            }
        }
        Ok(settings)
    }

    /// Reads `hydramesh.toml` and `join-token` of a mounted partition. If neither exists, the settings are
    /// empty.
    ///
    /// # Errors
    /// [`JoinError`] with the file and the error, without the file's content.
    pub fn from_partition(dir: &Path) -> Result<Self, JoinError> {
        let mut settings = match file(dir, SETTINGS_FILE)? {
            Some(text) => Self::from_toml(&text)?,
            None => Self::default(),
        };
        if let Some(text) = file(dir, TOKEN_FILE)? {
            settings
                .set("token", &text)
                .map_err(|error| JoinError::File {
                    file: TOKEN_FILE,
                    reason: match error {
                        JoinError::Value { reason, .. } => reason,
                        JoinError::Twice(_) => {
                            format!("{SETTINGS_FILE} holds another token; keep one")
                        }
                        _ => "it is empty; write the token into it".to_owned(),
                    },
                })?;
        }
        Ok(settings)
    }

    fn from_toml(text: &str) -> Result<Self, JoinError> {
        let wrong = |reason| JoinError::File {
            file: SETTINGS_FILE,
            reason,
        };
        // Without the parser's excerpt of the text: that line may hold the token.
        let table: toml::Table = text.parse().map_err(|error: toml::de::Error| {
            let start = error.span().map_or(0, |span| span.start);
            let line = text.bytes().take(start).filter(|&b| b == b'\n').count() + 1;
            let message = error.message().lines().next().unwrap_or("no TOML");
            // The TOML parser quotes its input, so the quote is cut off: it may be a secret.
            let message = message.split(['`', '"']).next().unwrap_or("no TOML");
            wrong(format!("line {line}: {}", message.trim_end()))
        })?;
        let mut settings = Self::default();
        for (key, value) in &table {
            let Some(value) = value.as_str() else {
                let key = shown(key);
                return Err(wrong(format!(
                    "`{key}` must be text in quotes: {key} = \"…\""
                )));
            };
            let set = settings.set(key, value);
            set.map_err(|error| wrong(error.to_string()))?;
        }
        Ok(settings)
    }
}

/// True if the kernel command line contains `word`, such as `nomodeset`.
pub fn command_line_has(text: &str, word: &str) -> bool {
    command_line_words(text).any(|found| found == word)
}

impl Role {
    fn parse(text: &str) -> Result<Self, String> {
        let mut all = [Self::Worker, Self::Head, Self::Shim].into_iter();
        all.find(|role| role.to_string() == text)
            .ok_or_else(|| "there are worker, head and shim".to_owned())
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Worker => "worker",
            Self::Head => "head",
            Self::Shim => "shim",
        })
    }
}

impl HeadAddress {
    /// Parses `host`, `host:port` or `[2001:db8::1]:port`.
    ///
    /// # Errors
    /// A message that shows the expected form.
    pub fn parse(text: &str) -> Result<Self, String> {
        let wrong =
            || "write the head's address as HOST:7780, such as 192.168.1.10:7780".to_owned();
        let bracketed = text.strip_prefix('[');
        if bracketed.is_none() && text.matches(':').count() > 1 {
            return Err("write an IPv6 address in brackets: [2001:db8::1]:7780".to_owned());
        }
        let (host, port) = match bracketed.map(|rest| rest.split_once(']')) {
            Some(Some((host, port))) if host.contains(':') => (host, port),
            Some(_) => return Err(wrong()),
            None => text.split_at(text.find(':').unwrap_or(text.len())),
        };
        let port = match port {
            "" => HEAD_PORT,
            port => {
                let port = port.strip_prefix(':').and_then(|port| port.parse().ok());
                port.filter(|&port| port > 0).ok_or_else(wrong)?
            }
        };
        let allowed = |c: char| c.is_ascii_alphanumeric() || ".-_:%".contains(c);
        let sound = (1..=253).contains(&host.len()) && host.chars().all(allowed);
        match sound && !host.starts_with('-') {
            true => Ok(Self {
                host: host.to_owned(),
                port,
            }),
            false => Err(wrong()),
        }
    }
}

impl fmt::Display for HeadAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.host.contains(':') {
            true => write!(f, "[{}]:{}", self.host, self.port),
            false => write!(f, "{}:{}", self.host, self.port),
        }
    }
}

impl Token {
    /// Checks the form of a token. The head checks the token itself when the worker joins.
    ///
    /// # Errors
    /// A message with the form of a token; never the text itself.
    pub fn parse(text: &str) -> Result<Self, String> {
        let body = text.trim().strip_prefix("hydra1.");
        let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_');
        match body {
            Some(body) if body.len() == TOKEN_BODY && body.bytes().all(allowed) => {
                Ok(Self(text.trim().to_owned()))
            }
            Some(body) if body.bytes().all(allowed) => Err(format!(
                "this token has {} characters after \"hydra1.\" instead of {TOKEN_BODY}; copy it whole",
                body.len()
            )),
            _ => Err(
                "a token begins with \"hydra1.\" and has no spaces; `hydramesh token create` on the head prints one"
                    .to_owned(),
            ),
        }
    }

    /// The token in clear text.
    pub fn secret(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(…)")
    }
}

impl fmt::Display for SettingSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Console => "typed here",
            Self::CommandLine => "kernel command line",
            Self::Partition => "partition HYDRAMESH",
        })
    }
}

/// Words as the kernel splits them: spaces part them but within double quotes, which go.
fn command_line_words(text: &str) -> impl Iterator<Item = String> + '_ {
    let mut rest = text.chars();
    std::iter::from_fn(move || {
        let mut word = String::new();
        let mut quoted = false;
        let mut any = false;
        for c in rest.by_ref() {
            match c {
                '"' => quoted = !quoted,
                c if c.is_whitespace() && !quoted => {
                    if any {
                        break;
                    }
                    continue;
                }
                c => word.push(c),
            }
            any = true;
        }
        any.then_some(word)
    })
}

/// The text of a file of the partition; `None` where it is not there.
fn file(dir: &Path, name: &'static str) -> Result<Option<String>, JoinError> {
    match read_text(&dir.join(name)) {
        Ok(text) => Ok(Some(text)),
        Err(ReadError::Absent) => Ok(None),
        Err(error) => Err(JoinError::File {
            file: name,
            reason: error.to_string(),
        }),
    }
}

/// Fills an empty place. False if the place holds another value.
fn put<T: PartialEq>(place: &mut Option<T>, value: Result<T, String>) -> Result<bool, String> {
    let value = Some(value?);
    if place.is_none() {
        *place = value;
        return Ok(true);
    }
    Ok(*place == value)
}

/// A line of an authorized_keys file, or a form of it that needs no quotes on a command line: the key's
/// second word alone, or the whole line as base64.
fn ssh_key(text: &str) -> Result<String, String> {
    let wrong = || {
        "write the line of your .pub file in double quotes, its second word alone (AAAA…), or the line as base64".to_owned()
    };
    let line = if text.contains(char::is_whitespace) {
        text.to_owned()
    } else {
        let bytes = STANDARD.decode(text).map_err(|_| wrong())?;
        match key_type(&bytes) {
            Some(kind) => format!("{kind} {text}"),
            None => String::from_utf8(bytes).map_err(|_| wrong())?,
        }
    };
    let line = line.trim();
    let mut words = line.split_whitespace();
    let (kind, blob) = words.next().zip(words.next()).ok_or_else(wrong)?;
    let bytes = STANDARD.decode(blob).map_err(|_| wrong())?;
    // A .pub file holds no line that begins with options, or whose two words disagree.
    if key_type(&bytes) != Some(kind) || line.contains(char::is_control) || line.len() > 8192 {
        return Err(wrong());
    }
    Ok(line.to_owned())
}

/// The type that a key's binary form begins with (RFC 4253, section 6.6: a string with its length before it).
fn key_type(bytes: &[u8]) -> Option<&str> {
    let (length, rest) = bytes.split_first_chunk::<4>()?;
    let kind = rest.get(..u32::from_be_bytes(*length).try_into().ok()?)?;
    let kind = std::str::from_utf8(kind).ok()?;
    SSH_KEY_TYPES.contains(&kind).then_some(kind)
}

fn node_name(text: &str) -> Result<String, String> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
    match text.len() <= 63 && text.chars().all(allowed) {
        true => Ok(text.to_owned()),
        false => {
            Err("a name has at most 63 letters, digits, dots, dashes and underscores".to_owned())
        }
    }
}

/// A name of a keyboard layout: never a path, nor an option of `loadkeys`.
fn keymap(text: &str) -> Result<String, String> {
    let plain = |c: char| c.is_ascii_alphanumeric();
    let sound = text.starts_with(plain) && text.chars().all(|c| plain(c) || ".-_@+".contains(c));
    match sound && text.len() <= 64 {
        true => Ok(text.to_owned()),
        false => Err("write a keyboard layout's name, such as de, fr or us-acentos".to_owned()),
    }
}

/// A key in a message: printable and short.
fn shown(text: &str) -> String {
    let key = text.split('=').next().unwrap_or_default();
    key.chars().filter(|c| !c.is_control()).take(32).collect()
}

const KEYS: [&str; 7] = [
    "head", "token", "role", "backend", "ssh_key", "name", "keymap",
];

/// Words of the command line that others read.
const FLAGS: [&str; 2] = ["shell", "nvidia_legacy"];

/// Characters of 60 bytes in base64url.
const TOKEN_BODY: usize = 80;

const SSH_KEY_TYPES: [&str; 7] = [
    "ssh-ed25519",
    "ssh-rsa",
    "ecdsa-sha2-nistp256",
    "ecdsa-sha2-nistp384",
    "ecdsa-sha2-nistp521",
    "sk-ssh-ed25519@openssh.com",
    "sk-ecdsa-sha2-nistp256@openssh.com",
];

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn token() -> String {
        format!("hydra1.{}", "aB3_-".repeat(16))
    }

    /// An ed25519 key's blob: its type, then 32 bytes.
    fn blob() -> String {
        let mut bytes = b"\0\0\0\x0bssh-ed25519\0\0\0\x20".to_vec();
        bytes.extend([7; 32]);
        STANDARD.encode(bytes)
    }

    #[test]
    fn the_kernel_command_line_is_read_as_the_kernel_splits_it() {
        let token = token();
        let blob = blob();
        let line = format!(
            "BOOT_IMAGE=/x quiet hydramesh.head=10.0.0.1 hydramesh.token={token} hydramesh.role=worker \
             hydramesh.backend=auto \"hydramesh.ssh_key=ssh-ed25519 {blob} me@home\" hydramesh.name=\"attic\" hydramesh.keymap=de-latin1 hydramesh.shell \
             hydramesh.nvidia_legacy\n"
        );
        let settings = Settings::from_command_line(&line).expect("sound");
        assert_eq!(settings.head.expect("a head").to_string(), "10.0.0.1:7780");
        assert_eq!(settings.token.expect("a token").secret(), token);
        assert_eq!(settings.role, Some(Role::Worker));
        assert_eq!(settings.backend, Some(None));
        assert_eq!(
            settings.ssh_key,
            Some(format!("ssh-ed25519 {blob} me@home"))
        );
        assert_eq!(settings.name.as_deref(), Some("attic"));
        assert_eq!(settings.keymap.as_deref(), Some("de-latin1"));
        assert!(command_line_has("a nomodeset b", "nomodeset"));
        assert!(!command_line_has("nomodeset=0", "nomodeset"));
    }

    #[test]
    fn mistakes_on_the_command_line_are_named() {
        let error = |line: &str| {
            Settings::from_command_line(line)
                .expect_err(line)
                .to_string()
        };
        assert!(error("hydramesh.haed=a").contains("there is no `haed`; there are head, token"));
        assert!(error("hydramesh.haed").contains("there is no `haed`"));
        assert!(error("hydramesh.head").contains("has no value"));
        assert!(error("hydramesh.head=").contains("has no value"));
        assert!(error("hydramesh.backend=cpu hydramesh.backend=rocm").contains("twice"));
        assert!(error("hydramesh.role=boss").contains("worker, head and shim"));
        assert!(error("hydramesh.backend=amd").contains("auto, cpu, nvidia, rocm and webgpu"));
        assert!(error("hydramesh.name=a/b").contains("63 letters"));
        for keymap in ["-C", "../x", "/etc/shadow", ".", "de;reboot", "d e"] {
            let error = error(&format!("\"hydramesh.keymap={keymap}\""));
            assert!(error.contains("a keyboard layout's name"), "{error}");
        }
        let same = Settings::from_command_line("hydramesh.backend=cpu hydramesh.backend=cpu");
        assert!(same.is_ok(), "the boot entry and a person may agree");
    }

    #[test]
    fn addresses_are_checked() {
        let parsed = |text: &str| HeadAddress::parse(text).map(|head| head.to_string());
        assert_eq!(parsed("attic"), Ok("attic:7780".to_owned()));
        assert_eq!(parsed("attic.lan:1"), Ok("attic.lan:1".to_owned()));
        assert_eq!(
            parsed("[fe80::1%eth0]"),
            Ok("[fe80::1%eth0]:7780".to_owned())
        );
        assert_eq!(parsed("[::1]:9"), Ok("[::1]:9".to_owned()));
        for bad in [
            ":1", "a:", "a:0", "a:70000", "::1", "[::1", "[::1]9", "[a]:1", "a b", "a\"b:1", "-x",
            "a'$(x):1",
        ] {
            assert!(parsed(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_token_is_shown_nowhere() {
        let settings = Settings::from_lines(&format!("token={}", token())).expect("a token");
        assert!(!format!("{settings:?}").contains("aB3_"));
        for bad in [
            "hydra1.secretsecret",
            "secretsecret",
            "hydra1.secret secret",
            "secret=secret",
        ] {
            let typed = Settings::from_lines(&format!("token={bad}")).expect_err("too short");
            assert!(!typed.to_string().contains("secret"), "{typed}");
            let dir = tempfile::tempdir().expect("a folder");
            for content in [
                format!("token = \"{bad}\""),
                format!("token = {bad}"),
                format!("token = \"{bad}"),
                format!("token = [\"{bad}\"]"),
            ] {
                std::fs::write(dir.path().join(SETTINGS_FILE), &content).expect("written");
                let error = Settings::from_partition(dir.path()).expect_err(&content);
                assert!(!error.to_string().contains("secret"), "{error}");
            }
        }
    }

    #[test]
    fn an_ssh_key_comes_in_three_forms() {
        let line = format!("ssh-ed25519 {}", blob());
        assert_eq!(ssh_key(&line), Ok(line.clone()));
        assert_eq!(ssh_key(&blob()), Ok(line.clone()));
        assert_eq!(ssh_key(&STANDARD.encode(&line)), Ok(line.clone()));
        for bad in [
            "hello",
            "https://example.org/key",
            "aGVsbG8=",
            &format!("ssh-rsa {}", blob()),
            &format!("command=\"x\" {line}"),
            &format!("{line}\nssh-ed25519 x"),
        ] {
            assert!(ssh_key(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_partition_holds_settings_and_a_token() {
        let dir = tempfile::tempdir().expect("a folder");
        let read = || Settings::from_partition(dir.path());
        assert_eq!(read(), Ok(Settings::default()));
        std::fs::write(dir.path().join(TOKEN_FILE), format!("{}\r\n", token())).expect("written");
        assert_eq!(
            read().expect("sound").token.expect("a token").secret(),
            token()
        );
        let write =
            |text: &[u8]| std::fs::write(dir.path().join(SETTINGS_FILE), text).expect("written");
        write(b"head = \"attic\"\r\nrole = \"worker\"\r\n");
        assert_eq!(read().expect("sound").role, Some(Role::Worker));
        let error = |text: &[u8]| {
            write(text);
            read().expect_err("a mistake").to_string()
        };
        assert!(error(b"head = \"a\"\nhead = \"b\"\n").contains("hydramesh.toml: line 2"));
        assert!(error(b"head = 7\n").contains("must be text in quotes"));
        assert!(error(b"colour = \"red\"\n").contains("there is no `colour`"));
        assert!(error(b"\x7fELF\x02\x01\0\0\xff").contains("not text"));
        assert!(error(&vec![b'#'; 70_000]).contains("larger than 64 KiB"));
        let other = format!("token = \"hydra1.{}\"", "x".repeat(80));
        assert!(error(other.as_bytes()).contains("join-token: hydramesh.toml holds another token"));
    }

    proptest! {
        #[test]
        fn nothing_makes_a_reader_panic(text: String, bytes: Vec<u8>) {
            let _ = Settings::from_lines(&text);
            let _ = Settings::from_command_line(&text);
            let _ = Settings::from_toml(&text);
            let _ = HeadAddress::parse(&text);
            let _ = ssh_key(&text);
            let _ = ssh_key(&STANDARD.encode(&bytes));
        }
    }
}
