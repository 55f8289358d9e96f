//! Cases of elementwise ops.

use super::{Extent, Table, FLOATS, INTEGERS};
use crate::case::Domain;
use candle_core::DType;
use candle_lazy_graph::{BinaryOp, CmpOp, Dims, Op, UnaryOp};

/// Shapes for one input; the larger ones cross a tile of a row program.
const SHAPES: [&[usize]; 9] =
    [&[3, 17], &[], &[2, 0, 4], &[2, 3, 5], &[5, 1030], &[1025], &[1], &[5, 1, 33], &[3, 1030]];

/// Pairs that broadcast.
const PAIRS: [(&[usize], &[usize]); 8] = [
    (&[3, 17], &[3, 17]),
    (&[2, 3, 5], &[5]),
    (&[2, 0, 4], &[4]),
    (&[4, 1, 6], &[5, 1]),
    (&[], &[3, 2]),
    (&[], &[]),
    (&[1, 1030], &[3, 1]),
    (&[2, 1, 4, 3], &[1, 5, 1, 3]),
];

fn domain(f: UnaryOp) -> Domain {
    match f {
        UnaryOp::Recip | UnaryOp::Sqrt | UnaryOp::Rsqrt | UnaryOp::Log => Domain::Positive,
        _ => Domain::Any,
    }
}

pub(super) fn add(t: &mut Table) {
    let shapes = t.some(&SHAPES, 2, 5);
    let pairs = t.some(&PAIRS, 2, 5);
    for &f in UnaryOp::ALL {
        for dtype in FLOATS {
            for dims in shapes {
                t.laid_out(&Op::Unary(f), &[], &[(dims, dtype, domain(f))]);
            }
            if t.extent != Extent::Smoke {
                t.laid_out(&Op::Unary(f), &[], &[(&[3, 41], dtype, Domain::Special)]);
            }
            // what has a limit on either side keeps it, and its gradient
            if matches!(f, UnaryOp::Sigmoid | UnaryOp::Tanh | UnaryOp::Erf | UnaryOp::Relu | UnaryOp::Silu) {
                t.laid_out(&Op::Unary(f), &[], &[(&[3, 17], dtype, Domain::Large)]);
            }
        }
    }
    for &f in BinaryOp::ALL {
        for dtype in FLOATS {
            for (a, b) in pairs {
                let right = if f == BinaryOp::Div { Domain::Positive } else { Domain::Any };
                // Candle's power is exp(b·log a)
                let left = if f == BinaryOp::Pow { Domain::Positive } else { Domain::Any };
                t.laid_out(&Op::Binary(f), &[], &[(a, dtype, left), (b, dtype, right)]);
            }
            if t.extent != Extent::Smoke && f != BinaryOp::Pow {
                let special = (&[3usize, 41][..], dtype, Domain::Special);
                t.laid_out(&Op::Binary(f), &[], &[special, special]);
            }
        }
        for dtype in INTEGERS {
            // no unsigned difference below zero, no division by zero
            let (left, right) = match f {
                BinaryOp::Sub => (Domain::Between(8, 16), Domain::Between(0, 8)),
                BinaryOp::Div => (Domain::Between(0, 16), Domain::Between(1, 4)),
                _ => (Domain::Ids(9), Domain::Ids(9)),
            };
            t.laid_out(&Op::Binary(f), &[], &[(&[3, 5], dtype, left), (&[5], dtype, right)]);
        }
        if matches!(f, BinaryOp::Sub | BinaryOp::Maximum | BinaryOp::Minimum) {
            let huge = (&[3usize, 5][..], DType::I64, Domain::Huge);
            t.laid_out(&Op::Binary(f), &[], &[huge, huge]);
        }
    }
    // negative numbers have whole powers, of a size that f16 holds
    for dtype in FLOATS {
        for (a, b) in t.some(&PAIRS, 1, 2) {
            let inputs = [(*a, dtype, Domain::Any), (*b, dtype, Domain::Between(0, 4))];
            t.laid_out(&Op::Binary(BinaryOp::Pow), &[], &inputs);
        }
    }
    for &f in CmpOp::ALL {
        let huge = (&[3usize, 5][..], DType::I64, Domain::Huge);
        t.laid_out(&Op::Compare(f), &[], &[huge, huge]);
        for dtype in FLOATS.into_iter().chain(INTEGERS) {
            let domain = if dtype.is_float() { Domain::Any } else { Domain::Ids(3) };
            for (a, b) in t.some(&PAIRS, 1, 3) {
                t.laid_out(&Op::Compare(f), &[], &[(a, dtype, domain), (b, dtype, domain)]);
            }
            for dims in t.some(&SHAPES, 1, 3) {
                t.laid_out(&Op::CompareScalar(f), &[1.0], &[(dims, dtype, domain)]);
                // a number that half precision rounds to one
                if matches!(dtype, DType::F16 | DType::BF16) {
                    t.laid_out(&Op::CompareScalar(f), &[1.0001], &[(dims, dtype, domain)]);
                }
            }
        }
        if t.extent != Extent::Smoke {
            let special = (&[3usize, 41][..], DType::F32, Domain::Special);
            t.laid_out(&Op::Compare(f), &[], &[special, special]);
        }
    }
    scalars_and_choices(t);
    casts(t);
    sources(t);
}

