//! How much memory kernels take beside their results: upper bounds in bytes, over all threads, from what is known before they run.
//!
//! Tables of a few words per task or per row of a batch are left out.

use super::attention::{backward_extra_bytes, extra_bytes as attention_bytes};
use super::dots::{few_bytes, panel_bytes, part_rows, ALIGNED_BYTES, LINE_BYTES};
use super::lora::{skinny_rank, ROWS};
use super::products::kept_products;
use super::team;
use crate::row::RowProgram;
use crate::view::count;
use candle_core::DType;

/// What a kernel takes beside its result.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Extra {
    /// What its threads keep for the next kernel, which may take more or less.
    pub kept: usize,
    /// The same of kernels that run within it, who keep their own.
    pub within: usize,
    /// What is given back when it ends.
    pub passing: usize,
}

impl Extra {
    /// So much that is kept.
    #[must_use]
    pub fn kept(bytes: usize) -> Self {
        Self { kept: bytes, ..Self::default() }
    }

    /// So much that is given back.
    #[must_use]
    pub fn passing(bytes: usize) -> Self {
        Self { passing: bytes, ..Self::default() }
    }

    /// What two kernels take one after the other.
    #[must_use]
    pub fn max(self, other: Self) -> Self {
        Self {
            kept: self.kept.max(other.kept),
            within: self.within.max(other.within),
            passing: self.passing.max(other.passing),
        }
    }

    /// All of it.
    #[must_use]
    pub fn bytes(self) -> u64 {
        self.kept as u64 + self.within as u64 + self.passing as u64
    }
}

/// An operand, as far as a kernel's need of memory depends on it.
#[derive(Debug, Clone)]
pub struct Operand<'a> {
    /// The shape.
    pub dims: &'a [usize],
    /// The dtype.
    pub dtype: DType,
    /// Whether the elements lie in row-major order without gaps.
    pub dense: bool,
}

impl Operand<'_> {
    fn elements(&self) -> usize {
        count(self.dims)
    }

    /// Whether broadcast to (lead…, n) it is rows at one distance, or the same row everywhere.
    fn is_rows(&self, lead: &[usize]) -> bool {
        let own = self.dims.split_last().map_or(&[][..], |(_, own)| own);
        let missing = lead.len().saturating_sub(own.len());
        self.dense && (own.iter().all(|&d| d == 1) || missing == 0 && own == lead)
    }

    /// Dim `i` from the right; 1 where there is none.
    fn last(&self, i: usize) -> usize {
        self.dims.len().checked_sub(i + 1).map_or(1, |at| self.dims[at])
    }

    /// Of a dense copy in f32, or f64 if that is the dtype.
    fn wide_bytes(&self) -> usize {
        self.elements().saturating_mul(if self.dtype == DType::F64 { 8 } else { 4 })
    }
}

/// Whether products of the dtype are inner products on the operands themselves.
fn direct(dtype: DType) -> bool {
    dtype == DType::F32
}

/// What the `gemm` crate packs: at most both sides, and tiles of the caches for each thread.
fn packed(m: usize, k: usize, n: usize, size: usize) -> usize {
    let sides = m.saturating_add(n).saturating_mul(k).saturating_mul(size);
    sides.saturating_add(sides / 4).saturating_add(team::threads() << 21)
}

/// Of [`matmul`](super::matmul): `b` as the op takes it, (…, k, n).
#[must_use]
pub fn matmul(a: &Operand<'_>, b: &Operand<'_>) -> Extra {
    let (k, n) = (a.last(0), b.last(0));
    let rows = a.elements() / k.max(1);
    if a.dtype == DType::F64 {
        return Extra::passing(packed(rows, k, n, 8));
    }
    // the product's rows in f32 where they are rounded behind it, and of broadcast batches those of all
    let batches = (b.elements() / k.saturating_mul(n).max(1)).max(1);
    let sums = if direct(a.dtype) { 0 } else { rows.max(a.last(1).saturating_mul(batches)).saturating_mul(n) * 4 };
    let left = match (direct(a.dtype), a.dense) {
        (true, true) => 0,
        (_, true) => a.wide_bytes(),
        // what is turned, or where the product is made as a transpose, the product twice
        (_, false) => a.wide_bytes().max(b.wide_bytes()).saturating_add(rows.saturating_mul(n).saturating_mul(8)),
    };
    let right = if b.dense { 0 } else { k.saturating_mul(n).saturating_mul(4) };
    Extra { passing: sums.saturating_add(left).saturating_add(right), ..Extra::kept(inner(rows, k)) }
}

