//! Tokens that are issued, narrowed, shown, altered.

use std::collections::BTreeSet;
use std::sync::LazyLock;

use coset::cbor::{self, Value};
use coset::iana::Algorithm;
use coset::{CoseSign1, CoseSign1Builder, HeaderBuilder, TaggedCborSerializable as _};
use mesh_curtain::{
    Child, Claims, ClaimsError, DelegationError, Door, Grant, LONGEST_TEXT, LONGEST_TOKEN,
    LinkError, MOST_LINKS, Need, PREFIX, Refusal, Right, Rights, Tier, Token, TokenError, TokenId,
    TooWide,
};
use mesh_identity::{IdentityKey, PublicKey};
use proptest::prelude::*;

fn sanctum() -> IdentityKey {
    IdentityKey::from_seed(&[1; 32])
}

fn holder(number: u8) -> IdentityKey {
    IdentityKey::from_seed(&[100 + number; 32])
}

fn rights(text: &str) -> Rights {
    text.parse().unwrap()
}

fn claims(text: &str) -> Claims {
    Claims {
        issuer: String::new(),
        tenant: "lab".to_owned(),
        tier: Tier::Goodlife,
        subject: "notebook".to_owned(),
        rights: rights(text),
        audience: "home".to_owned(),
        not_before: 1_000,
        expires: 2_000,
        id: TokenId::random(),
        parent: None,
        holder: None,
    }
}

fn child(text: &str) -> Child {
    Child {
        rights: rights(text),
        tier: None,
        subject: "guest".to_owned(),
        not_before: 1_100,
        expires: 1_900,
        holder: None,
    }
}

fn issue(claims: Claims) -> Token {
    Token::issue(claims, &sanctum()).unwrap()
}

fn delegable(text: &str, key: &IdentityKey) -> Token {
    issue(Claims {
        holder: Some(key.public().clone()),
        ..claims(text)
    })
}

fn accept_at(token: &Token, now: u64) -> Result<Grant, Refusal> {
    static ISSUER: LazyLock<PublicKey> = LazyLock::new(|| sanctum().public().clone());
    let door = Door {
        issuer: &ISSUER,
        audience: "home",
        tenant: Some("lab"),
    };
    door.accept(token, now, |_, _| false)
}

fn accept(token: &Token) -> Result<Grant, Refusal> {
    accept_at(token, 1_500)
}

#[test]
fn a_token_allows_what_it_names_and_fits_common_headers() {
    let token = issue(claims("infer:Qwen*,embed"));
    let text = token.to_text();
    assert!(
        text.starts_with(PREFIX) && text.len() < 5_500,
        "{}",
        text.len()
    );
    let read = Token::parse(&text).unwrap();
    assert_eq!(read, token);
    let grant = accept(&read).unwrap();
    assert_eq!(
        (grant.tenant.as_str(), grant.tier, grant.expires),
        ("lab", Tier::Goodlife, 2_000)
    );
    assert_eq!(grant.id(), token.claims().next().unwrap().id);
    assert!(grant.rights.serve(Need::Infer("Qwen3-0.6B")) && !grant.rights.serve(Need::Image));
    assert!(!format!("{token:?}").contains(&text[40..80]));
}

#[test]
fn every_changed_byte_of_a_token_is_noticed() {
    let token = issue(claims("infer:Qwen*,embed"));
    let bytes = token.to_bytes();
    for at in 0..bytes.len() {
        let mut changed = bytes.clone();
        changed[at] ^= 1 << (at % 8);
        if let Ok(read) = Token::from_bytes(&changed) {
            assert!(accept(&read).is_err(), "byte {at}");
        }
    }
    let text = token.to_text();
    for at in (0..text.len()).step_by(7).chain(text.len() - 3..text.len()) {
        let mut changed = text.clone().into_bytes();
        changed[at] = if changed[at] == b'A' { b'B' } else { b'A' };
        let changed = String::from_utf8(changed).unwrap();
        if let Ok(read) = Token::parse(&changed) {
            assert!(accept(&read).is_err(), "character {at}");
        }
    }
    for (cut, longer) in [(&bytes[..bytes.len() - 1], &[][..]), (&bytes[..], &[0][..])] {
        assert!(Token::from_bytes(&[cut, longer].concat()).is_err());
    }
}

