//! The loops of attention over one block of keys.

use super::{Query, BLOCK, GROUP};
use crate::fault;
use crate::kernels::dot::dot;
use crate::kernels::dots::{dots, Grid, Rows};
use crate::math::Real;
use crate::simd::versions;
#[cfg(target_arch = "x86_64")]
use crate::simd::{isa, Isa};

/// Columns of the values that stay in registers while a block's keys pass.
const COLUMNS: usize = 16;

/// Types that scores are computed in.
pub(super) trait Scores: Real {
    /// The products of up to [`GROUP`] queries (rows of `d`, one after the other) with `count` keys that stand `pitch` apart; those of a
    /// query stand [`BLOCK`] behind those of the one before. Each is [`dot`] of its two rows.
    fn scores(queries: (&[Self], usize, usize), keys: (&[Self], usize, usize), out: &mut [Self]);

    /// As [`accumulate_group`].
    fn accumulate_group(
        weights: &[[Self; BLOCK]; GROUP],
        rows: usize,
        values: &[Self],
        pitch: usize,
        accs: &mut [Self],
    ) {
        accumulate_group(weights, rows, values, pitch, 0, accs);
    }
}

impl Scores for f32 {
    fn scores(
        (queries, rows, d): (&[f32], usize, usize),
        (keys, count, pitch): (&[f32], usize, usize),
        out: &mut [f32],
    ) {
        let sides = Rows::new(queries, rows, d, d).and_then(|q| Ok((q, Rows::new(keys, count, pitch, d)?)));
        let done = sides.and_then(|(q, k)| dots(q, k, &mut Grid::new(out, rows, count, BLOCK)?));
        // the caller has checked the shapes; a NaN is seen where a zero would not be
        if done.is_err() {
            out.fill(f32::NAN);
        }
    }

    fn accumulate_group(weights: &[[f32; BLOCK]; GROUP], rows: usize, values: &[f32], pitch: usize, accs: &mut [f32]) {
        #[cfg(target_arch = "x86_64")]
        if isa() == Isa::Avx512 && !fault::active("attention.fourth_value") {
            // SAFETY: `isa` names a set only where the machine has all of its features.
            let done = unsafe { super::avx512::accumulate_group(weights, rows, values, pitch, accs) };
            return accumulate_group(weights, rows, values, pitch, done, accs);
        }
        accumulate_group(weights, rows, values, pitch, 0, accs);
    }
}

impl Scores for f64 {
    fn scores(
        (queries, rows, d): (&[f64], usize, usize),
        (keys, count, pitch): (&[f64], usize, usize),
        out: &mut [f64],
    ) {
        for (i, scores) in out.chunks_exact_mut(BLOCK).enumerate().take(rows) {
            products(&queries[i * d..(i + 1) * d], keys, pitch, &mut scores[..count]);
        }
    }
}

versions! {
/// The products of a query with keys that stand `pitch` apart, one for each score.
fn products<T: Real>(query: &[T], keys: &[T], pitch: usize, scores: &mut [T]) = products_body;
}

