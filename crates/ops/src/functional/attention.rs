//! Attention on tensors: the kernel where it serves, composed differentiable ops where it does not.

use super::{alike, float, matmul, softmax, wide};
use crate::error::Error;
use crate::fault;
use crate::kernels::{self, AttentionParams};
use crate::storage::{cpu_view, filled, with_view};
use crate::view::{SliceMut, Strided, View};
use candle_core::{CpuStorage, CustomOp3, DType, Device, Layout, Result, Shape, Tensor, D};
use std::sync::Arc;

/// `softmax(q·kᵀ·scale + mask)·v` for q `(b, h, sq, d)`, k `(b, hk, skv, d)`, v `(b, hk, skv, dv)` of one float dtype, `h % hk == 0`;
/// the result is `(b, h, sq, dv)`. `mask` is additive, a float of any type, and broadcasts to `(b, h, sq, skv)`.
///
/// On the CPU, with a mask that is not tracked, kernels run, and no matrix of scores is stored, nor is one in the backward pass; a tracked
/// mask and other devices take composed ops. A query that sees no key gives NaN, as eager attention does.
///
/// # Errors
/// Shapes that do not fit, dtypes or devices that differ, a dtype that is not a float.
pub fn attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    mask: Option<&Tensor>,
    params: &AttentionParams,
) -> Result<Tensor> {
    const OP: &str = "attention";
    float(OP, q)?;
    alike(OP, "k", q, k)?;
    alike(OP, "v", q, v)?;
    let bad = || {
        Error::shape(
            OP,
            format!("q {:?}, k {:?}, v {:?}, mask {:?}", q.dims(), k.dims(), v.dims(), mask.map(|m| m.dims())),
        )
    };
    let (&[b, h, sq, d], &[kb, hk, skv, kd], &[vb, vh, vs, _]) = (q.dims(), k.dims(), v.dims()) else {
        return Err(bad().into());
    };
    let grouped = hk != 0 && h % hk == 0 || h == 0 && hk == 0;
    if kb != b || vb != b || vh != hk || vs != skv || kd != d || !grouped {
        return Err(bad().into());
    }
    if let Some(m) = mask {
        float(OP, m)?;
        if m.broadcast_as((b, h, sq, skv)).is_err() {
            return Err(bad().into());
        }
    }
    let tracked_mask = mask.is_some_and(|m| m.track_op());
    if !q.device().is_cpu() || tracked_mask {
        return composed(q, k, v, mask, params);
    }
    let mask = match mask {
        None => None,
        Some(m) => Some(Arc::new(Snapshot::of(m)?)),
    };
    let op = Attention { params: *params, mask };
    q.apply_op3(k, v, op)
}

/// A dense copy of a mask or a gradient: a kernel reads it while the storages of q, k and v are locked, one of which may be its own.
struct Snapshot {
    storage: CpuStorage,
    dims: Vec<usize>,
}

impl Snapshot {
    fn of(mask: &Tensor) -> Result<Self> {
        let dims = mask.dims().to_vec();
        let storage = with_view(mask, |view| {
            filled("attention", view.dtype(), view.layout.elem_count(), |out| {
                kernels::copy_into(&view, out, &Strided::contiguous(view.dims()))
            })
        })?;
        Ok(Self { storage, dims })
    }

    fn view(&self) -> Option<View<'_>> {
        let data = crate::storage::cpu_slice(&self.storage)?;
        View::new(data, Strided::contiguous(&self.dims)).ok()
    }
}

struct Attention {
    params: AttentionParams,
    mask: Option<Arc<Snapshot>>,
}

