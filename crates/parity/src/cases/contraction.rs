//! Cases of products: matmul, linear, LoRA, attention.

use super::{Table, FLOATS};
use crate::case::{Case, Domain, InputSpec, Layout};
use candle_core::DType;
use candle_lazy_graph::Op;

/// A segment of rows: the rows before it, its own, and its adapter's rank.
type Segment = (usize, usize, usize);

pub(super) fn add(t: &mut Table) {
    let products: [(&[usize], &[usize]); 12] = [
        (&[3, 8], &[8, 5]),
        (&[2, 3, 4, 6], &[2, 3, 6, 5]),
        (&[2, 1, 4, 6], &[3, 6, 5]),
        (&[1, 64], &[64, 33]),
        (&[3, 0], &[0, 5]),
        (&[5, 3, 7], &[7, 4]),
        (&[0, 4], &[4, 3]),
        (&[1, 1], &[1, 1]),
        (&[33, 130], &[130, 17]),
        (&[2, 5, 16], &[2, 16, 1]),
        (&[4, 1, 9], &[4, 9, 6]),
        (&[7, 513], &[513, 3]),
    ];
    let linears: [(&[usize], usize); 7] = [
        (&[2, 5, 16], 7),
        (&[3, 8], 4),
        (&[16], 5),
        (&[1, 1, 64], 33),
        (&[0, 8], 4),
        (&[2, 3, 4, 6], 5),
        (&[9, 130], 40),
    ];
    let loras: [(&[usize], usize, usize); 7] = [
        (&[2, 5, 16], 4, 12),
        (&[3, 32], 2, 9),
        // more rows than are widened together
        (&[300, 8], 2, 5),
        (&[16], 3, 5),
        (&[1, 64], 8, 64),
        (&[0, 8], 2, 4),
        (&[2, 2, 3, 8], 1, 6),
    ];
    let segmented: [(&[usize], &[Segment]); 4] = [
        (&[1, 6, 16], &[(0, 2, 4), (1, 1, 8), (0, 2, 3)]),
        (&[3, 5, 9], &[(2, 2, 70)]),
        (&[7, 32], &[(0, 0, 2), (0, 3, 2), (0, 4, 5)]),
        (&[2, 0, 8], &[(0, 0, 2)]),
    ];
    for dtype in FLOATS {
        for (a, b) in t.some(&products, 2, 9) {
            t.laid_out(&Op::Matmul, &[], &[(a, dtype, Domain::Any), (b, dtype, Domain::Small)]);
        }
        let (a, b) = ((&[5usize, 9][..], dtype, Domain::Rare), (&[9usize, 4][..], dtype, Domain::Rare));
        t.laid_out(&Op::Matmul, &[], &[a, (b.0, dtype, Domain::Small)]);
        t.laid_out(&Op::Matmul, &[], &[(a.0, dtype, Domain::Any), b]);
        for (x, out) in t.some(&linears, 2, 6) {
            let weight = [*out, x.last().copied().unwrap_or(1)];
            let mut inputs = vec![(*x, dtype, Domain::Any), (&weight[..], dtype, Domain::Small)];
            t.laid_out(&Op::Linear { bias: false }, &[], &inputs);
            let bias = [*out];
            inputs.push((&bias, dtype, Domain::Any));
            t.laid_out(&Op::Linear { bias: true }, &[], &inputs);
        }
        // rows longer than a piece of them
        let long = [([9, 1100], Domain::Any), ([11, 1100], Domain::Small)]
            .map(|(dims, domain)| InputSpec::new(&dims, dtype, Layout::Contiguous, domain));
        t.push(Case::new(Op::Linear { bias: false }, &[], long.to_vec()));
        for (x, rank, out) in t.some(&loras, 2, 6) {
            let (a, b) = ([x.last().copied().unwrap_or(1), *rank], [*rank, *out]);
            let mut base = x.to_vec();
            if let Some(last) = base.last_mut() {
                *last = *out;
            }
            let mut inputs =
                vec![(*x, dtype, Domain::Any), (&a[..], dtype, Domain::Small), (&b[..], dtype, Domain::Small)];
            t.laid_out(&Op::Lora { base: false }, &[0.5], &inputs);
            inputs.push((&base, dtype, Domain::Any));
            t.laid_out(&Op::Lora { base: true }, &[1.75], &inputs);
        }
        for (x, segments) in t.some(&segmented, 2, 3) {
            let mut base = x.to_vec();
            if let Some(last) = base.last_mut() {
                *last = 12;
            }
            let width = x.last().copied().unwrap_or(1);
            let factors: Vec<_> = segments.iter().map(|(.., rank)| ([width, *rank], [*rank, 12])).collect();
            let mut inputs = vec![(*x, dtype, Domain::Any), (&base[..], dtype, Domain::Any)];
            for (a, b) in &factors {
                inputs.extend([(&a[..], dtype, Domain::Small), (&b[..], dtype, Domain::Small)]);
            }
            let rows = segments.iter().flat_map(|&(gap, rows, _)| [gap, rows]).collect();
            let scales: Vec<f64> = (0..segments.len()).map(|i| 0.5 + i as f64).collect();
            t.laid_out(&Op::LoraSegments { rows }, &scales, &inputs);
        }
    }
    attentions(t);
}

