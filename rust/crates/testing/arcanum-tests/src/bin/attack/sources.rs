//! Sources of attacks: programs that run beside the mesh, at the lowest priority.

use std::fmt;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use arcanum_tests::rogue::Lie;
use clap::ValueEnum;
use serde_json::Value;

use crate::plays::Play;

/// One attack, as it is named on the command line and in the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum AttackKind {
    /// A client, or an attacker who knows the addresses only.
    Play(Play),
    /// A worker with a token.
    Rogue(Lie),
    /// The attack of this name in `scripts/stranger.py`.
    Stranger(&'static str),
}

/// All of them, in the order of the table.
pub(crate) fn all() -> Vec<AttackKind> {
    let plays = Play::value_variants().iter().copied().map(AttackKind::Play);
    let strangers = ["silent", "others"].map(AttackKind::Stranger);
    // Lies about embeddings need a model for them: tests have one.
    let lies = Lie::value_variants().iter().copied();
    let lies = lies
        .filter(|lie| *lie != Lie::Dimensions)
        .map(AttackKind::Rogue);
    plays.chain(strangers).chain(lies).collect()
}

/// The attacks of a usual run; of the lies only the harmful ones.
pub(crate) fn usual() -> Vec<AttackKind> {
    let usual = [
        Lie::Fast,
        Lie::Mute,
        Lie::Invalid,
        Lie::Endless,
        Lie::Huge,
        Lie::Wrong,
        Lie::Malformed,
    ];
    let mut sources = all();
    sources.retain(|source| match source {
        AttackKind::Rogue(lie) => usual.contains(lie),
        _ => true,
    });
    sources
}

/// The sources called so; `liars` and `strangers` are all of those.
pub(crate) fn named(names: &[String]) -> Result<Vec<AttackKind>> {
    let known = all();
    let mut found = Vec::new();
    for name in names {
        let group: fn(&AttackKind) -> bool = match name.as_str() {
            "liars" => |source| matches!(source, AttackKind::Rogue(_)),
            "strangers" => |source| matches!(source, AttackKind::Stranger(_)),
            _ => {
                found.push(one(name, &known)?);
                continue;
            }
        };
        found.extend(known.iter().copied().filter(group));
    }
    Ok(found)
}

fn one(name: &str, known: &[AttackKind]) -> Result<AttackKind> {
    let found = known.iter().find(|source| source.to_string() == name);
    found.copied().with_context(|| {
        let known: Vec<String> = known.iter().map(AttackKind::to_string).collect();
        let known = known.join(", ");
        format!("no attack is called {name:?}; there are liars, strangers, {known}")
    })
}

impl fmt::Display for AttackKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            AttackKind::Play(play) => f.write_str(&play.name()),
            AttackKind::Rogue(lie) => write!(f, "liar-{}", lie.name()),
            AttackKind::Stranger(name) => write!(f, "stranger-{name}"),
        }
    }
}

/// On which machines attackers are, as words before their commands; empty is this one.
#[derive(Debug, Clone, Default)]
pub(crate) struct Machines {
    /// With an API key.
    pub(crate) clients: Vec<String>,
    /// Attackers that know addresses only.
    pub(crate) strangers: Vec<String>,
    /// With a join token.
    pub(crate) rogues: Vec<String>,
}

/// An attack that goes on. Dropping it ends it.
#[derive(Debug)]
pub(crate) struct Attack {
    pub(crate) source: AttackKind,
    child: Child,
    words: PathBuf,
}

/// Output of an attack.
#[derive(Debug, Default)]
pub(crate) struct AttackOutput {
    /// Its counts, or the reason why there are none.
    pub(crate) summary: String,
    /// All of its words that are JSON.
    pub(crate) lines: Vec<Value>,
}

