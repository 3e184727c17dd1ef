//! No bytes in the files of an audit trail make a reader panic, and what can be read is written back as it was.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mesh_audit::keys::{PublicKeys, TrailKeys};
use mesh_audit::note::Note;
use mesh_audit::proof::Proof;
use mesh_audit::record::{self, Record};
use mesh_audit::tiles::{bundle, unbundle};

fuzz_target!(|data: &[u8]| {
    let (entries, end) = unbundle(data);
    let owned: Vec<Vec<u8>> = entries.iter().map(|(_, entry)| entry.to_vec()).collect();
    assert_eq!(bundle(&owned), data[..end]);
    for entry in &owned {
        if let Ok((text, mac)) = record::split(entry) {
            let _ = Record::read(text);
            let _ = record::event(text);
            assert_eq!(record::entry(text.to_vec(), &mac), *entry);
        }
    }
    let _ = Note::parse(data);
    if let Ok(text) = std::str::from_utf8(data) {
        if let Ok(proof) = Proof::parse(text) {
            assert_eq!(proof.to_text(), text);
        }
        if let Ok(keys) = PublicKeys::read(text) {
            assert_eq!(keys.to_text(), text);
        }
        let _ = TrailKeys::from_text(text);
    }
});
