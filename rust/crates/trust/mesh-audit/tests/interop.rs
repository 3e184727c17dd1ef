//! The trail by other eyes: a reader of C2SP tiles that has only hashlib, and other implementations of the
//! signatures.

#[allow(dead_code, reason = "each test uses some of it")]
mod common;

use std::process::Command;

use common::{START, append, assert_whole, keys, open};
use data_encoding::BASE64;
use fips204::ml_dsa_44;
use fips204::traits::{SerDes as _, Verifier as _};
use fips205::slh_dsa_sha2_128f;
use fips205::traits::{SerDes as _, Signer as _, Verifier as _};
use mesh_audit::archive::Archive;
use mesh_audit::keys::{KeyKind, Vkey};
use mesh_audit::note::{Checkpoint, Note};
use mesh_audit::witness::{Witness, WitnessError, keep, merge_of, merges};

#[test]
fn an_independent_reader_accepts_the_tiles() {
    let dir = tempfile::tempdir().unwrap();
    let mut store = open(dir.path());
    // More than one tile of level 1, partial ones of all levels.
    append(&mut store, 65_536 + 256 + 17);
    store.publish(START).unwrap();
    let root = BASE64.encode(
        &Note::parse(store.checkpoint().unwrap().as_bytes())
            .unwrap()
            .checkpoint
            .root,
    );
    append(&mut store, 300);
    store.sync(START).unwrap();
    drop(store);
    let exported = tempfile::tempdir().unwrap();
    let size = Archive::open(dir.path())
        .unwrap()
        .export(exported.path())
        .unwrap();
    assert_eq!(size, 66_109, "an export goes to the last signed group");
    assert_whole(exported.path());
    for secret in ["chain.key", "journal"] {
        assert!(!exported.path().join(secret).exists());
    }
    let again = tempfile::tempdir().unwrap();
    Archive::open(exported.path())
        .unwrap()
        .export(again.path())
        .unwrap();
    assert_whole(again.path());
    let check = |dir: &std::path::Path| {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/check_tiles.py");
        Command::new("python3").arg(script).arg(dir).output()
    };
    let Ok(checked) = check(dir.path()) else {
        eprintln!("left out: there is no python3");
        return;
    };
    let told = String::from_utf8(checked.stdout).unwrap();
    assert!(
        checked.status.success(),
        "{}",
        String::from_utf8_lossy(&checked.stderr)
    );
    assert_eq!(told.trim_end(), format!("65809 {root}"));
    let checked = check(again.path()).unwrap();
    assert!(
        checked.status.success(),
        "{}",
        String::from_utf8_lossy(&checked.stderr)
    );
    // The reader notices a changed tile.
    let tile = exported.path().join("tile/0/007");
    let mut bytes = std::fs::read(&tile).unwrap();
    bytes[40] ^= 1;
    std::fs::write(&tile, bytes).unwrap();
    assert!(!check(exported.path()).unwrap().status.success());
}

/// The signature of the only line of a note, behind the key's id.
fn signature(note: &str) -> Vec<u8> {
    let line = note.trim_end().rsplit(' ').next().unwrap();
    BASE64.decode(line.as_bytes()).unwrap()[4..].to_vec()
}

/// The public key in a verifier key.
fn public_key(key: &Vkey, bytes: usize) -> Vec<u8> {
    let text = key.to_string();
    let encoded = text.splitn(3, '+').nth(2).unwrap();
    let with_type = BASE64.decode(encoded.as_bytes()).unwrap();
    with_type[with_type.len() - bytes..].to_vec()
}

fn checkpoint() -> Checkpoint {
    Checkpoint {
        origin: "mesh/audit/test".to_owned(),
        size: 20_852_163,
        root: [5; 32],
    }
}

#[test]
fn a_second_implementation_accepts_the_ml_dsa_signature() {
    let (keys, checkpoint) = (keys(), checkpoint());
    let note = checkpoint.note(&[checkpoint.cosign("mesh/audit/test", &keys, 1_795_910_400)]);
    let key = public_key(&keys.log_vkey("mesh/audit/test"), 1312);
    let key = ml_dsa_44::PublicKey::try_from_bytes(key.try_into().unwrap()).unwrap();
    let signature = signature(&note);
    let (time, signature) = signature.split_at(8);
    let mut message = b"subtree/v1\n\0\x0fmesh/audit/test".to_vec();
    message.extend_from_slice(time);
    message.extend_from_slice(b"\x0fmesh/audit/test\0\0\0\0\0\0\0\0");
    message.extend_from_slice(&checkpoint.size.to_be_bytes());
    message.extend_from_slice(&checkpoint.root);
    let signature: [u8; 2420] = signature.try_into().unwrap();
    assert!(key.verify(&message, &signature, &[]));
    message[20] ^= 1;
    assert!(!key.verify(&message, &signature, &[]));
}

