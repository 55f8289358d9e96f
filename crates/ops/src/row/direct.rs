//! Elementwise functions of dense slices, without a program: for one op on a small tensor, where binding a program would take longer
//! than the arithmetic. The loops are the programs' own, so the bits are theirs too.

use super::loops::{self, Arg};
use super::program::{BinaryFn, UnaryFn};
use crate::error::{Error, Result};
use crate::fault;

const OP: &str = "elementwise";

fn dense(x: &[f32]) -> Arg<'_, f32> {
    Arg::Vec { data: x, pitch: 0 }
}

fn same(a: &[f32], b: &[f32]) -> Result<()> {
    if a.len() == b.len() {
        return Ok(());
    }
    Err(Error::shape(OP, format!("{} elements and {}", a.len(), b.len())))
}

/// `out[i] = f(x[i])`.
///
/// # Errors
/// `ShapeMismatch` if the lengths differ.
pub fn unary(f: UnaryFn, x: &[f32], out: &mut [f32]) -> Result<()> {
    same(x, out)?;
    loops::unary(f, dense(x), out, 1, x.len());
    if fault::any() && fault::active("direct.unary") {
        if let Some(v) = out.last_mut() {
            *v = fault::nudged(*v);
        }
    }
    Ok(())
}

/// `out[i] = f(x[i], y[i])`; a comparison gives 1 or 0.
///
/// # Errors
/// `ShapeMismatch` if the lengths differ.
pub fn binary(f: BinaryFn, x: &[f32], y: &[f32], out: &mut [f32]) -> Result<()> {
    same(x, out)?;
    same(x, y)?;
    let y = if fault::active("direct.operand") { x } else { y };
    loops::binary(f, dense(x), dense(y), out, 1, x.len());
    Ok(())
}

/// `out[i] = x[i]·mul + add`, rounded twice.
///
/// # Errors
/// `ShapeMismatch` if the lengths differ.
pub fn affine(x: &[f32], mul: f32, add: f32, out: &mut [f32]) -> Result<()> {
    same(x, out)?;
    let add = if fault::active("direct.affine") { mul } else { add };
    let n = out.len();
    loops::affine(dense(x), mul, add, out, 1, n);
    Ok(())
}
