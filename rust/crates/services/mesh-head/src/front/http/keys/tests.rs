use std::os::unix::fs::PermissionsExt;

use mesh_curtain::Tier;

use super::*;
use crate::sanctum::{Limits, Wanted};

fn load(dir: &Path, file: Option<&Path>) -> Result<Keys, KeysError> {
    let sanctum = Sanctum::open(dir, "home", |_| Vec::new()).unwrap();
    Keys::load(dir, file, Arc::new(sanctum))
}

fn admit(keys: &Keys, headers: &HeaderMap) -> Result<Caller, Denied> {
    let admitted = keys.admit(headers, SystemTime::now());
    admitted.map(|admitted| admitted.caller)
}

fn client(caller: Caller) -> Client {
    Client {
        caller,
        address: None,
        salt: 0,
        papers: Arc::new(Papers::nothing()),
    }
}

fn headers(value: &str) -> HeaderMap {
    let mut headers = HeaderMap::new();
    headers.insert(header::AUTHORIZATION, value.parse().unwrap());
    headers
}

#[test]
fn keys_open_what_they_are_for() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("keys");
    std::fs::write(&file, "# ours\n\nsk-one\n  sk-two \n").unwrap();
    let keys = load(dir.path(), Some(&file)).unwrap();
    let admin = std::fs::read_to_string(dir.path().join(ADMIN_KEY_FILE)).unwrap();
    assert_eq!(admit(&keys, &headers("Bearer sk-one")), Ok(Caller::Key(0)));
    assert_eq!(admit(&keys, &headers("bearer sk-two")), Ok(Caller::Key(1)));
    assert_eq!(
        admit(&keys, &headers(&format!("Bearer {}", admin.trim()))),
        Ok(Caller::Admin)
    );
    assert_eq!(
        admit(&keys, &headers("Bearer sk-three")),
        Err(Denied::Wrong)
    );
    assert_eq!(admit(&keys, &headers("Basic sk-one")), Err(Denied::Missing));
    assert_eq!(admit(&keys, &HeaderMap::new()), Err(Denied::Missing));
}

#[test]
fn keys_that_are_read_again_count_at_once_and_keep_their_numbers() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("keys");
    std::fs::write(&file, "sk-one\nsk-two\n").unwrap();
    let keys = load(dir.path(), Some(&file)).unwrap();
    let shared = keys.clone();
    assert!(!keys.reload(dir.path(), Some(&file)).unwrap());
    std::fs::write(&file, "sk-three\nsk-two\n").unwrap();
    assert!(keys.reload(dir.path(), Some(&file)).unwrap());
    let caller = |key: &str| admit(&shared, &headers(&format!("Bearer {key}")));
    assert_eq!(caller("sk-one"), Err(Denied::Wrong));
    assert_eq!(caller("sk-two"), Ok(Caller::Key(1)));
    assert_eq!(caller("sk-three"), Ok(Caller::Key(2)));
    std::fs::write(&file, "").unwrap();
    assert!(keys.reload(dir.path(), Some(&file)).is_err());
    assert_eq!(caller("sk-two"), Ok(Caller::Key(1)), "the old ones stay");
}

#[test]
fn every_key_has_a_salt_of_its_own_that_another_head_does_not_have() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("keys");
    std::fs::write(&file, "sk-one\nsk-two\n").unwrap();
    let keys = load(dir.path(), Some(&file)).unwrap();
    let admin = std::fs::read_to_string(dir.path().join(ADMIN_KEY_FILE)).unwrap();
    let salt = |keys: &Keys, key: &str| {
        let headers = headers(&format!("Bearer {key}"));
        keys.admit(&headers, SystemTime::now()).unwrap().salt
    };
    let token = || {
        let wanted = Wanted {
            tenant: "lab".to_owned(),
            tier: Tier::default(),
            subject: String::new(),
            rights: "embed".parse().unwrap(),
            life: 60,
            holder: None,
            note: String::new(),
        };
        let now = unix_seconds(SystemTime::now());
        let issued = keys.sanctum.issue(wanted, &Limits::none(), now);
        issued.unwrap().0.to_text()
    };
    let salts = ["sk-one", "sk-two", admin.trim(), &token(), &token()];
    let salts = salts.map(|key| salt(&keys, key));
    for (i, salt) in salts.iter().enumerate() {
        assert!(*salt != 0 && !salts[..i].contains(salt), "{salts:?}");
    }
    assert_eq!(Admitted::anyone().salt, 0);
    assert_eq!(salt(&keys.clone(), "sk-two"), salts[1]);
    let other = load(dir.path(), Some(&file)).unwrap();
    assert_ne!(salt(&other, "sk-one"), salts[0]);
}

