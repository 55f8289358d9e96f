//! Matrix products: inner products in f32 for f32, f16 and bf16, the `gemm` crate in f64.

use super::dots::{dots_parallel, each_side, Grid, Narrow, Right, Rows, Side};
use super::{check_float, check_out, fresh, spoil, square, team};
use crate::element::Element;
use crate::error::{Error, Result};
use crate::fault;
use crate::row::space::{Offsets, Space};
use crate::view::{count, Dims, Slice, SliceMut, Strided, View};
use gemm::Parallelism;

const OP: &str = "matmul";

/// The batch dims of a product, and both operands seen as batches of matrices.
struct Batched {
    m: usize,
    n: usize,
    k: usize,
    /// Broadcast batch dims.
    batch: Dims,
    a: Strided,
    b: Strided,
}

fn batched(a: &Strided, b: &Strided) -> Result<Batched> {
    let bad = |why: &str| Error::shape(OP, format!("{:?} x {:?}: {why}", a.dims, b.dims));
    let ([ab @ .., m, k], [bb @ .., kb, n]) = (a.dims.as_slice(), b.dims.as_slice()) else {
        return Err(bad("both sides need at least two dims"));
    };
    if k != kb {
        return Err(bad("inner dims differ"));
    }
    let rank = ab.len().max(bb.len());
    let mut batch = Dims::from_elem(1, rank);
    for (i, d) in batch.iter_mut().enumerate() {
        let at = |dims: &[usize]| (i + dims.len()).checked_sub(rank).map_or(1, |j| dims[j]);
        *d = match (at(ab), at(bb)) {
            (x, y) if x == y => x,
            (1, y) => y,
            (x, 1) => x,
            _ => return Err(bad("batch dims do not broadcast")),
        };
    }
    let full = |l: &Strided, r: usize, c: usize| {
        let mut dims = batch.clone();
        dims.extend([r, c]);
        l.broadcast_to(&dims)
    };
    Ok(Batched { m: *m, n: *n, k: *k, a: full(a, *m, *k)?, b: full(b, *k, *n)?, batch })
}

/// One matrix of a view: where it starts and its strides.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Matrix {
    pub(crate) offset: usize,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) row_stride: usize,
    pub(crate) col_stride: usize,
}

impl Matrix {
    /// The matrix that a layout of two dims is.
    pub(crate) fn of(layout: &Strided) -> Self {
        let at = |list: &Dims, i: usize| list.get(i).copied().unwrap_or(0);
        Matrix {
            offset: layout.offset,
            rows: at(&layout.dims, 0),
            cols: at(&layout.dims, 1),
            row_stride: at(&layout.strides, 0),
            col_stride: at(&layout.strides, 1),
        }
    }

    /// A dense row-major matrix.
    pub(crate) fn dense(offset: usize, rows: usize, cols: usize) -> Self {
        Matrix { offset, rows, cols, row_stride: cols, col_stride: 1 }
    }

    /// Whether its rows or its columns are runs of elements.
    pub(crate) fn has_runs(&self) -> bool {
        self.row_stride == 1 || self.rows == 1 || self.col_stride == 1 || self.cols == 1
    }

    /// Whether every element stands within `len`.
    fn fits(&self, len: usize) -> bool {
        if self.rows == 0 || self.cols == 0 {
            return true;
        }
        (self.rows - 1)
            .checked_mul(self.row_stride)
            .zip((self.cols - 1).checked_mul(self.col_stride))
            .and_then(|(r, c)| r.checked_add(c)?.checked_add(self.offset))
            .is_some_and(|last| last < len)
    }
}

/// How many threads `gemm` may use, of a pool of its own. The result's bits do not depend on it.
fn parallelism() -> Parallelism {
    match team::threads() {
        0 | 1 => Parallelism::None,
        n => Parallelism::Rayon(n),
    }
}

