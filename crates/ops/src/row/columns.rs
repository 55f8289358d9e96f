//! Tiles that lie column by column, for rows whose elements stand far apart while neighbouring rows are neighbours in memory:
//! a softmax over a middle dim, say. A column of the tile is a run of memory then, and a vector holds the same column of sixteen rows.
//!
//! Every row gets the bits that it has in a tile that lies row by row: the sums below meet in the order of [`super::loops`].

#[cfg(target_arch = "x86_64")]
mod avx512;

use super::gather::RowShape;
use super::loops::Arg;
use super::program::ReduceFn;
use super::reduce::{add_segment, fold_exactly, Held, LANES, SEGMENT, SHORT};
use crate::element::Element;
use crate::fault;
use crate::math::Real;
use crate::simd::versions;
use candle_core::DType;

/// Rows that are folded together.
const WIDTH: usize = 16;

/// Whether the rows that begin at `offsets` are neighbours.
fn neighbours(offsets: &[usize]) -> bool {
    offsets.windows(2).all(|w| w[1] == w[0] + 1)
}

/// Reads columns `start..start + cols` of the rows that begin at `offsets` into a tile of columns.
pub(crate) fn gather<T: Real, E: Element>(
    src: &[E],
    offsets: &[usize],
    shape: &RowShape,
    start: usize,
    cols: usize,
    tile: &mut [T],
) {
    let (rows, dense) = (offsets.len(), neighbours(offsets));
    let Some(&first) = offsets.first() else {
        return;
    };
    let same = offsets.iter().all(|&o| o == first);
    shape.pieces(start, cols, |done, offset, stride, len| {
        for (i, column) in tile[done * rows..(done + len) * rows].chunks_exact_mut(rows).enumerate() {
            let at = offset + i * if fault::active("row.columns.stride") { 1 } else { stride };
            if dense {
                T::read(&src[first + at..first + at + rows], column);
            } else if same {
                column.fill(T::get(src[first + at]));
            } else {
                for (d, &base) in column.iter_mut().zip(offsets) {
                    *d = T::get(src[base + at]);
                }
            }
        }
    });
}

/// Writes a tile of columns (`pitch` apart) to columns `start..start + cols` of the rows that begin at `offsets`.
pub(crate) fn scatter<T: Real, E: Element>(
    tile: &[T],
    pitch: usize,
    offsets: &[usize],
    shape: &RowShape,
    start: usize,
    cols: usize,
    dst: &mut [E],
) {
    let (rows, dense) = (offsets.len(), neighbours(offsets));
    let Some(&first) = offsets.first() else {
        return;
    };
    shape.pieces(start, cols - fault::one_if("row.columns.tail"), |done, offset, stride, len| {
        for i in 0..len {
            let column = &tile[(done + i) * pitch..(done + i) * pitch + rows];
            let at = offset + i * stride;
            if dense {
                T::write(column, &mut dst[first + at..first + at + rows]);
            } else {
                for (&v, &base) in column.iter().zip(offsets) {
                    dst[base + at] = v.put();
                }
            }
        }
    });
}

/// Folds the columns of a tile into one accumulator per row. `first` says whether column 0 is the rows' first element.
pub(crate) fn reduce<T: Real>(
    f: ReduceFn,
    a: Arg<'_, T>,
    held: &mut Held<'_, T>,
    rows: usize,
    cols: usize,
    first: bool,
) {
    // a tile's elements, whatever they are computed from: see `Run::arg`
    let Arg::Vec { data, pitch } = a else {
        held.acc.fill(T::NAN);
        return;
    };
    let mut lost = held.lost.chunks_mut(WIDTH);
    for (i, acc) in held.acc[..rows].chunks_mut(WIDTH).enumerate() {
        let lost = lost.next().unwrap_or_default();
        // rows without elements have no data
        let data = data.get(i * WIDTH..).unwrap_or_default();
        let whole = <&mut [T; WIDTH]>::try_from(&mut *acc).is_ok_and(|acc| whole(f, data, pitch, cols, acc, lost));
        if !whole {
            let rows = acc.len();
            few(f, data, pitch, &mut Held { acc, lost }, rows, cols, first);
        }
    }
}

