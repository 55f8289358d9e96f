//! Moving rows between strided memory and dense tiles, converting dtypes on the way.

use crate::element::Element;
use crate::fault;
use crate::math::Real;
use crate::view::Dims;

/// Columns per block when rows are strided: a block of each row in turn, so that neighbouring rows,
/// which share cache lines then, find them still in cache.
const BLOCK: usize = 16;

/// The row dims of one operand and its stride along each.
#[derive(Clone, Debug, Default)]
pub(crate) struct RowShape {
    pub(crate) dims: Dims,
    pub(crate) strides: Dims,
}

impl RowShape {
    /// The stride if the row is one dim (or none).
    pub(crate) fn single(&self) -> Option<usize> {
        match self.strides.len() {
            0 => Some(1),
            1 => Some(self.strides[0]),
            _ => None,
        }
    }

    /// Calls `f(position in the run, offset, stride, length)` for each straight piece of columns `start..start + len`.
    pub(crate) fn pieces(&self, start: usize, len: usize, mut f: impl FnMut(usize, usize, usize, usize)) {
        let (Some(&inner), Some(&stride)) = (self.dims.last(), self.strides.last()) else {
            if len > 0 {
                f(0, 0, 1, len);
            }
            return;
        };
        if inner == 0 {
            return;
        }
        let mut done = 0;
        while done < len {
            let at = start + done;
            let mut hi = at / inner;
            let within = at % inner;
            let mut offset = within * stride;
            let outer = self.dims.len() - 1;
            for (&d, &s) in self.dims[..outer].iter().zip(&self.strides[..outer]).rev() {
                offset += hi % d * s;
                hi /= d;
            }
            let run = (inner - within).min(len - done);
            f(done, offset, stride, run);
            done += run;
        }
    }
}

/// Reads columns `start..start + cols` of the rows that begin at `offsets` into a dense tile.
pub(crate) fn gather<T: Real, E: Element>(
    src: &[E],
    offsets: &[usize],
    shape: &RowShape,
    start: usize,
    cols: usize,
    tile: &mut [T],
) {
    if cols == 0 {
        return;
    }
    if let (Some(stride), true) = (shape.single(), offsets.len() > 1) {
        if stride > 1 {
            for block in (0..cols).step_by(BLOCK) {
                let width = BLOCK.min(cols - block);
                let stride = if fault::active("row.gather.stride") { 1 } else { stride };
                for (&base, row) in offsets.iter().zip(tile.chunks_exact_mut(cols)) {
                    let mut at = base + (start + block) * stride;
                    for d in &mut row[block..block + width - fault::one_if("row.gather.tail")] {
                        *d = T::get(src[at]);
                        at += stride;
                    }
                }
            }
            return;
        }
    }
    for (&base, row) in offsets.iter().zip(tile.chunks_exact_mut(cols)) {
        shape.pieces(start, cols, |done, offset, stride, len| {
            let at = base + offset;
            let dst = &mut row[done..done + len];
            match stride {
                1 => T::read(&src[at..at + len], dst),
                0 => dst.fill(T::get(src[at + fault::one_if("row.gather.repeat").min(src.len() - at - 1)])),
                _ => {
                    for (i, d) in dst.iter_mut().enumerate() {
                        *d = T::get(src[at + i * stride]);
                    }
                }
            }
        });
    }
}

/// Writes a tile (rows `pitch` apart) to columns `start..start + cols` of the rows that begin at `offsets`.
pub(crate) fn scatter<T: Real, E: Element>(
    tile: &[T],
    pitch: usize,
    offsets: &[usize],
    shape: &RowShape,
    start: usize,
    cols: usize,
    dst: &mut [E],
) {
    if cols == 0 {
        return;
    }
    if let (Some(stride), true) = (shape.single(), offsets.len() > 1) {
        if stride > 1 {
            for block in (0..cols).step_by(BLOCK) {
                let width = BLOCK.min(cols - block);
                let stride = if fault::active("row.scatter.stride") { 1 } else { stride };
                for (r, &base) in offsets.iter().enumerate() {
                    let mut at = base + (start + block) * stride;
                    for &v in &tile[r * pitch + block..r * pitch + block + width] {
                        dst[at] = v.put();
                        at += stride;
                    }
                }
            }
            return;
        }
    }
    for (r, &base) in offsets.iter().enumerate() {
        let cols = cols - fault::one_if("row.scatter.tail");
        let row = &tile[r * pitch..r * pitch + cols];
        shape.pieces(start, cols, |done, offset, stride, len| {
            let at = base + offset;
            let src = &row[done..done + len];
            if stride == 1 {
                T::write(src, &mut dst[at..at + len]);
            } else {
                for (i, v) in src.iter().enumerate() {
                    dst[at + i * stride] = v.put();
                }
            }
        });
    }
}