/// Of inner products of rows with `k` elements, with either kind of right side.
fn inner(rows: usize, k: usize) -> usize {
    panel_bytes(rows, k).saturating_mul(team::threads()).saturating_add(ALIGNED_BYTES)
}

/// Of `x·wᵀ`, with `w` (n, k).
#[must_use]
pub fn linear(x: &Operand<'_>, w: &Operand<'_>) -> Extra {
    let turned = [w.last(0), w.last(1)];
    matmul(x, &Operand { dims: &turned, dtype: w.dtype, dense: w.dense })
}

/// A head of [`products`](super::products()), as far as memory depends on it.
#[derive(Debug, Clone)]
pub struct HeadNeeds<'a> {
    /// Columns of its products.
    pub cols: usize,
    /// Its right sides.
    pub rights: Vec<Operand<'a>>,
    /// The program of its epilogue, and what that reads beside products.
    pub epilogue: Option<(&'a RowProgram, Vec<Operand<'a>>)>,
}

/// Of [`products`](super::products()).
#[must_use]
pub fn products(x: &Operand<'_>, heads: &[HeadNeeds<'_>]) -> Extra {
    let left = if direct(x.dtype) && x.dense { 0 } else { x.wide_bytes() };
    let mut all = Extra::passing(left);
    for head in heads {
        let Extra { kept, within, passing } = of_head(x, head);
        // a thread's parts come one after the other; copies of operands are there from the beginning
        all = Extra {
            kept: all.kept.max(kept),
            within: all.within.max(within),
            passing: all.passing.saturating_add(passing),
        };
    }
    all
}

fn of_head(x: &Operand<'_>, head: &HeadNeeds<'_>) -> Extra {
    let (k, n) = (x.last(0), head.cols);
    let lead = x.dims.split_last().map_or(&[][..], |(_, lead)| lead);
    let m = count(lead);
    let copied = head.rights.iter().filter(|w| !w.dense).map(|w| w.wide_bytes()).fold(0, usize::saturating_add);
    let threads = team::threads();
    let rows = part_rows(m, k).min(m);
    let sides = head.rights.len().max(1);
    let tile = kept_products(rows, sides, n);
    let rounded = if direct(x.dtype) { 0 } else { tile.saturating_mul(2) };
    let (mut passing, mut of_thread) = (copied, rounded);
    let mut program_bytes = 0;
    if let Some((program, operands)) = &head.epilogue {
        let copies = operands.iter().filter(|o| !o.is_rows(lead)).count();
        passing = passing.saturating_add(m.saturating_mul(n).saturating_mul(4 * copies));
        let result = tile / sides;
        of_thread = of_thread.saturating_add(program.outputs().len().saturating_mul(result).saturating_mul(4));
        // its parts are whole tasks of the team: no thread shares its own
        program_bytes = program.scratch_bytes(&[result.max(1)], 0);
    }
    let own = tile.saturating_mul(4).saturating_add(panel_bytes(rows, k)).saturating_add(LINE_BYTES);
    let within = few_bytes(rows, k).saturating_add(program_bytes).saturating_mul(threads);
    Extra {
        kept: own.saturating_mul(threads).saturating_add(ALIGNED_BYTES),
        // the caller, who copies x to cache lines first, is one kernel deeper
        within: within.saturating_add(own),
        passing: passing.saturating_add(of_thread.saturating_mul(threads)),
    }
}

