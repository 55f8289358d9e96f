//! The table of the demo, and what in it is not allowed.

use candle_lazy_parity::models::{ModelReport, ModelRow};

/// Lazy may take this many times eager's time.
const MAX_RATIO: f64 = 1.1;

/// Lazy may need this many bytes more than eager, beyond the weights.
const MAX_EXTRA_BYTES: u64 = 1 << 20;

fn ratio(row: &ModelRow) -> f64 {
    row.lazy.as_secs_f64() / row.eager.as_secs_f64()
}

fn is_slow(row: &ModelRow) -> bool {
    ratio(row) > MAX_RATIO || ratio(row).is_nan()
}

/// The table as text.
pub(super) fn text(report: &ModelReport) -> String {
    let head = [
        "model",
        "difference",
        "eager",
        "lazy",
        "ratio",
        "eager MiB",
        "lazy MiB",
        "kernels",
        "fallbacks",
        "cache hits",
    ];
    let mut rows = vec![head.map(str::to_string).to_vec()];
    for row in &report.rows {
        rows.push(vec![
            row.name.clone(),
            format!("{:.1e}", row.largest_difference),
            format!("{:.1} ms", row.eager.as_secs_f64() * 1e3),
            format!("{:.1} ms", row.lazy.as_secs_f64() * 1e3),
            format!("{:.2}", ratio(row)),
            format!("{:.1}", mib(row.eager_peak)),
            format!("{:.1}", mib(row.lazy_peak)),
            row.kernels.to_string(),
            row.fallbacks.to_string(),
            format!("{} of {}", row.cache_hits, row.cache_hits + row.cache_misses),
        ]);
    }
    let widths: Vec<usize> = (0..head.len())
        .map(|column| rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0))
        .collect();
    let mut lines = Vec::new();
    for row in rows {
        let mut line = String::from(" ");
        for (at, (cell, width)) in row.iter().zip(&widths).enumerate() {
            let pad = " ".repeat(width - cell.chars().count());
            // names to the left, numbers to the right
            line.push_str(&if at == 0 { format!(" {cell}{pad}") } else { format!("  {pad}{cell}") });
        }
        lines.push(line);
    }
    lines.push("  memory: the most that was allocated at once beyond the weights".to_string());
    lines.join("\n")
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

/// What in the report is not allowed, in words.
pub(super) fn faults(report: &ModelReport) -> Vec<String> {
    let mut found = Vec::new();
    if report.rows.is_empty() {
        found.push("no model was compared".to_string());
    }
    for row in &report.rows {
        found.extend(faults_but_time(row));
        if is_slow(row) {
            let message = format!("{}: lazy takes {:.2} × eager's time, {MAX_RATIO} are allowed", row.name, ratio(row));
            found.push(message);
        }
    }
    found
}

fn faults_but_time(row: &ModelRow) -> Vec<String> {
    let mut found = Vec::new();
    if !row.agrees {
        found.push(format!("{}: lazy and eager differ by {:.1e}", row.name, row.largest_difference));
    }
    if row.fallbacks > 0 {
        found.push(format!("{}: {} ops ran as Candle's own", row.name, row.fallbacks));
    }
    if row.lazy_peak > row.eager_peak.saturating_add(MAX_EXTRA_BYTES) {
        let message = format!(
            "{}: lazy needs {:.1} MiB beyond the weights, eager {:.1}",
            row.name,
            mib(row.lazy_peak),
            mib(row.eager_peak)
        );
        found.push(message);
    }
    found
}

/// Whether time is the only thing that is wrong: what a second try can decide.
pub(super) fn only_slow(report: &ModelReport) -> bool {
    report.rows.iter().any(is_slow) && report.rows.iter().all(|row| faults_but_time(row).is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn row() -> ModelRow {
        ModelRow {
            name: "tiny".to_string(),
            largest_difference: 1e-6,
            agrees: true,
            eager: Duration::from_millis(100),
            lazy: Duration::from_millis(105),
            eager_peak: 10 << 20,
            lazy_peak: 11 << 20,
            kernels: 7,
            fallbacks: 0,
            cache_hits: 3,
            cache_misses: 1,
        }
    }

    fn of(change: impl Fn(&mut ModelRow)) -> ModelReport {
        let mut row = row();
        change(&mut row);
        ModelReport { rows: vec![row] }
    }

    #[test]
    fn what_is_within_the_bounds_passes() {
        assert!(faults(&of(|_| ())).is_empty());
        assert!(!only_slow(&of(|_| ())));
    }

    #[test]
    fn each_bound_is_checked() {
        assert_eq!(faults(&of(|r| r.agrees = false)).len(), 1);
        assert_eq!(faults(&of(|r| r.fallbacks = 1)).len(), 1);
        assert_eq!(faults(&of(|r| r.lazy_peak += 1)).len(), 1);
        assert_eq!(faults(&of(|r| r.lazy = Duration::from_millis(111))).len(), 1);
        assert_eq!(faults(&ModelReport { rows: Vec::new() }).len(), 1);
    }

    #[test]
    fn only_time_gets_a_second_try() {
        let slow = |r: &mut ModelRow| r.lazy = Duration::from_millis(200);
        assert!(only_slow(&of(slow)));
        assert!(!only_slow(&of(|r| {
            slow(r);
            r.fallbacks = 1;
        })));
    }

    #[test]
    fn the_table_lines_up() {
        let text = text(&of(|_| ()));
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0].chars().count(), lines[1].chars().count(), "{text}");
        assert!(lines[1].contains("tiny") && lines[1].contains("1.05") && lines[1].contains("3 of 4"), "{text}");
    }
}
