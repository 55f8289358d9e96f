//! Memory for results.
//!
//! A kernel writes every element of its output, so zeroing it first would be a second pass over memory, made by one thread alone, which
//! moreover pulls all of it into that thread's cache.
#![allow(unsafe_code)] // a length without a write, see `fresh`

use crate::fault;
use crate::view::SliceMut;
use half::{bf16, f16};

mod sealed {
    /// Types for which any bytes are a value.
    pub trait Plain: Copy + Default + Send + Sync + 'static {
        /// What memory holds in builds with debug assertions, so that a test sees an element that nobody wrote.
        const POISON: Self;
    }
}
use sealed::Plain;

macro_rules! plain {
    ($($ty:ty, $poison:expr;)*) => { $(impl Plain for $ty { const POISON: Self = $poison; })* };
}

plain! {
    u8, 0xA5;
    u32, 0xA5A5_A5A5;
    i64, -0x5A5A_5A5A_5A5A_5A5B;
    bf16, bf16::NAN;
    f16, f16::NAN;
    f32, f32::NAN;
    f64, f64::NAN;
}

/// A `Vec` of `len` elements of no particular value, for a kernel to write. With debug assertions floats are NaN and integers odd values.
#[must_use]
pub fn fresh<T: Plain>(len: usize) -> Vec<T> {
    if fault::spoiled() || cfg!(any(debug_assertions, miri, not(any(target_arch = "x86_64", target_arch = "aarch64"))))
    {
        return vec![T::POISON; len];
    }
    let mut vec: Vec<T> = Vec::with_capacity(len);
    unspecified(&mut vec);
    // SAFETY: the capacity is at least `len`, and `unspecified` stands for a write of bytes that nobody knows: each element has a
    // value, and any bytes are one (`Plain` is sealed).
    unsafe { vec.set_len(len) };
    vec
}

/// Makes memory that holds an earlier result look as [`fresh`] memory does: with debug assertions, and where the feature `testing` is told
/// to spoil memory. Elsewhere it does nothing.
pub fn spoil(out: &mut SliceMut<'_>) {
    fn fill<T: Plain>(out: &mut [T]) {
        out.fill(T::POISON);
    }
    if cfg!(debug_assertions) || fault::spoiled() {
        match out {
            SliceMut::U8(out) => fill(out),
            SliceMut::U32(out) => fill(out),
            SliceMut::I64(out) => fill(out),
            SliceMut::BF16(out) => fill(out),
            SliceMut::F16(out) => fill(out),
            SliceMut::F32(out) => fill(out),
            SliceMut::F64(out) => fill(out),
        }
    }
}

/// Stands for a write of unknown bytes to the memory behind `vec`. The machine does nothing, but the compiler must assume that
/// the assembly, which is given the address and may write to memory, did: what was never written becomes a value like any other.
#[inline(always)]
fn unspecified<T: Plain>(vec: &mut Vec<T>) {
    #[cfg(all(not(miri), any(target_arch = "x86_64", target_arch = "aarch64")))]
    // SAFETY: no instruction is executed.
    unsafe {
        std::arch::asm!("/* {0} */", in(reg) vec.as_mut_ptr(), options(nostack, preserves_flags));
    }
    #[cfg(not(all(not(miri), any(target_arch = "x86_64", target_arch = "aarch64"))))]
    let _ = vec;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fresh_memory_has_its_length_and_takes_what_is_written() {
        for len in [0usize, 1, 7, 4096, 100_000] {
            let mut v = fresh::<f32>(len);
            assert_eq!(v.len(), len);
            for (i, x) in v.iter_mut().enumerate() {
                *x = i as f32;
            }
            assert!(v.iter().enumerate().all(|(i, x)| *x == i as f32));
            assert_eq!(fresh::<i64>(len).len(), len);
        }
    }

    /// The checked twin: where assertions are on, an element that a kernel leaves out does not look like a result.
    #[test]
    fn what_nobody_wrote_is_no_plausible_result() {
        if cfg!(debug_assertions) {
            assert!(fresh::<f32>(100).iter().all(|x| x.is_nan()));
            assert!(fresh::<bf16>(100).iter().all(|x| x.is_nan()));
            assert!(fresh::<u32>(3).iter().all(|x| *x == 0xA5A5_A5A5));
        }
    }
}
