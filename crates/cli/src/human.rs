//! Formats sizes, ages and percentages for people.

use jiff::Timestamp;

/// Formats a size in bytes: `1.5 GiB`, `300 MiB`, `12 B`.
pub(crate) fn bytes(n: u64) -> String {
    const UNITS: [(&str, u32); 5] = [("PiB", 50), ("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)];
    for (unit, shift) in UNITS {
        if n >= 1 << shift {
            let value = n as f64 / (1u64 << shift) as f64;
            let digits = usize::from(value.fract() >= 0.05 && value < 100.0);
            return format!("{value:.digits$} {unit}");
        }
    }
    format!("{n} B")
}

/// Formats a size in bytes; `-` if it has not been measured yet.
pub(crate) fn measured(n: Option<u64>) -> String {
    n.map_or_else(|| "-".to_owned(), bytes)
}

/// Formats a size in MiB.
pub(crate) fn mib(n: u64) -> String {
    bytes(n.saturating_mul(1 << 20))
}

/// Formats the time since an RFC 3339 timestamp; returns text that is not one unchanged.
pub(crate) fn age(created_at: &str, now: Timestamp) -> String {
    match created_at.parse::<Timestamp>() {
        Ok(then) => duration(u64::try_from(now.duration_since(then).as_secs()).unwrap_or(0)),
        Err(_) => created_at.to_owned(),
    }
}

/// Formats a duration in its largest unit: `42 s`, `5 min`, `3 h`, `12 d`.
pub(crate) fn duration(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} min", seconds / 60),
        3600..172_800 => format!("{} h", seconds / 3600),
        _ => format!("{} d", seconds / 86_400),
    }
}

/// Returns `part` as a percentage of `whole`, rounded down; a `whole` of 0 counts as 1.
pub(crate) fn percent(part: u64, whole: u64) -> u64 {
    u64::try_from(u128::from(part) * 100 / u128::from(whole.max(1))).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_at_most_one_decimal() {
        for (n, shown) in [
            (0, "0 B"),
            (12, "12 B"),
            (300 << 20, "300 MiB"),
            (1536 << 20, "1.5 GiB"),
            (2 << 40, "2 TiB"),
        ] {
            assert_eq!(bytes(n), shown);
        }
        assert_eq!(mib(512), "512 MiB");
        assert_eq!((measured(None), measured(Some(0))), ("-".to_owned(), "0 B".to_owned()));
        assert_eq!(mib(1024), "1 GiB");
        assert_eq!(bytes(u64::MAX), "16384 PiB");
    }

    #[test]
    fn ages_have_one_unit() {
        let now: Timestamp = "2026-01-10T00:00:00Z".parse().unwrap();
        for (then, shown) in [
            ("2026-01-10T00:00:00Z", "0 s"),
            ("2026-01-10T00:00:09Z", "0 s"),
            ("2026-01-09T23:59:18.5Z", "41 s"),
            ("2026-01-09T23:55:00Z", "5 min"),
            ("2026-01-09T21:00:00+00:00", "3 h"),
            ("2025-12-29T00:00:00Z", "12 d"),
            ("yesterday", "yesterday"),
        ] {
            assert_eq!(age(then, now), shown, "{then}");
        }
    }

    #[test]
    fn percentages_never_divide_by_zero() {
        assert_eq!(
            (percent(1, 3), percent(0, 0), percent(u64::MAX, u64::MAX)),
            (33, 0, 100)
        );
    }
}
