use std::time::UNIX_EPOCH;

use super::*;
use mesh_net::trust::Vouched;

use crate::news::EvidenceDecision;

const DAY: Duration = Duration::from_secs(86_400);

/// 2026-11-29.
fn today() -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(1_795_910_400)
}

fn authority(dir: &Path) -> Attestor {
    Attestor::open(dir, "attic", Validity::default()).expect("authority")
}

/// A worker that joined when the head's clock said `then`.
fn worker(authority: &Attestor, dir: &Path, then: SystemTime) -> NodeIdentity {
    let token = authority.create_token(DAY, "", then).expect("token");
    let applicant = Applicant::open(dir).expect("keys");
    let request = applicant.request().expect("request");
    let ask = JoinAsk {
        token_id: &token.id(),
        token_secret: token.secret(),
        request: &request,
        node_name: "laptop",
        identity: applicant.public_key(),
        root: authority.root().sha256(),
        evidence: None,
    };
    let issued = authority.join(&ask, then).expect("joined");
    let deny_list = DenyList::open(dir).expect("empty");
    NodeIdentity::store(dir, applicant, issued, deny_list).expect("stored")
}

#[test]
fn a_readmitted_node_does_not_make_two_of_one_name() {
    let dirs = [(); 3].map(|()| tempfile::tempdir().expect("temporary directory"));
    let [at_head, first, second] = dirs.each_ref().map(tempfile::TempDir::path);
    let head = authority(at_head);
    let first = worker(&head, first, today());
    let first = &*first.node_id();
    let expel = |head: &Attestor, id: &str| head.expel(id, "laptop", "", today());
    expel(&head, first).expect("kept");
    // A machine that takes its place may have its name.
    let second = worker(&head, second, today());
    assert_eq!(second.member().name, "laptop");
    let head = authority(at_head);
    let error = head.readmit(first).expect_err("its name is taken");
    let TrustError::NameTaken { holder, .. } = &error else {
        panic!("{error}");
    };
    assert_eq!(*holder, second.node_id());
    assert!(head.deny_list().contains(first));
    expel(&head, &second.node_id()).expect("kept");
    assert!(head.members().is_empty());
    head.readmit(first).expect("free").expect("it was expelled");
    // Before it has connected again.
    let head = authority(at_head);
    assert_eq!(head.members()[first].name, "laptop");
    let third = tempfile::tempdir().expect("temporary directory");
    let third = worker(&head, third.path(), today());
    assert_eq!(third.member().name, "laptop-2");
    assert!(head.readmit(&second.node_id()).is_err());
}

#[test]
fn names_are_still_taken_when_the_roster_is_lost() {
    let dirs = [(); 3].map(|()| tempfile::tempdir().expect("temporary directory"));
    let [at_head, first, second] = dirs.each_ref().map(tempfile::TempDir::path);
    worker(&authority(at_head), first, today());
    std::fs::remove_file(at_head.join(MEMBERS_FILE)).expect("removed");
    let second = worker(&authority(at_head), second, today());
    assert_eq!(second.member().name, "laptop-2");
}

fn renew(authority: &Attestor, worker: &NodeIdentity, now: SystemTime) -> Result<(), Refusal> {
    let request = worker.request().expect("request");
    let (member, key) = (worker.member(), worker.public_key());
    let ask = RenewAsk {
        member: &member,
        request: &request,
        identity: key.as_ref(),
        successor: None,
        root: worker.root_sha256(),
        evidence: None,
    };
    worker
        .install(authority.renew(&ask, now)?)
        .expect("installed");
    assert!(worker.member().is_valid_at(now) && !worker.is_renewal_due(now));
    Ok(())
}

