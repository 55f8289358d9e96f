//! Where along a dim an extreme element stands.

use super::{check_out, team, PARALLEL};
use crate::element::Element;
use crate::error::{Error, Result};
use crate::fault;
use crate::row::space::{Offsets, Space};
use crate::view::{each_dtype, Dims, SliceMut, Strided, View};
use candle_core::DType;

/// The place of the first largest (or, with `smallest`, the first smallest) element along `dim`, as u32. The output's dims are
/// `x`'s without `dim`. As in Candle, a NaN counts only where it comes first.
///
/// # Errors
/// `ShapeMismatch` where the dim does not exist or is empty, `DTypeMismatch`, `OutOfBounds`.
pub fn arg_reduce(x: &View<'_>, dim: usize, smallest: bool, out: &mut SliceMut<'_>) -> Result<()> {
    const OP: &str = "arg-reduce";
    x.check()?;
    let size = x.dims().get(dim).copied().unwrap_or(0);
    if size == 0 || u32::try_from(size).is_err() {
        return Err(Error::shape(OP, format!("dim {dim} of {:?}", x.dims())));
    }
    let without = |v: &Dims| {
        let mut v = v.clone();
        v.remove(dim);
        v
    };
    let rest = Strided { dims: without(&x.layout.dims), strides: without(&x.layout.strides), offset: x.layout.offset };
    check_out(OP, out, DType::U32, rest.elem_count())?;
    let SliceMut::U32(out) = out else {
        return Err(Error::dtypes(OP, "the output", DType::U32, out.dtype()));
    };
    if out.is_empty() {
        return Ok(());
    }
    let space = Space::new(&rest.dims, 0, std::slice::from_ref(&rest));
    let step = x.layout.strides[dim];
    each_dtype!(Slice, &x.data, data => scan(data, &space, (size, step), smallest, out));
    Ok(())
}

fn scan<E: Element>(data: &[E], space: &Space, (size, step): (usize, usize), smallest: bool, out: &mut [u32]) {
    let Some(from) = space.operands.first() else {
        return;
    };
    let stride = from.row.single().unwrap_or(0);
    let smallest = smallest != fault::active("arg_reduce.other");
    let last = fault::active("arg_reduce.last");
    let place = |base: usize| {
        let (mut best, mut at) = (data[base], 0);
        for i in 1..size {
            let v = data[base + i * step];
            if (if smallest { best > v } else { best < v }) || (last && best == v) {
                (best, at) = (v, i);
            }
        }
        at as u32
    };
    let run = |first: usize, out: &mut [u32]| {
        let mut offsets = Offsets::new();
        space.offsets(from, first, out.len() / space.cols, &mut offsets);
        for (&base, out) in offsets.iter().zip(out.chunks_exact_mut(space.cols)) {
            for (j, o) in out.iter_mut().enumerate() {
                *o = place(base + j * stride);
            }
        }
    };
    if out.len().saturating_mul(size) >= PARALLEL && space.rows > 1 {
        team::each_chunk(team::moving(out).saturating_mul(size), out, space.cols, run);
    } else {
        run(0, out);
    }
}
