//! Elements and slices that an index tensor names: gather, scatter, index-add.
//!
//! As in Candle, an index that is its type's largest value names nothing: gather gives zero there, scatter skips it.

use super::index::read_ids;
use super::{cast, check_out, copy_into, team, PARALLEL};
use crate::element::Element;
use crate::error::{Error, Result};
use crate::fault;
use crate::row::space::{Offsets, Space};
use crate::view::{each_dtype, row_major, Dims, Slice, SliceMut, Strided, View};
use candle_core::DType;

/// Rows that are visited together.
const ROWS: usize = 64;

/// What a scatter does with the element that it meets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scatter {
    /// Replaces it: of several sources for one place the last one, in row-major order, counts.
    Set,
    /// Adds to it, in row-major order of the sources. f16 and bf16 add in f32 and round once.
    Add,
}

fn check_dim(op: &'static str, dims: &[usize], dim: usize) -> Result<usize> {
    dims.get(dim).copied().ok_or_else(|| Error::shape(op, format!("dim {dim} of {dims:?}")))
}

/// `layout` without movement along `dim`, over other dims: where an element stands but for its index.
fn held(layout: &Strided, dims: &[usize], dim: usize) -> Strided {
    let mut strides = layout.strides.clone();
    strides[dim] = 0;
    Strided { dims: Dims::from_slice(dims), strides, offset: layout.offset }
}

/// out[i…] = src[…, ids[i…], …]: the index replaces the coordinate along `dim`. `ids` (u8, u32 or i64) has `src`'s rank and is
/// nowhere larger outside `dim`; the output has the dims of `ids`.
///
/// # Errors
/// `ShapeMismatch`, `DTypeMismatch`, `OutOfBounds`, `IndexOutOfRange` with the first offending position; nothing is written then.
pub fn gather(src: &View<'_>, ids: &View<'_>, dim: usize, out: &mut SliceMut<'_>) -> Result<()> {
    const OP: &str = "gather";
    src.check()?;
    ids.check()?;
    let size = check_dim(OP, src.dims(), dim)?;
    let fits = src.dims().len() == ids.dims().len()
        && src.dims().iter().zip(ids.dims()).enumerate().all(|(d, (a, b))| d == dim || b <= a);
    if !fits {
        return Err(Error::shape(OP, format!("indices {:?} for {:?}", ids.dims(), src.dims())));
    }
    check_out(OP, out, src.dtype(), ids.layout.elem_count())?;
    let flat = read_ids(OP, ids, size)?;
    if flat.is_empty() {
        return Ok(());
    }
    let space = Space::new(ids.dims(), 0, &[held(&src.layout, ids.dims(), dim)]);
    let step = if fault::active("gather.step") { 1 } else { src.layout.strides[dim] };
    each_dtype!(SliceMut, out, dst => gather_typed(&src.data, &space, &flat, step, dst));
    Ok(())
}

fn gather_typed<E: Element>(src: &Slice<'_>, space: &Space, ids: &[Option<usize>], step: usize, dst: &mut [E]) {
    let (Some(src), Some(from)) = (E::of(src), space.operands.first()) else {
        return;
    };
    let cols = space.cols;
    let stride = from.row.single().unwrap_or(0);
    let less = fault::one_if("gather.index");
    let run = |first: usize, dst: &mut [E]| {
        let mut offsets = Offsets::new();
        space.offsets(from, first, dst.len() / cols, &mut offsets);
        for ((&base, out), ids) in offsets.iter().zip(dst.chunks_exact_mut(cols)).zip(ids[first * cols..].chunks(cols))
        {
            for (j, (o, id)) in out.iter_mut().zip(ids).enumerate() {
                *o = id.map_or_else(E::default, |id| src[base + j * stride + (id - less.min(id)) * step]);
            }
        }
    };
    if dst.len() >= PARALLEL {
        team::each_chunk(team::moving(dst), dst, cols, run);
    } else {
        run(0, dst);
    }
}

