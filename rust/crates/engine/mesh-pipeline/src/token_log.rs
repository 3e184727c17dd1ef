//! The token log: the tokens behind the KV rows of each slot of a stage.

use mesh_engine::SlotId;
use mesh_engine::scheduler::SlotOp;
use mesh_proto::HeldSlot;

use crate::StepError;

/// The tokens behind the KV rows of a stage, slot by slot.
#[derive(Debug, Clone, Default)]
pub struct TokenLog {
    slots: Vec<Vec<u32>>,
}

impl TokenLog {
    /// An empty log for `slots` slots.
    pub fn new(slots: u32) -> Self {
        TokenLog {
            slots: vec![Vec::new(); slots as usize],
        }
    }

    /// Number of slots.
    pub fn slots(&self) -> u32 {
        self.slots.len() as u32
    }

    /// The tokens of `slot`; none for a slot that does not exist.
    pub fn tokens(&self, slot: SlotId) -> &[u32] {
        self.slots.get(slot as usize).map_or(&[], Vec::as_slice)
    }

    /// Rows that `slot` holds.
    pub fn len(&self, slot: SlotId) -> u32 {
        self.tokens(slot).len() as u32
    }

    /// Rows over all slots.
    pub fn rows(&self) -> u64 {
        self.slots.iter().map(|slot| slot.len() as u64).sum()
    }

    /// True if no slot holds any rows.
    pub fn is_empty(&self) -> bool {
        self.slots.iter().all(Vec::is_empty)
    }

    /// Checks and notes a change to a slot.
    pub(crate) fn apply(&mut self, op: &SlotOp) -> Result<(), StepError> {
        match *op {
            SlotOp::Truncate { slot, len } => {
                self.slot_mut(slot)?.truncate(len as usize);
            }
            SlotOp::CopyPrefix { from, to, len } => {
                self.check(from, len)?;
                let prefix = self.tokens(from)[..len as usize].to_vec();
                *self.slot_mut(to)? = prefix;
            }
        }
        Ok(())
    }

    /// Notes rows written at `position`; the rows behind them are gone.
    pub(crate) fn write(
        &mut self,
        slot: SlotId,
        position: u32,
        tokens: &[u32],
    ) -> Result<(), StepError> {
        self.check(slot, position)?;
        let held = self.slot_mut(slot)?;
        held.truncate(position as usize);
        held.extend_from_slice(tokens);
        Ok(())
    }

    /// Fails unless rows may be written at `position`: the slot exists and has no gap before it.
    pub(crate) fn check(&self, slot: SlotId, position: u32) -> Result<(), StepError> {
        if slot >= self.slots() {
            return Err(StepError::NoSuchSlot {
                slot,
                slots: self.slots(),
            });
        }
        let held = self.len(slot);
        if position > held {
            return Err(StepError::Gap {
                slot,
                held,
                position,
            });
        }
        Ok(())
    }

    /// The slots that hold rows, for a [`mesh_proto::RingHeld`]; `more` gives a slot's `kept_from` and `age`.
    pub(crate) fn held(&self, more: impl Fn(SlotId) -> (u32, u64)) -> Vec<HeldSlot> {
        let slots = self.slots.iter().enumerate();
        slots
            .filter(|(_, tokens)| !tokens.is_empty())
            .map(|(slot, tokens)| {
                let (kept_from, age) = more(slot as u32);
                HeldSlot {
                    slot: slot as u32,
                    tokens: tokens.clone(),
                    kept_from,
                    age,
                }
            })
            .collect()
    }

    fn slot_mut(&mut self, slot: SlotId) -> Result<&mut Vec<u32>, StepError> {
        let slots = self.slots();
        self.slots
            .get_mut(slot as usize)
            .ok_or(StepError::NoSuchSlot { slot, slots })
    }
}

/// Length of the longest common prefix.
pub(crate) fn common_prefix(a: &[u32], b: &[u32]) -> u32 {
    a.iter().zip(b).take_while(|(a, b)| a == b).count() as u32
}