#[test]
fn a_head_that_started_with_a_wrong_clock_issues_itself_a_new_certificate() {
    for wrong in [
        today() + 730 * DAY,
        today() - 90 * DAY,
        UNIX_EPOCH,
        UNIX_EPOCH + Duration::from_secs(253_402_300_000),
    ] {
        let dir = tempfile::tempdir().expect("temporary directory");
        let head = authority(dir.path());
        let then = head
            .head_identity(dir.path(), "head", wrong)
            .expect("issued");
        assert!(then.member().is_valid_at(wrong), "{wrong:?}");
        let restarted = authority(dir.path());
        let now = restarted
            .head_identity(dir.path(), "head", today())
            .expect("issued");
        assert!(
            now.member().is_valid_at(today()),
            "{}",
            now.member().dates()
        );
        assert_eq!(now.root_sha256(), then.root_sha256(), "tokens pin the root");
        assert_eq!(now.node_id(), then.node_id());
    }
}

#[test]
fn a_certificate_from_a_time_when_the_heads_clock_was_wrong_is_renewed() {
    for wrong in [
        today() + 730 * DAY,
        UNIX_EPOCH + DAY / 2,
        today() - 90 * DAY,
    ] {
        let (head, node) = (
            tempfile::tempdir().expect("dir"),
            tempfile::tempdir().expect("dir"),
        );
        let running = authority(head.path());
        let worker = worker(&running, node.path(), wrong);
        assert!(!worker.member().is_valid_at(today()));
        assert!(worker.is_renewal_due(today()));
        renew(&running, &worker, today()).expect("renewed");
    }
}

#[test]
fn after_a_restart_too_unless_only_the_nodes_absence_explains_it() {
    for (wrong, renewed) in [
        (today() + 730 * DAY, true),
        (UNIX_EPOCH + DAY / 2, true),
        (today() - 20 * DAY, true),
        (today() - 90 * DAY, false),
    ] {
        let (head, node) = (
            tempfile::tempdir().expect("dir"),
            tempfile::tempdir().expect("dir"),
        );
        let worker = worker(&authority(head.path()), node.path(), wrong);
        let verdict = renew(&authority(head.path()), &worker, today());
        assert_eq!(
            verdict.is_ok(),
            renewed,
            "{}: {verdict:?}",
            worker.member().dates()
        );
        if let Err(refusal) = verdict {
            let text = refusal.to_string();
            for part in ["laptop", "2026-11-29", "the head's clock", "token create"] {
                assert!(text.contains(part), "{part} is not in {text}");
            }
        }
    }
}

#[test]
fn the_heads_own_certificate_is_always_renewed() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let head = authority(dir.path());
    let own = head
        .head_identity(dir.path(), "head", today())
        .expect("issued");
    for now in [today() + 3_650 * DAY, today() - 300 * DAY, today()] {
        renew(&head, &own, now).expect("renewed");
    }
}

#[test]
fn the_key_of_a_certificate_alone_renews_nothing() {
    let dirs = [(); 2].map(|()| tempfile::tempdir().expect("dir"));
    let [at_head, at_node] = dirs.each_ref().map(tempfile::TempDir::path);
    let head = authority(at_head);
    let worker = worker(&head, at_node, today());
    let (member, request) = (worker.member(), worker.request().expect("request"));
    let other = mesh_identity::IdentityKey::generate();
    let ask = |identity, successor| {
        let ask = RenewAsk {
            member: &member,
            request: &request,
            identity,
            successor,
            root: worker.root_sha256(),
            evidence: None,
        };
        head.renew(&ask, today())
    };
    for (identity, successor) in [
        (None, None),
        (Some(other.public()), None),
        (None, Some(other.public())),
    ] {
        let refused = ask(identity, successor).expect_err("refused");
        assert!(matches!(refused, Refusal::NotAdmitted(_)), "{refused:?}");
    }
    assert!(!head.deny_list().contains(&member.node_id));
    ask(worker.public_key().as_ref(), None).expect("renewed");

    // Another key for the certificate comes with another identity only.
    let elsewhere = tempfile::tempdir().expect("dir");
    let foreign = Applicant::open(elsewhere.path()).expect("keys");
    let request = foreign.request().expect("request");
    let key = worker.public_key();
    let ask = RenewAsk {
        member: &member,
        request: &request,
        identity: key.as_ref(),
        successor: None,
        root: worker.root_sha256(),
        evidence: None,
    };
    let refused = head.renew(&ask, today()).expect_err("refused");
    assert!(matches!(refused, Refusal::Invalid(_)), "{refused:?}");
}

