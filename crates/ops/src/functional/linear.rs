//! Matrix products, linear layers and LoRA.

use super::apply::{leading_axes, sum_axes, RowCall, Tracked2};
use super::{alike, float, wide};
use crate::error::Error;
use crate::fault;
use crate::kernels;
use crate::row::programs::Ready;
use crate::row::{BinaryFn as B, Class};
use crate::storage::{cpu_view, filled};
use candle_core::{CpuStorage, CustomOp2, CustomOp3, Layout, Result, Shape, Tensor};

/// `(…, m, k) x (…, k, n)` with broadcast batch dims.
struct MatMul;

/// Dims of a product.
fn product_dims(op: &'static str, a: &[usize], b: &[usize]) -> Result<Vec<usize>> {
    let bad = || Error::shape(op, format!("{a:?} x {b:?}"));
    let ([ab @ .., m, k], [bb @ .., kb, n]) = (a, b) else {
        return Err(bad().into());
    };
    if k != kb {
        return Err(bad().into());
    }
    let batch = Shape::from(ab.to_vec()).broadcast_shape_binary_op(&Shape::from(bb.to_vec()), op).map_err(|_| bad())?;
    let mut dims = batch.into_dims();
    dims.extend([*m, *n]);
    Ok(dims)
}

/// Sums a gradient over the batch dims that were broadcast, down to `dims`.
fn unbroadcast(grad: &Tensor, dims: &[usize]) -> Result<Tensor> {
    if grad.dims() == dims {
        return Ok(grad.clone());
    }
    let pad = grad.rank().saturating_sub(dims.len());
    let mut axes = 0u32;
    for (i, &d) in grad.dims().iter().enumerate() {
        if i < pad || dims.get(i - pad) != Some(&d) {
            axes |= 1 << i.min(31);
        }
    }
    if fault::active("grad.matmul.unbroadcast") {
        let mut g = grad.clone();
        for d in (0..grad.rank()).filter(|d| axes >> d & 1 == 1) {
            g = g.narrow(d, 0, 1)?;
        }
        return g.reshape(dims);
    }
    sum_axes(grad, axes, grad.dtype())?.reshape(dims)
}

impl CustomOp2 for MatMul {
    fn name(&self) -> &'static str {
        "matmul"
    }

    fn cpu_fwd(&self, s1: &CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> Result<(CpuStorage, Shape)> {
        let (a, b) = (cpu_view("matmul", s1, l1)?, cpu_view("matmul", s2, l2)?);
        let shape = Shape::from(product_dims("matmul", l1.dims(), l2.dims())?);
        let out = filled("matmul", a.dtype(), shape.elem_count(), |out| kernels::matmul(&a, &b, out))?;
        Ok((out, shape))
    }

    fn bwd(&self, a: &Tensor, b: &Tensor, _res: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (ad, bd, g) = (a.detach(), b.detach(), grad.detach());
        let da = match a.track_op() {
            true if fault::active("grad.matmul.a") => {
                Some(g.zeros_like()?.sum_all()?.broadcast_as(a.shape())?.contiguous()?)
            }
            true => Some(unbroadcast(&product(&g, &bd.t()?)?, a.dims())?),
            false => None,
        };
        let db = match b.track_op() && !fault::active("grad.matmul.no_b") {
            // One product where b serves all batches: the sum over them is part of it.
            true if b.rank() == 2 && a.rank() > 2 => {
                let (m, n) = b.dims2()?;
                let a2 = ad.reshape(((), m))?;
                let g2 = g.reshape(((), n))?;
                let rows = a2.dim(0)? - fault::one_if("grad.matmul.last_row").min(a2.dim(0)?);
                let (a2, g2) = (a2.narrow(0, 0, rows)?, g2.narrow(0, 0, rows)?);
                Some(product(&a2.t()?, &g2)?)
            }
            true => Some(unbroadcast(&product(&ad.t()?, &g)?, b.dims())?),
            false => None,
        };
        Ok((da, db))
    }
}

/// The product without a backward.
fn product(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    if a.device().is_cpu() {
        a.apply_op2_no_bwd(b, &MatMul)
    } else {
        a.broadcast_matmul(b)
    }
}

/// Matrix product `(…, m, k) x (…, k, n) -> (…, m, n)` of one float dtype, batch dims broadcast from the right. On the CPU bf16 works
/// too, and f16 and f32 gradients of a broadcast side are summed in f32.
///
/// # Errors
/// Shapes that do not fit, dtypes or devices that differ, a dtype that is not a float.
pub fn matmul(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    const OP: &str = "matmul";
    float(OP, a)?;
    alike(OP, "the right side", a, b)?;
    product_dims(OP, a.dims(), b.dims())?;
    if a.device().is_cpu() {
        a.apply_op2(b, MatMul)
    } else {
        a.broadcast_matmul(b)
    }
}

/// x + b for b `(n)` along the last dim, with the bias gradient summed in the arithmetic type.
fn add_bias(x: &Tensor, b: &Tensor) -> Result<Tensor> {
    let dtype = x.dtype();
    if Class::of(dtype).is_none() || !x.device().is_cpu() {
        return x.broadcast_add(b);
    }
    let call = RowCall::new("linear", Ready::Binary(B::Add).program(dtype)?, 0);
    let bwd = move |_: &Tensor, b: &Tensor, g: &Tensor| {
        let db = match b.track_op() {
            true if fault::active("grad.bias.sum") => Some(b.zeros_like()?),
            true => Some(sum_axes(g, leading_axes(g.rank()), dtype)?),
            false => None,
        };
        Ok((Some(g.clone()), db))
    };
    x.apply_op2(b, Tracked2(call, bwd))
}

