use std::time::{Duration, UNIX_EPOCH};

use super::*;

fn root(number: u8) -> CertificateDer<'static> {
    CertificateDer::from(vec![number; 40])
}

fn digest(number: u8) -> [u8; 32] {
    sha256(&root(number))
}

fn at(day: u64) -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(1_800_000_000 + day * 86_400)
}

fn succession(former: u8, next: u8, until: u64) -> Succession {
    Succession {
        mesh: "attic".to_owned(),
        former: root(former),
        next: root(next),
        until: unix_seconds(at(until)),
    }
}

fn accepted(roots: &Roots, day: u64) -> Vec<[u8; 32]> {
    roots.accepted(at(day)).map(|root| sha256(root)).collect()
}

#[test]
fn both_roots_are_accepted_for_the_overlap_and_the_newer_one_after_it() {
    let mut roots = Roots::of(root(1));
    assert_eq!(accepted(&roots, 0), [digest(1)]);
    assert_eq!(roots.learn(&succession(1, 2, 30)), Ok(true));
    assert_eq!(roots.learn(&succession(1, 2, 30)), Ok(false));
    assert_eq!(accepted(&roots, 0), [digest(2), digest(1)]);
    assert!(!roots.expire(at(29)));
    assert_eq!(accepted(&roots, 29), [digest(2), digest(1)]);
    assert_eq!(accepted(&roots, 30), [digest(2)]);
    assert!(roots.expire(at(30)) && !roots.expire(at(31)));
    // Tokens that pin the first root are of this mesh all the same.
    assert!(roots.is_of_mesh(&digest(1)) && !roots.is_of_mesh(&digest(3)));
    assert_eq!(roots.learn(&succession(2, 3, 90)), Ok(true));
    assert_eq!(accepted(&roots, 60), [digest(3), digest(2)]);
    assert_eq!(roots.digests(), [digest(3), digest(2), digest(1)]);
}

#[test]
fn a_node_that_joined_under_the_newer_root_accepts_the_former_one_for_the_overlap() {
    let mut roots = Roots::of(root(2));
    assert_eq!(roots.learn(&succession(1, 2, 30)), Ok(true));
    assert_eq!(accepted(&roots, 29), [digest(2), digest(1)]);
    assert_eq!(accepted(&roots, 30), [digest(2)]);
}

#[test]
fn a_replaced_root_makes_no_other_successor() {
    let mut roots = Roots::of(root(1));
    roots.learn(&succession(1, 2, 30)).unwrap();
    // Somebody has the key of the first root.
    for forged in [
        succession(1, 9, 60),
        succession(9, 1, 60),
        succession(8, 9, 60),
    ] {
        let refused = roots.learn(&forged).unwrap_err();
        assert!(
            refused.to_string().contains("join again with a token"),
            "{refused}"
        );
        assert_eq!(accepted(&roots, 0), [digest(2), digest(1)]);
    }
    // Nor does one that a node missed.
    let mut late = Roots::of(root(1));
    assert!(late.learn(&succession(2, 3, 90)).is_err());
    assert_eq!(accepted(&late, 0), [digest(1)]);
}

#[test]
fn a_request_names_an_accepted_root_and_older_nodes_mean_the_one_that_they_know() {
    let mut roots = Roots::of(root(1));
    assert_eq!(roots.named(&[], at(0)), Some(digest(1)));
    roots.learn(&succession(1, 2, 30)).unwrap();
    assert_eq!(roots.named(&[], at(0)), Some(digest(1)));
    assert_eq!(roots.named(&digest(2), at(0)), Some(digest(2)));
    assert_eq!(roots.named(&digest(1), at(29)), Some(digest(1)));
    assert_eq!(roots.named(&[], at(30)), Some(digest(2)));
    for unknown in [&digest(1)[..], &digest(3), &[0; 7]] {
        assert_eq!(roots.named(unknown, at(30)), None);
    }
}

#[test]
fn a_hint_is_a_distinguished_name_in_der() {
    use x509_parser::prelude::{FromDer, X509Name};
    let hint = root_hint(&[0xAB; 32]);
    let (rest, name) = X509Name::from_der(&hint).unwrap();
    assert!(rest.is_empty());
    let common = name.iter_common_name().next().unwrap().as_str().unwrap();
    assert_eq!(common, format!("hydramesh root {}", "ab".repeat(32)));
}
