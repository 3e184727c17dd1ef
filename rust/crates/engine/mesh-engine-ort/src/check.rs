//! Checks of a step's arguments that all stages share.

use std::ops::Range;

use mesh_engine::{LogitRows, Segment, SlotId, StageError, StageInfo, StageInput};

use crate::options::{LoadError, OrtOptions};

/// Fails unless the slot exists.
pub(crate) fn slot(info: &StageInfo, slot: SlotId) -> Result<(), StageError> {
    if slot < info.slots {
        return Ok(());
    }
    Err(StageError::NoSuchSlot {
        slot,
        slots: info.slots,
    })
}

/// `needed` tokens fit a slot.
pub(crate) fn context(info: &StageInfo, needed: u64) -> Result<(), StageError> {
    if needed <= u64::from(info.context) {
        return Ok(());
    }
    Err(StageError::ContextExceeded {
        needed,
        context: info.context,
    })
}

/// The slot's `held` rows reach to `position`.
pub(crate) fn held(slot: SlotId, held: u32, position: u32) -> Result<(), StageError> {
    if position <= held {
        return Ok(());
    }
    Err(StageError::Gap {
        slot,
        held,
        position,
    })
}

/// Whole rows that begin within the slot's `len` rows and end within its context.
pub(crate) fn import(
    info: &StageInfo,
    id: SlotId,
    len: u32,
    position: u32,
    bytes: &[u8],
) -> Result<(), StageError> {
    slot(info, id)?;
    let per_token = info.kv_bytes_per_token as usize;
    if !bytes.len().is_multiple_of(per_token) {
        return Err(StageError::Malformed(format!(
            "{} bytes are not whole KV rows of {per_token}",
            bytes.len()
        )));
    }
    held(id, len, position)?;
    context(info, u64::from(position) + (bytes.len() / per_token) as u64)
}

/// Everything about a step; `kv_len` gives the rows that a slot holds. Returns the number of rows.
pub(crate) fn step(
    info: &StageInfo,
    segments: &[Segment],
    input: &StageInput<'_>,
    kv_len: impl Fn(SlotId) -> u32,
) -> Result<usize, StageError> {
    let malformed = |text: String| Err(StageError::Malformed(text));
    if segments.is_empty() {
        return malformed("a step needs at least one segment".into());
    }
    let mut rows = 0u64;
    for (i, segment) in segments.iter().enumerate() {
        slot(info, segment.slot)?;
        if segments[..i].iter().any(|other| other.slot == segment.slot) {
            return malformed(format!("slot {} appears twice", segment.slot));
        }
        if segment.rows == 0 {
            return malformed(format!("the segment of slot {} has no rows", segment.slot));
        }
        if segment.logits != LogitRows::None && !info.is_last() {
            return malformed(format!(
                "logits were asked of layers {:?}, which do not end the model",
                info.layers
            ));
        }
        held(segment.slot, kv_len(segment.slot), segment.position)?;
        context(info, u64::from(segment.position) + u64::from(segment.rows))?;
        rows += u64::from(segment.rows);
    }
    if rows > u64::from(info.max_rows) {
        return malformed(format!(
            "{rows} rows in one step, at most {}",
            info.max_rows
        ));
    }
    let rows = rows as usize;
    match *input {
        StageInput::Tokens(tokens) if info.is_first() => {
            if tokens.len() != rows {
                return malformed(format!("{} tokens for {rows} rows", tokens.len()));
            }
            let vocab = info.shape.vocab;
            if let Some(&token) = tokens.iter().find(|&&token| token as usize >= vocab) {
                return Err(StageError::NoSuchToken { token, vocab });
            }
        }
        StageInput::Hidden(hidden) if !info.is_first() => {
            let width = info.shape.hidden;
            if hidden.len() != rows * width {
                let found = hidden.len();
                return malformed(format!("{found} numbers for {rows} hidden rows of {width}"));
            }
        }
        StageInput::Tokens(_) => {
            return malformed("tokens, but this stage takes hidden rows".into());
        }
        StageInput::Hidden(_) => {
            return malformed("hidden rows, but this stage takes tokens".into());
        }
    }
    Ok(rows)
}

/// Puts the step's segments into `out`, asking for no logits.
pub(crate) fn without_logits(segments: &[Segment], out: &mut Vec<Segment>) {
    out.clear();
    out.extend(segments.iter().map(|segment| Segment {
        logits: LogitRows::None,
        ..*segment
    }));
}

/// A range that a model with `total` layers has.
pub(crate) fn layers(layers: &Range<u32>, total: u32) -> Result<(), LoadError> {
    if layers.start < layers.end && layers.end <= total {
        return Ok(());
    }
    Err(LoadError::Layers {
        start: layers.start,
        end: layers.end,
        layers: total,
    })
}

/// Checks the options against the model's own context length and returns the context to use.
pub(crate) fn options(options: &OrtOptions, trained: u32) -> Result<u32, LoadError> {
    let context = if options.context == 0 {
        trained
    } else {
        options.context
    };
    let checks = [
        (
            "slots",
            options.slots,
            options.slots > 0,
            "at least 1".to_owned(),
        ),
        (
            "max_rows",
            options.max_rows,
            options.max_rows > 0,
            "at least 1".to_owned(),
        ),
        (
            "context",
            context,
            (1..=trained).contains(&context),
            format!("1 to {trained}, which the model was made for"),
        ),
    ];
    for (name, value, ok, remedy) in checks {
        if !ok {
            return Err(LoadError::Option {
                name,
                value: value.into(),
                remedy,
            });
        }
    }
    Ok(context)
}