/// A copy of `x` in which the elements of `src` are written or added at the coordinates that `ids` (u8, u32 or i64) gives along
/// `dim`. `ids` and `src` have the same dims, which are `x`'s outside `dim`; the output has the dims of `x`.
///
/// # Errors
/// `ShapeMismatch`, `DTypeMismatch`, `OutOfBounds`, `IndexOutOfRange` with the first offending position.
pub fn scatter(
    x: &View<'_>,
    ids: &View<'_>,
    src: &View<'_>,
    dim: usize,
    how: Scatter,
    out: &mut SliceMut<'_>,
) -> Result<()> {
    const OP: &str = "scatter";
    let size = check_target(OP, x, ids, src, dim, out)?;
    if ids.dims() != src.dims() {
        return Err(Error::shape(OP, format!("indices {:?} for a source {:?}", ids.dims(), src.dims())));
    }
    let flat = read_ids(OP, ids, size)?;
    let whole = Strided::contiguous(x.dims());
    let step = whole.strides[dim];
    accumulate(x, src, how, out, |src, out| {
        if flat.is_empty() {
            return;
        }
        let space = Space::new(src.dims(), 0, &[src.layout.clone(), held(&whole, src.dims(), dim)]);
        each_dtype!(SliceMut, out, dst => scatter_typed(&src.data, &space, &flat, step, how, dst));
    })
}

fn scatter_typed<E: Element>(
    src: &Slice<'_>,
    space: &Space,
    ids: &[Option<usize>],
    step: usize,
    how: Scatter,
    dst: &mut [E],
) {
    let (Some(src), [from, to]) = (E::of(src), space.operands.as_slice()) else {
        return;
    };
    let (ss, ds) = (from.row.single().unwrap_or(0), to.row.single().unwrap_or(0));
    let how = if fault::active("scatter.add_is_set") { Scatter::Set } else { how };
    let (mut offsets, mut targets) = (Offsets::new(), Offsets::new());
    let ids = &ids[..ids.len() - fault::one_if("scatter.last_source")];
    for first in (0..space.rows).step_by(ROWS) {
        let rows = ROWS.min(space.rows - first);
        space.offsets(from, first, rows, &mut offsets);
        space.offsets(to, first, rows, &mut targets);
        let ids = ids[first * space.cols..].chunks(space.cols);
        for ((&a, &b), ids) in offsets.iter().zip(&targets).zip(ids) {
            for (j, id) in ids.iter().enumerate() {
                if let Some(id) = id {
                    let (value, place) = (src[a + j * ss], &mut dst[b + j * ds + id * step]);
                    *place = if how == Scatter::Add { sum(*place, value) } else { value };
                }
            }
        }
    }
}

/// A copy of `x` in which slice `ids[j]` along `dim` grew by slice `j` of `src`, in the order of `j`. `ids` (u8, u32 or i64) has
/// one dim; `src` has `x`'s dims outside `dim`. f16 and bf16 add in f32 and round once.
///
/// # Errors
/// `ShapeMismatch`, `DTypeMismatch`, `OutOfBounds`, `IndexOutOfRange` with the first offending position.
pub fn index_add(x: &View<'_>, ids: &View<'_>, src: &View<'_>, dim: usize, out: &mut SliceMut<'_>) -> Result<()> {
    const OP: &str = "index-add";
    let size = check_target(OP, x, ids, src, dim, out)?;
    if ids.dims() != [src.dims()[dim]] {
        return Err(Error::shape(OP, format!("indices {:?} for a source {:?} along {dim}", ids.dims(), src.dims())));
    }
    let flat = read_ids(OP, ids, size)?;
    let whole = Strided::contiguous(x.dims());
    accumulate(x, src, Scatter::Add, out, |src, out| {
        if src.layout.elem_count() == 0 {
            return;
        }
        let mut slice = Dims::from_slice(src.dims());
        slice[dim] = 1;
        let space = Space::new(&slice, 0, &[held(&src.layout, &slice, dim), held(&whole, &slice, dim)]);
        let steps = (src.layout.strides[dim], whole.strides[dim]);
        each_dtype!(SliceMut, out, dst => add_slices(&src.data, &space, &flat, steps, dst));
    })
}

