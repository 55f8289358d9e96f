//! Reductions of sixteen neighbouring rows of f32, number for number those of the loops: a vector holds one column of them.

use super::WIDTH;
use crate::row::reduce::{LANES, SEGMENT, SHORT};
use std::arch::x86_64::*;

/// A column of the rows in f64.
type Wide = [__m512d; 2];

/// Columns of sixteen rows: the first begins at the start, the next `pitch` numbers on.
#[derive(Clone, Copy)]
pub(super) struct Columns<'a> {
    data: &'a [f32],
    pitch: usize,
    pub(super) cols: usize,
}

impl<'a> Columns<'a> {
    /// `None` if not all of the columns are there.
    pub(super) fn new(data: &'a [f32], pitch: usize, cols: usize) -> Option<Self> {
        let reach = cols.checked_sub(1)?.checked_mul(pitch)?.checked_add(WIDTH)?;
        (reach <= data.len()).then_some(Self { data, pitch, cols })
    }

    #[inline(always)]
    fn column(&self, c: usize) -> __m512 {
        debug_assert!(c < self.cols);
        // SAFETY: `new` has seen that `cols` columns of sixteen numbers are there, and the callers ask for none behind them; they
        // have AVX-512.
        unsafe { _mm512_loadu_ps(self.data.as_ptr().add(c * self.pitch)) }
    }
}

/// As `columns::sums`: the sums of a segment's lanes meet in f64, in halves, and are added to `acc`, what that rounds away to `lost`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
pub(super) fn sums(x: Columns<'_>, acc: &mut [f32; WIDTH], lost: &mut [f32; WIDTH]) {
    let lanes = if x.cols <= SHORT { SHORT } else { LANES };
    // SAFETY: sixteen numbers.
    let (mut sum, mut rest) = unsafe { (_mm512_loadu_ps(acc.as_ptr()), _mm512_loadu_ps(lost.as_ptr())) };
    for from in (0..x.cols).step_by(SEGMENT) {
        let n = SEGMENT.min(x.cols - from);
        let half = n.min(lanes).next_power_of_two() / 2;
        let lane = |lane: usize| -> Wide {
            let mut sum = _mm512_setzero_ps();
            if lane < n {
                // not 0 and the first: what differs, the sign of a zero, ends when the total is added
                sum = x.column(from + lane);
                for c in (lane + lanes..n).step_by(lanes) {
                    sum = _mm512_add_ps(sum, x.column(from + c));
                }
            }
            [_mm512_cvtps_pd(_mm512_castps512_ps256(sum)), _mm512_cvtps_pd(_mm512_extractf32x8_ps::<1>(sum))]
        };
        let add = |a: Wide, b: Wide| [_mm512_add_pd(a[0], b[0]), _mm512_add_pd(a[1], b[1])];
        let total = match half {
            0 => lane(0),
            // a size that the compiler knows stays in registers
            8 if n == SHORT => meet(&mut std::array::from_fn::<_, 8, _>(|l| add(lane(l), lane(l + 8))), add),
            _ => {
                let mut wide = [[_mm512_setzero_pd(); 2]; LANES / 2];
                for (l, w) in wide.iter_mut().enumerate().take(half) {
                    *w = add(lane(l), lane(l + half));
                }
                meet(&mut wide[..half], add)
            }
        };
        let total =
            _mm512_insertf32x8::<1>(_mm512_castps256_ps512(_mm512_cvtpd_ps(total[0])), _mm512_cvtpd_ps(total[1]));
        // as `reduce::add_segment`
        let next = _mm512_add_ps(sum, total);
        let seen = _mm512_sub_ps(next, sum);
        let low = _mm512_add_ps(_mm512_sub_ps(sum, _mm512_sub_ps(next, seen)), _mm512_sub_ps(total, seen));
        rest = _mm512_add_ps(rest, low);
        sum = next;
    }
    // SAFETY: as above.
    unsafe {
        _mm512_storeu_ps(acc.as_mut_ptr(), sum);
        _mm512_storeu_ps(lost.as_mut_ptr(), rest);
    }
}

/// A power of two of lanes meet in halves.
#[inline(always)]
fn meet(lanes: &mut [Wide], add: impl Fn(Wide, Wide) -> Wide) -> Wide {
    let mut half = lanes.len() / 2;
    while half > 0 {
        for l in 0..half {
            lanes[l] = add(lanes[l], lanes[l + half]);
        }
        half /= 2;
    }
    lanes[0]
}

/// As `columns::extremes`, but for rows whose first element is NaN and rows whose extreme is 0: says which these are, a bit for each, and
/// leaves their `acc` alone.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
pub(super) fn extremes(x: Columns<'_>, max: bool, acc: &mut [f32; WIDTH]) -> u16 {
    // of a NaN and a number the second operand
    let better = |v: __m512, held: __m512| match max {
        true => _mm512_max_ps(v, held),
        false => _mm512_min_ps(v, held),
    };
    let start = _mm512_set1_ps(if max { f32::NEG_INFINITY } else { f32::INFINITY });
    let mut held = [start; 4];
    for from in (0..x.cols).step_by(4) {
        for (k, h) in held.iter_mut().enumerate().take(x.cols - from) {
            *h = better(x.column(from + k), *h);
        }
    }
    let [a, b, c, d] = held;
    let best = better(better(a, b), better(c, d));
    let lead = x.column(0);
    let special =
        _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(lead, lead) | _mm512_cmp_ps_mask::<_CMP_EQ_OQ>(best, _mm512_setzero_ps());
    // SAFETY: sixteen numbers.
    unsafe {
        let acc = acc.as_mut_ptr();
        _mm512_mask_storeu_ps(acc, !special, better(best, _mm512_loadu_ps(acc)));
    }
    special
}
