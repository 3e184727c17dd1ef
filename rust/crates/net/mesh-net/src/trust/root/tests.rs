use std::time::{Duration, UNIX_EPOCH};

use mesh_identity::{Document, IdentityKey};
use mesh_proto::RootIdentity;
use rcgen::{BasicConstraints, CertificateParams, IsCa, KeyPair, PKCS_ECDSA_P256_SHA256};

use super::*;
use crate::trust::certificate::{Member, Role, requested_key_id};
use crate::trust::root_identity::verify_root_identity;
use crate::trust::root_keys::distinguished_name;

const DAY: Duration = Duration::from_secs(24 * 3600);

fn request(key: &KeyPair) -> Vec<u8> {
    CertificateParams::default()
        .serialize_request(key)
        .expect("request")
        .der()
        .to_vec()
}

#[test]
fn the_root_is_made_once_and_its_key_is_private() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().expect("temporary directory");
    let state = dir.path().join("head");
    let first = MeshRoot::load_or_create(&state, "attic").expect("created");
    let second = MeshRoot::load_or_create(&state, "other").expect("loaded");
    assert_eq!(first.sha256(), second.sha256());
    assert_eq!(second.mesh(), "attic");
    let mode = |name| {
        std::fs::metadata(state.join(name))
            .expect("there")
            .permissions()
            .mode()
            & 0o777
    };
    assert_eq!(mode(names::ROOT_KEY), 0o600);
    assert_eq!(mode(names::ROOT_CERTIFICATE), 0o644);
}

#[test]
fn damaged_and_mixed_up_roots_are_refused() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let (a, b) = (dir.path().join("a"), dir.path().join("b"));
    MeshRoot::load_or_create(&a, "a").expect("created");
    MeshRoot::load_or_create(&b, "b").expect("created");
    std::fs::copy(b.join(names::ROOT_KEY), a.join(names::ROOT_KEY)).expect("copied");
    let error = MeshRoot::load_or_create(&a, "a")
        .expect_err("mixed up")
        .to_string();
    assert!(error.contains("do not belong together"), "{error}");
    std::fs::write(b.join(names::ROOT_CERTIFICATE), "junk").expect("written");
    let error = MeshRoot::load_or_create(&b, "b")
        .expect_err("damaged")
        .to_string();
    assert!(error.contains("root.crt is damaged"), "{error}");
    std::fs::remove_file(a.join(names::ROOT_KEY)).expect("removed");
    assert!(
        MeshRoot::load_or_create(&a, "a").is_err(),
        "a lost key must not be replaced silently"
    );
}

#[test]
fn a_lost_root_certificate_is_restored_as_it_was_or_not_at_all() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let made = MeshRoot::load_or_create(dir.path(), "a").expect("created");
    let (key, certificate) = (
        dir.path().join(names::ROOT_KEY),
        dir.path().join(names::ROOT_CERTIFICATE),
    );
    let (key_text, certificate_text) = (
        std::fs::read_to_string(&key).expect("there"),
        std::fs::read_to_string(&certificate).expect("there"),
    );
    std::fs::remove_file(&certificate).expect("removed");
    let restored = MeshRoot::load_or_create(dir.path(), "a").expect("restored");
    assert_eq!(restored.sha256(), made.sha256(), "tokens pin it");
    let again = MeshRoot::load_or_create(dir.path(), "a").expect("loaded");
    assert_eq!(again.sha256(), made.sha256());

    // A key of an earlier version has no copy of the certificate.
    let old = KeyPair::from_pem(&key_text).expect("a key").serialize_pem();
    std::fs::write(&key, &old).expect("written");
    std::fs::write(&certificate, certificate_text).expect("written");
    let error = MeshRoot::load_or_create(dir.path(), "a")
        .expect_err("half of the key is missing")
        .to_string();
    assert!(
        error.contains("root.key is damaged: the ML-DSA key"),
        "{error}"
    );
    std::fs::remove_file(&certificate).expect("removed");
    let error = MeshRoot::load_or_create(dir.path(), "a")
        .expect_err("refused")
        .to_string();
    for part in ["root.crt is missing", "root.key is there", "of any worker"] {
        assert!(error.contains(part), "{part} is not in {error}");
    }
    assert!(!certificate.exists(), "nothing is made");
    assert_eq!(std::fs::read_to_string(&key).expect("there"), old);
}

