//! The right side of a product: rows of a weight that lies (out, in), or columns of one that lies (in, out).

use super::panel::SIDE;
use super::segment::segments;
use super::{portable, scratch, Grid, Narrow, Rows, BLOCK_BYTES, LANES, TASK_ROWS};
use crate::fault;
#[cfg(target_arch = "x86_64")]
use crate::simd::{isa, Isa};
use std::ops::Range;

/// What a row of x is multiplied with, `count` times `len` elements.
pub(crate) trait Right: Copy + Send + Sync {
    /// Bytes of an element.
    const BYTES: usize;
    /// How many are packed at once, four beside one another: a multiple of four.
    const STRIP: usize;
    /// From so many rows of x on packed panels are quicker.
    const PACKED_FROM: usize;

    fn count(&self) -> usize;
    fn len(&self) -> usize;
    /// [`Right::STRIP`].
    fn strip(&self) -> usize {
        Self::STRIP
    }
    /// Whether so many rows of x are packed for it.
    fn packs(&self, rows: usize) -> bool {
        rows >= Self::PACKED_FROM && self.len() > 0
    }
    /// Those `from..from + count`.
    fn part(&self, from: usize, count: usize) -> Self;
    /// The products of few rows of x, on this thread.
    fn few(&self, x: Rows<'_, f32>, out: &mut Grid<'_>);
    /// Elements `within` of [`Right::STRIP`] of them from `j` on, which are not all there at the end: four beside one another, sixteen elements
    /// at a time, with zeros behind the end; then the next four.
    fn pack(&self, j: usize, within: Range<usize>, panels: &mut [f32]);
    /// Whether the few rows of x are worth copying to boundaries of cache lines.
    fn reads_lines(&self) -> bool;
}

impl<E: Narrow> Right for Rows<'_, E> {
    const BYTES: usize = size_of::<E>();
    const STRIP: usize = SIDE;
    const PACKED_FROM: usize = 8;

    fn count(&self) -> usize {
        self.count
    }

    fn len(&self) -> usize {
        self.len
    }

    fn part(&self, from: usize, count: usize) -> Self {
        Rows::part(self, from, count)
    }

    fn few(&self, x: Rows<'_, f32>, out: &mut Grid<'_>) {
        let block = (BLOCK_BYTES / (self.len.max(1) * size_of::<E>())).max(TASK_ROWS) / TASK_ROWS * TASK_ROWS;
        for from in (0..self.count).step_by(block) {
            let part = Rows::part(self, from, block.min(self.count - from));
            #[cfg(target_arch = "x86_64")]
            if isa() == Isa::Avx512 {
                super::avx512::dots(x, part, out, from);
                continue;
            }
            portable::dots(x, part, out, from);
        }
    }

    fn pack(&self, j: usize, within: Range<usize>, panels: &mut [f32]) {
        let count = SIDE.min(self.count - j);
        for r in 0..SIDE {
            // rows that are not there repeat the last one
            super::panel::pack(&self.row(j + r.min(count - 1))[within.clone()], SIDE, r, panels);
        }
    }

    fn reads_lines(&self) -> bool {
        self.count >= TASK_ROWS
    }
}

/// The columns of a matrix whose rows are runs of elements.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Columns<'a, E>(Rows<'a, E>);

impl<'a, E> Columns<'a, E> {
    /// The columns of `rows`.
    pub(crate) fn of(rows: Rows<'a, E>) -> Self {
        Self(rows)
    }

    /// Columns `j..` of row `i`, at most `count` of them.
    pub(super) fn row(&self, i: usize, j: usize, count: usize) -> &'a [E] {
        &self.0.row(i)[j..(j + count).min(self.0.len)]
    }
}

/// The most numbers that the sums of few rows of `len` elements take: those of a segment, and those of the segments before.
pub(super) fn few_floats(rows: usize, len: usize) -> usize {
    let sums = if segments(len).len() > 1 { 2 } else { 1 };
    sums * rows.min(<Columns<'_, f32> as Right>::PACKED_FROM) * LANES * NEAR
}

/// Columns whose sums stay near: sixteen sums each of a row of x fill a third of the first-level cache.
const NEAR: usize = 256;

impl<E: Narrow> Right for Columns<'_, E> {
    const BYTES: usize = size_of::<E>();
    /// A cache line of f32.
    const STRIP: usize = LANES;
    const PACKED_FROM: usize = 3;

    fn count(&self) -> usize {
        let Rows { len: columns, .. } = self.0;
        columns
    }

    fn len(&self) -> usize {
        let Rows { count: rows, .. } = self.0;
        rows
    }

    fn part(&self, from: usize, count: usize) -> Self {
        Self(Rows { data: self.0.data.get(from..).unwrap_or_default(), len: count, ..self.0 })
    }

    fn few(&self, x: Rows<'_, f32>, out: &mut Grid<'_>) {
        // element l of every row goes to sum l mod 16 of its column: those of neighbouring columns are neighbours
        let near = NEAR.min(self.count());
        let all = segments(self.len());
        let (own, totals) = (x.count * LANES * near, all.len() > 1);
        scratch::with(if totals { 2 * own } else { own }, |store| {
            let (sums, before) = store.split_at_mut(own);
            for from in (0..self.count()).step_by(NEAR) {
                let width = near.min(self.count() - from);
                let len = self.len() - fault::one_if("dots.columns.tail").min(self.len());
                for (part, segment) in all.enumerate() {
                    if part > 0 {
                        before.copy_from_slice(sums);
                    }
                    sums.fill(0.0);
                    for l in segment.start..segment.end.min(len) {
                        let w = self.row(l, from, width);
                        for i in 0..x.count {
                            let at = (i * LANES + l % LANES) * near;
                            portable::scaled(x.row(i)[l], w, &mut sums[at..at + width]);
                        }
                    }
                    if part > 0 {
                        for (sum, before) in sums.iter_mut().zip(before.iter()) {
                            *sum += *before;
                        }
                    }
                }
                for (i, sums) in sums.chunks_exact_mut((LANES * near).max(1)).enumerate() {
                    let mut half = LANES / 2;
                    while half > 0 {
                        let (low, high) = sums.split_at_mut(half * near);
                        for (a, b) in low.iter_mut().zip(high) {
                            *a += *b;
                        }
                        half /= 2;
                    }
                    out.put(i, from, &sums[..width]);
                }
            }
        });
    }

    fn pack(&self, j: usize, within: Range<usize>, panels: &mut [f32]) {
        let j = if fault::active("dots.strip") { j.saturating_sub(1) } else { j };
        #[cfg(target_arch = "x86_64")]
        if isa() == Isa::Avx512 {
            // SAFETY: `isa` names a set only where the machine has all of its features.
            return unsafe { super::avx512::pack_columns(*self, j, within, panels) };
        }
        portable::pack_columns(*self, j, within, panels);
    }

    fn reads_lines(&self) -> bool {
        false
    }
}
