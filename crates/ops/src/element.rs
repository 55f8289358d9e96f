//! Element types: typed access to `Slice`s and the conversions that Candle's `to_dtype` makes.

use crate::view::{Slice, SliceMut};
use candle_core::DType;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

/// One of the seven element types that kernels read and write.
pub(crate) trait Element: Copy + Default + Send + Sync + PartialOrd + std::fmt::Debug + 'static {
    /// Candle's name for it.
    const DTYPE: DType;
    /// Bits of the integer range when it is an integer type.
    const IS_INT: bool;
    fn to_f32(self) -> f32;
    fn to_f64(self) -> f64;
    /// Integers as they are; floats truncate and saturate as `as` does.
    fn to_i64(self) -> i64;
    fn from_f32(v: f32) -> Self;
    fn from_f64(v: f64) -> Self;
    /// Wraps to a narrower integer type as `as` does.
    fn from_i64(v: i64) -> Self;
    fn of<'a>(s: &Slice<'a>) -> Option<&'a [Self]>;
    fn of_mut<'a, 'b>(s: &'b mut SliceMut<'a>) -> Option<&'b mut [Self]>;

    /// The run itself where its elements are f32.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    fn f32s(_: &[Self]) -> Option<&[f32]> {
        None
    }

    /// The same, to write.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    fn f32s_mut(_: &mut [Self]) -> Option<&mut [f32]> {
        None
    }

    /// Widens a run of elements to f32.
    #[inline]
    fn widen(src: &[Self], dst: &mut [f32]) {
        for (d, s) in dst.iter_mut().zip(src) {
            *d = s.to_f32();
        }
    }

    /// Rounds a run of f32 to this type.
    #[inline]
    fn round_from(src: &[f32], dst: &mut [Self]) {
        for (d, s) in dst.iter_mut().zip(src) {
            *d = Self::from_f32(*s);
        }
    }
}

macro_rules! element {
    ($t:ty, $variant:ident, $int:literal, $to32:expr, $to64:expr, $toi:expr, $from32:expr, $from64:expr, $fromi:expr $(, $extra:item)*) => {
        impl Element for $t {
            const DTYPE: DType = DType::$variant;
            const IS_INT: bool = $int;
            #[inline(always)]
            fn to_f32(self) -> f32 {
                $to32(self)
            }
            #[inline(always)]
            fn to_f64(self) -> f64 {
                $to64(self)
            }
            #[inline(always)]
            fn to_i64(self) -> i64 {
                $toi(self)
            }
            #[inline(always)]
            fn from_f32(v: f32) -> Self {
                $from32(v)
            }
            #[inline(always)]
            fn from_f64(v: f64) -> Self {
                $from64(v)
            }
            #[inline(always)]
            fn from_i64(v: i64) -> Self {
                $fromi(v)
            }
            fn of<'a>(s: &Slice<'a>) -> Option<&'a [Self]> {
                match s {
                    Slice::$variant(v) => Some(v),
                    _ => None,
                }
            }
            fn of_mut<'a, 'b>(s: &'b mut SliceMut<'a>) -> Option<&'b mut [Self]> {
                match s {
                    SliceMut::$variant(v) => Some(v),
                    _ => None,
                }
            }
            $($extra)*
        }
    };
}

element!(u8, U8, true, |v| v as f32, |v| v as f64, |v| v as i64, |v| v as u8, |v| v as u8, |v| v as u8);
element!(u32, U32, true, |v| v as f32, |v| v as f64, |v| v as i64, |v| v as u32, |v| v as u32, |v| v as u32);
element!(i64, I64, true, |v| v as f32, |v| v as f64, |v| v, |v| v as i64, |v| v as i64, |v| v);
element!(
    f32,
    F32,
    false,
    |v| v,
    |v| v as f64,
    |v| v as i64,
    |v| v,
    |v| v as f32,
    |v| v as f32,
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    fn f32s(run: &[Self]) -> Option<&[f32]> {
        Some(run)
    },
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    fn f32s_mut(run: &mut [Self]) -> Option<&mut [f32]> {
        Some(run)
    }
);
element!(f64, F64, false, |v| v as f32, |v| v, |v| v as i64, |v| v as f64, |v| v, |v| v as f64);
element!(
    f16,
    F16,
    false,
    f16::to_f32,
    f16::to_f64,
    |v: f16| v.to_f32() as i64,
    f16::from_f32,
    f16::from_f64,
    |v| f16::from_f32(v as f32),
    // `half` converts slices with F16C where the machine has it; the results are the same.
    fn widen(src: &[Self], dst: &mut [f32]) {
        let n = src.len().min(dst.len());
        src[..n].convert_to_f32_slice(&mut dst[..n]);
    },
    fn round_from(src: &[f32], dst: &mut [Self]) {
        let n = src.len().min(dst.len());
        dst[..n].convert_from_f32_slice(&src[..n]);
    }
);
element!(
    bf16,
    BF16,
    false,
    bf16_to_f32,
    |v| f64::from(bf16_to_f32(v)),
    |v| bf16_to_f32(v) as i64,
    bf16_from_f32,
    bf16::from_f64,
    |v| bf16_from_f32(v as f32)
);

/// A bf16 is the upper half of the f32 of the same value.
#[inline(always)]
fn bf16_to_f32(v: bf16) -> f32 {
    f32::from_bits((v.to_bits() as u32) << 16)
}

/// Round to nearest, ties to even, without a branch so that loops over it vectorise; NaN stays a quiet NaN.
#[inline(always)]
fn bf16_from_f32(v: f32) -> bf16 {
    let bits = v.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    let nan = (bits >> 16) | 0x40;
    let out = if v.is_nan() { nan } else { rounded };
    bf16::from_bits(out as u16)
}