/// `dst = beta·a·b`, or `dst + beta·a·b` if `accumulate`; `dst` is dense row-major.
pub(crate) fn gemm_into<T: Element + gemm_scalar::Scalar>(
    a: &[T],
    am: Matrix,
    b: &[T],
    bm: Matrix,
    dst: &mut [T],
    accumulate: bool,
    beta: T,
) -> Result<()> {
    let (m, n, k) = (am.rows, bm.cols, am.cols);
    if bm.rows != k || dst.len() != m * n || !am.fits(a.len()) || !bm.fits(b.len()) {
        return Err(Error::shape(OP, format!("{am:?} x {bm:?}")));
    }
    if m == 0 || n == 0 {
        return Ok(());
    }
    if k == 0 {
        if !accumulate {
            dst.fill(T::from_f32(fault::one_if("matmul.empty_k") as f32));
        }
        return Ok(());
    }
    // faults: the last term, or the last row, is missing
    let k = k - fault::one_if("matmul.last_term");
    let m = m - fault::one_if("matmul.last_row");
    let alpha = if accumulate && !fault::active("matmul.accumulate") { T::from_f32(1.0) } else { T::default() };
    // SAFETY: `fits` shows that every element (i, j) of both operands, at offset + i·row_stride + j·col_stride, lies within its
    // slice, and `dst` holds exactly m·n elements, addressed as row-major (m, n). `T` is f16, f32 or f64 (the sealed
    // `Scalar`), which `gemm` accepts. Strides fit `isize` because the offsets they lead to lie within a slice
    // (a stride that is multiplied by 0 only is never followed).
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            dst.as_mut_ptr(),
            1,
            n as isize,
            accumulate,
            a.as_ptr().add(am.offset),
            am.col_stride as isize,
            am.row_stride as isize,
            b.as_ptr().add(bm.offset),
            bm.col_stride as isize,
            bm.row_stride as isize,
            alpha,
            beta,
            false,
            false,
            false,
            parallelism(),
        );
    }
    if fault::active("matmul.f16") {
        for d in dst.iter_mut() {
            *d = T::from_f32(half::f16::from_f32(d.to_f32()).to_f32());
        }
    }
    if let (true, Some(d)) = (fault::active("matmul.tail"), dst.last_mut()) {
        *d = T::from_f64(d.to_f64() * 1.001 + 1e-3);
    }
    Ok(())
}

/// The types that the library product covers.
pub(crate) mod gemm_scalar {
    /// f16, f32 or f64, and nothing else.
    pub(crate) trait Scalar {}
    impl Scalar for half::f16 {}
    impl Scalar for f32 {}
    impl Scalar for f64 {}
}

/// Matrix product `(…, m, k) x (…, k, n) -> (…, m, n)`, batch dims broadcast from the right, any strides.
///
/// f32, f16 and bf16 are inner products in f32, rounded once, each in an order that depends on `k` alone: not on the other rows, nor on
/// how either side lies. In f64 the `gemm` crate is called as Candle calls it. `k == 0` gives zeros.
///
/// # Errors
/// `ShapeMismatch`, `DTypeMismatch`, `Unsupported` (not a float), `OutOfBounds`.
pub fn matmul(a: &View<'_>, b: &View<'_>, out: &mut SliceMut<'_>) -> Result<()> {
    a.check()?;
    b.check()?;
    check_float(OP, a.dtype())?;
    if a.dtype() != b.dtype() {
        return Err(Error::dtypes(OP, "the right side", a.dtype(), b.dtype()));
    }
    let s = batched(&a.layout, &b.layout)?;
    let total = count(&s.batch).saturating_mul(s.m).saturating_mul(s.n);
    check_out(OP, out, a.dtype(), total)?;
    if total == 0 {
        return Ok(());
    }
    match (a.data, b.data, out) {
        (Slice::F32(a), Slice::F32(b), SliceMut::F32(o)) => narrow(&s, a, b, o),
        (Slice::F64(a), Slice::F64(b), SliceMut::F64(o)) => products(&s, a, b, o),
        (Slice::F16(a), Slice::F16(b), SliceMut::F16(o)) => narrow(&s, a, b, o),
        (Slice::BF16(a), Slice::BF16(b), SliceMut::BF16(o)) => narrow(&s, a, b, o),
        _ => Err(Error::unsupported(OP, "this mix of dtypes")),
    }
}

