//! Calls that a stage refuses, and the state behind them.

use mesh_engine::{LogitRows, Segment, Stage, StageError, StageInput};

use super::{Known, LIMITS, PROMPT, segment, tokens};
use crate::conformance::same;

impl Known<'_> {
    /// Every bad call is refused with its own error, and neither rows nor later results change.
    pub(super) fn bad_calls(&self, stage: &mut dyn Stage) {
        let name = &self.subject.name;
        (0..LIMITS.slots).for_each(|slot| stage.truncate(slot, 0));
        let prompt = &self.prompt[..9];
        super::run(stage, &[segment(1, 0, 9, LogitRows::None)], prompt);
        let before = stage.kv_export(1, 0..9).expect("rows that are held");
        for (segments, count, expected) in bad_steps() {
            let tokens = tokens(count);
            let found = stage.forward(&segments, StageInput::Tokens(&tokens)).err();
            same(name, &format!("{segments:?}"), found, Some(expected));
        }
        let vocab = stage.info().shape.vocab;
        for token in [vocab as u32, u32::MAX] {
            let step = [segment(1, 9, 1, LogitRows::Last)];
            let found = stage.forward(&step, StageInput::Tokens(&[token])).err();
            let expected = StageError::NoSuchToken { token, vocab };
            same(name, "a token that does not exist", found, Some(expected));
        }
        let hidden = vec![0.0; stage.info().shape.hidden];
        let step = [segment(1, 9, 1, LogitRows::Last)];
        let found = stage.forward(&step, StageInput::Hidden(&hidden)).err();
        self.malformed("hidden rows for a first stage", found);
        self.bad_rows(stage);
        same(name, "rows after refusals", stage.kv_len(1), 9);
        same(
            name,
            "empty slots after refusals",
            (stage.kv_len(0), stage.kv_len(2)),
            (0, 0),
        );
        same(
            name,
            "KV after refusals",
            stage.kv_export(1, 0..9),
            Ok(before),
        );
        self.answers("after refusals", stage, 1, 9);
    }

    /// Imports, exports and copies of rows that do not exist.
    fn bad_rows(&self, stage: &mut dyn Stage) {
        let name = &self.subject.name;
        let width = stage.info().kv_bytes_per_token as usize;
        let Limits { slots, context } = limits();
        let nowhere = StageError::NoSuchSlot { slot: slots, slots };
        let gap = |slot, held, position| StageError::Gap {
            slot,
            held,
            position,
        };
        let long = StageError::ContextExceeded {
            needed: u64::from(context) + 1,
            context,
        };
        let rows = |count: usize| vec![0; count * width];
        for (slot, position, count, expected) in [
            (slots, 0, 1, &nowhere),
            (1, 10, 1, &gap(1, 9, 10)),
            (0, 1, 1, &gap(0, 0, 1)),
            (1, 0, context as usize + 1, &long),
            (1, 9, context as usize - 8, &long),
        ] {
            let found = stage.kv_import(slot, position, &rows(count));
            same(name, "import", found.as_ref(), Err(expected));
        }
        let found = stage.kv_import(1, 0, &vec![0; width - 1]).err();
        self.malformed("import of part of a row", found);
        let found = stage.kv_export(slots, 0..1);
        same(name, "export", found, Err(nowhere.clone()));
        let found = stage.kv_export(1, 0..10);
        same(name, "export", found, Err(gap(1, 9, 10)));
        let found = stage.copy_prefix(1, 0, 10);
        same(name, "copy", found, Err(gap(1, 9, 10)));
        for (from, to) in [(1, slots), (slots, 1)] {
            let found = stage.copy_prefix(from, to, 0);
            same(name, "copy", found, Err(nowhere.clone()));
        }
        stage.truncate(slots, 0);
    }

    /// Parts of a model refuse what is for other parts.
    pub(super) fn parts_refuse(&self, name: &str, first: &mut dyn Stage, second: &mut dyn Stage) {
        let at = PROMPT as u32;
        let before = (first.kv_len(1), second.kv_len(1));
        let width = first.info().shape.hidden;
        let (quiet, last) = (
            [segment(1, at, 1, LogitRows::None)],
            [segment(1, at, 1, LogitRows::Last)],
        );
        let rows = vec![0.0; 2 * width];
        let found = first.forward(&last, StageInput::Tokens(&[1])).err();
        self.malformed("logits of layers that do not end the model", found);
        let found = first.forward(&quiet, StageInput::Hidden(&rows[..width]));
        self.malformed("hidden rows for a first part", found.err());
        let found = second.forward(&last, StageInput::Tokens(&[1])).err();
        self.malformed("tokens for a second part", found);
        for numbers in [0, width - 1, 2 * width] {
            let input = StageInput::Hidden(&rows[..numbers]);
            let found = second.forward(&last, input).err();
            self.malformed("hidden rows of another width", found);
        }
        same(
            name,
            "rows after refusals",
            (first.kv_len(1), second.kv_len(1)),
            before,
        );
    }

    #[track_caller]
    fn malformed(&self, check: &str, found: Option<StageError>) {
        let name = &self.subject.name;
        assert!(
            matches!(found, Some(StageError::Malformed(_))),
            "{name}: {check}: {found:?}"
        );
    }
}

struct Limits {
    slots: u32,
    context: u32,
}

fn limits() -> Limits {
    Limits {
        slots: LIMITS.slots,
        context: LIMITS.context,
    }
}

/// Steps with numbers of tokens, and their errors, for slot 1 with 9 rows and others without.
fn bad_steps() -> Vec<(Vec<Segment>, usize, StageError)> {
    let step = |slot, position, rows| vec![segment(slot, position, rows, LogitRows::Last)];
    let malformed = |text: &str| StageError::Malformed(text.to_owned());
    let Limits { slots, context } = limits();
    let gap = |position| StageError::Gap {
        slot: 1,
        held: 9,
        position,
    };
    let left = (context - 9) as usize;
    let most = LIMITS.max_rows as usize;
    let both = [step(0, 0, most), step(1, 9, 1)].concat();
    vec![
        (
            step(slots, 0, 1),
            1,
            StageError::NoSuchSlot { slot: slots, slots },
        ),
        (step(1, 10, 1), 1, gap(10)),
        (step(1, u32::MAX, 1), 1, gap(u32::MAX)),
        (
            step(1, 9, left + 1),
            left + 1,
            StageError::ContextExceeded {
                needed: u64::from(context) + 1,
                context,
            },
        ),
        (
            [step(1, 9, 1), step(1, 9, 1)].concat(),
            2,
            malformed("slot 1 appears twice"),
        ),
        (
            step(1, 9, 0),
            0,
            malformed("the segment of slot 1 has no rows"),
        ),
        (step(1, 9, 2), 1, malformed("1 tokens for 2 rows")),
        (step(1, 9, 1), 2, malformed("2 tokens for 1 rows")),
        (
            both,
            most + 1,
            malformed(&format!("{} rows in one step, at most {most}", most + 1)),
        ),
        (vec![], 0, malformed("a step needs at least one segment")),
    ]
}