#[test]
fn every_changed_byte_of_a_chain_is_noticed() {
    let key = holder(1);
    let token = delegable("infer:*", &key)
        .delegate(child("infer:tiny"), &key)
        .unwrap();
    accept(&token).unwrap();
    let bytes = token.to_bytes();
    // All of them take a while (HYDRAMESH_EVERY_BYTE=1). A stride that is prime reaches all parts; the bytes
    // of one link are all tried above.
    let every = std::env::var_os("HYDRAMESH_EVERY_BYTE").is_some();
    let stride = if every { 1 } else { 11 };
    for at in (0..bytes.len()).step_by(stride) {
        let mut changed = bytes.clone();
        changed[at] ^= 1 << (at % 8);
        if let Ok(read) = Token::from_bytes(&changed) {
            assert!(accept(&read).is_err(), "byte {at}");
        }
    }
}

#[test]
fn a_token_has_one_encoding() {
    let token = issue(claims("embed,image"));
    let bytes = token.to_bytes();
    let Value::Array(parts) = cbor::de::from_reader(&bytes[..]).unwrap() else {
        panic!("a list");
    };
    let link = parts[0].as_bytes().unwrap().clone();
    let rewritten = |change: &dyn Fn(&mut CoseSign1)| {
        let mut cose = CoseSign1::from_tagged_slice(&link).unwrap();
        change(&mut cose);
        let mut bytes = Vec::new();
        let list = Value::Array(vec![Value::Bytes(cose.to_tagged_vec().unwrap())]);
        cbor::ser::into_writer(&list, &mut bytes).unwrap();
        Token::from_bytes(&bytes)
    };
    assert!(rewritten(&|_| {}).is_ok());
    // The unprotected header is not signed, so nothing may stand in it.
    let note = HeaderBuilder::new().key_id(b"x".to_vec()).build();
    let refused = rewritten(&|cose| cose.unprotected = note.clone()).unwrap_err();
    assert!(refused.to_string().contains("not canonical"), "{refused}");
    // A list of indefinite length.
    let indefinite = [&[0x9f], &bytes[1..], &[0xff]].concat();
    assert_eq!(
        Token::from_bytes(&indefinite),
        Err(TokenError::NotCanonical)
    );
    // A length in more bytes than it needs.
    let long = [&bytes[..1], &[0x5a, 0, 0], &bytes[2..]].concat();
    assert_eq!(Token::from_bytes(&long), Err(TokenError::NotCanonical));
    let text = token.to_text();
    for other in [
        format!("{text}="),
        format!(" {text}"),
        text.replacen("hydra", "Hydra", 1),
    ] {
        assert_eq!(Token::parse(&other), Err(TokenError::Text), "{other:.20}");
    }
}

#[test]
fn dates_audience_tenant_and_issuer_are_checked() {
    let token = issue(claims("embed"));
    let id = token.claims().next().unwrap().id;
    assert_eq!(
        accept_at(&token, 999),
        Err(Refusal::NotYet { id, seconds: 1 })
    );
    assert!(accept_at(&token, 1_000).is_ok() && accept_at(&token, 1_999).is_ok());
    assert_eq!(
        accept_at(&token, 2_000),
        Err(Refusal::Expired { id, seconds: 0 })
    );
    let key = sanctum();
    let door = Door {
        issuer: key.public(),
        audience: "office",
        tenant: None,
    };
    assert!(matches!(
        door.accept(&token, 1_500, |_, _| false),
        Err(Refusal::Audience { .. })
    ));
    let door = Door {
        audience: "home",
        tenant: Some("shop"),
        ..door
    };
    assert!(matches!(
        door.accept(&token, 1_500, |_, _| false),
        Err(Refusal::Tenant { .. })
    ));
    let other = holder(9);
    let door = Door {
        issuer: other.public(),
        audience: "home",
        tenant: None,
    };
    assert!(matches!(
        door.accept(&token, 1_500, |_, _| false),
        Err(Refusal::Issuer { .. })
    ));
}

