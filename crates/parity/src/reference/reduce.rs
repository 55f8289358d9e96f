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
    /// Σ(x − mean)²/(n − 1).
    Var,
    /// ln Σeˣ.
    LogSumExp,
}

/// The reduction over the dims in `axes` (bit d for dim d).
///
/// # Errors
/// For the largest or smallest element of nothing.
pub fn reduce(f: Reduction, x: &Arr, axes: u32, keepdim: bool) -> Result<Summed> {
    let reduced = |d: usize| axes & (1 << d) != 0;
    let kept: Vec<usize> = x.dims.iter().enumerate().map(|(d, &n)| if reduced(d) { 1 } else { n }).collect();
    let count: usize = x.dims.iter().enumerate().filter(|(d, _)| reduced(*d)).map(|(_, &n)| n).product();
    if count == 0 && matches!(f, Reduction::Max | Reduction::Min | Reduction::LogSumExp) {
        return bad("no largest element of nothing");
    }
    let start = match f {
        Reduction::Max | Reduction::LogSumExp => f64::NEG_INFINITY,
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
            Reduction::Max | Reduction::LogSumExp if value > extremes[at] => extremes[at] = value,
            Reduction::Min if value < extremes[at] => extremes[at] = value,
            _ => {}
        }
    }
    let n = count as f64;
    let place = |index: &[usize]| -> usize {
        index.iter().enumerate().map(|(d, &i)| if reduced(d) { 0 } else { i * to[d] }).sum()
    };
    let mut second = vec![Acc::default(); sums.len()];
    let mut inner = vec![0.0; sums.len()];
    for (index, &value) in indices(&x.dims).zip(&x.data) {
        let at = place(&index);
        match f {
            Reduction::Var => {
                let mean = sums[at].value() / n;
                second[at].add_product(value - mean, value - mean);
                // a rounding of the mean moves each difference
                inner[at] += 2.0 * (value - mean).abs() * (value.abs() + mean.abs()) / (n - 1.0);
            }
            // an infinite largest element is not taken out: the result is as large as it
            Reduction::LogSumExp if extremes[at].is_infinite() => second[at].add(libm::exp(value)),
            Reduction::LogSumExp => second[at].add(libm::exp(value - extremes[at])),
            _ => {}
        }
    }
    let (data, magnitude): (Vec<f64>, Vec<f64>) = match f {
        Reduction::Sum => sums.iter().map(|s| (s.value(), s.magnitude())).unzip(),
        Reduction::Mean => sums.iter().map(|s| (s.value() / n, s.magnitude() / n)).unzip(),
        Reduction::Var if count == 0 => sums.iter().map(|_| (f64::NAN, 0.0)).unzip(),
        Reduction::Var => second.iter().map(|s| s.value() / (n - 1.0)).map(|v| (v, v)).unzip(),
        Reduction::LogSumExp => second
            .iter()
            .zip(&extremes)
            .map(|(s, &max)| (libm::log(s.value()), max))
            .map(|(log, max)| if max.is_infinite() { (log, 0.0) } else { (log + max, log.abs() + max.abs()) })
            .unzip(),
        Reduction::Max | Reduction::Min => extremes.iter().map(|&e| (e, e.abs())).unzip(),
    };
    let dims: Vec<usize> =
        if keepdim { kept } else { x.dims.iter().enumerate().filter(|(d, _)| !reduced(*d)).map(|(_, &n)| n).collect() };
    let inner = (f == Reduction::Var).then(|| Arr { dims: dims.clone(), data: inner });
    Ok(Summed { value: Arr { dims: dims.clone(), data }, magnitude: Arr { dims, data: magnitude }, inner })
}

/// Σ(|x| + |mean|)²/(n − 1): what the variance's differences are off by, squared, in squared units of the arithmetic. A row of equal
/// numbers has no variance and this.
///
/// # Errors
/// As [`reduce`].
pub fn variance_of_roundings(x: &Arr, axes: u32, keepdim: bool) -> Result<Arr> {
    let mean = reduce(Reduction::Mean, x, axes, true)?.value;
    let data = indices(&x.dims)
        .zip(&x.data)
        .map(|(index, &value)| (value.abs() + mean.data[super::broadcast_offset(&mean.dims, &index)].abs()).powi(2))
        .collect();
    let count: usize = x.dims.iter().enumerate().filter(|(d, _)| axes & (1 << d) != 0).map(|(_, &n)| n).product();
    let squares = Arr { dims: x.dims.clone(), data };
    Ok(reduce(Reduction::Sum, &squares, axes, keepdim)?.value.map(|s| s / (count as f64 - 1.0)))
}
