//! The table of the demo, and what in it is not allowed.

use candle_lazy_parity::models::{EagerSide, ModelRow};
use std::time::Duration;

/// Lazy may take this many times eager's time.
const MAX_RATIO: f64 = 1.1;

/// Lazy may need this many bytes more than eager, beyond the weights.
const MAX_EXTRA_BYTES: u64 = 1 << 20;

/// The least time of eager that is judged in a model of one's own: what recording costs does not grow with the model, and
/// in a toy of a few thousand weights it is most of the time. The published models are always judged.
const LEAST_JUDGED: Duration = Duration::from_millis(50);

/// A line of the table.
#[derive(Debug, Clone)]
pub(super) struct Row {
    pub(super) model: ModelRow,
    /// Whether the model is the published one.
    pub(super) published: bool,
    /// How often the model was measured.
    pub(super) tries: usize,
}

impl Row {
    fn ratio(&self) -> Option<f64> {
        let eager = self.model.eager.as_ref().ok()?;
        Some(self.model.lazy.as_secs_f64() / eager.time.as_secs_f64())
    }

    fn is_slow(&self) -> bool {
        self.ratio().is_some_and(|ratio| ratio > MAX_RATIO || ratio.is_nan())
    }

    fn is_large(&self) -> bool {
        let most = |eager: &EagerSide| eager.peak.saturating_add(MAX_EXTRA_BYTES);
        self.model.eager.as_ref().is_ok_and(|eager| self.model.lazy_peak > most(eager))
    }

    fn is_judged(&self) -> bool {
        self.published || self.model.eager.as_ref().is_ok_and(|eager| eager.time >= LEAST_JUDGED)
    }

    /// The better time of two tries, eager's and lazy's of the same one; for everything else what is worse of both.
    pub(super) fn better(self, again: Row) -> Row {
        let tries = self.tries + again.tries;
        let (fast, slow) = match (self.ratio(), again.ratio()) {
            (Some(before), Some(after)) if after < before || before.is_nan() => (again, self),
            _ => (self, again),
        };
        let mut row = fast;
        row.tries = tries;
        row.model.fallbacks = row.model.fallbacks.max(slow.model.fallbacks);
        row.model.lazy_peak = row.model.lazy_peak.max(slow.model.lazy_peak);
        if let (Ok(eager), Ok(other)) = (&mut row.model.eager, &slow.model.eager) {
            eager.agrees &= other.agrees;
            eager.peak = eager.peak.min(other.peak);
            let most = eager.largest_difference.max(other.largest_difference);
            // `max` passes over a NaN
            let known = !eager.largest_difference.is_nan() && !other.largest_difference.is_nan();
            eager.largest_difference = if known { most } else { f64::NAN };
        }
        row
    }
}

