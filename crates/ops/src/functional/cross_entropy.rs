//! Cross entropy of logits against class indices.

use super::apply::RowCall;
use super::{float, wide};
use crate::error::Error;
use crate::fault;
use crate::kernels;
use crate::row::{emit, BinaryFn as B, Class, ReduceFn, RowProgram, UnaryFn as U};
use crate::storage::{cpu_view, filled, with_view};
use crate::view::Slice;
use candle_core::{CpuStorage, CustomOp2, DType, Layout, Result, Shape, Tensor};

const OP: &str = "cross-entropy";
/// The classes of a row.
const ROW: u32 = 0b10;

/// The mean over n of -log softmax(logits)\[target\]: logits `(n, classes)` of any float dtype, targets `(n)` of u8, u32 or i64; a
/// scalar of the logits' dtype. f16 and bf16 compute in f32 and round once. As in Candle's gather, a target that is its type's
/// largest value picks nothing: its row's loss is 0.
///
/// # Errors
/// Shapes that do not fit or are empty, logits that are no floats, targets that are no integers, a target that is no class.
pub fn cross_entropy(logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
    float(OP, logits)?;
    let (n, classes) = match (logits.dims(), targets.dims()) {
        (&[n, c], &[m]) if n == m && n > 0 && c > 0 => (n, c),
        (l, t) => {
            let detail = format!("logits {l:?} and targets {t:?}: needs (n, classes) and (n), neither empty");
            return Err(Error::shape(OP, detail).into());
        }
    };
    if !matches!(targets.dtype(), DType::U8 | DType::U32 | DType::I64) {
        let detail = format!("targets must be u8, u32 or i64, got {}", targets.dtype().as_str());
        return Err(Error::dtype(OP, detail).into());
    }
    if !logits.device().same_device(targets.device()) {
        let (l, t) = (logits.device().location(), targets.device().location());
        return Err(Error::unsupported(OP, format!("logits on {l:?}, targets on {t:?}")).into());
    }
    let losses = if logits.device().is_cpu() {
        logits.apply_op2(targets, Losses { classes })?
    } else {
        let log = candle_nn::ops::log_softmax(&logits.to_dtype(wide(logits.dtype()))?, 1)?;
        log.gather(&targets.unsqueeze(1)?, 1)?.neg()?
    };
    let count = if fault::active("cross_entropy.mean") { 1.0 } else { n as f64 };
    // Metal has no f64
    let sum_in = if losses.device().is_metal() { DType::F32 } else { DType::F64 };
    losses.to_dtype(sum_in)?.sum_all()?.affine(1.0 / count, 0.0)?.to_dtype(logits.dtype())
}

/// The loss of each row, in f64.
struct Losses {
    classes: usize,
}

fn class(dtype: DType) -> Result<Class> {
    Ok(Class::of(dtype).ok_or_else(|| Error::unsupported(OP, format!("dtype {}", dtype.as_str())))?)
}

/// log Σ − (x − max) per row, where a row has a target; in f64, because the two sides may cancel. `out` holds Σ before.
fn subtract<T>(out: &mut [f64], sum: &[T], max: &[T], at: impl Iterator<Item = Option<usize>>, x: impl Fn(usize) -> T)
where
    T: Copy + Into<f64>,
{
    for (((out, sum), max), at) in out.iter_mut().zip(sum).zip(max).zip(at) {
        let (sum, max): (f64, f64) = ((*sum).into(), (*max).into());
        *out = at.map_or(0.0, |at| sum.ln() - (x(at).into() - max));
    }
}