#[inline(always)]
fn products_body<T: Real, const FMA: bool>(query: &[T], keys: &[T], pitch: usize, scores: &mut [T]) {
    for (j, score) in scores.iter_mut().enumerate() {
        *score = dot::<T, FMA>(query, &keys[j * pitch..j * pitch + query.len()]);
    }
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

versions! {
/// Turns a block's scores into weights, updates the running maximum and sum, and rescales what was accumulated.
pub(super) fn weigh<T: Real>(state: &mut Query<T>, scores: &mut [T; BLOCK], acc: &mut [T]) = weigh_body;
}

#[inline(always)]
fn weigh_body<T: Real, const FMA: bool>(state: &mut Query<T>, scores: &mut [T; BLOCK], acc: &mut [T]) {
    let mut max = state.max;
    for &s in scores.iter() {
        max = if s > max { s } else { max };
    }
    // Nothing finite so far: any shift gives weights of 0 (or NaN for NaN scores), -∞ - -∞ would not.
    let shift = if max == T::NEG_INF { T::ZERO } else { max };
    let keep = if fault::active("attention.rescale") { T::ONE } else { (state.max - shift).exp::<FMA>() };
    for s in scores.iter_mut() {
        *s = (*s - shift).exp::<FMA>();
    }
    let ones = [T::ONE; BLOCK];
    if max != state.max {
        for a in acc.iter_mut() {
            *a = *a * keep;
        }
        state.sum = state.sum * keep;
        state.max = max;
    }
    if fault::active("attention.sum_f16") {
        let sum = scores.iter().fold(half::f16::ZERO, |s, x| s + x.put::<half::f16>());
        state.sum = state.sum + T::get(sum);
        return;
    }
    state.sum = state.sum + dot::<T, FMA>(&scores[..], &ones);
}

versions! {
/// Adds the weighted values to `acc`, key by key in order; four keys share one pass over `acc`, which changes no bit.
pub(super) fn accumulate<T: Real>(weights: &[T], values: &[T], pitch: usize, acc: &mut [T]) = accumulate_body;
}

#[inline(always)]
fn accumulate_body<T: Real, const FMA: bool>(weights: &[T], values: &[T], pitch: usize, acc: &mut [T]) {
    let n = acc.len();
    let row = |j: usize| &values[j * pitch..j * pitch + n];
    let mut j = 0;
    let lossy = fault::active("attention.fourth_value");
    while let Some(&[a, b, c, d]) = weights.get(j..j + 4) {
        let d = if lossy { T::ZERO } else { d };
        let (x, y, z, w) = (row(j), row(j + 1), row(j + 2), row(j + 3));
        for ((((o, &x), &y), &z), &w) in acc.iter_mut().zip(x).zip(y).zip(z).zip(w) {
            let sum = b.mul_add::<FMA>(y, a.mul_add::<FMA>(x, *o));
            *o = d.mul_add::<FMA>(w, c.mul_add::<FMA>(z, sum));
        }
        j += 4;
    }
    let skip = if fault::active("attention.value_tail") { weights.len() } else { j };
    for (j, &p) in weights.iter().enumerate().skip(skip) {
        for (o, &x) in acc.iter_mut().zip(row(j)) {
            *o = p.mul_add::<FMA>(x, *o);
        }
    }
}

versions! {
/// Adds the weighted values of `rows` keys to the accumulators of [`GROUP`] queries, which follow one another, key by key in order: as
/// [`accumulate`] does for each, bit for bit, but with one pass over the values. Columns before `done` are left as they are.
fn accumulate_group<T: Real>(weights: &[[T; BLOCK]; GROUP], rows: usize, values: &[T], pitch: usize, done: usize, accs: &mut [T]) = accumulate_group_body;
}

#[inline(always)]
fn accumulate_group_body<T: Real, const FMA: bool>(
    weights: &[[T; BLOCK]; GROUP],
    rows: usize,
    values: &[T],
    pitch: usize,
    done: usize,
    accs: &mut [T],
) {
    let n = accs.len() / GROUP;
    let whole = (n - done) / COLUMNS * COLUMNS + done;
    let lossy = fault::active("attention.fourth_value");
    for c in (done..whole).step_by(COLUMNS) {
        let mut held = [[T::ZERO; COLUMNS]; GROUP];
        for (held, acc) in held.iter_mut().zip(accs.chunks_exact(n)) {
            held.copy_from_slice(&acc[c..c + COLUMNS]);
        }
        for j in 0..rows {
            // a length that the compiler knows
            let Some(Ok(row)) = values.get(j * pitch + c..j * pitch + c + COLUMNS).map(<&[T; COLUMNS]>::try_from)
            else {
                continue;
            };
            if lossy && j % 4 == 3 {
                continue;
            }
            for (held, weights) in held.iter_mut().zip(weights) {
                let p = weights[j];
                for (h, &x) in held.iter_mut().zip(row) {
                    *h = p.mul_add::<FMA>(x, *h);
                }
            }
        }
        for (held, acc) in held.iter().zip(accs.chunks_exact_mut(n)) {
            acc[c..c + COLUMNS].copy_from_slice(held);
        }
    }
    if whole < n {
        for (acc, weights) in accs.chunks_exact_mut(n).zip(weights) {
            accumulate_body::<T, FMA>(&weights[..rows], &values[whole..], pitch, &mut acc[whole..]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::tests::{fused, with_each};

    fn numbers(n: usize, seed: usize) -> Vec<f32> {
        (0..n).map(|i| ((i * 37 + seed * 101) % 127) as f32 / 31.0 - 2.0).collect()
    }

    /// Every version against the body that it was compiled from, bit for bit.
    #[test]
    fn versions_give_the_bits_of_their_bodies() {
        for d in [1usize, 7, 16, 33, 64, 80] {
            let (query, keys) = (numbers(d, 1), numbers(BLOCK * d, 2));
            with_each(|isa| {
                let fma = fused(isa);
                let (mut got, mut want) = ([0f32; BLOCK], [0f32; BLOCK]);
                products(&query, &keys, d, &mut got);
                if fma {
                    products_body::<f32, true>(&query, &keys, d, &mut want);
                } else {
                    products_body::<f32, false>(&query, &keys, d, &mut want);
                }
                assert_eq!(got, want, "products {isa:?} {d}");
                let state = || Query { max: 0.5f32, sum: 1.25, start: 0, end: BLOCK };
                let (mut a, mut b) = ((state(), numbers(d, 3)), (state(), numbers(d, 3)));
                weigh(&mut a.0, &mut got, &mut a.1);
                accumulate(&got[1..], &keys, d, &mut a.1);
                if fma {
                    weigh_body::<f32, true>(&mut b.0, &mut want, &mut b.1);
                    accumulate_body::<f32, true>(&want[1..], &keys, d, &mut b.1);
                } else {
                    weigh_body::<f32, false>(&mut b.0, &mut want, &mut b.1);
                    accumulate_body::<f32, false>(&want[1..], &keys, d, &mut b.1);
                }
                assert_eq!(got, want, "weigh {isa:?} {d}");
                assert_eq!((a.0.max, a.0.sum, a.1), (b.0.max, b.0.sum, b.1), "accumulate {isa:?} {d}");
                let weights: [[f32; BLOCK]; GROUP] = std::array::from_fn(|i| {
                    let numbers = numbers(BLOCK, 4 + i);
                    std::array::from_fn(|j| numbers[j])
                });
                for rows in [1, 7, BLOCK] {
                    let mut accs = numbers(GROUP * d, 9);
                    let mut one_by_one = accs.clone();
                    f32::accumulate_group(&weights, rows, &keys, d, &mut accs);
                    for (weights, acc) in weights.iter().zip(one_by_one.chunks_mut(d)) {
                        accumulate(&weights[..rows], &keys, d, acc);
                    }
                    assert_eq!(accs, one_by_one, "accumulate_group {isa:?} {d} {rows}");
                }
                let queries = numbers(GROUP * d, 5);
                let mut scores = [0f32; GROUP * BLOCK];
                f32::scores((&queries, 3, d), (&keys, 50, d), &mut scores);
                for (i, query) in queries.chunks(d).take(3).enumerate() {
                    let mut want = [0f32; 50];
                    products(query, &keys, d, &mut want);
                    assert_eq!(scores[i * BLOCK..i * BLOCK + 50], want, "scores {isa:?} {d}");
                }
            });
        }
    }
}
