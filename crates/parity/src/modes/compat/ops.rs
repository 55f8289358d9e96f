//! `backend` and `embeddings`: ops on Candle's tensors.

#![allow(deprecated)] // what v1 had is checked as well

use super::{Call, Dtypes};
use candle_core::{Result, Tensor, D};
use candle_lazy_compat::backend::{
    self, CustomMetalOps, FusedLoRAOp, FusedRMSNormOp, FusedSoftmaxOp, LayerNormOp, TensorExt,
};
use candle_lazy_compat::embeddings::pooling;

pub(super) const EPS: f64 = 1e-5;
/// (…, in), A (in, rank), B (rank, out).
pub(super) const LOW_RANK: &[&[usize]] = &[&[2, 3, 8], &[8, 4], &[4, 6]];
pub(super) const SCALING: f32 = 2.0;
const X: &[&[usize]] = &[&[2, 3, 8]];

pub(super) fn softmax(x: &Tensor, dim: usize) -> Result<Tensor> {
    let powers = x.broadcast_sub(&x.max_keepdim(dim)?)?.exp()?;
    powers.broadcast_div(&powers.sum_keepdim(dim)?)
}

pub(super) fn rms_norm(x: &Tensor, eps: f64) -> Result<Tensor> {
    x.broadcast_div(&(x.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?)
}

fn layer_norm(x: &Tensor, eps: f64) -> Result<Tensor> {
    rms_norm(&x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?, eps)
}

/// x·w for w of rank 2.
pub(super) fn product(x: &Tensor, w: &Tensor) -> Result<Tensor> {
    x.contiguous()?.broadcast_matmul(w)
}

/// (x·A)·B·scaling, and Σ|x|·|A|·|B|·scaling.
pub(super) fn lora(x: &[Tensor]) -> Result<(Vec<Tensor>, Vec<Tensor>)> {
    let value = (product(&product(&x[0], &x[1])?, &x[2])? * f64::from(SCALING))?;
    let magnitude = (product(&product(&x[0].abs()?, &x[1].abs()?)?, &x[2].abs()?)? * f64::from(SCALING))?;
    Ok((vec![value], vec![magnitude]))
}

fn soft(x: &[Tensor]) -> Result<(Vec<Tensor>, Vec<Tensor>)> {
    Ok((vec![softmax(&x[0], 2)?], Vec::new()))
}

fn rms(x: &[Tensor]) -> Result<(Vec<Tensor>, Vec<Tensor>)> {
    Ok((vec![rms_norm(&x[0], EPS)?], Vec::new()))
}

fn layer(x: &[Tensor]) -> Result<(Vec<Tensor>, Vec<Tensor>)> {
    Ok((vec![layer_norm(&x[0], EPS)?], Vec::new()))
}

const fn call(name: &'static str, ours: super::Ours, formula: super::Formula) -> Call {
    Call { name, inputs: X, dtypes: Dtypes::Floats, ours, formula, roundings: 2.0, gradients: true }
}

pub(super) const CALLS: &[Call] = &[
    call("x.softmax_stable()", |x| Ok(vec![x[0].softmax_stable()?]), soft),
    call("TensorExt::layer_norm(x, eps)", |x| Ok(vec![TensorExt::layer_norm(&x[0], EPS)?]), layer),
    call("TensorExt::rms_norm(x, eps)", |x| Ok(vec![TensorExt::rms_norm(&x[0], EPS)?]), rms),
    call("x.softmax_fused()", |x| Ok(vec![x[0].softmax_fused()?]), soft),
    call(
        "x.rms_norm_fused(eps)",
        |x| Ok(vec![x[0].rms_norm_fused(EPS as f32)?]),
        |x| Ok((vec![rms_norm(&x[0], f64::from(EPS as f32))?], Vec::new())),
    ),
    call("x.apply_op1(FusedSoftmaxOp)", |x| Ok(vec![x[0].apply_op1(FusedSoftmaxOp::new()?)?]), soft),
    call(
        "x.apply_op1(FusedRMSNormOp)",
        |x| Ok(vec![x[0].apply_op1(FusedRMSNormOp::new(EPS as f32)?)?]),
        |x| Ok((vec![rms_norm(&x[0], f64::from(EPS as f32))?], Vec::new())),
    ),
    call("x.apply_op1(LayerNormOp)", |x| Ok(vec![x[0].apply_op1(LayerNormOp::new(EPS))?]), layer),
    call("backend::layer_norm(x, eps)", |x| Ok(vec![backend::layer_norm(&x[0], EPS)?]), layer),
    Call {
        name: "x.lora_forward_fused(a, b, scaling)",
        inputs: LOW_RANK,
        dtypes: Dtypes::Floats,
        ours: |x| Ok(vec![x[0].lora_forward_fused(&x[1], &x[2], SCALING)?]),
        formula: lora,
        roundings: 2.0,
        gradients: true,
    },
    Call {
        name: "x.apply_op1(FusedLoRAOp)",
        inputs: LOW_RANK,
        dtypes: Dtypes::Floats,
        ours: |x| Ok(vec![x[0].apply_op1(FusedLoRAOp::new(x[1].clone(), x[2].clone(), SCALING)?)?]),
        formula: lora,
        roundings: 2.0,
        // v1's op holds A and B inside, where no gradient reaches them; `lora_forward_fused` is the call that trains
        gradients: false,
    },
    call(
        "pooling::mean_pool(hidden, mask)",
        |x| {
            let mask = Tensor::new(&[[1u32, 1, 0], [1, 0, 0]], x[0].device())?;
            Ok(vec![pooling::mean_pool(&x[0], &mask)?])
        },
        |x| {
            let rows = [x[0].get(0)?.narrow(0, 0, 2)?.mean(0)?, x[0].get(1)?.get(0)?];
            let magnitudes = [x[0].get(0)?.narrow(0, 0, 2)?.abs()?.mean(0)?, x[0].get(1)?.get(0)?.abs()?];
            Ok((vec![Tensor::stack(&rows, 0)?], vec![Tensor::stack(&magnitudes, 0)?]))
        },
    ),
    Call {
        name: "pooling::normalize(x)",
        inputs: &[&[3, 8]],
        dtypes: Dtypes::Floats,
        ours: |x| Ok(vec![pooling::normalize(&x[0])?]),
        formula: |x| Ok((vec![x[0].broadcast_div(&x[0].sqr()?.sum_keepdim(1)?.sqrt()?)?], Vec::new())),
        roundings: 2.0,
        gradients: true,
    },
];
