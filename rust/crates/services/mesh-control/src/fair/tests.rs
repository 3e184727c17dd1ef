use super::*;

fn source(ingress: Ingress, last: u8) -> Source {
    let origin = Origin::of(IpAddr::from([10, 0, 0, last]));
    Source { ingress, origin }
}

/// Gives `slots` slots to requests that never end, and says whose they were.
fn serve(queue: &mut FairQueue<u32>, slots: usize) -> Vec<(Source, u32)> {
    let take = |_| {
        let (source, item) = queue.take_next(|_| true)?;
        queue.started(source);
        Some((source, item))
    };
    (0..slots).map_while(take).collect()
}

#[test]
fn a_newcomer_gets_a_place_of_its_own_ingress_where_another_has_as_many() {
    let mut queue = FairQueue::new(4);
    let (large, flood) = (source(Ingress::Http, 1), source(Ingress::Dcf, 2));
    for number in 0..2 {
        assert!(queue.push(large, number).unwrap().is_none());
        assert!(queue.push(flood, number).unwrap().is_none());
    }
    let displaced = queue.push(source(Ingress::Http, 3), 9).unwrap();
    assert_eq!(displaced, Some((large, 1)));
}

#[test]
fn a_flood_of_one_source_delays_others_by_what_runs_and_no_more() {
    let (flood, person) = (source(Ingress::Dcf, 1), source(Ingress::Http, 2));
    let mut queue = FairQueue::new(1024);
    for number in 0..1016 {
        assert_eq!(queue.push(flood, number), Ok(None));
    }
    assert_eq!(serve(&mut queue, 8).len(), 8);
    assert_eq!(queue.push(person, 5000), Ok(None));
    queue.ended(flood);
    assert_eq!(serve(&mut queue, 1), [(person, 5000)]);
    // The same within one ingress.
    let other = source(Ingress::Dcf, 3);
    assert_eq!(queue.push(other, 6000), Ok(None));
    queue.ended(flood);
    assert_eq!(serve(&mut queue, 1), [(other, 6000)]);
}

#[test]
fn slots_go_to_whoever_holds_least_and_each_source_is_served_in_order() {
    let (a, b) = (source(Ingress::Http, 1), source(Ingress::Http, 2));
    let mut queue = FairQueue::new(100);
    for number in 0..10 {
        queue.push(a, number).unwrap();
    }
    let first = serve(&mut queue, 4);
    assert!(first.iter().all(|(s, _)| *s == a), "nobody else waits");
    for number in 100..110 {
        queue.push(b, number).unwrap();
    }
    let next: Vec<u32> = serve(&mut queue, 8).iter().map(|(_, n)| *n).collect();
    // b catches up, then they take turns.
    assert_eq!(next[..4], [100, 101, 102, 103]);
    assert_eq!(next[4..], [4, 104, 5, 105]);
}

#[test]
fn ingresses_share_evenly_however_many_sources_each_has() {
    let mut queue = FairQueue::new(1000);
    for number in 0..100 {
        queue.push(source(Ingress::Dcf, number), 0).unwrap();
        queue.push(source(Ingress::Http, 200), 1).unwrap();
    }
    let served = serve(&mut queue, 20);
    let of_http = served.iter().filter(|(_, n)| *n == 1).count();
    assert_eq!(of_http, 10, "{served:?}");
}

#[test]
fn a_full_queue_has_room_for_a_newcomer_at_the_expense_of_the_largest_source() {
    let (large, small) = (source(Ingress::Dcf, 1), source(Ingress::Dcf, 2));
    let mut queue = FairQueue::new(4);
    for number in 0..4 {
        assert_eq!(queue.push(large, number), Ok(None));
    }
    let full = Full {
        yours: 4,
        sources: 1,
    };
    assert_eq!(queue.push(large, 9), Err(full));
    assert_eq!(queue.push(small, 10), Ok(Some((large, 3))));
    assert_eq!(queue.push(small, 11), Ok(Some((large, 2))));
    // Both have their share now.
    assert!(queue.push(small, 12).is_err() && queue.push(large, 13).is_err());
    let http = source(Ingress::Http, 3);
    assert!(matches!(queue.push(http, 20), Ok(Some(_))));
    assert_eq!((queue.len(), queue.of_ingress(Ingress::Http)), (4, (1, 0)));
}

#[test]
fn many_sources_of_one_ingress_cannot_keep_another_out() {
    let mut queue = FairQueue::new(50);
    for number in 0..50 {
        queue.push(source(Ingress::Dcf, number), 0).unwrap();
    }
    assert!(queue.push(source(Ingress::Dcf, 99), 0).is_err());
    assert!(queue.push(source(Ingress::Http, 99), 0).is_ok());
}

#[test]
fn requests_that_cannot_go_now_do_not_hold_up_those_behind_them() {
    let a = source(Ingress::Http, 1);
    let mut queue = FairQueue::new(10);
    for number in 0..4 {
        queue.push(a, number).unwrap();
    }
    queue.push_again(a, 7);
    assert_eq!(queue.take_next(|n| *n == 2), Some((a, 2)));
    assert_eq!(queue.take_next(|_| true), Some((a, 7)));
    assert_eq!(queue.take_next(|n| *n > 5), None);
    assert_eq!(queue.take_next(|_| true), Some((a, 0)));
    queue.retain(|n| *n != 1);
    assert!(queue.any(|n| *n == 3) && queue.len() == 1);
}

#[test]
fn nothing_is_kept_of_sources_that_are_gone() {
    let mut queue = FairQueue::new(10_000);
    for number in 0..=255 {
        queue.push(source(Ingress::Dcf, number), 0).unwrap();
    }
    for (source, _) in serve(&mut queue, 256) {
        queue.ended(source);
    }
    assert!(queue.is_empty() && queue.shares.is_empty());
}

#[test]
fn a_network_of_64_bits_is_one_origin_and_a_mapped_address_is_its_ipv4_one() {
    let origin = |text: &str| Origin::of(text.parse().unwrap());
    assert_eq!(origin("2001:db8:1:2::1"), origin("2001:db8:1:2:ffff::9"));
    assert_ne!(origin("2001:db8:1:2::1"), origin("2001:db8:1:3::1"));
    assert_eq!(origin("::ffff:10.1.1.1"), origin("10.1.1.1"));
    assert_eq!(origin("2001:db8:1:2::1").to_string(), "2001:db8:1:2::/64");
}
