//! The products by AVX-512: sixteen sums in registers, those of sixteen products folded together.

use super::panel::{Tile, SIDE, SUMS};
use super::segment::{segments, Segments};
use super::{Columns, Grid, Narrow, Rows, LANES};
use crate::fault;
use crate::kernels::square::transposed;
use std::arch::x86_64::*;
use std::ops::Range;

/// How far ahead a row that comes from memory is asked for, in bytes, into the second-level cache, which waits for more lines at a time than the
/// first. The machine's own guess ends with the page.
const AHEAD: usize = 8192;
/// How far ahead it is asked for into the first.
const NEAR: usize = 1024;

/// As `super::dots`, columns from `at` on.
pub(super) fn dots<E: Narrow>(x: Rows<'_, f32>, w: Rows<'_, E>, out: &mut Grid<'_>, at: usize) {
    let mut i = 0;
    while i < x.count {
        // SAFETY: the caller takes this path only where the machine has AVX-512.
        i += unsafe {
            match (x.count - i, i) {
                (1, 0) => pass::<E, 1, 1>(x, i, w, out, at),
                (1, _) => pass::<E, 1, 4>(x, i, w, out, at),
                (2 | 3, 0) => pass::<E, 2, 1>(x, i, w, out, at),
                (2 | 3, _) => pass::<E, 2, 4>(x, i, w, out, at),
                (_, 0) => pass::<E, 4, 1>(x, i, w, out, at),
                _ => pass::<E, 4, 4>(x, i, w, out, at),
            }
        };
    }
}

/// `M` rows of x from `i` on with all rows of the weight, `R` at a time; says how many rows of x that were.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn pass<E: Narrow, const M: usize, const R: usize>(
    x: Rows<'_, f32>,
    i: usize,
    w: Rows<'_, E>,
    out: &mut Grid<'_>,
    at: usize,
) -> usize {
    let xs: [&[f32]; M] = std::array::from_fn(|r| x.row(i + r));
    let parts = segments(x.len);
    let step = LANES / M;
    for j in (0..w.count).step_by(step) {
        let count = step.min(w.count - j);
        let mut sums = [_mm512_setzero_ps(); LANES];
        for first in (0..count).step_by(R) {
            // rows that are not there repeat the last one
            let rows: [&[E]; R] = std::array::from_fn(|l| w.row(j + (first + l).min(count - 1)));
            for (l, of_row) in products::<E, M, R>(xs, rows, parts).iter().enumerate() {
                for (r, sum) in of_row.iter().enumerate() {
                    sums[(first + l) % 4 * 4 + (first + l) / 4 * M + r] = *sum;
                }
            }
        }
        let mut folded = [0f32; LANES];
        // SAFETY: sixteen numbers have room in the array.
        unsafe { _mm512_storeu_ps(folded.as_mut_ptr(), fold(&sums)) };
        for (block, numbers) in folded.chunks_exact(4).enumerate() {
            let (r, group) = (block % M, block / M);
            if let Some(left @ 1..) = count.checked_sub(4 * group) {
                out.put(i + r, at + j + 4 * group, &numbers[..left.min(4)]);
            }
        }
    }
    M
}

/// Sixteen sums for each pair of `R` rows of the weight and `M` rows of x, all of one length, segment by segment.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn products<E: Narrow, const M: usize, const R: usize>(
    x: [&[f32]; M],
    w: [&[E]; R],
    mut parts: Segments,
) -> [[__m512; M]; R] {
    let within = |part: Range<usize>| (x.map(|row| &row[part.clone()]), w.map(|row| &row[part.clone()]));
    let (first, right) = within(parts.next().unwrap_or_default());
    let mut totals = segment(first, right);
    for part in parts {
        let (x, w) = within(part);
        for (totals, sums) in totals.iter_mut().zip(segment(x, w)) {
            for (total, sum) in totals.iter_mut().zip(sums) {
                *total = _mm512_add_ps(*total, sum);
            }
        }
    }
    totals
}

