use super::*;

#[test]
fn a_ring_is_formed_when_offers_were_quiet_and_serves_when_its_driver_says_so() {
    let mut mesh = Mesh::new(|_| {});
    mesh.join("a", 7);
    mesh.pass(1.5);
    mesh.join("b", 7);
    mesh.pass(1.5);
    assert!(mesh.told.is_empty(), "the second offer began the wait anew");
    assert_eq!(mesh.rings.prospects()[MODEL], Prospect::Coming);
    mesh.pass(0.5);
    let ring = mesh.id();
    assert_eq!((mesh.ring().epoch, &*mesh.ring().state), (1, "forming"));
    assert_eq!(mesh.told.len(), 2, "both members were told");
    for told in mesh.told.values() {
        assert_eq!(
            (told.model.as_str(), told.fingerprint.as_str(), told.slots),
            (MODEL, "f", 1)
        );
        assert_eq!(told.stages.len(), 2);
        assert!(told.kv_tokens >= 1024);
        assert!(told.stages.iter().all(|stage| {
            stage
                .member
                .as_ref()
                .unwrap()
                .address
                .starts_with("127.0.0.1:70")
        }));
    }
    for node in ["a", "b"] {
        mesh.ready(node, ring);
    }
    assert!(mesh.serving.is_empty(), "loaded is not served");
    mesh.serves(ring);
    let driver = mesh.members()[1].clone();
    assert_eq!(
        mesh.serving,
        BTreeMap::from([((driver, MODEL.to_owned()), ring)])
    );
    assert!(mesh.rings.prospects().is_empty());
    mesh.check();
}

#[test]
fn the_next_timer_is_when_the_ring_is_formed() {
    let mut mesh = Mesh::new(|_| {});
    assert_eq!(mesh.rings.next_timer(), None);
    mesh.join("a", 7);
    mesh.join("b", 7);
    let due = mesh.rings.next_timer().unwrap();
    assert_eq!(due, mesh.now + Duration::from_secs(2));
    mesh.now = due;
    mesh.poll();
    assert_eq!(mesh.ring().state, "forming");
    assert!(
        mesh.rings.next_timer().unwrap() > due,
        "until it takes too long"
    );
    mesh.all_work();
    assert_eq!(mesh.rings.next_timer(), None);
}

#[test]
fn offers_that_never_rest_do_not_put_a_ring_off_for_ever() {
    let mut mesh = Mesh::new(|_| {});
    mesh.join("a", 20);
    for turn in 0..22 {
        mesh.pass(1.0);
        mesh.offer("a", 20 + 10 * (turn % 2), |_| {});
    }
    assert_eq!(mesh.ring().state, "forming");
}

#[test]
fn a_model_that_a_worker_serves_whole_gets_a_ring_only_if_that_is_asked_for() {
    for always in [false, true] {
        let mut mesh = Mesh::new(|settings| settings.always = always);
        let arrival = Arrival {
            name: "replica".into(),
            whole: vec![MODEL.into()],
            head_ip: None,
        };
        mesh.rings.joined("r", arrival, mesh.now);
        mesh.join("a", 7);
        mesh.join("b", 7);
        mesh.pass(2.0);
        assert_eq!(mesh.rings.view(mesh.now).len(), usize::from(always));
        if !always {
            mesh.leave(&["r"]);
            mesh.pass(2.0);
            assert_eq!(
                mesh.rings.view(mesh.now).len(),
                1,
                "now nobody serves it whole"
            );
        }
    }
}

#[test]
fn without_a_plan_the_reason_is_kept_and_the_next_offer_tries_again() {
    let logs = Logs::capture();
    let mut mesh = Mesh::new(|_| {});
    mesh.join("a", 7);
    mesh.pass(2.0);
    let Prospect::Impossible(reason) = mesh.rings.prospects()[MODEL].clone() else {
        panic!("a plan for 12 layers on 7");
    };
    assert!(reason.contains("add a node"), "{reason}");
    assert!(mesh.rings.plan(MODEL, mesh.now).is_err());
    mesh.pass(5.0);
    let told = logs.text().matches("no ring can be made").count();
    assert_eq!(told, 1, "{}", logs.text());
    mesh.join("b", 7);
    mesh.pass(2.0);
    assert_eq!(mesh.ring().state, "forming");
    assert!(
        mesh.rings.plan(MODEL, mesh.now).is_ok(),
        "its own memory counts as free"
    );
}

#[test]
fn a_context_that_nobody_asked_for_is_shortened_to_memory() {
    let mut mesh = Mesh::new(|_| {});
    let long = |offer: &mut Offer| offer.models[0].card.as_mut().unwrap().context = 32 * 1024;
    mesh.join_with("a", 7, long);
    mesh.join_with("b", 7, long);
    mesh.pass(2.0);
    let ring = mesh.ring();
    assert!(
        (2048..32 * 1024).contains(&ring.context),
        "{}",
        ring.context
    );
    mesh.check();

    let mut fixed = Mesh::new(|settings| settings.context = 32 * 1024);
    fixed.join_with("a", 7, long);
    fixed.join_with("b", 7, long);
    fixed.pass(2.0);
    assert!(matches!(
        fixed.rings.prospects()[MODEL],
        Prospect::Impossible(_)
    ));
}

#[test]
fn kv_memory_gives_way_to_standbys() {
    // Room for six layers with the KV rows of eight contexts, 17 MiB each; for six more only with fewer rows.
    let mut mesh = Mesh::new(|settings| settings.slots = 8);
    for node in ["a", "b", "s"] {
        mesh.join(node, 14);
    }
    mesh.pass(2.0);
    assert!(
        mesh.standbys().iter().all(Option::is_some),
        "{:?}",
        mesh.ring()
    );
    let kv_tokens = mesh.ring().kv_tokens;
    assert!((2 * 1024..8 * 1024).contains(&kv_tokens), "{kv_tokens}");
    mesh.check();
}