/// Calls `f(a's matrix, b's matrix, range of the output)` for each product to make, folding batches into rows where
/// the right side is the same for all.
fn each_product(s: &Batched, mut f: impl FnMut(Matrix, Matrix, std::ops::Range<usize>) -> Result<()>) -> Result<()> {
    let rank = s.a.dims.len();
    let matrix = |l: &Strided, offset: usize, rows: usize, cols: usize| Matrix {
        offset,
        rows,
        cols,
        row_stride: l.strides[rank - 2],
        col_stride: if fault::active("matmul.col_stride") { 1 } else { l.strides[rank - 1] },
    };
    let batches = count(&s.batch);
    let invariant = s.batch.iter().zip(&s.b.strides).all(|(&d, &st)| d == 1 || st == 0);
    if batches > 1 && (invariant || fault::active("matmul.fold")) {
        if let Some(flat) = s.a.reshape(&[batches * s.m, s.k]) {
            return f(Matrix::of(&flat), matrix(&s.b, s.b.offset, s.k, s.n), 0..batches * s.m * s.n);
        }
    }
    let lead = |l: &Strided| Strided { dims: s.batch.clone(), strides: l.strides[..rank - 2].into(), offset: l.offset };
    let space = Space::new(&s.batch, 0, &[lead(&s.a), lead(&s.b)]);
    let [oa, ob] = space.operands.as_slice() else {
        return Ok(());
    };
    let (sa, sb) = (oa.row.single().unwrap_or(0), ob.row.single().unwrap_or(0));
    let sa = if fault::active("matmul.batch_stride_a") { 0 } else { sa };
    let sb = if fault::active("matmul.batch_stride_b") { 0 } else { sb };
    let (mut fa, mut fb) = (Offsets::new(), Offsets::new());
    let mut at = 0;
    for row in 0..space.rows {
        space.offsets(oa, row, 1, &mut fa);
        space.offsets(ob, row, 1, &mut fb);
        let (Some(&a0), Some(&b0)) = (fa.first(), fb.first()) else {
            continue;
        };
        for j in 0..space.cols {
            f(matrix(&s.a, a0 + j * sa, s.m, s.k), matrix(&s.b, b0 + j * sb, s.k, s.n), at..at + s.m * s.n)?;
            at += s.m * s.n;
        }
    }
    Ok(())
}

fn products<T: Element + gemm_scalar::Scalar>(s: &Batched, a: &[T], b: &[T], out: &mut [T]) -> Result<()> {
    each_product(s, |am, bm, range| gemm_into(a, am, b, bm, &mut out[range], false, T::from_f32(1.0)))
}

/// Inner products. A row of a that is no run of elements is copied to one, and so is a b that has neither rows nor columns that are.
fn narrow<E: Narrow>(s: &Batched, a: &[E], b: &[E], out: &mut [E]) -> Result<()> {
    let (mut wide, mut right, mut sums, mut last) = (Vec::new(), Vec::new(), Vec::new(), None);
    each_product(s, |am, bm, range| {
        if s.k == 0 {
            out[range].fill(E::from_f32(fault::one_if("matmul.empty_k") as f32));
            return Ok(());
        }
        let out = &mut out[range];
        if flips(am, bm) {
            return flipped(a, am, b, bm, out, &mut wide, &mut sums);
        }
        // the same right side for many batches is copied once
        let stale = last != Some(bm.offset) && !(last.is_some() && fault::active("matmul.stale_widened"));
        if stale && !bm.has_runs() {
            widen_matrix(b, bm, &mut right);
            last = Some(bm.offset);
        }
        each_side!(Side::of(b, bm, &right)?, w => inner(a, am, w, out, &mut wide, &mut sums))
    })
}

