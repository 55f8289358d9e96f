//! Attention against plain loops, and the promise that a query's bits are its own.

#![allow(clippy::unwrap_used, clippy::expect_used)] // what tests share fails by unwrapping, as tests do

mod common;

use candle_core::DType;
use candle_lazy_ops::kernels::{attention, AttentionParams};
use candle_lazy_ops::view::Strided;
use candle_lazy_ops::Error;
use common::*;
use proptest::prelude::{any, prop, proptest, ProptestConfig};

struct Case {
    q: Operand,
    k: Operand,
    v: Operand,
    mask: Option<Operand>,
}

/// (b, h, hk, sq, skv, d, dv)
type Dims = (usize, usize, usize, usize, usize, usize, usize);

fn case(rng: &mut Rng, dtype: DType, layout: &str, n: Dims, mask: Option<&[usize]>) -> Case {
    let (b, h, hk, sq, skv, d, dv) = n;
    Case {
        q: operand(rng, layout, dtype, &[b, h, sq, d], 2.0),
        k: operand(rng, layout, dtype, &[b, hk, skv, d], 2.0),
        v: operand(rng, layout, dtype, &[b, hk, skv, dv], 2.0),
        mask: mask.map(|dims| {
            let mut m = operand(rng, "contiguous", DType::F32, dims, 3.0);
            if let Data::F32(v) = &mut m.data {
                // Some keys are masked out altogether.
                v.iter_mut().step_by(5).for_each(|v| *v = f32::NEG_INFINITY);
            }
            m
        }),
    }
}

fn run(c: &Case, p: &AttentionParams) -> Result<Data, Error> {
    let q = c.q.view();
    let dims = q.dims().to_vec();
    let dv = c.v.layout.dims[3];
    let mut out = Data::new(q.dtype(), &vec![7.0; dims[0] * dims[1] * dims[2] * dv]);
    let mask = c.mask.as_ref().map(|m| m.view());
    attention(&q, &c.k.view(), &c.v.view(), mask.as_ref(), p, &mut out.slice_mut())?;
    Ok(out)
}

fn reference(c: &Case, p: &AttentionParams) -> Vec<f64> {
    let qd = c.q.layout.dims.to_vec();
    let (b, h, sq, d) = (qd[0], qd[1], qd[2], qd[3]);
    let (hk, skv, dv) = (c.k.layout.dims[1], c.k.layout.dims[2], c.v.layout.dims[3]);
    let (q, k, v) = (c.q.values(), c.k.values(), c.v.values());
    let mask = c.mask.as_ref().map(|m| {
        let l = m.layout.broadcast_to(&[b, h, sq, skv]).unwrap();
        Operand { data: m.data.clone(), layout: l }.values()
    });
    let mut out = Vec::new();
    for bi in 0..b {
        for hi in 0..h {
            let kb = (bi * hk + hi / (h / hk)) * skv;
            for i in 0..sq {
                let at = i as i64 + skv as i64 - sq as i64;
                let qrow = ((bi * h + hi) * sq + i) * d;
                let scores: Vec<f64> = (0..skv)
                    .map(|j| {
                        let mut s: f64 = (0..d).map(|e| q[qrow + e] * k[(kb + j) * d + e]).sum::<f64>() * p.scale;
                        if let Some(c) = p.softcap {
                            s = c * (s / c).tanh();
                        }
                        if let Some(m) = &mask {
                            s += m[((bi * h + hi) * sq + i) * skv + j];
                        }
                        let j = j as i64;
                        let hidden = p.causal && j > at || p.window.is_some_and(|w| (at - j).abs() >= w as i64);
                        if hidden {
                            f64::NEG_INFINITY
                        } else {
                            s
                        }
                    })
                    .collect();
                let m = scores.iter().cloned().fold(f64::NEG_INFINITY, f64::max);
                let e: Vec<f64> = scores.iter().map(|s| (s - m).exp()).collect();
                let total: f64 = e.iter().sum();
                for x in 0..dv {
                    let s: f64 = (0..skv).map(|j| e[j] * v[(kb + j) * dv + x]).sum();
                    out.push(s / total);
                }
            }
        }
    }
    out
}

