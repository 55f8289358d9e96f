//! Rotary position embedding on tensors.

use super::{float, wide};
use crate::error::Error;
use crate::fault;
use crate::kernels;
use crate::storage::{cpu_view, filled};
use candle_core::{CpuStorage, CustomOp3, DType, Layout, Result, Shape, Tensor, D};

struct Rope {
    interleaved: bool,
}

/// The two halves of each pair: x is `(b, h, s, d)`, each half `(b, h, s, d/2)`.
fn halves(x: &Tensor, interleaved: bool) -> Result<(Tensor, Tensor)> {
    let (b, h, s, d) = x.dims4()?;
    if interleaved {
        let x = x.reshape((b, h, s, d / 2, 2))?;
        let part = |i| x.narrow(D::Minus1, i, 1)?.squeeze(D::Minus1);
        Ok((part(0)?, part(1)?))
    } else {
        Ok((x.narrow(D::Minus1, 0, d / 2)?, x.narrow(D::Minus1, d / 2, d / 2)?))
    }
}

/// A table as `(1 or b, 1, s, d/2)`.
fn spread(t: &Tensor) -> Result<Tensor> {
    match t.rank() {
        2 => t.unsqueeze(0)?.unsqueeze(0),
        _ => t.unsqueeze(1),
    }
}

impl CustomOp3 for Rope {
    fn name(&self) -> &'static str {
        "rope"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
        s3: &CpuStorage,
        l3: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let x = cpu_view("rope", s1, l1)?;
        let cos = cpu_view("rope", s2, l2)?;
        let sin = cpu_view("rope", s3, l3)?;
        let out = filled("rope", x.dtype(), l1.shape().elem_count(), |out| {
            kernels::rope(&x, &cos, &sin, self.interleaved, out)
        })?;
        Ok((out, l1.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        cos: &Tensor,
        sin: &Tensor,
        _res: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let interleaved = self.interleaved;
        if x.elem_count() == 0 {
            // Candle cannot narrow a tensor without elements; its gradients have none either, or are zero.
            let zeros = |t: &Tensor| t.track_op().then(|| t.detach().zeros_like()).transpose();
            return Ok((zeros(x)?, zeros(cos)?, zeros(sin)?));
        }
        let g = grad.detach();
        // The transpose of a rotation is the rotation by the opposite angle.
        let dx = match x.track_op() {
            true => {
                let back = if fault::active("grad.rope.angle") { sin.detach() } else { sin.detach().neg()? };
                Some(g.apply_op3_no_bwd(&cos.detach(), &back, &Rope { interleaved })?)
            }
            false => None,
        };
        if !cos.track_op() && !sin.track_op() {
            return Ok((dx, None, None));
        }
        let w = wide(x.dtype());
        let (p, q) = halves(&x.detach().to_dtype(w)?, interleaved)?;
        let (gp, gq) = halves(&g.to_dtype(w)?, interleaved)?;
        let reduce = |t: Tensor, table: &Tensor| -> Result<Tensor> {
            let t = t.sum(1)?;
            let t = match table.rank() {
                2 if fault::active("grad.rope.batch") => t.get(0)?,
                2 => t.sum(0)?,
                _ => t,
            };
            t.to_dtype(table.dtype())
        };
        let dcos = match cos.track_op() {
            true if fault::active("grad.rope.cos") => Some(reduce(gp.mul(&p)?, cos)?),
            true => Some(reduce((gp.mul(&p)? + gq.mul(&q)?)?, cos)?),
            false => None,
        };
        let dsin = match sin.track_op() && !fault::active("grad.rope.no_sin") {
            true => Some(reduce((gq.mul(&p)? - gp.mul(&q)?)?, sin)?),
            false => None,
        };
        Ok((dx, dcos, dsin))
    }
}

fn apply(x: &Tensor, cos: &Tensor, sin: &Tensor, interleaved: bool) -> Result<Tensor> {
    const OP: &str = "rope";
    float(OP, x)?;
    let bad =
        |why: &str| Error::shape(OP, format!("x {:?}, cos {:?}, sin {:?}: {why}", x.dims(), cos.dims(), sin.dims()));
    let &[b, _, s, d] = x.dims() else {
        return Err(bad("x must be (batch, heads, positions, head dim)").into());
    };
    if d % 2 != 0 {
        return Err(bad("the head dim must be even").into());
    }
    let mut tables = Vec::with_capacity(2);
    for (what, t) in [("cos", cos), ("sin", sin)] {
        float(OP, t)?;
        let half = matches!(x.dtype(), DType::F16 | DType::BF16);
        if t.dtype() != x.dtype() && !(half && t.dtype() == DType::F32) {
            return Err(Error::dtypes(OP, what, x.dtype(), t.dtype()).into());
        }
        // A longer table is read from its first position on; narrowing it here keeps its gradient on the tape.
        tables.push(match *t.dims() {
            [rows, half] if rows >= s && half == d / 2 => t.narrow(0, 0, s)?,
            [tb, rows, half] if tb == b && rows >= s && half == d / 2 => t.narrow(1, 0, s)?,
            _ => return Err(bad("tables must be (positions, d/2) or (batch, positions, d/2)").into()),
        });
    }
    let [cos, sin] = tables.as_slice() else {
        return Err(bad("tables").into());
    };
    if x.device().is_cpu() {
        return x.apply_op3(cos, sin, Rope { interleaved });
    }
    let w = wide(x.dtype());
    let (p, q) = halves(&x.to_dtype(w)?, interleaved)?;
    let (c, n) = (spread(&cos.to_dtype(w)?)?, spread(&sin.to_dtype(w)?)?);
    let y0 = (p.broadcast_mul(&c)? - q.broadcast_mul(&n)?)?;
    let y1 = (p.broadcast_mul(&n)? + q.broadcast_mul(&c)?)?;
    let y = if interleaved {
        Tensor::stack(&[y0, y1], D::Minus1)?.flatten_from(D::Minus2)?
    } else {
        Tensor::cat(&[y0, y1], D::Minus1)?
    };
    y.to_dtype(x.dtype())
}

/// Rotary embedding of x `(b, h, s, d)` with pairs `(j, j + d/2)`; cos and sin are `(s, d/2)` or `(b, s, d/2)`, of x's dtype (or f32
/// for f16 and bf16); longer tables are read from position 0 on.
///
/// # Errors
/// Shapes that do not fit (also an odd d), dtypes that differ, a dtype that is not a float.
pub fn rope(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    apply(x, cos, sin, false)
}

/// [`rope`] with interleaved pairs `(2j, 2j + 1)`.
///
/// # Errors
/// As [`rope`].
pub fn rope_i(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    apply(x, cos, sin, true)
}