#[test]
fn no_root_is_made_beside_what_is_left_of_a_mesh() {
    for left in [
        names::NODE_KEY,
        names::NODE_CERTIFICATE,
        names::TOKENS,
        names::MEMBERS,
        names::EXPELLED,
    ] {
        let dir = tempfile::tempdir().expect("temporary directory");
        std::fs::write(dir.path().join(left), "x").expect("written");
        let error = MeshRoot::load_or_create(dir.path(), "a")
            .expect_err("refused")
            .to_string();
        assert!(
            error.contains("root.key is missing") && error.contains(left),
            "{error}"
        );
        let files = std::fs::read_dir(dir.path()).expect("listed").count();
        assert_eq!(files, 1, "nothing is made");
    }
    let dir = tempfile::tempdir().expect("temporary directory");
    std::fs::write(dir.path().join(names::ROOT_KEY), "").expect("written");
    let error = MeshRoot::load_or_create(dir.path(), "a").expect_err("refused");
    assert!(error.to_string().contains("root."), "{error}");
}

#[test]
fn certificates_say_what_the_root_decides() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let root = MeshRoot::load_or_create(dir.path(), "attic").expect("created");
    let key = KeyPair::generate().expect("key");
    let now = UNIX_EPOCH + Duration::from_secs(1_800_000_000);
    let identity = IdentityKey::generate();
    let request = request(&key);
    let subject = Subject {
        request: &request,
        name: "laptop-7",
        role: Role::Worker,
        identity: Some(identity.public()),
    };
    let issued = root
        .issue(&subject, &Validity::default(), now)
        .expect("issued");
    assert_eq!(issued.certificates[1], *root.certificate());
    let signer = verify_root_identity(root.certificate(), &issued.root).expect("the root's");
    let document = Document::verify(&issued.document, &signer).expect("signed");
    assert_eq!(document.key, *identity.public());
    assert!(document.is_valid_at(unix_seconds(now + 36 * DAY)));
    let member = Member::from_certificate(&issued.certificates[0]).expect("readable");
    let expected = Member {
        node_id: identity.node_id().to_string(),
        key_id: requested_key_id(&request).expect("readable"),
        name: "laptop-7".into(),
        role: Role::Worker,
        mesh: "attic".into(),
        not_before: now - DAY,
        not_after: now + 7 * DAY,
    };
    assert_eq!(member, expected);
    assert!(
        member.is_valid_at(now)
            && !member.is_valid_at(now + 7 * DAY)
            && !member.is_valid_at(now - 2 * DAY)
    );
}

#[test]
fn hostile_requests_and_names_are_refused() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let root = MeshRoot::load_or_create(dir.path(), "attic").expect("created");
    let good = request(&KeyPair::generate().expect("key"));
    let now = SystemTime::now();
    let issue = |request: &[u8], name: &str| {
        let subject = Subject {
            request,
            name,
            role: Role::Worker,
            identity: None,
        };
        root.issue(&subject, &Validity::default(), now)
    };
    for name in ["", "a b", "a\n", "ä", &"x".repeat(64)] {
        assert!(
            matches!(issue(&good, name), Err(TrustError::Name(_))),
            "{name:?}"
        );
    }
    for cut in 0..good.len() {
        assert!(issue(&good[..cut], "n").is_err(), "cut at {cut}");
    }
    for at in 0..good.len() {
        let mut flipped = good.clone();
        flipped[at] ^= 1;
        // The signature covers the request; a flip elsewhere is either refused or changes nothing we use.
        let _ = issue(&flipped, "n");
    }
    let last = good.len() - 1;
    let mut forged = good;
    forged[last] ^= 1;
    assert!(matches!(issue(&forged, "n"), Err(TrustError::Request(_))));
}

