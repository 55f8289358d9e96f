//! Cases of ops that pick and place by index, that make numbers, and of group norm and cross entropy.

use super::{Table, FLOATS, INTEGERS};
use crate::case::Domain;
use candle_core::DType;
use candle_lazy_graph::{ArgOp, Dims, Distribution, Op, ScatterOp};

const IDS: [DType; 3] = [DType::U32, DType::I64, DType::U8];

pub(super) fn add(t: &mut Table) {
    for dtype in FLOATS.into_iter().chain(INTEGERS) {
        indexed(t, dtype);
        strides(t, dtype);
        extremes(t, dtype);
        t.laid_out(&Op::ToDevice, &[], &[(&[2, 3, 4], dtype, Domain::Any)]);
        for len in [0, 1, 7, 1030] {
            // a step that every dtype holds exactly, so that no rounding of a scalar is measured
            let (start, step) = if dtype.is_float() { (-1.5, 0.25) } else { (3.0, 2.0) };
            let len = if dtype == DType::U8 { len.min(100) } else { len };
            t.laid_out(&Op::Arange { len, dtype }, &[start, step], &[]);
        }
    }
    for dtype in FLOATS {
        scalars(t, dtype);
        random(t, dtype);
        losses_and_groups(t, dtype);
    }
}

fn indexed(t: &mut Table, dtype: DType) {
    let shapes: [(u8, &[usize], &[usize]); 9] = [
        (1, &[2, 5, 3], &[2, 4, 3]),
        // ids of x's size, which Candle's backward of scatter_add needs
        (0, &[5, 3], &[5, 3]),
        (1, &[2, 4, 3], &[2, 4, 3]),
        (0, &[5, 3], &[7, 3]),
        (1, &[4, 6], &[4, 2]),
        (2, &[2, 3, 7], &[2, 3, 9]),
        (0, &[6], &[3]),
        (1, &[3, 5], &[3, 0]),
        (1, &[0, 5], &[0, 2]),
    ];
    for (dim, x, ids) in t.some(&shapes, 2, 7).to_vec() {
        let n = x[usize::from(dim)];
        for id in t.some(&IDS, 1, 3).to_vec() {
            // whole numbers that stay in every dtype's range when a few of them meet
            let values = if dtype.is_float() { Domain::Any } else { Domain::Ids(9) };
            let (x, src, ids) = ((x, dtype, values), (ids, dtype, values), (ids, id, Domain::Ids(n)));
            t.laid_out(&Op::Gather { dim }, &[], &[x, ids]);
            t.laid_out(&Op::Scatter { op: ScatterOp::Set, dim }, &[], &[x, ids, src]);
            t.laid_out(&Op::Scatter { op: ScatterOp::Add, dim }, &[], &[x, ids, src]);
            let count = [src.0[usize::from(dim)]];
            t.laid_out(&Op::IndexAdd { dim }, &[], &[x, (&count, id, Domain::Ids(n)), src]);
        }
    }
    // fewer ids than rows: where Candle counts right in spite of it, and where it does not
    let fewer: [(u8, [usize; 3]); 4] = [(1, [2, 5, 3]), (1, [4, 5, 2]), (2, [2, 6, 4]), (2, [4, 5, 2])];
    for (dim, ids) in fewer {
        let n = [4, 6, 3][usize::from(dim)];
        let inputs = [(&[4, 6, 3][..], dtype, Domain::Any), (&ids[..], DType::U32, Domain::Ids(n))];
        t.laid_out(&Op::Gather { dim }, &[], &inputs);
    }
}

fn strides(t: &mut Table, dtype: DType) {
    let all: [(u8, usize, usize, usize, &[usize]); 6] = [
        (1, 1, 2, 3, &[2, 7, 3]),
        (0, 0, 3, 2, &[5, 3]),
        (2, 2, 4, 4, &[2, 3, 17]),
        (0, 0, 1, 9, &[3]),
        (1, 0, 0, 2, &[3, 4]),
        (0, 1, 515, 2, &[1031]),
    ];
    for (dim, start, len, step, dims) in t.some(&all, 2, 5).to_vec() {
        t.laid_out(&Op::Stride { dim, start, len, step }, &[], &[(dims, dtype, Domain::Any)]);
    }
}