#[test]
fn a_second_implementation_of_slh_dsa_accepts_and_is_accepted() {
    let (keys, checkpoint) = (keys(), checkpoint());
    let note = checkpoint.note(&[checkpoint.sign_epoch("mesh/audit/test", &keys)]);
    let key = public_key(&keys.epoch_vkey("mesh/audit/test"), 32);
    let key = slh_dsa_sha2_128f::PublicKey::try_from_bytes(key.try_into().unwrap()).unwrap();
    let made: [u8; 17_088] = signature(&note).try_into().unwrap();
    let text = checkpoint.text();
    assert!(key.verify(text.as_bytes(), &made, b"hydramesh audit epoch"));
    assert!(!key.verify(text.as_bytes(), &made, b""));
    let (public, secret) = slh_dsa_sha2_128f::try_keygen().unwrap();
    let theirs = secret
        .try_sign(text.as_bytes(), b"hydramesh audit epoch", true)
        .unwrap();
    let vkey = Vkey::new("mesh/audit/test", KeyKind::SlhDsa, &public.into_bytes());
    let line = [&vkey.id()[..], &theirs[..]].concat();
    let line = format!("\u{2014} mesh/audit/test {}\n", BASE64.encode(&line));
    let note = Note::parse(checkpoint.note(&[line]).as_bytes()).unwrap();
    note.verify(&vkey).unwrap();
}

#[test]
fn a_witness_cosigns_a_trail_that_continues_and_no_other() {
    let dir = tempfile::tempdir().unwrap();
    let mut store = open(dir.path());
    append(&mut store, 10);
    store.publish(START).unwrap();
    let memory = tempfile::tempdir().unwrap();
    let secret = mesh_audit::keys::TrailKeys::from_seeds(&[1; 32], &[2; 48]);
    let witness = Witness {
        name: "attic/witness",
        keys: &secret,
        memory: memory.path(),
    };
    let cosign =
        |dir: &std::path::Path| witness.cosign(&Archive::open(dir).unwrap(), 1_795_910_500);
    let cosigned = cosign(dir.path()).unwrap();
    keep(&Archive::open(dir.path()).unwrap(), &cosigned).unwrap();
    append(&mut store, 700);
    store.publish(START).unwrap();
    let later = cosign(dir.path()).unwrap();
    let path = keep(&Archive::open(dir.path()).unwrap(), &later).unwrap();
    drop(store);
    let options = || mesh_audit::verify::Options {
        witnesses: vec![secret.log_vkey("attic/witness")],
        ..Default::default()
    };
    let report = common::report(dir.path(), &options());
    assert_eq!(report.findings, []);
    let seen = |size| ("attic/witness".to_owned(), size);
    assert_eq!(report.witnessed, [seen(10), seen(710)]);
    // Another history under the same name.
    let forged = tempfile::tempdir().unwrap();
    let mut store = open(forged.path());
    for n in 0..800 {
        store.append(&common::request(n + 1), START).unwrap();
    }
    store.publish(START).unwrap();
    drop(store);
    assert!(matches!(
        cosign(forged.path()),
        Err(WitnessError::Inconsistent {
            seen: 710,
            size: 800,
            ..
        })
    ));
    // A cosignature that was changed.
    let changed = later.replacen("attic/witness AAAA", "attic/witness AAAB", 1);
    let changed = if changed == later {
        let at = later.len() - 100;
        let letter = if later.as_bytes()[at] == b'A' {
            "B"
        } else {
            "A"
        };
        format!("{}{letter}{}", &later[..at], &later[at + 1..])
    } else {
        changed
    };
    std::fs::write(path, changed).unwrap();
    let found = common::report(dir.path(), &options()).findings;
    assert_eq!(found.len(), 1, "{found:?}");
}

#[test]
fn after_a_partition_each_trail_binds_the_head_of_the_other() {
    let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let mut first = open(one.path());
    append(&mut first, 20);
    first.publish(START).unwrap();
    let limits = mesh_audit::store::Limits::default();
    let other = mesh_audit::keys::TrailKeys::from_seeds(&[3; 32], &[4; 48]);
    let opened = mesh_audit::store::Store::open(
        two.path(),
        "mesh/audit/other",
        other.into(),
        None,
        limits,
        START,
    );
    let mut second = opened.unwrap().0;
    append(&mut second, 30);
    second.publish(START).unwrap();
    let head = |dir: &std::path::Path| {
        let archive = Archive::open(dir).unwrap();
        Note::parse(archive.published().unwrap())
            .unwrap()
            .checkpoint
    };
    let (first_head, second_head) = (head(one.path()), head(two.path()));
    first.append(&merge_of(&second_head), START).unwrap();
    second.append(&merge_of(&first_head), START).unwrap();
    append(&mut second, 400);
    first.publish(START).unwrap();
    second.publish(START).unwrap();
    drop((first, second));
    let (one, two) = (
        Archive::open(one.path()).unwrap(),
        Archive::open(two.path()).unwrap(),
    );
    assert_eq!(merges(&one, &two).unwrap(), [(20, true)]);
    assert_eq!(merges(&two, &one).unwrap(), [(30, true)]);
    assert_whole(one.dir());
    assert_whole(two.dir());
}
