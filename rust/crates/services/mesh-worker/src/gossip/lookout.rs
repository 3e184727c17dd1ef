//! Attacks that this worker sees itself, as sightings: each once a day, and few of a kind, since the
//! sightings of a node are bounded and a stranger can have many addresses.

use std::collections::BTreeSet;
use std::time::Instant;

use mesh_gossip::THREAT_LIFE;
use mesh_net::quic::Refused;
use mesh_proto::BadSource;

/// The sightings of the last day.
#[derive(Debug, Default)]
pub(super) struct Lookout {
    since: Option<Instant>,
    seen: BTreeSet<(&'static str, String)>,
}

/// A sighting to publish: kind, subject and description.
pub(super) type Seen = (&'static str, String, String);

impl Lookout {
    pub(super) fn refused(&mut self, refused: &Refused, now: Instant) -> Option<Seen> {
        let (kind, subject, detail) = match refused {
            Refused::Expelled { node_id, name } => {
                let detail = format!("the expelled node {name} wants a link");
                ("expelled-calls", node_id.clone(), detail)
            }
            Refused::Certificate { source } => {
                let detail = "wants a link without a certificate of this mesh".to_owned();
                ("stranger", source.to_string(), detail)
            }
            Refused::Rate { source } => {
                let detail = "begins too many connections".to_owned();
                ("flood", source.to_string(), detail)
            }
            _ => return None,
        };
        self.admit(kind, subject, detail, now)
    }

    pub(super) fn accused(&mut self, bad: &BadSource, now: Instant) -> Option<Seen> {
        let detail = format!("sent something else than manifest {}", bad.fingerprint);
        self.admit("bad-piece", bad.node_id.clone(), detail, now)
    }

    fn admit(
        &mut self,
        kind: &'static str,
        subject: String,
        detail: String,
        now: Instant,
    ) -> Option<Seen> {
        let is_over = |since: Instant| now.saturating_duration_since(since) >= THREAT_LIFE;
        if self.since.is_none_or(is_over) {
            (self.since, self.seen) = (Some(now), BTreeSet::new());
        }
        let of_kind = self.seen.iter().filter(|(other, _)| *other == kind);
        let has_room = of_kind.count() < MOST_OF_KIND;
        let is_new = has_room && self.seen.insert((kind, subject.clone()));
        is_new.then_some((kind, subject, detail))
    }
}

/// Sightings of a kind in a day. Those of all kinds leave room among the 16 of a node.
const MOST_OF_KIND: usize = 3;

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::*;

    #[test]
    fn sightings_are_few_and_each_is_told_once_a_day() {
        let (mut lookout, start) = (Lookout::default(), Instant::now());
        let flood = |n: u32| Refused::Rate {
            source: IpAddr::from(n.to_be_bytes()),
        };
        let told = |lookout: &mut Lookout, now| {
            let all = (0..1000).filter_map(|n| lookout.refused(&flood(n / 2), now));
            all.count()
        };
        assert_eq!(told(&mut lookout, start), MOST_OF_KIND);
        assert_eq!(told(&mut lookout, start), 0);
        let expelled = Refused::Expelled {
            node_id: "aa".to_owned(),
            name: "rogue".to_owned(),
        };
        let seen = lookout.refused(&expelled, start).unwrap();
        assert_eq!((seen.0, &seen.1[..]), ("expelled-calls", "aa"));
        assert_eq!(lookout.refused(&expelled, start), None);
        assert_eq!(told(&mut lookout, start + THREAT_LIFE), MOST_OF_KIND);
    }
}
