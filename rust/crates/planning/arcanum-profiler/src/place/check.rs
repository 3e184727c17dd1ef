//! Validation of models, policies and nodes before planning.

use super::error::PlanError;
use super::types::{Candidate, ModelSpec, Policy, Reason, known};

/// Validates the numbers of a model and a policy.
pub(super) fn check(model: &ModelSpec, policy: &Policy) -> Result<(), PlanError> {
    check_model(model)?;
    for (field, value) in [("context", policy.context), ("slots", policy.slots)] {
        if value == 0 {
            return Err(PlanError::Policy { field });
        }
    }
    Ok(())
}

/// Validates a model's numbers.
pub(crate) fn check_model(model: &ModelSpec) -> Result<(), PlanError> {
    let limits = [
        ("layers", u64::from(model.layers), 1, MOST_LAYERS),
        ("hidden", u64::from(model.hidden), 1, 1 << 20),
        ("layer_bytes", model.layer_bytes, 1, MOST_BYTES),
        ("first_bytes", model.first_bytes, 0, MOST_BYTES),
        ("last_bytes", model.last_bytes, 0, MOST_BYTES),
        ("kv_bytes", model.kv_bytes, 0, 1 << 30),
    ];
    for (field, value, least, most) in limits {
        if !(least..=most).contains(&value) {
            return Err(PlanError::Model {
                field,
                value,
                least,
                most,
            });
        }
    }
    Ok(())
}

/// The reason why a node cannot hold a stage in any layout; `None` if it can.
pub(super) fn unusable(candidate: &Candidate, policy: &Policy, needs: u64) -> Option<Reason> {
    let reserved = &candidate.reserved_for;
    if !reserved.is_empty() && !reserved.contains(&policy.purpose) {
        return Some(Reason::Reserved {
            purposes: reserved.clone(),
        });
    }
    if !known(candidate.decode_us) {
        return Some(Reason::UnknownSpeed);
    }
    (candidate.memory < needs).then_some(Reason::TooLittleMemory {
        has: candidate.memory,
        needs,
    })
}

/// Layers that a model may have here; the largest known ones have below 200.
const MOST_LAYERS: u64 = 1024;
/// Bytes of a part of a model: 1 PiB.
const MOST_BYTES: u64 = 1 << 50;
