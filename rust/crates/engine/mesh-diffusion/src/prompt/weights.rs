//! Weights in prompts: their notation, and their effect on hidden rows.

use super::{MOST_BYTES, MOST_WEIGHT, PromptError};

/// A part of a prompt with one weight.
#[derive(Debug, Clone, PartialEq)]
pub struct Segment {
    /// Plain text.
    pub text: String,
    /// 1 where nothing is said.
    pub weight: f32,
}

/// Reads the weights of a prompt. Parts without text are left out, and neighbours of one weight are joined.
///
/// # Errors
/// If the prompt is too long, its brackets nest too deeply, or a weight is out of range.
pub fn parse(prompt: &str) -> Result<Vec<Segment>, PromptError> {
    let bytes = prompt.len();
    if bytes > MOST_BYTES {
        return Err(PromptError::TooLong { bytes });
    }
    let mut reader = Reader::default();
    let mut rest = prompt;
    while let Some(c) = rest.chars().next() {
        let mut taken = c.len_utf8();
        match c {
            '\\' => match rest[1..].chars().next() {
                Some(plain @ ('(' | ')' | '[' | ']' | '\\')) => {
                    reader.text().push(plain);
                    taken += 1;
                }
                _ => reader.text().push(c),
            },
            '(' | '[' => reader.open(c)?,
            ')' if reader.is_in('(') => reader.close(ROUND),
            ']' if reader.is_in('[') => reader.close(1.0 / ROUND),
            ':' if reader.is_in('(') => match explicit(rest) {
                Some((weight, length)) => {
                    reader.close(weight);
                    taken = length;
                }
                None => reader.text().push(c),
            },
            c => reader.text().push(c),
        }
        rest = &rest[taken..];
    }
    reader.finish()
}

/// The weight in a text that begins with `:1.3)`, and the length of that.
fn explicit(text: &str) -> Option<(f64, usize)> {
    let end = text.find(')')?;
    let number = text[1..end].trim();
    let plain = |c: char| c.is_ascii_digit() || matches!(c, '.' | '-' | '+');
    if number.is_empty() || !number.chars().all(plain) {
        return None;
    }
    let weight = number.parse().ok()?;
    Some((weight, end + 1))
}

#[derive(Default)]
struct Reader {
    segments: Vec<(String, f64)>,
    /// Open brackets, each with the segments before it.
    open: Vec<(char, usize)>,
    /// The last segment is complete.
    ended: bool,
}

impl Reader {
    /// The text of the current segment.
    fn text(&mut self) -> &mut String {
        if self.ended || self.segments.is_empty() {
            self.segments.push((String::new(), 1.0));
            self.ended = false;
        }
        let last = self.segments.last_mut().expect("one was just pushed");
        &mut last.0
    }

    fn is_in(&self, bracket: char) -> bool {
        self.open.last().is_some_and(|&(open, _)| open == bracket)
    }

    fn open(&mut self, bracket: char) -> Result<(), PromptError> {
        if self.open.len() == MOST_DEPTH {
            return Err(PromptError::TooDeep { limit: MOST_DEPTH });
        }
        self.open.push((bracket, self.segments.len()));
        self.ended = true;
        Ok(())
    }

    /// Closes the innermost bracket, which multiplies weights by `factor`.
    fn close(&mut self, factor: f64) {
        if let Some((_, first)) = self.open.pop() {
            let inside = self.segments.iter_mut().skip(first);
            inside.for_each(|(_, weight)| *weight *= factor);
        }
        self.ended = true;
    }

    fn finish(mut self) -> Result<Vec<Segment>, PromptError> {
        while let Some(&(bracket, _)) = self.open.last() {
            self.close(if bracket == '(' { ROUND } else { 1.0 / ROUND });
        }
        let mut joined: Vec<Segment> = Vec::new();
        for (text, weight) in self.segments {
            let weight = weight as f32;
            if !(0.0..=MOST_WEIGHT).contains(&weight) {
                let text = text.chars().take(40).collect();
                return Err(PromptError::Weight { text, weight });
            }
            match joined.last_mut() {
                Some(last) if last.weight == weight => last.text.push_str(&text),
                _ if text.is_empty() => {}
                _ => joined.push(Segment { text, weight }),
            }
        }
        Ok(joined)
    }
}

/// Multiplies each hidden row by the weight of its token, then scales all of them so that their mean is as before: the emphasis of
/// AUTOMATIC1111's web interface. `hidden` is row-major `[weights, width]`; weights that are all 1 change no bit.
pub fn weigh(hidden: &mut [f32], weights: &[f32], width: usize) {
    if width == 0 || weights.iter().all(|&weight| weight == 1.0) {
        return;
    }
    let mean = |hidden: &[f32]| {
        let sum: f64 = hidden.iter().map(|&x| f64::from(x)).sum();
        sum / hidden.len().max(1) as f64
    };
    let before = mean(hidden);
    for (row, weight) in hidden.chunks_exact_mut(width).zip(weights) {
        row.iter_mut().for_each(|x| *x *= weight);
    }
    let factor = before / mean(hidden);
    if factor.is_finite() {
        let factor = factor as f32;
        hidden.iter_mut().for_each(|x| *x *= factor);
    }
}