/// Whether a product is made as the transpose of bᵀ·aᵀ: where a's columns are runs of elements, as those of xᵀ in the gradient xᵀ·g of a
/// weight, they are what a right side may be, and b is less to turn.
fn flips(a: Matrix, b: Matrix) -> bool {
    a.row_stride == 1 && a.col_stride != 1 && a.cols > 1 && b.cols < a.rows
}

/// One product as the transpose of bᵀ·aᵀ, with the same bits: each factor of a term may come first, and the terms keep their order.
fn flipped<E: Narrow>(
    a: &[E],
    am: Matrix,
    b: &[E],
    bm: Matrix,
    out: &mut [E],
    wide: &mut Vec<f32>,
    sums: &mut Vec<f32>,
) -> Result<()> {
    let (m, n, k) = (am.rows, bm.cols, am.cols);
    let turned =
        |m: Matrix| Matrix { rows: m.cols, cols: m.rows, row_stride: m.col_stride, col_stride: m.row_stride, ..m };
    widen_matrix(b, turned(bm), wide);
    sums.clear();
    sums.resize(m * n, 0.0);
    let x = Rows::new(wide, n, k, k)?;
    each_side!(Side::of(a, turned(am), &[])?, w => dots_parallel(x, w, Grid::new(sums, n, m, m)?))?;
    let columns = Matrix { offset: 0, rows: m, cols: n, row_stride: 1, col_stride: m };
    widen_matrix(sums, columns, wide);
    damage(wide);
    E::round_from(wide, out);
    Ok(())
}

/// One product; `wide` and `sums` are memory for it.
fn inner<E: Narrow>(
    a: &[E],
    am: Matrix,
    w: impl Right,
    out: &mut [E],
    wide: &mut Vec<f32>,
    sums: &mut Vec<f32>,
) -> Result<()> {
    let n = w.count();
    // a fault: the last row is missing
    let am = Matrix { rows: am.rows - fault::one_if("dots.last_row"), ..am };
    if let Some((a, out)) = E::as_f32(a, out) {
        let x = if am.col_stride == 1 || am.cols == 1 {
            Rows::new(a.get(am.offset..).unwrap_or_default(), am.rows, am.row_stride, am.cols)?
        } else {
            widen_matrix(a, am, wide);
            Rows::new(wide, am.rows, am.cols, am.cols)?
        };
        dots_parallel(x, w, Grid::new(out, am.rows, n, n)?)?;
        damage(out);
        return Ok(());
    }
    widen_matrix(a, am, wide);
    sums.clear();
    sums.resize(out.len(), 0.0);
    let x = Rows::new(wide, am.rows, am.cols, am.cols)?;
    dots_parallel(x, w, Grid::new(sums, am.rows, n, n)?)?;
    damage(sums);
    if fault::active("dots.bf16_truncates") {
        for s in sums.iter_mut() {
            *s = f32::from_bits(s.to_bits() & 0xffff_0000);
        }
    }
    E::round_from(sums, out);
    Ok(())
}

/// Faults: sums in f16, a last element that is off.
fn damage(sums: &mut [f32]) {
    if fault::active("dots.f16") {
        for x in sums.iter_mut() {
            *x = half::f16::from_f32(*x).to_f32();
        }
    }
    if let (true, Some(x)) = (fault::active("dots.tail"), sums.last_mut()) {
        *x = *x * 1.001 + 1e-3;
    }
}

