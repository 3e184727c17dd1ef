//! Durations (`10s`, `500ms`) and sizes (`64MiB`) as text. One grammar for options, configuration files and
//! the command line.

use std::time::Duration;

/// A duration: `250us`, `500ms`, `2.5s`, `10 min`, `1h`, `7d`, or a number of seconds.
///
/// # Errors
/// A message that quotes the text and shows how to write a duration.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let parsed = split(text).and_then(|(number, unit)| {
        let factor = match unit {
            "us" | "µs" => 1e-6,
            "ms" => 1e-3,
            "" | "s" | "sec" => 1.0,
            "m" | "min" => 60.0,
            "h" => 3600.0,
            "d" => 86_400.0,
            _ => return None,
        };
        seconds(number * factor)
    });
    parsed.ok_or_else(|| invalid_duration(text))
}

/// This many seconds; `None` unless a [`Duration`] can hold them.
pub fn seconds(number: f64) -> Option<Duration> {
    Duration::try_from_secs_f64(number).ok()
}

/// The error text for an invalid duration.
pub fn invalid_duration(text: impl ToString) -> String {
    let text = text.to_string();
    format!("invalid duration {text:?}: use 500ms, 90s, 5m or 1h")
}

/// The shortest exact text form in one unit.
pub fn format_duration(duration: Duration) -> String {
    let micros = duration.as_micros();
    match micros {
        0 => "0s".to_owned(),
        _ if micros.is_multiple_of(1_000_000) => format!("{}s", micros / 1_000_000),
        _ if micros.is_multiple_of(1_000) => format!("{}ms", micros / 1_000),
        _ => format!("{micros}us"),
    }
}

/// A number of bytes: `512KiB`, `64 MiB`, `1.5GiB`, `2GB`, or a plain number. Case does not matter.
///
/// # Errors
/// A message that quotes the text and shows how to write a size.
pub fn parse_bytes(text: &str) -> Result<u64, String> {
    let parsed = split(text).and_then(|(number, unit)| {
        let factor = match unit.to_ascii_lowercase().as_str() {
            "" | "b" => 1.0,
            "k" | "kb" => 1e3,
            "m" | "mb" => 1e6,
            "g" | "gb" => 1e9,
            "t" | "tb" => 1e12,
            "ki" | "kib" => f64::from(1 << 10),
            "mi" | "mib" => f64::from(1 << 20),
            "gi" | "gib" => f64::from(1 << 30),
            "ti" | "tib" => f64::from(1 << 30) * 1024.0,
            _ => return None,
        };
        bytes(number * factor)
    });
    parsed.ok_or_else(|| invalid_bytes(text))
}

/// Rounds a number of bytes; `None` for negative numbers, and for numbers so large that an `f64` cannot
/// distinguish neighbouring integers.
pub fn bytes(number: f64) -> Option<u64> {
    let exact = 0.0..=(1u64 << 53) as f64;
    exact.contains(&number).then_some(number.round() as u64)
}

/// The error text for an invalid size.
pub fn invalid_bytes(text: impl ToString) -> String {
    let text = text.to_string();
    format!("invalid size {text:?}: use 64MiB, 20GiB or 50GB")
}

/// The shortest exact text form.
pub fn format_bytes(bytes: u64) -> String {
    let units = [(1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")];
    match units
        .iter()
        .find(|(size, _)| bytes >= *size && bytes.is_multiple_of(*size))
    {
        Some((size, unit)) => format!("{}{unit}", bytes / size),
        None => format!("{bytes}B"),
    }
}

/// Bytes for people, rounded: `98.0 MiB`.
pub fn about_bytes(bytes: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    let digits = usize::from(unit > 0);
    format!("{value:.digits$} {}", units[unit])
}

/// `1.5 GiB` into 1.5 and `GiB`.
fn split(text: &str) -> Option<(f64, &str)> {
    let text = text.trim();
    let number = text.trim_end_matches(char::is_alphabetic);
    let unit = &text[number.len()..];
    Some((number.trim_end().replace('_', "").parse().ok()?, unit))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_read_in_every_unit_and_written_back() {
        for (text, expected) in [
            ("250us", Duration::from_micros(250)),
            ("250µs", Duration::from_micros(250)),
            ("500ms", Duration::from_millis(500)),
            ("2.5 s", Duration::from_millis(2500)),
            ("1.5", Duration::from_millis(1500)),
            ("10", Duration::from_secs(10)),
            (" 10 sec ", Duration::from_secs(10)),
            ("1_000s", Duration::from_secs(1000)),
            ("1e3s", Duration::from_secs(1000)),
            ("2min", Duration::from_secs(120)),
            ("2m", Duration::from_secs(120)),
            ("12h", Duration::from_secs(43_200)),
            ("7d", Duration::from_secs(604_800)),
            ("0s", Duration::ZERO),
        ] {
            let parsed = parse_duration(text).expect(text);
            assert_eq!(parsed, expected, "{text}");
            assert_eq!(parse_duration(&format_duration(parsed)), Ok(expected));
        }
    }

    #[test]
    fn sizes_are_read_in_every_unit_and_written_back() {
        for (text, expected) in [
            ("0", 0),
            ("17", 17),
            ("17b", 17),
            ("64MiB", 64 << 20),
            ("64mi", 64 << 20),
            ("1.5 GiB", 3 << 29),
            ("20 GiB", 20 << 30),
            ("1 TiB", 1 << 40),
            ("2GB", 2_000_000_000),
            ("50 gb", 50_000_000_000),
            ("512k", 512_000),
            ("1_000", 1000),
        ] {
            let parsed = parse_bytes(text).expect(text);
            assert_eq!(parsed, expected, "{text}");
            assert_eq!(parse_bytes(&format_bytes(parsed)), Ok(expected));
        }
    }

    #[test]
    fn what_is_neither_is_quoted_with_what_to_write() {
        for text in [
            "",
            " ",
            "s",
            "-1s",
            "1 fortnight",
            "3 weeks",
            "1e999s",
            "1e400d",
            "..s",
            "nan",
            "inf",
            "inf s",
            "5é",
            "1 h 30",
            "1h30m",
            "1 2s",
            "s5",
        ] {
            let error = parse_duration(text).expect_err(text);
            assert_eq!(
                error,
                format!("invalid duration {text:?}: use 500ms, 90s, 5m or 1h")
            );
        }
        for text in [
            "",
            "MiB",
            "GB",
            "-1",
            "3 bananas",
            "1XB",
            "99999999TiB",
            "nan",
            "inf",
            "1 GiB 2",
            "1GiBé",
        ] {
            let error = parse_bytes(text).expect_err(text);
            assert_eq!(
                error,
                format!("invalid size {text:?}: use 64MiB, 20GiB or 50GB")
            );
        }
    }

    #[test]
    fn people_read_sizes_rounded() {
        for (bytes, expected) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            (98 << 20, "98.0 MiB"),
            (u64::MAX, "16777216.0 TiB"),
        ] {
            assert_eq!(about_bytes(bytes), expected);
        }
    }
}