fn add_slices<E: Element>(src: &Slice<'_>, space: &Space, ids: &[Option<usize>], steps: (usize, usize), dst: &mut [E]) {
    let (Some(src), [from, to]) = (E::of(src), space.operands.as_slice()) else {
        return;
    };
    let (ss, ds) = (from.row.single().unwrap_or(0), to.row.single().unwrap_or(0));
    let (mut offsets, mut targets) = (Offsets::new(), Offsets::new());
    space.offsets(from, 0, space.rows, &mut offsets);
    space.offsets(to, 0, space.rows, &mut targets);
    let ids = &ids[..ids.len() - fault::one_if("index_add.last_slice").min(ids.len())];
    for (j, id) in ids.iter().enumerate() {
        let Some(id) = id else { continue };
        for (&a, &b) in offsets.iter().zip(&targets) {
            let (a, b) = (a + j * steps.0, b + id * steps.1);
            for i in 0..space.cols {
                let place = &mut dst[b + i * ds];
                *place = sum(*place, src[a + i * ss]);
            }
        }
    }
}

#[inline(always)]
fn sum<E: Element>(a: E, b: E) -> E {
    if E::IS_INT {
        E::from_i64(a.to_i64().wrapping_add(b.to_i64()))
    } else if E::DTYPE == DType::F64 {
        E::from_f64(a.to_f64() + b.to_f64())
    } else {
        E::from_f32(a.to_f32() + b.to_f32())
    }
}

/// What scatter and index-add check alike; the size of `dim`.
fn check_target(
    op: &'static str,
    x: &View<'_>,
    ids: &View<'_>,
    src: &View<'_>,
    dim: usize,
    out: &SliceMut<'_>,
) -> Result<usize> {
    for view in [x, ids, src] {
        view.check()?;
    }
    let size = check_dim(op, x.dims(), dim)?;
    let fits = x.dims().len() == src.dims().len()
        && x.dims().iter().zip(src.dims()).enumerate().all(|(d, (a, b))| d == dim || a == b);
    if !fits {
        return Err(Error::shape(op, format!("a source {:?} for {:?} along {dim}", src.dims(), x.dims())));
    }
    if src.dtype() != x.dtype() {
        return Err(Error::dtypes(op, "the source", x.dtype(), src.dtype()));
    }
    check_out(op, out, x.dtype(), x.layout.elem_count())?;
    Ok(size)
}

/// Copies `x` to `out` and calls `write` on it; where narrow floats are added up, in f32, rounded once at the end.
fn accumulate(
    x: &View<'_>,
    src: &View<'_>,
    how: Scatter,
    out: &mut SliceMut<'_>,
    write: impl FnOnce(&View<'_>, &mut SliceMut<'_>),
) -> Result<()> {
    if how == Scatter::Set || !matches!(x.dtype(), DType::F16 | DType::BF16) {
        copy_into(x, out, &Strided::contiguous(x.dims()))?;
        write(src, out);
        return Ok(());
    }
    let mut wide = vec![0f32; x.layout.elem_count()];
    let mut wide_src = vec![0f32; src.layout.elem_count()];
    cast(x, &mut SliceMut::F32(&mut wide))?;
    cast(src, &mut SliceMut::F32(&mut wide_src))?;
    let strides = row_major(src.dims());
    let layout = Strided { dims: src.layout.dims.clone(), strides, offset: 0 };
    write(&View { data: Slice::F32(&wide_src), layout }, &mut SliceMut::F32(&mut wide));
    let layout = Strided::contiguous(x.dims());
    cast(&View { data: Slice::F32(&wide), layout }, out)
}
