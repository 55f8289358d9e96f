//! Between Candle tensors and the arrays of the references: exact values, bits, units in the last place.

use crate::reference::Arr;
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};

/// A tensor of `dtype` with the array's elements rounded to it.
///
/// # Errors
/// When Candle cannot make it.
pub fn to_tensor(arr: &Arr, dtype: DType) -> Result<Tensor> {
    let device = Device::Cpu;
    let tensor = match dtype {
        DType::I64 => Tensor::from_vec(arr.data.iter().map(|&x| x as i64).collect::<Vec<_>>(), &arr.dims[..], &device)?,
        DType::U32 => Tensor::from_vec(arr.data.iter().map(|&x| x as u32).collect::<Vec<_>>(), &arr.dims[..], &device)?,
        DType::U8 => Tensor::from_vec(arr.data.iter().map(|&x| x as u8).collect::<Vec<_>>(), &arr.dims[..], &device)?,
        _ => Tensor::from_vec(arr.data.clone(), &arr.dims[..], &device)?.to_dtype(dtype)?,
    };
    Ok(tensor)
}

/// The elements as f64, exactly (i64 beyond 2⁵³ excepted).
///
/// # Errors
/// When the tensor cannot be read.
pub fn to_arr(tensor: &Tensor) -> Result<Arr> {
    let flat = tensor.detach().contiguous()?.flatten_all()?;
    let data = match tensor.dtype() {
        DType::F64 => flat.to_vec1::<f64>()?,
        DType::F32 => flat.to_vec1::<f32>()?.into_iter().map(f64::from).collect(),
        DType::F16 => flat.to_vec1::<half::f16>()?.into_iter().map(f64::from).collect(),
        DType::BF16 => flat.to_vec1::<half::bf16>()?.into_iter().map(f64::from).collect(),
        DType::I64 => flat.to_vec1::<i64>()?.into_iter().map(|x| x as f64).collect(),
        DType::U32 => flat.to_vec1::<u32>()?.into_iter().map(f64::from).collect(),
        DType::U8 => flat.to_vec1::<u8>()?.into_iter().map(f64::from).collect(),
        other => return Err(Error::Unreadable(other)),
    };
    Ok(Arr { dims: tensor.dims().to_vec(), data })
}

/// The bits of every element in row-major order; every NaN has the same bits here, −0 and +0 have different ones.
///
/// # Errors
/// When the tensor cannot be read.
pub fn bits(tensor: &Tensor) -> Result<Vec<u64>> {
    let flat = tensor.detach().contiguous()?.flatten_all()?;
    let nan = u64::MAX;
    Ok(match tensor.dtype() {
        DType::F64 => flat.to_vec1::<f64>()?.into_iter().map(|x| if x.is_nan() { nan } else { x.to_bits() }).collect(),
        DType::F32 => {
            flat.to_vec1::<f32>()?.into_iter().map(|x| if x.is_nan() { nan } else { x.to_bits().into() }).collect()
        }
        DType::F16 => flat
            .to_vec1::<half::f16>()?
            .into_iter()
            .map(|x| if x.is_nan() { nan } else { x.to_bits().into() })
            .collect(),
        DType::BF16 => flat
            .to_vec1::<half::bf16>()?
            .into_iter()
            .map(|x| if x.is_nan() { nan } else { x.to_bits().into() })
            .collect(),
        DType::I64 => flat.to_vec1::<i64>()?.into_iter().map(|x| x as u64).collect(),
        DType::U32 => flat.to_vec1::<u32>()?.into_iter().map(u64::from).collect(),
        DType::U8 => flat.to_vec1::<u8>()?.into_iter().map(u64::from).collect(),
        other => return Err(Error::Unreadable(other)),
    })
}

/// The bits of a float format: digits after the leading one, the exponent of the smallest normal number, the largest number.
fn format(dtype: DType) -> (i32, i32, f64) {
    match dtype {
        DType::F16 => (10, -14, 65_504.0),
        DType::BF16 => (7, -126, f64::from(half::bf16::MAX)),
        DType::F32 => (23, -126, f64::from(f32::MAX)),
        DType::F64 => (52, -1022, f64::MAX),
        // integers: a unit is one
        _ => (0, 0, f64::MAX),
    }
}

/// The distance of neighbouring numbers of `dtype` at `scale`; for an integer dtype 1.
#[must_use]
pub fn ulp(dtype: DType, scale: f64) -> f64 {
    if !dtype.is_float() {
        return 1.0;
    }
    let (digits, smallest, largest) = format(dtype);
    let scale = scale.abs().min(largest);
    let exponent = if scale == 0.0 { smallest } else { (libm::ilogb(scale)).max(smallest) };
    libm::ldexp(1.0, exponent - digits)
}

/// Whether a number of this magnitude may become infinite in `dtype`: rounding to nearest gives infinity from half a unit
/// above the largest number.
#[must_use]
pub fn overflows(dtype: DType, x: f64) -> bool {
    let (_, _, largest) = format(dtype);
    dtype.is_float() && x.abs() >= largest
}
