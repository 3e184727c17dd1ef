//! Any text is the name of a model or an error; a name on the hub means itself.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mesh_store::{Places, Target, names};

fuzz_target!(|name: &str| {
    // What is a path depends on the machine.
    if name.contains('\0') || std::path::Path::new(name).exists() {
        return;
    }
    let places = Places {
        folders: &[],
        store: None,
    };
    let Ok(resolved) = places.resolve(name) else {
        return;
    };
    let Target::Hub { id } = resolved.target else {
        panic!("{name:?} is neither here nor on the hub: {resolved:?}");
    };
    assert!(!id.chars().any(char::is_control));
    if !names::short_names().contains_key(name) {
        assert_eq!(places.resolve(&id).expect("an id").target, Target::Hub { id });
    }
});
