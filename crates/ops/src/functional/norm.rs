//! RMS norm and layer norm over the last dim.

use super::apply::{axis, leading_axes, sum_axes, RowCall, Tracked1, Tracked2, Tracked3};
use super::{alike, float, wide};
use crate::error::Error;
use crate::fault;
use crate::row::programs::Ready;
use crate::row::{BinaryFn as B, Builder, Class, ReduceFn, Reg, RowProgram, UnaryFn as U};
use candle_core::{DType, Result, Tensor, D};

/// The last dim of x, and the checks that every norm makes.
fn check(op: &'static str, x: &Tensor, params: &[(&str, Option<&Tensor>)]) -> Result<usize> {
    float(op, x)?;
    let Some(&n) = x.dims().last() else {
        return Err(Error::shape(op, "a scalar has no dim to normalise").into());
    };
    for (what, t) in params {
        if let Some(t) = t {
            alike(op, what, x, t)?;
            if t.dims() != [n] {
                return Err(Error::shape(op, format!("{what} {:?} for x {:?}", t.dims(), x.dims())).into());
            }
        }
    }
    Ok(n)
}

fn class(op: &'static str, dtype: DType) -> Result<Class> {
    Ok(Class::of(dtype).ok_or_else(|| Error::unsupported(op, format!("dtype {}", dtype.as_str())))?)
}

fn mean(b: &mut Builder, x: Reg) -> Reg {
    let s = b.reduce(ReduceFn::Sum, x);
    let n = b.row_len();
    b.binary(B::Div, s, n)
}

/// The normalised x and its scale: x/√(mean x² + eps), after subtracting the mean if `centre`; rounded as the forward rounds.
fn normalised(b: &mut Builder, x: Reg, centre: bool) -> (Reg, Reg) {
    let x = if centre {
        let m = mean(b, x);
        b.binary(B::Sub, x, m)
    } else {
        x
    };
    let sqr = b.unary(U::Sqr, x);
    let root = if fault::active("grad.norm.eps") {
        let var = mean(b, sqr);
        b.unary(U::Sqrt, var)
    } else {
        let squares = b.reduce(ReduceFn::Sum, sqr);
        b.root_mean(squares, 0)
    };
    let hat = b.binary(B::Quotient, x, root);
    (hat, root)
}

/// A norm, and what its gradients need.
#[derive(Clone, Copy)]
pub(super) struct Norm {
    pub(super) op: &'static str,
    pub(super) centre: bool,
    pub(super) eps: f64,
    /// The axes of a row.
    pub(super) axes: u32,
    /// The axes along which one weight serves.
    pub(super) shared: u32,
    pub(super) class: Class,
    pub(super) dtype: DType,
}

impl Norm {
    fn call(&self, b: Builder) -> Result<RowCall> {
        Ok(RowCall::new(self.op, b.finish()?, self.axes).with_params(&[self.eps]))
    }

    /// dx = (h - [mean h] - x̂·mean(h·x̂)) / scale for h = g·w; the mean of h only where the norm centres.
    fn d_x(&self, x: &Tensor, w: Option<&Tensor>, g: &Tensor) -> Result<Tensor> {
        let w = w.filter(|_| !fault::active("grad.norm.weight_factor"));
        let mut b = RowProgram::builder(self.class);
        let (x_, g_) = (b.load(0), b.load(1));
        let h = match w {
            Some(_) => {
                let w_ = b.load(2);
                b.binary(B::Mul, g_, w_)
            }
            None => g_,
        };
        let (hat, root) = normalised(&mut b, x_, self.centre);
        let mut d = h;
        if self.centre && !fault::active("grad.norm.mean") {
            let mh = mean(&mut b, h);
            d = b.binary(B::Sub, d, mh);
        }
        // of the centred h: the mean of x̂ is zero but for rounding, which a large mean of h would multiply
        let p = b.binary(B::Mul, d, hat);
        let mp = mean(&mut b, p);
        let along = b.binary(B::Mul, hat, mp);
        let d = if fault::active("grad.norm.along") { d } else { b.binary(B::Sub, d, along) };
        let dx = b.binary(B::Quotient, d, root);
        b.output(dx, self.dtype);
        let call = self.call(b)?;
        match w {
            Some(w) => call.detached(&[x, g, w]),
            None => call.detached(&[x, g]),
        }
    }

    /// dw = Σ of g·x̂ over what shares the weight, summed in the arithmetic type, in the weight's shape.
    fn d_weight(&self, x: &Tensor, w: &Tensor, g: &Tensor) -> Result<Tensor> {
        let mut b = RowProgram::builder(self.class);
        let (x_, g_) = (b.load(0), b.load(1));
        let (hat, _) = normalised(&mut b, x_, self.centre);
        let p = if fault::active("grad.norm.weight") { g_ } else { b.binary(B::Mul, g_, hat) };
        b.output(p, wide(self.dtype));
        let p = self.call(b)?.detached(&[x, g])?;
        sum_axes(&p, self.shared, self.dtype)?.reshape(w.shape())
    }

    fn d_bias(&self, b: &Tensor, g: &Tensor) -> Result<Tensor> {
        let g = if fault::active("grad.norm.bias") { (g * 2.0)? } else { g.clone() };
        sum_axes(&g, self.shared, self.dtype)?.reshape(b.shape())
    }

