//! Chooses the replays at the beginning of an epoch: which rows, and from which stage.

use mesh_engine::SlotId;
use mesh_proto::RingHeld;

use crate::token_log::{TokenLog, common_prefix};

/// The rows that one stage holds, by slot: as many entries as the model has slots.
pub(crate) type HeldRows = Vec<SlotRows>;

#[derive(Debug, Clone, Default)]
pub(crate) struct SlotRows {
    pub(crate) tokens: Vec<u32>,
    kept_from: u32,
    age: u64,
}

/// Rows that some stages lack and that are worth a replay of their own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Replay {
    pub(crate) slot: SlotId,
    pub(crate) from: u32,
    pub(crate) to: u32,
    /// The stage that kept the inputs of the next one; `None`: the driver sends tokens to stage 0.
    pub(crate) source: Option<u32>,
    /// The last stage that takes the rows in.
    pub(crate) until: u32,
}

/// Reads a member's report. Slots beyond `slots` are ignored.
pub(crate) fn read_held(slots: u32, held: RingHeld) -> HeldRows {
    let mut read = vec![SlotRows::default(); slots as usize];
    for slot in held.slots {
        if let Some(rows) = read.get_mut(slot.slot as usize) {
            *rows = SlotRows {
                tokens: slot.tokens,
                kept_from: slot.kept_from,
                age: slot.age,
            };
        }
    }
    read
}

/// The tokens that a slot should hold: the driver's plan or, if the driver is new, the content of the
/// foremost stage, which is the newest.
pub(crate) fn reference<'a>(
    planned: &'a TokenLog,
    held: &'a [HeldRows],
    slot: SlotId,
) -> &'a [u32] {
    if !planned.is_empty() {
        return planned.tokens(slot);
    }
    let mut lists = held.iter().map(|held| &held[slot as usize].tokens[..]);
    lists.find(|tokens| !tokens.is_empty()).unwrap_or(&[])
}

/// The rows of each slot that every stage holds.
pub(crate) fn common(planned: &TokenLog, held: &[HeldRows], slot: SlotId) -> Vec<u32> {
    let wanted = reference(planned, held, slot);
    let len = valid(wanted, held, slot).min().unwrap_or(0);
    wanted[..len as usize].to_vec()
}

/// For each stage, how many of the `wanted` rows of a slot it holds.
fn valid(wanted: &[u32], held: &[HeldRows], slot: SlotId) -> impl Iterator<Item = u32> {
    let rows = held.iter().map(move |held| &held[slot as usize]);
    rows.map(move |rows| common_prefix(wanted, &rows.tokens))
}

/// The replays worth having, one per slot at most.
///
/// A stage lags if it lacks more than [`WORTHWHILE`] rows that another one has. Unused slots are left alone:
/// their rows are computed again when a request needs them. A driver that has planned steps knows the `busy`
/// ones; for a new one those count as busy that a recent step has touched.
pub(crate) fn plan(
    planned: &TokenLog,
    held: &[HeldRows],
    slots: u32,
    busy: Option<&[SlotId]>,
) -> Vec<Replay> {
    let replays = (0..slots).filter_map(|slot| {
        let is_busy = match busy {
            Some(busy) => busy.contains(&slot),
            None => held.iter().any(|held| {
                let rows = &held[slot as usize];
                !rows.tokens.is_empty() && rows.age <= RECENT
            }),
        };
        is_busy.then(|| plan_slot(planned, held, slot))?
    });
    replays.collect()
}

