//! A process that writes into the store is killed, again and again: every range that the store lists is
//! present and right.

use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use mesh_store::store::Begun;
use mesh_store::{Digest, Limits, Manifest, PartialKey, SignedManifest, Store};

/// Length of the file that is written.
const BYTES: usize = 24 << 20;

/// Bytes of one write; not a multiple of any other size.
const CHUNK: usize = 100_003;

/// Names the store's folder to the process that writes.
const WRITER: &str = "HYDRAMESH_TEST_WRITER";

fn contents() -> Vec<u8> {
    (0..BYTES as u32)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8)
        .collect()
}

fn open(root: &Path) -> Store {
    let limits = Limits {
        bytes: None,
        keep_free: 0,
    };
    Store::open_with(root, limits).unwrap()
}

fn manifest(bytes: &[u8]) -> Manifest {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("weights.bin"), bytes).unwrap();
    Manifest::of_files("m", dir.path(), &["weights.bin".into()], &|_| ()).unwrap()
}

/// The process that is killed: fetches the file if it is not there, takes it away if it is.
#[test]
fn writer() {
    let Some(root) = std::env::var_os(WRITER) else {
        return;
    };
    let bytes = contents();
    let store = open(Path::new(&root));
    let manifest = manifest(&bytes);
    let digest = manifest.files[0].sha256;
    println!("begins");
    loop {
        match store.begin(PartialKey::Blob(digest), BYTES as u64, BYTES as u64) {
            Ok(Begun::Whole(_)) => {
                let signed = SignedManifest::unsigned(manifest.clone());
                let fingerprint = store.put_manifest(&signed).unwrap();
                store.name("m", &fingerprint, None).unwrap();
                store.folder(&fingerprint).unwrap();
                drop(store.pin(&fingerprint).unwrap());
                store.remove(&fingerprint).unwrap();
            }
            Ok(Begun::Partial(partial)) => {
                for gap in partial.missing() {
                    let gap = gap.start as usize..gap.end as usize;
                    for start in gap.clone().step_by(CHUNK) {
                        let end = (start + CHUNK).min(gap.end);
                        partial.write_at(start as u64, &bytes[start..end]).unwrap();
                        if start % 7 == 0 {
                            partial.flush().unwrap();
                        }
                    }
                }
                partial.complete().unwrap();
            }
            Err(error) => panic!("{error}"),
        }
    }
}

#[test]
fn twenty_kills_leave_the_store_consistent() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = contents();
    let manifest = manifest(&bytes);
    let file = &manifest.files[0];
    let (mut partly, mut wholly) = (0, 0);
    for kill in 0..20u64 {
        let mut writer = Command::new(std::env::current_exe().unwrap())
            .args(["writer", "--exact", "--nocapture"])
            .env(WRITER, dir.path())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        // Until it is about to begin; the rest is up to the clock.
        let mut out = writer.stdout.take().unwrap();
        let mut said = Vec::new();
        while !said.ends_with(b"begins\n") {
            let mut byte = [0];
            assert_eq!(out.read(&mut byte).unwrap(), 1, "the writer died by itself");
            said.push(byte[0]);
        }
        std::thread::sleep(Duration::from_millis(3 + kill * 37 % 190));
        assert!(
            writer.try_wait().unwrap().is_none(),
            "the writer died by itself"
        );
        writer.kill().unwrap();
        writer.wait().unwrap();

        let store = open(dir.path());
        // Every model that is listed can be read, and every blob is what it is called.
        for model in store.models().unwrap() {
            assert_eq!(model.signed.manifest, manifest);
            assert!(!model.pinned, "the pin went with the process");
        }
        for blob in std::fs::read_dir(dir.path().join("blobs")).unwrap() {
            let blob = blob.unwrap().path();
            let name = blob.file_name().unwrap().to_str().unwrap().to_owned();
            assert_eq!(Digest::of_file(&blob).unwrap().to_string(), name);
            wholly += 1;
        }
        // Whatever counts as present is right.
        let presence = store.presence(&manifest.fingerprint(), file);
        if let Some(path) = presence.path {
            let found = std::fs::read(path).unwrap();
            assert_eq!(found.len(), BYTES);
            for range in presence.have.iter() {
                let range = range.start as usize..range.end as usize;
                assert!(found[range.clone()] == bytes[range.clone()], "{range:?}");
                partly += 1;
            }
        }
        store.gc(None, false).unwrap();
    }
    println!("{partly} ranges and {wholly} whole files were compared");
    assert!(partly > 0, "no kill came while it wrote");

    // And in the end it is fetched as if nothing had been.
    let store = open(dir.path());
    if let Begun::Partial(partial) = store
        .begin(PartialKey::Blob(file.sha256), BYTES as u64, BYTES as u64)
        .unwrap()
    {
        for gap in partial.missing() {
            let data = &bytes[gap.start as usize..gap.end as usize];
            partial.write_at(gap.start, data).unwrap();
        }
        partial.complete().unwrap();
    }
    assert_eq!(
        std::fs::read(store.blob(&file.sha256).unwrap()).unwrap(),
        bytes
    );
}
