//! Rotary position embedding.

use super::{check_float, check_out, team, PARALLEL};
use crate::element::Element;
use crate::error::{Error, Result};
use crate::fault;
use crate::math::Real;
use crate::view::{each_dtype, Slice, SliceMut, View};
use candle_core::DType;

const OP: &str = "rope";

/// Rotates pairs of elements of x `(b, h, s, d)` by angles whose cosines and sines are `(s, d/2)` or `(b, s, d/2)`
/// (longer tables are read from their first row on). Pairs are `(j, j + d/2)`, or `(2j, 2j + 1)` if `interleaved`; (p, q)
/// becomes (p·cos - q·sin, p·sin + q·cos) (Su et al. 2021).
///
/// f16 and bf16 compute in f32 and round once; their tables may be f32.
///
/// # Errors
/// `ShapeMismatch` (also for an odd d), `DTypeMismatch`, `Unsupported` (not a float), `OutOfBounds`.
pub fn rope(x: &View<'_>, cos: &View<'_>, sin: &View<'_>, interleaved: bool, out: &mut SliceMut<'_>) -> Result<()> {
    x.check()?;
    cos.check()?;
    sin.check()?;
    check_float(OP, x.dtype())?;
    let bad =
        |why: &str| Error::shape(OP, format!("x {:?}, cos {:?}, sin {:?}: {why}", x.dims(), cos.dims(), sin.dims()));
    let &[b, h, s, d] = x.dims() else {
        return Err(bad("x must be (batch, heads, positions, head dim)"));
    };
    if d % 2 != 0 {
        return Err(bad("the head dim must be even"));
    }
    for (what, t) in [("cos", cos), ("sin", sin)] {
        let fits = match *t.dims() {
            [rows, half] => rows >= s && half == d / 2,
            [tb, rows, half] => tb == b && rows >= s && half == d / 2,
            _ => false,
        };
        if !fits {
            return Err(bad("tables must be (positions, d/2) or (batch, positions, d/2)"));
        }
        let half = matches!(x.dtype(), DType::F16 | DType::BF16);
        if t.dtype() != x.dtype() && !(half && t.dtype() == DType::F32) {
            return Err(Error::dtypes(OP, what, x.dtype(), t.dtype()));
        }
    }
    check_out(OP, out, x.dtype(), b.saturating_mul(h).saturating_mul(s).saturating_mul(d))?;
    if out.is_empty() {
        return Ok(());
    }
    let job = Job { x, h, s, d, interleaved };
    // The tables in the arithmetic type, dense: (1 or b, s, d/2).
    match x.dtype() {
        DType::F64 => {
            let (c, n) = (table::<f64>(cos, s), table::<f64>(sin, s));
            if let (Slice::F64(src), SliceMut::F64(dst)) = (x.data, out) {
                job.run(src, &c, &n, dst);
            }
        }
        _ => {
            let (c, n) = (table::<f32>(cos, s), table::<f32>(sin, s));
            each_dtype!(SliceMut, out, dst => job.narrowed(&c, &n, dst));
        }
    }
    Ok(())
}

/// Copies the first `s` positions of a table into dense rows.
fn table<T: Real>(t: &View<'_>, s: usize) -> Vec<T> {
    let l = &t.layout;
    let rank = l.rank();
    let (half, hs, ss) = (l.dims[rank - 1], l.strides[rank - 1], l.strides[rank - 2]);
    let batches = if rank == 3 { (l.dims[0], l.strides[0]) } else { (1, 0) };
    let ss = if fault::active("rope.position") { 0 } else { ss };
    let hs = if fault::active("rope.table_stride") { 0 } else { hs };
    let mut out = Vec::with_capacity(batches.0 * s * half);
    each_dtype!(Slice, &t.data, v => {
        for b in 0..batches.0 {
            for p in 0..s {
                let base = l.offset + b * batches.1 + p * ss;
                out.extend((0..half).map(|j| T::get(v[base + j * hs])));
            }
        }
    });
    out
}

struct Job<'a> {
    x: &'a View<'a>,
    h: usize,
    s: usize,
    d: usize,
    interleaved: bool,
}

impl Job<'_> {
    fn narrowed<E: Element>(&self, cos: &[f32], sin: &[f32], dst: &mut [E]) {
        if let Some(src) = E::of(&self.x.data) {
            self.run(src, cos, sin, dst);
        }
    }

    fn run<T: Real, E: Element>(&self, src: &[E], cos: &[T], sin: &[T], dst: &mut [E]) {
        let d = self.d;
        let half_left_out = fault::one_if("rope.last_pair");
        let one = |row: usize, out: &mut [E]| {
            let (p, bh) = (row % self.s, row / self.s);
            let (b, h) = (bh / self.h, bh % self.h);
            let st = &self.x.layout.strides;
            let h = if fault::active("rope.head") { 0 } else { h };
            let base = self.x.layout.offset + b * st[0] + h * st[1] + p * st[2];
            let half = d / 2;
            let per_batch = cos.len() > self.s * half && !fault::active("rope.batch_cos");
            let t = (if per_batch { b * self.s } else { 0 } + p) * half;
            let per_batch_sin = sin.len() > self.s * half && !fault::active("rope.batch_sin");
            let u = (if per_batch_sin { b * self.s } else { 0 } + p) * half;
            let (cos, sin) = (&cos[t..t + half], &sin[u..u + half]);
            let step = st[3];
            let (cos, sin) = if fault::active("rope.tables") { (sin, cos) } else { (cos, sin) };
            if self.interleaved != fault::active("rope.pairs") {
                for (j, o) in out.chunks_exact_mut(2).enumerate() {
                    let (x, y) = (T::get(src[base + 2 * j * step]), T::get(src[base + (2 * j + 1) * step]));
                    o[0] = (x * cos[j] - y * sin[j]).put();
                    o[1] = (x * sin[j] + y * cos[j]).put();
                }
                return;
            }
            let (lo, hi) = out.split_at_mut(half);
            if step == 1 || fault::active("rope.step") {
                let (xs, ys) = src[base..base + d].split_at(half);
                for j in 0..half - half_left_out {
                    let (x, y) = (T::get(xs[j]), T::get(ys[j]));
                    lo[j] = (x * cos[j] - y * sin[j]).put();
                    hi[j] = (x * sin[j] + y * cos[j]).put();
                }
                return;
            }
            for j in 0..half {
                let (x, y) = (T::get(src[base + j * step]), T::get(src[base + (j + half) * step]));
                lo[j] = (x * cos[j] - y * sin[j]).put();
                hi[j] = (x * sin[j] + y * cos[j]).put();
            }
        };
        if dst.len() >= PARALLEL {
            team::each_chunk(team::moving(dst), dst, d, |first, out| {
                for (i, out) in out.chunks_mut(d).enumerate() {
                    one(first + i, out);
                }
            });
        } else {
            for (row, out) in dst.chunks_mut(d).enumerate() {
                one(row, out);
            }
        }
    }
}
