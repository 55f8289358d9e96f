//! The gradients of attention without a matrix of scores (Dao 2023, arXiv:2307.08691, §3.1.2).
//!
//! With P = softmax(S) and dP = dO·Vᵀ they are dV = Pᵀ·dO, dS = P∘(dP − D), dQ = dS·K·scale and dK = dSᵀ·Q·scale, where D is the sum of
//! P∘dP along a row, which equals that of dO∘O. Tiles of queries compute their scores again, against all keys they see: a strip of scores
//! is all that is ever stored of the matrix, and D comes out of it without the forward pass' result.
//!
//! A row of dQ is summed along blocks of 64 keys, each on its own, in order. Those of dK and dV are summed along the queries: in tiles
//! of 64 (fewer where the keys are so many that a strip would be large), then parts of [`PART`] queries, then the parts in order. None
//! of this depends on the number of threads or of batches.

use super::loops::{cap_slopes, exponentials, largest, plus, through_softmax, times, Block, Scores};
use super::tile::{Query, Tile};
use super::{block, AttentionParams, Job, Shape, BLOCK, FEWEST, GROUP, QUERIES};
use crate::element::Element;
use crate::error::{Error, Result};
use crate::fault;
use crate::kernels::{check_out, team};
use crate::math::Real;
use crate::view::{Slice, SliceMut, Strided, View};
use std::ops::Range;

const OP: &str = "attention-backward";
/// Queries whose sums over them come before those of others: a whole number of tiles. Part of the numbers.
const PART: usize = 256;
/// The most scores of a strip, where it has more than [`FEWEST`] queries. Part of the numbers, too.
const STRIP: usize = 1 << 19;
/// Products that a thread makes in a nanosecond, roughly.
const WORK_PER_NS: usize = 20;
/// Work below this many products is not shared.
const ALONE: usize = 1 << 18;

/// Queries of a tile.
fn tile_rows(skv: usize) -> usize {
    let mut rows = QUERIES;
    while rows > FEWEST && rows.saturating_mul(skv) > STRIP {
        rows /= 2;
    }
    rows
}

/// Parts whose sums are held at once.
fn wave(threads: usize) -> usize {
    match threads {
        0 | 1 => 1,
        _ => (2 * threads).max(8),
    }
}

/// The most bytes that the gradients of attention take beside their result, over all threads: of `queries` in all of `heads` key heads
/// (those of all batches), whose arithmetic has numbers of `size` bytes; `narrow` where the results are rounded from these, `capped`
/// with a softcap.
pub(crate) fn extra_bytes(
    queries: usize,
    heads: usize,
    (skv, d, dv): (usize, usize, usize),
    size: usize,
    (narrow, capped): (bool, bool),
) -> usize {
    let threads = team::threads();
    let of_head = queries / heads.max(1);
    let tile = tile_rows(skv).min(of_head);
    let (strips, wide) = (if capped { 3 } else { 2 }, d.max(dv));
    let strip = skv.div_ceil(BLOCK).saturating_mul(BLOCK * strips + 1).saturating_mul(tile);
    let rows = tile.saturating_mul(2 * d + dv + 3 + size_of::<Query>() / size + 1);
    let blocks = BLOCK.saturating_mul(2 * wide + 2 * BLOCK + 1).saturating_add(GROUP * wide);
    let thread = strip.saturating_add(rows).saturating_add(blocks).saturating_mul(threads);
    let sums = skv.saturating_mul(d.saturating_add(dv));
    let parts = of_head.div_ceil(PART);
    let held = if parts > 1 { wave(threads).min(heads.saturating_mul(parts - 1)) } else { 0 };
    let rounded = if narrow { heads } else { 0 };
    thread.saturating_add(sums.saturating_mul(held + rounded)).saturating_mul(size)
}