#[test]
fn a_revoked_token_and_all_that_follow_from_it_are_refused() {
    let key = holder(1);
    let parent = delegable("infer:*", &key);
    let token = parent.delegate(child("infer:tiny"), &key).unwrap();
    let ids: Vec<TokenId> = token.claims().map(|claims| claims.id).collect();
    let issuer = sanctum();
    let door = Door {
        issuer: issuer.public(),
        audience: "home",
        tenant: None,
    };
    for revoked in &ids {
        let refused = door.accept(&token, 1_500, |_, id| id == revoked);
        assert_eq!(refused, Err(Refusal::Revoked(*revoked)));
    }
    let seen = std::cell::RefCell::new(Vec::new());
    let grant = door.accept(&token, 1_500, |at, id| {
        seen.borrow_mut().push((at, *id));
        false
    });
    assert_eq!(grant.unwrap().ids, ids);
    assert_eq!(seen.into_inner(), [(0, ids[0]), (1, ids[1])]);
}

#[test]
fn a_link_with_a_holder_key_is_no_bearer_token() {
    let key = holder(1);
    let parent = delegable("infer:*,embed", &key);
    let id = parent.claims().next().unwrap().id;
    assert_eq!(accept(&parent), Err(Refusal::DelegationOnly(id)));
    // Whoever gets the child has the parent's link, and cannot use it alone.
    let token = parent.delegate(child("embed"), &key).unwrap();
    assert_eq!(accept(&token).unwrap().rights, rights("embed"));
    let Value::Array(parts) = cbor::de::from_reader(&token.to_bytes()[..]).unwrap() else {
        panic!("a list");
    };
    let mut alone = Vec::new();
    cbor::ser::into_writer(&Value::Array(vec![parts[0].clone()]), &mut alone).unwrap();
    let alone = Token::from_bytes(&alone).unwrap();
    assert_eq!(accept(&alone), Err(Refusal::DelegationOnly(id)));
    let mut last = Vec::new();
    cbor::ser::into_writer(&Value::Array(vec![parts[1].clone()]), &mut last).unwrap();
    let last = Token::from_bytes(&last).unwrap();
    assert!(matches!(accept(&last), Err(Refusal::Issuer { .. })));
}

#[test]
fn a_child_narrows_and_nothing_else_at_delegation_and_at_the_door() {
    let key = holder(1);
    let parent = delegable("infer:Qwen*,embed", &key);
    let refused = |child: Child| parent.delegate(child, &key).unwrap_err();
    let wide = |error| DelegationError::TooWide(error);
    assert_eq!(refused(child("image")), wide(TooWide::Right(Right::Image)));
    let model = Right::Infer("*".to_owned());
    assert_eq!(refused(child("infer:*")), wide(TooWide::Right(model)));
    assert_eq!(
        refused(Child {
            expires: 2_001,
            ..child("embed")
        }),
        wide(TooWide::Dates)
    );
    assert_eq!(
        refused(Child {
            not_before: 999,
            ..child("embed")
        }),
        wide(TooWide::Dates)
    );
    let master = Child {
        tier: Some(Tier::Master),
        ..child("embed")
    };
    assert_eq!(refused(master), wide(TooWide::Tier(Tier::Master)));
    let error = parent.delegate(child("embed"), &holder(2)).unwrap_err();
    assert_eq!(error, DelegationError::Holder(key.node_id()));
    let bearer = parent.delegate(child("embed"), &key).unwrap();
    assert_eq!(
        bearer.delegate(child("embed"), &key),
        Err(DelegationError::NoHolder)
    );
    // A holder that signs more than it may with a program of its own.
    let narrow = parent
        .delegate(
            Child {
                tier: Some(Tier::GrimoirePublic),
                ..child("embed")
            },
            &key,
        )
        .unwrap();
    assert_eq!(accept(&narrow).unwrap().tier, Tier::GrimoirePublic);
    let honest = narrow.claims().last().unwrap().clone();
    for (forged, error) in [
        (
            Claims {
                rights: rights("admin,embed"),
                tier: Tier::Master,
                ..honest.clone()
            },
            TooWide::Tier(Tier::Master),
        ),
        (
            Claims {
                rights: rights("image"),
                ..honest.clone()
            },
            TooWide::Right(Right::Image),
        ),
        (
            Claims {
                expires: 5_000,
                ..honest.clone()
            },
            TooWide::Dates,
        ),
        (
            Claims {
                tenant: "shop".to_owned(),
                ..honest.clone()
            },
            TooWide::Tenant,
        ),
        (
            Claims {
                audience: "office".to_owned(),
                ..honest.clone()
            },
            TooWide::Audience,
        ),
    ] {
        let token = forge(&parent, forged, &key);
        assert_eq!(accept(&token), Err(Refusal::TooWide { number: 2, error }));
    }
    let orphan = Claims {
        parent: Some([7; 32]),
        ..honest.clone()
    };
    assert_eq!(
        accept(&forge(&parent, orphan, &key)),
        Err(Refusal::Broken(2))
    );
    let stranger = forge(&parent, honest.clone(), &holder(2));
    assert_eq!(accept(&stranger), Err(Refusal::Signature(2)));
}