fn plan_slot(planned: &TokenLog, held: &[HeldRows], slot: SlotId) -> Option<Replay> {
    let wanted = reference(planned, held, slot);
    let lens: Vec<u32> = valid(wanted, held, slot).collect();
    let most = lens.iter().copied().max()?;
    let lags = |&stage: &usize| lens[stage] + WORTHWHILE < most;
    let first = (0..held.len()).find(lags)?;
    let until = (0..held.len()).rfind(lags)?;
    let others = (0..held.len()).filter(|stage| !lags(stage));
    let to = others.map(|stage| lens[stage]).min()?;
    // From the nearest stage above that still keeps its outputs; the stages between compute those rows again.
    let mut from = lens[first..=until].iter().copied().min()?;
    let mut source = None;
    for stage in (0..first).rev() {
        if lens[stage] >= to && held[stage][slot as usize].kept_from <= from {
            source = Some(stage as u32);
            break;
        }
        from = from.min(lens[stage]);
    }
    (from + WORTHWHILE < to).then_some(Replay {
        slot,
        from,
        to,
        source,
        until: until as u32,
    })
}

/// Rows that are computed again together with the next step rather than replayed first.
const WORTHWHILE: u32 = 16;

/// Steps after which a slot that none of them touched counts as idle.
const RECENT: u64 = 16;

#[cfg(test)]
mod tests {
    use super::*;
    use mesh_proto::HeldSlot;

    fn tokens(len: u32) -> Vec<u32> {
        (0..len).map(|i| i * 7 % 101).collect()
    }

    /// A stage that holds `len` rows of slot 0 and keeps the outputs from `kept_from` on.
    fn held(len: u32, kept_from: u32) -> HeldRows {
        read_held(
            1,
            RingHeld {
                epoch: 1,
                slots: vec![HeldSlot {
                    slot: 0,
                    tokens: tokens(len),
                    kept_from,
                    age: 0,
                }],
            },
        )
    }

    fn planned(len: u32) -> TokenLog {
        let mut log = TokenLog::new(1);
        log.write(0, 0, &tokens(len)).unwrap();
        log
    }

    #[test]
    fn a_short_tail_is_not_replayed() {
        let stages = [held(1000, 990), held(995, 990), held(999, 0)];
        assert_eq!(plan(&planned(1000), &stages, 1, None), []);
        assert_eq!(common(&planned(1000), &stages, 0).len(), 995);
    }

    #[test]
    fn a_stage_loaded_afresh_is_fed_by_the_stage_before_it() {
        let stages = [held(1000, 0), held(0, 0), held(998, 0)];
        let replay = plan(&planned(1000), &stages, 1, None)[0];
        assert_eq!((replay.from, replay.to), (0, 998));
        assert_eq!((replay.source, replay.until), (Some(0), 1));
    }

    #[test]
    fn the_first_stage_and_two_neighbours_are_fed_with_tokens_and_together() {
        let stages = [held(0, 0), held(0, 0), held(998, 0)];
        let replay = plan(&planned(1000), &stages, 1, None)[0];
        assert_eq!((replay.source, replay.until), (None, 1));
    }

    #[test]
    fn where_the_outputs_are_gone_the_rows_come_from_further_up() {
        let stages = [held(1000, 0), held(1000, 500), held(100, 0)];
        let replay = plan(&planned(1000), &stages, 1, None)[0];
        assert_eq!((replay.from, replay.to), (100, 1000));
        assert_eq!((replay.source, replay.until), (Some(0), 2));
        let stages = [held(1000, 800), held(1000, 500), held(100, 0)];
        assert_eq!(plan(&planned(1000), &stages, 1, None)[0].source, None);
    }

    #[test]
    fn a_new_driver_believes_the_foremost_stage() {
        let stages = [held(1000, 0), held(1000, 0), held(0, 0)];
        let replay = plan(&TokenLog::new(1), &stages, 1, None)[0];
        assert_eq!((replay.from, replay.to, replay.until), (0, 1000, 2));
        assert_eq!(replay.source, Some(1));
    }

    #[test]
    fn what_nobody_used_lately_is_left_alone() {
        let mut stages = [held(1000, 0), held(0, 0)];
        stages[0][0].age = RECENT + 1;
        assert_eq!(plan(&planned(1000), &stages, 1, None), []);
    }
}