/// The gradients of [`attention`](super::attention()) with respect to q, k and v, given that of its result, `g` (b, h, sq, dv): `out` gets
/// dq (b, h, sq, d), dk (b, hk, skv, d) and dv (b, hk, skv, dv) behind one another, each in row-major order. The other operands are those
/// of the forward pass.
///
/// f16 and bf16 compute in f32 and round once, f64 computes in f64. A query that sees no key has weights that are no numbers, and so have
/// its own gradient and those of all keys and values of its key head, as by an eager softmax.
///
/// # Errors
/// `ShapeMismatch`, `DTypeMismatch`, `Unsupported` (not a float), `OutOfBounds`.
pub fn attention_backward(
    q: &View<'_>,
    k: &View<'_>,
    v: &View<'_>,
    g: &View<'_>,
    mask: Option<&View<'_>>,
    params: &AttentionParams,
    out: &mut SliceMut<'_>,
) -> Result<()> {
    let mut params = *params;
    if let (Some(window), true) = (&mut params.window, fault::active("grad.attention.window")) {
        *window += 1;
    }
    let mask = mask.filter(|_| !fault::active("grad.attention.mask"));
    let (job, b) = Job::checked(OP, q, k, v, mask, &params)?;
    let Shape { h, sq, skv, d, dv, .. } = job.shape;
    g.check()?;
    if g.dtype() != q.dtype() {
        return Err(Error::dtypes(OP, "the gradient", q.dtype(), g.dtype()));
    }
    if g.dims() != [b, h, sq, dv] {
        return Err(Error::shape(OP, format!("the gradient {:?} of a result of {:?}", g.dims(), [b, h, sq, dv])));
    }
    let heads = b.saturating_mul(k.dims()[1]);
    let elements = |dims: [usize; 3]| dims.iter().fold(1usize, |n, &d| n.saturating_mul(d));
    let lens = [elements([b * h, sq, d]), elements([heads, skv, d]), elements([heads, skv, dv])];
    check_out(OP, out, q.dtype(), lens.iter().fold(0, |n: usize, &len| n.saturating_add(len)))?;
    if out.is_empty() {
        return Ok(());
    }
    let job = Backward { job, g: &g.layout, heads, lens };
    match (q.data, k.data, v.data, g.data, out) {
        (Slice::F64(q), Slice::F64(k), Slice::F64(v), Slice::F64(g), SliceMut::F64(out)) => job.direct(q, k, v, g, out),
        (Slice::F32(q), Slice::F32(k), Slice::F32(v), Slice::F32(g), SliceMut::F32(out)) => job.direct(q, k, v, g, out),
        (Slice::F16(q), Slice::F16(k), Slice::F16(v), Slice::F16(g), SliceMut::F16(out)) => {
            job.rounded(q, k, v, g, out);
        }
        (Slice::BF16(q), Slice::BF16(k), Slice::BF16(v), Slice::BF16(g), SliceMut::BF16(out)) => {
            job.rounded(q, k, v, g, out);
        }
        _ => return Err(Error::unsupported(OP, "this mix of dtypes")),
    }
    Ok(())
}

struct Backward<'a> {
    job: Job<'a>,
    g: &'a Strided,
    /// Key heads of all batches.
    heads: usize,
    /// Elements of dq, dk and dv.
    lens: [usize; 3],
}

/// The operands' elements.
struct Data<'a, E> {
    q: &'a [E],
    k: &'a [E],
    v: &'a [E],
    g: &'a [E],
}

/// Queries of one key head that are worked on one after the other, and where what they add up to goes.
struct Part<'a, T, E> {
    head: usize,
    first: usize,
    count: usize,
    /// Their own gradients, `(count, d)`.
    dq: &'a mut [E],
    /// What they add to those of the head's keys, `(skv, d)`, and values, `(skv, dv)`.
    dk: &'a mut [T],
    dv: &'a mut [T],
}

/// One thread's scratch.
#[derive(Default)]
struct Scratch<T> {
    keys: Vec<T>,
    turned: Vec<T>,
    mask: Vec<T>,
    sums: Vec<T>,
    /// Scores, then exponentials, then weights: of each block of keys a row of each query.
    weights: Vec<[T; BLOCK]>,
    /// dP, then dS, alike.
    through: Vec<[T; BLOCK]>,
    /// The slopes of capped scores, alike.
    slopes: Vec<[T; BLOCK]>,
    /// A block of weights and one of dS, a row of each key.
    by_key: [Vec<T>; 2],
}

/// A query's softmax.
#[derive(Clone, Copy)]
struct Row<T> {
    max: T,
    sum: T,
    /// Σ of the exponentials times dP.
    through: T,
}

impl<T: Real> Row<T> {
    /// Whether its weights are numbers.
    fn is_number(&self) -> bool {
        self.sum > T::ZERO
    }
}

