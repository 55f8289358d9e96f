//! The work of attention: tiles of queries that share their keys, each through the keys' segments.

use super::loops::{join, merge, scaled, weigh, Block, Scores, State};
use super::{block, read_row, visible, Job, BLOCK, FEWEST, GROUP, QUERIES, SEGMENT};
use crate::element::Element;
use crate::fault;
use crate::kernels::team;
use crate::math::Real;
use crate::view::{each_dtype, Slice, Strided};
use std::ops::Range;

/// What takes one thread less is not shared.
const ALONE_NS: usize = 8000;
/// Products that a thread makes in a nanosecond, roughly, the exponentials between them included.
const WORK_PER_NS: usize = 20;

/// Queries that share keys: rows `first..` of those of the heads of one key head, which are `group` times `sq`.
#[derive(Clone, Copy)]
pub(super) struct Tile {
    pub(super) b: usize,
    /// The key head.
    pub(super) hk: usize,
    pub(super) first: usize,
    pub(super) count: usize,
}

/// One query of a tile: its head, its number, and the keys it sees.
pub(super) struct Query {
    pub(super) h: usize,
    pub(super) i: usize,
    pub(super) keys: Range<usize>,
}

impl Query {
    /// Which keys of the block that begins with `key` it sees.
    pub(super) fn seen(&self, key: usize) -> Range<usize> {
        let of = |at: usize| at.saturating_sub(key).min(BLOCK);
        of(self.keys.start)..of(self.keys.end.max(self.keys.start))
    }
}

/// What a tile has found in a stretch of keys.
struct Found<T> {
    states: Vec<State<T>>,
    /// Weighted sums of the values, `(count, dv)`.
    acc: Vec<T>,
}

impl<T: Real> Found<T> {
    fn nothing(count: usize, dv: usize) -> Self {
        Self { states: vec![State::EMPTY; count], acc: vec![T::ZERO; count * dv] }
    }

    /// What was found before, if anything, and in a later stretch; `queries` say who saw a key where.
    fn joined(before: Option<Self>, later: Self, queries: &[Query], stretch: &Range<usize>) -> Self {
        let Some(mut all) = before else {
            return later;
        };
        let dv = all.acc.len() / all.states.len().max(1);
        let accs = all.acc.chunks_exact_mut(dv.max(1)).zip(later.acc.chunks_exact(dv.max(1)));
        for (((state, later), (acc, sums)), query) in all.states.iter_mut().zip(&later.states).zip(accs).zip(queries) {
            if query.keys.start >= stretch.start && !query.keys.is_empty() {
                // nothing came before
                *state = *later;
                acc.copy_from_slice(sums);
            } else if stretch.start < query.keys.end {
                join(state, acc, *later, sums);
            }
        }
        all
    }
}

/// One thread's scratch.
#[derive(Default)]
struct Scratch<T> {
    keys: Vec<T>,
    turned: Vec<T>,
    values: Vec<T>,
    sums: Vec<T>,
    mask: Vec<T>,
}