impl Attack {
    /// Starts it for so long; its words go to a file in `folder`.
    pub(crate) fn start(
        source: AttackKind,
        machines: &Machines,
        targets: &Path,
        token: Option<&str>,
        lasts: Duration,
        folder: &Path,
        nice: u8,
    ) -> Result<Self> {
        let seconds = lasts.as_secs().to_string();
        let program = std::env::current_exe()?.display().to_string();
        let targets_file = targets.display().to_string();
        let (machine, own): (&[String], Vec<String>) = match source {
            AttackKind::Play(play) => {
                let machine = if play.is_client() {
                    &machines.clients
                } else {
                    &machines.strangers
                };
                let name = play.name();
                (
                    machine,
                    [
                        &program,
                        "play",
                        &name,
                        "--targets",
                        &targets_file,
                        "--seconds",
                        &seconds,
                    ]
                    .map(str::to_owned)
                    .to_vec(),
                )
            }
            AttackKind::Rogue(lie) => {
                let (name, token) = (lie.name(), token.context("a liar needs a token")?);
                let words = [
                    &program,
                    "rogue",
                    &name,
                    "--targets",
                    &targets_file,
                    "--token",
                    token,
                    "--seconds",
                    &seconds,
                ];
                (&machines.rogues, words.map(str::to_owned).to_vec())
            }
            AttackKind::Stranger(name) => {
                let target = crate::targets::Targets::read(targets)?.quic.to_string();
                let script = script().display().to_string();
                let words = ["python3", &script, &target, name, "--seconds", &seconds];
                (&machines.strangers, words.map(str::to_owned).to_vec())
            }
        };
        let words = folder.join(format!("{source}.log"));
        let file = File::create(&words).with_context(|| words.display().to_string())?;
        // Attackers would have machines of their own: on this one the mesh comes first.
        let nice = nice.to_string();
        let nice = ["nice", "-n", &nice].map(str::to_owned);
        let line: Vec<String> = machine.iter().cloned().chain(nice).chain(own).collect();
        let (program, arguments) = line.split_first().context("a command")?;
        let child = Command::new(program)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .spawn()
            .with_context(|| format!("starting {program} for {source}"))?;
        Ok(Self {
            source,
            child,
            words,
        })
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Its output so far, one JSON object per line.
    pub(crate) fn lines(&self) -> Vec<Value> {
        let words = fs::read_to_string(&self.words).unwrap_or_default();
        let lines = words.lines();
        lines
            .filter_map(|line| serde_json::from_str(line).ok())
            .collect()
    }

    /// Waits for its end, which comes by itself, and ends it if it does not.
    pub(crate) async fn end(mut self) -> AttackOutput {
        for _ in 0..200 {
            if !matches!(self.child.try_wait(), Ok(None)) {
                break;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        let ended = self.child.try_wait();
        let _ = self.child.kill();
        let _ = self.child.wait();
        let lines = self.lines();
        let summary = match ended {
            Ok(Some(status)) if status.code() == Some(3) => {
                format!("SKIPPED: {}", self.last_words())
            }
            Ok(Some(status)) if !status.success() => format!("{status}: {}", self.last_words()),
            Ok(None) => format!("did not end by itself: {}", counts(&lines)),
            _ => counts(&lines),
        };
        AttackOutput { summary, lines }
    }

    fn last_words(&self) -> String {
        let words = fs::read_to_string(&self.words).unwrap_or_default();
        words.lines().last().unwrap_or("no word").to_owned()
    }
}

impl Drop for Attack {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// `scripts/stranger.py` of this tree.
fn script() -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(4);
    root.unwrap_or(Path::new(".")).join("scripts/stranger.py")
}

/// Fetches the strangers' dependencies; the error tells why that is impossible.
pub(crate) fn strangers_are_to_be_had() -> Result<()> {
    let status = Command::new("python3")
        .arg(script())
        .arg("--fetch")
        .status()
        .context("python3 cannot be started")?;
    if !status.success() {
        bail!("{} --fetch: {status}", script().display());
    }
    Ok(())
}

/// The counts in the last words of an attack.
fn counts(lines: &[Value]) -> String {
    let mut parts = Vec::new();
    for line in lines {
        let Some(counts) = line["counts"].as_object() else {
            continue;
        };
        let counted: Vec<String> = counts
            .iter()
            .map(|(what, count)| format!("{what} {count}"))
            .collect();
        let name = line["attack"].as_str().unwrap_or_default();
        let name = name.strip_prefix("stranger:").unwrap_or_default();
        let name = if name.is_empty() {
            String::new()
        } else {
            format!("{name}: ")
        };
        parts.push(format!("{name}{}", counted.join(", ")));
    }
    parts.join("; ")
}
