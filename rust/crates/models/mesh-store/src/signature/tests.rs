use super::*;
use crate::testing::manifest_of;

fn signed(key: &SigningKey) -> SignedManifest {
    let mut signed = SignedManifest::unsigned(manifest_of("model", b"weights"));
    let signature = key.sign(&signed.manifest);
    signed.add(signature);
    signed
}

#[test]
fn a_policy_lets_pass_what_a_trusted_key_signed() {
    let (key, other) = (SigningKey::generate(), SigningKey::generate());
    let policy = Policy::new(vec![key.public()], true).unwrap();
    let id = key.public().id();
    assert_eq!(
        policy.check(&signed(&key)).unwrap(),
        Verdict::Signed { key: id }
    );

    let lax = Policy::new(vec![key.public()], false).unwrap();
    let unsigned = SignedManifest::unsigned(manifest_of("model", b"weights"));
    assert_eq!(lax.check(&unsigned).unwrap(), Verdict::Unsigned);
    assert_eq!(lax.check(&signed(&other)).unwrap(), Verdict::Stranger);
    for refused in [unsigned, signed(&other)] {
        let error = policy.check(&refused).unwrap_err().to_string();
        let expected = format!(
            "the manifest of \"model\" ({})",
            refused.manifest.fingerprint().short()
        );
        assert!(error.starts_with(&expected), "{error}");
        assert!(error.contains("no signature of a trusted key"), "{error}");
        assert!(error.contains(&id.short()), "{error}");
    }
    let mut both = signed(&other);
    both.add(key.sign(&both.manifest));
    assert_eq!(policy.check(&both).unwrap(), Verdict::Signed { key: id });
    assert!(matches!(
        Policy::new(Vec::new(), true),
        Err(SignatureError::NoTrustedKey)
    ));
}

#[test]
fn a_tampered_signature_or_manifest_is_refused_with_its_name() {
    let key = SigningKey::generate();
    for require in [false, true] {
        let policy = Policy::new(vec![key.public()], require).unwrap();
        let refused = |signed: &SignedManifest| {
            let error = policy.check(signed).unwrap_err().to_string();
            let expected = format!(
                "the signature of key {} does not fit",
                key.public().id().short()
            );
            assert!(error.starts_with(&expected), "{error}");
        };
        let mut tampered = signed(&key);
        for at in [0, 100, SIGNATURE_BYTES - 1] {
            tampered.signatures[0].bytes[at] ^= 1;
            refused(&tampered);
            tampered.signatures[0].bytes[at] ^= 1;
        }
        policy.check(&tampered).unwrap();
        tampered.manifest.name.push('!');
        refused(&tampered);
    }
}

#[test]
fn a_signature_for_something_else_does_not_fit() {
    let key = SigningKey::generate();
    let manifest = manifest_of("model", b"weights");
    let fingerprint = manifest.fingerprint();
    let elsewhere = key.0.expanded_key();
    let elsewhere = elsewhere.sign_deterministic(fingerprint.as_bytes(), b"another context");
    let signature = Signature {
        key: key.public().id(),
        bytes: elsewhere.unwrap().encode().to_vec(),
    };
    assert!(!key.public().verifies(&fingerprint, &signature));
    assert!(key.public().verifies(&fingerprint, &key.sign(&manifest)));
}

#[test]
fn a_signed_manifest_survives_the_network() {
    let key = SigningKey::generate();
    let signed = signed(&key);
    let bytes = signed.to_bytes();
    assert_eq!(SignedManifest::parse(&bytes).unwrap(), signed);
    let text = String::from_utf8(bytes).unwrap();
    for (from, to) in [
        ("\"signatures\":[", "\"signatures\": ["),
        ("\"version\":1", "\"version\":2"),
        ("\"path\":\"weights.bin\"", "\"path\":\"../weights.bin\""),
        ("\"bytes\":\"", "\"bytes\":\"00"),
        ("\"bytes\":\"", "\"bytes\":\"g0"),
        ("\"bytes\":\"", "\"bytes\":\"0"),
    ] {
        assert!(text.contains(from));
        assert!(
            SignedManifest::parse(text.replace(from, to).as_bytes()).is_err(),
            "{to}"
        );
    }
    let mut many = signed;
    many.signatures = vec![many.signatures[0].clone(); 2];
    assert!(SignedManifest::parse(&many.to_bytes()).is_err());
    many.signatures = (0..17u8)
        .map(|i| Signature {
            key: Digest::of([i]),
            bytes: vec![0; SIGNATURE_BYTES],
        })
        .collect();
    assert!(SignedManifest::parse(&many.to_bytes()).is_err());
}

#[test]
fn keys_are_files_that_are_not_overwritten_and_that_others_cannot_read() {
    let dir = tempfile::tempdir().unwrap();
    let (secret, public) = (dir.path().join("key.pem"), dir.path().join("key.pub.pem"));
    let key = SigningKey::generate();
    key.write_new(&secret).unwrap();
    key.public().write_new(&public).unwrap();
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(&secret), mode(&public)), (0o600, 0o644));
    assert!(SigningKey::generate().write_new(&secret).is_err());

    let read = SigningKey::read(&secret).unwrap();
    assert_eq!(read.public().id(), key.public().id());
    assert_eq!(PublicKey::read(&public).unwrap().id(), key.public().id());
    assert!(!format!("{key:?}").contains(&std::fs::read_to_string(&secret).unwrap()[30..60]));

    assert!(matches!(
        SigningKey::read(&public),
        Err(SignatureError::KeyExposed { .. })
    ));
    assert!(matches!(
        PublicKey::read(&secret),
        Err(SignatureError::NotAKey { .. })
    ));
    std::fs::set_permissions(&secret, Permissions::from_mode(0o640)).unwrap();
    let error = SigningKey::read(&secret).unwrap_err().to_string();
    assert!(error.contains("chmod 600"), "{error}");
    let none = dir.path().join("none");
    assert!(matches!(
        PublicKey::read(&none),
        Err(SignatureError::KeyFile { .. })
    ));
    for junk in [
        &b"\xff\xfe"[..],
        b"",
        b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n",
    ] {
        std::fs::write(&none, junk).unwrap();
        assert!(matches!(
            PublicKey::read(&none),
            Err(SignatureError::NotAKey { .. })
        ));
    }
}