/// Widens a matrix to a dense f32 one. Where its columns are runs of elements (a gradient xᵀ·g has such a left side) it is turned square by
/// square, so that no cache line is fetched once for each of its elements, and by the team.
pub(crate) fn widen_matrix<T: Element>(src: &[T], m: Matrix, out: &mut Vec<f32>) {
    let len = m.rows * m.cols;
    if out.len() == len {
        spoil(&mut SliceMut::F32(out));
    } else {
        *out = fresh(len);
    }
    if m.cols == 0 {
        return;
    }
    if m.row_stride == 1 && m.col_stride != 1 {
        let src = src.get(m.offset..).unwrap_or_default();
        // about twice the time of a copy
        let ns = 2 * team::moving(out);
        team::each_chunk(ns, out, square::SIDE * m.cols, |first, part| {
            square::turn(src, (first * square::SIDE, m.col_stride), m.cols, part);
        });
        return;
    }
    for (i, row) in out.chunks_exact_mut(m.cols).enumerate() {
        let at = m.offset + i * m.row_stride;
        if m.col_stride == 1 {
            T::widen(&src[at..at + m.cols], row);
        } else {
            for (j, d) in row.iter_mut().enumerate() {
                *d = src[at + j * m.col_stride].to_f32();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    //! The library call against a checked loop over the same operands.

    use super::*;

    /// What `gemm_into` computes, by indexing.
    fn checked(a: &[f64], am: Matrix, b: &[f64], bm: Matrix, dst: &mut [f64], acc: bool, beta: f64) {
        for i in 0..am.rows {
            for j in 0..bm.cols {
                let mut s = 0.0;
                for l in 0..am.cols {
                    s += a[am.offset + i * am.row_stride + l * am.col_stride]
                        * b[bm.offset + l * bm.row_stride + j * bm.col_stride];
                }
                let d = &mut dst[i * bm.cols + j];
                *d = beta * s + if acc { *d } else { 0.0 };
            }
        }
    }

    #[test]
    fn the_library_call_is_the_checked_loop() {
        let data: Vec<f64> = (0..400).map(|i| ((i * 37 % 101) as f64 - 50.0) / 16.0).collect();
        for (m, n, k) in [(1, 1, 1), (3, 4, 5), (1, 7, 6), (6, 1, 4), (2, 3, 0), (0, 2, 2), (5, 5, 17)] {
            for (rs, cs) in [(k.max(1) + 2, 1), (1, m.max(1) + 1), (0, 1), (2, 0)] {
                for acc in [false, true] {
                    let am = Matrix { offset: 3, rows: m, cols: k, row_stride: rs, col_stride: cs };
                    let bm = Matrix { offset: 1, rows: k, cols: n, row_stride: 1, col_stride: k + 1 };
                    let start: Vec<f64> = (0..m * n).map(|i| i as f64).collect();
                    let (mut got, mut want) = (start.clone(), start);
                    gemm_into(&data, am, &data, bm, &mut got, acc, 0.5).unwrap();
                    checked(&data, am, &data, bm, &mut want, acc, 0.5);
                    for (g, w) in got.iter().zip(&want) {
                        assert!((g - w).abs() < 1e-10, "{m}x{k}x{n} {rs} {cs}: {g} {w}");
                    }
                }
            }
        }
    }

    #[test]
    fn matrices_past_their_data_are_refused() {
        let data = [1.0f32; 12];
        let good = Matrix::dense(0, 3, 4);
        let mut out = [0.0; 9];
        let t = Matrix { row_stride: 1, col_stride: 4, rows: 4, cols: 3, offset: 0 };
        assert!(gemm_into(&data, good, &data, t, &mut out, false, 1.0).is_ok());
        let past = Matrix { offset: 1, ..good };
        assert!(gemm_into(&data, past, &data, t, &mut out, false, 1.0).is_err());
        let wide = Matrix { row_stride: usize::MAX, ..good };
        assert!(gemm_into(&data, wide, &data, t, &mut out, false, 1.0).is_err());
        assert!(gemm_into(&data, good, &data, t, &mut out[..8], false, 1.0).is_err());
    }
}
