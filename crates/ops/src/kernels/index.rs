//! Selecting along a dim by an index tensor: embedding lookups.

use super::{check_out, team, PARALLEL};
use crate::element::Element;
use crate::error::{Error, Result};
use crate::fault;
use crate::row::gather::RowShape;
use crate::row::space::{merge, Offsets, Space};
use crate::view::{count, each_dtype, Slice, SliceMut, Strided, View};
use smallvec::SmallVec;

const OP: &str = "index-select";

/// Copies the slices of `src` along `dim` that `ids` (u8, u32 or i64, any rank) names. The output's dims are
/// `src`'s with `dim` replaced by the dims of `ids`. As in Candle, an index that is its type's largest value gives zeros.
///
/// # Errors
/// `IndexOutOfRange` with the first offending position, `ShapeMismatch`, `DTypeMismatch`, `OutOfBounds`; nothing is written then.
pub fn index_select(src: &View<'_>, ids: &View<'_>, dim: usize, out: &mut SliceMut<'_>) -> Result<()> {
    index_select_as(OP, src, ids, dim, out)
}

/// [`index_select`], called `op` in its errors.
pub(crate) fn index_select_as(
    op: &'static str,
    src: &View<'_>,
    ids: &View<'_>,
    dim: usize,
    out: &mut SliceMut<'_>,
) -> Result<()> {
    src.check()?;
    ids.check()?;
    let dims = src.dims();
    let Some(&size) = dims.get(dim) else {
        return Err(Error::shape(op, format!("dim {dim} of {dims:?}")));
    };
    let n_ids = ids.layout.elem_count();
    let (left, right) = (count(&dims[..dim]), count(&dims[dim + 1..]));
    let total = left.saturating_mul(n_ids).saturating_mul(right);
    check_out(op, out, src.dtype(), total)?;
    let ids = read_ids(op, ids, size)?;
    if total == 0 {
        return Ok(());
    }
    let part = |range: std::ops::Range<usize>, offset| Strided {
        dims: SmallVec::from_slice(&dims[range.clone()]),
        strides: SmallVec::from_slice(&src.layout.strides[range]),
        offset,
    };
    let lefts = part(0..dim, src.layout.offset);
    let rights = part(dim + 1..dims.len(), 0);
    let axes: SmallVec<[usize; 6]> = (0..rights.dims.len()).collect();
    let (row_dims, mut row_strides) = merge(&axes, &rights.dims, std::slice::from_ref(&rights));
    let shape = RowShape { dims: row_dims, strides: row_strides.pop().unwrap_or_default() };
    // The left dims as rows of one column each.
    let space = Space::new(&lefts.dims, 0, std::slice::from_ref(&lefts));
    let mut bases = Vec::with_capacity(left);
    if let Some(operand) = space.operands.first() {
        let mut rows = Offsets::new();
        space.offsets(operand, 0, space.rows, &mut rows);
        let stride = operand.row.single().unwrap_or(0);
        for base in rows {
            bases.extend((0..space.cols).map(|j| base + j * stride));
        }
    }
    let step =
        if fault::active("index_select.step") { right.min(src.layout.strides[dim]) } else { src.layout.strides[dim] };
    if fault::active("index_select.base") {
        let first = bases.first().copied().unwrap_or(0);
        bases.fill(first);
    }
    let mut ids = ids;
    if let (true, Some(Some(last))) = (fault::active("index_select.last"), ids.last_mut()) {
        *last = (*last + 1) % size;
    }
    each_dtype!(SliceMut, out, dst => {
        select(&src.data, &bases, &ids, step, &shape, right, dst);
    });
    Ok(())
}

/// The indices, checked; `None` where Candle writes zeros.
pub(crate) fn read_ids(op: &'static str, ids: &View<'_>, size: usize) -> Result<Vec<Option<usize>>> {
    let max = match ids.data {
        Slice::U8(_) => i64::from(u8::MAX),
        Slice::U32(_) => i64::from(u32::MAX),
        Slice::I64(_) => i64::MAX,
        _ => return Err(Error::dtype(op, format!("ids must be u8, u32 or i64, got {}", ids.dtype().as_str()))),
    };
    let mut flat = vec![0i64; ids.layout.elem_count()];
    super::cast(ids, &mut SliceMut::I64(&mut flat))?;
    // collecting would grow by doubling
    let mut read = Vec::with_capacity(flat.len());
    for (position, index) in flat.into_iter().enumerate() {
        let zero = index == max || fault::active("index_select.zeros") && position == 0;
        read.push(match usize::try_from(index) {
            _ if zero => None,
            Ok(i) if i < size => Some(i),
            _ => return Err(Error::IndexOutOfRange { op, index, size, position }),
        });
    }
    Ok(read)
}

fn select<E: Element>(
    src: &Slice<'_>,
    bases: &[usize],
    ids: &[Option<usize>],
    step: usize,
    shape: &RowShape,
    right: usize,
    dst: &mut [E],
) {
    let Some(src) = E::of(src) else {
        return;
    };
    let one = |at: usize, out: &mut [E]| {
        let (Some(&base), Some(&id)) = (bases.get(at / ids.len()), ids.get(at % ids.len())) else {
            return;
        };
        let Some(id) = id else {
            out.fill(E::default());
            return;
        };
        let base = base + id * step;
        shape.pieces(0, right, |done, offset, stride, len| {
            let at = base + offset;
            let out = &mut out[done..done + len];
            if stride == 1 || fault::active("index_select.inner_stride") && at + len <= src.len() {
                out.copy_from_slice(&src[at..at + len]);
            } else {
                for (i, o) in out.iter_mut().enumerate() {
                    *o = src[at + i * stride];
                }
            }
        });
    };
    if dst.len() >= PARALLEL {
        team::each_chunk(team::moving(dst), dst, right, |first, out| {
            for (i, out) in out.chunks_mut(right).enumerate() {
                one(first + i, out);
            }
        });
    } else {
        for (at, out) in dst.chunks_mut(right).enumerate() {
            one(at, out);
        }
    }
}
