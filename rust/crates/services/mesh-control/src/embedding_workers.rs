//! The workers among which a request for embeddings or images is divided.

use std::collections::BTreeMap;
use std::time::Instant;

use mesh_proto::ModelKind;

use super::registry::{Registry, ServedModel, Service, Worker};

/// The workers that serve a model.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct EmbeddingWorkers {
    /// Output of the model; `None` if no worker serves it now.
    pub kind: Option<ModelKind>,
    /// Workers with the same weights that may be asked.
    pub workers: usize,
    /// SHA-256 of those weights; `None` while it is open which they will be.
    pub fingerprint: Option<String>,
    /// Length of its vectors.
    pub dimensions: u32,
}

impl EmbeddingWorkers {
    /// The workers of a model: with the weights that its name stands for, or, where it stands for none yet,
    /// with those that most of its workers have.
    pub fn of(registry: &Registry, name: &str, now: Instant) -> Self {
        let is_in = |worker: &&Worker| {
            let node = worker.node_id();
            node.is_some_and(|node| !registry.is_out(node, now))
        };
        let served = registry.iter().filter(is_in).filter_map(|worker| {
            let mut models = worker.models.iter();
            Some((worker, models.find(|model| model.card.name == name)?))
        });
        let served: Vec<(&Worker, &ServedModel)> = served.collect();
        let usable = |worker: &Worker, model: &ServedModel| {
            !worker.draining && worker.is_for(model.card.kind())
        };
        // The best there are: in use, with the name's weights or those that it may stand for next, and with
        // an answer.
        let rank = |worker: &Worker, model: &ServedModel| {
            let weights = registry.has_name(model, now);
            (!usable(worker, model), weights, !model.is_cleared())
        };
        let ranks = served.iter().map(|(worker, model)| rank(worker, model));
        let Some(best) = ranks.min() else {
            return Self::default();
        };
        let mut kind = None;
        let mut by_weights = BTreeMap::<&str, (usize, u32)>::new();
        for (worker, model) in served {
            if rank(worker, model) != best {
                continue;
            }
            kind.get_or_insert(model.card.kind());
            let first = (0, model.card.dimensions);
            by_weights.entry(&model.card.fingerprint).or_insert(first).0 += 1;
        }
        let by_weights = by_weights.into_iter();
        let most = by_weights.max_by_key(|(_, (workers, _))| *workers);
        let (fingerprint, (workers, dimensions)) = most.unwrap_or_default();
        let (unused, weights, _) = best;
        Self {
            kind,
            workers: if unused { 0 } else { workers },
            fingerprint: (!unused && weights == Service::Serves).then(|| fingerprint.to_owned()),
            dimensions,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use mesh_proto::{Hello, ModelCard};

    use super::*;

    #[test]
    fn many_with_other_weights_do_not_change_what_an_encoder_is() {
        let mut now = Instant::now();
        let mut registry = Registry::new(Duration::from_secs(10));
        let join = |registry: &mut Registry, node: &str, fingerprint: &str, now| {
            let card = ModelCard {
                name: "e".into(),
                fingerprint: fingerprint.into(),
                dimensions: if fingerprint == "x" { 384 } else { 768 },
                kind: ModelKind::Embed.into(),
                ..Default::default()
            };
            let hello = Hello {
                models: vec![card],
                ..Default::default()
            };
            let address = ([127, 0, 0, 1], 9000).into();
            let (id, _) = registry.join(node, address, hello, now);
            registry.prove_all(id, now);
            id
        };
        let first = join(&mut registry, "first", "x", now);
        registry.prune(now);
        let others = ["a", "b", "c"].map(|node| join(&mut registry, node, "y", now));
        let x = EmbeddingWorkers {
            kind: Some(ModelKind::Embed),
            workers: 1,
            fingerprint: Some("x".into()),
            dimensions: 384,
        };
        assert_eq!(EmbeddingWorkers::of(&registry, "e", now), x);
        // One in quarantine is no replica.
        let again = join(&mut registry, "again", "x", now);
        assert_eq!(EmbeddingWorkers::of(&registry, "e", now).workers, 2);
        registry
            .reputation
            .quarantine("again", "again", "it lies", now);
        assert_eq!(EmbeddingWorkers::of(&registry, "e", now), x);
        registry.leave(first, now);
        registry.leave(again, now);
        let open = EmbeddingWorkers::of(&registry, "e", now);
        assert_eq!((open.workers, open.fingerprint), (3, None));
        now += Duration::from_secs(31);
        for id in others {
            registry.seen(id, now);
        }
        registry.prune(now);
        let y = EmbeddingWorkers::of(&registry, "e", now);
        assert_eq!(y.fingerprint.as_deref(), Some("y"));
        assert_eq!((y.workers, y.dimensions), (3, 768));
    }
}