#[test]
fn an_entry_limits_its_key_and_ends_it() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("keys");
    let lines = "sk-one tenant=lab rights=embed expires=2030-01-01\nsk-two\n";
    std::fs::write(&file, lines).unwrap();
    let keys = load(dir.path(), Some(&file)).unwrap();
    let at = |day: &str| {
        let seconds = mesh_base::clock::seconds_of_day(day).unwrap();
        SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(seconds)
    };
    let one = headers("Bearer sk-one");
    let admitted = keys.admit(&one, at("2029-12-31")).unwrap();
    assert_eq!(admitted.papers.rights, "embed".parse().unwrap());
    let denied = keys.admit(&one, at("2030-01-01")).unwrap_err();
    assert!(
        matches!(&denied, Denied::Expired { seconds: 0, .. }),
        "{denied}"
    );
    let mut shop = one.clone();
    shop.insert(ORGANIZATION, "shop".parse().unwrap());
    let denied = keys.admit(&shop, at("2029-12-31")).unwrap_err();
    assert!(matches!(denied, Denied::Organization { .. }));
    // A key without an entry is of no tenant.
    shop.insert(header::AUTHORIZATION, "Bearer sk-two".parse().unwrap());
    keys.admit(&shop, at("2029-12-31")).unwrap();
    std::fs::write(&file, "sk-one\n\nsk-secret rihgts=embed\n").unwrap();
    let error = keys
        .reload(dir.path(), Some(&file))
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("line 3") && error.contains("rihgts"),
        "{error}"
    );
    assert!(!error.contains("sk-secret"), "{error}");
}

#[test]
fn a_wrong_token_is_refused_even_where_no_key_is_needed() {
    let dir = tempfile::tempdir().unwrap();
    let keys = load(dir.path(), None).unwrap();
    let wrong = headers("Bearer hydra-cap1.AAAA");
    assert!(matches!(admit(&keys, &wrong), Err(Denied::Token(_))));
    let required = keys.required(true);
    assert!(required.are_needed());
    assert_eq!(admit(&required, &HeaderMap::new()), Err(Denied::Missing));
    assert_eq!(
        admit(&required, &headers("Bearer sk-x")),
        Err(Denied::Wrong)
    );
}

#[test]
fn answers_count_and_not_requests() {
    let concurrency = Arc::new(ConcurrencyLimit::new(8));
    let client = &client(Caller::Key(1));
    let many = concurrency
        .enter(client, 16)
        .expect("alone it may have more than the limit");
    assert!(concurrency.enter(client, 1).is_none());
    drop(many);
    let _some = concurrency.enter(client, 5).unwrap();
    assert!(concurrency.enter(client, 4).is_none());
    assert!(concurrency.enter(client, 3).is_some());
}

#[test]
fn without_api_keys_anyone_may_ask_and_only_the_admin_key_administers() {
    let dir = tempfile::tempdir().unwrap();
    let keys = load(dir.path(), None).unwrap();
    assert_eq!(admit(&keys, &HeaderMap::new()), Ok(Caller::Anyone));
    assert_eq!(
        admit(&keys, &headers("Bearer whatever")),
        Ok(Caller::Anyone)
    );
}

#[test]
fn the_admin_key_is_private_and_stays_the_same() {
    let dir = tempfile::tempdir().unwrap();
    load(dir.path(), None).unwrap();
    let path = dir.path().join(ADMIN_KEY_FILE);
    let key = std::fs::read_to_string(&path).unwrap();
    assert!(key.len() > 40);
    assert_eq!(
        std::fs::metadata(&path).unwrap().permissions().mode() & 0o777,
        0o600
    );
    load(dir.path(), None).unwrap();
    assert_eq!(std::fs::read_to_string(&path).unwrap(), key);
}

#[test]
fn a_damaged_admin_key_is_not_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(ADMIN_KEY_FILE);
    std::fs::write(&path, "\n").unwrap();
    let error = load(dir.path(), None).unwrap_err().to_string();
    assert!(error.contains("admin.key is damaged"), "{error}");
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "\n");
}

#[test]
fn a_client_has_so_many_requests_running_and_no_more() {
    let concurrency = Arc::new(ConcurrencyLimit::new(2));
    let client = |number| client(Caller::Key(number));
    let one = concurrency.enter(&client(1), 1).unwrap();
    let _two = concurrency.enter(&client(1), 1).unwrap();
    assert!(concurrency.enter(&client(1), 1).is_none());
    assert!(concurrency.enter(&client(2), 1).is_some());
    drop(one);
    assert!(concurrency.enter(&client(1), 1).is_some());
    assert_eq!(lock(&concurrency.inside).len(), 1);
    assert!(
        Arc::new(ConcurrencyLimit::new(0))
            .enter(&client(1), 1)
            .is_some()
    );
}

#[test]
fn a_file_without_keys_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("keys");
    std::fs::write(&file, "# none\n").unwrap();
    assert!(matches!(
        load(dir.path(), Some(&file)),
        Err(KeysError::Empty(_))
    ));
}
