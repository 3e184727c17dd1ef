//! `hydramesh audit`: the audit trails of a head, or exported ones.

mod endorsed;
mod kept;

use std::collections::VecDeque;
use std::fmt::Display;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use data_encoding::HEXLOWER;
use mesh_audit::archive::Archive;
use mesh_audit::chain::ChainKey;
use mesh_audit::home::{self, Lock, Opened};
use mesh_audit::kept::Kept;
use mesh_audit::keys::{PublicKeys, Vkey, is_key_name};
use mesh_audit::note::Note;
use mesh_audit::proof::Proof;
use mesh_audit::record::{self, Record};
use mesh_audit::store::Limits;
use mesh_audit::verify::{Options, Report, verify};
use mesh_audit::witness::{Witness, keep, merge_of, merges};
use mesh_base::{clock, files};
use serde_json::{Value, json};

use self::endorsed::Endorsed;
use crate::args::{AuditCommand, HeadArgs, TrailArgs};
use crate::failure::Failure;
use crate::output::plain;

pub(crate) fn run(head: &HeadArgs, command: AuditCommand) -> Result<(), Failure> {
    match command {
        AuditCommand::Verify {
            trail,
            key,
            chain_key,
            witness,
            since,
            epochs,
            merged,
            document,
            root,
            json,
        } => {
            let given = Given {
                keys: read_keys(&key)?,
                chain_key,
                witnesses: read_keys(&witness)?,
                since,
                kept: kept::read(&epochs)?,
                merged,
                document,
                root,
            };
            verify_all(&trails(head, &trail)?, &given, json)
        }
        AuditCommand::Show {
            trail,
            from,
            last,
            kind,
            json,
        } => trails(head, &trail)?
            .iter()
            .try_for_each(|(_, dir)| show(dir, from, last, kind.as_deref(), json)),
        AuditCommand::Export { trail, to } => export(&trails(head, &trail)?, &to),
        AuditCommand::Prove {
            check: Some(file),
            key,
            ..
        } => check_proof(&file, &key.into_iter().collect::<Vec<_>>()),
        AuditCommand::Prove { trail, record, .. } => {
            let (_, dir) = one(trails(head, &trail)?)?;
            let proof = Proof::of(&open(&dir)?, record.unwrap_or_default()).map_err(failed)?;
            print(&proof.to_text())
        }
        AuditCommand::Key { trail, file } => key(head, &trail, &file),
        AuditCommand::Cosign {
            trail,
            name: Some(name),
            witness_dir: Some(memory),
            ..
        } => cosign(&one(trails(head, &trail)?)?.1, &name, &memory),
        AuditCommand::Cosign {
            trail, keep: file, ..
        } => {
            let (_, dir) = one(trails(head, &trail)?)?;
            let text = read_text(&file.unwrap_or_default())?;
            let kept = keep(&open(&dir)?, &text).map_err(failed)?;
            print(&format!("{}\n", kept.display()))
        }
        AuditCommand::Merge { trail, other } => merge(head, &trail, &other),
    }
}

fn failed(error: impl Display) -> Failure {
    Failure::failed(error.to_string())
}

fn print(text: &str) -> Result<(), Failure> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())
        .and_then(|()| out.flush())
        .map_err(failed)
}

fn open(dir: &Path) -> Result<Archive, Failure> {
    Archive::open(dir).map_err(failed)
}

fn read_text(path: &Path) -> Result<String, Failure> {
    fs::read_to_string(path).map_err(|error| failed(format!("{}: {error}", path.display())))
}

/// The folder with trails.
fn folder(head: &HeadArgs, args: &TrailArgs) -> PathBuf {
    match &args.trail {
        Some(dir) if dir.join(AUDIT).is_dir() => dir.join(AUDIT),
        Some(dir) => dir.clone(),
        None => head.state_dir().join(AUDIT),
    }
}

/// Names and folders of the trails that are meant.
fn trails(head: &HeadArgs, args: &TrailArgs) -> Result<Vec<(String, PathBuf)>, Failure> {
    let dir = folder(head, args);
    if Archive::open(&dir).is_ok() {
        let name = dir.file_name().unwrap_or_default().to_string_lossy();
        return Ok(vec![(name.into_owned(), dir)]);
    }
    let mut found = home::trails(&dir);
    if let Some(tier) = args.tier {
        found.retain(|(name, _)| name == tier.as_str());
    }
    if found.is_empty() {
        let text = format!(
            "{} holds no audit trail that may be read here",
            dir.display()
        );
        return Err(Failure::failed(text).hint(
            "--state-dir names a head's state folder (its user or root may read it), --trail an exported trail.",
        ));
    }
    Ok(found)
}

