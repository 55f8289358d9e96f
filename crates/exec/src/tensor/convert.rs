//! Numbers and lists from and into lazy tensors, and how a tensor prints: Candle's conversions.

use super::LazyTensor;
use crate::error::{Error, Result};
use candle_core::{Device, WithDType};
use half::{bf16, f16};

// One impl per element type: for a type parameter the compiler could not tell the depths of nesting apart.
macro_rules! read_as {
    ($read:ident: $($list:ty),+) => {
        $(
            impl TryFrom<&LazyTensor> for $list {
                type Error = Error;
                #[track_caller]
                fn try_from(tensor: &LazyTensor) -> Result<Self> {
                    tensor.$read()
                }
            }

            impl TryFrom<LazyTensor> for $list {
                type Error = Error;
                #[track_caller]
                fn try_from(tensor: LazyTensor) -> Result<Self> {
                    tensor.$read()
                }
            }
        )+
    };
}

impl<T: WithDType> TryFrom<&[T]> for LazyTensor {
    type Error = Error;
    #[track_caller]
    fn try_from(values: &[T]) -> Result<Self> {
        Self::from_slice(values, values.len(), &Device::Cpu)
    }
}

impl<T: WithDType> TryFrom<Vec<T>> for LazyTensor {
    type Error = Error;
    #[track_caller]
    fn try_from(values: Vec<T>) -> Result<Self> {
        let len = values.len();
        Self::from_vec(values, len, &Device::Cpu)
    }
}

macro_rules! numbers {
    ($($number:ty),+ $(,)?) => {
        $(
            read_as!(to_scalar: $number);
            read_as!(to_vec1: Vec<$number>);
            read_as!(to_vec2: Vec<Vec<$number>>);
            read_as!(to_vec3: Vec<Vec<Vec<$number>>>);

            impl TryFrom<$number> for LazyTensor {
                type Error = Error;
                #[track_caller]
                fn try_from(value: $number) -> Result<Self> {
                    Self::new(value, &Device::Cpu)
                }
            }
        )+
    };
}

numbers!(f64, f32, f16, bf16, i64, u32, u8);

impl std::fmt::Display for LazyTensor {
    /// The values, as Candle prints them: this evaluates. Where that fails, the error is printed.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.eval() {
            Ok(tensor) => std::fmt::Display::fmt(&tensor, f),
            Err(error) => write!(f, "{self:?}: {error}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Tensor;

    #[test]
    fn there_and_back() {
        let number = LazyTensor::try_from(2.5f32).unwrap();
        assert_eq!(f32::try_from(&number).unwrap(), 2.5);
        assert!(f64::try_from(number).is_err(), "another dtype");
        let list = LazyTensor::try_from(vec![1u32, 2, 3]).unwrap();
        assert_eq!(Vec::<u32>::try_from(&list).unwrap(), [1, 2, 3]);
        let list = LazyTensor::try_from(&[1i64, 2][..]).unwrap();
        assert_eq!(Vec::<Vec<i64>>::try_from(list.unsqueeze(0).unwrap()).unwrap(), [[1, 2]]);
        assert!(Vec::<i64>::try_from(list.unsqueeze(0).unwrap()).is_err(), "two dims");
    }

    #[test]
    fn values_print_as_candles() {
        let tensor = Tensor::new(&[[1f32, 2.], [3., 4.]], &Device::Cpu).unwrap();
        let lazy = LazyTensor::from(&tensor);
        assert_eq!((&lazy + 1.0).unwrap().to_string(), (&tensor + 1.0).unwrap().to_string());
        let broken = tensor.embedding(&Tensor::new(&[5u32], &Device::Cpu).unwrap());
        assert!(broken.is_err());
        let broken = lazy.embedding(&LazyTensor::new(&[5u32], &Device::Cpu).unwrap()).unwrap();
        assert!(broken.to_string().contains("convert.rs"), "{broken}");
    }
}