fn extremes(t: &mut Table, dtype: DType) {
    let shapes: [(u8, &[usize]); 6] =
        [(1, &[3, 17]), (0, &[5, 4]), (1, &[2, 6, 3]), (0, &[1]), (2, &[2, 3, 1030]), (1, &[0, 3])];
    for (dim, dims) in t.some(&shapes, 2, 6).to_vec() {
        for op in [ArgOp::Max, ArgOp::Min] {
            for keepdim in [true, false] {
                t.laid_out(&Op::ArgReduce { op, dim, keepdim }, &[], &[(dims, dtype, Domain::Any)]);
            }
        }
    }
}

fn scalars(t: &mut Table, dtype: DType) {
    let shapes: [&[usize]; 6] = [&[3, 17], &[], &[2, 0, 4], &[2, 3, 5], &[1025], &[5, 1, 33]];
    for dims in t.some(&shapes, 2, 6).to_vec() {
        for alpha in [1.0, 0.5] {
            t.laid_out(&Op::Elu, &[alpha], &[(dims, dtype, Domain::Any)]);
        }
        for (low, high) in [(-1.0, 1.5), (0.25, f64::INFINITY), (f64::NEG_INFINITY, -0.5), (1.0, -1.0)] {
            t.laid_out(&Op::Clamp, &[low, high], &[(dims, dtype, Domain::Any)]);
        }
    }
    if t.extent != super::Extent::Smoke {
        t.laid_out(&Op::Clamp, &[-1.0, 1.5], &[(&[3, 41], dtype, Domain::Special)]);
    }
}

fn random(t: &mut Table, dtype: DType) {
    let shapes: [&[usize]; 6] = [&[3, 17], &[], &[2, 0, 4], &[1025], &[5, 1, 33], &[70_003]];
    for dims in t.some(&shapes, 2, 6).to_vec() {
        for (dist, scalars) in [
            (Distribution::Uniform, [0.0, 1.0]),
            (Distribution::Uniform, [-2.0, 3.0]),
            (Distribution::Normal, [0.0, 1.0]),
            (Distribution::Normal, [1.0, 0.5]),
        ] {
            for key in INTEGERS {
                let op = Op::Random { dist, shape: Dims::from_slice(dims), dtype };
                t.laid_out(&op, &scalars, &[(&[], key, Domain::Ids(200))]);
            }
        }
    }
}

fn losses_and_groups(t: &mut Table, dtype: DType) {
    let norms: [(usize, &[usize]); 6] =
        [(2, &[2, 4, 3]), (1, &[1, 3, 5, 2]), (3, &[2, 6, 17]), (4, &[3, 4, 2]), (2, &[0, 4, 3]), (4, &[3, 4, 7])];
    for (groups, dims) in t.some(&norms, 1, 6).to_vec() {
        let channels = [dims[1]];
        let (x, vector) = ((dims, dtype, Domain::Any), (&channels[..], dtype, Domain::Any));
        for (weight, bias) in [(true, true), (true, false), (false, true), (false, false)] {
            let mut inputs = vec![x];
            inputs.extend(vec![vector; usize::from(weight) + usize::from(bias)]);
            t.laid_out(&Op::GroupNorm { groups, weight, bias }, &[1e-5], &inputs);
        }
    }
    for (n, classes) in t.some(&[(3, 17), (1, 5), (8, 1030), (4, 1)], 2, 4).to_vec() {
        for ids in IDS {
            let targets = (&[n][..], ids, Domain::Ids(classes.min(200)));
            t.laid_out(&Op::CrossEntropy, &[], &[(&[n, classes], dtype, Domain::Any), targets]);
        }
    }
    let targets = (&[3usize][..], DType::U32, Domain::Ids(7));
    t.laid_out(&Op::CrossEntropy, &[], &[(&[3, 7], dtype, Domain::Rare), targets]);
    let ids = (&[3usize, 4][..], DType::U32, Domain::Ids(7));
    t.laid_out(&Op::Gather { dim: 1 }, &[], &[(&[3, 7], dtype, Domain::Special), ids]);
}
