//! Instruction sets: the same loops compiled for several, one chosen at run time.
//!
//! A loop is written once, generic and without intrinsics; `versions!` compiles it for each instruction set that the target may
//! have and picks the widest that the machine has. Vectors of any width give the same bits. A machine with a fused
//! multiply-add gives other bits than one without: the elementary functions round less often there.

use std::sync::OnceLock;

/// An instruction set that loops are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Isa {
    /// What every machine of the target has: SSE2 on x86-64, NEON on AArch64.
    Portable,
    /// AVX2, FMA and F16C.
    Avx2,
    /// AVX-512 F, BW, DQ and VL, and the above.
    Avx512,
}

/// The instruction set in use: the widest that the machine has, or the narrower one that the environment variable
/// `CANDLE_LAZY_ISA` names (`portable`, `avx2`, `avx512`; anything else is as if it were not set) when it is first asked for.
pub fn isa() -> Isa {
    #[cfg(test)]
    if let Some(forced) = tests::FORCED.get() {
        return forced;
    }
    static CHOSEN: OnceLock<Isa> = OnceLock::new();
    *CHOSEN.get_or_init(|| {
        let widest = widest();
        let wanted = match std::env::var("CANDLE_LAZY_ISA").as_deref() {
            Ok("portable") => Isa::Portable,
            Ok("avx2") => Isa::Avx2,
            _ => Isa::Avx512,
        };
        widest.min(wanted)
    })
}

/// Whether what every machine of the target has includes a fused multiply-add.
pub(crate) const PORTABLE_FMA: bool = cfg!(target_arch = "aarch64");

/// a·b + c, rounded once where `FMA`, else twice.
#[inline(always)]
pub(crate) fn mul_add<const FMA: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FMA {
        a.mul_add(b, c)
    } else {
        a * b + c
    }
}

/// The widest instruction set that the machine has.
fn widest() -> Isa {
    #[cfg(target_arch = "x86_64")]
    {
        let avx2 =
            is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
        let avx512 = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl");
        if avx2 && avx512 {
            return Isa::Avx512;
        }
        if avx2 {
            return Isa::Avx2;
        }
    }
    Isa::Portable
}

/// Defines a function that runs `$body`, an `#[inline(always)]` function of the same arguments, compiled for the machine's
/// instruction set. The body's last generic argument says whether that has a fused multiply-add.
macro_rules! versions {
    (
        $(#[$meta:meta])*
        $vis:vis fn $name:ident<$($generic:ident: $bound:path),*>($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? = $body:ident;
    ) => {
        $(#[$meta])*
        #[allow(clippy::too_many_arguments)] // those of the body
        $vis fn $name<$($generic: $bound),*>($($arg: $ty),*) $(-> $ret)? {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
                #[allow(clippy::too_many_arguments)]
                fn avx512<$($generic: $bound),*>($($arg: $ty),*) $(-> $ret)? {
                    $body::<$($generic,)* true>($($arg),*)
                }
                #[target_feature(enable = "avx2,fma,f16c")]
                #[allow(clippy::too_many_arguments)]
                fn avx2<$($generic: $bound),*>($($arg: $ty),*) $(-> $ret)? {
                    $body::<$($generic,)* true>($($arg),*)
                }
                match $crate::simd::isa() {
                    // SAFETY: `isa` names a set only where the machine has all of its features.
                    $crate::simd::Isa::Avx512 => return unsafe { avx512($($arg),*) },
                    // SAFETY: as above.
                    $crate::simd::Isa::Avx2 => return unsafe { avx2($($arg),*) },
                    $crate::simd::Isa::Portable => {}
                }
            }
            $body::<$($generic,)* { $crate::simd::PORTABLE_FMA }>($($arg),*)
        }
    };
}
pub(crate) use versions;

/// Multiplies and adds numbers that stay in registers, `rounds` times, as fast as the machine can; says how many operations that were, 0
/// where nobody has written it for the instruction set. For measuring what part of the machine's arithmetic a kernel uses.
#[cfg(feature = "testing")]
#[doc(hidden)]
pub fn arithmetic(rounds: usize) -> usize {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::*;
        use std::hint::black_box;
        /// Enough that no sum waits for the one before.
        const SUMS: usize = 12;
        #[target_feature(enable = "avx512f")]
        fn avx512(rounds: usize) {
            let mut sums = [_mm512_setzero_ps(); SUMS];
            let x = _mm512_set1_ps(black_box(0.999));
            for _ in 0..rounds {
                for sum in &mut sums {
                    *sum = _mm512_fmadd_ps(*sum, x, x);
                }
            }
            black_box(sums);
        }
        #[target_feature(enable = "avx2,fma")]
        fn avx2(rounds: usize) {
            let mut sums = [_mm256_setzero_ps(); SUMS];
            let x = _mm256_set1_ps(black_box(0.999));
            for _ in 0..rounds {
                for sum in &mut sums {
                    *sum = _mm256_fmadd_ps(*sum, x, x);
                }
            }
            black_box(sums);
        }
        match isa() {
            Isa::Avx512 => {
                // SAFETY: `isa` names a set only where the machine has all of its features.
                unsafe { avx512(rounds) };
                return 2 * 16 * SUMS * rounds;
            }
            Isa::Avx2 => {
                // SAFETY: as above.
                unsafe { avx2(rounds) };
                return 2 * 8 * SUMS * rounds;
            }
            Isa::Portable => {}
        }
    }
    let _ = rounds;
    0
}

/// Asks for a line of the cache, where the machine can be asked. For measuring how fast memory comes.
#[cfg(feature = "testing")]
#[doc(hidden)]
#[inline(always)]
pub fn ask_for(line: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: every x86-64 has the instruction, and it reads nothing.
    unsafe {
        use std::arch::x86_64::{_mm_prefetch, _MM_HINT_T0};
        _mm_prefetch::<_MM_HINT_T0>(line.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = line;
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::cell::Cell;

    thread_local! {
        pub(super) static FORCED: Cell<Option<Isa>> = const { Cell::new(None) };
    }

    /// Runs `f` with each instruction set that the machine has, on this thread alone: another knows of no forced one.
    pub(crate) fn with_each(mut f: impl FnMut(Isa)) {
        for isa in [Isa::Portable, Isa::Avx2, Isa::Avx512].into_iter().filter(|isa| *isa <= widest()) {
            FORCED.set(Some(isa));
            crate::kernels::team::with_threads(1, || f(isa));
            FORCED.set(None);
        }
    }

    /// Whether the versions for an instruction set have a fused multiply-add.
    pub(crate) fn fused(isa: Isa) -> bool {
        isa != Isa::Portable || PORTABLE_FMA
    }
}
