//! A row's line, as text and as JSON.

use super::measure::Paired;
use super::rows::{Floor, Row};
use std::fmt;

/// The heads of the columns of a [`Line`].
pub(super) const HEAD: &str =
    "row                              eager us     lazy us    ratio  (most)    floor  of limit";

/// What is known of a row.
#[derive(Debug, Clone)]
pub(super) struct Line {
    name: String,
    floor: Option<Floor>,
    numbers: Option<Paired>,
    /// The limit's time over lazy's.
    limit_fraction: Option<f64>,
    /// Whether no measurement counted.
    pub(super) void: bool,
    failure: Option<String>,
}

impl Line {
    pub(super) fn new(row: &Row) -> Self {
        Self {
            name: row.name.clone(),
            floor: row.floor,
            numbers: None,
            limit_fraction: None,
            void: false,
            failure: None,
        }
    }

    pub(super) fn failed(row: &Row, failure: String) -> Self {
        Self { failure: Some(failure), ..Self::new(row) }
    }

    /// Keeps what was measured; times are per one of `per`.
    pub(super) fn set(&mut self, both: &Paired, per: f64, limit_fraction: Option<f64>) {
        self.numbers = Some(Paired { eager_us: both.eager_us / per, lazy_us: both.lazy_us / per, ..*both });
        self.limit_fraction = limit_fraction;
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Eager's and lazy's microseconds.
    pub(super) fn times(&self) -> (Option<f64>, Option<f64>) {
        (self.number(|n| n.eager_us), self.number(|n| n.lazy_us))
    }

    /// Whether the row has no measurement that counts, or one that falls short.
    pub(super) fn is_below(&self) -> bool {
        let Some(numbers) = self.numbers.filter(|_| self.failure.is_none() && !self.void) else { return true };
        // a NaN reaches nothing
        let reached = match self.floor {
            None => true,
            Some(Floor::Ratio(floor)) => numbers.ratio_hi >= floor,
            Some(Floor::MostUs(most)) => numbers.lazy_us <= most,
        };
        !reached
    }

    fn floor(&self) -> Option<f64> {
        self.floor.map(|floor| match floor {
            Floor::Ratio(x) | Floor::MostUs(x) => x,
        })
    }

    /// What was measured, where it was.
    fn number(&self, f: fn(&Paired) -> f64) -> Option<f64> {
        self.numbers.as_ref().map(f).filter(|x| x.is_finite())
    }

    fn json(&self) -> serde_json::Value {
        let (eager_us, lazy_us) = self.times();
        serde_json::json!({
            "name": self.name,
            "eager_us": eager_us,
            "lazy_us": lazy_us,
            "ratio": self.number(|n| n.ratio),
            "ratio_hi": self.number(|n| n.ratio_hi),
            "floor": self.floor(),
            "limit_fraction": self.limit_fraction,
        })
    }
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:<30}", self.name)?;
        if let Some(failure) = &self.failure {
            return write!(f, "  {failure}");
        }
        let Some(n) = &self.numbers else { return write!(f, "  nothing measured") };
        let cell = |x: f64, width: usize, digits: usize| {
            let text = if x.is_nan() { "-".to_string() } else { format!("{x:.digits$}") };
            format!("  {text:>width$}")
        };
        let (us, lazy_us) = (cell(n.eager_us, 9, 2), cell(n.lazy_us, 10, 3));
        write!(f, "{us}{lazy_us}{}{}", cell(n.ratio, 7, 2), cell(n.ratio_hi, 6, 2))?;
        match self.floor {
            None => write!(f, "  {:>7}", "-")?,
            Some(Floor::Ratio(floor)) => write!(f, "  {floor:>7.2}")?,
            Some(Floor::MostUs(most)) => write!(f, " {:>8}", format!("<{most}"))?,
        }
        match self.limit_fraction {
            None => write!(f, "  {:>8}", "-")?,
            Some(part) => write!(f, "  {:>7.0}%", part * 100.0)?,
        }
        if self.void {
            return write!(f, "  VOID");
        }
        if self.is_below() {
            write!(f, "  BELOW")?;
        }
        Ok(())
    }
}

/// All rows as one JSON document.
pub(super) fn json(lines: &[Line], peers: Option<serde_json::Value>) -> String {
    let rows: Vec<_> = lines.iter().map(Line::json).collect();
    let mut all = serde_json::json!({ "rows": rows });
    if let Some(peers) = peers {
        all["peers"] = peers;
    }
    format!("{all:#}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(floor: Option<Floor>, ratio_hi: f64, lazy_us: f64) -> Line {
        let numbers = Paired { eager_us: 10.0, lazy_us, ratio: ratio_hi, ratio_hi, idle_us: 10.0 };
        let (name, limit_fraction, void) = ("row".to_string(), Some(0.5), false);
        Line { name, floor, numbers: Some(numbers), limit_fraction, void, failure: None }
    }

    #[test]
    fn a_row_falls_short_by_its_upper_bound_or_its_time() {
        assert!(!line(Some(Floor::Ratio(2.0)), 2.0, 5.0).is_below());
        assert!(line(Some(Floor::Ratio(2.0)), 1.99, 5.0).is_below());
        assert!(line(Some(Floor::Ratio(2.0)), f64::NAN, 5.0).is_below());
        assert!(!line(Some(Floor::MostUs(5.0)), 0.1, 5.0).is_below());
        assert!(line(Some(Floor::MostUs(5.0)), 9.0, 5.1).is_below());
        assert!(!line(None, 0.1, 5.0).is_below());
    }

    #[test]
    fn a_void_row_and_a_failed_one_are_below() {
        let good = line(None, 2.0, 5.0);
        assert!(Line { void: true, ..good.clone() }.is_below());
        assert!(Line { numbers: None, ..good.clone() }.is_below());
        assert!(Line { failure: Some("wrong".into()), ..good }.is_below());
    }

    #[test]
    fn what_does_not_apply_is_null() {
        let text = json(&[Line { numbers: None, limit_fraction: None, ..line(None, 1.0, 1.0) }], None);
        let value: serde_json::Value = serde_json::from_str(&text).unwrap();
        for field in ["eager_us", "lazy_us", "ratio", "ratio_hi", "floor", "limit_fraction"] {
            assert!(value["rows"][0][field].is_null(), "{text}");
        }
    }
}
