//! What the graph passes through unread: custom ops for the matrix, and weights that are quantised.
//!
//! The custom ops compute in f64 and round once; they read any layout and have a backward.

use crate::case::{Case, Domain};
use crate::value::to_arr;
use crate::{Error, Result};
use candle_core::quantized::QTensor;
use candle_core::{CpuStorage, CustomOp1, CustomOp2, CustomOp3, DType, Layout, Shape, Tensor};
use candle_lazy_exec::LazyTensor;
use candle_lazy_graph::{Dims, Op};
use half::{bf16, f16};
use std::sync::Arc;

/// x²
pub const SQUARE: &str = "custom_op1";
/// a·b
pub const PRODUCT: &str = "custom_op2";
/// a·b + c
pub const PRODUCT_SUM: &str = "custom_op3";

struct Square;
struct Product;
struct ProductSum;

/// A custom op of the matrix as an op.
#[must_use]
pub fn custom(name: &'static str, dims: &[usize], dtype: DType) -> Op {
    let arity = match name {
        SQUARE => 1,
        PRODUCT => 2,
        _ => 3,
    };
    Op::Custom { name, arity, shape: Dims::from_slice(dims), dtype }
}

type Input<'a> = (&'a CpuStorage, &'a Layout);

/// Where the elements lie, in row-major order.
fn offsets(layout: &Layout) -> Vec<usize> {
    let mut at = vec![layout.start_offset()];
    for (&n, &stride) in layout.dims().iter().zip(layout.stride()) {
        at = at.iter().flat_map(|from| (0..n).map(move |i| from + i * stride)).collect();
    }
    at
}

/// `f` of the inputs' elements at each place.
fn map(inputs: &[Input<'_>], f: fn(&[f64]) -> f64) -> candle_core::Result<(CpuStorage, Shape)> {
    let Some((_, layout)) = inputs.first() else { candle_core::bail!("no inputs") };
    let (shape, count) = (layout.shape().clone(), layout.shape().elem_count());
    macro_rules! each {
        ($variant:ident, $to:expr, $from:expr) => {{
            let mut rows = vec![Vec::with_capacity(inputs.len()); count];
            for (storage, layout) in inputs {
                let CpuStorage::$variant(data) = storage else {
                    candle_core::bail!("custom ops of the matrix take inputs of one dtype")
                };
                for (row, at) in rows.iter_mut().zip(offsets(layout)) {
                    row.push($to(data[at]));
                }
            }
            CpuStorage::$variant(rows.iter().map(|row| $from(f(row))).collect())
        }};
    }
    let first = inputs.first().map(|(storage, _)| *storage);
    let storage = match first {
        Some(CpuStorage::F64(_)) => each!(F64, |x: f64| x, |y: f64| y),
        Some(CpuStorage::F32(_)) => each!(F32, f64::from, |y: f64| y as f32),
        Some(CpuStorage::F16(_)) => each!(F16, f16::to_f64, f16::from_f64),
        Some(CpuStorage::BF16(_)) => each!(BF16, bf16::to_f64, bf16::from_f64),
        Some(CpuStorage::U8(_)) => each!(U8, f64::from, |y: f64| y as u8),
        Some(CpuStorage::U32(_)) => each!(U32, f64::from, |y: f64| y as u32),
        Some(CpuStorage::I64(_)) => each!(I64, |x: i64| x as f64, |y: f64| y as i64),
        _ => candle_core::bail!("custom ops of the matrix do not know this dtype"),
    };
    Ok((storage, shape))
}

impl CustomOp1 for Square {
    fn name(&self) -> &'static str {
        SQUARE
    }
    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        map(&[(s, l)], |x| x[0] * x[0])
    }
    fn bwd(&self, x: &Tensor, _: &Tensor, g: &Tensor) -> candle_core::Result<Option<Tensor>> {
        Ok(Some(((x * 2.0)? * g)?))
    }
}

type Two = (Option<Tensor>, Option<Tensor>);
type Three = (Option<Tensor>, Option<Tensor>, Option<Tensor>);

impl CustomOp2 for Product {
    fn name(&self) -> &'static str {
        PRODUCT
    }
    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        map(&[(s1, l1), (s2, l2)], |x| x[0] * x[1])
    }
    fn bwd(&self, a: &Tensor, b: &Tensor, _: &Tensor, g: &Tensor) -> candle_core::Result<Two> {
        Ok((Some((b * g)?), Some((a * g)?)))
    }
}

