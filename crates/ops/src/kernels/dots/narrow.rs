//! The types whose products are summed in f32, and how AVX-512 reads sixteen of them.

use crate::element::Element;
use crate::view::Slice;
use half::{bf16, f16};
#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

/// Types that are summed in f32.
pub(crate) trait Narrow: Element {
    /// An input and an output as they are where this is f32.
    fn as_f32<'a, 'b>(_: &'a [Self], _: &'b mut [Self]) -> Option<(&'a [f32], &'b mut [f32])> {
        None
    }

    /// The run itself where its elements are f32.
    fn plain(_: &[Self]) -> Option<&[f32]> {
        None
    }

    /// The elements as an operand.
    fn slice(data: &[Self]) -> Slice<'_>;

    /// Sixteen elements as f32; with a mask those whose bit is set, the others are zeros.
    ///
    /// # Safety
    /// The machine has AVX-512 F, BW and VL, and `from` points to 16 readable elements, with a mask to those whose bit is set.
    #[cfg(target_arch = "x86_64")]
    unsafe fn load(from: *const Self, mask: Option<u16>) -> __m512;
}

impl Narrow for f32 {
    fn plain(data: &[f32]) -> Option<&[f32]> {
        Some(data)
    }

    fn slice(data: &[f32]) -> Slice<'_> {
        Slice::F32(data)
    }

    fn as_f32<'a, 'b>(input: &'a [f32], output: &'b mut [f32]) -> Option<(&'a [f32], &'b mut [f32])> {
        Some((input, output))
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    // SAFETY: the conditions are the trait's.
    unsafe fn load(from: *const f32, mask: Option<u16>) -> __m512 {
        // SAFETY: the caller's promise.
        unsafe {
            match mask {
                None => _mm512_loadu_ps(from),
                Some(mask) => _mm512_maskz_loadu_ps(mask, from),
            }
        }
    }
}

impl Narrow for bf16 {
    fn slice(data: &[bf16]) -> Slice<'_> {
        Slice::BF16(data)
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    // SAFETY: the conditions are the trait's.
    unsafe fn load(from: *const bf16, mask: Option<u16>) -> __m512 {
        // SAFETY: the caller's promise; a bf16 is 16 bits that stand for the upper half of an f32.
        unsafe {
            let half = match mask {
                None => _mm256_loadu_si256(from.cast()),
                Some(mask) => _mm256_maskz_loadu_epi16(mask, from.cast()),
            };
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(half)))
        }
    }
}

impl Narrow for f16 {
    fn slice(data: &[f16]) -> Slice<'_> {
        Slice::F16(data)
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    // SAFETY: the conditions are the trait's.
    unsafe fn load(from: *const f16, mask: Option<u16>) -> __m512 {
        // SAFETY: the caller's promise; an f16 is 16 bits in the machine's format.
        unsafe {
            _mm512_cvtph_ps(match mask {
                None => _mm256_loadu_si256(from.cast()),
                Some(mask) => _mm256_maskz_loadu_epi16(mask, from.cast()),
            })
        }
    }
}
