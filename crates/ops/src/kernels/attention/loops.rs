//! The loops of attention over one block of keys.

use super::{BLOCK, GROUP};
use crate::fault;
use crate::kernels::dot::dot;
use crate::math::Real;
use crate::simd::versions;
#[cfg(target_arch = "x86_64")]
use crate::simd::{isa, Isa};

/// Interleaved sums and maxima of a block's numbers.
const LANES: usize = 16;

/// A block's scores, and then its weights, of a group of queries.
pub(super) type Block<T> = [[T; BLOCK]; GROUP];

/// Types that scores are computed in.
pub(super) trait Scores: Real {
    /// Turns `rows` keys that stand `pitch` apart: number c of key j goes to `at[c · BLOCK + j]`. Those of the keys that are not
    /// there are left as they are.
    fn turn(keys: &[Self], pitch: usize, rows: usize, at: &mut [Self]) {
        turn(keys, pitch, rows, at);
    }

    /// The products of up to [`GROUP`] queries (rows of `d`, one after the other) with a block of turned keys: each a sum along d, in order.
    fn scores(queries: &[Self], d: usize, keys: &[Self], out: &mut Block<Self>) {
        each_query(queries, d, keys, out);
    }

    /// Adds the weighted values (rows `pitch` apart) to the sums of up to [`GROUP`] queries, which follow one another, key by key in
    /// order, as many keys as there are weights of each.
    fn values(weights: &[&[Self]], values: &[Self], pitch: usize, sums: &mut [Self]) {
        each_sum(weights, values, pitch, sums);
    }
}

impl Scores for f64 {}

impl Scores for f32 {
    fn turn(keys: &[f32], pitch: usize, rows: usize, at: &mut [f32]) {
        #[cfg(target_arch = "x86_64")]
        if isa() == Isa::Avx512 {
            // SAFETY: `isa` names a set only where the machine has all of its features.
            return unsafe { super::avx512::turn(keys, pitch, rows, at) };
        }
        turn(keys, pitch, rows, at);
    }

    fn scores(queries: &[f32], d: usize, keys: &[f32], out: &mut Block<f32>) {
        #[cfg(target_arch = "x86_64")]
        if isa() == Isa::Avx512 {
            // SAFETY: `isa` names a set only where the machine has all of its features.
            return unsafe { super::avx512::scores(queries, d, keys, out) };
        }
        each_query(queries, d, keys, out);
    }

    fn values(weights: &[&[f32]], values: &[f32], pitch: usize, sums: &mut [f32]) {
        #[cfg(target_arch = "x86_64")]
        if isa() == Isa::Avx512 && !fault::active("attention.fourth_value") {
            // SAFETY: `isa` names a set only where the machine has all of its features.
            return unsafe { super::avx512::values(weights, values, pitch, sums) };
        }
        each_sum(weights, values, pitch, sums);
    }
}

/// The scores of one query after the other.
fn each_query<T: Real>(queries: &[T], d: usize, keys: &[T], out: &mut Block<T>) {
    for (query, scores) in queries.chunks_exact(d.max(1)).zip(out) {
        products(query, keys, scores);
    }
}

/// The weighted values of one query after the other.
fn each_sum<T: Real>(weights: &[&[T]], values: &[T], pitch: usize, sums: &mut [T]) {
    let dv = sums.len() / weights.len().max(1);
    for (weights, sums) in weights.iter().zip(sums.chunks_exact_mut(dv.max(1))) {
        accumulate(weights, values, pitch, sums);
    }
}

fn turn<T: Copy>(keys: &[T], pitch: usize, rows: usize, at: &mut [T]) {
    for j in 0..rows {
        let row = keys.get(j.saturating_mul(pitch)..).unwrap_or_default();
        for (column, &x) in at.chunks_exact_mut(BLOCK).zip(row) {
            column[j] = x;
        }
    }
}

versions! {
/// The products of a query with a block of turned keys.
fn products<T: Real>(query: &[T], keys: &[T], scores: &mut [T; BLOCK]) = products_body;
}

#[inline(always)]
fn products_body<T: Real, const FMA: bool>(query: &[T], keys: &[T], scores: &mut [T; BLOCK]) {
    let mut sums = [T::ZERO; BLOCK];
    for (&q, keys) in query.iter().zip(keys.chunks_exact(BLOCK)) {
        for (sum, &k) in sums.iter_mut().zip(keys) {
            *sum = q.mul_add::<FMA>(k, *sum);
        }
    }
    *scores = sums;
}

versions! {
/// Scores times their scale.
pub(super) fn scaled<T: Real>(scores: &mut [T], scale: T) = scaled_body;
}