impl Job<'_> {
    pub(super) fn run<T: Scores, E: Element>(&self, q: &[E], k: &[E], v: &[E], out: &mut [E])
    where
        for<'s> Slice<'s>: From<&'s [E]>,
    {
        let s = &self.shape;
        let rows = s.group * s.sq;
        let heads = out.len() / (rows * s.dv).max(1);
        let work = [s.skv, s.d + s.dv, heads].into_iter().fold(rows, usize::saturating_mul);
        let read = (work / rows.max(1)).saturating_mul(size_of::<E>());
        // the keys and values that one query sees are rarely in a cache
        let ns = (work / WORK_PER_NS).max(team::moving_bytes(read));
        let threads = if ns < ALONE_NS { 1 } else { team::threads() };
        let key_heads = s.h / s.group.max(1);
        // smaller tiles where there would be too few to share, segments on their own where there are too few queries
        let mut size = QUERIES;
        while size > FEWEST && threads > 1 && heads * rows.div_ceil(size) < 2 * threads {
            size /= 2;
        }
        let mut tiles = Vec::new();
        for (head, out) in out.chunks_mut((rows * s.dv).max(1)).enumerate() {
            for (t, out) in out.chunks_mut(size * s.dv).enumerate() {
                let (b, hk) = (head / key_heads, head % key_heads);
                tiles.push((Tile { b, hk, first: t * size, count: out.len() / s.dv }, out));
            }
        }
        if threads > 1 && tiles.len() < 2 * threads && s.skv > SEGMENT {
            return self.by_segments::<T, E>(q, k, v, tiles, threads, ns);
        }
        team::each_group(ns, tiles, threads, |group| {
            let mut sc = Scratch::<T>::default();
            for (tile, out) in group {
                let queries = self.queries(tile);
                let rows = self.rows(tile, &queries, q, self.q);
                let mut found = None;
                for segment in segments(&queries) {
                    let mut later = Found::nothing(tile.count, s.dv);
                    self.stretch(tile, &queries, &rows, k, v, segment.clone(), &mut later, &mut sc);
                    found = Some(Found::joined(found, later, &queries, &segment));
                }
                self.write(tile, found, out);
            }
        });
    }

    /// The tiles with each segment of their keys as a task of its own.
    fn by_segments<T: Scores, E: Element>(
        &self,
        q: &[E],
        k: &[E],
        v: &[E],
        tiles: Vec<(Tile, &mut [E])>,
        threads: usize,
        ns: usize,
    ) where
        for<'s> Slice<'s>: From<&'s [E]>,
    {
        let dv = self.shape.dv;
        let known: Vec<_> = tiles.iter().map(|(tile, _)| self.queries(*tile)).collect();
        let rows: Vec<Vec<T>> =
            tiles.iter().zip(&known).map(|((tile, _), known)| self.rows(*tile, known, q, self.q)).collect();
        let mut parts = Vec::new();
        for (t, ((tile, _), queries)) in tiles.iter().zip(&known).enumerate() {
            parts.extend(segments(queries).map(|segment| (t, segment, Found::<T>::nothing(tile.count, dv))));
        }
        team::each_group(ns, parts.iter_mut().collect(), threads, |group| {
            let mut sc = Scratch::default();
            for (t, segment, found) in group {
                if let (Some((tile, _)), Some(queries), Some(rows)) = (tiles.get(*t), known.get(*t), rows.get(*t)) {
                    self.stretch(*tile, queries, rows, k, v, segment.clone(), found, &mut sc);
                }
            }
        });
        let mut parts = parts.into_iter().peekable();
        for (t, ((tile, out), queries)) in tiles.into_iter().zip(&known).enumerate() {
            let mut found = None;
            while let Some((_, segment, later)) = parts.next_if(|part| part.0 == t) {
                found = Some(Found::joined(found, later, queries, &segment));
            }
            self.write(tile, found, out);
        }
    }

    pub(super) fn queries(&self, tile: Tile) -> Vec<Query> {
        let s = &self.shape;
        let of = |row: usize| {
            let (g, i) = (row / s.sq, row % s.sq);
            let (start, end) = visible(self.params, i, s.sq, s.skv);
            let end = end - fault::one_if("attention.last_key").min(end - start);
            Query { h: tile.hk * s.group + g, i, keys: start..end }
        };
        (tile.first..tile.first + tile.count).map(of).collect()
    }

    /// The rows of a tile's queries in `data` of the layout (b, h, sq, width): `(count, width)`.
    pub(super) fn rows<T: Real, E: Element>(
        &self,
        tile: Tile,
        queries: &[Query],
        data: &[E],
        layout: &Strided,
    ) -> Vec<T> {
        let (width, st) = (layout.dims[3], &layout.strides);
        let mut rows = vec![T::ZERO; queries.len() * width];
        for (row, query) in rows.chunks_exact_mut(width.max(1)).zip(queries) {
            read_row(data, layout.offset + tile.b * st[0] + query.h * st[1] + query.i * st[2], st[3], row);
        }
        rows
    }

    /// The key head whose keys and values a tile's queries use.
    pub(super) fn key_head(&self, tile: Tile) -> usize {
        let heads = self.shape.h / self.shape.group.max(1);
        if fault::active("attention.group") {
            (tile.hk * self.shape.group) % heads.max(1)
        } else {
            tile.hk
        }
    }

    /// What the queries find in a stretch of the keys, into `found`, which has nothing yet.
    #[allow(clippy::too_many_arguments)] // operands, position, destination, scratch: nothing to bundle that is used twice
    fn stretch<T: Scores, E: Element>(
        &self,
        tile: Tile,
        queries: &[Query],
        rows: &[T],
        k: &[E],
        v: &[E],
        stretch: Range<usize>,
        found: &mut Found<T>,
        sc: &mut Scratch<T>,
    ) where
        for<'s> Slice<'s>: From<&'s [E]>,
    {
        let s = &self.shape;
        let hk = self.key_head(tile);
        let start_of = |l: &Strided| l.offset + tile.b * l.strides[0] + hk * l.strides[1];
        let (k0, v0) = (start_of(self.k), start_of(self.v));
        let (ks, vs) = (self.k.strides[2], self.v.strides[2]);
        sc.turned.resize(s.d * BLOCK, T::ZERO);
        sc.sums.resize(GROUP * s.dv, T::ZERO);
        for key in stretch.step_by(BLOCK) {
            if !queries.iter().any(|q| q.keys.start < key + BLOCK && key < q.keys.end) {
                continue;
            }
            let to = queries.iter().map(|q| q.keys.end).max().unwrap_or(0);
            let count = BLOCK.min(to.saturating_sub(key));
            let place = if fault::active("attention.block") { key % BLOCK } else { key };
            let (keys, kp) = block(k, self.k, k0 + key * ks, count, &mut sc.keys, &k.into());
            T::turn(keys, kp, count, &mut sc.turned);
            let (values, vp) = block(v, self.v, v0 + place * vs, count, &mut sc.values, &v.into());
            for (g, queries) in queries.chunks(GROUP).enumerate() {
                let m = queries.len();
                if queries.iter().all(|q| q.seen(key).is_empty()) {
                    continue;
                }
                let mut weights: Block<T> = [[T::ZERO; BLOCK]; GROUP];
                let at = g * GROUP;
                T::scores(&rows[at * s.d..(at + m) * s.d], s.d, &sc.turned, &mut weights);
                let (states, acc) = (&mut found.states[at..], &mut found.acc[at * s.dv..]);
                let mut keep = [T::ONE; GROUP];
                let mut whole = BLOCK;
                for (i, (query, (state, scores))) in queries.iter().zip(states.iter_mut().zip(&mut weights)).enumerate()
                {
                    let Range { start, end } = query.seen(key);
                    if start == end {
                        whole = 0;
                        continue;
                    }
                    whole = if start == 0 { whole.min(end) } else { 0 };
                    // Keys outside a query's range are at -∞, weight 0, so that the order of the sum is the block's own.
                    scores[..start].fill(T::NEG_INF);
                    scores[end..].fill(T::NEG_INF);
                    self.adjust(tile.b, query, key, start..end, scores, &mut sc.mask);
                    keep[i] = weigh(state, scores);
                }
                // the keys that all of them see, together, and then each on its own
                let sums = &mut sc.sums[..m * s.dv];
                sums.fill(T::ZERO);
                if whole > 0 {
                    let together: [&[T]; GROUP] = std::array::from_fn(|i| &weights[i][..whole]);
                    T::values(&together[..m], values, vp, sums);
                }
                for (i, query) in queries.iter().enumerate() {
                    let Range { start, end } = query.seen(key);
                    if start == end {
                        continue;
                    }
                    let (start, sums) = (start.max(whole), &mut sums[i * s.dv..(i + 1) * s.dv]);
                    if start < end && !(fault::active("attention.value_tail") && whole > 0) {
                        T::values(&[&weights[i][start..end]], &values[start * vp..], vp, sums);
                    }
                    merge(&mut acc[i * s.dv..(i + 1) * s.dv], keep[i], sums);
                }
            }
        }
    }

    /// The quotients of weighted sums and sums of weights: 0/0 where nothing was found.
    fn write<T: Real, E: Element>(&self, tile: Tile, found: Option<Found<T>>, out: &mut [E]) {
        let dv = self.shape.dv;
        let mut found = found.unwrap_or_else(|| Found::nothing(tile.count, dv));
        for ((row, acc), state) in out.chunks_exact_mut(dv).zip(found.acc.chunks_exact_mut(dv)).zip(&found.states) {
            for a in acc.iter_mut() {
                *a = *a / state.sum;
            }
            T::write(acc, row);
        }
        if let (true, Some(last)) = (fault::active("attention.tail"), out.last_mut()) {
            let mut one = [T::get(*last)];
            one[0] = fault::nudged(one[0]);
            T::write(&one, std::slice::from_mut(last));
        }
    }

    /// Scale, softcap and mask on the visible scores of one block; the others stay at -∞.
    fn adjust<T: Real>(
        &self,
        b: usize,
        query: &Query,
        key: usize,
        seen: Range<usize>,
        scores: &mut [T; BLOCK],
        mask: &mut Vec<T>,
    ) {
        self.capped(seen.clone(), scores);
        self.masked(b, query, key, seen, scores, mask);
    }

    /// Scale and softcap on the visible scores of a block.
    pub(super) fn capped<T: Real>(&self, seen: Range<usize>, scores: &mut [T; BLOCK]) {
        let scale = if fault::active("attention.scale") { 1.0 } else { self.params.scale };
        let by = T::from_f64(scale);
        match self.params.softcap.filter(|_| !fault::active("attention.softcap")) {
            Some(cap) => scores[seen].iter_mut().for_each(|x| *x = x.softcap(scale / cap, cap)),
            // -∞ stays what it is, and a length that the compiler knows is quicker
            None if by > T::ZERO => scaled(&mut scores[..], by),
            None => scaled(&mut scores[seen], by),
        }
    }

    /// The mask on the visible scores of a query in the block that begins with `key`.
    pub(super) fn masked<T: Real>(
        &self,
        b: usize,
        query: &Query,
        key: usize,
        seen: Range<usize>,
        scores: &mut [T; BLOCK],
        mask: &mut Vec<T>,
    ) {
        if let Some((data, l)) = &self.mask {
            let st = &l.strides;
            let h = if fault::active("attention.mask_head") { 0 } else { query.h };
            let i = if fault::active("attention.mask_row") { 0 } else { query.i };
            let base = l.offset + b * st[0] + h * st[1] + i * st[2] + (key + seen.start) * st[3];
            mask.resize(seen.len(), T::ZERO);
            each_dtype!(Slice, data, m => read_row(m, base, st[3], mask));
            for (x, &m) in scores[seen].iter_mut().zip(mask.iter()) {
                *x = *x + m;
            }
        }
    }
}

/// The stretches of keys between multiples of [`SEGMENT`] from the first that a query sees to the last; each begins on a block.
fn segments(queries: &[Query]) -> impl Iterator<Item = Range<usize>> {
    let seen = || queries.iter().map(|q| &q.keys).filter(|keys| !keys.is_empty());
    let from = seen().map(|keys| keys.start).min().unwrap_or(0) / BLOCK * BLOCK;
    let to = seen().map(|keys| keys.end).max().unwrap_or(0);
    (from / SEGMENT..to.div_ceil(SEGMENT)).map(move |n| from.max(n * SEGMENT)..to.min((n + 1) * SEGMENT))
}