/// The sums of one segment.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn segment<E: Narrow, const M: usize, const R: usize>(x: [&[f32]; M], w: [&[E]; R]) -> [[__m512; M]; R] {
    let mut sums = [[_mm512_setzero_ps(); M]; R];
    let len = x.iter().map(|r| r.len()).chain(w.iter().map(|r| r.len())).min().unwrap_or(0);
    let whole = len / LANES * LANES;
    for l in (0..whole).step_by(LANES) {
        let mut left = [_mm512_setzero_ps(); M];
        for (left, x) in left.iter_mut().zip(x) {
            // SAFETY: `l + 16 <= len`, and no row is shorter than `len`.
            *left = unsafe { _mm512_loadu_ps(x.as_ptr().add(l)) };
        }
        for (sums, w) in sums.iter_mut().zip(w) {
            if R == 1 {
                // the row comes from memory, and so will those behind it
                let here = w.as_ptr().wrapping_add(l);
                _mm_prefetch::<_MM_HINT_T1>(here.wrapping_byte_add(AHEAD).cast());
                _mm_prefetch::<_MM_HINT_T0>(here.wrapping_byte_add(NEAR).cast());
            }
            // SAFETY: as above.
            let right = unsafe { E::load(w.as_ptr().add(l), None) };
            for (sum, left) in sums.iter_mut().zip(left) {
                *sum = _mm512_fmadd_ps(left, right, *sum);
            }
        }
    }
    if whole < len && !fault::active("dot.tail") {
        // lanes behind the end keep their sums: adding a zero would make a -0 a 0
        let mask = (1u16 << (len - whole)) - 1;
        for (sums, w) in sums.iter_mut().zip(w) {
            // SAFETY: the mask has a bit for each element from `whole` to `len`, and what it hides is not read.
            let right = unsafe { E::load(w.as_ptr().add(whole), Some(mask)) };
            for (sum, x) in sums.iter_mut().zip(x) {
                // SAFETY: as above.
                let left = unsafe { _mm512_maskz_loadu_ps(mask, x.as_ptr().add(whole)) };
                *sum = _mm512_mask3_fmadd_ps(left, right, *sum, mask);
            }
        }
    }
    sums
}

/// As `panel::pack`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
pub(super) fn pack<E: Narrow>(row: &[E], count: usize, r: usize, to: &mut [f32]) {
    for (from, step) in row.chunks(LANES).zip(to.chunks_exact_mut(count * LANES)) {
        let mask = (from.len() < LANES).then(|| (1u16 << from.len()) - 1);
        // SAFETY: there are sixteen elements or the mask has a bit for each, and what it hides is not read.
        let numbers = unsafe { E::load(from.as_ptr(), mask) };
        let to = &mut step[r * LANES..(r + 1) * LANES];
        // SAFETY: sixteen numbers.
        unsafe { _mm512_storeu_ps(to.as_mut_ptr(), numbers) };
    }
}

/// As `Right::pack`: squares of sixteen by sixteen numbers, turned in registers.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
pub(super) fn pack_columns<E: Narrow>(w: Columns<'_, E>, j: usize, within: Range<usize>, panels: &mut [f32]) {
    let steps = within.len().div_ceil(LANES);
    let panel = steps * SIDE * LANES;
    for step in 0..steps {
        let first = within.start + step * LANES;
        let mut square = [_mm512_setzero_ps(); LANES];
        for (i, row) in square.iter_mut().enumerate().take(within.end - first) {
            let numbers = w.row(first + i, j, LANES);
            let mask = (numbers.len() < LANES).then(|| (1u16 << numbers.len()) - 1);
            // SAFETY: there are sixteen elements or the mask has a bit for each, and what it hides is not read.
            *row = unsafe { E::load(numbers.as_ptr(), mask) };
        }
        for (r, column) in transposed(square).into_iter().enumerate() {
            let at = r / SIDE * panel + (step * SIDE + r % SIDE) * LANES;
            let to = &mut panels[at..at + LANES];
            // SAFETY: sixteen numbers.
            unsafe { _mm512_storeu_ps(to.as_mut_ptr(), column) };
        }
    }
}