#[inline(always)]
fn scaled_body<T: Real, const FMA: bool>(scores: &mut [T], scale: T) {
    for score in scores {
        *score = *score * scale;
    }
}

/// Running maximum and sum of one query.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct State<T> {
    pub(super) max: T,
    pub(super) sum: T,
}

impl<T: Real> State<T> {
    pub(super) const EMPTY: Self = Self { max: T::NEG_INF, sum: T::ZERO };
}

/// What is subtracted from scores. Nothing finite so far: any number gives weights of 0 (or NaN for NaN scores), -∞ - -∞ would not.
fn shift<T: Real>(max: T) -> T {
    if max == T::NEG_INF {
        T::ZERO
    } else {
        max
    }
}

versions! {
/// The largest of some scores and of `max`; one that is no number is no largest.
pub(super) fn largest<T: Real>(scores: &[T; BLOCK], max: T) -> T = largest_body;
}

#[inline(always)]
fn largest_body<T: Real, const FMA: bool>(scores: &[T; BLOCK], max: T) -> T {
    let mut most = [max; LANES];
    for scores in scores.chunks_exact(LANES) {
        for (max, &s) in most.iter_mut().zip(scores) {
            *max = if s > *max { s } else { *max };
        }
    }
    // a NaN score is no maximum, so the order of the comparisons changes nothing
    let mut half = LANES / 2;
    while half > 0 {
        for l in 0..half {
            most[l] = if most[l + half] > most[l] { most[l + half] } else { most[l] };
        }
        half /= 2;
    }
    most[0]
}

/// `x[i] = e^(x[i] − by)`
#[inline(always)]
fn exp_less<T: Real, const FMA: bool>(x: &mut [T], by: T) {
    #[cfg(target_arch = "x86_64")]
    if crate::row::wide::exp_in_place(x, by) {
        return;
    }
    for x in x.iter_mut() {
        *x = (*x - by).exp::<FMA>();
    }
}

versions! {
/// Turns a block's scores into weights, and updates the running maximum and sum. The result is the factor that what was
/// accumulated before is rescaled by: 1 where the maximum stays.
pub(super) fn weigh<T: Real>(state: &mut State<T>, scores: &mut [T; BLOCK]) -> T = weigh_body;
}

#[inline(always)]
fn weigh_body<T: Real, const FMA: bool>(state: &mut State<T>, scores: &mut [T; BLOCK]) -> T {
    let max = largest_body::<T, FMA>(scores, state.max);
    let by = shift(max);
    exp_less::<T, FMA>(scores, by);
    let keep =
        if max == state.max || fault::active("attention.rescale") { T::ONE } else { (state.max - by).exp::<FMA>() };
    let sum = if fault::active("attention.sum_f16") {
        T::get(scores.iter().fold(half::f16::ZERO, |s, x| s + x.put::<half::f16>()))
    } else {
        dot::<T, FMA>(&scores[..], &[T::ONE; BLOCK])
    };
    *state = State { max, sum: state.sum.mul_add::<FMA>(keep, sum) };
    keep
}

versions! {
/// Turns a block's scores into exponentials, given the largest score of the whole row; the results are their sum, and that of their
/// products with `through`.
pub(super) fn exponentials<T: Real>(scores: &mut [T; BLOCK], through: &[T; BLOCK], max: T) -> (T, T) = exponentials_body;
}

#[inline(always)]
fn exponentials_body<T: Real, const FMA: bool>(scores: &mut [T; BLOCK], through: &[T; BLOCK], max: T) -> (T, T) {
    let by = shift(max);
    exp_less::<T, FMA>(scores, by);
    (dot::<T, FMA>(&scores[..], &[T::ONE; BLOCK]), dot::<T, FMA>(&scores[..], &through[..]))
}

versions! {
/// Exponentials become weights, by the inverse of their sum, and what came through the values the gradients of the products:
/// weight·(through − mean)·scale.
pub(super) fn through_softmax<T: Real>(
    weights: &mut [T; BLOCK],
    through: &mut [T; BLOCK],
    inverse: T,
    mean: T,
    scale: T,
) = through_softmax_body;
}

#[inline(always)]
fn through_softmax_body<T: Real, const FMA: bool>(
    weights: &mut [T; BLOCK],
    through: &mut [T; BLOCK],
    inverse: T,
    mean: T,
    scale: T,
) {
    for (w, t) in weights.iter_mut().zip(through) {
        *w = *w * inverse;
        *t = *w * (*t - mean) * scale;
    }
}