impl CustomOp3 for ProductSum {
    fn name(&self) -> &'static str {
        PRODUCT_SUM
    }
    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
        s3: &CpuStorage,
        l3: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        map(&[(s1, l1), (s2, l2), (s3, l3)], |x| x[0] * x[1] + x[2])
    }
    fn bwd(&self, a: &Tensor, b: &Tensor, _: &Tensor, _: &Tensor, g: &Tensor) -> candle_core::Result<Three> {
        Ok((Some((b * g)?), Some((a * g)?), Some(g.clone())))
    }
}

/// A custom op of the matrix by Candle's own method.
///
/// # Errors
/// When there is none of this name.
pub fn eagerly(name: &str, x: &[Tensor]) -> Result<Tensor> {
    Ok(match (name, x) {
        (SQUARE, [a]) => a.apply_op1(Square)?,
        (PRODUCT, [a, b]) => a.apply_op2(b, Product)?,
        (PRODUCT_SUM, [a, b, c]) => a.apply_op3(b, c, ProductSum)?,
        _ => return Err(Error::NoTwin(format!("no custom op {name} of {} inputs", x.len()))),
    })
}

/// The same, recorded.
///
/// # Errors
/// When there is none of this name.
pub fn record(name: &str, shape: &[usize], dtype: DType, x: &[LazyTensor]) -> Result<LazyTensor> {
    Ok(match (name, x) {
        (SQUARE, [a]) => a.custom_op1(Square, shape, dtype)?,
        (PRODUCT, [a, b]) => a.custom_op2(b, Product, shape, dtype)?,
        (PRODUCT_SUM, [a, b, c]) => a.custom_op3(b, c, ProductSum, shape, dtype)?,
        _ => return Err(Error::NoTwin(format!("no custom op {name} of {} inputs", x.len()))),
    })
}

/// The quantised weight that a case's second input stands for; `None` for an op that has none.
///
/// # Errors
/// When Candle cannot quantise it.
pub fn weight(case: &Case, x: &[Tensor]) -> Result<Option<Arc<QTensor>>> {
    let (Op::QMatmul, Some(spec), Some(w)) = (&case.op, case.inputs.get(1), x.get(1)) else {
        return Ok(None);
    };
    let Domain::Quantised(kind) = spec.domain else {
        return Err(Error::NoTwin(format!("{} needs a weight to quantise", case.op)));
    };
    Ok(Some(Arc::new(QTensor::quantize(&w.to_dtype(DType::F32)?.force_contiguous()?, kind)?)))
}

/// x·wᵀ: Candle's quantised kernel, on a tracked x a product with the dequantised weight, both of rows.
///
/// # Errors
/// When Candle refuses.
pub fn product(x: &Tensor, weight: &Arc<QTensor>) -> Result<Tensor> {
    let (n, k) = weight.shape().dims2()?;
    let mut dims = x.dims().to_vec();
    let rows = x.elem_count() / k.max(1);
    if let Some(last) = dims.last_mut() {
        *last = n;
    }
    let flat = x.contiguous()?.reshape((rows, k))?;
    if x.track_op() {
        let w = weight.dequantize(x.device())?.to_dtype(x.dtype())?;
        return Ok(flat.matmul(&w.t()?)?.reshape(dims)?);
    }
    // the kernel takes no f64
    let flat = if x.dtype() == DType::F64 { flat.to_dtype(DType::F32)? } else { flat };
    let y = candle_core::Module::forward(&candle_core::quantized::QMatMul::QTensor(weight.clone()), &flat)?;
    Ok(y.to_dtype(x.dtype())?.reshape(dims)?)
}

/// What a case's inputs hold, a quantised weight dequantised.
///
/// # Errors
/// When an input cannot be read.
pub fn arrays(case: &Case, x: &[Tensor]) -> Result<Vec<crate::reference::Arr>> {
    let mut arrays = x.iter().map(to_arr).collect::<Result<Vec<_>>>()?;
    if let (Some(weight), Some(place)) = (weight(case, x)?, arrays.get_mut(1)) {
        *place = to_arr(&weight.dequantize(&candle_core::Device::Cpu)?)?;
    }
    Ok(arrays)
}