/// Factor of a pair of round brackets without a number.
const ROUND: f64 = 1.1;
const MOST_DEPTH: usize = 32;

#[cfg(test)]
mod tests {
    use super::*;

    fn parts(prompt: &str) -> Vec<(String, f32)> {
        let segments = parse(prompt).unwrap().into_iter();
        segments
            .map(|segment| (segment.text, segment.weight))
            .collect()
    }

    fn check(prompt: &str, expected: &[(&str, f32)]) {
        let found = parts(prompt);
        let near = |(found, expected): (&(String, f32), &(&str, f32))| {
            found.0 == expected.0 && (found.1 - expected.1).abs() < 1e-6
        };
        let same = found.len() == expected.len() && found.iter().zip(expected).all(near);
        assert!(same, "{prompt:?}: {found:?}, not {expected:?}");
    }

    #[test]
    fn brackets_and_numbers_weigh_words() {
        check("", &[]);
        check("a cat", &[("a cat", 1.0)]);
        check("a (red) cat", &[("a ", 1.0), ("red", 1.1), (" cat", 1.0)]);
        check(
            "a [red] cat",
            &[("a ", 1.0), ("red", 1.0 / 1.1), (" cat", 1.0)],
        );
        check(
            "(a (red:1.5) cat)",
            &[("a ", 1.1), ("red", 1.65), (" cat", 1.1)],
        );
        check("((a)) ((b:0.5))", &[("a", 1.21), (" ", 1.0), ("b", 0.55)]);
        check("(a: 1.3 )b", &[("a", 1.3), ("b", 1.0)]);
        check("(a:.5)(b:0)", &[("a", 0.5), ("b", 0.0)]);
        check("[(a:2)]", &[("a", 2.0 / 1.1)]);
        check("(a)(b)", &[("ab", 1.1)]);
    }

    #[test]
    fn escapes_and_stray_signs_are_plain() {
        check(r"a \(b\) \[c\] \\ \d", &[(r"a (b) [c] \ \d", 1.0)]);
        check("a) b] c", &[("a) b] c", 1.0)]);
        check("time: 10:30", &[("time: 10:30", 1.0)]);
        check("(time 10:30 am)", &[("time 10:30 am", 1.1)]);
        check("(a:b)(c:)(d:1.2.3)", &[("a:bc:d:1.2.3", 1.1)]);
        check("[a:1.5]", &[("a:1.5", 1.0 / 1.1)]);
        check("a (b", &[("a ", 1.0), ("b", 1.1)]);
        check("([a", &[("a", 1.0)]);
        check("(a]b)", &[("a]b", 1.1)]);
        check("()[]", &[]);
        check("日本(語:1.2)", &[("日本", 1.0), ("語", 1.2)]);
        check("a\\", &[("a\\", 1.0)]);
    }

    #[test]
    fn hostile_prompts_are_refused() {
        let refused = |prompt: &str| parse(prompt).unwrap_err().to_string();
        assert!(refused(&"x".repeat(MOST_BYTES + 1)).contains("16384"));
        assert!(refused(&"(".repeat(33)).contains("nested"));
        assert!(refused("(a:11)").contains("weight 11"));
        assert!(refused("(a:-1)").contains("weight -1"));
        assert!(refused("((a:4):4)").contains("weight 16"));
        assert!(refused(&format!("(a:{})", "9".repeat(400))).contains("weight inf"));
        // Many brackets side by side take no long time.
        let many = "(a)[b](c:1.1)".repeat(1200);
        let started = std::time::Instant::now();
        parse(&many).unwrap();
        assert!(started.elapsed().as_secs() < 2);
    }

    proptest::proptest! {
        #[test]
        fn escaped_text_is_plain_and_any_text_is_read(text in r"[\\()\[\]:.1-3a ü]{0,60}") {
            let escaped = text.replace('\\', r"\\");
            let escaped = escaped.replace('(', r"\(").replace(')', r"\)");
            let escaped = escaped.replace('[', r"\[").replace(']', r"\]");
            let whole = if text.is_empty() { vec![] } else { vec![(text.clone(), 1.0)] };
            proptest::prop_assert_eq!(parts(&escaped), whole);
            if let Ok(segments) = parse(&text) {
                let bytes: usize = segments.iter().map(|segment| segment.text.len()).sum();
                proptest::prop_assert!(bytes <= text.len());
            }
        }
    }

    #[test]
    fn weights_scale_rows_and_keep_the_mean() {
        let rows = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0];
        let mut plain = rows;
        weigh(&mut plain, &[1.0; 3], 2);
        assert_eq!(plain, rows);
        let mut weighed = rows;
        weigh(&mut weighed, &[1.0, 2.0, 1.0], 2);
        // The sum grows from 21 to 28, so every value is scaled by 3/4.
        assert_eq!(weighed, [0.75, 1.5, 4.5, 6.0, 3.75, 4.5]);
        let mut nothing = [1.0, -1.0];
        weigh(&mut nothing, &[0.0, 0.0], 1);
        assert!(nothing.iter().all(|x| x.is_finite()));
    }
}
