//! Inner products of every row of one matrix with every row of another, or with every column: products with weights that lie
//! (out, in) or (in, out), and scores.
//!
//! Each product has 16 interleaved sums for each segment of its two rows, which are added one after the other and folded in
//! halves: [`super::dot::dot`] where there is one segment. So it depends on its own two rows only, not on how many rows run together
//! nor on threads, bit for bit. A weight's row is read once for up to four rows of x, and from
//! memory one row after the other: several at once are several short streams, which come at half the speed of one long one. The
//! rows of x that follow find a block of the weight in the cache, and take four of its rows at a time. Many rows of x go through
//! packed panels instead, if they meet many of the weight: packing serves those.

#[cfg(target_arch = "x86_64")]
mod across;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod grid;
mod narrow;
mod panel;
mod portable;
mod right;
mod segment;
mod side;

use super::{scratch, team};
use crate::error::{Error, Result};
pub(crate) use grid::Grid;
pub(crate) use narrow::Narrow;
use parking_lot::Mutex;
pub(crate) use right::{Columns, Right};
pub(crate) use side::{each_side, Left, Side};

/// Lanes of a sum.
const LANES: usize = 16;
/// What a thread reads from memory and multiplies in a nanosecond, roughly: they decide how many threads share a product.
const BYTES_PER_NS: usize = 15;
const MACS_PER_NS: usize = 40;
/// The least time that a task is worth.
const TASK_NS: usize = 10_000;
/// Rows of the weight that one task takes, at least.
const TASK_ROWS: usize = 16;
/// Bytes of the weight's rows that are kept in the second-level cache while x's rows pass.
const BLOCK_BYTES: usize = 1 << 18;
/// More elements of x than these are not copied to cache lines: it would take long, and memory.
const ALIGNED: usize = 1 << 16;
/// Bytes of a cache line.
pub(super) const LINE_BYTES: usize = 64;

/// Rows of `len` elements that start `pitch` apart.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rows<'a, E> {
    data: &'a [E],
    pitch: usize,
    count: usize,
    len: usize,
}

impl<'a, E> Rows<'a, E> {
    /// `count` rows in `data`; an error if the last one ends behind it.
    pub(crate) fn new(data: &'a [E], count: usize, pitch: usize, len: usize) -> Result<Self> {
        let end = count.checked_sub(1).map_or(Some(0), |last| last.checked_mul(pitch)?.checked_add(len));
        match end {
            Some(end) if end <= data.len() => Ok(Self { data, pitch, count, len }),
            _ => Err(Error::shape("matmul", format!("{count} rows of {len}, {pitch} apart, in {}", data.len()))),
        }
    }

    pub(crate) fn count(&self) -> usize {
        self.count
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    fn row(&self, i: usize) -> &'a [E] {
        &self.data[i * self.pitch..i * self.pitch + self.len]
    }

    /// Rows `from..from + count`.
    pub(crate) fn part(&self, from: usize, count: usize) -> Self {
        Self { data: self.data.get(from * self.pitch..).unwrap_or_default(), count, ..*self }
    }
}

/// The most bytes that copies of x to cache lines take: up to seven rows that are padded to lines, and a line to begin on.
pub(crate) const ALIGNED_BYTES: usize = (ALIGNED + 8 * LANES) * size_of::<f32>();

/// The most bytes that one thread packs for products of so many rows of `len` elements, with either kind of right side.
pub(crate) fn panel_bytes(rows: usize, len: usize) -> usize {
    let few = right::few_floats(rows, len);
    panel::floats(rows, len).max(few).saturating_add(2 * LANES).saturating_mul(size_of::<f32>())
}

/// The most bytes that one thread takes for the sums of so many rows of `len` elements, if those are few.
pub(crate) fn few_bytes(rows: usize, len: usize) -> usize {
    right::few_floats(rows, len).saturating_add(LANES).saturating_mul(size_of::<f32>())
}