#[test]
fn files_hold_no_secret_are_private_and_damaged_ones_are_named_and_not_replaced() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().expect("temporary directory");
    let token = authority(dir.path()).create_token(DAY, "", today());
    let token = token.expect("created");
    let path = dir.path().join(TOKENS_FILE);
    let text = std::fs::read_to_string(&path).expect("readable");
    let hex: String = token
        .secret()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    assert!(text.contains(&token.id()) && !text.contains(&hex));
    let mode = std::fs::metadata(&path)
        .expect("there")
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600);
    std::fs::write(&path, "[{").expect("written");
    let opened = Attestor::open(dir.path(), "attic", Validity::default());
    let error = opened.expect_err("damaged").to_string();
    assert!(error.contains("tokens.json is damaged"), "{error}");
}

#[test]
fn a_member_that_rotates_its_identity_again_and_again_does_not_fill_the_list() {
    let dirs = [(); 2].map(|()| tempfile::tempdir().expect("dir"));
    let [at_head, at_node] = dirs.each_ref().map(tempfile::TempDir::path);
    let head = authority(at_head);
    let first = worker(&head, at_node, today());
    let (mut member, mut key) = (first.member(), None);
    let request = first.request().expect("request");
    let mut rotate = |now: SystemTime| {
        let present = key.clone().or_else(|| first.public_key());
        let next = mesh_identity::IdentityKey::generate().public().clone();
        let ask = RenewAsk {
            member: &member,
            request: &request,
            identity: present.as_ref(),
            successor: Some(&next),
            root: first.root_sha256(),
            evidence: None,
        };
        let issued = head.renew(&ask, now)?;
        let certificate = &issued.certificates[0];
        member = Member::from_certificate(certificate)
            .expect("readable")
            .into();
        key = Some(next);
        Ok::<_, Refusal>(())
    };
    let minute = Duration::from_secs(60);
    rotate(today()).expect("once");
    let refused = rotate(today() + minute).expect_err("at once again");
    assert!(
        refused.to_string().contains("rotated 60 s ago"),
        "{refused}"
    );
    rotate(today() + 60 * minute).expect("an hour later");
    assert_eq!(head.deny_list().list().len(), 2);
    // The certificate is renewed meanwhile.
    rotate(today() + 6 * DAY).expect("later");
    rotate(today() + 12 * DAY).expect("later");
    for day in [18, 24, 30, 36, 42] {
        rotate(today() + day * DAY).expect("later");
    }
    let left = head.deny_list().list();
    assert_eq!(
        left.len(),
        7,
        "those whose certificates have ended are forgotten"
    );
    head.expel(&member.node_id, "laptop", "", today())
        .expect("there is room");
}

/// Encoded evidence of a machine with this system.
fn evidence(os_version: &str) -> Vec<u8> {
    use prost::Message as _;
    let said = mesh_proto::Evidence {
        form: 1,
        os: "debian".to_owned(),
        os_version: os_version.to_owned(),
        ..mesh_proto::Evidence::default()
    };
    said.encode_to_vec()
}