/// `parent` with a link of any claims, signed by `key`: what a program without these rules would make.
fn forge(parent: &Token, claims: Claims, key: &IdentityKey) -> Token {
    // Issuing writes any claims but the issuer and the parent; those two are patched in the payload.
    let signed = Token::issue(claims.clone(), key).unwrap();
    let Value::Array(parts) = cbor::de::from_reader(&signed.to_bytes()[..]).unwrap() else {
        panic!("a list");
    };
    let cose = CoseSign1::from_tagged_slice(parts[0].as_bytes().unwrap()).unwrap();
    let Value::Map(mut map) = cbor::de::from_reader(&cose.payload.clone().unwrap()[..]).unwrap()
    else {
        panic!("claims");
    };
    map[0].1 = Value::Text(claims.issuer.clone());
    map.push((
        Value::from(-65541),
        Value::Bytes(claims.parent.unwrap().to_vec()),
    ));
    let mut payload = Vec::new();
    cbor::ser::into_writer(&Value::Map(map), &mut payload).unwrap();
    let link = CoseSign1Builder::new()
        .protected(cose.protected.header.clone())
        .payload(payload)
        .create_signature(b"", |data| key.sign(b"", data))
        .build();
    append(parent, link)
}

fn append(parent: &Token, link: CoseSign1) -> Token {
    let Value::Array(mut parts) = cbor::de::from_reader(&parent.to_bytes()[..]).unwrap() else {
        panic!("a list");
    };
    parts.push(Value::Bytes(link.to_tagged_vec().unwrap()));
    let mut bytes = Vec::new();
    cbor::ser::into_writer(&Value::Array(parts), &mut bytes).unwrap();
    Token::from_bytes(&bytes).unwrap()
}

#[test]
fn chains_have_a_bounded_depth_and_size() {
    let keys: Vec<IdentityKey> = (0..5).map(holder).collect();
    let mut token = delegable("infer:*,embed", &keys[0]);
    for at in 1..MOST_LINKS {
        let next = (at + 1 < MOST_LINKS).then(|| keys[at].public().clone());
        token = token
            .delegate(
                Child {
                    holder: next,
                    ..child("embed")
                },
                &keys[at - 1],
            )
            .unwrap();
    }
    let length = token.to_bytes().len();
    assert!(
        length < LONGEST_TOKEN && token.to_text().len() <= LONGEST_TEXT,
        "{length}"
    );
    assert_eq!(accept(&token).unwrap().ids.len(), MOST_LINKS);
    let full = |next: PublicKey| {
        let mut token = delegable("embed", &keys[0]);
        for at in 1..MOST_LINKS {
            let next = Some(keys[at].public().clone());
            token = token
                .delegate(
                    Child {
                        holder: next,
                        ..child("embed")
                    },
                    &keys[at - 1],
                )
                .unwrap();
        }
        token.delegate(
            Child {
                holder: Some(next),
                ..child("embed")
            },
            &keys[MOST_LINKS - 1],
        )
    };
    let refused = full(keys[4].public().clone()).unwrap_err();
    assert_eq!(
        refused,
        DelegationError::Token(TokenError::Links(MOST_LINKS + 1))
    );
    let long = vec![0x80; LONGEST_TOKEN + 1];
    assert_eq!(
        Token::from_bytes(&long),
        Err(TokenError::Length(long.len()))
    );
    let text = format!("{PREFIX}{}", "A".repeat(LONGEST_TEXT));
    assert!(matches!(Token::parse(&text), Err(TokenError::Length(_))));
    assert_eq!(Token::from_bytes(&[0x80]), Err(TokenError::Links(0)));
    let five = [&[0x85][..], &[0x40; 5]].concat();
    assert_eq!(Token::from_bytes(&five), Err(TokenError::Links(5)));
}

