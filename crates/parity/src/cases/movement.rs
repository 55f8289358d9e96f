//! Cases of views, of ops that move data, and of reductions.

use super::{Table, FLOATS, INTEGERS};
use crate::case::{Case, Domain, InputSpec, Layout};
use candle_core::DType;
use candle_lazy_graph::{Dims, Op, ReduceOp};
use smallvec::SmallVec;

fn perm(dims: &[u8]) -> SmallVec<[u8; 8]> {
    SmallVec::from_slice(dims)
}

fn reshape(dims: &[usize]) -> Op {
    Op::Reshape { shape: Dims::from_slice(dims) }
}

fn broadcast(dims: &[usize]) -> Op {
    Op::Broadcast { shape: Dims::from_slice(dims) }
}

pub(super) fn add(t: &mut Table) {
    let views: [(Op, &[usize]); 24] = [
        (reshape(&[6, 4]), &[2, 3, 4]),
        (Op::Permute { perm: perm(&[2, 0, 1]) }, &[2, 3, 4]),
        (Op::Narrow { dim: 1, start: 1, len: 2 }, &[2, 4, 3]),
        (broadcast(&[3, 4, 5]), &[4, 1]),
        (Op::Contiguous, &[2, 3, 4]),
        (Op::Detach, &[2, 3]),
        (Op::Barrier, &[2, 3]),
        (Op::Checkpoint { region: 0 }, &[2, 3]),
        (reshape(&[24]), &[2, 3, 4]),
        (reshape(&[2, 3, 2, 2]), &[2, 3, 4]),
        (reshape(&[]), &[1, 1]),
        (reshape(&[1]), &[]),
        (reshape(&[0, 7]), &[3, 0]),
        (Op::Permute { perm: perm(&[1, 0]) }, &[3, 7]),
        (Op::Permute { perm: perm(&[0, 2, 1, 3]) }, &[2, 3, 4, 5]),
        (Op::Permute { perm: perm(&[]) }, &[]),
        (Op::Permute { perm: perm(&[1, 0]) }, &[0, 7]),
        (Op::Narrow { dim: 0, start: 2, len: 3 }, &[6, 3]),
        (Op::Narrow { dim: 1, start: 1, len: 0 }, &[3, 4]),
        (Op::Narrow { dim: 2, start: 0, len: 1 }, &[2, 3, 4]),
        (broadcast(&[2, 3]), &[]),
        (broadcast(&[5, 2, 3]), &[2, 3]),
        (broadcast(&[0, 3]), &[1, 3]),
        (Op::Contiguous, &[]),
    ];
    let indexed: [(u8, &[usize], usize); 6] =
        [(0, &[5, 3], 7), (1, &[2, 4, 3], 3), (0, &[5], 2), (2, &[2, 3, 4], 5), (0, &[5, 3], 0), (1, &[3, 5, 0], 2)];
    for dtype in FLOATS.into_iter().chain(INTEGERS) {
        for (op, dims) in t.some(&views, 8, 24) {
            t.laid_out(op, &[], &[(dims, dtype, Domain::Any)]);
        }
        concat_and_assign(t, dtype);
        for (dim, dims, count) in t.some(&indexed, 2, 6) {
            let n = dims[usize::from(*dim)];
            for ids in t.some(&[DType::U32, DType::I64, DType::U8], 1, 3) {
                let inputs = [(*dims, dtype, Domain::Any), (&[*count][..], *ids, Domain::Ids(n))];
                t.laid_out(&Op::IndexSelect { dim: *dim }, &[], &inputs);
            }
        }
        let tables: [(&[usize], &[usize]); 4] =
            [(&[9, 6], &[2, 5]), (&[9, 6], &[]), (&[4, 3], &[7]), (&[4, 3], &[2, 0])];
        for (table, ids) in t.some(&tables, 1, 4) {
            let inputs = [(*table, dtype, Domain::Any), (*ids, DType::U32, Domain::Ids(table[0]))];
            t.laid_out(&Op::Embedding, &[], &inputs);
        }
    }
    reductions(t);
}

