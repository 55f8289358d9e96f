//! Rotary position embedding (arXiv:2104.09864, eq. 34).
//!
//! As Candle's, these take cosines and sines (t, d/2) or (b, t, d/2) with t at least the sequence length: the first rows are
//! used.

use crate::candle::{Result, Tensor};

/// The four dims of `xs`, in its order, if the last can be taken in pairs.
#[track_caller]
fn sizes(op: &'static str, xs: &Tensor) -> Result<(usize, usize, usize, usize)> {
    match *xs.dims() {
        [a, b, c, width] if width % 2 == 0 => Ok((a, b, c, width)),
        [_, _, _, width] => Err(Tensor::shape_error(op, format!("a head of {width} cannot be turned in pairs"), &[xs])),
        _ => Err(Tensor::shape_error(op, format!("needs four dims, got {}", xs.rank()), &[xs])),
    }
}

/// The first `seq_len` rows of a table that fits, or an error.
#[track_caller]
fn rows(
    op: &'static str,
    xs: &Tensor,
    table: &Tensor,
    (batch, seq_len, width): (usize, usize, usize),
) -> Result<Tensor> {
    let (t, d) = match *table.dims() {
        [t, d] => (t, d),
        [b, t, d] if b == batch => (t, d),
        _ => {
            let detail =
                format!("cos and sin have two dims, or three with the batch of {batch}, got {:?}", table.dims());
            return Err(Tensor::shape_error(op, detail, &[xs, table]));
        }
    };
    if d * 2 != width || seq_len > t {
        let dims = table.dims();
        let detail = format!(
            "cos and sin {dims:?} do not fit {seq_len} positions of width {width}: ({seq_len} or more, {}) would",
            width / 2
        );
        return Err(Tensor::shape_error(op, detail, &[xs, table]));
    }
    table.narrow(table.rank() - 2, 0, seq_len)
}

#[track_caller]
fn fitting(
    op: &'static str,
    xs: &Tensor,
    sizes: (usize, usize, usize),
    cos: &Tensor,
    sin: &Tensor,
) -> Result<(Tensor, Tensor)> {
    Ok((rows(op, xs, cos, sizes)?, rows(op, xs, sin, sizes)?))
}

/// Pairs (i, i + d/2): xs (b, h, t, d).
///
/// # Errors
/// When the shapes do not fit or the dtypes differ.
#[track_caller]
pub fn rope(xs: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    let (b, _, t, d) = sizes("rope", xs)?;
    let (cos, sin) = fitting("rope", xs, (b, t, d), cos, sin)?;
    xs.rope(&cos, &sin)
}

/// Pairs (2i, 2i + 1): xs (b, h, t, d).
///
/// # Errors
/// As [`rope`].
#[track_caller]
pub fn rope_i(xs: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    let (b, _, t, d) = sizes("rope_i", xs)?;
    let (cos, sin) = fitting("rope_i", xs, (b, t, d), cos, sin)?;
    xs.rope_i(&cos, &sin)
}

/// Pairs (i, i + d/2) with positions before heads: xs (b, t, h, d).
///
/// # Errors
/// As [`rope`].
#[track_caller]
pub fn rope_thd(xs: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    let (b, t, _, d) = sizes("rope_thd", xs)?;
    let (cos, sin) = fitting("rope_thd", xs, (b, t, d), cos, sin)?;
    xs.transpose(1, 2)?.rope(&cos, &sin)?.transpose(1, 2)
}

/// The same as [`rope`], which has a gradient as it is.
///
/// # Errors
/// As [`rope`].
#[track_caller]
pub fn rope_slow(xs: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    rope(xs, cos, sin)
}

/// The same as [`rope_i`], which has a gradient as it is.
///
/// # Errors
/// As [`rope`].
#[track_caller]
pub fn rope_i_slow(xs: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    rope_i(xs, cos, sin)
}
