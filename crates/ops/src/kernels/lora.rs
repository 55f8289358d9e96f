//! LoRA: two skinny products, optionally on top of a base.

#[cfg(target_arch = "x86_64")]
mod avx512;
mod segments;
mod skinny;

use super::matmul::{gemm_into, gemm_scalar::Scalar, widen_matrix, Matrix};
use super::{check_float, check_out, team};
use crate::element::Element;
use crate::error::{Error, Result};
use crate::fault;
use crate::row::space::{Offsets, Space};
use crate::view::{count, Slice, SliceMut, Strided, View};
use half::{bf16, f16};

pub use segments::{lora_segments, Segment};

const OP: &str = "lora";
/// Rows that are widened together for f16 and bf16.
pub(crate) const ROWS: usize = 256;

/// The rank to which [`skinny`] pads, if it takes the rank.
pub(crate) fn skinny_rank(r: usize) -> Option<usize> {
    (r <= skinny::LARGEST).then(|| skinny::padded(r))
}

/// Whether a [`lora`] of this rank in f32, f16 or bf16 has an order of sums of its own, in which no row's bits depend on another row: up to
/// a rank of 64.
#[must_use]
pub fn lora_is_skinny(rank: usize) -> bool {
    skinny_rank(rank).is_some()
}

/// `(x·A)·B·scale`, plus `base` if there is one: x `(…, in)`, a `(in, r)`, b `(r, out)`, base and output `(…, out)`.
///
/// In f32, f16 and bf16 a hidden row of up to 64 numbers stays in registers between the products, in an order of sums of its own; larger
/// ranks and f64 go through `gemm`, with r numbers per row of scratch. f16 and bf16 accumulate in f32 and round once, at the end.
///
/// # Errors
/// `ShapeMismatch`, `DTypeMismatch`, `Unsupported` (not a float), `OutOfBounds`.
pub fn lora(
    x: &View<'_>,
    a: &View<'_>,
    b: &View<'_>,
    base: Option<&View<'_>>,
    scale: f64,
    out: &mut SliceMut<'_>,
) -> Result<()> {
    x.check()?;
    a.check()?;
    b.check()?;
    check_float(OP, x.dtype())?;
    for (what, v) in [("A", Some(a)), ("B", Some(b)), ("the base", base)] {
        if let Some(v) = v {
            if v.dtype() != x.dtype() {
                return Err(Error::dtypes(OP, what, x.dtype(), v.dtype()));
            }
        }
    }
    let bad = || Error::shape(OP, format!("x {:?}, A {:?}, B {:?}", x.dims(), a.dims(), b.dims()));
    let ([lead @ .., k], &[ka, r], &[rb, n]) = (x.dims(), a.dims(), b.dims()) else {
        return Err(bad());
    };
    if *k != ka || r != rb {
        return Err(bad());
    }
    let rows = count(lead);
    check_out(OP, out, x.dtype(), rows.saturating_mul(n))?;
    if let Some(base) = base {
        base.check()?;
        let mut want = crate::view::Dims::from_slice(lead);
        want.push(n);
        if base.dims() != want.as_slice() {
            return Err(Error::shape(OP, format!("base {:?}, output {want:?}", base.dims())));
        }
    }
    if rows == 0 || n == 0 {
        return Ok(());
    }
    let scale = if fault::active("lora.scale") { 1.0 } else { scale };
    let base = base.filter(|_| !fault::active("lora.base"));
    let (a_matrix, b_matrix) = (Matrix::of(&a.layout), Matrix::of(&b.layout));
    let job = Job { blocks: row_blocks(&x.layout, rows, *k), a: a_matrix, b: b_matrix, base, scale };
    match (x.data, a.data, b.data, out) {
        (Slice::F32(x), Slice::F32(a), Slice::F32(b), SliceMut::F32(o)) if job.is_skinny() => job.skinny(x, a, b, o),
        (Slice::F32(x), Slice::F32(a), Slice::F32(b), SliceMut::F32(o)) => job.direct(x, a, b, o),
        (Slice::F64(x), Slice::F64(a), Slice::F64(b), SliceMut::F64(o)) => job.direct(x, a, b, o),
        (Slice::F16(x), Slice::F16(a), Slice::F16(b), SliceMut::F16(o)) => job.widened::<f16>(x, a, b, o),
        (Slice::BF16(x), Slice::BF16(a), Slice::BF16(b), SliceMut::BF16(o)) => job.widened::<bf16>(x, a, b, o),
        _ => Err(Error::unsupported(OP, "this mix of dtypes")),
    }
}

