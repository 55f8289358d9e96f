//! Copies between layouts, dtype casts, fills.

use super::{check_out, team, PARALLEL};
use crate::element::Element;
use crate::error::{Error, Result};
use crate::fault;
use crate::row::space::{Offsets, Space};
use crate::view::{each_dtype, SliceMut, Strided, View};

/// Rows that are copied together, block of columns by block, when strides are in the way.
const ROWS: usize = 64;
/// Columns of a block: one cache line of f32.
const COLS: usize = 16;

/// Copies `src` to the elements of `dst` that `dst_layout` names; both have the same dims and dtype.
/// `dst_layout` must not name an element twice. Runs that are contiguous on both sides are copied whole.
///
/// # Errors
/// `ShapeMismatch`, `DTypeMismatch`, `OutOfBounds`.
pub fn copy_into(src: &View<'_>, dst: &mut SliceMut<'_>, dst_layout: &Strided) -> Result<()> {
    const OP: &str = "copy";
    src.check()?;
    dst_layout.check_bounds(dst.len())?;
    if src.dims() != dst_layout.dims.as_slice() {
        return Err(Error::shape(OP, format!("from {:?} to {:?}", src.dims(), dst_layout.dims)));
    }
    if src.dtype() != dst.dtype() {
        return Err(Error::dtypes(OP, "the destination", src.dtype(), dst.dtype()));
    }
    if src.layout.elem_count() == 0 {
        return Ok(());
    }
    let space = Space::new(src.dims(), 0, &[src.layout.clone(), dst_layout.clone()]);
    each_dtype!(SliceMut, dst, d => copy_space(&src.data, d, &space));
    Ok(())
}

fn copy_space<E: Element>(src: &crate::view::Slice<'_>, dst: &mut [E], space: &Space) {
    let (Some(src), [from, to]) = (E::of(src), space.operands.as_slice()) else {
        return;
    };
    let cols = space.cols;
    let (ss, ds) = (from.row.single().unwrap_or(1), to.row.single().unwrap_or(1));
    let ss = if fault::active("copy.stride") { 1 } else { ss };
    let (mut offsets, mut targets) = (Offsets::new(), Offsets::new());
    let mut row = 0;
    while row < space.rows {
        let rows = ROWS.min(space.rows - row);
        space.offsets(from, row, rows, &mut offsets);
        space.offsets(to, row, rows, &mut targets);
        if fault::active("copy.row_offset") {
            let first = offsets.first().copied().unwrap_or(0);
            offsets.fill(first);
        }
        if fault::active("copy.last_row") {
            targets.truncate(rows - 1);
        }
        if ss == 1 && ds == 1 {
            for (&a, &b) in offsets.iter().zip(&targets) {
                dst[b..b + cols].copy_from_slice(&src[a..a + cols]);
            }
        } else {
            for block in (0..cols).step_by(COLS) {
                let width = COLS.min(cols - block) - fault::one_if("copy.strided_tail");
                for (&a, &b) in offsets.iter().zip(&targets) {
                    let (mut a, mut b) = (a + block * ss, b + block * ds);
                    for _ in 0..width {
                        dst[b] = src[a];
                        a += ss;
                        b += ds;
                    }
                }
            }
        }
        row += rows;
    }
}

/// One element as Candle's `to_dtype` converts it: integers wrap among themselves, floats round to nearest even
/// and truncate towards zero (saturating) when they become integers.
#[inline(always)]
fn convert<S: Element, D: Element>(v: S) -> D {
    if D::IS_INT && !S::IS_INT && fault::active("cast.rounds") {
        D::from_f64(v.to_f64().round())
    } else if S::IS_INT && D::IS_INT {
        D::from_i64(v.to_i64())
    } else if S::DTYPE == candle_core::DType::F64 || D::DTYPE == candle_core::DType::F64 {
        D::from_f64(v.to_f64())
    } else {
        D::from_f32(v.to_f32())
    }
}

/// Converts `src`, in any layout, to the dtype of the contiguous `out`.
///
/// # Errors
/// `ShapeMismatch` if the lengths differ, `OutOfBounds`.
pub fn cast(src: &View<'_>, out: &mut SliceMut<'_>) -> Result<()> {
    src.check()?;
    let n = src.layout.elem_count();
    check_out("cast", out, out.dtype(), n)?;
    if n == 0 {
        return Ok(());
    }
    if src.dtype() == out.dtype() {
        let layout = Strided::contiguous(src.dims());
        return copy_into(src, out, &layout);
    }
    each_dtype!(SliceMut, out, dst => {
        each_dtype!(Slice, &src.data, s => cast_typed(s, &src.layout, dst))
    });
    Ok(())
}

fn cast_typed<S: Element, D: Element>(src: &[S], layout: &Strided, dst: &mut [D]) {
    if layout.is_contiguous() {
        let from = if fault::active("cast.offset") { 0 } else { layout.offset };
        let src = &src[from..from + dst.len()];
        if dst.len() >= PARALLEL {
            team::each_chunk(team::moving(dst), dst, 1, |first, d| cast_run(&src[first..first + d.len()], d));
        } else {
            cast_run(src, dst);
        }
        return;
    }
    let space = Space::new(&layout.dims, 0, std::slice::from_ref(layout));
    let Some(from) = space.operands.first() else {
        return;
    };
    let cols = space.cols.max(1);
    let stride = from.row.single().unwrap_or(1);
    let stride = if fault::active("cast.stride") { 1 } else { stride };
    let mut offsets = Offsets::new();
    for (r, chunk) in dst.chunks_mut(cols * ROWS).enumerate() {
        space.offsets(from, r * ROWS, chunk.len() / cols, &mut offsets);
        for block in (0..cols).step_by(COLS) {
            let width = COLS.min(cols - block);
            for (&at, row) in offsets.iter().zip(chunk.chunks_exact_mut(cols)) {
                let mut at = at + block * stride;
                for d in &mut row[block..block + width] {
                    *d = convert(src[at]);
                    at += stride;
                }
            }
        }
    }
}

fn cast_run<S: Element, D: Element>(src: &[S], dst: &mut [D]) {
    let n = dst.len() - fault::one_if("cast.tail").min(dst.len());
    for (d, &s) in dst[..n].iter_mut().zip(src) {
        *d = convert(s);
    }
}

/// Sets every element to `value`, converted as Candle's `Tensor::full` would.
///
/// # Errors
/// None at present; `Result` for symmetry with the other kernels.
pub fn fill(out: &mut SliceMut<'_>, value: f64) -> Result<()> {
    fn set<E: Element>(out: &mut [E], value: f64) {
        out.fill(E::from_f64(value));
        if let (true, Some(last)) = (fault::active("full.tail"), out.last_mut()) {
            *last = E::default();
        }
    }
    each_dtype!(SliceMut, out, v => set(v, value));
    Ok(())
}

/// Sets element i to start + i·step, computed in f64 and converted once.
///
/// # Errors
/// None at present; `Result` for symmetry with the other kernels.
pub fn arange(out: &mut SliceMut<'_>, start: f64, step: f64) -> Result<()> {
    fn set<E: Element>(out: &mut [E], start: f64, step: f64) {
        for (i, v) in out.iter_mut().enumerate() {
            *v = E::from_f64(start + i as f64 * step);
        }
    }
    let step = if fault::active("arange.step") { 1.0 } else { step };
    each_dtype!(SliceMut, out, v => set(v, start, step));
    Ok(())
}
