use mesh_proto::{LayerOffer, ModelSources, NodeProfile, RingStage};

use super::*;
use crate::testing::{rules, seat};

fn core() -> Core<u32> {
    let mut core = Core::new(Catalogue::new(rules(), []));
    core.connected("own", 7781);
    let card = ModelCard {
        name: "m".to_owned(),
        fingerprint: "f".to_owned(),
        ..ModelCard::default()
    };
    let offer = LayerOffer {
        card: Some(card),
        ..LayerOffer::default()
    };
    core.offers = Offers::new(vec![offer], NodeProfile::default());
    core
}

fn ring() -> Ring {
    let stages = ["own", "b"].map(|member| RingStage {
        member: Some(seat(member)),
        ..RingStage::default()
    });
    Ring {
        ring: 7,
        epoch: 1,
        model: "m".to_owned(),
        fingerprint: "f".to_owned(),
        stages: stages.to_vec(),
        ..Ring::default()
    }
}

fn sources(origin: bool) -> Sources {
    let told = ModelSources {
        name: "acme/m".to_owned(),
        origin,
        ..ModelSources::default()
    };
    Sources { models: vec![told] }
}

#[test]
fn a_worker_that_loses_the_head_ends_its_deployments_and_goes_on_with_its_searches() {
    let (mut core, now) = (core(), Instant::now());
    assert_eq!(core.catalogue.search("acme/m", Vec::new), Found::Search);
    let lease = core.head_linked(Vec::new());
    core.sources_told(lease, sources(true));
    assert_eq!(core.deploy(lease, ring(), now), Ordered::Begins(0));
    assert!(core.offers.poll(7781, Vec::new()).is_some());
    core.head.tries(now);
    assert!(core.head_lost(None, now, 0.0) > Duration::ZERO);
    assert_eq!(core.deployments.shared(), 0);
    // What the head said of sources counts until another one says otherwise.
    assert_eq!(
        core.catalogue.poll_search("acme/m", now),
        SearchStep::Download
    );
    assert!(core.catalogue.wants_download("acme/m"));
    core.head_linked(Vec::new());
    assert!(
        core.offers.poll(7781, Vec::new()).is_some(),
        "the new link needs the offer"
    );
}

#[test]
fn orders_of_a_lease_that_is_over_are_not_carried_out() {
    let (mut core, now) = (core(), Instant::now());
    let first = core.head_linked(Vec::new());
    core.head_lost(None, now, 0.0);
    let second = core.head_linked(Vec::new());
    assert_eq!(core.deploy(first, ring(), now), Ordered::Refused);
    assert_eq!(core.deployments.shared(), 0);
    assert_eq!(core.catalogue.search("acme/m", Vec::new), Found::Search);
    core.sources_told(second, sources(false));
    core.sources_told(first, sources(true));
    assert!(!core.catalogue.wants_download("acme/m"));
    assert_eq!(core.deploy(second, ring(), now), Ordered::Begins(0));
    // A head that takes over without the end of the link before deploys anew.
    let third = core.head_linked(Vec::new());
    assert_eq!(core.deploy(second, ring(), now), Ordered::Refused);
    assert_eq!(core.deploy(third, ring(), now), Ordered::Begins(1));
}

#[test]
fn a_ring_of_a_model_that_is_not_offered_is_refused() {
    let (mut core, now) = (core(), Instant::now());
    let lease = core.head_linked(Vec::new());
    let other = Ring {
        fingerprint: "another file".to_owned(),
        ..ring()
    };
    assert_eq!(core.deploy(lease, other, now), Ordered::Refused);
    core.deploy(lease, ring(), now);
    let mut ends = ring();
    ends.stages.clear();
    assert_eq!(core.deploy(lease, ends, now), Ordered::Known);
    assert_eq!(core.deployments.shared(), 0);
}