/// Of [`lora`](super::lora): `a` (k, r), `b` (r, n).
#[must_use]
pub fn lora(x: &Operand<'_>, a: &Operand<'_>, b: &Operand<'_>, base: Option<&Operand<'_>>) -> Extra {
    let (k, r, n) = (x.last(0), a.last(0), b.last(0));
    let rows = x.elements() / k.max(1);
    let size = if x.dtype == DType::F64 { 8 } else { 4 };
    let skinny = x.dtype != DType::F64 && skinny_rank(r).is_some();
    let padded = skinny_rank(r).unwrap_or(0).saturating_mul(k) * 4;
    let products = if skinny { 0 } else { packed(rows, k, r, size).max(packed(rows, r, n, size)) };
    if matches!(x.dtype, DType::F16 | DType::BF16) {
        let piece = rows.min(ROWS).saturating_mul(k.saturating_add(r).saturating_add(n)) * 4;
        let weights = a.wide_bytes().saturating_add(b.wide_bytes());
        let base = base.map_or(0, Operand::wide_bytes);
        let rest = base.saturating_add(piece).saturating_add(products);
        return Extra::passing(padded.saturating_add(weights).saturating_add(rest));
    }
    let middle = if skinny { padded } else { rows.saturating_mul(r).saturating_mul(size) };
    let copies = [x, a, b].iter().filter(|o| !o.dense).map(|o| o.wide_bytes()).fold(0, usize::saturating_add);
    Extra::passing(middle.saturating_add(copies).saturating_add(products))
}

/// Of [`lora_segments`](super::lora_segments): the factors and the number of rows of each segment.
#[must_use]
pub fn lora_segments<'a>(
    x: &Operand<'_>,
    base: &Operand<'_>,
    segments: impl Iterator<Item = (Operand<'a>, Operand<'a>, usize)>,
) -> Extra {
    let matrices = x.dims.iter().rev().skip(2).fold(1usize, |n, &d| n.saturating_mul(d));
    // short ones run side by side, each on one thread; a long one has all of them
    let (mut together, mut alone) = (0usize, 0);
    for (a, b, rows) in segments {
        let (own, its_base) = ([rows, x.last(0)], [rows, base.last(0)]);
        let own = Operand { dims: &own, ..x.clone() };
        let its_base = Operand { dims: &its_base, ..base.clone() };
        let one = || lora(&own, &a, &b, Some(&its_base)).bytes() as usize;
        together = together.saturating_add(team::with_threads(1, one).saturating_mul(matrices));
        alone = alone.max(one());
    }
    Extra::passing(together.max(alone))
}

/// Of [`attention`](super::attention()): q (b, h, sq, d), v (b, hk, skv, dv).
#[must_use]
pub fn attention(q: &Operand<'_>, v: &Operand<'_>) -> Extra {
    let size = if q.dtype == DType::F64 { 8 } else { 4 };
    Extra::passing(attention_bytes(q.elements() / q.last(0).max(1), v.last(1), (q.last(0), v.last(0)), size))
}

/// Of [`attention_backward`](super::attention_backward): q (b, h, sq, d), k (b, hk, skv, d), v (b, hk, skv, dv); `capped` with a softcap.
#[must_use]
pub fn attention_backward(q: &Operand<'_>, k: &Operand<'_>, v: &Operand<'_>, capped: bool) -> Extra {
    let narrow = matches!(q.dtype, DType::F16 | DType::BF16);
    let (size, heads) = (if q.dtype == DType::F64 { 8 } else { 4 }, k.last(3).saturating_mul(k.last(2)));
    let queries = q.elements() / q.last(0).max(1);
    Extra::passing(backward_extra_bytes(queries, heads, (k.last(1), k.last(0), v.last(0)), size, (narrow, capped)))
}

/// Of [`rope`](super::rope): x (b, h, s, d).
#[must_use]
pub fn rope(x: &Operand<'_>, cos: &Operand<'_>) -> Extra {
    let batches = if cos.dims.len() == 3 { cos.dims[0] } else { 1 };
    let table = batches.saturating_mul(x.last(1)).saturating_mul(cos.last(0));
    Extra::passing(table.saturating_mul(if x.dtype == DType::F64 { 16 } else { 8 }))
}

/// Of ops that read indices: themselves as i64, then as what they mean.
#[must_use]
pub fn indices(ids: &Operand<'_>) -> usize {
    ids.elements().saturating_mul(24)
}

/// Of ops that write by index: the indices, and of 16-bit floats that are added up both sides in f32.
#[must_use]
pub fn scatter(x: &Operand<'_>, ids: &Operand<'_>, src: &Operand<'_>) -> Extra {
    let wide =
        if matches!(x.dtype, DType::F16 | DType::BF16) { x.wide_bytes().saturating_add(src.wide_bytes()) } else { 0 };
    Extra::passing(indices(ids).saturating_add(wide))
}
