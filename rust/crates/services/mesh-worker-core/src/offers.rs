//! What this worker offers to hold parts of, and when the head hears of it.

use mesh_proto::{LayerOffer, NodeProfile, Offer, PathProfile};

/// The models of which this worker can hold parts, and the paths that a plan depends on.
#[derive(Debug, Default)]
pub struct Offers {
    models: Vec<LayerOffer>,
    profile: NodeProfile,
    /// The path to the head.
    head: PathProfile,
    /// The paths in the last offer; `None` if the head has not got the present one.
    offered: Option<Vec<PathProfile>>,
}

impl Offers {
    /// Offers these models on a machine with this profile.
    pub fn new(models: Vec<LayerOffer>, profile: NodeProfile) -> Self {
        Offers {
            models,
            profile,
            ..Offers::default()
        }
    }

    /// Offers one more model. False if one of that name is offered already.
    pub fn add(&mut self, offer: LayerOffer, profile: NodeProfile) -> bool {
        if self.models.iter().any(|other| name(other) == name(&offer)) {
            return false;
        }
        self.models.push(offer);
        self.profile = profile;
        self.offered = None;
        true
    }

    /// True if nothing is offered.
    pub fn is_empty(&self) -> bool {
        self.models.is_empty()
    }

    /// True if this model is offered.
    pub fn has(&self, model: &str, fingerprint: &str) -> bool {
        let mut cards = self.models.iter().filter_map(|offer| offer.card.as_ref());
        cards.any(|card| card.name == model && card.fingerprint == fingerprint)
    }

    /// There is a new link to the head, which has no offer yet.
    pub(crate) fn head_linked(&mut self) {
        self.offered = None;
    }

    /// The path to the head: its round trip, and its bandwidth if that was measured.
    pub fn head_path(&mut self, rtt_us: u32, bandwidth: Option<f64>) {
        self.head.rtt_us = rtt_us;
        self.head.bandwidth = bandwidth.unwrap_or(self.head.bandwidth);
    }

    /// The offer for the head, if it differs from the last one; others reach this worker at `port`, and it
    /// them on these paths.
    pub fn poll(&mut self, port: u16, mut paths: Vec<PathProfile>) -> Option<Offer> {
        // A model that is not known yet cannot be offered; an empty offer need not be sent.
        if self.models.is_empty() {
            return None;
        }
        paths.push(self.head.clone());
        if let Some(offered) = &self.offered
            && !differ(offered, &paths)
        {
            return None;
        }
        self.offered = Some(paths.clone());
        Some(Offer {
            ring_port: port.into(),
            profile: Some(NodeProfile {
                paths,
                ..self.profile.clone()
            }),
            models: self.models.clone(),
        })
    }
}

fn name(offer: &LayerOffer) -> &str {
    offer.card.as_ref().map_or("", |card| &card.name)
}

/// True if a plan might judge them differently: a new path, a round trip that is half as long again, or
/// another bandwidth.
fn differ(before: &[PathProfile], now: &[PathProfile]) -> bool {
    now.iter().any(|path| {
        let known = before.iter().find(|known| known.node_id == path.node_id);
        known.is_none_or(|known| {
            let (least, most) = (known.rtt_us.min(path.rtt_us), known.rtt_us.max(path.rtt_us));
            most > least.max(LEAST_RTT) / 2 * 3 || known.bandwidth != path.bandwidth
        })
    })
}

/// Round trips below this, microseconds, are all the same to a plan.
const LEAST_RTT: u32 = 1_000;

#[cfg(test)]
mod tests {
    use mesh_proto::ModelCard;

    use super::*;

    fn path(node: &str, rtt_us: u32, bandwidth: f64) -> PathProfile {
        PathProfile {
            node_id: node.to_owned(),
            rtt_us,
            bandwidth,
        }
    }

    fn layers(name: &str) -> LayerOffer {
        LayerOffer {
            card: Some(ModelCard {
                name: name.to_owned(),
                fingerprint: format!("of {name}"),
                ..ModelCard::default()
            }),
            ..LayerOffer::default()
        }
    }

    #[test]
    fn only_what_matters_is_offered_again() {
        let before = [path("", 2_000, 1e6), path("a", 0, 0.0)];
        assert!(!differ(&before, &before[..1]));
        for (now, news) in [
            (path("", 3_000, 1e6), false),
            (path("", 4_000, 1e6), true),
            (path("", 2_000, 2e6), true),
            (path("a", 1_000, 0.0), false),
            (path("a", 0, 1e6), true),
            (path("b", 0, 0.0), true),
        ] {
            assert_eq!(differ(&before, std::slice::from_ref(&now)), news, "{now:?}");
        }
    }

    #[test]
    fn each_link_gets_the_offer_and_each_change_once() {
        let mut offers = Offers::default();
        assert_eq!(
            offers.poll(9, Vec::new()),
            None,
            "there is nothing to offer"
        );
        assert!(offers.add(layers("m"), NodeProfile::default()));
        assert!(!offers.add(layers("m"), NodeProfile::default()));
        assert!(offers.has("m", "of m") && !offers.has("m", "of n"));
        offers.head_path(500, None);
        let offer = offers.poll(9, vec![path("a", 200, 0.0)]).unwrap();
        assert_eq!((offer.ring_port, offer.models.len()), (9, 1));
        let paths = offer.profile.unwrap().paths;
        assert_eq!(paths, [path("a", 200, 0.0), path("", 500, 0.0)]);
        assert_eq!(offers.poll(9, vec![path("a", 300, 0.0)]), None);
        offers.head_path(500, Some(1e6));
        assert!(offers.poll(9, Vec::new()).is_some());
        offers.head_path(600, None);
        assert_eq!(
            offers.poll(9, Vec::new()),
            None,
            "the bandwidth stays known"
        );
        offers.head_linked();
        assert!(offers.poll(9, Vec::new()).is_some());
        offers.add(layers("n"), NodeProfile::default());
        assert_eq!(offers.poll(9, Vec::new()).unwrap().models.len(), 2);
    }
}
