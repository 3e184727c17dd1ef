//! How many layers go to a device: arithmetic over bytes and times, without a device.
//!
//! The **first** layers go there. The device then computes layers alone, and the output matrix stays with the
//! CPU until all layers fit: a byte of it saves no more time per token than a byte of a layer does, less in a
//! prompt, where only one row needs it, and it would have to fit before the first layer could. Hidden rows
//! come back instead of logits, which are wider, and the last layers need no copy of an embedding table.

/// Sizes and limits from which a split follows. Bytes are those on the device.
#[derive(Debug, Clone, PartialEq)]
pub struct SplitRequest {
    /// Constants of each layer, the first one first.
    pub layers: Vec<u64>,
    /// Constants that come with the first layer: tables of rotations.
    pub fixed: u64,
    /// Constants that come with the last layer: the output matrix, if that layer ends the model.
    pub end: u64,
    /// Keys and values of one token in one layer.
    pub kv_row: u64,
    /// Growth of the KV cache.
    pub cache: CacheGrowth,
    /// KV tokens over all slots without which the model is of little use.
    pub least_tokens: u64,
    /// KV tokens over all slots of which more are of no use.
    pub most_tokens: u64,
    /// Bytes that weights and KV cache may take; `None` where nobody knows.
    pub budget: Option<u64>,
    /// Most layers, after attempts that failed.
    pub most_layers: u32,
    /// Measured times; without them the device counts as faster.
    pub speeds: Option<StepTimes>,
    /// Rows come back from the device after each layer: a step there costs as much for each of them, not once.
    pub by_layer: bool,
}

/// Rows for which slots have memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheGrowth {
    /// Number of slots.
    pub slots: u64,
    /// Rows that a slot in use has at least; from there its memory doubles.
    pub first: u64,
    /// Rows that a slot has at most.
    pub limit: u64,
}

/// Measured times of a step of one row, in seconds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepTimes {
    /// A step of one layer on the device, with all that a step costs there besides.
    pub device_step: f64,
    /// One layer on the CPU.
    pub cpu_layer: f64,
}

/// A split of layers between a device and the CPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SplitPlan {
    /// Number of layers on the device, from the first one on.
    pub device_layers: u32,
    /// KV tokens over all slots that fit the device; [`SplitRequest::most_tokens`] where its memory is no limit.
    pub kv_tokens: u64,
    /// Bytes that weights and KV cache of so many tokens take on the device.
    pub device_bytes: u64,
    /// The device has room, but is too slow to be of use.
    pub too_slow: bool,
}

impl CacheGrowth {
    /// Rows that slots with `tokens` rows together may have memory for, at most.
    fn rows(&self, tokens: u64) -> u64 {
        let all = self.slots.saturating_mul(self.limit);
        let doubled = tokens.saturating_mul(2);
        let grown = doubled.saturating_add(self.slots.saturating_mul(self.first));
        grown.min(all)
    }

    /// The most tokens whose rows fit; `None` if not even the first rows of all slots do.
    fn tokens(&self, rows: u64) -> Option<u64> {
        if rows >= self.slots.saturating_mul(self.limit) {
            return Some(u64::MAX);
        }
        let first = self.slots.saturating_mul(self.first);
        rows.checked_sub(first).map(|rows| rows / 2)
    }
}

impl SplitRequest {
    /// The most layers whose weights and least KV cache fit, then the most KV tokens.
    pub fn plan(&self) -> SplitPlan {
        let most = (self.most_layers as usize).min(self.layers.len());
        let least_tokens = self.least_tokens.min(self.most_tokens);
        let least_rows = self.cache.rows(least_tokens);
        let mut count = 0;
        for candidate in 1..=most {
            let bytes = self.bytes(candidate, least_rows);
            if self.budget.is_none_or(|budget| bytes <= budget) {
                count = candidate;
            }
        }
        let against = if self.by_layer { 1 } else { count };
        let too_slow = count > 0 && self.speeds.is_some_and(|speeds| !speeds.pays(against));
        if too_slow {
            count = 0;
        }
        let kv_tokens = self.kv_tokens(count);
        SplitPlan {
            device_layers: count as u32,
            kv_tokens,
            device_bytes: match count {
                0 => 0,
                count => self.bytes(count, self.cache.rows(kv_tokens)),
            },
            too_slow,
        }
    }

    /// Bytes of the first `count` layers with a KV cache of `rows`.
    fn bytes(&self, count: usize, rows: u64) -> u64 {
        let layers = self.layers.iter().take(count);
        let weights = layers.fold(self.fixed, |sum, bytes| sum.saturating_add(*bytes));
        let end = if count == self.layers.len() {
            self.end
        } else {
            0
        };
        let cache = self
            .kv_row
            .saturating_mul(count as u64)
            .saturating_mul(rows);
        weights.saturating_add(end).saturating_add(cache)
    }

    /// KV tokens beside the weights of the first `count` layers.
    fn kv_tokens(&self, count: usize) -> u64 {
        let row = self.kv_row.saturating_mul(count as u64);
        let (Some(budget), true) = (self.budget, row > 0) else {
            return self.most_tokens;
        };
        let rows = budget.saturating_sub(self.bytes(count, 0)) / row;
        let tokens = self.cache.tokens(rows).unwrap_or(0);
        tokens.min(self.most_tokens)
    }
}

