//! Pieces of programs that other programs embed: softmax, norms, gated activations.
//!
//! The mean is a sum times 1/n, as Candle's. Nothing is rounded to a storage type here: the caller places that.

use super::program::{BinaryFn as B, Builder, Instr, Kind, ReduceFn, Reg, UnaryFn as U};
use crate::error::{Error, Result};
use crate::fault;

fn vec_arg(b: &Builder, what: &str, x: Reg) -> Result<()> {
    match b.kind_of(x) {
        Some(Kind::Vec) => Ok(()),
        kind => Err(Error::program(format!("{what} needs a value per element, register {} is {kind:?}", x.0))),
    }
}

/// The mean over the row; `x` has a value per element, which [`Builder::finish`] checks.
pub fn mean(b: &mut Builder, x: Reg) -> Reg {
    let sum = b.reduce(ReduceFn::Sum, x);
    let n = b.row_len();
    let inv = if fault::active("emit.mean.count") { n } else { b.unary(U::Recip, n) };
    b.binary(B::Mul, sum, inv)
}

/// exp(x - max x) / Σ exp(x - max x) over the row.
///
/// # Errors
/// `InvalidProgram` if `x` has no value per element.
pub fn softmax(b: &mut Builder, x: Reg) -> Result<Reg> {
    vec_arg(b, "softmax", x)?;
    let max = b.reduce(ReduceFn::Max, x);
    let shifted = if fault::active("emit.softmax.max") { x } else { b.binary(B::Sub, x, max) };
    let e = b.unary(U::Exp, shifted);
    let sum = b.reduce(ReduceFn::Sum, if fault::active("emit.softmax.sum") { shifted } else { e });
    Ok(b.binary(B::Quotient, e, sum))
}

/// x - max x - log Σ exp(x - max x) over the row.
///
/// # Errors
/// `InvalidProgram` if `x` has no value per element.
pub fn log_softmax(b: &mut Builder, x: Reg) -> Result<Reg> {
    vec_arg(b, "log-softmax", x)?;
    let max = b.reduce(ReduceFn::Max, x);
    let shifted = if fault::active("emit.log_softmax.max") { x } else { b.binary(B::Sub, x, max) };
    let e = b.unary(U::Exp, shifted);
    let sum = b.reduce(ReduceFn::Sum, e);
    let log = if fault::active("emit.log_softmax.log") { sum } else { b.unary(U::Log, sum) };
    Ok(b.binary(B::Sub, shifted, log))
}

/// The unbiased variance over the row: Σ(x − mean)²/(n − 1); NaN for a row of one element, as Candle's.
///
/// # Errors
/// `InvalidProgram` if `x` has no value per element.
pub fn var(b: &mut Builder, x: Reg) -> Result<Reg> {
    vec_arg(b, "var", x)?;
    let m = mean(b, x);
    let centred = b.binary(B::Sub, x, m);
    let sqr = b.unary(U::Sqr, centred);
    let sum = b.reduce(ReduceFn::Sum, sqr);
    let n = b.row_len();
    let one = b.binary(B::Div, n, n);
    let rest = if fault::active("emit.var.biased") { n } else { b.binary(B::Sub, n, one) };
    Ok(b.binary(B::Div, sum, rest))
}

/// max x + log Σ exp(x - max x) over the row. A row whose largest element is −∞ gives −∞, one with +∞ gives +∞ (Candle gives NaN).
///
/// # Errors
/// `InvalidProgram` if `x` has no value per element.
pub fn log_sum_exp(b: &mut Builder, x: Reg) -> Result<Reg> {
    vec_arg(b, "log-sum-exp", x)?;
    let max = b.reduce(ReduceFn::Max, x);
    // max − max is 0 for a finite number and NaN else: an infinite largest element is not taken out
    let zero = b.binary(B::Sub, max, max);
    let finite = b.binary(B::Eq, zero, zero);
    let nothing = b.binary(B::Sub, finite, finite);
    let pivot = b.select(finite, max, nothing);
    let shifted = b.binary(B::Sub, x, pivot);
    let e = b.unary(U::Exp, shifted);
    let sum = b.reduce(ReduceFn::Sum, e);
    let log = b.unary(U::Log, sum);
    if fault::active("emit.log_sum_exp.pivot") {
        return Ok(log);
    }
    Ok(b.binary(B::Add, log, pivot))
}