    /// Gradients of x and the weight.
    fn grads(&self, x: &Tensor, w: &Tensor, g: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (xd, wd) = (x.detach(), w.detach());
        let dx = x.track_op().then(|| self.d_x(&xd, Some(&wd), g)).transpose()?;
        let dw =
            (w.track_op() && !fault::active("grad.norm.no_weight")).then(|| self.d_weight(&xd, w, g)).transpose()?;
        Ok((dx, dw))
    }

    /// x normalised by `call`, times the weight and plus the bias as present, with this backward on the tape.
    pub(super) fn apply(
        self,
        x: &Tensor,
        weight: Option<&Tensor>,
        bias: Option<&Tensor>,
        call: RowCall,
    ) -> Result<Tensor> {
        match (weight, bias) {
            (None, None) => x.apply_op1(Tracked1(call, move |x: &Tensor, _: &Tensor, g: &Tensor| self.d_x(x, None, g))),
            (Some(w), None) => {
                x.apply_op2(w, Tracked2(call, move |x: &Tensor, w: &Tensor, g: &Tensor| self.grads(x, w, g)))
            }
            (None, Some(b)) => x.apply_op2(
                b,
                Tracked2(call, move |x: &Tensor, b: &Tensor, g: &Tensor| {
                    let xd = x.detach();
                    let dx = x.track_op().then(|| self.d_x(&xd, None, g)).transpose()?;
                    let tracked = b.track_op() && !fault::active("grad.norm.no_bias");
                    Ok((dx, tracked.then(|| self.d_bias(b, g)).transpose()?))
                }),
            ),
            (Some(w), Some(b)) => x.apply_op3(
                w,
                b,
                Tracked3(call, move |x: &Tensor, w: &Tensor, b: &Tensor, g: &Tensor| {
                    let (dx, dw) = self.grads(x, w, g)?;
                    Ok((dx, dw, b.track_op().then(|| self.d_bias(b, g)).transpose()?))
                }),
            ),
        }
    }
}

/// x / √(mean(x²) + eps), then times the weight if there is one, along the last dim. x is `(…, n)` of any float dtype, the
/// weight `(n)` of x's dtype.
///
/// # Errors
/// A weight that is not `(n)`, dtypes or devices that differ, a scalar x, a dtype that is not a float.
pub fn rms_norm(x: &Tensor, weight: Option<&Tensor>, eps: f64) -> Result<Tensor> {
    const OP: &str = "rms-norm";
    let n = check(OP, x, &[("weight", weight)])?;
    let dtype = x.dtype();
    if !x.device().is_cpu() {
        let v = x.to_dtype(wide(dtype))?;
        let scale = ((v.sqr()?.sum_keepdim(D::Minus1)? / n as f64)? + eps)?.sqrt()?;
        let y = v.broadcast_div(&scale)?;
        let y = match weight {
            Some(w) => y.broadcast_mul(&w.to_dtype(wide(dtype))?)?,
            None => y,
        };
        return y.to_dtype(dtype);
    }
    let axes = axis(OP, x.rank() - 1, x.rank())?;
    let shared = leading_axes(x.rank());
    let norm = Norm { op: OP, centre: false, eps, axes, shared, class: class(OP, dtype)?, dtype };
    let program = Ready::RmsNorm { weight: weight.is_some() }.program(dtype)?;
    let call = RowCall::new(OP, program, norm.axes).with_params(&[eps]);
    match weight {
        None => x.apply_op1(Tracked1(call, move |x: &Tensor, _: &Tensor, g: &Tensor| norm.d_x(x, None, g))),
        Some(w) => x.apply_op2(w, Tracked2(call, move |x: &Tensor, w: &Tensor, g: &Tensor| norm.grads(x, w, g))),
    }
}

/// (x - mean) / √(var + eps) · weight + bias along the last dim, with the biased variance. x is `(…, n)` of any float dtype,
/// weight and bias `(n)` of x's dtype, either may be absent.
///
/// # Errors
/// A weight or bias that is not `(n)`, dtypes or devices that differ, a scalar x, a dtype that is not a float.
pub fn layer_norm(x: &Tensor, weight: Option<&Tensor>, bias: Option<&Tensor>, eps: f64) -> Result<Tensor> {
    const OP: &str = "layer-norm";
    let n = check(OP, x, &[("weight", weight), ("bias", bias)])?;
    let dtype = x.dtype();
    if !x.device().is_cpu() {
        let v = x.to_dtype(wide(dtype))?;
        let v = v.broadcast_sub(&(v.sum_keepdim(D::Minus1)? / n as f64)?)?;
        let scale = ((v.sqr()?.sum_keepdim(D::Minus1)? / n as f64)? + eps)?.sqrt()?;
        let mut y = v.broadcast_div(&scale)?;
        if let Some(w) = weight {
            y = y.broadcast_mul(&w.to_dtype(wide(dtype))?)?;
        }
        if let Some(b) = bias {
            y = y.broadcast_add(&b.to_dtype(wide(dtype))?)?;
        }
        return y.to_dtype(dtype);
    }
    let axes = axis(OP, x.rank() - 1, x.rank())?;
    let shared = leading_axes(x.rank());
    let norm = Norm { op: OP, centre: true, eps, axes, shared, class: class(OP, dtype)?, dtype };
    let program = Ready::LayerNorm { weight: weight.is_some(), bias: bias.is_some() }.program(dtype)?;
    let call = RowCall::new(OP, program, norm.axes).with_params(&[eps]);
    norm.apply(x, weight, bias, call)
}