fn one(found: Vec<(String, PathBuf)>) -> Result<(String, PathBuf), Failure> {
    let names: Vec<String> = found.iter().map(|(name, _)| name.clone()).collect();
    match <[_; 1]>::try_from(found) {
        Ok([trail]) => Ok(trail),
        Err(_) => Err(Failure::usage(format!(
            "there are several trails: name one with --tier ({})",
            names.join(", ")
        ))),
    }
}

/// The verifier keys in files: one on each line, or a trail's file `keys`.
fn read_keys(paths: &[PathBuf]) -> Result<Vec<Vkey>, Failure> {
    let mut keys = Vec::new();
    for path in paths {
        let text = read_text(path)?;
        if let Ok(public) = PublicKeys::read(&text) {
            keys.extend([public.log(), public.epochs()]);
            continue;
        }
        for line in text.lines().map(str::trim).filter(|line| !line.is_empty()) {
            keys.push(
                Vkey::parse(line)
                    .map_err(|error| failed(format!("{}: {error}", path.display())))?,
            );
        }
    }
    Ok(keys)
}

/// Knowledge from the command line.
struct Given {
    keys: Vec<Vkey>,
    chain_key: Option<PathBuf>,
    witnesses: Vec<Vkey>,
    since: Vec<PathBuf>,
    kept: Vec<Kept>,
    merged: Option<PathBuf>,
    document: Option<PathBuf>,
    root: Option<PathBuf>,
}

impl Given {
    fn options(&self, dir: &Path, origin: &str) -> Result<Options, Failure> {
        let chain = self
            .chain_key
            .as_ref()
            .map(|path| read_chain_key(path))
            .transpose()?;
        let mut earlier = Vec::new();
        for path in &self.since {
            let note = Note::parse(read_text(path)?.as_bytes());
            earlier.push(note.map_err(|error| failed(format!("{}: {error}", path.display())))?);
        }
        // Of several trails, each has its own.
        let chain = chain.filter(|(of, _)| of == origin).map(|(_, key)| key);
        Ok(Options {
            trusted: self.keys.clone(),
            chain,
            witnesses: self.witnesses.clone(),
            earlier,
            kept: kept::epochs_of(&self.kept, origin),
            live: dir.parent().is_some_and(Lock::is_taken),
        })
    }
}

fn verify_all(trails: &[(String, PathBuf)], given: &Given, json: bool) -> Result<(), Failure> {
    let mut shown = Vec::new();
    let mut wrong = 0;
    for (name, dir) in trails {
        let mut report = verified(dir, given)?;
        let document = given.document.as_deref();
        let endorsed = endorsed::check(&mut report, &open(dir)?, document, given.root.as_ref())?;
        kept::check(&mut report, name, &given.kept);
        wrong += report.findings.len();
        let merged = match &given.merged {
            Some(other) => merges(&open(dir)?, &open(other)?).map_err(failed)?,
            None => Vec::new(),
        };
        wrong += merged.iter().filter(|(_, holds)| !holds).count();
        if json {
            shown.push(as_json(name, &report, &endorsed, &merged));
        } else {
            print(&as_text(name, &report, &endorsed, &merged))?;
        }
    }
    if json {
        print(&format!("{:#}\n", Value::Array(shown)))?;
    }
    match wrong {
        0 => Ok(()),
        1 => Err(Failure::failed(
            "the audit trail is not as it was signed at 1 place",
        )),
        wrong => Err(Failure::failed(format!(
            "the audit trail is not as it was signed at {wrong} places"
        ))),
    }
}

/// Verifies a trail, again if the head published in the meantime.
fn verified(dir: &Path, given: &Given) -> Result<Report, Failure> {
    let mut tries = 0;
    loop {
        let archive = open(dir)?;
        let origin = archive.keys().map(|keys| keys.log().name().to_owned());
        let options = given.options(dir, &origin.unwrap_or_default())?;
        let report = verify(&archive, &options).map_err(failed)?;
        let after = open(dir)?;
        tries += 1;
        if report.findings.is_empty() || after.published() == archive.published() || tries == TRIES
        {
            return Ok(report);
        }
    }
}