/// out\[i\]\[j\] = x\[i\] · w\[j\], on this thread.
pub(crate) fn dots<R: Right>(x: Rows<'_, f32>, w: R, out: &mut Grid<'_>) -> Result<()> {
    if x.len != w.len() || out.rows() != x.count || out.cols() != w.count() {
        let (x, w, out) = ((x.count, x.len), (w.count(), w.len()), (out.rows(), out.cols()));
        return Err(Error::shape("matmul", format!("{x:?} x {w:?} transposed into {out:?}")));
    }
    if !w.packs(x.count) {
        w.few(x, out);
        return Ok(());
    }
    let rows = panel::block_rows(x.len);
    let mut rest = out.borrow();
    for from in (0..x.count).step_by(rows) {
        let (mut part, below) = rest.split_rows(rows);
        panel::with(x.part(from, rows.min(x.count - from)), R::STRIP, 0, |block, _| block.products(w, &mut part));
        rest = below;
    }
    Ok(())
}

/// About how many nanoseconds a thread needs for the products of so many rows of x.
fn cost_ns<R: Right>(w: &R, rows: usize) -> usize {
    let weights = w.count().saturating_mul(w.len());
    (weights.saturating_mul(R::BYTES) / BYTES_PER_NS).max(weights.saturating_mul(rows) / MACS_PER_NS)
}

/// In how many parts work of so many nanoseconds is shared.
pub(crate) fn task_count(ns: usize) -> usize {
    // several parts for each thread: one that wakes late finds less to do
    match team::threads() {
        0 | 1 => 1,
        _ if ns < 2 * TASK_NS => 1,
        threads => match (threads * 4).min(ns / TASK_NS) {
            // as many for each thread, so that none waits for another's last
            tasks if tasks > threads => tasks / threads * threads,
            tasks => tasks,
        },
    }
}

/// The same with the right side shared among threads.
pub(crate) fn dots_parallel<R: Right>(x: Rows<'_, f32>, w: R, out: Grid<'_>) -> Result<()> {
    let time = cost_ns(&w, x.count);
    let tasks = task_count(time);
    with_lines(x, !w.packs(x.count) && w.reads_lines(), |x| share(x, w, out, tasks, time))
}

/// Calls `f` with x, or where `wanted` with a copy of it whose rows begin on cache lines, if that is worth while.
pub(crate) fn with_lines<T>(x: Rows<'_, f32>, wanted: bool, f: impl FnOnce(Rows<'_, f32>) -> T) -> T {
    if !wanted || !gains_from_lines(x) {
        return f(x);
    }
    let pitch = x.len.next_multiple_of(LANES);
    scratch::with(x.count * pitch, |data| {
        for i in 0..x.count {
            data[i * pitch..i * pitch + x.len].copy_from_slice(x.row(i));
        }
        f(Rows { data, pitch, ..x })
    })
}

/// Whether rows are worth copying to boundaries of cache lines: every row of the weight reads them again, and a load across a boundary
/// costs two.
fn gains_from_lines(x: Rows<'_, f32>) -> bool {
    let rests = x.data.as_ptr().align_offset(LINE_BYTES) == 0 && (x.pitch.is_multiple_of(LANES) || x.count == 1);
    !rests && x.count.saturating_mul(x.len) <= ALIGNED
}

/// How many rows of x of this length a part takes: those of a packed block, which has room for more rows than are ever few.
pub(crate) fn part_rows(count: usize, len: usize) -> usize {
    let blocks = count.div_ceil(panel::block_rows(len)).max(1);
    // of about equal size
    count.div_ceil(blocks).next_multiple_of(panel::SIDE).max(panel::SIDE)
}

/// How many of the weight's rows a part takes, for about `tasks` parts of so many blocks.
pub(crate) fn part_cols(count: usize, tasks: usize, blocks: usize) -> usize {
    count.div_ceil(tasks.div_ceil(blocks.max(1)).max(1)).next_multiple_of(TASK_ROWS).max(TASK_ROWS)
}