fn tolerance(dtype: DType) -> f64 {
    // Scores of magnitude ~20 are rounded before the exponential, which turns ulps of a score into relative error of a weight.
    match dtype {
        DType::F64 => 1e-13,
        DType::F32 => 2e-5,
        DType::F16 => 2.0 * ulp(DType::F16, 2.0),
        _ => 2.0 * ulp(DType::BF16, 2.0),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 80, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn attention_agrees_with_f64(
        seed in any::<u64>(),
        b in 1usize..3, group in 1usize..4, hk in 1usize..3,
        sq in 1usize..40,
        skv in prop::sample::select(vec![1usize, 5, 63, 64, 65, 130]),
        d in prop::sample::select(vec![1usize, 8, 16, 20]),
        dv in 1usize..18,
        dtype in prop::sample::select(vec![DType::F32, DType::F64, DType::F16, DType::BF16]),
        layout in prop::sample::select(LAYOUTS.to_vec()),
        causal in any::<bool>(),
        cap in prop::sample::select(vec![None, Some(5.0)]),
        window in prop::sample::select(vec![None, Some(7usize)]),
        masked in 0usize..3,
    ) {
        let mut rng = Rng(seed);
        let h = group * hk;
        let mask = match masked {
            0 => None,
            1 => Some(vec![sq, skv]),
            _ => Some(vec![b, 1, 1, skv]),
        };
        let c = case(&mut rng, dtype, layout, (b, h, hk, sq, skv, d, dv), mask.as_deref());
        let p = AttentionParams { scale: 1.0 / (d as f64).sqrt(), causal, softcap: cap, window };
        let got = run(&c, &p).unwrap().to_f64();
        let diff = max_diff(&got, &reference(&c, &p));
        assert!(diff <= tolerance(dtype), "{diff:e} {}", dtype.as_str());
    }
}

/// Queries `from..to` of a case against keys `0..keys`.
fn part(c: &Case, from: usize, to: usize, keys: usize) -> Case {
    let cut =
        |o: &Operand, start, len| Operand { data: o.data.clone(), layout: o.layout.narrow(2, start, len).unwrap() };
    Case { q: cut(&c.q, from, to - from), k: cut(&c.k, 0, keys), v: cut(&c.v, 0, keys), mask: None }
}

#[test]
fn prefill_chunks_and_decode_give_the_same_bits() {
    let mut rng = Rng(71);
    for dtype in [DType::F32, DType::F16, DType::BF16, DType::F64] {
        for window in [None, Some(70)] {
            let n = 200;
            let c = case(&mut rng, dtype, "contiguous", (1, 4, 2, n, n, 16, 8), None);
            let p = AttentionParams { scale: 0.25, causal: true, softcap: None, window };
            let full = run(&c, &p).unwrap().bits();
            let row = |bits: &[u64], rows: usize, h: usize, i: usize| {
                let at = (h * rows + i) * 8;
                bits[at..at + 8].to_vec()
            };
            // One query at a time, as decoding does.
            for i in [0, 1, 62, 63, 64, 65, 127, 128, 150, 199] {
                let one = run(&part(&c, i, i + 1, i + 1), &p).unwrap().bits();
                for h in 0..4 {
                    assert!(row(&one, 1, h, 0) == row(&full, n, h, i), "decode {i} {}", dtype.as_str());
                }
            }
            // In chunks.
            for (from, to) in [(0, 50), (50, 130), (130, 200)] {
                let chunk = run(&part(&c, from, to, to), &p).unwrap().bits();
                for h in 0..4 {
                    for i in from..to {
                        let same = row(&chunk, to - from, h, i - from) == row(&full, n, h, i);
                        assert!(same, "chunk {from}..{to} query {i}");
                    }
                }
            }
        }
    }
}

#[test]
fn bits_do_not_depend_on_threads_or_layout() {
    let mut rng = Rng(72);
    for layout in LAYOUTS {
        let c = case(&mut rng, DType::F32, layout, (2, 4, 2, 70, 130, 32, 16), Some(&[70, 130]));
        let p = AttentionParams::new(0.2).causal();
        let one = on_threads(1, || run(&c, &p).unwrap().bits());
        let four = on_threads(4, || run(&c, &p).unwrap().bits());
        assert!(one == four, "{layout} threads");
        let dense = Case { q: c.q.dense(), k: c.k.dense(), v: c.v.dense(), mask: c.mask.as_ref().map(|m| m.dense()) };
        assert!(one == run(&dense, &p).unwrap().bits(), "{layout} layout");
    }
}

#[test]
fn a_scale_that_is_zero_in_f32_weighs_all_visible_keys_alike() {
    let mut rng = Rng(75);
    let c = case(&mut rng, DType::F32, "contiguous", (1, 1, 1, 3, 3, 4, 2), None);
    let p = |scale| AttentionParams { scale, causal: true, softcap: None, window: None };
    assert_eq!(run(&c, &p(1e-60)).unwrap().bits(), run(&c, &p(0.0)).unwrap().bits());
    assert!(run(&c, &p(1e-60)).unwrap().to_f64().iter().all(|x| x.is_finite()));
}

#[test]
fn segments_on_their_own_give_the_same_bits() {
    let mut rng = Rng(74);
    for dtype in [DType::F32, DType::BF16, DType::F64] {
        for (window, queries) in [(None, 3), (Some(1500), 3), (None, 40)] {
            let n = 2500;
            let c = case(&mut rng, dtype, "contiguous", (1, 2, 1, queries, n, 40, 24), None);
            let p = AttentionParams { scale: 0.15, causal: true, softcap: None, window };
            let one = on_threads(1, || run(&c, &p).unwrap().bits());
            let many = on_threads(8, || run(&c, &p).unwrap().bits());
            assert!(one == many, "{dtype:?} {window:?} {queries}");
            // the last query alone
            let alone = run(&part(&c, queries - 1, queries, n), &p).unwrap().bits();
            for h in 0..2 {
                let at = (h * queries + queries - 1) * 24;
                assert!(alone[h * 24..(h + 1) * 24] == one[at..at + 24], "{dtype:?} {window:?} alone");
            }
        }
    }
}

#[test]
fn a_query_that_sees_no_key_gives_nan() {
    let mut rng = Rng(73);
    // Three queries, one key: under the causal rule only the last one sees it.
    let c = case(&mut rng, DType::F32, "contiguous", (1, 1, 1, 3, 1, 4, 2), None);
    let out = run(&c, &AttentionParams::new(1.0).causal()).unwrap().to_f64();
    assert!(out[..4].iter().all(|v| v.is_nan()), "{out:?}");
    assert_eq!(&out[4..], c.v.values().as_slice());
    // Everything masked.
    let mut c = case(&mut rng, DType::F32, "contiguous", (1, 1, 1, 2, 100, 4, 2), Some(&[2, 100]));
    c.mask = Some(Operand::contiguous(DType::F32, &[2, 100], &[f64::NEG_INFINITY; 200]));
    assert!(run(&c, &AttentionParams::new(1.0)).unwrap().to_f64().iter().all(|v| v.is_nan()));
    // No keys at all.
    let c = case(&mut rng, DType::F32, "contiguous", (1, 1, 1, 2, 0, 4, 2), None);
    assert!(run(&c, &AttentionParams::new(1.0)).unwrap().to_f64().iter().all(|v| v.is_nan()));
}

#[test]
fn empty_attention_is_empty() {
    let mut rng = Rng(74);
    for n in [(0, 2, 1, 3, 3, 4, 4), (1, 2, 1, 0, 3, 4, 4), (1, 2, 1, 3, 3, 4, 0)] {
        let c = case(&mut rng, DType::F32, "contiguous", n, None);
        assert_eq!(run(&c, &AttentionParams::new(1.0)).unwrap().len(), 0);
    }
}

#[test]
fn bad_shapes_are_refused() {
    let ok = (1, 4, 2, 3, 5, 8, 8);
    let base = || case(&mut Rng(1), DType::F32, "contiguous", ok, None);
    let p = AttentionParams::new(1.0);
    assert!(run(&base(), &p).is_ok());
    let odd = |f: &dyn Fn(&mut Case)| {
        let mut c = base();
        f(&mut c);
        let e = run(&c, &p).unwrap_err();
        assert!(e.to_string().starts_with("attention"), "{e}");
    };
    let f = |dims: &[usize]| Operand::contiguous(DType::F32, dims, &vec![1.0; dims.iter().product()]);
    odd(&|c| c.k = f(&[1, 3, 5, 8]));
    odd(&|c| c.v = f(&[1, 2, 4, 8]));
    odd(&|c| c.k = f(&[1, 2, 5, 7]));
    odd(&|c| c.q = f(&[4, 3, 8]));
    odd(&|c| c.mask = Some(f(&[3, 4])));
    odd(&|c| c.k = Operand::contiguous(DType::F64, &[1, 2, 5, 8], &[1.0; 80]));
    odd(&|c| c.mask = Some(Operand::contiguous(DType::U8, &[3, 5], &[1.0; 15])));
    let c = base();
    let mut short = Data::zeros(DType::F32, 3);
    let e = attention(&c.q.view(), &c.k.view(), &c.v.view(), None, &p, &mut short.slice_mut());
    assert!(e.is_err());
    // No key heads for some query heads.
    let mut c = base();
    c.k = f(&[1, 0, 5, 8]);
    c.v = Operand { data: Data::F32(vec![]), layout: Strided::contiguous(&[1, 0, 5, 8]) };
    assert!(run(&c, &p).is_err());
}
