//! Every version of a loop against the body that it was compiled from, bit for bit.

use super::super::program::ReduceFn;
use super::super::reduce::{reduce, reduce_body, reduce_init, Held};
use super::*;
use crate::simd::tests::{fused, with_each};

const UNARY: [UnaryFn; 21] = [
    UnaryFn::Neg,
    UnaryFn::Abs,
    UnaryFn::Recip,
    UnaryFn::Sqr,
    UnaryFn::Sqrt,
    UnaryFn::Rsqrt,
    UnaryFn::Exp,
    UnaryFn::Log,
    UnaryFn::Sin,
    UnaryFn::Cos,
    UnaryFn::Tanh,
    UnaryFn::Erf,
    UnaryFn::Gelu,
    UnaryFn::GeluErf,
    UnaryFn::Relu,
    UnaryFn::Silu,
    UnaryFn::Sigmoid,
    UnaryFn::Floor,
    UnaryFn::Ceil,
    UnaryFn::Round,
    UnaryFn::Sign,
];
const BINARY: [BinaryFn; 14] = [
    BinaryFn::Add,
    BinaryFn::Sub,
    BinaryFn::Mul,
    BinaryFn::Div,
    BinaryFn::Quotient,
    BinaryFn::Max,
    BinaryFn::Min,
    BinaryFn::Pow,
    BinaryFn::Eq,
    BinaryFn::Ne,
    BinaryFn::Lt,
    BinaryFn::Le,
    BinaryFn::Gt,
    BinaryFn::Ge,
];
/// Lengths around those of a vector, a chunk of lanes, and a segment.
const LENGTHS: [usize; 14] = [0, 1, 7, 8, 15, 16, 17, 31, 64, 127, 129, 1000, 1024, 2500];

/// Numbers of every size and sign, with the special ones among them.
fn numbers<T: Real>(n: usize, seed: u64) -> Vec<T> {
    let special = [0.0, -0.0, f64::INFINITY, f64::NEG_INFINITY, f64::NAN, 1e-42, -1e-42, 88.9, -103.9, 3e38];
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..n)
        .map(|i| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            let unit = (state >> 11) as f64 / 2f64.powi(53) * 2.0 - 1.0;
            let value =
                if i % 11 == 10 { special[(state % 10) as usize] } else { unit * 10f64.powi((i % 4) as i32 - 1) };
            T::from_f64(value)
        })
        .collect()
}

/// The bits, all NaN alike: which NaN an operation of two gives is the compiler's choice.
fn bits<T: Real>(x: &[T]) -> Vec<u64> {
    x.iter().map(|x| if x.is_nan() { u64::MAX } else { x.to_f64().to_bits() }).collect()
}

/// Calls the body with the same multiply-add as the version.
macro_rules! body {
    ($fma:expr, $body:ident($($arg:expr),* $(,)?)) => {
        if $fma { $body::<_, true>($($arg),*) } else { $body::<_, false>($($arg),*) }
    };
}

fn elementwise_versions<T: Real>() {
    for n in LENGTHS {
        let (x, y) = (numbers::<T>(n, 3), numbers::<T>(n, 5));
        let vec = |data| Arg::Vec { data, pitch: n };
        let scalar = Arg::Const(T::from_f64(-0.75));
        with_each(|isa| {
            let fma = fused(isa);
            for f in UNARY {
                let (mut got, mut want) = (vec![T::ZERO; n], vec![T::ZERO; n]);
                unary(f, vec(&x), &mut got, 1, n);
                body!(fma, unary_body(f, vec(&x), &mut want, 1, n));
                assert_eq!(bits(&got), bits(&want), "{f:?} {isa:?} {n}");
            }
            for f in BINARY {
                for (a, b) in [(vec(&x), vec(&y)), (vec(&x), scalar), (scalar, vec(&y)), (scalar, scalar)] {
                    let (mut got, mut want) = (vec![T::ZERO; n], vec![T::ZERO; n]);
                    binary(f, a, b, &mut got, 1, n);
                    body!(fma, binary_body(f, a, b, &mut want, 1, n));
                    assert_eq!(bits(&got), bits(&want), "{f:?} {isa:?} {n}");
                }
            }
            let (mut got, mut want) = (vec![T::ZERO; n], vec![T::ZERO; n]);
            select(vec(&x), vec(&y), scalar, &mut got, 1, n);
            body!(fma, select_body(vec(&x), vec(&y), scalar, &mut want, 1, n));
            assert_eq!(bits(&got), bits(&want), "select {isa:?} {n}");
            for to in [FloatKind::F16, FloatKind::BF16, FloatKind::F32] {
                round(to, vec(&x), &mut got, 1, n);
                body!(fma, round_body(to, vec(&x), &mut want, 1, n));
                assert_eq!(bits(&got), bits(&want), "{to:?} {isa:?} {n}");
            }
            root_mean(vec(&x), 12.0, 1e-5, &mut got, 1, n);
            body!(fma, root_mean_body(vec(&x), 12.0, 1e-5, &mut want, 1, n));
            assert_eq!(bits(&got), bits(&want), "root mean {isa:?} {n}");
        });
    }
}

fn reducing_versions<T: Real>() {
    for n in LENGTHS {
        let clean: Vec<T> =
            numbers::<T>(n, 7).into_iter().map(|x| if x.to_f64().abs() < 1e6 { x } else { T::ONE }).collect();
        for x in [&clean, &numbers::<T>(n, 9)] {
            with_each(|isa| {
                for f in [ReduceFn::Sum, ReduceFn::Max, ReduceFn::Min] {
                    let (mut got, mut want) = (vec![reduce_init::<T>(f); 2], vec![reduce_init::<T>(f); 2]);
                    reduce(f, Arg::Vec { data: x, pitch: n }, &mut Held::new(&mut got, 1), 1, n, true);
                    let mut held = Held::new(&mut want, 1);
                    body!(fused(isa), reduce_body(f, Arg::Vec { data: x, pitch: n }, &mut held, 1, n, true));
                    assert_eq!(bits(&got), bits(&want), "{f:?} {isa:?} {n}");
                }
            });
        }
    }
}

#[test]
fn elementwise_loops_give_the_bits_of_their_bodies() {
    elementwise_versions::<f32>();
    elementwise_versions::<f64>();
}

#[test]
fn reductions_give_the_bits_of_their_bodies() {
    reducing_versions::<f32>();
    reducing_versions::<f64>();
}
