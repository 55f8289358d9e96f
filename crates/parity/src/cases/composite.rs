//! Cases of row composites: softmax, norms, gated units, rotary embedding.

use super::{Table, FLOATS};
use crate::case::Domain;
use candle_core::DType;
use candle_lazy_graph::{Op, UnaryOp};

const ROWS: [&[usize]; 11] = [
    &[3, 17],
    &[2, 3, 5],
    &[3, 2],
    &[2, 2, 3],
    &[4, 1025],
    &[2, 0, 4],
    &[7],
    &[1, 1],
    &[2, 3, 0],
    &[2, 3, 4, 33],
    &[2, 8200],
];

const ACTIVATIONS: [UnaryOp; 5] = [UnaryOp::Silu, UnaryOp::Gelu, UnaryOp::GeluErf, UnaryOp::Relu, UnaryOp::Sigmoid];

pub(super) fn add(t: &mut Table) {
    for dtype in FLOATS {
        for dims in t.some(&ROWS, 2, 7) {
            for dim in 0..dims.len() as u8 {
                t.laid_out(&Op::Softmax { dim }, &[], &[(dims, dtype, Domain::Any)]);
                t.laid_out(&Op::LogSoftmax { dim }, &[], &[(dims, dtype, Domain::Any)]);
            }
            norms(t, dims, dtype, Domain::Any, 1e-5);
            for act in t.some(&ACTIVATIONS, 2, 5) {
                let input = (*dims, dtype, Domain::Any);
                t.laid_out(&Op::Glu { act: *act }, &[], &[input, input]);
            }
        }
        t.laid_out(&Op::Glu { act: UnaryOp::Silu }, &[], &[(&[], dtype, Domain::Any), (&[], dtype, Domain::Any)]);
        // numbers whose exponentials overflow, and such as an eps outweighs
        for dims in t.some(&ROWS, 1, 2) {
            let input = (*dims, dtype, Domain::Large);
            t.laid_out(&Op::Softmax { dim: dims.len() as u8 - 1 }, &[], &[input]);
            t.laid_out(&Op::LogSoftmax { dim: dims.len() as u8 - 1 }, &[], &[input]);
            norms(t, dims, dtype, Domain::Tiny, 1e-5);
        }
        // an eps that says nothing, and none
        for eps in [1e-12, 0.0] {
            norms(t, &[3, 17], dtype, Domain::Any, eps);
        }
        let rare = (&[4usize, 9][..], dtype, Domain::Rare);
        for dim in [0, 1] {
            t.laid_out(&Op::Softmax { dim }, &[], &[rare]);
            t.laid_out(&Op::LogSoftmax { dim }, &[], &[rare]);
        }
        norms(t, &[4, 9], dtype, Domain::Rare, 1e-5);
        ropes(t, dtype);
    }
}

fn norms(t: &mut Table, dims: &[usize], dtype: DType, domain: Domain, eps: f64) {
    let width = [dims.last().copied().unwrap_or(1)];
    let x = (dims, dtype, domain);
    let vector = (&width[..], dtype, Domain::Any);
    t.laid_out(&Op::RmsNorm { weight: true }, &[eps], &[x, vector]);
    t.laid_out(&Op::RmsNorm { weight: false }, &[eps], &[x]);
    t.laid_out(&Op::LayerNorm { weight: true, bias: true }, &[eps], &[x, vector, vector]);
    t.laid_out(&Op::LayerNorm { weight: true, bias: false }, &[eps], &[x, vector]);
    t.laid_out(&Op::LayerNorm { weight: false, bias: true }, &[eps], &[x, vector]);
    t.laid_out(&Op::LayerNorm { weight: false, bias: false }, &[eps], &[x]);
}

fn ropes(t: &mut Table, dtype: DType) {
    let shapes: [[usize; 4]; 6] =
        [[2, 3, 5, 8], [1, 4, 1, 16], [2, 1, 3, 2], [0, 2, 3, 4], [1, 2, 7, 64], [3, 2, 0, 8]];
    for dims in t.some(&shapes, 1, 5) {
        let [b, _, s, d] = *dims;
        let (flat, batched) = ([s, d / 2], [b, s, d / 2]);
        for interleaved in [false, true] {
            for table in [&flat[..], &batched[..]] {
                let angle = (table, dtype, Domain::Angle);
                t.laid_out(&Op::Rope { interleaved }, &[], &[(&dims[..], dtype, Domain::Any), angle, angle]);
            }
        }
    }
}