/// [`lora`] without a base on dense f32 matrices: x `(rows, k)`, a `(k, r)`, b `(r, n)`, output `(rows, n)`, with r as
/// [`lora_is_skinny`] says. The same bits, with nothing to look up on the way.
///
/// # Errors
/// `ShapeMismatch` where a slice is not that long, `Unsupported` for a larger rank.
pub fn lora_dense(
    (x, a, b): (&[f32], &[f32], &[f32]),
    (k, r, n): (usize, usize, usize),
    scale: f64,
    out: &mut [f32],
) -> Result<()> {
    let rows = out.len().checked_div(n).unwrap_or(0);
    let fits = |slice: &[f32], rows: usize, cols: usize| rows.checked_mul(cols) == Some(slice.len());
    if !(fits(out, rows, n) && fits(x, rows, k) && fits(a, k, r) && fits(b, r, n)) {
        let len = (x.len(), a.len(), b.len(), out.len());
        return Err(Error::shape(OP, format!("x, A, B and output of {len:?} elements, with ({k}, {r}, {n})")));
    }
    let scale = if fault::active("lora.scale") { 1.0 } else { scale };
    let (a_matrix, b_matrix) = (Matrix::dense(0, k, r), Matrix::dense(0, r, n));
    let job = Job { blocks: Vec::new(), a: a_matrix, b: b_matrix, base: None, scale };
    if !job.is_skinny() {
        return Err(Error::unsupported(OP, "a rank above 64, or none"));
    }
    if rows > 0 && n > 0 {
        let mut store = Vec::new();
        let shared = Shared { a: job.padded_a(a, &mut store), b };
        job.skinny_rows(x, k, &shared, out, false);
        lose_tail(out);
    }
    Ok(())
}

/// The fault of a last number that is wrong.
fn lose_tail(out: &mut [f32]) {
    if let (true, Some(last)) = (fault::active("lora.skinny_tail"), out.last_mut()) {
        *last = *last * 1.001 + 1e-3;
    }
}

/// x as the fewest matrices that cover its rows in order: one where its leading dims merge.
fn row_blocks(x: &Strided, rows: usize, k: usize) -> Vec<Matrix> {
    if let Some(flat) = x.reshape(&[rows, k]) {
        return vec![Matrix::of(&flat)];
    }
    let rank = x.dims.len();
    let lead = Strided { dims: x.dims[..rank - 1].into(), strides: x.strides[..rank - 1].into(), offset: x.offset };
    let space = Space::new(&lead.dims, 0, std::slice::from_ref(&lead));
    let Some(operand) = space.operands.first() else {
        return Vec::new();
    };
    let mut offsets = Offsets::new();
    space.offsets(operand, 0, space.rows, &mut offsets);
    if fault::active("lora.block_offset") {
        offsets.fill(operand.offset);
    }
    offsets
        .into_iter()
        .map(|offset| Matrix {
            offset,
            rows: space.cols,
            cols: k,
            row_stride: operand.row.single().unwrap_or(0),
            col_stride: x.strides[rank - 1],
        })
        .collect()
}

struct Job<'a> {
    blocks: Vec<Matrix>,
    a: Matrix,
    b: Matrix,
    base: Option<&'a View<'a>>,
    scale: f64,
}