/// Sizes of an attention: batch, heads, key heads, queries, keys, head dim, value dim.
type Sizes = (usize, usize, usize, usize, usize, usize, usize);

/// What it does besides: causal, window, softcap.
type Kind = (bool, Option<usize>, Option<f64>);

fn attentions(t: &mut Table) {
    let sizes: [Sizes; 9] = [
        (2, 4, 2, 5, 5, 8, 8),
        (1, 3, 1, 1, 9, 16, 16),
        (1, 2, 2, 4, 70, 8, 6),
        (2, 2, 2, 3, 3, 4, 4),
        (1, 9, 3, 7, 130, 16, 16),
        (1, 1, 1, 1, 1, 2, 2),
        (0, 2, 1, 3, 3, 4, 4),
        (1, 4, 4, 66, 66, 8, 8),
        (2, 6, 3, 2, 65, 32, 32),
    ];
    let kinds: [Kind; 6] = [
        (false, None, None),
        (true, None, None),
        (true, Some(3), None),
        (false, None, Some(4.0)),
        (true, None, Some(2.0)),
        (true, Some(2), Some(8.0)),
    ];
    for dtype in FLOATS {
        // a query that is no number spoils its own row, a key or a value every row that sees it
        for rare in 0..3 {
            let domain = |at: usize| if at == rare { Domain::Rare } else { Domain::Any };
            let dims = [2, 2, 4, 6];
            let inputs = [0, 1, 2].map(|at| (&dims[..], dtype, domain(at)));
            let op = Op::Attention { mask: false, causal: false, softcap: false, window: None };
            t.laid_out(&op, &[0.375], &inputs);
        }
        // more keys than a segment has
        let long = [[1, 4, 3, 8], [1, 2, 1100, 8], [1, 2, 1100, 6]]
            .map(|dims| InputSpec::new(&dims, dtype, Layout::Contiguous, Domain::Any));
        for causal in [false, true] {
            let op = Op::Attention { mask: false, causal, softcap: false, window: None };
            t.push(Case::new(op, &[0.375], long.to_vec()));
        }
        // more queries of a key head than a part of its gradients has
        let many = [[1, 6, 90, 8], [1, 2, 97, 8], [1, 2, 97, 6], [1, 6, 90, 6]]
            .map(|dims| InputSpec::new(&dims, dtype, Layout::Contiguous, Domain::Any));
        for window in [None, Some(30)] {
            let op = Op::Attention { mask: false, causal: true, softcap: false, window };
            t.push(Case::new(op, &[0.375], many[..3].to_vec()));
            let op = Op::AttentionBackward { mask: false, causal: true, softcap: false, window };
            t.push(Case::new(op, &[0.375], many.to_vec()));
        }
        for &(b, h, hk, s, keys, d, dv) in t.some(&sizes, 2, 6) {
            let (q, k, v) = ([b, h, s, d], [b, hk, keys, d], [b, hk, keys, dv]);
            let masks: [&[usize]; 4] = [&[b, h, s, keys], &[s, keys], &[b, 1, 1, keys], &[1, 1, s, keys]];
            for &(causal, window, cap) in t.some(&kinds, 2, 6) {
                let scalars: Vec<f64> = [0.375].into_iter().chain(cap).collect();
                let plain: [(&[usize], DType, Domain); 3] =
                    [(&q, dtype, Domain::Any), (&k, dtype, Domain::Any), (&v, dtype, Domain::Any)];
                let op = |mask| Op::Attention { mask, causal, softcap: cap.is_some(), window };
                t.laid_out(&op(false), &scalars, &plain);
                for mask in t.some(&masks, 1, 2) {
                    let mut inputs: Vec<InputSpec> = plain
                        .iter()
                        .map(|(dims, dtype, _)| InputSpec::new(dims, *dtype, Layout::Contiguous, Domain::Any))
                        .collect();
                    inputs.push(InputSpec::new(mask, dtype, Layout::Contiguous, Domain::Mask));
                    t.push(Case::new(op(true), &scalars, inputs));
                }
                let back = |mask| Op::AttentionBackward { mask, causal, softcap: cap.is_some(), window };
                let g = [b, h, s, dv];
                let mut plain = plain.to_vec();
                plain.push((&g, dtype, Domain::Any));
                t.laid_out(&back(false), &scalars, &plain);
                for mask in t.some(&masks, 1, 2) {
                    let contiguous = |&(dims, dtype, domain): &(&[usize], DType, Domain)| {
                        InputSpec::new(dims, dtype, Layout::Contiguous, domain)
                    };
                    let mut inputs: Vec<InputSpec> = plain.iter().map(contiguous).collect();
                    inputs.push(InputSpec::new(mask, dtype, Layout::Contiguous, Domain::Mask));
                    t.push(Case::new(back(true), &scalars, inputs));
                }
            }
        }
    }
}
