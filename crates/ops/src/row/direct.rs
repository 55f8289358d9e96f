//! One op on dense slices, without a program: to bind a program takes microseconds, which is longer than the arithmetic of a small tensor, and a
//! fifth of that of one that fills the second-level cache. The loops are the programs' own, so the bits are theirs too.

use super::loops::{self, Arg};
use super::prepared::cost;
use super::program::{BinaryFn, Instr, Reg, UnaryFn};
use super::programs::Ready;
use super::run::{per_task, WORK_PER_NS};
use super::whole::{self, Elements, Norm, Room, Rows};
use crate::error::{Error, Result};
use crate::fault;
use crate::kernels::team;
use smallvec::SmallVec;

const OP: &str = "elementwise";
/// Elements that a task of an elementwise op is a multiple of.
const PIECE: usize = 1024;

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

/// Calls `f` with the number of the first of some units of `unit` elements and the piece of `out` that holds them, on as many threads as
/// `work` is worth.
fn shared(work: usize, unit: usize, out: &mut [f32], f: impl Fn(usize, &mut [f32]) + Sync) {
    match per_task(work, out.len().div_ceil(unit)) {
        None => f(0, out),
        Some(units) => {
            let pieces = out.chunks_mut(units * unit).enumerate().map(|(i, piece)| (i * units, piece));
            team::each(work / WORK_PER_NS, pieces.collect(), |(first, piece)| f(first, piece));
        }
    }
}

/// What an element of a unary function costs, and one of its argument.
fn cost_of(f: UnaryFn) -> usize {
    cost(&Instr::Load { input: 0 }) + cost(&Instr::Unary(f, Reg(0)))
}

/// Rows of `cols` elements from number `first` on.
fn from_row(x: &[f32], first: usize, cols: usize) -> Elements<'_, f32> {
    Elements { x: Rows { data: x.get(first * cols..).unwrap_or_default(), pitch: cols }, plus: SmallVec::new() }
}

/// One row of `cols` elements for all.
fn one_row(data: &[f32], cols: usize) -> Result<Rows<'_, f32>> {
    if data.len() != cols {
        return Err(Error::shape("norm", format!("{} elements for rows of {cols}", data.len())));
    }
    Ok(Rows { data, pitch: 0 })
}

fn norms(x: &[f32], norm: Norm<'_, f32>, cols: usize, out: &mut [f32]) -> Result<()> {
    same(x, out)?;
    let work = out.len() * (8 + 4 * usize::from(norm.centred));
    shared(work, cols, out, |first, out| whole::norm(&from_row(x, first, cols), norm, out, Room::None, cols));
    Ok(())
}

/// As the program of `f` over dense rows of `cols` elements (elementwise: over all), with `eps` for a norm; the inputs in the program's order,
/// weight and bias of one row. Says whether it was done: other functions, and longer rows, have no loop of their own.
///
/// # Errors
/// `ShapeMismatch` if the lengths differ; nothing is written then.
pub fn rows(f: Ready, eps: f64, inputs: &[&[f32]], cols: usize, out: &mut [f32]) -> Result<bool> {
    if !whole::may_run() {
        return Ok(false);
    }
    let by_rows = (1..=whole::LONGEST).contains(&cols) && out.len().is_multiple_of(cols);
    let n = out.len();
    let norm = |weight, bias, centred| Norm { centred, n: cols as f64, eps, weight, bias };
    match (f, inputs) {
        (Ready::Softmax, &[x]) if by_rows => {
            same(x, out)?;
            let work = n * (cost_of(UnaryFn::Exp) + 4);
            shared(work, cols, out, |first, out| whole::softmax(&from_row(x, first, cols), out, Room::None, cols));
        }
        (Ready::RmsNorm { weight: false }, &[x]) if by_rows => norms(x, norm(None, None, false), cols, out)?,
        (Ready::RmsNorm { weight: true }, &[x, w]) if by_rows => {
            norms(x, norm(Some(one_row(w, cols)?), None, false), cols, out)?;
        }
        (Ready::LayerNorm { weight: false, bias: false }, &[x]) if by_rows => {
            norms(x, norm(None, None, true), cols, out)?;
        }
        (Ready::LayerNorm { weight: true, bias: false }, &[x, w]) if by_rows => {
            norms(x, norm(Some(one_row(w, cols)?), None, true), cols, out)?;
        }
        (Ready::LayerNorm { weight: true, bias: true }, &[x, w, b]) if by_rows => {
            norms(x, norm(Some(one_row(w, cols)?), Some(one_row(b, cols)?), true), cols, out)?;
        }
        (Ready::Unary(f), &[x]) => {
            same(x, out)?;
            shared(n * cost_of(f), PIECE, out, |first, out| {
                let x = &x[first * PIECE..][..out.len()];
                loops::unary(f, dense(x), out, 1, x.len());
            });
        }
        (Ready::Binary(f), &[x, y]) => {
            same(x, out)?;
            same(y, out)?;
            let work = n * (2 * cost(&Instr::Load { input: 0 }) + cost(&Instr::Binary(f, Reg(0), Reg(0))));
            shared(work, PIECE, out, |first, out| {
                let [x, y] = [x, y].map(|x| &x[first * PIECE..][..out.len()]);
                loops::binary(f, dense(x), dense(y), out, 1, x.len());
            });
        }
        (Ready::Glu(act), &[gate, up]) => {
            same(gate, out)?;
            same(up, out)?;
            shared(n * (2 * cost_of(act)), PIECE, out, |first, out| {
                let [gate, up] = [gate, up].map(|x| &x[first * PIECE..][..out.len()]);
                loops::gated(act, gate, up, out);
            });
        }
        _ => return Ok(false),
    }
    Ok(true)
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
