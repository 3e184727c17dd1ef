//! Dates and differences of clocks, in words for people.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// `2026-11-29 13:35 UTC`. Dates before 1970 are shown as its first minute.
pub fn utc(time: SystemTime) -> String {
    let seconds = time
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs();
    let (days, minutes) = (seconds / DAY, seconds % DAY / 60);
    let (year, month, day) = civil(days);
    format!(
        "{year:04}-{month:02}-{day:02} {:02}:{:02} UTC",
        minutes / 60,
        minutes % 60
    )
}

/// A clock's error in words: `3 minutes ahead`, `56.9 years behind`.
pub fn offset(seconds: f64) -> String {
    let size = seconds.abs();
    let units = [
        ("years", 365.25 * 86_400.0),
        ("days", 86_400.0),
        ("hours", 3_600.0),
        ("minutes", 60.0),
    ];
    let (unit, length) = units
        .into_iter()
        .find(|(_, length)| size >= 2.0 * length)
        .unwrap_or(("seconds", 1.0));
    let direction = if seconds < 0.0 { "behind" } else { "ahead" };
    let amount = format!("{:.1}", size / length);
    let amount = amount.strip_suffix(".0").unwrap_or(&amount);
    format!("{amount} {unit} {direction}")
}

/// True if this date is before any release of this program: such a clock is wrong.
pub fn is_implausible(time: SystemTime) -> bool {
    time < UNIX_EPOCH + EARLIEST
}

/// Year, month and day, each from 1, of so many days after 1970-01-01 (Howard Hinnant, "chrono-compatible low-level date
/// algorithms", `civil_from_days`).
fn civil(days: u64) -> (u64, u64, u64) {
    let days = days + 719_468;
    let (era, of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    // Years begin in March here, so that the leap day is the last.
    let shifted = (5 * of_year + 2) / 153;
    let day = of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 {
        shifted + 3
    } else {
        shifted - 9
    };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    (year, month, day)
}

const DAY: u64 = 86_400;

/// 2025-01-01.
const EARLIEST: Duration = Duration::from_secs(1_735_689_600);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        for (seconds, expected) in [
            (0, "1970-01-01 00:00 UTC"),
            (951_782_400, "2000-02-29 00:00 UTC"),
            (1_735_689_599, "2024-12-31 23:59 UTC"),
            (1_735_689_600, "2025-01-01 00:00 UTC"),
            (4_107_542_400, "2100-03-01 00:00 UTC"),
            (253_402_300_799, "9999-12-31 23:59 UTC"),
        ] {
            let time = UNIX_EPOCH + Duration::from_secs(seconds);
            assert_eq!(utc(time), expected);
            assert_eq!(is_implausible(time), seconds < 1_735_689_600);
        }
        assert_eq!(
            utc(UNIX_EPOCH - Duration::from_secs(9)),
            "1970-01-01 00:00 UTC"
        );
    }

    #[test]
    fn differences_have_a_unit_and_a_direction() {
        for (seconds, expected) in [
            (-1_795_000_000.0, "56.9 years behind"),
            (180.0, "3 minutes ahead"),
            (-90.0, "90 seconds behind"),
            (3.0 * 86_400.0, "3 days ahead"),
        ] {
            assert_eq!(offset(seconds), expected);
        }
    }
}
