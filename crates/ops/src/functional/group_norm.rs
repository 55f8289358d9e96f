//! Group norm: layer norm over groups of channels.

use super::apply::RowCall;
use super::norm::Norm;
use super::{alike, float, wide};
use crate::error::Error;
use crate::fault;
use crate::row::{programs, Class};
use candle_core::{Result, Tensor, D};

const OP: &str = "group-norm";
/// Of (batch, group, channel of the group, place) a row has the last two.
const ROW: u32 = 0b1100;
/// A channel's weight is shared over batches and places.
const SHARED: u32 = 0b1001;

/// x `(b, c, …)` split into (batch, groups, channels of a group, places), and the checks.
fn check(x: &Tensor, groups: usize, params: &[(&str, Option<&Tensor>)]) -> Result<[usize; 4]> {
    float(OP, x)?;
    let &[b, c, ref places @ ..] = x.dims() else {
        return Err(Error::shape(OP, format!("x {:?} must be (batch, channels, …)", x.dims())).into());
    };
    if places.is_empty() {
        return Err(Error::shape(OP, format!("x {:?} must be (batch, channels, …) of rank 3 or more", x.dims())).into());
    }
    if groups == 0 || c % groups != 0 {
        return Err(
            Error::shape(OP, format!("the channels of x {:?} do not split into {groups} groups", x.dims())).into()
        );
    }
    for (what, t) in params {
        if let Some(t) = t {
            alike(OP, what, x, t)?;
            if t.dims() != [c] {
                return Err(Error::shape(OP, format!("{what} {:?} for x {:?}", t.dims(), x.dims())).into());
            }
        }
    }
    let groups = if fault::active("group_norm.groups") { c / groups } else { groups };
    Ok([b, groups, c.checked_div(groups).unwrap_or(0), places.iter().product()])
}

/// (x - mean) / √(var + eps) · weight + bias (Wu and He, arXiv:1803.08494, eq. 7), mean and biased variance over each of `groups`
/// groups of channels and everything behind it. x is `(b, c, …)` of rank 3 or more and any float dtype, weight and bias `(c)` of
/// x's dtype, either may be absent.
///
/// # Errors
/// Channels that do not split into the groups, a weight or bias that is not `(c)`, dtypes or devices that differ, an x of fewer
/// than three dims, a dtype that is not a float.
pub fn group_norm(
    x: &Tensor,
    groups: usize,
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
    eps: f64,
) -> Result<Tensor> {
    let [b, g, c, places] = check(x, groups, &[("weight", weight), ("bias", bias)])?;
    if x.elem_count() == 0 {
        // Candle cannot reshape every view without elements, and there is nothing to normalise
        return super::layer_norm(x, None, None, eps);
    }
    let rows = x.reshape((b, g, c, places))?;
    // on the tape, so that gradients come back in the caller's shapes
    let vector = |t: Option<&Tensor>| t.map(|t| t.reshape((g, c, 1))).transpose();
    let (weight, bias) = (vector(weight)?, vector(bias)?);
    let y = match x.device().is_cpu() {
        true => on_cpu(&rows, weight.as_ref(), bias.as_ref(), eps)?,
        false => composed(&rows, weight.as_ref(), bias.as_ref(), eps)?,
    };
    y.reshape(x.shape())
}

fn on_cpu(x: &Tensor, weight: Option<&Tensor>, bias: Option<&Tensor>, eps: f64) -> Result<Tensor> {
    let dtype = x.dtype();
    let class = Class::of(dtype).ok_or_else(|| Error::unsupported(OP, format!("dtype {}", dtype.as_str())))?;
    let norm = Norm { op: OP, centre: true, eps, axes: ROW, shared: SHARED, class, dtype };
    let program = programs::layer_norm(weight.is_some(), bias.is_some(), dtype)?;
    let call = RowCall::new(OP, program, ROW).with_params(&[eps]);
    norm.apply(x, weight, bias, call)
}

fn composed(x: &Tensor, weight: Option<&Tensor>, bias: Option<&Tensor>, eps: f64) -> Result<Tensor> {
    let dtype = x.dtype();
    let v = x.to_dtype(wide(dtype))?.flatten_from(2)?;
    let v = v.broadcast_sub(&v.mean_keepdim(D::Minus1)?)?;
    let scale = (v.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?;
    let mut y = v.broadcast_div(&scale)?.reshape(x.shape())?;
    if let Some(w) = weight {
        y = y.broadcast_mul(&w.to_dtype(wide(dtype))?)?;
    }
    if let Some(b) = bias {
        y = y.broadcast_add(&b.to_dtype(wide(dtype))?)?;
    }
    y.to_dtype(dtype)
}