/// x where it is not negative, else alpha·(eˣ − 1) (Clevert et al. 2016).
pub fn elu(b: &mut Builder, x: Reg, alpha: Reg) -> Reg {
    let e = b.unary(U::Exp, x);
    // programs have no constants: 0 and 1 come from a number that is finite and not 0
    let n = b.row_len();
    let (zero, one) = (b.binary(B::Sub, n, n), b.binary(B::Div, n, n));
    let shifted = b.binary(B::Sub, e, one);
    let low = if fault::active("emit.elu.alpha") { shifted } else { b.binary(B::Mul, shifted, alpha) };
    let positive = b.binary(B::Ge, x, zero);
    b.select(positive, x, low)
}

/// min(max(x, low), high).
pub fn clamp(b: &mut Builder, x: Reg, low: Reg, high: Reg) -> Reg {
    let raised = if fault::active("emit.clamp.low") { x } else { b.binary(B::Max, x, low) };
    b.binary(B::Min, raised, high)
}

/// x / √(mean(x²) + eps), then times the weight if there is one (Zhang & Sennrich 2019). `eps` is the index of a parameter.
///
/// # Errors
/// `InvalidProgram` if `x` has no value per element.
pub fn rms_norm(b: &mut Builder, x: Reg, weight: Option<Reg>, eps: u16) -> Result<Reg> {
    vec_arg(b, "rms-norm", x)?;
    let sqr = b.unary(U::Sqr, x);
    let sum = b.reduce(ReduceFn::Sum, sqr);
    let root = b.root_mean(sum, eps);
    let out = b.binary(B::Quotient, x, root);
    Ok(match weight.filter(|_| !fault::active("emit.rms_norm.weight")) {
        Some(w) => b.binary(B::Mul, out, w),
        None => out,
    })
}

/// (x - mean) / √(var + eps) · weight + bias, with the biased variance of the centred values (Ba et al. 2016). `eps` is the
/// index of a parameter. The mean is a quotient here, one rounding less than a product with 1/n.
///
/// # Errors
/// `InvalidProgram` if `x` has no value per element.
pub fn layer_norm(b: &mut Builder, x: Reg, weight: Option<Reg>, bias: Option<Reg>, eps: u16) -> Result<Reg> {
    vec_arg(b, "layer-norm", x)?;
    let sum = b.reduce(ReduceFn::Sum, x);
    let n = b.row_len();
    let m = b.binary(B::Div, sum, n);
    let centred = b.binary(B::Sub, x, m);
    let sqr = b.unary(U::Sqr, if fault::active("emit.layer_norm.variance") { x } else { centred });
    let squares = b.reduce(ReduceFn::Sum, sqr);
    let root = b.root_mean(squares, eps);
    let mut out = b.binary(B::Quotient, centred, root);
    if let Some(w) = weight.filter(|_| !fault::active("emit.layer_norm.weight")) {
        out = b.binary(B::Mul, out, w);
    }
    if let Some(bias) = bias.filter(|_| !fault::active("emit.layer_norm.bias")) {
        out = b.binary(B::Add, out, bias);
    }
    Ok(out)
}

/// act(gate) · up (the product of a gated unit).
///
/// # Errors
/// `InvalidProgram` if a register is unknown.
pub fn glu(b: &mut Builder, act: U, gate: Reg, up: Reg) -> Result<Reg> {
    for r in [gate, up] {
        if b.kind_of(r).is_none() {
            return Err(Error::program(format!("unknown register {}", r.0)));
        }
    }
    let (gate, up) = if fault::active("emit.glu.gate") { (up, gate) } else { (gate, up) };
    let act = b.push(Instr::Unary(act, gate));
    Ok(b.binary(B::Mul, act, up))
}
