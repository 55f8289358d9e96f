//! The right side of a product: rows of a weight that lies (out, in), or columns of one that lies (in, out).

use super::panel::SIDE;
use super::segment::segments;
use super::{portable, scratch, Grid, Narrow, Rows, BLOCK_BYTES, LANES, TASK_ROWS};
use crate::fault;
#[cfg(target_arch = "x86_64")]
use crate::kernels::square;
#[cfg(target_arch = "x86_64")]
use crate::simd::{isa, Isa};
use std::ops::Range;

/// What a row of x is multiplied with, `count` times `len` elements.
pub(crate) trait Right: Copy + Send + Sync {
    /// Bytes of an element.
    const BYTES: usize;
    /// How many are packed at once, four beside one another: a multiple of four.
    const STRIP: usize;
    /// Fewer rows of x than this are never packed.
    const PACKED_FROM: usize;

    fn count(&self) -> usize;
    fn len(&self) -> usize;
    /// [`Right::STRIP`].
    fn strip(&self) -> usize {
        Self::STRIP
    }
    /// Whether so many rows of x are packed for it.
    fn packs(&self, rows: usize) -> bool;
    /// Those `from..from + count`.
    fn part(&self, from: usize, count: usize) -> Self;
    /// The products of few rows of x, on this thread.
    fn few(&self, x: Rows<'_, f32>, out: &mut Grid<'_>);
    /// Elements `within` of [`Right::STRIP`] of them from `j` on, which are not all there at the end: four beside one another, sixteen elements
    /// at a time, with zeros behind the end; then the next four.
    fn pack(&self, j: usize, within: Range<usize>, panels: &mut [f32]);
    /// Whether the few rows of x are worth copying to boundaries of cache lines.
    fn reads_lines(&self) -> bool;
    /// What [`Right::pack`] would read, where it is worth asking memory for it before.
    fn ahead(&self, j: usize, within: Range<usize>) -> Ahead {
        let _ = (j, within);
        Ahead::default()
    }
}

/// Where up to four rows begin that are read next. The machine's own guess ends with the page.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ahead {
    rows: [*const u8; SIDE],
    count: usize,
    /// Bytes of sixteen elements.
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))] // nothing there asks
    step: usize,
}

impl Default for Ahead {
    fn default() -> Self {
        Self { rows: [std::ptr::null(); SIDE], count: 0, step: 0 }
    }
}

impl Ahead {
    /// The rows that group `g` of `groups` asks for.
    pub(super) fn share(&self, g: usize, groups: usize) -> Self {
        let mut share = Self { count: 0, ..*self };
        for row in self.rows.iter().take(self.count).skip(g).step_by(groups.max(1)) {
            share.rows[share.count] = *row;
            share.count += 1;
        }
        share
    }

    /// Where sixteen elements of each row begin, number `step` of them.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    pub(super) fn at(&self, step: usize) -> impl Iterator<Item = *const u8> + '_ {
        self.rows.iter().take(self.count).map(move |row| row.wrapping_add(step * self.step))
    }
}

/// The most rows of a weight for which x's rows are not packed: a cache line of x would be written and read again for two groups of four.
const THIN: usize = 2 * SIDE;

/// The most rows of x that meet columns as they lie; for more, packing the columns is worth while.
const ACROSS: usize = 16;

/// Whether thin products of unpacked operands have code of their own.
fn has_thin() -> bool {
    #[cfg(target_arch = "x86_64")]
    return isa() == Isa::Avx512;
    #[cfg(not(target_arch = "x86_64"))]
    false
}

impl<E: Narrow> Right for Rows<'_, E> {
    const BYTES: usize = size_of::<E>();
    const STRIP: usize = SIDE;
    const PACKED_FROM: usize = 8;

    fn packs(&self, rows: usize) -> bool {
        rows >= Self::PACKED_FROM && self.len > 0 && !(self.count <= THIN && has_thin())
    }

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

    fn ahead(&self, j: usize, within: Range<usize>) -> Ahead {
        let mut ahead = Ahead { step: LANES * size_of::<E>(), ..Ahead::default() };
        for (row, j) in ahead.rows.iter_mut().zip(j..self.count) {
            *row = self.row(j)[within.clone()].as_ptr().cast();
            ahead.count += 1;
        }
        ahead
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

    /// Whether products with so many rows of x, or so few columns, have code of their own that packs nothing.
    fn is_thin(&self, rows: usize) -> bool {
        (rows <= ACROSS || self.0.len <= THIN) && has_thin()
    }

    /// Calls `f` with the columns as rows of a copy.
    #[cfg(target_arch = "x86_64")]
    fn turned<R>(&self, f: impl FnOnce(Rows<'_, f32>) -> R) -> R
    where
        E: Narrow,
    {
        let Rows { data, pitch, count: len, len: count } = self.0;
        scratch::with(count * len, |copy| {
            square::turn(data, (0, pitch), len, copy);
            f(Rows { data: copy, pitch: len, count, len })
        })
    }

    /// Columns `j..` of row `i`, at most `count` of them.
    pub(super) fn row(&self, i: usize, j: usize, count: usize) -> &'a [E] {
        &self.0.row(i)[j..(j + count).min(self.0.len)]
    }
}

/// The most numbers that products of unpacked rows of `len` elements take: the sums of few of them, of a segment and of the segments before,
/// or few columns turned.
pub(super) fn few_floats(rows: usize, len: usize) -> usize {
    let sums = if segments(len).len() > 1 { 2 } else { 1 };
    (sums * rows.min(<Columns<'_, f32> as Right>::PACKED_FROM) * LANES * NEAR).max(THIN.saturating_mul(len))
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

    fn packs(&self, rows: usize) -> bool {
        rows >= Self::PACKED_FROM && self.len() > 0 && !self.is_thin(rows)
    }

    fn few(&self, x: Rows<'_, f32>, out: &mut Grid<'_>) {
        #[cfg(target_arch = "x86_64")]
        if x.count >= Self::PACKED_FROM && self.is_thin(x.count) {
            if x.count <= ACROSS {
                return super::across::dots(x, *self, out);
            }
            return self.turned(|rows| Right::few(&rows, x, out));
        }
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