versions! {
/// The slopes 1 − (score/cap)² of capped scores.
pub(super) fn cap_slopes<T: Real>(capped: &[T; BLOCK], inverse: T, slopes: &mut [T; BLOCK]) = cap_slopes_body;
}

#[inline(always)]
fn cap_slopes_body<T: Real, const FMA: bool>(capped: &[T; BLOCK], inverse: T, slopes: &mut [T; BLOCK]) {
    for (slope, &score) in slopes.iter_mut().zip(capped) {
        let t = score * inverse;
        *slope = (-t).mul_add::<FMA>(t, T::ONE);
    }
}

versions! {
/// Elementwise products, into `x`.
pub(super) fn times<T: Real>(x: &mut [T; BLOCK], y: &[T; BLOCK]) = times_body;
}

#[inline(always)]
fn times_body<T: Real, const FMA: bool>(x: &mut [T; BLOCK], y: &[T; BLOCK]) {
    for (x, &y) in x.iter_mut().zip(y) {
        *x = *x * y;
    }
}

versions! {
/// Elementwise sums, into `sums`.
pub(super) fn plus<T: Real>(sums: &mut [T], terms: &[T]) = plus_body;
}

#[inline(always)]
fn plus_body<T: Real, const FMA: bool>(sums: &mut [T], terms: &[T]) {
    for (sum, &term) in sums.iter_mut().zip(terms) {
        *sum = *sum + term;
    }
}

versions! {
/// Adds the weighted values to `sums`, key by key in order; four keys share one pass over `sums`, which changes no bit.
fn accumulate<T: Real>(weights: &[T], values: &[T], pitch: usize, sums: &mut [T]) = accumulate_body;
}

#[inline(always)]
fn accumulate_body<T: Real, const FMA: bool>(weights: &[T], values: &[T], pitch: usize, sums: &mut [T]) {
    let n = sums.len();
    let row = |j: usize| &values[j * pitch..j * pitch + n];
    let mut j = 0;
    let lossy = fault::active("attention.fourth_value");
    while let Some(&[a, b, c, d]) = weights.get(j..j + 4) {
        let d = if lossy { T::ZERO } else { d };
        let (x, y, z, w) = (row(j), row(j + 1), row(j + 2), row(j + 3));
        for ((((o, &x), &y), &z), &w) in sums.iter_mut().zip(x).zip(y).zip(z).zip(w) {
            let sum = b.mul_add::<FMA>(y, a.mul_add::<FMA>(x, *o));
            *o = d.mul_add::<FMA>(w, c.mul_add::<FMA>(z, sum));
        }
        j += 4;
    }
    for (j, &p) in weights.iter().enumerate().skip(j) {
        for (o, &x) in sums.iter_mut().zip(row(j)) {
            *o = p.mul_add::<FMA>(x, *o);
        }
    }
}

versions! {
/// acc·keep + sums, into `acc`.
pub(super) fn merge<T: Real>(acc: &mut [T], keep: T, sums: &[T]) = merge_body;
}

#[inline(always)]
fn merge_body<T: Real, const FMA: bool>(acc: &mut [T], keep: T, sums: &[T]) {
    for (acc, &sum) in acc.iter_mut().zip(sums) {
        *acc = acc.mul_add::<FMA>(keep, sum);
    }
}

versions! {
/// Adds a later segment's state and sums to those of the segments before.
pub(super) fn join<T: Real>(state: &mut State<T>, acc: &mut [T], later: State<T>, sums: &[T]) = join_body;
}

