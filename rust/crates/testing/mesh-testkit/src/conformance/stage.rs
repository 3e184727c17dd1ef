//! The contract of a [`Stage`]: ranges of layers compose, KV rows move, company and cuts change no token, bad calls
//! harm nothing.

mod calls;
mod served;

use std::ops::Range;

use mesh_engine::{LogitRows, Segment, SlotId, Stage, StageInput, StageOutput};
use mesh_model::Model;

use super::same;

/// A way to compute a model.
pub struct Subject<'a> {
    /// Name in messages.
    pub name: String,
    /// The model, of at least two layers and 256 tokens.
    pub model: &'a Model,
    /// Opens a stage of these layers within [`Limits`].
    pub open: &'a dyn Fn(Range<u32>, Limits) -> Box<dyn Stage>,
    /// Opens another one of all layers that must compute the same: with other threads, or with another division of
    /// the layers. `None` is [`Subject::open`].
    pub other: Option<&'a dyn Fn(Limits) -> Box<dyn Stage>>,
    /// Layers between which a range may end; `None` means all.
    pub cuts: Option<Vec<u32>>,
    /// Likeness of a row's results.
    pub rows: Rows,
    /// Bytes that the stages of this subject hold on a device, if somebody counts them.
    pub held: Option<&'a dyn Fn() -> u64>,
}

/// Limits of a stage that the suite opens.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// KV slots.
    pub slots: u32,
    /// Most tokens of a slot.
    pub context: u32,
    /// Most rows of a step.
    pub max_rows: u32,
}

/// The limits of all stages that the suite opens.
pub const LIMITS: Limits = Limits {
    slots: 3,
    context: 48,
    max_rows: 32,
};

/// Likeness of the results of one row, whatever shares its step and however its prompt was cut.
#[derive(Debug, Clone, Copy)]
pub enum Rows {
    /// The same bits.
    Exact,
    /// A provider chooses its algorithm by the number of rows.
    Near {
        /// Largest 1 − cosine of a row.
        off: f64,
        /// Distance of the two best logits below which either may be chosen.
        tie: f32,
    },
}

impl Subject<'_> {
    /// Runs all checks.
    ///
    /// # Panics
    /// If one of them fails.
    pub fn check(&self) {
        let layers = self.model.config().layers;
        let held = || self.held.map(|held| held());
        let at_first = held();
        let mut stage = (self.open)(0..layers, LIMITS);
        let before = held();
        same(&self.name, "layers", stage.info().layers.clone(), 0..layers);
        let known = Known::compute(self, &mut *stage);
        known.company_and_cuts(&mut *stage);
        known.truncation(&mut *stage);
        known.movement(&mut *stage);
        known.bad_calls(&mut *stage);
        (0..LIMITS.slots).for_each(|slot| stage.truncate(slot, 0));
        same(&self.name, "bytes held by empty slots", held(), before);
        known.serving(stage);
        same(&self.name, "bytes held without a stage", held(), at_first);
        let cuts = self.cuts.clone();
        for cut in cuts.unwrap_or_else(|| (1..layers).collect()) {
            known.ranges(cut);
        }
    }

    /// Panics unless two results of the same row are alike.
    #[track_caller]
    fn alike(&self, check: &str, found: &[f32], expected: &[f32]) {
        let name = &self.name;
        same(name, check, found.len(), expected.len());
        match self.rows {
            Rows::Exact => {
                let bits = |row: &[f32]| row.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                assert!(bits(found) == bits(expected), "{name}: {check}: other bits");
            }
            Rows::Near { off, .. } => {
                let found = 1.0 - cosine(found, expected);
                assert!(found < off, "{name}: {check}: 1 - cosine = {found:e}");
            }
        }
    }

    /// Panics unless `token` is the best of `row`, or so near to it that it may be chosen.
    #[track_caller]
    fn chosen(&self, check: &str, row: &[f32], token: u32) {
        let gap = row[best(row)] - row[token as usize];
        let most = match self.rows {
            Rows::Exact => 0.0,
            Rows::Near { tie, .. } => tie,
        };
        let name = &self.name;
        assert!(
            gap <= most,
            "{name}: {check}: token {token} is {gap} below the best"
        );
    }
}

/// Results of a prompt that is computed at once and alone, and of the tokens that follow.
struct Known<'a> {
    subject: &'a Subject<'a>,
    prompt: Vec<u32>,
    /// Logits of each row of the prompt.
    rows: Vec<Vec<f32>>,
    /// The greedy answer.
    answer: Vec<u32>,
    /// Logits behind each token of the answer.
    behind: Vec<Vec<f32>>,
    /// Bytes of a KV row of all layers.
    kv_bytes: u64,
}

const PROMPT: usize = 21;
const ANSWER: usize = 5;

