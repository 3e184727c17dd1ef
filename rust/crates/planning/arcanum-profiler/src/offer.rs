//! Workers' offers as placement sees them. Offers come from other machines: impossible numbers count as
//! unknown, or are an error where nothing can be planned without them; lists and names are cut to sane
//! lengths.

use mesh_proto::{LayerOffer, NodeProfile};

use crate::place::{Candidate, ModelSpec, PathSpec, PlanError, check_model, known};

impl Candidate {
    /// The node `id`, displayed as `name`, with its offer for one model. `memory` is all that it may use; a
    /// caller subtracts the bytes of other rings there.
    pub fn from_offer(id: &str, name: &str, profile: &NodeProfile, offer: &LayerOffer) -> Self {
        let paths = profile.paths.iter();
        let paths = paths.filter(|path| path.node_id.len() <= MOST_ID);
        let paths = paths.take(MOST_PATHS).map(|path| {
            let bandwidth = positive(path.bandwidth);
            let rtt_us = path.rtt_us.into();
            (path.node_id.clone(), PathSpec { rtt_us, bandwidth })
        });
        let shown = name.chars().filter(|c| !c.is_control());
        let purposes = profile.reserved_for.iter();
        let purposes = purposes.filter(|purpose| purpose.len() <= MOST_NAME);
        Candidate {
            id: id.to_owned(),
            name: shown.take(MOST_NAME).collect(),
            memory: profile.memory_available.min(profile.memory_total.max(1)),
            decode_us: time(offer.decode_us),
            prefill_us: time(offer.prefill_us),
            logits_us: time(offer.logits_us),
            load: positive(profile.load.into()) as f32,
            reserved_for: purposes.take(MOST_PURPOSES).cloned().collect(),
            paths: paths.collect(),
        }
    }
}

impl TryFrom<&LayerOffer> for ModelSpec {
    type Error = PlanError;

    /// # Errors
    /// [`PlanError::Model`] if a number is outside what a model can have.
    fn try_from(offer: &LayerOffer) -> Result<Self, PlanError> {
        let model = ModelSpec {
            layers: offer.layers,
            hidden: offer.hidden,
            layer_bytes: offer.layer_bytes,
            first_bytes: offer.first_bytes,
            last_bytes: offer.last_bytes,
            kv_bytes: offer.kv_bytes,
        };
        check_model(&model)?;
        Ok(model)
    }
}

impl ModelSpec {
    /// The model as all of `offers` can hold it: nodes that use another weight format need other amounts of memory, and the
    /// largest counts for all. `None` if there is no offer.
    ///
    /// # Errors
    /// [`PlanError::Model`] if a number is out of range; [`PlanError::Differs`] if the offers are not of one
    /// model.
    pub fn covering<'a>(
        offers: impl IntoIterator<Item = &'a LayerOffer>,
    ) -> Result<Option<Self>, PlanError> {
        let mut all: Option<ModelSpec> = None;
        for offer in offers {
            let one = ModelSpec::try_from(offer)?;
            let Some(all) = &mut all else {
                all = Some(one);
                continue;
            };
            for (field, a, b) in [
                ("layers", all.layers, one.layers),
                ("hidden", all.hidden, one.hidden),
            ] {
                if a != b {
                    return Err(PlanError::Differs { field, a, b });
                }
            }
            for (all, one) in [
                (&mut all.layer_bytes, one.layer_bytes),
                (&mut all.first_bytes, one.first_bytes),
                (&mut all.last_bytes, one.last_bytes),
                (&mut all.kv_bytes, one.kv_bytes),
            ] {
                *all = one.max(*all);
            }
        }
        Ok(all)
    }
}

/// A time in microseconds, or 0 if it cannot have been measured.
fn time(us: f32) -> f64 {
    let us = f64::from(us);
    if known(us) { us } else { 0.0 }
}

fn positive(value: f64) -> f64 {
    match value.is_finite() && value > 0.0 {
        true => value,
        false => 0.0,
    }
}

/// Bytes of a node id: a SHA-256 in hex.
const MOST_ID: usize = 64;
/// Characters of a name, bytes of a purpose.
const MOST_NAME: usize = 64;
const MOST_PURPOSES: usize = 16;
/// Paths that a node may report.
const MOST_PATHS: usize = 1024;