#[inline(always)]
fn join_body<T: Real, const FMA: bool>(state: &mut State<T>, acc: &mut [T], later: State<T>, sums: &[T]) {
    let max = if later.max > state.max { later.max } else { state.max };
    let by = shift(max);
    let factor = |m: T| if m == max { T::ONE } else { (m - by).exp::<FMA>() };
    let (before, behind) = (factor(state.max), factor(later.max));
    let before = if fault::active("attention.join") { T::ONE } else { before };
    for (acc, &sum) in acc.iter_mut().zip(sums) {
        *acc = acc.mul_add::<FMA>(before, sum * behind);
    }
    *state = State { max, sum: state.sum.mul_add::<FMA>(before, later.sum * behind) };
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::tests::{fused, with_each};

    fn numbers(n: usize, seed: usize) -> Vec<f32> {
        (0..n).map(|i| ((i * 37 + seed * 101) % 127) as f32 / 31.0 - 2.0).collect()
    }

    fn body<const FMA: bool>(d: usize, query: &[f32], turned: &[f32], values: &[f32], weights: &[f32]) -> Vec<f32> {
        let (mut state, mut scores, mut sums) = (State { max: 0.5f32, sum: 1.25 }, [0f32; BLOCK], numbers(d, 3));
        products_body::<f32, FMA>(query, turned, &mut scores);
        let mut all = scores.to_vec();
        all.push(weigh_body::<f32, FMA>(&mut state, &mut scores));
        all.extend(scores);
        accumulate_body::<f32, FMA>(weights, values, d, &mut sums);
        merge_body::<f32, FMA>(&mut sums, 0.7, &numbers(d, 7));
        join_body::<f32, FMA>(&mut state, &mut sums, State { max: 2.0, sum: 3.0 }, &numbers(d, 8));
        all.extend(sums);
        all.extend([state.max, state.sum]);
        all
    }

    /// Every version against the body that it was compiled from, bit for bit.
    #[test]
    fn versions_give_the_bits_of_their_bodies() {
        for d in [1usize, 7, 16, 33, 64, 80] {
            let (query, keys) = (numbers(GROUP * d, 1), numbers(BLOCK * d, 2));
            let (values, weights) = (numbers(BLOCK * d, 4), numbers(GROUP * BLOCK, 5));
            let weights: Vec<&[f32]> = weights.chunks(BLOCK).collect();
            let mut turned = vec![f32::NAN; d * BLOCK];
            super::turn(&keys, d, BLOCK, &mut turned);
            for (rows, m) in [(1, 1), (7, 2), (17, 3), (BLOCK, GROUP)] {
                with_each(|isa| {
                    let mut got = vec![f32::NAN; d * BLOCK];
                    f32::turn(&keys, d, rows, &mut got);
                    for (i, got) in got.iter().enumerate() {
                        let want = if i % BLOCK < rows { turned[i] } else { f32::NAN };
                        assert_eq!(got.to_bits(), want.to_bits(), "turn {isa:?} {d} {rows} at {i}");
                    }
                    let mut scores = [[0f32; BLOCK]; GROUP];
                    f32::scores(&query[..m * d], d, &turned, &mut scores);
                    let first: Vec<&[f32]> = weights[..m].iter().map(|w| &w[..rows]).collect();
                    let mut sums = numbers(d, 3).repeat(m);
                    f32::values(&first, &values, d, &mut sums);
                    for i in 0..m {
                        let query = &query[i * d..(i + 1) * d];
                        let want = if fused(isa) {
                            body::<true>(d, query, &turned, &values, first[i])
                        } else {
                            body::<false>(d, query, &turned, &values, first[i])
                        };
                        let mut state = State { max: 0.5, sum: 1.25 };
                        let mut got = scores[i].to_vec();
                        got.push(weigh(&mut state, &mut scores[i]));
                        got.extend(scores[i]);
                        let sums = &mut sums[i * d..(i + 1) * d];
                        merge(sums, 0.7, &numbers(d, 7));
                        join(&mut state, sums, State { max: 2.0, sum: 3.0 }, &numbers(d, 8));
                        got.extend_from_slice(sums);
                        got.extend([state.max, state.sum]);
                        assert_eq!(got, want, "{isa:?} {d} {rows} {m} query {i}");
                    }
                });
            }
        }
    }

    #[test]
    fn what_is_not_finite_has_no_weight_or_is_nan() {
        let mut scores = [f32::NEG_INFINITY; BLOCK];
        let mut state = State::EMPTY;
        assert_eq!((weigh(&mut state, &mut scores), state), (1.0, State::EMPTY));
        assert_eq!(scores, [0.0; BLOCK]);
        let mut scores = [f32::NEG_INFINITY; BLOCK];
        scores[40] = 3.0;
        assert_eq!((weigh(&mut state, &mut scores), state), (0.0, State { max: 3.0, sum: 1.0 }));
        let mut scores = [0.0; BLOCK];
        scores[63] = f32::NAN;
        weigh(&mut state, &mut scores);
        assert!(state.sum.is_nan() && state.max == 3.0);
        let mut scores = [f32::INFINITY; BLOCK];
        let mut state = State::EMPTY;
        weigh(&mut state, &mut scores);
        assert!(state.sum.is_nan());
        // a segment without a finite score changes nothing
        let (mut state, mut acc) = (State { max: 3.0, sum: 2.0 }, [5.0]);
        join(&mut state, &mut acc, State::EMPTY, &[0.0]);
        assert_eq!((state, acc), (State { max: 3.0, sum: 2.0 }, [5.0]));
        let (mut state, mut acc) = (State::EMPTY, [0.0]);
        join(&mut state, &mut acc, State { max: 3.0, sum: 2.0 }, &[5.0]);
        assert_eq!((state, acc), (State { max: 3.0, sum: 2.0 }, [5.0]));
    }
}