#[test]
fn other_algorithms_are_refused_by_name() {
    let token = issue(claims("embed"));
    let Value::Array(parts) = cbor::de::from_reader(&token.to_bytes()[..]).unwrap() else {
        panic!("a list");
    };
    let mut cose = CoseSign1::from_tagged_slice(parts[0].as_bytes().unwrap()).unwrap();
    for (algorithm, name) in [
        (Algorithm::ML_DSA_87, "ML-DSA-87 (COSE algorithm -50)"),
        (Algorithm::ES256, "ES256"),
    ] {
        cose.protected = Default::default();
        cose.protected.header = HeaderBuilder::new().algorithm(algorithm).build();
        let mut bytes = Vec::new();
        let link = cose.clone().to_tagged_vec().unwrap();
        cbor::ser::into_writer(&Value::Array(vec![Value::Bytes(link)]), &mut bytes).unwrap();
        let refused = Token::from_bytes(&bytes).unwrap_err();
        assert!(matches!(
            &refused,
            TokenError::Link {
                error: LinkError::Algorithm(_),
                ..
            }
        ));
        assert!(refused.to_string().contains(name), "{refused}");
    }
    // One that this program's library does not know either.
    let protected = Value::Map(vec![(Value::from(1), Value::from(-4_711))]);
    let mut header = Vec::new();
    cbor::ser::into_writer(&protected, &mut header).unwrap();
    let link = Value::Array(vec![
        Value::Bytes(header),
        Value::Map(vec![]),
        Value::Bytes(vec![]),
        Value::Bytes(vec![]),
    ]);
    let mut bytes = Vec::new();
    cbor::ser::into_writer(&Value::Tag(18, Box::new(link)), &mut bytes).unwrap();
    let mut list = Vec::new();
    cbor::ser::into_writer(&Value::Array(vec![Value::Bytes(bytes)]), &mut list).unwrap();
    let refused = Token::from_bytes(&list).unwrap_err().to_string();
    assert!(
        refused.contains("unknown COSE algorithm -4711"),
        "{refused}"
    );
}

#[test]
fn claims_that_no_token_may_have_are_not_signed() {
    let refused = |claims: Claims| Token::issue(claims, &sanctum()).unwrap_err();
    let admin = refused(claims("admin"));
    assert!(
        matches!(
            admin,
            ClaimsError::Tier {
                right: Right::Admin,
                ..
            }
        ),
        "{admin}"
    );
    assert!(
        Token::issue(
            Claims {
                tier: Tier::Master,
                ..claims("admin")
            },
            &sanctum()
        )
        .is_ok()
    );
    assert_eq!(
        refused(Claims {
            rights: Rights::default(),
            ..claims("embed")
        }),
        ClaimsError::Rights(0)
    );
    let many = (0..33)
        .map(|number| Right::Infer(format!("m{number}")))
        .collect();
    assert_eq!(
        refused(Claims {
            rights: many,
            ..claims("embed")
        }),
        ClaimsError::Rights(33)
    );
    for tenant in ["", "a b", "Ä", &"x".repeat(65)] {
        let tenant = tenant.to_owned();
        assert!(matches!(
            refused(Claims {
                tenant,
                ..claims("embed")
            }),
            ClaimsError::Tenant(_)
        ));
    }
    assert_eq!(
        refused(Claims {
            subject: "a\nb".to_owned(),
            ..claims("embed")
        }),
        ClaimsError::Text("subject")
    );
    assert!(matches!(
        refused(Claims {
            expires: 1_000,
            ..claims("embed")
        }),
        ClaimsError::Dates { .. }
    ));
}