fn as_text(name: &str, report: &Report, endorsed: &Endorsed, merged: &[(u64, bool)]) -> String {
    let mut text = format!("{name}: {} ({} records", plain(&report.origin), report.size);
    if report.signed < report.size {
        text += &format!(", {} of them signed so far", report.signed);
    }
    if report.pruned > 0 {
        text += &format!(
            ", the first {} deleted to keep within the limit",
            report.pruned
        );
    }
    text += ")\n";
    if let Some((first, last)) = report.times {
        text += &format!(
            "  from {} to {}\n",
            clock::utc_of(first / 1000),
            clock::utc_of(last / 1000)
        );
    }
    text += &format!("  {} epochs signed with SLH-DSA\n", report.epochs);
    if report.coded > 0 {
        text += &format!("  codes of {} records checked\n", report.coded);
    }
    if report.kept > 0 {
        text += &format!("  compared with {} epochs that nodes kept\n", report.kept);
    }
    text += &endorsed.as_text();
    for (witness, size) in &report.witnessed {
        text += &format!("  {} records cosigned by {}\n", size, plain(witness));
    }
    for (n, holds) in merged {
        let verdict = if *holds {
            "is in the other trail"
        } else {
            "is not in the other trail"
        };
        text += &format!("  record {n} binds a head that {verdict}\n");
    }
    match report.findings.is_empty() {
        true => text += "  as it was signed\n",
        false => {
            for finding in report.findings.iter().take(MOST_SHOWN) {
                text += &format!("  WRONG {}\n", plain(&finding.to_string()));
            }
            if report.findings.len() > MOST_SHOWN {
                text += &format!(
                    "  and {} more; --json shows all\n",
                    report.findings.len() - MOST_SHOWN
                );
            }
        }
    }
    text
}

fn as_json(name: &str, report: &Report, endorsed: &Endorsed, merged: &[(u64, bool)]) -> Value {
    let findings = report.findings.iter().map(|finding| {
        json!({
            "file": finding.file,
            "bytes": finding.bytes.map(|(first, last)| [first, last]),
            "records": finding.records.map(|(first, last)| [first, last]),
            "text": finding.text,
        })
    });
    json!({
        "trail": name,
        "origin": report.origin,
        "records": report.size,
        "signed": report.signed,
        "pruned": report.pruned,
        "epochs": report.epochs,
        "codes_checked": report.coded,
        "kept_epochs": report.kept,
        "endorsed": endorsed.as_json(),
        "witnessed": report.witnessed,
        "merged": merged,
        "findings": findings.collect::<Vec<Value>>(),
    })
}

fn show(
    dir: &Path,
    from: u64,
    last: Option<u32>,
    kind: Option<&str>,
    json: bool,
) -> Result<(), Failure> {
    let archive = open(dir)?;
    let mut lines: VecDeque<String> = VecDeque::new();
    let mut done = Ok(());
    let read = archive.entries(from, |n, entry| {
        let Some(line) = shown(n, entry, kind, json) else {
            return true;
        };
        match last {
            Some(last) => {
                lines.push_back(line);
                if lines.len() > last as usize {
                    lines.pop_front();
                }
            }
            None => done = print(&line),
        }
        done.is_ok()
    });
    read.map_err(failed)?;
    done?;
    print(&lines.into_iter().collect::<String>())
}

/// A record on a line; `None` if it is of another kind.
fn shown(n: u64, entry: &[u8], kind: Option<&str>, json: bool) -> Option<String> {
    let text = record::split(entry).map(|(text, _)| text);
    let read = text.and_then(|text| Ok((Record::read(text)?, text)));
    let Ok((record, text)) = read else {
        return Some(format!("{n}  (not a record)\n"));
    };
    if kind.is_some_and(|kind| kind != record.kind) {
        return None;
    }
    if json {
        return Some(String::from_utf8_lossy(text).into_owned() + "\n");
    }
    let mut fields = String::new();
    if let Ok(Value::Object(object)) = serde_json::from_slice(text) {
        for (name, value) in object {
            if !["n", "at", "epoch", "kind"].contains(&name.as_str()) {
                let value = value
                    .as_str()
                    .map_or_else(|| value.to_string(), str::to_owned);
                fields += &format!("  {name}={}", plain(&value));
            }
        }
    }
    let seconds = record.at / 1000;
    let date = clock::date(seconds);
    let time = format!(
        "{} {:02}:{:02}:{:02}",
        date.date(),
        date.hour(),
        date.minute(),
        date.second()
    );
    Some(format!("{n}  {time}  {}{fields}\n", plain(&record.kind)))
}

fn export(trails: &[(String, PathBuf)], to: &Path) -> Result<(), Failure> {
    for (name, dir) in trails {
        let target = to.join(name);
        let size = open(dir)?.export(&target).map_err(failed)?;
        print(&format!("{}: {size} records\n", target.display()))?;
    }
    Ok(())
}

fn check_proof(file: &Path, keys: &[PathBuf]) -> Result<(), Failure> {
    let proof = Proof::parse(&read_text(file)?).map_err(failed)?;
    let keys = read_keys(keys)?;
    let mut verdicts = keys.iter().map(|key| proof.verify(key));
    if !verdicts.any(|verdict| verdict.is_ok()) {
        // The first key is the one of checkpoints.
        let reason = keys.first().map(|key| proof.verify(key));
        let reason = reason.and_then(Result::err).map(|error| error.to_string());
        return Err(failed(
            reason.unwrap_or_else(|| "the file of keys is empty".to_owned()),
        ));
    }
    let line = shown(proof.index, &proof.entry, None, false);
    print(&line.unwrap_or_default())
}

