//! The products of many rows of x: both sides packed into panels, sixteen products at a time.
//!
//! Tensors begin anywhere, so nearly every load of a whole vector from them touches two cache lines; and each vector is loaded once
//! for every four products. Packed, four rows stand beside one another sixteen numbers at a time, on cache lines, widened, and with
//! zeros behind their end. A block of x's rows stays in the second-level cache while the weight passes; four rows of the weight
//! stay in the first-level cache while the block's rows pass.

use super::right::Ahead;
use super::segment::{segments, Segments};
use super::{Grid, Narrow, Right, Rows, LANES};
use crate::fault;
use crate::kernels::scratch;
#[cfg(target_arch = "x86_64")]
use crate::simd::{isa, Isa};

/// Rows of each side that stand beside one another.
pub(super) const SIDE: usize = 4;
/// Products of a tile.
const TILE: usize = SIDE * SIDE;
/// Elements of a block of x's rows: half a MiB.
const BLOCK: usize = 1 << 17;

/// The sums of a tile between two segments of its rows: of row `r` of x and `l` of the weight at `(l · 4 + r) · 16`.
pub(super) const SUMS: usize = TILE * LANES;

/// A tile's part of both panels, and how to go through it.
pub(super) struct Tile<'a> {
    /// `(steps, M, 16)`
    pub(super) x: &'a [f32],
    /// `(steps, 4, 16)`
    pub(super) w: &'a [f32],
    /// Elements of the last step; the others have sixteen.
    pub(super) last: usize,
    /// Whether `sums` hold those of the segments before, to which this one's are added.
    pub(super) goes_on: bool,
    /// Whether the products end here: those of row `r` of x go to `products[4r..]`; else the sums go to `sums`.
    pub(super) ends: bool,
    pub(super) sums: &'a mut [f32; SUMS],
    /// What of the weight to ask for on the way.
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))] // nothing there asks
    pub(super) ahead: Ahead,
}

/// The fewest rows of a block: for each block the whole weight is packed again.
const FEWEST: usize = 4 * SIDE;

/// How many rows of x share a block.
pub(super) fn block_rows(len: usize) -> usize {
    (BLOCK / len.next_multiple_of(LANES).max(LANES) / SIDE * SIDE).max(FEWEST)
}

/// How many tiles' sums are kept: between the segments of a row only.
fn kept(groups: usize, pieces: usize, strip: usize) -> usize {
    if pieces > 1 {
        groups * (strip / SIDE)
    } else {
        1
    }
}

/// The numbers of both panels and of the sums.
fn sizes(rows: usize, padded: usize, piece: usize, strip: usize, kept: usize) -> [usize; 3] {
    [rows * padded, strip * piece, kept * SUMS]
}

/// The most numbers that [`products`] takes for a block of so many rows or fewer, with either kind of right side.
pub(super) fn floats(rows: usize, len: usize) -> usize {
    let (padded, rows) = (len.next_multiple_of(LANES), rows.min(block_rows(len)));
    let mut pieces = segments(padded);
    let kept = kept(rows.div_ceil(SIDE), pieces.len(), LANES);
    sizes(rows, padded, pieces.next().map_or(0, |p| p.len()), LANES, kept).iter().sum()
}

/// A block of x's rows, packed, and memory for the weight's panels and for sums.
pub(super) struct Block<'a> {
    x: Rows<'a, f32>,
    /// The segments of a padded row.
    pieces: Segments,
    /// `(groups, steps, up to 4, 16)`
    packed: &'a [f32],
    panels: &'a mut [f32],
    sums: &'a mut [f32],
}