impl CustomOp2 for Losses {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(&self, s1: &CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> Result<(CpuStorage, Shape)> {
        let logits = cpu_view(OP, s1, l1)?;
        let dtype = wide(logits.dtype());
        let targets = kernels::read_ids(OP, &cpu_view(OP, s2, l2)?, self.classes)?;
        // per row the largest logit, and the sum of what it leaves
        let mut b = RowProgram::builder(class(logits.dtype())?);
        let x = b.load(0);
        let max = b.reduce(ReduceFn::Max, x);
        let shifted = b.binary(B::Sub, x, max);
        let e = b.unary(U::Exp, shifted);
        let sum = b.reduce(ReduceFn::Sum, e);
        b.output(max, dtype);
        b.output(sum, dtype);
        let program = b.finish()?;
        let rows = targets.len();
        let mut largest = filled(OP, dtype, rows, |_| Ok(()))?;
        let sums = filled(OP, dtype, rows, |sums| {
            let Some(mut max) = crate::storage::cpu_slice_mut(&mut largest) else {
                return Err(Error::unsupported(OP, format!("dtype {}", dtype.as_str())));
            };
            let inputs = std::slice::from_ref(&logits);
            program.run(logits.dims(), ROW, inputs, &[], &mut [max.reborrow(), sums.reborrow()])
        })?;
        let (row_stride, stride) = (logits.layout.strides[0], logits.layout.strides[1]);
        let at = targets.iter().enumerate().map(|(row, target)| {
            let target = if fault::active("cross_entropy.target") { Some(0) } else { *target };
            target.map(|target| logits.layout.offset + row * row_stride + target * stride)
        });
        let mut losses = vec![0f64; rows];
        match (&sums, &largest, &logits.data) {
            (CpuStorage::F32(sum), CpuStorage::F32(max), Slice::F32(x)) => {
                subtract(&mut losses, sum, max, at, |at| x[at])
            }
            (CpuStorage::F32(sum), CpuStorage::F32(max), Slice::F16(x)) => {
                subtract(&mut losses, sum, max, at, |at| x[at].to_f32());
            }
            (CpuStorage::F32(sum), CpuStorage::F32(max), Slice::BF16(x)) => {
                subtract(&mut losses, sum, max, at, |at| x[at].to_f32());
            }
            (CpuStorage::F64(sum), CpuStorage::F64(max), Slice::F64(x)) => {
                subtract(&mut losses, sum, max, at, |at| x[at])
            }
            _ => return Err(Error::unsupported(OP, format!("dtype {}", dtype.as_str())).into()),
        }
        let losses = CpuStorage::F64(losses);
        Ok((losses, Shape::from(rows)))
    }

    /// (softmax(x) - 1 at the target)·g for each row's g.
    fn bwd(
        &self,
        logits: &Tensor,
        targets: &Tensor,
        _res: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (dtype, dims) = (logits.dtype(), logits.dims());
        let ids = with_view(targets, |view| kernels::read_ids(OP, &view, self.classes))?;
        let mut hot = vec![0u8; logits.elem_count()];
        for (row, target) in hot.chunks_mut(self.classes).zip(&ids) {
            if let Some(one) = target.and_then(|target| row.get_mut(target)) {
                *one = u8::from(!fault::active("grad.cross_entropy.target"));
            }
        }
        let hot = Tensor::from_vec(hot, dims, logits.device())?;
        let mut b = RowProgram::builder(class(dtype)?);
        let (x, g, hot_) = (b.load(0), b.load(1), b.load(2));
        let y = emit::log_softmax(&mut b, x)?;
        let p = b.unary(U::Exp, y);
        let d = b.binary(B::Sub, p, hot_);
        let dx = if fault::active("grad.cross_entropy.chain") { d } else { b.binary(B::Mul, d, g) };
        b.output(dx, dtype);
        let mut grad = grad.detach().unsqueeze(1)?.to_dtype(wide(dtype))?;
        if ids.contains(&None) {
            let counts: Vec<u8> = ids.iter().map(|target| u8::from(target.is_some())).collect();
            grad = (grad * Tensor::from_vec(counts, (ids.len(), 1), logits.device())?.to_dtype(wide(dtype))?)?;
        }
        let dx = RowCall::new("cross-entropy-grad", b.finish()?, ROW).detached(&[&logits.detach(), &grad, &hot])?;
        Ok((Some(dx), None))
    }
}