/// The trail of one tier, for writing.
fn open_for_writing(head: &HeadArgs, args: &TrailArgs) -> Result<(Lock, Opened), Failure> {
    let Some(tier) = args.tier else {
        return Err(Failure::usage("name the trail with --tier"));
    };
    let dir = folder(head, args);
    if !dir.join(tier.as_str()).is_dir() {
        let text = format!(
            "{} has no trail of the tier {tier}; the head makes it",
            dir.display()
        );
        return Err(Failure::failed(text));
    }
    let lock = Lock::take(&dir).map_err(failed)?;
    let opened = lock
        .open(tier, "hydramesh", None, Limits::default(), now())
        .map_err(failed)?;
    match opened.set_aside {
        None => Ok((lock, opened)),
        Some((path, reason)) => Err(failed(format!(
            "the trail was damaged, and is now {}: {reason}",
            path.display()
        ))),
    }
}

fn key(head: &HeadArgs, args: &TrailArgs, file: &Path) -> Result<(), Failure> {
    if file.exists() {
        return Err(Failure::usage(format!(
            "{} exists: name a new file",
            file.display()
        )));
    }
    let (_lock, mut opened) = open_for_writing(head, args)?;
    let store = &mut opened.store;
    let key = store.rekey(now()).map_err(failed)?;
    let contents = json!({
        "origin": store.origin(),
        "epoch": key.epoch(),
        "key": HEXLOWER.encode(key.bytes()),
    });
    let text = format!("{contents}\n");
    files::replace(file, text.as_bytes(), files::PRIVATE).map_err(|error| {
        failed(format!(
            "{}: {error}; the key is lost: run this again",
            file.display()
        ))
    })?;
    store.publish(now()).map_err(failed)?;
    print(&format!(
        "{}: the key of epoch {}\n",
        file.display(),
        key.epoch()
    ))
}

/// Name of a trail, and the key of one of its epochs.
fn read_chain_key(path: &Path) -> Result<(String, ChainKey), Failure> {
    let contents: Value = serde_json::from_str(&read_text(path)?).unwrap_or_default();
    let key = contents["key"]
        .as_str()
        .and_then(|key| HEXLOWER.decode(key.as_bytes()).ok());
    let key = key.and_then(|key| <[u8; 32]>::try_from(key).ok());
    match (contents["origin"].as_str(), contents["epoch"].as_u64(), key) {
        (Some(origin), Some(epoch), Some(key)) => {
            Ok((origin.to_owned(), ChainKey::new(epoch, key)))
        }
        _ => Err(failed(format!(
            "{} is not a file of `hydramesh audit key`",
            path.display()
        ))),
    }
}

fn cosign(dir: &Path, name: &str, memory: &Path) -> Result<(), Failure> {
    if !is_key_name(name) {
        return Err(Failure::usage(format!(
            "{name:?} is not a name of a key: 1 to 255 bytes without spaces and +"
        )));
    }
    let keys = home::open_keys(memory).map_err(failed)?;
    let witness = Witness {
        name,
        keys: &keys,
        memory,
    };
    let cosigned = witness.cosign(&open(dir)?, now() / 1000).map_err(failed)?;
    eprintln!("The key of this witness: {}", keys.log_vkey(name));
    print(&cosigned)
}

fn merge(head: &HeadArgs, args: &TrailArgs, other: &Path) -> Result<(), Failure> {
    let archive = open(other)?;
    let report = verify(&archive, &Options::default()).map_err(failed)?;
    if let Some(finding) = report.findings.first() {
        return Err(failed(format!(
            "{} is not as it was signed: {finding}",
            other.display()
        )));
    }
    let note = Note::parse(archive.published().unwrap_or_default()).map_err(failed)?;
    let (_lock, mut opened) = open_for_writing(head, args)?;
    let number = opened
        .store
        .append(&merge_of(&note.checkpoint), now())
        .map_err(failed)?;
    opened.store.publish(now()).map_err(failed)?;
    let (origin, size) = (&note.checkpoint.origin, note.checkpoint.size);
    print(&format!(
        "record {number} binds {} with {size} records\n",
        plain(origin)
    ))
}

/// Milliseconds since the Unix epoch.
fn now() -> u64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// Folder of the trails in a head's state folder.
const AUDIT: &str = "audit";
const MOST_SHOWN: usize = 50;
const TRIES: u32 = 3;