impl<'a> Known<'a> {
    fn compute(subject: &'a Subject<'a>, stage: &mut dyn Stage) -> Known<'a> {
        let prompt = tokens(PROMPT);
        let rows = run(stage, &[segment(0, 0, PROMPT, LogitRows::All)], &prompt);
        same(&subject.name, "rows of logits", rows.len(), PROMPT);
        let mut known = Known {
            subject,
            prompt,
            rows,
            answer: Vec::new(),
            behind: Vec::new(),
            kv_bytes: stage.info().kv_bytes_per_token,
        };
        let mut row = &known.rows[PROMPT - 1];
        while known.answer.len() < ANSWER {
            let token = best(row) as u32;
            known.answer.push(token);
            let at = stage.kv_len(0);
            let next = run(stage, &[segment(0, at, 1, LogitRows::Last)], &[token]);
            known.behind.extend(next);
            row = &known.behind[known.behind.len() - 1];
        }
        same(
            &subject.name,
            "rows held",
            stage.kv_len(0) as usize,
            PROMPT + ANSWER,
        );
        // Whatever the slot held before.
        known.answers("the same again", stage, 2, 0);
        known
    }

    /// Continues `slot`, which holds `from` tokens of the prompt, to the end of the answer.
    #[track_caller]
    fn answers(&self, check: &str, stage: &mut dyn Stage, slot: SlotId, from: usize) {
        let rest = &self.prompt[from..];
        let step = [segment(slot, from as u32, rest.len(), LogitRows::Last)];
        let mut rows = run(stage, &step, rest);
        let mut expected = &self.rows[PROMPT - 1];
        for (i, &token) in self.answer.iter().enumerate() {
            self.subject.alike(check, &rows[0], expected);
            self.subject.chosen(check, &rows[0], token);
            let step = [segment(slot, (PROMPT + i) as u32, 1, LogitRows::Last)];
            rows = run(stage, &step, &[token]);
            expected = &self.behind[i];
        }
        self.subject.alike(check, &rows[0], expected);
    }

    /// A prompt in pieces, each in a step with other sequences, and an answer beside two others.
    fn company_and_cuts(&self, stage: &mut dyn Stage) {
        let check = "in pieces beside other sequences";
        (0..LIMITS.slots).for_each(|slot| stage.truncate(slot, 0));
        let (noise, mut at) = (tokens(LIMITS.max_rows as usize), 0);
        let mut row = Vec::new();
        for (turn, to) in [1, 8, 9, PROMPT].into_iter().enumerate() {
            let (piece, beside) = (&self.prompt[at..to], &noise[turn..2 * turn + 1]);
            let [before, after] = [0, 2].map(|slot| stage.kv_len(slot));
            let step = [
                segment(0, before, beside.len(), LogitRows::Last),
                segment(1, at as u32, piece.len(), LogitRows::All),
                segment(2, after, beside.len(), LogitRows::None),
            ];
            let rows = run(stage, &step, &[beside, piece, beside].concat());
            same(&self.subject.name, check, rows.len(), 1 + piece.len());
            for (row, expected) in rows[1..].iter().zip(&self.rows[at..]) {
                self.subject.alike(check, row, expected);
            }
            (at, row) = (to, rows[piece.len()].clone());
        }
        for (i, &token) in self.answer.iter().enumerate() {
            self.subject.chosen(check, &row, token);
            let [before, after] = [0, 2].map(|slot| stage.kv_len(slot));
            // Slot 0 stays where it is, and a new sequence begins in slot 2.
            let step = [
                segment(2, after.min(i as u32), 1, LogitRows::None),
                segment(1, (PROMPT + i) as u32, 1, LogitRows::Last),
                segment(0, before - 1, 1, LogitRows::Last),
            ];
            row = run(stage, &step, &[noise[i], token, noise[3]]).swap_remove(0);
            self.subject.alike(check, &row, &self.behind[i]);
        }
    }

    fn truncation(&self, stage: &mut dyn Stage) {
        let name = &self.subject.name;
        let others = stage
            .kv_export(0, 0..stage.kv_len(0))
            .expect("rows that are held");
        for len in [PROMPT as u32, 9, 9] {
            stage.truncate(1, len);
            same(name, "rows after truncation", stage.kv_len(1), len);
        }
        stage.truncate(1, 10);
        same(name, "truncation beyond the end", stage.kv_len(1), 9);
        self.answers("after truncation", stage, 1, 9);
        let after = stage.kv_export(0, 0..stage.kv_len(0));
        same(name, "another slot after truncation", after, Ok(others));
        stage.truncate(1, 0);
        same(name, "rows after truncation to nothing", stage.kv_len(1), 0);
        self.answers("after truncation to nothing", stage, 1, 0);
    }

    /// KV rows go to another stage in two parts, come back into another slot, and are copied between slots.
    fn movement(&self, stage: &mut dyn Stage) {
        let name = &self.subject.name;
        let layers = self.subject.model.config().layers;
        let mut other = match self.subject.other {
            Some(open) => open(LIMITS),
            None => (self.subject.open)(0..layers, LIMITS),
        };
        let width = stage.info().kv_bytes_per_token as usize;
        same(
            name,
            "bytes of a KV row",
            other.info().kv_bytes_per_token as usize,
            width,
        );
        let held = PROMPT as u32 - 1;
        let export = |rows| stage.kv_export(1, rows).expect("rows that are held");
        let (head, tail) = (export(0..5), export(5..held));
        same(name, "bytes of exported rows", head.len(), 5 * width);
        let whole = [&head[..], &tail].concat();
        same(
            name,
            "exported rows in one piece",
            export(0..held),
            whole.clone(),
        );
        same(name, "no exported rows", export(5..5), Vec::new());
        let mut import = |position, rows: &[u8]| {
            let imported = other.kv_import(2, position, rows);
            same(name, "import", imported, Ok(()));
            other.kv_len(2)
        };
        // Rows at a position replace all from there on.
        import(0, &whole);
        same(name, "rows after an import", import(0, &head), 5);
        same(
            name,
            "rows after an import behind them",
            import(5, &tail),
            held,
        );
        same(
            name,
            "imported rows",
            other.kv_export(2, 0..held),
            Ok(whole),
        );
        self.answers("after an import", &mut *other, 2, PROMPT - 1);
        let back = other.kv_export(2, 0..held).expect("rows that are held");
        stage.truncate(0, 0);
        same(name, "import back", stage.kv_import(0, 0, &back), Ok(()));
        self.answers("after an import back", stage, 0, PROMPT - 1);
        stage.copy_prefix(0, 2, 9).expect("rows that are held");
        same(name, "copied rows", stage.kv_len(2), 9);
        self.answers("after a copy", stage, 2, 9);
        stage.copy_prefix(0, 0, 9).expect("rows that are held");
        self.answers("after a copy onto itself", stage, 0, 9);
    }

    /// `0..cut` and `cut..layers` one after the other compute what all layers do.
    fn ranges(&self, cut: u32) {
        let name = format!("{} cut at {cut}", self.subject.name);
        let layers = self.subject.model.config().layers;
        let mut first = (self.subject.open)(0..cut, LIMITS);
        let mut second = (self.subject.open)(cut..layers, LIMITS);
        let sum = first.info().kv_bytes_per_token + second.info().kv_bytes_per_token;
        same(&name, "bytes of KV rows", sum, self.kv_bytes);
        let mut step = |at: u32, tokens: &[u32]| {
            let rows = tokens.len();
            let quiet = [segment(1, at, rows, LogitRows::None)];
            let hidden = numbers(first.forward(&quiet, StageInput::Tokens(tokens)));
            same(
                &name,
                "hidden rows",
                hidden.len(),
                rows * first.info().shape.hidden,
            );
            let last = [segment(1, at, rows, LogitRows::Last)];
            numbers(second.forward(&last, StageInput::Hidden(&hidden)))
        };
        step(0, &self.prompt[..6]);
        let mut row = step(6, &self.prompt[6..]);
        let mut expected = &self.rows[PROMPT - 1];
        for (i, &token) in self.answer.iter().enumerate() {
            self.subject.alike(&name, &row, expected);
            self.subject.chosen(&name, &row, token);
            row = step((PROMPT + i) as u32, &[token]);
            expected = &self.behind[i];
        }
        self.subject.alike(&name, &row, expected);
        self.parts_refuse(&name, &mut *first, &mut *second);
    }
}

