//! Squares of numbers turned: rows that become columns.

use crate::element::Element;
use crate::fault;
#[cfg(target_arch = "x86_64")]
use crate::simd::{isa, Isa};
use candle_core::DType;
#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

/// Numbers of a square's side: a cache line of f32.
pub(crate) const SIDE: usize = 16;

/// Rows of `cols` numbers each, as many as `out` has, of which row i has the numbers `src[first + i + j·stride]`: columns that are runs
/// of elements, widened. What would stand behind the end of `src` counts as 0.
pub(crate) fn turn<T: Element>(src: &[T], (first, stride): (usize, usize), cols: usize, out: &mut [f32]) {
    for (block, rows) in out.chunks_mut(SIDE * cols.max(1)).enumerate() {
        let at = first + block * SIDE;
        let count = rows.len() / cols.max(1);
        for j in (0..cols).step_by(SIDE) {
            let width = SIDE.min(cols - j);
            let mut square = [[0f32; SIDE]; SIDE];
            if width == SIDE
                && count == SIDE
                && !fault::active("square.run")
                && fill(src, at + j * stride, stride, &mut square)
            {
                transpose(&mut square);
                for (row, numbers) in rows.chunks_exact_mut(cols).zip(&square) {
                    // a length that the compiler knows
                    if let Some(Ok(to)) = row.get_mut(j..j + SIDE).map(<&mut [f32; SIDE]>::try_from) {
                        *to = *numbers;
                    }
                }
                continue;
            }
            for (k, run) in square.iter_mut().enumerate().take(width) {
                let from = at + (j + k - fault::one_if("square.run").min(k)) * stride;
                if let Some(numbers) = src.get(from..from + count) {
                    T::widen(numbers, &mut run[..count]);
                }
            }
            transpose(&mut square);
            for (row, numbers) in rows.chunks_exact_mut(cols).zip(&square) {
                row[j..j + width].copy_from_slice(&numbers[..width]);
            }
        }
    }
}

/// A whole square of runs, the first at `at`; false where one is not there.
#[inline]
fn fill<T: Element>(src: &[T], at: usize, stride: usize, square: &mut [[f32; SIDE]; SIDE]) -> bool {
    for (k, run) in square.iter_mut().enumerate() {
        let from = at + k * stride;
        let Some(Ok(numbers)) = src.get(from..from + SIDE).map(<&[T; SIDE]>::try_from) else {
            return false;
        };
        match T::DTYPE {
            // its conversion is worth a call
            DType::F16 => T::widen(numbers, run),
            _ => *run = numbers.map(|v| v.to_f32()),
        }
    }
    true
}

/// Exchanges rows and columns.
fn transpose(square: &mut [[f32; SIDE]; SIDE]) {
    #[cfg(target_arch = "x86_64")]
    if isa() == Isa::Avx512 {
        // SAFETY: `isa` names a set only where the machine has all of its features.
        return unsafe { in_registers(square) };
    }
    let rows = *square;
    *square = std::array::from_fn(|i| std::array::from_fn(|j| rows[j][i]));
}

/// As [`transpose`].
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn in_registers(square: &mut [[f32; SIDE]; SIDE]) {
    let mut rows = [_mm512_setzero_ps(); SIDE];
    for (row, numbers) in rows.iter_mut().zip(square.iter()) {
        // SAFETY: sixteen numbers.
        *row = unsafe { _mm512_loadu_ps(numbers.as_ptr()) };
    }
    for (row, numbers) in transposed(rows).iter().zip(square) {
        // SAFETY: sixteen numbers.
        unsafe { _mm512_storeu_ps(numbers.as_mut_ptr(), *row) };
    }
}

/// Sixteen vectors turned: number i of vector j becomes number j of vector i.
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx512f")]
pub(crate) fn transposed(v: [__m512; SIDE]) -> [__m512; SIDE] {
    let mut pairs = [_mm512_setzero_ps(); SIDE];
    for i in (0..SIDE).step_by(2) {
        pairs[i] = _mm512_unpacklo_ps(v[i], v[i + 1]);
        pairs[i + 1] = _mm512_unpackhi_ps(v[i], v[i + 1]);
    }
    // vector 4q + r now holds numbers r, r + 4, r + 8, r + 12 of the four rows of quarter q
    let mut fours = [_mm512_setzero_ps(); SIDE];
    for q in (0..SIDE).step_by(4) {
        fours[q] = _mm512_shuffle_ps::<0b01_00_01_00>(pairs[q], pairs[q + 2]);
        fours[q + 1] = _mm512_shuffle_ps::<0b11_10_11_10>(pairs[q], pairs[q + 2]);
        fours[q + 2] = _mm512_shuffle_ps::<0b01_00_01_00>(pairs[q + 1], pairs[q + 3]);
        fours[q + 3] = _mm512_shuffle_ps::<0b11_10_11_10>(pairs[q + 1], pairs[q + 3]);
    }
    let mut out = [_mm512_setzero_ps(); SIDE];
    for r in 0..4 {
        let (a, b, c, d) = (fours[r], fours[4 + r], fours[8 + r], fours[12 + r]);
        let (ab, cd) = (_mm512_shuffle_f32x4::<0b10_00_10_00>(a, b), _mm512_shuffle_f32x4::<0b10_00_10_00>(c, d));
        let (ef, gh) = (_mm512_shuffle_f32x4::<0b11_01_11_01>(a, b), _mm512_shuffle_f32x4::<0b11_01_11_01>(c, d));
        out[r] = _mm512_shuffle_f32x4::<0b10_00_10_00>(ab, cd);
        out[8 + r] = _mm512_shuffle_f32x4::<0b11_01_11_01>(ab, cd);
        out[4 + r] = _mm512_shuffle_f32x4::<0b10_00_10_00>(ef, gh);
        out[12 + r] = _mm512_shuffle_f32x4::<0b11_01_11_01>(ef, gh);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::tests::with_each;
    use half::bf16;

    #[test]
    fn columns_become_rows_with_every_instruction_set() {
        for (rows, cols, stride) in [(1, 1, 1), (16, 16, 16), (5, 33, 7), (40, 17, 41), (33, 1, 50), (16, 3, 16)] {
            let src: Vec<bf16> = (0..cols * stride).map(|i| bf16::from_f32((i % 251) as f32 - 100.0)).collect();
            let want: Vec<f32> = (0..rows * cols).map(|i| src[i / cols + i % cols * stride].to_f32()).collect();
            with_each(|isa| {
                let mut out = vec![f32::NAN; rows * cols];
                turn(&src, (0, stride), cols, &mut out);
                assert_eq!(out, want, "{isa:?} {rows}x{cols}, {stride} apart");
            });
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn rows_become_columns() {
        if crate::simd::isa() != crate::simd::Isa::Avx512 {
            return;
        }
        // SAFETY: the machine has AVX-512, and each row has sixteen numbers.
        unsafe {
            let rows: [[f32; SIDE]; SIDE] = std::array::from_fn(|j| std::array::from_fn(|i| (j * 100 + i) as f32));
            let turned = transposed(rows.map(|row| _mm512_loadu_ps(row.as_ptr())));
            for (i, v) in turned.into_iter().enumerate() {
                let mut column = [0f32; SIDE];
                _mm512_storeu_ps(column.as_mut_ptr(), v);
                assert!(column.iter().enumerate().all(|(j, &v)| v == (j * 100 + i) as f32), "{i}: {column:?}");
            }
        }
    }
}
