//! Reductions over any set of dims.

use super::{bad, indices, strides, Acc, Arr, Result, Summed};

/// Reductions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reduction {
    /// The sum; 0 over nothing.
    Sum,
    /// The sum divided by the number of elements.
    Mean,
    /// The largest element.
    Max,
    /// The smallest element.
    Min,
}

/// The reduction over the dims in `axes` (bit d for dim d).
///
/// # Errors
/// For the largest or smallest element of nothing.
pub fn reduce(f: Reduction, x: &Arr, axes: u32, keepdim: bool) -> Result<Summed> {
    let reduced = |d: usize| axes & (1 << d) != 0;
    let kept: Vec<usize> = x.dims.iter().enumerate().map(|(d, &n)| if reduced(d) { 1 } else { n }).collect();
    let count: usize = x.dims.iter().enumerate().filter(|(d, _)| reduced(*d)).map(|(_, &n)| n).product();
    if count == 0 && matches!(f, Reduction::Max | Reduction::Min) {
        return bad("no largest element of nothing");
    }
    let start = match f {
        Reduction::Max => f64::NEG_INFINITY,
        Reduction::Min => f64::INFINITY,
        _ => 0.0,
    };
    let to = strides(&kept);
    let mut sums = vec![Acc::default(); kept.iter().product()];
    let mut extremes = vec![start; sums.len()];
    for (index, &value) in indices(&x.dims).zip(&x.data) {
        let at: usize = index.iter().enumerate().map(|(d, &i)| if reduced(d) { 0 } else { i * to[d] }).sum();
        sums[at].add(value);
        match f {
            Reduction::Max if value > extremes[at] => extremes[at] = value,
            Reduction::Min if value < extremes[at] => extremes[at] = value,
            _ => {}
        }
    }
    let n = count as f64;
    let (data, magnitude): (Vec<f64>, Vec<f64>) = match f {
        Reduction::Sum => sums.iter().map(|s| (s.value(), s.magnitude())).unzip(),
        Reduction::Mean => sums.iter().map(|s| (s.value() / n, s.magnitude() / n)).unzip(),
        Reduction::Max | Reduction::Min => extremes.iter().map(|&e| (e, e.abs())).unzip(),
    };
    let dims: Vec<usize> =
        if keepdim { kept } else { x.dims.iter().enumerate().filter(|(d, _)| !reduced(*d)).map(|(_, &n)| n).collect() };
    Ok(Summed { value: Arr { dims: dims.clone(), data }, magnitude: Arr { dims, data: magnitude }, inner: None })
}