#[test]
fn workers_with_other_weights_under_the_same_name_have_no_part() {
    let mut mesh = Mesh::new(|_| {});
    let other =
        |offer: &mut Offer| offer.models[0].card.as_mut().unwrap().fingerprint = "other".into();
    mesh.join_with("x", 50, other);
    mesh.join("a", 20);
    mesh.join("b", 20);
    mesh.pass(2.0);
    assert!(!mesh.told.keys().any(|(node, _)| node == "x"));
}

#[test]
fn several_rings_share_the_memory_of_a_mesh() {
    let mut mesh = Mesh::new(|settings| settings.standbys = false);
    let two = |offer: &mut Offer| {
        let mut second = offer.models[0].clone();
        second.card.as_mut().unwrap().name = "n".into();
        offer.models.push(second);
    };
    for node in ["a", "b", "c"] {
        mesh.join_with(node, 9, two);
    }
    mesh.pass(2.0);
    assert_eq!(mesh.rings.view(mesh.now).len(), 2);
    mesh.check();
    mesh.leave(&["a"]);
    mesh.pass(2.0);
    assert_eq!(mesh.rings.view(mesh.now).len(), 1, "18 layers of 24 fit");
    mesh.check();
}

#[test]
fn a_worker_beside_the_head_is_named_by_the_heads_address() {
    let mut mesh = Mesh::new(|_| {});
    mesh.join("a", 7);
    let arrival = Arrival {
        name: "far".into(),
        whole: Vec::new(),
        head_ip: Some([192, 168, 1, 10].into()),
    };
    mesh.rings.joined("b", arrival, mesh.now);
    let far = SocketAddr::from(([192, 168, 1, 20], 7781));
    mesh.rings.offered("b", far, offer(7), mesh.now);
    mesh.pass(2.0);
    let told = mesh.told.values().next().unwrap();
    let addresses: BTreeSet<&str> = told
        .stages
        .iter()
        .map(|stage| stage.member.as_ref().unwrap().address.as_str())
        .collect();
    assert_eq!(
        addresses,
        BTreeSet::from(["192.168.1.10:7001", "192.168.1.20:7781"])
    );
}

#[test]
fn a_ring_of_an_earlier_head_is_dissolved_once() {
    let mut mesh = Mesh::new(|_| {});
    mesh.join("a", 7);
    let stale = RingState {
        ring: 7,
        epoch: 3,
        ..Default::default()
    };
    for _ in 0..3 {
        mesh.rings.state("a", stale.clone(), mesh.now);
    }
    let actions = mesh.rings.poll(mesh.now);
    let [Action::Send { node, ring }] = &actions[..] else {
        panic!("{actions:?}");
    };
    assert_eq!(
        (node.as_str(), ring.ring, ring.epoch, ring.stages.len()),
        ("a", 7, u32::MAX, 0)
    );
}

#[test]
fn switched_off_no_ring_is_made() {
    let mut mesh = Mesh::new(|settings| settings.enabled = false);
    mesh.join("a", 50);
    mesh.pass(10.0);
    assert!(mesh.told.is_empty() && mesh.rings.prospects().is_empty());
}

#[test]
fn senseless_offers_make_no_ring_and_no_panic() {
    let changes: [fn(&mut Offer); 7] = [
        |offer| offer.models[0].decode_us = f32::NAN,
        |offer| offer.models[0].layers = u32::MAX,
        |offer| offer.models[0].layer_bytes = u64::MAX,
        |offer| offer.models[0].kv_bytes = u64::MAX,
        |offer| offer.models[0].card = None,
        |offer| offer.profile = None,
        |offer| offer.models[0].hidden = 0,
    ];
    for change in changes {
        let mut mesh = Mesh::new(|_| {});
        mesh.join_with("a", 50, change);
        mesh.join_with("b", 50, change);
        mesh.pass(3.0);
        assert!(mesh.rings.view(mesh.now).is_empty());
    }
}

#[test]
fn one_senseless_offer_does_not_spoil_the_others() {
    let mut mesh = Mesh::new(|_| {});
    mesh.join_with("x", 50, |offer| offer.models[0].layer_bytes = u64::MAX);
    mesh.join("a", 7);
    mesh.join("b", 7);
    mesh.pass(2.0);
    assert_eq!(mesh.members().len(), 2);
    assert!(!mesh.members().contains(&"x".to_owned()));
}

#[test]
fn a_member_that_moves_is_named_at_its_new_address_in_the_same_epoch() {
    let mut mesh = Mesh::serving(|_| {}, &[("a", 8), ("b", 8)]);
    let key = ("a".to_owned(), mesh.id());
    let epoch = mesh.told[&key].epoch;
    mesh.rings.moved("b", IpAddr::from([10, 0, 0, 7]));
    mesh.poll();
    let told = &mesh.told[&key];
    let members = told.stages.iter().filter_map(|stage| stage.member.as_ref());
    let of_b: Vec<&str> = members
        .filter(|member| member.node_id == "b")
        .map(|member| member.address.as_str())
        .collect();
    assert!(
        !of_b.is_empty() && of_b.iter().all(|address| address.starts_with("10.0.0.7:")),
        "{of_b:?}"
    );
    assert_eq!((told.epoch, mesh.failovers()), (epoch, 0));
    mesh.rings.moved("b", IpAddr::from([10, 0, 0, 7]));
    assert!(mesh.rings.poll(mesh.now).is_empty(), "no news");
}