impl StepTimes {
    /// False if a step of a single layer takes as long on the device as `count` layers on the CPU.
    fn pays(&self, count: usize) -> bool {
        self.device_step < self.cpu_layer * count as f64
    }
}

/// Memory that a device keeps for others than weights and KV cache: activations, the provider's workspaces,
/// its context, a screen.
pub fn reserve(free: u64) -> u64 {
    (256 << 20) + free / 16
}

/// The layers to try after `failures` attempts, the last one with `layers`.
pub fn after_failure(layers: u32, failures: u32) -> u32 {
    match failures {
        // The plan was nearly right.
        0 | 1 => (layers * 3 / 4).min(layers.saturating_sub(1)),
        _ => layers / 2,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    /// 32 layers of 100 MiB with 4 KiB of KV cache per token each, and an output matrix of 300 MiB.
    fn request(budget: Option<u64>) -> SplitRequest {
        SplitRequest {
            layers: vec![100 * MIB; 32],
            fixed: MIB,
            end: 300 * MIB,
            kv_row: 4096,
            cache: CacheGrowth {
                slots: 4,
                first: 256,
                limit: 8192,
            },
            least_tokens: 4096,
            most_tokens: 32768,
            budget,
            most_layers: 32,
            speeds: None,
            by_layer: false,
        }
    }

    /// Bytes per layer with the least cache: 9216 rows.
    const LAYER: u64 = 100 * MIB + 36 * MIB;

    #[test]
    fn as_many_layers_as_fit_with_their_kv_cache() {
        for (budget, layers) in [
            (0, 0),
            (LAYER, 0),
            (LAYER + MIB, 1),
            (10 * LAYER + MIB, 10),
            (11 * LAYER, 10),
            (31 * LAYER + MIB, 31),
            // The last one comes with the output matrix.
            (32 * LAYER + MIB, 31),
            (32 * LAYER + 301 * MIB, 32),
        ] {
            let plan = request(Some(budget)).plan();
            assert_eq!(plan.device_layers, layers, "{budget}");
            assert!(plan.device_bytes <= budget, "{plan:?}");
            assert!(layers == 0 || plan.kv_tokens >= 4096, "{plan:?}");
        }
    }

    #[test]
    fn memory_that_no_layer_fits_holds_kv_rows() {
        let plan = request(Some(31 * LAYER + MIB + 31 * 4096 * 2000)).plan();
        assert_eq!((plan.device_layers, plan.kv_tokens), (31, 5096));
        // All slots with their whole context need no more than that.
        let plan = request(Some(1 << 40)).plan();
        assert_eq!((plan.device_layers, plan.kv_tokens), (32, 32768));
        assert_eq!(plan.device_bytes, 3501 * MIB + 32 * 4096 * 4 * 8192);
    }

    #[test]
    fn an_unknown_memory_is_no_limit() {
        let plan = request(None).plan();
        assert_eq!((plan.device_layers, plan.kv_tokens), (32, 32768));
    }

    #[test]
    fn attempts_that_failed_bound_the_next_one_and_come_to_an_end() {
        let limited = SplitRequest {
            most_layers: 7,
            ..request(None)
        };
        assert_eq!(limited.plan().device_layers, 7);
        for start in 0..100 {
            let (mut layers, mut failures) = (start, 0);
            while layers > 0 {
                failures += 1;
                let next = after_failure(layers, failures);
                assert!(next < layers);
                layers = next;
            }
            assert!(failures <= 8, "{start}");
        }
    }

    #[test]
    fn a_device_that_is_slower_than_the_layers_it_would_take_gets_none() {
        let speeds = |device_step, cpu_layer, by_layer| {
            let speeds = Some(StepTimes {
                device_step,
                cpu_layer,
            });
            let plan = SplitRequest {
                speeds,
                by_layer,
                ..request(Some(10 * LAYER + MIB))
            }
            .plan();
            (plan.device_layers, plan.too_slow)
        };
        assert_eq!(speeds(0.009, 0.001, false), (10, false));
        assert_eq!(speeds(0.011, 0.001, false), (0, true));
        // Where every layer crosses, each must be faster.
        assert_eq!(speeds(0.009, 0.001, true), (0, true));
        assert_eq!(speeds(0.0009, 0.001, true), (10, false));
    }

    #[test]
    fn sizes_from_anywhere_overflow_nothing() {
        let plan = SplitRequest {
            layers: vec![u64::MAX; 3],
            fixed: u64::MAX,
            end: u64::MAX,
            kv_row: u64::MAX,
            cache: CacheGrowth {
                slots: u64::MAX,
                first: u64::MAX,
                limit: u64::MAX,
            },
            least_tokens: u64::MAX,
            most_tokens: u64::MAX,
            ..request(Some(u64::MAX - 1))
        }
        .plan();
        assert_eq!(plan.device_layers, 0);
        assert!(reserve(u64::MAX) > 0);
    }
}