/// The table as text.
pub(super) fn text(rows: &[Row]) -> String {
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
    let mut lines = vec![head.map(str::to_string).to_vec()];
    for row in rows {
        let model = &row.model;
        let eager = model.eager.as_ref().ok();
        let of = |cell: fn(&EagerSide) -> String, none: &str| eager.map_or_else(|| none.to_string(), cell);
        lines.push(vec![
            model.name.clone(),
            of(|eager| format!("{:.1e}", eager.largest_difference), "-"),
            of(|eager| ms(eager.time), "no eager twin"),
            ms(model.lazy),
            row.ratio().map_or_else(|| "-".to_string(), |ratio| format!("{ratio:.2}")),
            of(|eager| format!("{:.1}", mib(eager.peak)), "-"),
            format!("{:.1}", mib(model.lazy_peak)),
            model.kernels.to_string(),
            model.fallbacks.to_string(),
            format!("{} of {}", model.cache_hits, model.cache_hits + model.cache_misses),
        ]);
    }
    let rows = lines;
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

fn ms(time: Duration) -> String {
    format!("{:.1} ms", time.as_secs_f64() * 1e3)
}

/// What a line cannot say, in words.
pub(super) fn notes(row: &Row) -> Vec<String> {
    let mut notes = Vec::new();
    let name = &row.model.name;
    if let Err(why) = &row.model.eager {
        notes.push(format!("{name}: nothing to compare with: {why}"));
    }
    if row.tries > 1 {
        notes.push(format!("{name}: measured {} times, the better time is shown", row.tries));
    }
    if !row.is_judged() && (row.is_slow() || row.is_large()) {
        notes.push(format!("{name}: too quick for a verdict on time and memory"));
    }
    notes
}

/// What in a line is not allowed, in words.
pub(super) fn faults(row: &Row) -> Vec<String> {
    let mut found = faults_but_time(row);
    if let (true, true, Some(ratio)) = (row.is_judged(), row.is_slow(), row.ratio()) {
        found.push(format!("{}: lazy takes {ratio:.2} × eager's time, {MAX_RATIO} are allowed", row.model.name));
    }
    found
}

fn faults_but_time(row: &Row) -> Vec<String> {
    let mut found = Vec::new();
    let model = &row.model;
    match &model.eager {
        // a model that is known to have a twin must not go unchecked
        Err(why) if row.published => found.push(format!("{}: no eager twin: {why}", model.name)),
        Ok(eager) if !eager.agrees => {
            found.push(format!("{}: lazy and eager differ by {:.1e}", model.name, eager.largest_difference));
        }
        _ => {}
    }
    if model.fallbacks > 0 {
        found.push(format!("{}: {} ops ran as Candle's own", model.name, model.fallbacks));
    }
    if let (true, true, Ok(eager)) = (row.is_judged(), row.is_large(), &model.eager) {
        found.push(format!(
            "{}: lazy needs {:.1} MiB beyond the weights, eager {:.1}",
            model.name,
            mib(model.lazy_peak),
            mib(eager.peak)
        ));
    }
    found
}

/// Whether time is the only thing that is wrong: what a second try can decide.
pub(super) fn only_slow(rows: &[Row]) -> bool {
    rows.iter().any(|row| row.is_judged() && row.is_slow()) && rows.iter().all(|row| faults_but_time(row).is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(change: impl Fn(&mut Row, &mut EagerSide)) -> Row {
        let mut eager =
            EagerSide { largest_difference: 1e-6, agrees: true, time: Duration::from_millis(100), peak: 10 << 20 };
        let model = ModelRow {
            name: "tiny".to_string(),
            eager: Err("not yet".to_string()),
            lazy: Duration::from_millis(105),
            lazy_peak: 11 << 20,
            runs: 5,
            kernels: 7,
            fallbacks: 0,
            cache_hits: 3,
            cache_misses: 1,
        };
        let mut row = Row { model, published: true, tries: 1 };
        change(&mut row, &mut eager);
        row.model.eager = Ok(eager);
        row
    }

    fn lazy(ms: u64) -> Row {
        of(|row, _| row.model.lazy = Duration::from_millis(ms))
    }

    #[test]
    fn what_is_within_the_bounds_passes() {
        assert!(faults(&of(|_, _| ())).is_empty());
        assert!(faults(&lazy(110)).is_empty());
        assert!(!only_slow(&[of(|_, _| ())]));
        assert!(notes(&of(|_, _| ())).is_empty());
    }

    #[test]
    fn each_bound_is_checked() {
        assert_eq!(faults(&of(|_, eager| eager.agrees = false)).len(), 1);
        assert_eq!(faults(&of(|row, _| row.model.fallbacks = 1)).len(), 1);
        assert_eq!(faults(&of(|row, _| row.model.lazy_peak += 1)).len(), 1);
        assert_eq!(faults(&lazy(111)).len(), 1);
    }

    #[test]
    fn only_time_gets_a_second_try() {
        assert!(only_slow(&[lazy(90), lazy(200)]));
        let wrong = of(|row, _| row.model.fallbacks = 1);
        assert!(!only_slow(&[lazy(200), wrong]));
    }

    #[test]
    fn each_row_keeps_its_better_time_and_what_else_is_worse() {
        // slow in the first try, slow in the second: each row passes once
        let (first, second) = ([lazy(90), lazy(150)], [lazy(140), lazy(100)]);
        let rows: Vec<Row> = first.into_iter().zip(second).map(|(row, again)| row.better(again)).collect();
        let times: Vec<u128> = rows.iter().map(|row| row.model.lazy.as_millis()).collect();
        assert_eq!(times, [90, 100]);
        assert!(rows.iter().all(|row| faults(row).is_empty() && notes(row).len() == 1));
        // a fast try that is wrong does not hide behind a slow one that is right, nor the other way round
        let wrong = of(|row, eager| {
            row.model.lazy = Duration::from_millis(50);
            row.model.fallbacks = 2;
            (eager.agrees, eager.largest_difference) = (false, f64::NAN);
        });
        for row in [wrong.clone().better(lazy(200)), lazy(200).better(wrong)] {
            assert_eq!(row.model.lazy.as_millis(), 50);
            assert_eq!(faults(&row).len(), 2);
            assert!(row.model.eager.is_ok_and(|eager| eager.largest_difference.is_nan()));
        }
    }

    #[test]
    fn a_missing_twin_is_a_note_unless_the_model_is_the_published_one() {
        let mut row = of(|_, _| ());
        row.model.eager = Err("no such model".to_string());
        assert_eq!(faults(&row).len(), 1);
        row.published = false;
        assert!(faults(&row).is_empty());
        assert!(notes(&row)[0].contains("no such model"));
        let text = text(&[row]);
        assert!(text.contains("no eager twin"), "{text}");
    }

    #[test]
    fn a_toy_of_ones_own_is_not_judged_by_its_time() {
        let toy = |published, eager| {
            of(|row, side| {
                row.published = published;
                side.time = Duration::from_millis(eager);
                row.model.lazy = side.time * 2;
                row.model.lazy_peak = 1 << 30;
            })
        };
        assert!(faults(&toy(false, 5)).is_empty() && !only_slow(&[toy(false, 5)]));
        assert_eq!(notes(&toy(false, 5)).len(), 1);
        assert_eq!(faults(&toy(false, 500)).len(), 2);
        assert_eq!(faults(&toy(true, 5)).len(), 2);
    }

    #[test]
    fn the_table_lines_up() {
        let text = text(&[of(|_, _| ())]);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0].chars().count(), lines[1].chars().count(), "{text}");
        assert!(lines[1].contains("tiny") && lines[1].contains("1.05") && lines[1].contains("3 of 4"), "{text}");
    }
}