impl CustomOp3 for Attention {
    fn name(&self) -> &'static str {
        "attention"
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
        let q = cpu_view("attention", s1, l1)?;
        let k = cpu_view("attention", s2, l2)?;
        let v = cpu_view("attention", s3, l3)?;
        let mask = self.mask.as_ref().and_then(|m| m.view());
        let mut dims = l1.dims().to_vec();
        if let (Some(last), Some(&dv)) = (dims.last_mut(), l3.dims().last()) {
            *last = dv;
        }
        let shape = Shape::from(dims);
        let out = filled("attention", q.dtype(), shape.elem_count(), |out: &mut SliceMut<'_>| {
            kernels::attention(&q, &k, &v, mask.as_ref(), &self.params, out)
        })?;
        Ok((out, shape))
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        _res: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let op = AttentionBackward { params: self.params, grad: Snapshot::of(grad)?, mask: self.mask.clone() };
        let all = q.detach().apply_op3_no_bwd(&k.detach(), &v.detach(), &op)?;
        let mut from = 0;
        let mut next = |x: &Tensor| -> Result<Option<Tensor>> {
            let part = all.narrow(0, from, x.elem_count())?;
            from += x.elem_count();
            if !x.track_op() {
                return Ok(None);
            }
            // a view would keep all of them alive
            part.force_contiguous()?.reshape(x.shape()).map(Some)
        };
        let (dq, dk, dv) = (next(q)?, next(k)?, next(v)?);
        Ok((dq, dk.filter(|_| !fault::active("grad.attention.no_key")), dv))
    }
}

/// The gradients of q, k and v behind one another, as one row.
struct AttentionBackward {
    params: AttentionParams,
    grad: Snapshot,
    mask: Option<Arc<Snapshot>>,
}

impl CustomOp3 for AttentionBackward {
    fn name(&self) -> &'static str {
        "attention-backward"
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
        const OP: &str = "attention-backward";
        let (q, k, v) = (cpu_view(OP, s1, l1)?, cpu_view(OP, s2, l2)?, cpu_view(OP, s3, l3)?);
        let Some(grad) = self.grad.view() else {
            return Err(Error::unsupported(OP, "this gradient has no kernels").into());
        };
        let mask = self.mask.as_ref().and_then(|m| m.view());
        let len = [l1, l2, l3].iter().map(|l| l.shape().elem_count()).sum();
        let out = filled(OP, q.dtype(), len, |out: &mut SliceMut<'_>| {
            kernels::attention_backward(&q, &k, &v, &grad, mask.as_ref(), &self.params, out)
        })?;
        Ok((out, Shape::from(len)))
    }
}

/// Additive form of the causal and window rules, `(sq, skv)`.
fn rules(params: &AttentionParams, sq: usize, skv: usize, dtype: DType, device: &Device) -> Result<Option<Tensor>> {
    if !params.causal && params.window.is_none() {
        return Ok(None);
    }
    let mut bias = Vec::with_capacity(sq * skv);
    for i in 0..sq {
        let (start, end) = kernels::visible(params, i, sq, skv);
        bias.extend((0..skv).map(|j| if (start..end).contains(&j) { 0f32 } else { f32::NEG_INFINITY }));
    }
    let bias = Tensor::from_vec(bias, (sq, skv), device)?;
    bias.to_dtype(dtype).map(Some)
}

/// Scores of all queries against all keys, `(b, hk, h/hk·sq, skv)`: a key head's queries are rows of one product.
fn scores(q: &Tensor, k: &Tensor, mask: Option<&Tensor>, params: &AttentionParams) -> Result<Tensor> {
    let (b, h, sq, d) = q.dims4()?;
    let (_, hk, skv, _) = k.dims4()?;
    let rows = h / hk.max(1) * sq;
    let q = q.reshape((b, hk, rows, d))?;
    let mut s = (matmul(&q, &k.t()?)? * params.scale)?;
    if let Some(cap) = params.softcap {
        s = ((s / cap)?.tanh()? * cap)?;
    }
    let rules = rules(params, sq, skv, s.dtype(), s.device())?;
    if mask.is_some() || rules.is_some() {
        let mut full = s.reshape((b, h, sq, skv))?;
        for m in mask.into_iter().chain(rules.as_ref()) {
            full = full.broadcast_add(&m.to_dtype(full.dtype())?)?;
        }
        s = full.reshape((b, hk, rows, skv))?;
    }
    Ok(s)
}

/// The same function of differentiable ops.
fn composed(q: &Tensor, k: &Tensor, v: &Tensor, mask: Option<&Tensor>, params: &AttentionParams) -> Result<Tensor> {
    let (dtype, w) = (q.dtype(), wide(q.dtype()));
    let (b, h, sq, _) = q.dims4()?;
    let dv = v.dim(D::Minus1)?;
    let s = scores(&q.to_dtype(w)?, &k.to_dtype(w)?, mask, params)?;
    let p = softmax(&s, D::Minus1)?;
    let y = matmul(&p, &v.to_dtype(w)?)?;
    y.reshape((b, h, sq, dv))?.to_dtype(dtype)
}