#[test]
fn evidence_and_what_waits_for_approval_survive_a_restart_and_a_new_certificate() {
    let (at_head, node) = (
        tempfile::tempdir().expect("dir"),
        tempfile::tempdir().expect("dir"),
    );
    let open = || {
        authority(at_head.path()).with_evidence_policy(EvidencePolicy {
            on_change: crate::OnChange::Approve,
            watched: vec![crate::Field::Os],
            ..EvidencePolicy::default()
        })
    };
    let head = open();
    let worker = worker(&head, node.path(), today());
    let id = worker.node_id();
    head.report(
        &worker.member(),
        Some(Vouched::unquoted(&evidence("12"))),
        today(),
    )
    .expect("the first one");
    let refused = head.report(
        &worker.member(),
        Some(Vouched::unquoted(&evidence("13"))),
        today(),
    );
    assert!(
        matches!(refused, Err(Refusal::AwaitingApproval(_))),
        "{refused:?}"
    );
    let head = open();
    let held = |head: &Attestor| head.members()[&id].evidence.clone().expect("kept").held;
    assert_eq!(held(&head).expect("waits").since, unix_seconds(today()));
    // An earlier version of the node sends none, which is a change.
    let renewed = renew(&head, &worker, today());
    assert!(
        matches!(renewed, Err(Refusal::AwaitingApproval(_))),
        "{renewed:?}"
    );
    head.report(
        &worker.member(),
        Some(Vouched::unquoted(&evidence("13"))),
        today(),
    )
    .expect_err("waits still");
    assert_eq!(head.approve(&id).expect("it waits").name, "laptop");
    assert!(matches!(
        head.approve(&id),
        Err(EnrolmentError::NotPending(_))
    ));
    let head = open();
    head.report(
        &worker.member(),
        Some(Vouched::unquoted(&evidence("13"))),
        today(),
    )
    .expect("approved");
    let record = head.members()[&id].evidence.clone().expect("kept");
    assert_eq!(record.evidence.os_version, "13");
    assert!(record.held.is_none());
    let news: Vec<EvidenceDecision> = head
        .take_evidence_news()
        .into_iter()
        .map(|news| news.decision)
        .collect();
    assert_eq!(news, [], "nothing has changed");
}

#[test]
fn unreadable_evidence_is_refused_and_changes_nothing() {
    let (at_head, node) = (
        tempfile::tempdir().expect("dir"),
        tempfile::tempdir().expect("dir"),
    );
    let head = authority(at_head.path());
    let worker = worker(&head, node.path(), today());
    let good = evidence("12");
    head.report(&worker.member(), Some(Vouched::unquoted(&good)), today())
        .expect("read");
    let before = head.members();
    for bytes in [&[0xFF; 9][..], &[], &[8, 2], &good[..good.len() - 1]] {
        let refused = head.report(&worker.member(), Some(Vouched::unquoted(bytes)), today());
        assert!(matches!(refused, Err(Refusal::Evidence(_))), "{refused:?}");
    }
    assert_eq!(head.members(), before);
    let news = head.take_evidence_news();
    assert_eq!(news[0].decision, EvidenceDecision::First);
    assert_eq!(news[1].decision, EvidenceDecision::Refused);
}

#[test]
fn a_node_that_waits_is_approved_as_it_was_shown() {
    let (at_head, node) = (
        tempfile::tempdir().expect("dir"),
        tempfile::tempdir().expect("dir"),
    );
    let head = authority(at_head.path())
        .with_approval(Approval::Manual)
        .with_evidence_policy(EvidencePolicy {
            watched: vec![crate::Field::Os],
            ..EvidencePolicy::default()
        });
    let token = head.create_token(DAY, "", today()).expect("token");
    let applicant = Applicant::open(node.path()).expect("keys");
    let request = applicant.request().expect("request");
    let ask = |os_version: &str| {
        let evidence = evidence(os_version);
        let ask = JoinAsk {
            token_id: &token.id(),
            token_secret: token.secret(),
            request: &request,
            node_name: "laptop",
            identity: applicant.public_key(),
            root: head.root().sha256(),
            evidence: Some(Vouched::unquoted(&evidence)),
        };
        head.join(&ask, today())
    };
    ask("12").expect_err("it waits");
    let id = head.pending().into_keys().next().expect("one waits");
    head.approve(&id).expect("approved");
    ask("13").expect_err("that is not what was approved");
    ask("12").expect_err("it is to be approved again");
    head.approve(&id).expect("approved");
    ask("12").expect("admitted");
    let known = &head.members()[&id];
    let record = known.evidence.as_ref().expect("kept");
    assert_eq!(record.evidence.os_version, "12");
}
