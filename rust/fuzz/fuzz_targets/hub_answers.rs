//! What a hub answers and what a user types: a listing, an index of shards, the name of a model.

#![no_main]

use libfuzzer_sys::fuzz_target;
use mesh_hub::{HubName, Repo, choose};

fuzz_target!(|data: &[u8]| {
    let mut parts = data.splitn(3, |&byte| byte == 0);
    let [name, listing, index] = [(); 3].map(|()| parts.next().unwrap_or_default());
    let name = String::from_utf8_lossy(name);
    let parsed = name.parse::<HubName>();
    if let Ok(parsed) = &parsed {
        assert_eq!(parsed.to_string().parse::<HubName>().as_ref().ok(), Some(parsed));
    }
    if let Ok(repo) = Repo::parse(listing, "acme/tiny") {
        for file in &repo.files {
            assert!(!file.path.starts_with('/') && !file.path.split('/').any(|part| part == ".."));
        }
        let which = parsed.ok().and_then(|name| name.which);
        if let Ok(chosen) = choose(&repo, which.as_deref(), Some(index)) {
            assert!(chosen.files().all(|file| repo.files.contains(file)));
        }
    }
});