#[test]
fn a_second_implementation_verifies_the_signature_over_the_sig_structure() {
    use fips204::ml_dsa_65;
    use fips204::traits::{SerDes as _, Verifier as _};

    let token = issue(claims("infer:Qwen*,embed"));
    let Value::Array(parts) = cbor::de::from_reader(&token.to_bytes()[..]).unwrap() else {
        panic!("a list");
    };
    let Value::Tag(18, cose) = cbor::de::from_reader(&parts[0].as_bytes().unwrap()[..]).unwrap()
    else {
        panic!("COSE_Sign1");
    };
    let cose = cose.into_array().unwrap();
    let structure = Value::Array(vec![
        Value::Text("Signature1".to_owned()),
        cose[0].clone(),
        Value::Bytes(Vec::new()),
        cose[2].clone(),
    ]);
    let mut signed = Vec::new();
    cbor::ser::into_writer(&structure, &mut signed).unwrap();
    let signature: [u8; 3309] = cose[3].as_bytes().unwrap().clone().try_into().unwrap();
    let key: [u8; 1952] = sanctum().public().as_bytes().try_into().unwrap();
    let key = ml_dsa_65::PublicKey::try_from_bytes(key).unwrap();
    assert!(key.verify(&signed, &signature, b""));
    signed[20] ^= 1;
    assert!(!key.verify(&signed, &signature, b""));
}

fn right() -> impl Strategy<Value = Right> {
    prop_oneof![
        "[ab]{1,2}\\*?".prop_map(Right::Infer),
        Just(Right::Infer("*".to_owned())),
        Just(Right::Embed),
        Just(Right::Image),
        Just(Right::Join),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Whatever a child may do, its parent's rights, dates and tier would have allowed.
    #[test]
    fn no_delegation_widens(
        own in proptest::collection::vec(right(), 1..4),
        asked in proptest::collection::vec(right(), 1..4),
        tier in 0..3_usize,
        (from, to) in (900..1_600_u64, 1_500..2_100_u64),
        model in "[ab]{1,3}",
    ) {
        let key = holder(1);
        let own: Rights = own.into_iter().collect();
        let parent = issue(Claims { rights: own.clone(), holder: Some(key.public().clone()), ..claims("embed") });
        let tier = [Tier::GrimoirePublic, Tier::Goodlife, Tier::Master][tier];
        let asked = Child {
            rights: asked.into_iter().collect(), tier: Some(tier), not_before: from, expires: to, ..child("embed")
        };
        let Ok(token) = parent.delegate(asked, &key) else { return Ok(()) };
        prop_assert!(tier <= Tier::Goodlife && from >= 1_000 && to <= 2_000);
        for now in [999, 1_000, 1_400, 1_599, 1_999, 2_000] {
            let Ok(grant) = accept_at(&token, now) else { continue };
            prop_assert!((1_000..2_000).contains(&now));
            for need in [Need::Infer(&model), Need::Embed, Need::Image, Need::Admin, Need::Join, Need::Overview] {
                prop_assert!(!grant.rights.serve(need) || own.serve(need), "{need}");
            }
        }
    }

    #[test]
    fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        if let Ok(token) = Token::from_bytes(&bytes) {
            prop_assert!(accept(&token).is_err());
        }
        let list = [&[0x81, 0x59, 0x01, 0x00][..], &bytes].concat();
        prop_assert!(Token::from_bytes(&list).is_err());
    }
}

#[test]
fn ids_are_unlike() {
    let ids: BTreeSet<TokenId> = (0..100).map(|_| TokenId::random()).collect();
    assert_eq!(ids.len(), 100);
    let id = *ids.first().unwrap();
    assert_eq!(id.to_string().parse(), Ok(id));
    assert!("AB".parse::<TokenId>().is_err());
}