/// A tile and the blocks of keys that it meets.
struct Strip<T> {
    tile: Tile,
    queries: Vec<Query>,
    /// The queries, `(count, d)`, and the gradients of their results, `(count, dv)`.
    rows: Vec<T>,
    grads: Vec<T>,
    /// The first key of each block.
    blocks: Vec<usize>,
    /// The end of the keys that are seen.
    to: usize,
    cap: Option<f64>,
    found: Vec<Row<T>>,
}

impl<T> Strip<T> {
    /// How many keys the block that begins with `key` has.
    fn count(&self, key: usize) -> usize {
        BLOCK.min(self.to.saturating_sub(key))
    }
}

impl Backward<'_> {
    fn direct<T: Scores>(&self, q: &[T], k: &[T], v: &[T], g: &[T], out: &mut [T])
    where
        for<'s> Slice<'s>: From<&'s [T]>,
    {
        let (dq, rest) = out.split_at_mut(self.lens[0]);
        let (dk, dv) = rest.split_at_mut(self.lens[1]);
        self.gradients(&Data { q, k, v, g }, dq, dk, dv);
    }

    /// The same where sums are f32 and results are not.
    fn rounded<E: Element>(&self, q: &[E], k: &[E], v: &[E], g: &[E], out: &mut [E])
    where
        for<'s> Slice<'s>: From<&'s [E]>,
    {
        let (dq, rest) = out.split_at_mut(self.lens[0]);
        let mut wide = vec![0f32; rest.len()];
        let (dk, dv) = wide.split_at_mut(self.lens[1]);
        self.gradients(&Data { q, k, v, g }, dq, dk, dv);
        f32::write(&wide, rest);
    }

    fn gradients<T: Scores, E: Element>(&self, data: &Data<'_, E>, mut dq: &mut [E], dk: &mut [T], dv: &mut [T])
    where
        for<'s> Slice<'s>: From<&'s [E]>,
    {
        let s = &self.job.shape;
        let rows = s.group * s.sq;
        if rows == 0 {
            dk.fill(T::ZERO);
            dv.fill(T::ZERO);
            return;
        }
        let (of_keys, of_values) = (s.skv * s.d, s.skv * s.dv);
        // of a part; two products of three along d, the others along dv
        let work = [PART.min(rows), s.skv, 3 * s.d + 2 * s.dv].into_iter().fold(1, usize::saturating_mul);
        let parts = rows.div_ceil(PART);
        let all = self.heads * parts;
        let threads = if work.saturating_mul(all) < ALONE { 1 } else { team::threads() };
        let at_once = wave(threads).min(all);
        let apart = if parts > 1 { at_once.min(self.heads * (parts - 1)) } else { 0 };
        let mut held = vec![T::ZERO; apart * (of_keys + of_values)];
        for from in (0..all).step_by(at_once.max(1)) {
            let numbers = from..(from + at_once).min(all);
            let ns = work.saturating_mul(numbers.len()) / WORK_PER_NS;
            // a head's first part adds to the result, the others to sums of their own
            let firsts = from.div_ceil(parts);
            let mut keys = dk.chunks_mut(of_keys.max(1)).skip(firsts);
            let mut values = dv.chunks_mut(of_values.max(1)).skip(firsts);
            let mut others = held.chunks_mut((of_keys + of_values).max(1));
            let mut tasks = Vec::with_capacity(numbers.len());
            for number in numbers.clone() {
                let (head, first) = (number / parts, number % parts * PART);
                let count = PART.min(rows - first);
                let (own, rest) = std::mem::take(&mut dq).split_at_mut(count * s.d);
                dq = rest;
                let (dk, dv) = if first == 0 {
                    (keys.next().unwrap_or_default(), values.next().unwrap_or_default())
                } else {
                    let other = others.next().unwrap_or_default();
                    other.split_at_mut(of_keys.min(other.len()))
                };
                tasks.push(Part { head, first, count, dq: own, dk, dv });
            }
            if threads < 2 {
                tasks.into_iter().for_each(|part| self.part(part, data));
            } else {
                team::each(ns, tasks, |part| self.part(part, data));
            }
            if parts > 1 && !fault::active("grad.attention.join") {
                self.join(numbers, parts, &held, dk, dv);
            }
        }
    }

    /// Adds the sums of those parts of a wave that are not a head's first to the head's, part by part.
    fn join<T: Scores>(&self, numbers: Range<usize>, parts: usize, held: &[T], dk: &mut [T], dv: &mut [T]) {
        let (of_keys, of_values) = (self.job.shape.skv * self.job.shape.d, self.job.shape.skv * self.job.shape.dv);
        let width = (of_keys + of_values).max(1);
        let mut others: Vec<&[T]> = held.chunks(width).collect();
        let (first, last) = (numbers.start / parts, numbers.end.div_ceil(parts));
        let heads = dk.chunks_mut(of_keys.max(1)).map(Some).chain(std::iter::repeat_with(|| None));
        let heads = heads.zip(dv.chunks_mut(of_values.max(1)).map(Some).chain(std::iter::repeat_with(|| None)));
        for (head, (keys, values)) in heads.enumerate().take(last).skip(first) {
            let from = numbers.start.max(head * parts + 1);
            let count = numbers.end.min((head + 1) * parts).saturating_sub(from).min(others.len());
            let rest = others.split_off(count);
            let own = std::mem::replace(&mut others, rest);
            for (sums, skip) in [(keys, 0), (values, of_keys)] {
                let Some(sums) = sums else { continue };
                team::each_chunk(own.len() * team::moving(sums), sums, 1024, |unit, piece| {
                    for other in &own {
                        plus(piece, other.get(skip + unit * 1024..).unwrap_or_default());
                    }
                });
            }
        }
    }

    fn part<T: Scores, E: Element>(&self, part: Part<'_, T, E>, data: &Data<'_, E>)
    where
        for<'s> Slice<'s>: From<&'s [E]>,
    {
        let s = &self.job.shape;
        let key_heads = s.h / s.group.max(1);
        let size = tile_rows(s.skv);
        let mut sc = Scratch::default();
        // later tiles may see more keys: memory that grew would be there twice while it does
        let most = s.skv.div_ceil(BLOCK) * size.min(part.count);
        sc.weights.reserve_exact(most);
        sc.through.reserve_exact(most);
        if self.job.params.softcap.is_some() {
            sc.slopes.reserve_exact(most);
        }
        part.dk.fill(T::ZERO);
        part.dv.fill(T::ZERO);
        let mut numbers = true;
        for first in (0..part.count).step_by(size) {
            let count = size.min(part.count - first);
            let (b, hk) = (part.head / key_heads.max(1), part.head % key_heads.max(1));
            let tile = Tile { b, hk, first: part.first + first, count };
            let dq = &mut part.dq[first * s.d..(first + count) * s.d];
            numbers &= self.tile(tile, data, dq, part.dk, part.dv, &mut sc);
        }
        if !numbers {
            part.dk.fill(T::NAN);
            part.dv.fill(T::NAN);
        }
    }

    /// Adds a tile's share to the gradients of keys and values; says whether all its weights are numbers.
    fn tile<T: Scores, E: Element>(
        &self,
        tile: Tile,
        data: &Data<'_, E>,
        dq: &mut [E],
        dk: &mut [T],
        dv: &mut [T],
        sc: &mut Scratch<T>,
    ) -> bool
    where
        for<'s> Slice<'s>: From<&'s [E]>,
    {
        let mut strip = self.strip(tile, data);
        let rows = strip.blocks.len() * tile.count;
        sc.weights.resize(rows, [T::ZERO; BLOCK]);
        sc.through.resize(rows, [T::ZERO; BLOCK]);
        sc.slopes.resize(if strip.cap.is_some() { rows } else { 0 }, [T::ZERO; BLOCK]);
        sc.sums.resize(GROUP * self.job.shape.d.max(self.job.shape.dv), T::ZERO);
        self.scores(&mut strip, data, sc);
        self.softmax(&mut strip, data, sc);
        let mut sums = self.spread(&strip, data, dk, dv, sc);
        for (found, sums) in strip.found.iter().zip(sums.chunks_exact_mut(self.job.shape.d.max(1))) {
            if !found.is_number() {
                sums.fill(T::NAN);
            }
        }
        if let (true, Some(last)) = (fault::active("grad.attention.tail"), sums.last_mut()) {
            *last = fault::nudged(*last);
        }
        T::write(&sums, dq);
        strip.found.iter().all(Row::is_number)
    }

    fn strip<T: Scores, E: Element>(&self, tile: Tile, data: &Data<'_, E>) -> Strip<T> {
        let job = &self.job;
        let queries = job.queries(tile);
        let seen = || queries.iter().map(|q| &q.keys).filter(|keys| !keys.is_empty());
        let from = seen().map(|keys| keys.start).min().unwrap_or(0) / BLOCK * BLOCK;
        let to = seen().map(|keys| keys.end).max().unwrap_or(0);
        let meets = |key: &usize| queries.iter().any(|q| q.keys.start < key + BLOCK && *key < q.keys.end);
        Strip {
            tile,
            rows: job.rows(tile, &queries, data.q, job.q),
            grads: job.rows(tile, &queries, data.g, self.g),
            blocks: (from..to).step_by(BLOCK).filter(meets).collect(),
            to,
            cap: job.params.softcap.filter(|_| !fault::active("grad.attention.softcap")),
            found: vec![Row { max: T::NEG_INF, sum: T::ZERO, through: T::ZERO }; tile.count],
            queries,
        }
    }

    /// The rows of keys or values of a block, in the arithmetic type, and how far apart they are.
    fn rows_of<'b, T: Real, E: Element>(
        &self,
        strip: &Strip<T>,
        key: usize,
        (data, layout): (&'b [E], &Strided),
        buffer: &'b mut Vec<T>,
    ) -> (&'b [T], usize)
    where
        Slice<'b>: From<&'b [E]>,
    {
        let st = &layout.strides;
        let base = layout.offset + strip.tile.b * st[0] + self.job.key_head(strip.tile) * st[1] + key * st[2];
        block(data, layout, base, strip.count(key), buffer, &data.into())
    }

    /// Fills the strip with scores, and finds each row's largest.
    fn scores<T: Scores, E: Element>(&self, strip: &mut Strip<T>, data: &Data<'_, E>, sc: &mut Scratch<T>)
    where
        for<'s> Slice<'s>: From<&'s [E]>,
    {
        let (job, d, count) = (&self.job, self.job.shape.d, strip.tile.count);
        sc.turned.resize(d * BLOCK, T::ZERO);
        for (n, &key) in strip.blocks.iter().enumerate() {
            let (keys, pitch) = self.rows_of(strip, key, (data.k, job.k), &mut sc.keys);
            T::turn(keys, pitch, strip.count(key), &mut sc.turned);
            let at = n * count;
            products(&strip.rows, d, &sc.turned, &mut sc.weights[at..at + count]);
            for (i, (query, row)) in strip.queries.iter().zip(&mut strip.found).enumerate() {
                let (Range { start, end }, scores) = (query.seen(key), &mut sc.weights[at + i]);
                scores[..start].fill(T::NEG_INF);
                scores[end..].fill(T::NEG_INF);
                job.capped(start..end, scores);
                if let (Some(cap), Some(slopes)) = (strip.cap, sc.slopes.get_mut(at + i)) {
                    cap_slopes(scores, T::from_f64(1.0 / cap), slopes);
                    slopes[..start].fill(T::ZERO);
                    slopes[end..].fill(T::ZERO);
                }
                job.masked(strip.tile.b, query, key, start..end, scores, &mut sc.mask);
                row.max = largest(scores, row.max);
            }
        }
    }

    /// Scores become exponentials beside what comes through the values, and each row gets its sums.
    fn softmax<T: Scores, E: Element>(&self, strip: &mut Strip<T>, data: &Data<'_, E>, sc: &mut Scratch<T>)
    where
        for<'s> Slice<'s>: From<&'s [E]>,
    {
        let (width, count) = (self.job.shape.dv, strip.tile.count);
        sc.turned.resize(width * BLOCK, T::ZERO);
        for (n, &key) in strip.blocks.iter().enumerate() {
            let (values, pitch) = self.rows_of(strip, key, (data.v, self.job.v), &mut sc.keys);
            T::turn(values, pitch, strip.count(key), &mut sc.turned);
            let at = n * count;
            products(&strip.grads, width, &sc.turned, &mut sc.through[at..at + count]);
            let both = sc.weights[at..].iter_mut().zip(&mut sc.through[at..]);
            for ((weights, through), (query, row)) in both.zip(strip.queries.iter().zip(&mut strip.found)) {
                // what a query does not see may be no number
                let Range { start, end } = query.seen(key);
                through[..start].fill(T::ZERO);
                through[end..].fill(T::ZERO);
                let (sum, product) = exponentials(weights, through, row.max);
                row.sum = row.sum + sum;
                row.through = row.through + product;
            }
        }
    }

    /// The gradients of the scores, and what they and the weights are multiplied with: the result is dq, the rest is added.
    fn spread<T: Scores, E: Element>(
        &self,
        strip: &Strip<T>,
        data: &Data<'_, E>,
        dk: &mut [T],
        dv: &mut [T],
        sc: &mut Scratch<T>,
    ) -> Vec<T>
    where
        for<'s> Slice<'s>: From<&'s [E]>,
    {
        let (job, s, rows) = (&self.job, &self.job.shape, strip.tile.count);
        let scale = T::from_f64(if fault::active("grad.attention.scale") { 1.0 } else { job.params.scale });
        // those queries from which keys and values get something
        let first_heads = || strip.queries.iter().filter(|q| q.h % s.group == 0).count();
        let adding = if fault::active("grad.attention.group") { first_heads() } else { rows };
        let mut dq = vec![T::ZERO; rows * s.d];
        for (n, &key) in strip.blocks.iter().enumerate() {
            let at = n * rows;
            for (i, row) in strip.found.iter().enumerate() {
                let (weights, through) = (&mut sc.weights[at + i], &mut sc.through[at + i]);
                let inverse = T::ONE / row.sum;
                let mean = if fault::active("grad.attention.softmax") { T::ZERO } else { row.through * inverse };
                through_softmax(weights, through, inverse, mean, scale);
                if let Some(slopes) = sc.slopes.get(at + i) {
                    times(through, slopes);
                }
            }
            let (weights, through) = (&sc.weights[at..at + rows], &sc.through[at..at + rows]);
            let [by_key, through_by_key] = &mut sc.by_key;
            for (turned, block) in [(&mut *by_key, weights), (&mut *through_by_key, through)] {
                turned.resize(BLOCK * BLOCK, T::ZERO);
                T::turn(block.as_flattened(), BLOCK, rows, turned);
            }
            let count = strip.count(key) - fault::one_if("grad.attention.last_key").min(strip.count(key));
            if !fault::active("grad.attention.value") {
                add_products((by_key, adding), count, &strip.grads, s.dv, &mut sc.sums, &mut dv[key * s.dv..]);
            }
            add_products((through_by_key, adding), count, &strip.rows, s.d, &mut sc.sums, &mut dk[key * s.d..]);
            let (keys, pitch) = self.rows_of(strip, key, (data.k, job.k), &mut sc.keys);
            for (through, dq) in through.chunks(GROUP).zip(dq.chunks_mut((GROUP * s.d).max(1))) {
                let sums = &mut sc.sums[..through.len() * s.d];
                sums.fill(T::ZERO);
                let mut weights: [&[T]; GROUP] = [&[]; GROUP];
                for (weights, through) in weights.iter_mut().zip(through) {
                    *weights = &through[..strip.count(key)];
                }
                T::values(&weights[..through.len()], keys, pitch, sums);
                plus(dq, sums);
            }
        }
        dq
    }
}

/// The products of rows of `width` numbers with a block of turned ones.
fn products<T: Scores>(rows: &[T], width: usize, turned: &[T], out: &mut [[T; BLOCK]]) {
    for (g, out) in out.chunks_mut(GROUP).enumerate() {
        let mut block: Block<T> = [[T::ZERO; BLOCK]; GROUP];
        let from = g * GROUP * width;
        T::scores(&rows[from..from + out.len() * width], width, turned, &mut block);
        out.copy_from_slice(&block[..out.len()]);
    }
}

/// Adds to each of the `count` first keys' rows of `width` the sum of the queries' `rows`, each times the key's weight of the query:
/// [`BLOCK`] weights of each key, as many of which count as there are queries.
fn add_products<T: Scores>(
    (weights, queries): (&[T], usize),
    count: usize,
    rows: &[T],
    width: usize,
    sums: &mut [T],
    out: &mut [T],
) {
    if width == 0 || queries == 0 {
        return;
    }
    let weights = &weights[..count * BLOCK];
    for (weights, out) in weights.chunks(GROUP * BLOCK).zip(out.chunks_mut(GROUP * width)) {
        let keys = weights.len() / BLOCK;
        let sums = &mut sums[..keys * width];
        sums.fill(T::ZERO);
        let mut of_key: [&[T]; GROUP] = [&[]; GROUP];
        for (of_key, weights) in of_key.iter_mut().zip(weights.chunks(BLOCK)) {
            *of_key = &weights[..queries];
        }
        T::values(&of_key[..keys], rows, width, sums);
        plus(out, sums);
    }
}