fn scalars_and_choices(t: &mut Table) {
    for dtype in FLOATS {
        for dims in t.some(&SHAPES, 2, 5) {
            // factors that every dtype holds exactly, so that no rounding of a scalar is measured
            for (mul, add) in [(1.5, -0.25), (0.5, 0.0), (1.0, 2.0), (-3.0, 0.125)] {
                t.laid_out(&Op::Affine, &[mul, add], &[(dims, dtype, Domain::Any)]);
            }
            // and such as none holds: eager rounds them to the dtype, we to f32
            for (mul, add) in [(0.1, 1.0 / 3.0), (1.0 / 3.0, 0.0)] {
                t.laid_out(&Op::Affine, &[mul, add], &[(dims, dtype, Domain::Any)]);
            }
            for e in [2.0, 3.0] {
                t.laid_out(&Op::Powf, &[e], &[(dims, dtype, Domain::Any)]);
            }
            for e in [2.0, 3.0, 0.5, -1.0, 2.5] {
                t.laid_out(&Op::Powf, &[e], &[(dims, dtype, Domain::Positive)]);
            }
        }
        for (a, b) in t.some(&PAIRS, 2, 4) {
            for condition in [DType::U8, DType::U32, DType::I64] {
                let inputs = [(*a, condition, Domain::Bits), (*a, dtype, Domain::Any), (*b, dtype, Domain::Any)];
                t.laid_out(&Op::Where, &[], &inputs);
            }
        }
    }
    for dtype in INTEGERS {
        t.laid_out(&Op::Affine, &[2.0, 1.0], &[(&[3, 5], dtype, Domain::Ids(9))]);
        let value = (&[3usize, 5][..], dtype, Domain::Ids(9));
        t.laid_out(&Op::Where, &[], &[(&[3, 5], DType::U8, Domain::Bits), value, value]);
    }
}

fn casts(t: &mut Table) {
    let all = || FLOATS.into_iter().chain(INTEGERS);
    for from in all() {
        for to in all().filter(|to| *to != from) {
            let shapes: [&[usize]; 5] = [&[3, 17], &[], &[7], &[2, 0, 4], &[2, 3, 5]];
            for dims in t.some(&shapes, 1, 4) {
                let domain = match (from.is_float(), to) {
                    // a fraction to be cut; no negative number for an unsigned dtype
                    (true, DType::U8 | DType::U32) => Domain::Positive,
                    (true, _) => Domain::Any,
                    (false, DType::U8 | DType::U32) => Domain::Ids(17),
                    (false, _) => Domain::Whole,
                };
                t.laid_out(&Op::Cast(to), &[], &[(dims, from, domain)]);
            }
        }
    }
    for (from, to) in [(DType::F64, DType::F32), (DType::F32, DType::F16), (DType::F32, DType::BF16)] {
        t.laid_out(&Op::Cast(to), &[], &[(&[3, 41], from, Domain::Special)]);
    }
}

fn sources(t: &mut Table) {
    for dtype in FLOATS.into_iter().chain(INTEGERS) {
        for dims in SHAPES {
            t.laid_out(&Op::Full { shape: Dims::from_slice(dims), dtype }, &[3.0], &[]);
        }
        for (queries, keys, window) in [(3, 3, None), (1, 5, None), (4, 9, Some(2)), (5, 5, Some(3)), (0, 4, None)] {
            t.laid_out(&Op::CausalMask { queries, keys, window, dtype }, &[], &[]);
        }
    }
}