#[cfg(test)]
mod tests {
    use mesh_proto::PathProfile;

    use super::*;
    use crate::{Policy, place};

    fn offer() -> LayerOffer {
        LayerOffer {
            layers: 30,
            hidden: 576,
            layer_bytes: 2_000_000,
            first_bytes: 18_000_000,
            last_bytes: 18_000_000,
            kv_bytes: 768,
            decode_us: 110.0,
            prefill_us: 30.0,
            logits_us: 900.0,
            ..LayerOffer::default()
        }
    }

    fn profile() -> NodeProfile {
        NodeProfile {
            memory_total: 8 << 30,
            memory_available: 6 << 30,
            load: 0.5,
            paths: vec![PathProfile {
                node_id: String::new(),
                rtt_us: 300,
                bandwidth: 1e8,
            }],
            ..NodeProfile::default()
        }
    }

    #[test]
    fn an_offer_becomes_a_candidate_that_can_be_planned_with() {
        let candidate = Candidate::from_offer("id", "attic", &profile(), &offer());
        assert_eq!(candidate.memory, 6 << 30);
        assert_eq!(candidate.paths[""].rtt_us, 300.0);
        let model = ModelSpec::try_from(&offer()).expect("a model");
        let plan = place(&model, &[candidate], &Policy::default()).expect("a plan");
        assert_eq!(plan.stages[0].layers, 0..30);
    }

    #[test]
    fn offers_in_several_formats_are_planned_with_the_largest() {
        let int8 = LayerOffer {
            layer_bytes: 3_500_000,
            first_bytes: 17_000_000,
            ..offer()
        };
        let model = ModelSpec::covering([&offer(), &int8]).expect("one model");
        let model = model.expect("offers");
        assert_eq!(
            (model.layer_bytes, model.first_bytes),
            (3_500_000, 18_000_000)
        );
        assert_eq!(ModelSpec::covering([]), Ok(None));
        let other = LayerOffer {
            layers: 31,
            ..offer()
        };
        let error = ModelSpec::covering([&offer(), &other]).expect_err("two models");
        assert_eq!(
            error.to_string(),
            "one offer says that the model's layers are 30, another 31: their files differ"
        );
    }

    #[test]
    fn hostile_offers_become_unknown_or_an_error() {
        let mut bad = profile();
        bad.load = f32::NEG_INFINITY;
        bad.memory_available = u64::MAX;
        bad.reserved_for = vec!["x".repeat(1000); 1000];
        bad.paths = (0..5000)
            .map(|i| PathProfile {
                node_id: i.to_string(),
                rtt_us: u32::MAX,
                bandwidth: f64::NAN,
            })
            .collect();
        for us in [
            f32::NAN,
            f32::INFINITY,
            -1.0,
            0.0,
            f32::MIN_POSITIVE,
            f32::MAX,
        ] {
            let offer = LayerOffer {
                decode_us: us,
                ..offer()
            };
            let candidate = Candidate::from_offer("id", "a\nb", &bad, &offer);
            assert_eq!((candidate.decode_us, candidate.load), (0.0, 0.0));
            assert_eq!(candidate.memory, 8 << 30);
            assert_eq!(candidate.paths.len(), MOST_PATHS);
            assert!(candidate.reserved_for.is_empty());
            assert_eq!(candidate.name, "ab");
            let model = ModelSpec::try_from(&offer).expect("a model");
            let error = place(&model, &[candidate], &Policy::default()).expect_err("no speed");
            assert!(matches!(error, PlanError::Nobody { .. }));
        }
        let changes: [fn(&mut LayerOffer); 5] = [
            |offer| offer.layers = 0,
            |offer| offer.layers = u32::MAX,
            |offer| offer.hidden = 0,
            |offer| offer.layer_bytes = u64::MAX,
            |offer| offer.kv_bytes = u64::MAX,
        ];
        for change in changes {
            let mut offer = offer();
            change(&mut offer);
            assert!(ModelSpec::try_from(&offer).is_err(), "{offer:?}");
        }
    }
}