/// `x·wᵀ + b` for x `(…, in)`, w `(out, in)`, b `(out)`: the layout of weights that Candle's `Linear` has.
///
/// # Errors
/// Shapes that do not fit, dtypes or devices that differ, a dtype that is not a float.
pub fn linear(x: &Tensor, w: &Tensor, b: Option<&Tensor>) -> Result<Tensor> {
    const OP: &str = "linear";
    float(OP, x)?;
    alike(OP, "the weight", x, w)?;
    let bad = || Error::shape(OP, format!("x {:?}, weight {:?}, bias {:?}", x.dims(), w.dims(), b.map(|b| b.dims())));
    let ([lead @ .., k], &[out, kw]) = (x.dims(), w.dims()) else {
        return Err(bad().into());
    };
    if *k != kw || b.is_some_and(|b| b.dims() != [out]) {
        return Err(bad().into());
    }
    let y = if lead.is_empty() { matmul(&x.unsqueeze(0)?, &w.t()?)?.squeeze(0)? } else { matmul(x, &w.t()?)? };
    match b {
        None => Ok(y),
        Some(b) => {
            alike(OP, "the bias", x, b)?;
            add_bias(&y, b)
        }
    }
}

/// `(x·A)·B·scale`.
struct Lora {
    scale: f64,
}

impl CustomOp3 for Lora {
    fn name(&self) -> &'static str {
        "lora"
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
        let x = cpu_view("lora", s1, l1)?;
        let a = cpu_view("lora", s2, l2)?;
        let b = cpu_view("lora", s3, l3)?;
        let dims = lora_dims(l1.dims(), l2.dims(), l3.dims())?;
        let shape = Shape::from(dims);
        let out =
            filled("lora", x.dtype(), shape.elem_count(), |out| kernels::lora(&x, &a, &b, None, self.scale, out))?;
        Ok((out, shape))
    }

    fn bwd(
        &self,
        x: &Tensor,
        a: &Tensor,
        b: &Tensor,
        _res: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let dtype = x.dtype();
        let flat = |t: &Tensor| -> Result<Tensor> {
            // not from the number of elements: a width may be 0
            let (n, rows) = t.dims().split_last().map_or((1, 1), |(&n, leading)| (n, leading.iter().product()));
            t.detach().to_dtype(wide(dtype))?.reshape((rows, n))
        };
        let (xf, g) = (flat(x)?, flat(grad)?);
        let (af, bf) = (flat(a)?, flat(b)?);
        // u = scale·g·Bᵀ serves dx and dA; x·A is made again, it is skinny.
        let u = product(&g, &bf.t()?)?;
        let u = if fault::active("grad.lora.scale") { u } else { (u * self.scale)? };
        let dx = match x.track_op() {
            true => Some(product(&u, &af.t()?)?.reshape(x.shape())?.to_dtype(dtype)?),
            false => None,
        };
        let da = match a.track_op() && !fault::active("grad.lora.no_a") {
            true => Some(product(&xf.t()?, &u)?.to_dtype(dtype)?),
            false => None,
        };
        let db = match b.track_op() {
            true => {
                let mid = product(&xf, &af)?;
                let mid = if fault::active("grad.lora.b") { mid } else { (mid * self.scale)? };
                Some(product(&mid.t()?, &g)?.to_dtype(dtype)?)
            }
            false => None,
        };
        Ok((dx, da, db))
    }
}

fn lora_dims(x: &[usize], a: &[usize], b: &[usize]) -> Result<Vec<usize>> {
    match (x, a, b) {
        ([lead @ .., k], [ka, r], [rb, n]) if k == ka && r == rb => {
            let mut dims = lead.to_vec();
            dims.push(*n);
            Ok(dims)
        }
        _ => Err(Error::shape("lora", format!("x {x:?}, A {a:?}, B {b:?}")).into()),
    }
}

/// `(x·A)·B·scale` for x `(…, in)`, a `(in, r)`, b `(r, out)`: two skinny products. f16 and bf16 accumulate in f32 and round once.
///
/// # Errors
/// Shapes that do not fit, dtypes or devices that differ, a dtype that is not a float.
pub fn lora(x: &Tensor, a: &Tensor, b: &Tensor, scale: f64) -> Result<Tensor> {
    const OP: &str = "lora";
    float(OP, x)?;
    alike(OP, "A", x, a)?;
    alike(OP, "B", x, b)?;
    let dims = lora_dims(x.dims(), a.dims(), b.dims())?;
    if x.device().is_cpu() {
        return x.apply_op3(a, b, Lora { scale });
    }
    let dtype = x.dtype();
    let wide = |t: &Tensor| t.to_dtype(super::wide(dtype));
    let k = x.dims().last().copied().unwrap_or(1);
    let rows = x.elem_count().checked_div(k).unwrap_or(0);
    let flat = wide(x)?.reshape((rows, k))?;
    let y = (flat.matmul(&wide(a)?)?.matmul(&wide(b)?)? * scale)?;
    y.reshape(dims)?.to_dtype(dtype)
}

/// `base + (x·A)·B·scale`; base has the shape of the result, `(…, out)`.
///
/// # Errors
/// Shapes that do not fit, dtypes or devices that differ, a dtype that is not a float.
pub fn lora_add(base: &Tensor, x: &Tensor, a: &Tensor, b: &Tensor, scale: f64) -> Result<Tensor> {
    const OP: &str = "lora-add";
    alike(OP, "the base", x, base)?;
    let dims = lora_dims(x.dims(), a.dims(), b.dims())?;
    if base.dims() != dims {
        return Err(Error::shape(OP, format!("base {:?}, result {dims:?}", base.dims())).into());
    }
    base.add(&lora(x, a, b, scale)?)
}