/// Calls `f` with a block that takes right sides of this strip or less, and with `beside` numbers of no particular value.
pub(super) fn with<R>(
    x: Rows<'_, f32>,
    strip: usize,
    beside: usize,
    f: impl FnOnce(&mut Block<'_>, &mut [f32]) -> R,
) -> R {
    let padded = x.len.next_multiple_of(LANES);
    let pieces = segments(padded);
    let kept = kept(x.count.div_ceil(SIDE), pieces.len(), strip);
    let sizes = sizes(x.count, padded, { pieces }.next().map_or(0, |p| p.len()), strip, kept);
    // what lies beside begins on a cache line too
    let own = sizes.iter().sum::<usize>().next_multiple_of(LANES);
    scratch::with(own + beside, |store| {
        let (store, beside) = store.split_at_mut(own);
        let (packed, rest) = store.split_at_mut(sizes[0]);
        let (panels, sums) = rest.split_at_mut(sizes[1]);
        for (g, group) in packed.chunks_mut((SIDE * padded).max(1)).enumerate() {
            let count = group.len() / padded.max(1);
            for r in 0..count {
                pack(x.row(g * SIDE + r), count, r, group);
            }
        }
        f(&mut Block { x, pieces, packed, panels, sums }, beside)
    })
}

impl<'a> Block<'a> {
    /// The rows that it packs.
    pub(super) fn rows(&self) -> Rows<'a, f32> {
        self.x
    }

    /// out\[i\]\[j\] = x\[i\] · w\[j\]; both sides have one length.
    pub(super) fn products<R: Right>(&mut self, w: R, out: &mut Grid<'_>) {
        let padded = self.x.len.next_multiple_of(LANES).max(1);
        let groups = self.x.count.div_ceil(SIDE);
        let several = self.pieces.len() > 1;
        for strip in (0..w.count()).step_by(R::STRIP) {
            for (p, piece) in self.pieces.enumerate() {
                let within = piece.start..piece.end.min(self.x.len);
                let panels = &mut self.panels[..R::STRIP * piece.len()];
                w.pack(strip, within.clone(), panels);
                // memory brings the next panels while this one is multiplied
                let first = || Some((strip + R::STRIP, { self.pieces }.next()?));
                let next = { self.pieces }.nth(p + 1).map(|piece| (strip, piece)).or_else(first);
                let ahead = next
                    .filter(|(strip, _)| *strip < w.count())
                    .map(|(strip, piece)| w.ahead(strip, piece.start..piece.end.min(self.x.len)));
                let ahead = ahead.unwrap_or_default();
                for (s, panel) in panels.chunks_exact(SIDE * piece.len().max(1)).enumerate() {
                    let j = strip + s * SIDE;
                    if j >= w.count() {
                        break;
                    }
                    let count = SIDE.min(w.count() - j);
                    for (g, group) in self.packed.chunks(SIDE * padded).enumerate() {
                        let m = group.len() / padded;
                        let at = if several { (s * groups + g) * SUMS } else { 0 };
                        let Ok(sums) = <&mut [f32; SUMS]>::try_from(&mut self.sums[at..at + SUMS]) else {
                            continue;
                        };
                        let part = Tile {
                            x: &group[m * piece.start..m * piece.end],
                            w: panel,
                            last: within.len() - (piece.len() - LANES),
                            goes_on: p > 0 && !fault::active("dots.piece"),
                            ends: p + 1 == self.pieces.len(),
                            sums,
                            ahead: if s == 0 { ahead.share(g, groups) } else { Ahead::default() },
                        };
                        let ends = part.ends;
                        let numbers = match m {
                            1 => tile::<1>(part),
                            2 => tile::<2>(part),
                            3 => tile::<3>(part),
                            _ => tile::<SIDE>(part),
                        };
                        if ends {
                            for (r, numbers) in numbers.chunks_exact(SIDE).enumerate().take(m) {
                                out.put(g * SIDE + r, j, &numbers[..count]);
                            }
                        }
                    }
                }
            }
        }
    }
}

/// A row as number `r` of `count` beside one another, zeros behind its end.
pub(super) fn pack<E: Narrow>(row: &[E], count: usize, r: usize, to: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if isa() == Isa::Avx512 {
        // SAFETY: `isa` names a set only where the machine has all of its features.
        return unsafe { super::avx512::pack(row, count, r, to) };
    }
    super::portable::pack(row, count, r, to);
}

/// The tile's products, if it ends.
fn tile<const M: usize>(tile: Tile<'_>) -> [f32; TILE] {
    #[cfg(target_arch = "x86_64")]
    if isa() == Isa::Avx512 {
        // SAFETY: `isa` names a set only where the machine has all of its features.
        return unsafe { super::avx512::tile::<M>(tile) };
    }
    #[cfg(target_arch = "x86_64")]
    if isa() == Isa::Avx2 {
        // SAFETY: as above.
        return unsafe { super::avx2::tile::<M>(tile) };
    }
    super::portable::tile::<M>(tile)
}
