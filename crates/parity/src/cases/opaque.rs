//! Cases of what the graph does not read: custom ops, and products with quantised weights.

use super::{Table, FLOATS, INTEGERS};
use crate::case::{Case, Domain, InputSpec, Layout};
use crate::opaque::{custom, PRODUCT, PRODUCT_SUM, SQUARE};
use candle_core::quantized::GgmlDType;
use candle_core::DType;
use candle_lazy_graph::Op;

/// Kinds of weights, and a width that each can hold.
const KINDS: [(GgmlDType, usize); 9] = [
    (GgmlDType::Q8_0, 64),
    (GgmlDType::Q4K, 256),
    (GgmlDType::F32, 17),
    (GgmlDType::F16, 24),
    (GgmlDType::Q4_0, 32),
    (GgmlDType::Q6K, 512),
    (GgmlDType::BF16, 33),
    (GgmlDType::Q5_1, 128),
    (GgmlDType::Q5K, 256),
];

pub(super) fn add(t: &mut Table) {
    let shapes: [&[usize]; 6] = [&[3, 17], &[2, 3, 5], &[], &[2, 0, 4], &[1025], &[5, 1, 33]];
    for dtype in FLOATS.into_iter().chain(INTEGERS) {
        // products of whole numbers that stay in every dtype's range
        let domain = if dtype.is_float() { Domain::Any } else { Domain::Ids(9) };
        for dims in t.some(&shapes, 2, 4).to_vec() {
            for (count, name) in (1..).zip([SQUARE, PRODUCT, PRODUCT_SUM]) {
                t.laid_out(&custom(name, dims, dtype), &[], &vec![(dims, dtype, domain); count]);
            }
        }
    }
    let before: [&[usize]; 6] = [&[3], &[2, 3], &[], &[0], &[1], &[1, 2, 9]];
    for (kind, width) in t.some(&KINDS, 2, 6).to_vec() {
        for dtype in FLOATS {
            for rows in t.some(&before, 2, 5).to_vec() {
                let x: Vec<usize> = rows.iter().copied().chain([width]).collect();
                for out in t.some(&[5, 1], 1, 2).to_vec() {
                    // quantised, a weight lies in order
                    let spec = InputSpec::new(&[out, width], DType::F32, Layout::Contiguous, Domain::Quantised(kind));
                    for &layout in t.layouts() {
                        let x = InputSpec::new(&x, dtype, layout, Domain::Any);
                        t.push(Case::new(Op::QMatmul, &[], vec![x, spec.clone()]));
                    }
                }
            }
        }
    }
}