/// A part of a step.
fn segment(slot: SlotId, position: u32, rows: usize, logits: LogitRows) -> Segment {
    Segment {
        slot,
        position,
        rows: rows as u32,
        logits,
    }
}

/// Runs a step of a whole model and returns its rows of logits.
#[track_caller]
fn run(stage: &mut dyn Stage, segments: &[Segment], tokens: &[u32]) -> Vec<Vec<f32>> {
    let vocab = stage.info().shape.vocab;
    let logits = numbers(stage.forward(segments, StageInput::Tokens(tokens)));
    logits.chunks(vocab).map(<[f32]>::to_vec).collect()
}

#[track_caller]
fn numbers(output: Result<StageOutput<'_>, mesh_engine::StageError>) -> Vec<f32> {
    match output.expect("a valid step") {
        StageOutput::Hidden(rows) | StageOutput::Logits(rows) => rows.to_vec(),
    }
}

/// Tokens that are not all the same.
fn tokens(count: usize) -> Vec<u32> {
    (0..count as u32).map(|i| (i * 37 + 11) % 256).collect()
}

/// Index of the largest number, the first of equals.
fn best(row: &[f32]) -> usize {
    (0..row.len()).fold(0, |best, i| if row[i] > row[best] { i } else { best })
}

fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot = |a: &[f32], b: &[f32]| -> f64 {
        let products = a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b));
        products.sum()
    };
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}
