//! Whether sizes are those of symbols: each symbol has one, and no two of those that equal dims share have the same.

use super::super::Sym;
use crate::op::Op;
use smallvec::SmallVec;

/// What no size is: a symbol that has none yet.
const UNBOUND: usize = usize::MAX;

/// The sizes that symbols have got so far.
pub(super) struct Sizes(Vec<usize>);

impl Sizes {
    /// So many symbols, of which 0 and 1 are themselves.
    pub(super) fn new(count: usize) -> Self {
        Self([0, 1].into_iter().chain(std::iter::repeat(UNBOUND)).take(count).collect())
    }

    pub(super) fn into_vec(self) -> Vec<usize> {
        self.0
    }

    /// Whether the symbol has this size; it gets it where it has none.
    #[inline]
    fn is(&mut self, sym: Sym, size: usize) -> bool {
        match self.0.get_mut(sym.index()) {
            Some(known) if *known == UNBOUND => {
                *known = size;
                size != UNBOUND
            }
            Some(known) => *known == size,
            None => false,
        }
    }

    #[inline]
    pub(super) fn are(&mut self, syms: &[Sym], sizes: &[usize]) -> bool {
        syms.len() == sizes.len() && syms.iter().zip(sizes).all(|(&sym, &size)| self.is(sym, size))
    }

    fn may_be(&mut self, sym: Option<Sym>, size: Option<usize>) -> bool {
        match (sym, size) {
            (Some(sym), Some(size)) => self.is(sym, size),
            (None, None) => true,
            _ => false,
        }
    }

    /// Whether an op is the same but for its sizes, and those are the symbols'.
    pub(super) fn fit(&mut self, syms: &Op<Sym>, op: &Op) -> bool {
        match (syms, op) {
            (Op::Reshape { shape: a }, Op::Reshape { shape: b })
            | (Op::Broadcast { shape: a }, Op::Broadcast { shape: b }) => self.are(a, b),
            (Op::Full { shape: a, dtype: x }, Op::Full { shape: b, dtype: y }) => x == y && self.are(a, b),
            (Op::Random { dist: d, shape: a, dtype: x }, Op::Random { dist: e, shape: b, dtype: y }) => {
                d == e && x == y && self.are(a, b)
            }
            (Op::Arange { len: a, dtype: x }, Op::Arange { len: b, dtype: y }) => x == y && self.is(*a, *b),
            (
                Op::CausalMask { queries: q, keys: k, window: a, dtype: x },
                Op::CausalMask { queries, keys, window: b, dtype: y },
            ) => x == y && self.is(*q, *queries) && self.is(*k, *keys) && self.may_be(*a, *b),
            (Op::Narrow { dim: d, start: s, len: l }, Op::Narrow { dim, start, len }) => {
                d == dim && self.is(*s, *start) && self.is(*l, *len)
            }
            (Op::Stride { dim: d, start: s, len: l, step: p }, Op::Stride { dim, start, len, step }) => {
                d == dim && self.is(*s, *start) && self.is(*l, *len) && self.is(*p, *step)
            }
            (Op::SliceAssign { dim: d, start: s }, Op::SliceAssign { dim, start }) => d == dim && self.is(*s, *start),
            (Op::LoraSegments { rows: a }, Op::LoraSegments { rows: b }) => self.are(a, b),
            (Op::GroupNorm { groups: g, weight: w, bias: b }, Op::GroupNorm { groups, weight, bias }) => {
                w == weight && b == bias && self.is(*g, *groups)
            }
            (
                Op::Attention { mask: m, causal: c, softcap: s, window: w },
                Op::Attention { mask, causal, softcap, window },
            )
            | (
                Op::AttentionBackward { mask: m, causal: c, softcap: s, window: w },
                Op::AttentionBackward { mask, causal, softcap, window },
            ) => (m, c, s) == (mask, causal, softcap) && self.may_be(*w, *window),
            _ => false,
        }
    }

    /// Whether all symbols have sizes, and those that equal dims share differ from one another, from 0 and from 1.
    pub(super) fn distinct(&self, shared: &[Sym]) -> bool {
        let mut sizes: SmallVec<[usize; 32]> = SmallVec::new();
        sizes.extend(shared.iter().filter_map(|sym| self.0.get(sym.index()).copied()));
        sizes.sort_unstable();
        let differ = sizes.windows(2).all(|pair| pair[0] < pair[1]);
        differ && sizes.first().is_none_or(|&size| size > 1) && !self.0.contains(&UNBOUND)
    }
}
