//! Squares of numbers turned in AVX-512 registers.

use std::arch::x86_64::*;

const LANES: usize = 16;

/// Sixteen vectors turned: number i of vector j becomes number j of vector i.
#[inline]
#[target_feature(enable = "avx512f")]
pub(crate) fn transposed(v: [__m512; LANES]) -> [__m512; LANES] {
    let mut pairs = [_mm512_setzero_ps(); LANES];
    for i in (0..LANES).step_by(2) {
        pairs[i] = _mm512_unpacklo_ps(v[i], v[i + 1]);
        pairs[i + 1] = _mm512_unpackhi_ps(v[i], v[i + 1]);
    }
    // vector 4q + r now holds numbers r, r + 4, r + 8, r + 12 of the four rows of quarter q
    let mut fours = [_mm512_setzero_ps(); LANES];
    for q in (0..LANES).step_by(4) {
        fours[q] = _mm512_shuffle_ps::<0b01_00_01_00>(pairs[q], pairs[q + 2]);
        fours[q + 1] = _mm512_shuffle_ps::<0b11_10_11_10>(pairs[q], pairs[q + 2]);
        fours[q + 2] = _mm512_shuffle_ps::<0b01_00_01_00>(pairs[q + 1], pairs[q + 3]);
        fours[q + 3] = _mm512_shuffle_ps::<0b11_10_11_10>(pairs[q + 1], pairs[q + 3]);
    }
    let mut out = [_mm512_setzero_ps(); LANES];
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

    #[test]
    fn rows_become_columns() {
        if crate::simd::isa() != crate::simd::Isa::Avx512 {
            return;
        }
        // SAFETY: the machine has AVX-512, and each row has sixteen numbers.
        unsafe {
            let rows: [[f32; LANES]; LANES] = std::array::from_fn(|j| std::array::from_fn(|i| (j * 100 + i) as f32));
            let turned = transposed(rows.map(|row| _mm512_loadu_ps(row.as_ptr())));
            for (i, v) in turned.into_iter().enumerate() {
                let mut column = [0f32; LANES];
                _mm512_storeu_ps(column.as_mut_ptr(), v);
                assert!(column.iter().enumerate().all(|(j, &v)| v == (j * 100 + i) as f32), "{i}: {column:?}");
            }
        }
    }
}