/// As `panel::tile`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
pub(super) fn tile<const M: usize>(tile: Tile<'_>) -> [f32; LANES] {
    let Tile { x, w, last, goes_on, ends, sums: kept, ahead } = tile;
    let mut sums = [[_mm512_setzero_ps(); M]; SIDE];
    // number r of those of row l of the weight
    let place = |l: usize, r: usize| (l * SIDE + r) * LANES;
    let (mut xs, mut ws) = (x.chunks_exact(M * LANES), w.chunks_exact(SIDE * LANES));
    let whole = xs.len().min(ws.len()) - usize::from(last < LANES);
    for (s, (x, w)) in (&mut xs).zip(&mut ws).take(whole).enumerate() {
        for next in ahead.at(s) {
            _mm_prefetch::<_MM_HINT_T0>(next.cast());
        }
        // SAFETY: the chunks have that many numbers.
        unsafe { step(x.as_ptr(), w.as_ptr(), &mut sums, None) };
    }
    if let (true, false, Some(x), Some(w)) = (last < LANES, fault::active("dot.tail"), xs.next(), ws.next()) {
        // SAFETY: as above.
        unsafe { step(x.as_ptr(), w.as_ptr(), &mut sums, Some((1 << last) - 1)) };
    }
    if goes_on {
        for (l, sums) in sums.iter_mut().enumerate() {
            for (r, sum) in sums.iter_mut().enumerate() {
                // SAFETY: `place` is at most SUMS - 16.
                *sum = _mm512_add_ps(unsafe { _mm512_loadu_ps(kept.as_ptr().add(place(l, r))) }, *sum);
            }
        }
    }
    let mut folded = [0f32; LANES];
    if ends {
        let mut flat = [_mm512_setzero_ps(); LANES];
        for (flat, sums) in flat.chunks_exact_mut(SIDE).zip(&sums) {
            flat[..M].copy_from_slice(sums);
        }
        // SAFETY: sixteen numbers have room in the array.
        unsafe { _mm512_storeu_ps(folded.as_mut_ptr(), fold(&flat)) };
        return folded;
    }
    const { assert!(SUMS == SIDE * SIDE * LANES) }
    for (l, sums) in sums.iter().enumerate() {
        for (r, sum) in sums.iter().enumerate() {
            // SAFETY: as where they are loaded.
            unsafe { _mm512_storeu_ps(kept.as_mut_ptr().add(place(l, r)), *sum) };
        }
    }
    folded
}

/// Sixteen elements of each row; with a mask the sums of the others stay as they are, as a zero would make a -0 a 0.
///
/// # Safety
/// `x` points to `M` times sixteen numbers, `w` to four times sixteen.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
unsafe fn step<const M: usize>(x: *const f32, w: *const f32, sums: &mut [[__m512; M]; SIDE], mask: Option<u16>) {
    let mut left = [_mm512_setzero_ps(); M];
    for (r, left) in left.iter_mut().enumerate() {
        // SAFETY: the caller's promise.
        *left = unsafe { _mm512_loadu_ps(x.add(r * LANES)) };
    }
    for (l, sums) in sums.iter_mut().enumerate() {
        // SAFETY: as above.
        let right = unsafe { _mm512_loadu_ps(w.add(l * LANES)) };
        for (sum, left) in sums.iter_mut().zip(left) {
            *sum = match mask {
                None => _mm512_fmadd_ps(left, right, *sum),
                Some(mask) => _mm512_mask3_fmadd_ps(left, right, *sum, mask),
            };
        }
    }
}

/// Each of sixteen vectors folded in halves (lane l takes lane l + 8, then l + 4, l + 2, l + 1); the fold of vector 4·l + b stands
/// in lane l of block b. One addition serves two vectors, then four, eight, sixteen.
#[inline]
#[target_feature(enable = "avx512f")]
fn fold(v: &[__m512; LANES]) -> __m512 {
    // eight lanes of each of two vectors: [a, a, b, b] in blocks of four lanes
    let eight = |a: __m512, b: __m512| {
        _mm512_add_ps(_mm512_shuffle_f32x4::<0b01_00_01_00>(a, b), _mm512_shuffle_f32x4::<0b11_10_11_10>(a, b))
    };
    // four lanes of each of four vectors: [a, b, c, d]
    let four = |ab: __m512, cd: __m512| {
        _mm512_add_ps(_mm512_shuffle_f32x4::<0b10_00_10_00>(ab, cd), _mm512_shuffle_f32x4::<0b11_01_11_01>(ab, cd))
    };
    // two lanes of each of eight: per block two of the first four's, two of the second four's
    let two = |p: __m512, q: __m512| {
        _mm512_add_ps(_mm512_shuffle_ps::<0b01_00_01_00>(p, q), _mm512_shuffle_ps::<0b11_10_11_10>(p, q))
    };
    let one = |p: __m512, q: __m512| {
        _mm512_add_ps(_mm512_shuffle_ps::<0b10_00_10_00>(p, q), _mm512_shuffle_ps::<0b11_01_11_01>(p, q))
    };
    let quad = |at: usize| four(eight(v[at], v[at + 1]), eight(v[at + 2], v[at + 3]));
    one(two(quad(0), quad(4)), two(quad(8), quad(12)))
}
