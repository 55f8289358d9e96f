//! One result beside the other.

use candle_core::Tensor;
use candle_lazy::exec::{EvalReport, LazyTensor};
use std::io::Write;

pub type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Writes a line to stdout; one that does not arrive is an error, as a program that panics says nothing of the models.
pub fn say(text: std::fmt::Arguments<'_>) -> Result<()> {
    Ok(writeln!(std::io::stdout(), "{text}")?)
}

/// The largest difference, relative to the largest |value| of the eager result.
pub const TOLERANCE: f64 = 1e-4;

/// Ops that may fall back to Candle's own kernels: integer arithmetic that no kernel of ours serves. None is needed so far.
const MAY_FALL_BACK: &[&str] = &[];

/// What was compared for one model, and what was found.
pub struct Check {
    model: String,
    what: &'static str,
    models: usize,
    results: usize,
    worst: f64,
    report: EvalReport,
    pub faults: Vec<String>,
}

impl Check {
    pub fn new(model: &str, what: &'static str) -> Self {
        let (report, faults) = (EvalReport::default(), Vec::new());
        Self { model: model.to_string(), what, models: 0, results: 0, worst: 0.0, report, faults }
    }

    /// Another pair of models begins.
    pub fn another_model(&mut self) {
        self.models += 1;
    }

    /// Evaluates the ported result and compares it: shape, dtype, numbers, the largest element of every row.
    pub fn compare(&mut self, what: &str, want: &Tensor, got: &LazyTensor) -> Result<()> {
        let (got, report) = got.eval_with_report()?;
        self.results += 1;
        self.report.merge(&report);
        for op in report.fallbacks.keys().chain(report.replayed.keys()) {
            if !MAY_FALL_BACK.contains(op) {
                self.faults.push(format!("{what}: `{op}` ran as Candle's own op"));
            }
        }
        if (got.dims(), got.dtype()) != (want.dims(), want.dtype()) {
            let (got, want) = ((got.shape(), got.dtype()), (want.shape(), want.dtype()));
            self.faults.push(format!("{what}: {got:?} instead of {want:?}"));
            return Ok(());
        }
        let (got_rows, want_rows) = (rows(&got)?, rows(want)?);
        let scale = want_rows.iter().flatten().fold(0f64, |most, v| most.max(f64::from(v.abs())));
        let mut difference = 0f64;
        for (got, want) in got_rows.iter().zip(&want_rows) {
            for (got, want) in got.iter().zip(want) {
                let d = (f64::from(*got) - f64::from(*want)).abs();
                difference = if d.is_nan() { f64::INFINITY } else { difference.max(d) };
            }
            if argmax(got) != argmax(want) {
                self.faults.push(format!(
                    "{what}: the largest element of a row is {} instead of {}",
                    argmax(got),
                    argmax(want)
                ));
            }
        }
        let difference = if difference == 0.0 { 0.0 } else { difference / scale };
        self.worst = self.worst.max(difference);
        if difference > TOLERANCE || scale == 0.0 {
            self.faults.push(format!("{what}: differs by {difference:.1e} of the largest value, {scale:.3}"));
        }
        Ok(())
    }

    /// One line about the numbers, one about what ran.
    pub fn print(&self) -> Result<()> {
        let (models, results) = (self.models, self.results);
        say(format_args!(
            "{}, {}: {models} models, {results} results, largest difference {:.1e} ({TOLERANCE:.0e} allowed), {} faults",
            self.model,
            self.what,
            self.worst,
            self.faults.len()
        ))?;
        let list = |map: &std::collections::BTreeMap<&'static str, usize>| {
            let names: Vec<String> = map.iter().map(|(name, count)| format!("{name} {count}")).collect();
            if names.is_empty() {
                "none".to_string()
            } else {
                names.join(", ")
            }
        };
        let r = &self.report;
        say(format_args!(
            "{}, {}: {} nodes in {} kernels ({}), fallbacks {} ({})",
            self.model,
            self.what,
            r.nodes,
            r.kernel_count(),
            list(&r.kernels),
            r.fallback_count() + r.replayed.values().sum::<usize>(),
            list(&r.fallbacks)
        ))
    }
}

/// Everything but the last dim as rows.
fn rows(tensor: &Tensor) -> Result<Vec<Vec<f32>>> {
    let width = tensor.dim(candle_core::D::Minus1)?;
    Ok(tensor.reshape(((), width))?.to_vec2()?)
}

/// The first of the largest elements.
pub fn argmax(row: &[f32]) -> usize {
    let mut best = 0;
    for (at, value) in row.iter().enumerate() {
        if *value > row[best] {
            best = at;
        }
    }
    best
}

/// The largest element of the last row of every batch entry, as the next ids (b, 1).
pub fn greedy(logits: &Tensor) -> Result<Tensor> {
    let width = logits.dim(candle_core::D::Minus1)?;
    let batch = logits.dim(0)?;
    let next: Vec<u32> = logits
        .reshape((batch, (), width))?
        .to_vec3::<f32>()?
        .iter()
        .map(|rows| rows.last().map_or(0, |row| argmax(row)) as u32)
        .collect();
    Ok(Tensor::from_vec(next, (batch, 1), &candle_core::Device::Cpu)?)
}
