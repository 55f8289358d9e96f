//! The space a program runs over: rows and columns, with adjacent dims merged where every operand allows it.

use super::gather::RowShape;
use super::program::is_row_axis;
use crate::fault;
use crate::view::{count, Dims, Strided};
use smallvec::{smallvec, SmallVec};

/// One operand (an input or an output) seen as rows.
#[derive(Clone, Debug)]
pub(crate) struct Operand {
    pub(crate) offset: usize,
    /// Stride along each outer dim.
    pub(crate) outer: Dims,
    /// Dims and strides within a row.
    pub(crate) row: RowShape,
}

/// Rows × columns, and where each operand's elements stand.
#[derive(Clone, Debug)]
pub(crate) struct Space {
    /// Outer dims; a row is one index into all of them, counted row-major.
    pub(crate) outer: Dims,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) operands: SmallVec<[Operand; 4]>,
}

/// Where some rows begin.
pub(crate) type Offsets = SmallVec<[usize; 16]>;

/// Merges neighbours of `axes` where each operand's strides allow it; drops size-1 axes.
pub(crate) fn merge(axes: &[usize], dims: &[usize], layouts: &[Strided]) -> (Dims, SmallVec<[Dims; 4]>) {
    let mut out = Dims::new();
    let mut strides: SmallVec<[Dims; 4]> = smallvec![Dims::new(); layouts.len()];
    let compared = if fault::active("row.merge") { 1 } else { layouts.len() };
    for &a in axes {
        if dims[a] == 1 {
            continue;
        }
        let joins = !out.is_empty()
            && layouts
                .iter()
                .zip(&strides)
                .take(compared)
                .all(|(l, s)| s.last().copied() == dims[a].checked_mul(l.strides[a]));
        if joins {
            if let Some(last) = out.last_mut() {
                *last = last.saturating_mul(dims[a]);
            }
            for (s, l) in strides.iter_mut().zip(layouts) {
                if let Some(last) = s.last_mut() {
                    *last = l.strides[a];
                }
            }
        } else {
            out.push(dims[a]);
            for (s, l) in strides.iter_mut().zip(layouts) {
                s.push(l.strides[a]);
            }
        }
    }
    (out, strides)
}

impl Space {
    /// `layouts` all have dims `dims`; none of the dims is 0 where rows are to be visited.
    pub(crate) fn new(dims: &[usize], row_axes: u32, layouts: &[Strided]) -> Self {
        let (outer, outer_strides, row, row_strides);
        if row_axes == 0 {
            let axes: SmallVec<[usize; 6]> = (0..dims.len()).collect();
            let (mut all, mut strides) = merge(&axes, dims, layouts);
            row = all.pop().into_iter().collect::<Dims>();
            row_strides = strides.iter_mut().map(|s| s.pop().into_iter().collect::<Dims>()).collect();
            outer = all;
            outer_strides = strides;
        } else {
            let (r, o): (SmallVec<[usize; 6]>, SmallVec<[usize; 6]>) =
                (0..dims.len()).partition(|&i| is_row_axis(row_axes, i));
            (outer, outer_strides) = merge(&o, dims, layouts);
            (row, row_strides) = merge(&r, dims, layouts);
        }
        let operands = layouts
            .iter()
            .zip(outer_strides)
            .zip(row_strides)
            .map(|((l, outer), strides)| Operand {
                offset: l.offset,
                outer,
                row: RowShape { dims: row.clone(), strides },
            })
            .collect();
        Space { rows: count(&outer), cols: count(&row), outer, operands }
    }

    /// Cuts a space of one long row into rows of `len` columns and a rest; `None` if it is not one row of one dim.
    pub(crate) fn split_row(&self, len: usize) -> Option<(Space, Option<Space>)> {
        if !self.outer.is_empty() || self.cols < 2 * len {
            return None;
        }
        if self.operands.iter().any(|o| o.row.strides.len() != 1) {
            return None;
        }
        let whole = self.cols / len;
        let cut = |rows: usize, cols: usize, skip: usize, outer: bool| Space {
            outer: if outer { SmallVec::from_slice(&[rows]) } else { Dims::new() },
            rows,
            cols,
            operands: self
                .operands
                .iter()
                .map(|o| {
                    let s = o.row.strides[0];
                    Operand {
                        offset: o.offset + skip * s,
                        outer: if outer { SmallVec::from_slice(&[len * s]) } else { Dims::new() },
                        row: RowShape { dims: SmallVec::from_slice(&[cols]), strides: SmallVec::from_slice(&[s]) },
                    }
                })
                .collect(),
        };
        let rest = self.cols - whole * len;
        let tail = (rest > 0).then(|| cut(1, rest, whole * len, false));
        Some((cut(whole, len, 0, true), tail))
    }

    /// Offsets of rows `first..first + rows` of an operand.
    pub(crate) fn offsets(&self, operand: &Operand, first: usize, rows: usize, out: &mut Offsets) {
        out.clear();
        let (Some(&inner), Some(&stride)) = (self.outer.last(), operand.outer.last()) else {
            out.resize(rows, operand.offset);
            return;
        };
        let mut row = first;
        let end = first + rows;
        while row < end {
            let (mut hi, within) = (row / inner, row % inner);
            let mut base = operand.offset;
            let n = self.outer.len() - 1;
            let n = if fault::active("row.outer_offset") { 0 } else { n };
            for (&d, &s) in self.outer[..n].iter().zip(&operand.outer[..n]).rev() {
                base += hi % d * s;
                hi /= d;
            }
            let run = (inner - within).min(end - row);
            out.extend((within..within + run).map(|i| base + i * stride));
            row += run;
        }
    }

    /// The distance between neighbouring rows, if it is the same everywhere.
    pub(crate) fn pitch(&self, operand: &Operand) -> Option<usize> {
        let mut pairs = self.outer.iter().zip(&operand.outer).rev();
        let Some((&d, &pitch)) = pairs.next() else {
            return Some(0);
        };
        let mut span = d.checked_mul(pitch)?;
        for (&d, &s) in pairs {
            if s != span && !fault::active("row.pitch") {
                return None;
            }
            span = span.checked_mul(d)?;
        }
        Some(pitch)
    }

    /// Rows per block that is contiguous in each of the given outputs (all of `Kind::Vec`), at best 1.
    pub(crate) fn block_rows(&self, outputs: impl Iterator<Item = usize> + Clone) -> usize {
        let mut rows = 1;
        for p in (0..=self.outer.len()).rev() {
            let fits = p == 0
                || outputs.clone().all(|i| {
                    self.operands.get(i).and_then(|o| o.outer.get(p - 1)).is_some_and(|&s| s == rows * self.cols)
                });
            if fits {
                break;
            }
            rows *= self.outer.get(p - 1).copied().unwrap_or(1);
        }
        rows
    }
}