/// A matrix as a dense one: itself where its rows lie one behind the other, else copied.
fn dense<'a>(src: &'a [f32], m: Matrix, store: &'a mut Vec<f32>) -> &'a [f32] {
    if m.col_stride == 1 && (m.row_stride == m.cols || m.rows == 1) {
        // empty where it has no elements, wherever it begins
        return src.get(m.offset..m.offset + m.rows * m.cols).unwrap_or_default();
    }
    widen_matrix(src, m, store);
    store
}

/// The operands that all rows share, as [`skinny`] takes them.
struct Shared<'a> {
    a: &'a [f32],
    b: &'a [f32],
}

/// Below so many multiplications a product stays on the caller's thread.
const PARALLEL: usize = 1 << 18;
/// Those that a thread makes in a nanosecond, roughly.
const WORK_PER_NS: usize = 20;

impl Job<'_> {
    fn is_skinny(&self) -> bool {
        self.a.cols <= skinny::LARGEST && !fault::active("lora.rank")
    }

    /// A, padded to a rank that [`skinny`] knows.
    fn padded_a<'a>(&self, a: &'a [f32], store: &'a mut Vec<f32>) -> &'a [f32] {
        let wide = skinny::padded(self.a.cols);
        if wide == self.a.cols {
            return dense(a, self.a, store);
        }
        store.clear();
        store.resize(self.a.rows * wide, 0.0);
        for (i, to) in store.chunks_exact_mut(wide).enumerate() {
            for (j, to) in to.iter_mut().take(self.a.cols).enumerate() {
                *to = a[self.a.offset + i * self.a.row_stride + j * self.a.col_stride];
            }
        }
        store
    }

    /// Rows of x, dense but for their pitch, into rows of the output.
    fn skinny_rows(&self, x: &[f32], pitch: usize, of: &Shared<'_>, out: &mut [f32], has_base: bool) {
        let (k, r, n) = (self.a.rows, self.a.cols, self.b.cols);
        let Shared { a, b } = *of;
        let (padded, scale) = (skinny::padded(r), self.scale as f32);
        let of = skinny::Skinny { x, pitch, k, a, padded, b, r, n, scale, has_base };
        let rows = out.len() / n.max(1);
        let work = rows.saturating_mul(k + n).saturating_mul(r);
        if work < PARALLEL {
            return skinny::rows(of, 0, out);
        }
        team::each_chunk(work / WORK_PER_NS, out, n, |first, out| skinny::rows(of, first, out));
    }

    /// f32 of a small rank: each row's two products in turn.
    fn skinny(&self, x: &[f32], a: &[f32], b: &[f32], out: &mut [f32]) -> Result<()> {
        if let Some(base) = self.base {
            let layout = Strided::contiguous(base.dims());
            super::copy_into(base, &mut SliceMut::F32(&mut *out), &layout)?;
        }
        let (mut store_a, mut store_b, mut store_x) = (Vec::new(), Vec::new(), Vec::new());
        let of = Shared { a: self.padded_a(a, &mut store_a), b: dense(b, self.b, &mut store_b) };
        let mut at = 0;
        for &xm in &self.blocks {
            let end = at + xm.rows * self.b.cols;
            let (rows, pitch) = match xm.col_stride == 1 {
                _ if xm.cols == 0 => (&[][..], 0),
                true => (x.get(xm.offset..).unwrap_or_default(), xm.row_stride),
                false => (dense(x, xm, &mut store_x), xm.cols),
            };
            self.skinny_rows(rows, pitch, &of, &mut out[at..end], self.base.is_some());
            at = end;
        }
        lose_tail(out);
        Ok(())
    }

    /// f32 and f64: products straight from the operands into the output.
    fn direct<T: Element + Scalar>(&self, x: &[T], a: &[T], b: &[T], out: &mut [T]) -> Result<()>
    where
        for<'s> SliceMut<'s>: From<&'s mut [T]>,
    {
        if let Some(base) = self.base {
            let layout = Strided::contiguous(base.dims());
            super::copy_into(base, &mut SliceMut::from(&mut *out), &layout)?;
        }
        let (r, n) = (self.a.cols, self.b.cols);
        let mut mid = Vec::new();
        let mut at = 0;
        for &xm in &self.blocks {
            mid.clear();
            mid.resize(xm.rows * r, T::default());
            gemm_into(x, xm, a, self.a, &mut mid, false, T::from_f32(1.0))?;
            if fault::active("lora.rank") {
                mid.iter_mut().skip(r.saturating_sub(1)).step_by(r.max(1)).for_each(|m| *m = T::default());
            }
            let end = at + xm.rows * n;
            let mid_m = Matrix::dense(0, xm.rows, r);
            let scale = T::from_f64(self.scale);
            let has_base = self.base.is_some();
            gemm_into(&mid, mid_m, b, self.b, &mut out[at..end], has_base, scale)?;
            at = end;
        }
        Ok(())
    }

    /// f16 and bf16: blocks of rows in f32, rounded once.
    fn widened<T: Element>(&self, x: &[T], a: &[T], b: &[T], out: &mut [T]) -> Result<()> {
        let (k, r, n) = (self.a.rows, self.a.cols, self.b.cols);
        let (mut wa, mut wb, mut wx) = (Vec::new(), Vec::new(), Vec::new());
        widen_matrix(a, self.a, &mut wa);
        widen_matrix(b, self.b, &mut wb);
        let small = self.is_skinny() && !fault::active("lora.rounded_middle");
        let mut store = Vec::new();
        let wide = Job { blocks: Vec::new(), a: Matrix::dense(0, k, r), b: Matrix::dense(0, r, n), ..*self };
        let shared = Shared { a: if small { wide.padded_a(&wa, &mut store) } else { &[] }, b: &wb };
        let mut mid = Vec::new();
        let mut sum = Vec::new();
        let base = match self.base {
            Some(base) => {
                let mut wide = vec![0f32; base.layout.elem_count()];
                super::cast(base, &mut SliceMut::F32(&mut wide))?;
                wide
            }
            None => Vec::new(),
        };
        let mut at = 0;
        for &xm in &self.blocks {
            for first in (0..xm.rows).step_by(ROWS) {
                let rows = ROWS.min(xm.rows - first);
                let from = if fault::active("lora.piece_offset") { 0 } else { first };
                let piece = Matrix { offset: xm.offset + from * xm.row_stride, rows, ..xm };
                widen_matrix(x, piece, &mut wx);
                let end = at + rows * n;
                sum.clear();
                match base.get(at..end) {
                    Some(b) => sum.extend_from_slice(b),
                    None => sum.resize(rows * n, 0.0),
                }
                let has_base = self.base.is_some();
                if small {
                    wide.skinny_rows(&wx, k, &shared, &mut sum, has_base);
                } else {
                    mid.clear();
                    mid.resize(rows * r, 0.0);
                    let (xm, am) = (Matrix::dense(0, rows, k), Matrix::dense(0, k, r));
                    gemm_into(&wx, xm, &wa, am, &mut mid, false, 1.0)?;
                    if fault::active("lora.rounded_middle") {
                        for m in &mut mid {
                            *m = T::from_f32(*m).to_f32();
                        }
                    }
                    let (mm, bm) = (Matrix::dense(0, rows, r), Matrix::dense(0, r, n));
                    gemm_into(&mid, mm, &wb, bm, &mut sum, has_base, self.scale as f32)?;
                }
                T::round_from(&sum, &mut out[at..end]);
                at = end;
            }
        }
        Ok(())
    }
}

impl<'a> From<&'a mut [f32]> for SliceMut<'a> {
    fn from(v: &'a mut [f32]) -> Self {
        SliceMut::F32(v)
    }
}

impl<'a> From<&'a mut [f64]> for SliceMut<'a> {
    fn from(v: &'a mut [f64]) -> Self {
        SliceMut::F64(v)
    }
}
