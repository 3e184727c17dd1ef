//! Dates, timestamps, and differences of clocks in words for people.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use time::OffsetDateTime;

/// Seconds since the Unix epoch; 0 for dates before it.
pub fn unix_seconds(time: SystemTime) -> u64 {
    since_epoch(time).as_secs()
}

/// Microseconds since the Unix epoch: the timestamp of a DCF header.
pub fn timestamp_us() -> u64 {
    u64::try_from(since_epoch(SystemTime::now()).as_micros()).unwrap_or(u64::MAX)
}

fn since_epoch(time: SystemTime) -> Duration {
    time.duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// The date in UTC, at most [`LAST_SECOND`].
pub fn date(unix_seconds: u64) -> OffsetDateTime {
    let seconds = unix_seconds.min(LAST_SECOND) as i64;
    OffsetDateTime::from_unix_timestamp(seconds).expect("dates up to the year 9999 can be shown")
}

/// `2026-11-29 13:35 UTC`. Dates before 1970 are shown as its first minute.
pub fn utc(time: SystemTime) -> String {
    utc_of(unix_seconds(time))
}

/// [`utc`] of a number of seconds since the Unix epoch.
pub fn utc_of(unix_seconds: u64) -> String {
    let date = date(unix_seconds);
    let (day, hour, minute) = (date.date(), date.hour(), date.minute());
    format!("{day} {hour:02}:{minute:02} UTC")
}

/// The first second of a day `2027-01-31` in UTC, since the Unix epoch; `None` for other texts and days before it.
pub fn seconds_of_day(text: &str) -> Option<u64> {
    let mut parts = text.splitn(3, '-');
    let mut part = |digits: usize| {
        let part = parts.next()?;
        let is_number = part.len() == digits && part.bytes().all(|byte| byte.is_ascii_digit());
        is_number.then(|| part.parse::<u16>().ok()).flatten()
    };
    let (year, month, day) = (part(4)?, part(2)?, part(2)?);
    let month = time::Month::try_from(u8::try_from(month).ok()?).ok()?;
    let date = time::Date::from_calendar_date(year.into(), month, u8::try_from(day).ok()?).ok()?;
    u64::try_from(date.midnight().assume_utc().unix_timestamp()).ok()
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
    let unit = units.into_iter().find(|(_, length)| size >= 2.0 * length);
    let (unit, length) = unit.unwrap_or(("seconds", 1.0));
    let direction = if seconds < 0.0 { "behind" } else { "ahead" };
    let amount = format!("{:.1}", size / length);
    let amount = amount.strip_suffix(".0").unwrap_or(&amount);
    format!("{amount} {unit} {direction}")
}

/// True if this date is before any release of this program: such a clock is wrong.
pub fn is_implausible(time: SystemTime) -> bool {
    time < UNIX_EPOCH + EARLIEST
}

/// 9999-12-31 23:59:59: no date behind it can be written down, in certificates neither.
pub const LAST_SECOND: u64 = 253_402_300_799;

/// 2025-01-01.
const EARLIEST: Duration = Duration::from_secs(1_735_689_600);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn days_are_read_as_they_are_written() {
        assert_eq!(seconds_of_day("1970-01-01"), Some(0));
        assert_eq!(seconds_of_day("2000-02-29"), Some(951_782_400));
        for bad in [
            "",
            "1969-12-31",
            "2001-02-29",
            "2001-2-3",
            "2001-13-01",
            "2001-01-01T00",
            "+001-01-01",
        ] {
            assert_eq!(seconds_of_day(bad), None, "{bad}");
        }
    }

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
        assert_eq!(utc_of(u64::MAX), "9999-12-31 23:59 UTC");
    }

    #[test]
    fn timestamps_count_from_the_epoch() {
        let time = UNIX_EPOCH + Duration::from_millis(1_500);
        assert_eq!(unix_seconds(time), 1);
        assert_eq!(unix_seconds(UNIX_EPOCH - Duration::from_secs(9)), 0);
        let (now, us) = (unix_seconds(SystemTime::now()), timestamp_us());
        assert!((now..now + 60).contains(&(us / 1_000_000)), "{now} {us}");
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