#[test]
fn a_root_of_an_earlier_version_gets_an_ml_dsa_key_that_its_certificate_vouches_for() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).expect("key");
    let mut params = CertificateParams::default();
    params.distinguished_name = distinguished_name("root of attic", "root", "attic");
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    let certificate = params.self_signed(&key).expect("signed");
    let key_path = dir.path().join(names::ROOT_KEY);
    std::fs::write(&key_path, key.serialize_pem()).expect("written");
    let path = dir.path().join(names::ROOT_CERTIFICATE);
    std::fs::write(&path, certificate.pem()).expect("written");

    let root = MeshRoot::load_or_create(dir.path(), "attic").expect("loads");
    assert_eq!(root.sha256(), sha256(certificate.der()), "tokens pin it");
    let verified = verify_root_identity(root.certificate(), &root.keys.claim);
    assert_eq!(&verified.expect("vouched for"), root.identity());
    let again = MeshRoot::load_or_create(dir.path(), "attic").expect("loads");
    assert_eq!(again.identity(), root.identity());
    // Earlier versions read the first key of the file.
    let text = std::fs::read_to_string(&key_path).expect("there");
    let first = KeyPair::from_pem(&text).expect("a key");
    assert_eq!(first.serialize_der(), key.serialize_der());

    let mut forged = root.keys.claim.clone();
    forged.public_key = IdentityKey::generate().public().as_bytes().to_vec();
    assert!(verify_root_identity(root.certificate(), &forged).is_err());
    let unsigned = RootIdentity {
        voucher: Vec::new(),
        ..root.keys.claim.clone()
    };
    assert!(verify_root_identity(root.certificate(), &unsigned).is_err());
}

#[test]
fn sealed_keys_are_used_and_never_changed() {
    let dirs = [(); 2].map(|()| tempfile::tempdir().expect("temporary directory"));
    let [dir, credentials] = dirs.each_ref().map(tempfile::TempDir::path);
    let made = MeshRoot::load_or_create(dir, "attic").expect("created");
    let sealed = credentials.join(names::ROOT_CREDENTIAL);
    std::fs::rename(dir.join(names::ROOT_KEY), &sealed).expect("moved");
    let text = std::fs::read_to_string(&sealed).expect("there");
    let root = MeshRoot::sealed(dir, &sealed).expect("loads");
    assert_eq!(
        (root.sha256(), root.mesh()),
        (made.sha256(), "attic"),
        "the root of before"
    );
    let now = SystemTime::now();
    let refused = root.rotate(dir, now + DAY, now).expect_err("sealed");
    assert!(refused.to_string().contains("`root-key`"), "{refused}");
    // The certificate is made anew from the copy; the keys stay out of the state directory.
    std::fs::remove_file(dir.join(names::ROOT_CERTIFICATE)).expect("removed");
    let again = MeshRoot::sealed(dir, &sealed).expect("loads");
    assert_eq!(again.sha256(), made.sha256());
    assert!(!dir.join(names::ROOT_KEY).exists());
    assert_eq!(std::fs::read_to_string(&sealed).expect("there"), text);
    // One that was sealed during a rotation is good for the new root afterwards.
    let rotated = made.rotate(dir, now + DAY, now).expect("rotated");
    std::fs::rename(dir.join(names::ROOT_KEY), &sealed).expect("moved");
    let root = MeshRoot::sealed(dir, &sealed).expect("loads");
    assert!(root.former(now).is_some());
    let alone = root
        .without_former(dir, now + DAY)
        .expect("nothing to write");
    let alone = alone.expect("its time is over");
    assert_eq!(alone.sha256(), rotated.sha256());
    assert!(!dir.join(names::ROOT_KEY).exists());
    std::fs::write(&sealed, "").expect("written");
    let error = MeshRoot::sealed(dir, &sealed)
        .expect_err("empty")
        .to_string();
    assert!(error.contains("seal the root.key"), "{error}");
}
