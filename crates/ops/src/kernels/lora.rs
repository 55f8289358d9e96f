//! LoRA: two skinny products, optionally on top of a base.

use super::matmul::{gemm_into, gemm_scalar::Scalar, widen_matrix, Matrix};
use super::{check_float, check_out};
use crate::element::Element;
use crate::error::{Error, Result};
use crate::fault;
use crate::row::space::Space;
use crate::view::{count, Slice, SliceMut, Strided, View};
use half::{bf16, f16};

const OP: &str = "lora";
/// Rows that are widened together for f16 and bf16.
const ROWS: usize = 256;

/// `(x·A)·B·scale`, plus `base` if there is one: x `(…, in)`, a `(in, r)`, b `(r, out)`, base and output `(…, out)`.
///
/// `x·A` is computed once for all outputs, into scratch of r numbers per row; a contiguous x is read in place. f16
/// and bf16 accumulate in f32 and round once, at the end.
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
    let matrix = |v: &View<'_>, rows, cols| Matrix {
        offset: v.layout.offset,
        rows,
        cols,
        row_stride: v.layout.strides[0],
        col_stride: v.layout.strides[1],
    };
    let job = Job { blocks: row_blocks(&x.layout, rows, *k), a: matrix(a, *k, r), b: matrix(b, r, n), base, scale };
    match (x.data, a.data, b.data, out) {
        (Slice::F32(x), Slice::F32(a), Slice::F32(b), SliceMut::F32(o)) => job.direct(x, a, b, o),
        (Slice::F64(x), Slice::F64(a), Slice::F64(b), SliceMut::F64(o)) => job.direct(x, a, b, o),
        (Slice::F16(x), Slice::F16(a), Slice::F16(b), SliceMut::F16(o)) => job.widened::<f16>(x, a, b, o),
        (Slice::BF16(x), Slice::BF16(a), Slice::BF16(b), SliceMut::BF16(o)) => job.widened::<bf16>(x, a, b, o),
        _ => Err(Error::unsupported(OP, "this mix of dtypes")),
    }
}

/// x as the fewest matrices that cover its rows in order: one where its leading dims merge.
fn row_blocks(x: &Strided, rows: usize, k: usize) -> Vec<Matrix> {
    if let Some(flat) = x.reshape(&[rows, k]) {
        return vec![Matrix {
            offset: flat.offset,
            rows,
            cols: k,
            row_stride: flat.strides[0],
            col_stride: flat.strides[1],
        }];
    }
    let rank = x.dims.len();
    let lead = Strided { dims: x.dims[..rank - 1].into(), strides: x.strides[..rank - 1].into(), offset: x.offset };
    let space = Space::new(&lead.dims, 0, std::slice::from_ref(&lead));
    let Some(operand) = space.operands.first() else {
        return Vec::new();
    };
    let mut offsets = Vec::new();
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

impl Job<'_> {
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
                mid.clear();
                mid.resize(rows * r, 0.0);
                let (xm, am) = (Matrix::dense(0, rows, k), Matrix::dense(0, k, r));
                gemm_into(&wx, xm, &wa, am, &mut mid, false, 1.0)?;
                if fault::active("lora.rounded_middle") {
                    for m in &mut mid {
                        *m = T::from_f32(*m).to_f32();
                    }
                }
                let end = at + rows * n;
                sum.clear();
                match base.get(at..end) {
                    Some(b) => sum.extend_from_slice(b),
                    None => sum.resize(rows * n, 0.0),
                }
                let (mm, bm) = (Matrix::dense(0, rows, r), Matrix::dense(0, r, n));
                let has_base = self.base.is_some();
                gemm_into(&mid, mm, &wb, bm, &mut sum, has_base, self.scale as f32)?;
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