versions! {
/// The same for up to sixteen rows of any kind.
fn few<T: Real>(f: ReduceFn, data: &[T], pitch: usize, held: &mut Held<'_, T>, rows: usize, cols: usize, first: bool) = few_body;
}

#[inline(always)]
fn few_body<T: Real, const FMA: bool>(
    f: ReduceFn,
    data: &[T],
    pitch: usize,
    held: &mut Held<'_, T>,
    n: usize,
    cols: usize,
    first: bool,
) {
    let mut block = [T::ZERO; WIDTH];
    // rows that are not there repeat the last one
    let mut column = |c: usize| {
        let x = &data[c * pitch..c * pitch + n];
        match <&[T; WIDTH]>::try_from(x) {
            Ok(x) => block = *x,
            Err(_) => {
                for (i, b) in block.iter_mut().enumerate() {
                    *b = x[i.min(n - 1)];
                }
            }
        }
        block
    };
    let mut own = [T::ZERO; WIDTH];
    own[..n].copy_from_slice(&held.acc[..n]);
    let mut lost = [T::ZERO; WIDTH];
    let summed = n.min(held.lost.len());
    lost[..summed].copy_from_slice(&held.lost[..summed]);
    // lanes that a short row does not have are not kept
    match (f, cols <= SHORT) {
        (ReduceFn::Sum, true) => sums::<T, SHORT>(cols, &mut column, &mut own, &mut lost),
        (ReduceFn::Sum, false) => sums::<T, LANES>(cols, &mut column, &mut own, &mut lost),
        (ReduceFn::Max, true) => {
            extremes::<T, SHORT>(cols, &mut column, &mut own, first, T::NEG_INF, |m, x| m < x);
        }
        (ReduceFn::Max, false) => {
            extremes::<T, LANES>(cols, &mut column, &mut own, first, T::NEG_INF, |m, x| m < x);
        }
        (ReduceFn::Min, true) => extremes::<T, SHORT>(cols, &mut column, &mut own, first, T::INF, |m, x| m > x),
        (ReduceFn::Min, false) => extremes::<T, LANES>(cols, &mut column, &mut own, first, T::INF, |m, x| m > x),
    }
    if fault::any() && fault::active("row.columns.rows") {
        own[n - 1] = fault::nudged(own[n - 1]);
    }
    held.acc[..n].copy_from_slice(&own[..n]);
    held.lost[..summed].copy_from_slice(&lost[..summed]);
}

/// Reduces sixteen whole rows by code of their own, where the machine has it, no row is one of the rare kinds, and no fault is to be seen
/// that only the loops have. Whether it has.
#[inline(always)]
fn whole<T: Real>(f: ReduceFn, x: &[T], pitch: usize, cols: usize, acc: &mut [T; WIDTH], lost: &mut [T]) -> bool {
    #[cfg(target_arch = "x86_64")]
    if let (Some(x), Some(own)) = (T::f32s(x), T::f32s_mut(acc).and_then(|a| <&mut [f32; WIDTH]>::try_from(a).ok())) {
        let columns = avx512::Columns::new(x, pitch, cols);
        let off = fault::any() && fault::active("row.columns.rows");
        let here = !fault::any() || off;
        let Some(columns) = columns.filter(|_| crate::simd::isa() == crate::simd::Isa::Avx512 && here) else {
            return false;
        };
        if f == ReduceFn::Sum {
            let Some(lost) = T::f32s_mut(lost).and_then(|l| l.first_chunk_mut()) else {
                return false;
            };
            // SAFETY: the machine has AVX-512.
            unsafe { avx512::sums(columns, own, lost) };
            own[WIDTH - 1] = if off { fault::nudged(own[WIDTH - 1]) } else { own[WIDTH - 1] };
            return true;
        }
        let mut best = *own;
        // SAFETY: as above.
        let special = unsafe { avx512::extremes(columns, f == ReduceFn::Max, &mut best) };
        if special == 0 {
            *own = best;
        }
        return special == 0;
    }
    let _ = (f, x, pitch, cols, acc, lost);
    false
}

/// See `reduce::sum_into`.
#[inline(always)]
fn sums<T: Real, const N: usize>(
    cols: usize,
    column: &mut impl FnMut(usize) -> [T; WIDTH],
    acc: &mut [T; WIDTH],
    lost: &mut [T; WIDTH],
) {
    for from in (0..cols).step_by(SEGMENT) {
        let n = SEGMENT.min(cols - from);
        let used = n.min(N).next_power_of_two();
        let mut wide = [[0f64; WIDTH]; N];
        for (lane, wide) in wide.iter_mut().enumerate().take(used.min(n)) {
            let mut sum = [T::ZERO; WIDTH];
            for c in (lane..n).step_by(N) {
                for (s, v) in sum.iter_mut().zip(column(from + c)) {
                    *s = *s + v;
                }
            }
            for (w, s) in wide.iter_mut().zip(sum) {
                *w = s.to_f64();
            }
        }
        let mut total = [0f64; WIDTH];
        if T::DTYPE == DType::F64 {
            for (r, total) in total.iter_mut().enumerate() {
                let mut lanes = [0f64; N];
                for (l, w) in lanes.iter_mut().zip(&wide) {
                    *l = w[r];
                }
                *total = fold_exactly(&mut lanes[..used]);
            }
        } else {
            fold(&mut wide[..used], |a, b| a + b);
            total = wide[0];
        }
        for ((a, l), t) in acc.iter_mut().zip(&mut *lost).zip(total) {
            add_segment(a, l, T::from_f64(t));
        }
    }
}

/// See `reduce::extreme_into`.
#[inline(always)]
fn extremes<T: Real, const N: usize>(
    cols: usize,
    column: &mut impl FnMut(usize) -> [T; WIDTH],
    acc: &mut [T; WIDTH],
    first: bool,
    start: T,
    better: impl Fn(T, T) -> bool,
) {
    if cols == 0 {
        return;
    }
    let leading = column(0);
    let used = cols.min(N).next_power_of_two();
    let mut lanes = [[start; WIDTH]; N];
    for (lane, held) in lanes.iter_mut().enumerate().take(used.min(cols)) {
        for c in (lane..cols).step_by(N) {
            for (h, v) in held.iter_mut().zip(column(c)) {
                *h = if better(*h, v) { v } else { *h };
            }
        }
    }
    fold(&mut lanes[..used], |a, b| if better(a, b) { b } else { a });
    for (r, ((a, &m), &lead)) in acc.iter_mut().zip(&lanes[0]).zip(&leading).enumerate() {
        // see `reduce::first_zero`
        let m = if m == T::ZERO && !fault::active("row.columns.zero") {
            (0..cols).map(|c| column(c)[r]).find(|v| *v == T::ZERO).unwrap_or(m)
        } else {
            m
        };
        if first && lead.is_nan() && !fault::active("row.columns.nan") {
            *a = T::NAN;
        } else if better(*a, m) {
            *a = m;
        }
    }
}

/// Folds a power of two of lanes in halves, into the first.
#[inline(always)]
fn fold<V: Copy>(lanes: &mut [[V; WIDTH]], f: impl Fn(V, V) -> V) {
    let mut width = lanes.len() / 2;
    while width > 0 {
        let (low, high) = lanes.split_at_mut(width);
        for (a, b) in low.iter_mut().zip(high.iter()) {
            for (a, &b) in a.iter_mut().zip(b) {
                *a = f(*a, b);
            }
        }
        width /= 2;
    }
}
