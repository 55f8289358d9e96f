//! Sums of products.

use super::{bad, broadcast_dims, broadcast_offset, indices, Acc, Arr, Result, Summed};

/// (…, m, k) × (…, k, n) with broadcast batch dims.
///
/// # Errors
/// When the shapes do not fit.
pub fn matmul(a: &Arr, b: &Arr) -> Result<Summed> {
    let ([a_batch @ .., m, k], [b_batch @ .., k2, n]) = (a.dims.as_slice(), b.dims.as_slice()) else {
        return bad("a product needs two dims");
    };
    if k != k2 {
        return bad(format!("inner dims {k} and {k2}"));
    }
    let batch = broadcast_dims(a_batch, b_batch)?;
    let mut dims = batch.clone();
    dims.extend([*m, *n]);
    let (mut data, mut magnitude) = (Vec::new(), Vec::new());
    for index in indices(&batch) {
        let a_at = broadcast_offset(a_batch, &index) * m * k;
        let b_at = broadcast_offset(b_batch, &index) * k * n;
        for i in 0..*m {
            for j in 0..*n {
                let mut acc = Acc::default();
                for l in 0..*k {
                    acc.add_product(a.data[a_at + i * k + l], b.data[b_at + l * n + j]);
                }
                data.push(acc.value());
                magnitude.push(acc.magnitude());
            }
        }
    }
    Ok(Summed { value: Arr { dims: dims.clone(), data }, magnitude: Arr { dims, data: magnitude }, inner: None })
}

/// Row by row: (rows, k) × (k, n) for an `x` of any rank, where `b(l, j)` reads the right side.
fn rows_times(x: &Arr, k: usize, n: usize, b: impl Fn(usize, usize) -> f64) -> Summed {
    let rows = x.data.len().checked_div(k).unwrap_or_else(|| x.dims.iter().rev().skip(1).product());
    let (mut data, mut magnitude) = (Vec::new(), Vec::new());
    for row in 0..rows {
        for j in 0..n {
            let mut acc = Acc::default();
            for l in 0..k {
                acc.add_product(x.data[row * k + l], b(l, j));
            }
            data.push(acc.value());
            magnitude.push(acc.magnitude());
        }
    }
    let mut dims = x.dims.clone();
    if let Some(last) = dims.last_mut() {
        *last = n;
    }
    Summed { value: Arr { dims: dims.clone(), data }, magnitude: Arr { dims, data: magnitude }, inner: None }
}

/// x·wᵀ + b with w (out, in).
///
/// # Errors
/// When the shapes do not fit.
pub fn linear(x: &Arr, w: &Arr, b: Option<&Arr>) -> Result<Summed> {
    let [n, k] = w.dims[..] else {
        return bad("a weight has two dims");
    };
    if x.dims.last() != Some(&k) {
        return bad(format!("{:?} times the weight {:?}", x.dims, w.dims));
    }
    let mut out = rows_times(x, k, n, |l, j| w.data[j * k + l]);
    if let Some(b) = b {
        for (i, (v, m)) in out.value.data.iter_mut().zip(&mut out.magnitude.data).enumerate() {
            *v += b.data[i % n];
            *m += b.data[i % n].abs();
        }
    }
    Ok(out)
}

/// (x·A·B)·scale + base.
///
/// # Errors
/// When the shapes do not fit.
pub fn lora(x: &Arr, a: &Arr, b: &Arr, scale: f64, base: Option<&Arr>) -> Result<Summed> {
    let ([k, r], [r2, n]) = (&a.dims[..], &b.dims[..]) else {
        return bad("A and B have two dims");
    };
    if x.dims.last() != Some(k) || r != r2 {
        return bad(format!("{:?}, {:?}, {:?}", x.dims, a.dims, b.dims));
    }
    let hidden = rows_times(x, *k, *r, |l, j| a.data[l * r + j]);
    let mut out = rows_times(&hidden.value, *r, *n, |l, j| b.data[l * n + j]);
    // Σ|x·A·B| over both products: what the rounding of the inner product can become
    let b_abs = b.map(f64::abs);
    let outer = rows_times(&hidden.magnitude, *r, *n, |l, j| b_abs.data[l * n + j]);
    for (i, v) in out.value.data.iter_mut().enumerate() {
        let base = base.map_or(0.0, |b| b.data[i]);
        *v = *v * scale + base;
        out.magnitude.data[i] = outer.value.data[i] * scale.abs() + base.abs();
    }
    Ok(out)
}

/// A base, and on segments of its rows [`lora`] with factors of each segment's own; `sizes` are, segment by segment, the rows before it
/// that are in none, and its own.
///
/// # Errors
/// When the shapes do not fit.
pub fn lora_segments(x: &Arr, base: &Arr, sizes: &[usize], factors: &[(&Arr, &Arr)], scales: &[f64]) -> Result<Summed> {
    let ([lead @ .., n, k], Some(&width)) = (&x.dims[..], base.dims.last()) else {
        return bad("x and the base have two dims at least");
    };
    let mut out = Summed { value: base.clone(), magnitude: base.map(f64::abs), inner: None };
    for matrix in 0..lead.iter().product::<usize>() {
        let mut row = matrix * n;
        for ((sizes, (a, b)), &scale) in sizes.chunks_exact(2).zip(factors).zip(scales) {
            row += sizes[0];
            let (from, to) = (row, row + sizes[1]);
            let part = |of: &Arr, width: usize| Arr {
                dims: vec![sizes[1], width],
                data: of.data[from * width..to * width].to_vec(),
            };
            let one = lora(&part(x, *k), a, b, scale, Some(&part(base, width)))?;
            out.value.data[from * width..to * width].copy_from_slice(&one.value.data);
            out.magnitude.data[from * width..to * width].copy_from_slice(&one.magnitude.data);
            row = to;
        }
    }
    Ok(out)
}