fn concat_and_assign(t: &mut Table, dtype: DType) {
    let parts: [(u8, &[&[usize]]); 6] = [
        (1, &[&[2, 3], &[2, 4], &[2, 1]]),
        (0, &[&[2, 3], &[5, 3]]),
        (2, &[&[2, 3, 4], &[2, 3, 2]]),
        (0, &[&[0, 3], &[2, 3]]),
        (0, &[&[3], &[1], &[4], &[2], &[6]]),
        (1, &[&[0, 2], &[0, 3]]),
    ];
    for (dim, shapes) in t.some(&parts, 2, 6) {
        let inputs: Vec<(&[usize], DType, Domain)> = shapes.iter().map(|s| (*s, dtype, Domain::Any)).collect();
        t.laid_out(&Op::Concat { dim: *dim }, &[], &inputs);
    }
    let assigned: [(u8, usize, &[usize], &[usize]); 5] = [
        (1, 2, &[2, 6, 3], &[2, 3, 3]),
        (0, 0, &[5, 3], &[2, 3]),
        (1, 3, &[4, 5], &[4, 2]),
        (0, 1, &[3], &[2]),
        (0, 2, &[4, 3], &[0, 3]),
    ];
    for (dim, start, x, src) in t.some(&assigned, 2, 5) {
        let inputs = [(*x, dtype, Domain::Any), (*src, dtype, Domain::Any)];
        t.laid_out(&Op::SliceAssign { dim: *dim, start: *start }, &[], &inputs);
    }
}

fn reductions(t: &mut Table) {
    let shapes: [(&[usize], u32); 14] = [
        (&[3, 17], 0b10),
        (&[2, 3, 5], 0b010),
        (&[2, 3, 5], 0b101),
        (&[4, 1025], 0b10),
        (&[3, 17], 0b01),
        (&[3, 17], 0b11),
        (&[7], 0b1),
        (&[2, 0, 4], 0b010),
        (&[2, 0, 4], 0b001),
        (&[2, 3, 4, 5], 0b1100),
        (&[1, 1], 0b11),
        (&[2, 8200], 0b10),
        (&[1030, 3], 0b01),
        (&[], 0),
    ];
    // one that runs on several threads, and one whose rows do not divide among them
    for dims in t.some(&[[140usize, 1030], [2060, 67]], 1, 1) {
        for f in [ReduceOp::Sum, ReduceOp::Max] {
            let op = Op::Reduce { op: f, axes: 0b10, keepdim: true };
            t.push(Case::new(op, &[], vec![InputSpec::new(dims, DType::F32, Layout::Contiguous, Domain::Any)]));
        }
    }
    for &f in ReduceOp::ALL {
        let op = Op::Reduce { op: f, axes: 0b10, keepdim: false };
        for dtype in FLOATS {
            t.laid_out(&op, &[], &[(&[3, 41], dtype, Domain::Special)]);
            let all = Op::Reduce { op: f, axes: 0b11, keepdim: false };
            t.laid_out(&all, &[], &[(&[3, 41], dtype, Domain::Special)]);
            // enough neighbouring rows that a tile lies column by column
            t.laid_out(&op, &[], &[(&[2, 7, 18], dtype, Domain::Special)]);
        }
    }
    for (dims, axes) in t.some(&shapes, 2, 10).to_vec() {
        for &f in ReduceOp::ALL {
            for keepdim in [true, false] {
                let op = Op::Reduce { op: f, axes, keepdim };
                for dtype in FLOATS {
                    t.laid_out(&op, &[], &[(dims, dtype, Domain::Any)]);
                }
                // sums of bits stay in the range of u8
                for dtype in INTEGERS.into_iter().filter(|_| dims.iter().product::<usize>() < 200) {
                    t.laid_out(&op, &[], &[(dims, dtype, Domain::Bits)]);
                }
            }
        }
    }
}
