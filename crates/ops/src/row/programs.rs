//! Ready-made programs. Inputs and output have the dtype given; arithmetic is f32 for f16, bf16 and f32, f64 for f64.

use super::emit;
use super::program::{BinaryFn as B, Class, RowProgram, UnaryFn};
use crate::error::{Error, Result};
use crate::fault;
use candle_core::DType;
use std::collections::HashMap;
use std::sync::{Arc, OnceLock, PoisonError, RwLock};

fn class(op: &'static str, dtype: DType) -> Result<Class> {
    Class::of(dtype).ok_or_else(|| Error::unsupported(op, format!("dtype {}", dtype.as_str())))
}

/// A function of one dtype whose program is made once per process.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Ready {
    /// [`softmax`].
    Softmax,
    /// [`log_softmax`].
    LogSoftmax,
    /// [`rms_norm`].
    RmsNorm {
        /// Whether there is a weight.
        weight: bool,
    },
    /// [`layer_norm`].
    LayerNorm {
        /// Whether there is a weight.
        weight: bool,
        /// Whether there is a bias.
        bias: bool,
    },
    /// [`glu`].
    Glu(UnaryFn),
    /// [`unary`].
    Unary(UnaryFn),
    /// [`binary`].
    Binary(B),
}

impl Ready {
    /// The program.
    ///
    /// # Errors
    /// As the function that makes it.
    pub fn program(self, dtype: DType) -> Result<Arc<RowProgram>> {
        type Programs = RwLock<HashMap<(Ready, DType), Arc<RowProgram>>>;
        static MADE: OnceLock<Programs> = OnceLock::new();
        // a fault may be in the program
        if fault::any() {
            return self.make(dtype).map(Arc::new);
        }
        let made = MADE.get_or_init(Programs::default);
        if let Some(program) = made.read().unwrap_or_else(PoisonError::into_inner).get(&(self, dtype)) {
            return Ok(program.clone());
        }
        let program = Arc::new(self.make(dtype)?);
        let mut made = made.write().unwrap_or_else(PoisonError::into_inner);
        Ok(made.entry((self, dtype)).or_insert(program).clone())
    }

    fn make(self, dtype: DType) -> Result<RowProgram> {
        match self {
            Ready::Softmax => softmax(class("softmax", dtype)?, dtype),
            Ready::LogSoftmax => log_softmax(class("log-softmax", dtype)?, dtype),
            Ready::RmsNorm { weight } => rms_norm(weight, dtype),
            Ready::LayerNorm { weight, bias } => layer_norm(weight, bias, dtype),
            Ready::Glu(act) => glu(act, dtype),
            Ready::Unary(f) => unary(f, dtype),
            Ready::Binary(f) => binary(f, dtype),
        }
    }
}

/// Softmax. Input: x. Output: x's dtype.
///
/// # Errors
/// `InvalidProgram` if the class cannot read or write the dtype.
pub fn softmax(class: Class, dtype: DType) -> Result<RowProgram> {
    let mut b = RowProgram::builder(class);
    let x = b.load(0);
    let y = emit::softmax(&mut b, x)?;
    b.output(y, dtype);
    b.finish()
}

/// Log-softmax. Input: x. Output: x's dtype.
///
/// # Errors
/// `InvalidProgram` if the class cannot read or write the dtype.
pub fn log_softmax(class: Class, dtype: DType) -> Result<RowProgram> {
    let mut b = RowProgram::builder(class);
    let x = b.load(0);
    let y = emit::log_softmax(&mut b, x)?;
    b.output(y, dtype);
    b.finish()
}

/// RMS norm. Inputs: x, weight if `weighted`. Parameter: eps.
///
/// # Errors
/// `Unsupported` for a dtype that is not a float.
pub fn rms_norm(weighted: bool, dtype: DType) -> Result<RowProgram> {
    let mut b = RowProgram::builder(class("rms-norm", dtype)?);
    let x = b.load(0);
    let w = weighted.then(|| b.load(1));
    let y = emit::rms_norm(&mut b, x, w, 0)?;
    b.output(y, dtype);
    b.finish()
}

/// Layer norm. Inputs: x, then weight and bias as present. Parameter: eps.
///
/// # Errors
/// `Unsupported` for a dtype that is not a float.
pub fn layer_norm(weight: bool, bias: bool, dtype: DType) -> Result<RowProgram> {
    let mut b = RowProgram::builder(class("layer-norm", dtype)?);
    let x = b.load(0);
    let w = weight.then(|| b.load(1));
    let bias = bias.then(|| b.load(1 + u16::from(weight)));
    let y = emit::layer_norm(&mut b, x, w, bias, 0)?;
    b.output(y, dtype);
    b.finish()
}

/// act(gate)·up, elementwise. Inputs: gate, up.
///
/// # Errors
/// `Unsupported` for a dtype that is not a float.
pub fn glu(act: UnaryFn, dtype: DType) -> Result<RowProgram> {
    let mut b = RowProgram::builder(class("glu", dtype)?);
    let (gate, up) = (b.load(0), b.load(1));
    let y = emit::glu(&mut b, act, gate, up)?;
    b.output(y, dtype);
    b.finish()
}

/// Residual and RMS norm in one. Inputs: x, residual, weight. Parameter: eps. Outputs: x + residual, and its norm.
/// The norm is taken of the unrounded sum.
///
/// # Errors
/// `Unsupported` for a dtype that is not a float.
pub fn residual_rms_norm(dtype: DType) -> Result<RowProgram> {
    let mut b = RowProgram::builder(class("residual-rms-norm", dtype)?);
    let (x, residual, w) = (b.load(0), b.load(1), b.load(2));
    let sum = b.binary(B::Add, x, residual);
    let y = emit::rms_norm(&mut b, sum, Some(w), 0)?;
    b.output(sum, dtype);
    b.output(y, dtype);
    b.finish()
}

/// One function, elementwise. Input: x.
///
/// # Errors
/// `Unsupported` for a dtype that is not a float.
pub fn unary(f: UnaryFn, dtype: DType) -> Result<RowProgram> {
    let mut b = RowProgram::builder(class("unary", dtype)?);
    let x = b.load(0);
    let y = b.unary(f, x);
    b.output(y, dtype);
    b.finish()
}

/// A function of two arguments, elementwise. Inputs: x, y.
///
/// # Errors
/// `Unsupported` for a dtype that is not a float.
pub fn binary(f: B, dtype: DType) -> Result<RowProgram> {
    let mut b = RowProgram::builder(class("binary", dtype)?);
    let (x, y) = (b.load(0), b.load(1));
    let y = b.binary(f, x, y);
    b.output(y, dtype);
    b.finish()
}