/// The product in about `tasks` parts: blocks of x's rows, and where those are fewer, parts of the weight's rows.
fn share<R: Right>(x: Rows<'_, f32>, w: R, mut out: Grid<'_>, tasks: usize, ns: usize) -> Result<()> {
    if tasks < 2 || out.rows() != x.count || out.cols() != w.count() {
        return dots(x, w, &mut out);
    }
    let mut block = part_rows(x.count, x.len);
    let cols = part_cols(w.count(), tasks, x.count.div_ceil(block));
    if w.count() <= cols && x.count.div_ceil(block) < tasks {
        // too few columns to share out
        block = x.count.div_ceil(tasks).next_multiple_of(panel::SIDE);
    }
    let mut parts = Vec::with_capacity(tasks);
    for i in (0..x.count).step_by(block) {
        let rows = block.min(x.count - i);
        let (mut above, below) = out.split_rows(rows);
        out = below;
        for from in (0..w.count()).step_by(cols) {
            let count = cols.min(w.count() - from);
            let (part, rest) = above.split_cols(count);
            parts.push((x.part(i, rows), w.part(from, count), part));
            above = rest;
        }
    }
    let outcome = Mutex::new(Ok(()));
    team::each(ns, parts, |(x, w, mut out)| {
        if let Err(error) = dots(x, w, &mut out) {
            *outcome.lock() = Err(error);
        }
    });
    outcome.into_inner()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::tests::{fused, with_each};
    use crate::simd::{isa, Isa};
    use half::{bf16, f16};

    fn numbers(n: usize, seed: usize) -> Vec<f32> {
        (0..n).map(|i| ((i * 37 + seed * 101) % 127) as f32 / 31.0 - 2.0).collect()
    }

    /// With each instruction set, or where there are several tasks with the machine's own: another thread knows of no other.
    fn check<E: Narrow>(m: usize, n: usize, k: usize, tasks: usize) {
        if tasks < 2 {
            with_each(|isa| check_with::<E>(isa, m, n, k, tasks));
        } else {
            check_with::<E>(isa(), m, n, k, tasks);
        }
    }

    /// The product as the module says it is made.
    fn product<const FMA: bool>(x: &[f32], w: &[f32]) -> f32 {
        let mut totals: Option<[f32; LANES]> = None;
        for part in segment::segments(x.len()) {
            let mut sums = [0f32; LANES];
            for (l, (x, w)) in x[part.clone()].iter().zip(&w[part]).enumerate() {
                sums[l % LANES] = crate::simd::mul_add::<FMA>(*x, *w, sums[l % LANES]);
            }
            totals = Some(totals.map_or(sums, |before| std::array::from_fn(|l| before[l] + sums[l])));
        }
        crate::row::reduce::fold(&mut totals.unwrap(), |a, b| a + b)
    }

    fn check_with<E: Narrow>(isa: Isa, m: usize, n: usize, k: usize, tasks: usize) {
        let (xp, wp, op) = (k + 3, k + 1, n + 2);
        let x = numbers(m * xp, 1);
        let w: Vec<E> = numbers(n * wp, 2).into_iter().map(E::from_f32).collect();
        let wide: Vec<f32> = w.iter().map(|v| v.to_f32()).collect();
        let mut got = vec![7.0; m * op];
        let xs = Rows::new(&x, m, xp, k).unwrap();
        let ws = Rows::new(&w, n, wp, k).unwrap();
        share(xs, ws, Grid::new(&mut got, m, n, op).unwrap(), tasks, 0).unwrap();
        let mut parallel = vec![7.0; m * op];
        let run = || dots_parallel(xs, ws, Grid::new(&mut parallel, m, n, op).unwrap());
        team::with_threads(tasks, run).unwrap();
        assert!(parallel == got, "{isa:?} {m}x{n}x{k} with x on lines");
        // the same weight turned: columns
        let (cp, mut turned) = (n + 3, vec![7.0; m * op]);
        let mut across = vec![E::from_f32(f32::NAN); (k * cp).saturating_sub(3)];
        for j in 0..n {
            for l in 0..k {
                across[l * cp + j] = w[j * wp + l];
            }
        }
        let columns = Columns::of(Rows::new(&across, k, cp, n).unwrap());
        share(xs, columns, Grid::new(&mut turned, m, n, op).unwrap(), tasks, 0).unwrap();
        assert!(turned == got, "{isa:?} {m}x{n}x{k} by columns");
        for i in 0..m {
            for j in 0..op {
                let want = match (j < n, fused(isa)) {
                    (true, true) => product::<true>(&x[i * xp..i * xp + k], &wide[j * wp..j * wp + k]),
                    (true, false) => product::<false>(&x[i * xp..i * xp + k], &wide[j * wp..j * wp + k]),
                    // nothing is written beside the columns
                    (false, _) => 7.0,
                };
                assert_eq!(got[i * op + j].to_bits(), want.to_bits(), "{isa:?} {m}x{n}x{k} at {i}, {j}");
            }
        }
    }

    #[test]
    fn every_product_is_made_of_its_rows_alone() {
        for m in [0, 1, 2, 3, 4, 5, 9, 18] {
            for n in [0, 1, 3, 4, 5, 16, 17, 39] {
                for k in [0, 1, 15, 16, 17, 64, 75, 1030] {
                    check::<f32>(m, n, k, 1);
                    check::<bf16>(m, n, k, 1);
                    check::<f16>(m, n, k, 1);
                }
            }
        }
    }

    #[test]
    fn long_rows_are_summed_in_segments() {
        // as many additions follow one another as a segment has steps, as there are segments, and four folds: 64 + 48 + 4 of half a
        // unit each, where one chain over the whole row would round 3072 sums of a third upwards or downwards alike
        let (k, third) = (49_152, 1.0f32 / 3.0);
        let (x, w) = (vec![1f32; 9 * k], vec![third; 4 * k]);
        let exact = k as f64 * f64::from(third);
        for m in [1, 9] {
            with_each(|isa| {
                let mut out = [0f32; 36];
                let (xs, ws) = (Rows::new(&x, m, k, k).unwrap(), Rows::new(&w, 4, k, k).unwrap());
                dots(xs, ws, &mut Grid::new(&mut out[..4 * m], m, 4, 4).unwrap()).unwrap();
                for got in &out[..4 * m] {
                    let off = (f64::from(*got) - exact).abs() / exact / f64::from(f32::EPSILON / 2.0);
                    assert!(off <= 116.0, "{isa:?}, {m} rows: off by {off} half units");
                }
            });
        }
    }

    #[test]
    fn threads_change_no_bit() {
        for tasks in [2, 3, 5] {
            check::<f32>(5, 100, 33, tasks);
            check::<bf16>(1, 67, 16, tasks);
        }
        // more columns than stay in the cache at once
        check::<f32>(3, 700, 200, 1);
        // blocks of rows, and parts of the weight
        check::<f32>(700, 50, 400, 3);
        check::<f32>(0, 100, 33, 3);
    }

    #[test]
    fn panels_of_every_size() {
        for m in [8, 10, 11] {
            for n in [1, 6] {
                for k in [1, 16, 1024, 1030, 2100] {
                    check::<f32>(m, n, k, 1);
                    check::<bf16>(m, n, k, 1);
                }
            }
        }
        // more rows than a block has
        check::<f16>(70, 5, 2050, 1);
    }

    #[test]
    fn rows_behind_the_data_and_shapes_that_do_not_fit_are_refused() {
        let data = [0f32; 12];
        assert!(Rows::new(&data, 3, 4, 4).is_ok());
        assert!(Rows::new(&data, 3, 4, 5).is_err());
        assert!(Rows::new(&data, usize::MAX, 4, 4).is_err());
        let rows = |count, len| Rows::new(&data, count, 4, len).unwrap();
        let mut out = [0f32; 6];
        assert!(Grid::new(&mut out, 3, 2, 3).is_err());
        let mut grid = Grid::new(&mut out, 2, 3, 3).unwrap();
        assert!(dots(rows(2, 4), rows(3, 4), &mut grid).is_ok());
        assert!(dots(rows(2, 4), rows(3, 3), &mut grid).is_err());
        assert!(dots(rows(3, 4), rows(3, 4), &mut grid).is_err());
        assert!(dots(rows(2, 3), Columns::of(Rows::new(&data, 3, 4, 3).unwrap()), &mut grid).is_ok());
        assert!(dots(rows(2, 4), Columns::of(Rows::new(&data, 3, 4, 3).unwrap()), &mut grid).is_err());
    }
}
