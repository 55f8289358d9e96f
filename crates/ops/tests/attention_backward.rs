//! The gradients of attention against plain loops and finite differences in f64, and the promise that their bits depend on neither
//! threads, nor layout, nor batch.

#![allow(clippy::unwrap_used, clippy::expect_used)] // what tests share fails by unwrapping, as tests do

mod common;

use candle_core::DType;
use candle_lazy_ops::kernels::{attention, attention_backward, AttentionParams};
use candle_lazy_ops::Error;
use common::*;
use proptest::prelude::{any, prop, proptest, ProptestConfig};

struct Case {
    q: Operand,
    k: Operand,
    v: Operand,
    g: Operand,
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
        g: operand(rng, layout, dtype, &[b, h, sq, dv], 1.0),
        mask: mask.map(|dims| {
            let mut m = operand(rng, "contiguous", DType::F32, dims, 3.0);
            if let Data::F32(v) = &mut m.data {
                // some keys are masked out altogether, the first of a row never
                let keys = dims.last().copied().unwrap_or(1);
                v.iter_mut().enumerate().filter(|(i, _)| i % keys % 5 == 3).for_each(|(_, v)| *v = f32::NEG_INFINITY);
            }
            m
        }),
    }
}

fn run(c: &Case, p: &AttentionParams) -> Result<Data, Error> {
    let (q, k, v, g) = (c.q.view(), c.k.view(), c.v.view(), c.g.view());
    let len = [&q, &k, &v].iter().map(|x| x.dims().iter().product::<usize>()).sum();
    let mut out = Data::new(q.dtype(), &vec![7.0; len]);
    let mask = c.mask.as_ref().map(|m| m.view());
    attention_backward(&q, &k, &v, &g, mask.as_ref(), p, &mut out.slice_mut())?;
    Ok(out)
}

/// The gradients by their definition, and beside each the sum of its terms without their signs.
fn reference(c: &Case, p: &AttentionParams) -> (Vec<f64>, Vec<f64>) {
    let qd = c.q.layout.dims.to_vec();
    let (b, h, sq, d) = (qd[0], qd[1], qd[2], qd[3]);
    let (hk, skv, dv) = (c.k.layout.dims[1], c.k.layout.dims[2], c.v.layout.dims[3]);
    let (q, k, v, g) = (c.q.values(), c.k.values(), c.v.values(), c.g.values());
    let mask = c.mask.as_ref().map(|m| {
        let l = m.layout.broadcast_to(&[b, h, sq, skv]).unwrap();
        Operand { data: m.data.clone(), layout: l }.values()
    });
    let (nq, nk) = (q.len(), k.len());
    let mut out = vec![0.0; nq + nk + v.len()];
    let mut size = out.clone();
    for bi in 0..b {
        for hi in 0..h {
            let kb = (bi * hk + hi / (h / hk)) * skv;
            for i in 0..sq {
                let at = i as i64 + skv as i64 - sq as i64;
                let row = (bi * h + hi) * sq + i;
                let mut slopes = vec![0.0; skv];
                let scores: Vec<f64> = (0..skv)
                    .map(|j| {
                        let s: f64 = (0..d).map(|e| q[row * d + e] * k[(kb + j) * d + e]).sum::<f64>() * p.scale;
                        let capped = p.softcap.map_or(s, |c| c * (s / c).tanh());
                        slopes[j] = p.softcap.map_or(1.0, |c| 1.0 - (s / c).tanh().powi(2));
                        let jj = j as i64;
                        if p.causal && jj > at || p.window.is_some_and(|w| (at - jj).abs() >= w as i64) {
                            f64::NEG_INFINITY
                        } else {
                            capped + mask.as_ref().map_or(0.0, |m| m[row * skv + j])
                        }
                    })
                    .collect();
                let m = scores.iter().cloned().fold(f64::NEG_INFINITY, f64::max);
                let e: Vec<f64> = scores.iter().map(|s| (s - m).exp()).collect();
                let total: f64 = e.iter().sum();
                let dp = |j: usize, sign: fn(f64) -> f64| -> f64 {
                    (0..dv).map(|x| sign(g[row * dv + x] * v[(kb + j) * dv + x])).sum()
                };
                let mean: f64 = (0..skv).map(|j| e[j] / total * dp(j, |x| x)).sum();
                let terms: f64 = (0..skv).map(|j| e[j] / total * dp(j, f64::abs)).sum();
                for j in 0..skv {
                    let w = e[j] / total;
                    let ds = w * (dp(j, |x| x) - mean) * slopes[j] * p.scale;
                    let ds_size = w * (dp(j, f64::abs) + terms) * p.scale;
                    for l in 0..d {
                        let (qi, ki) = (row * d + l, (kb + j) * d + l);
                        out[qi] += ds * k[ki];
                        size[qi] += ds_size * k[ki].abs();
                        out[nq + ki] += ds * q[qi];
                        size[nq + ki] += ds_size * q[qi].abs();
                    }
                    for x in 0..dv {
                        let vi = nq + nk + (kb + j) * dv + x;
                        out[vi] += w * g[row * dv + x];
                        size[vi] += w * g[row * dv + x].abs();
                    }
                }
            }
        }
    }
    (out, size)
}

/// What a gradient may be off by, relative to the sum of its terms: scores of magnitude ~20 are rounded before the exponential, which
/// turns ulps of a score into relative error of a weight, as in the forward pass; f16 and bf16 round the result once.
fn tolerance(dtype: DType) -> f64 {
    match dtype {
        DType::F64 => 1e-13,
        DType::F32 => 2e-5,
        DType::F16 => ulp(DType::F16, 1.0),
        _ => ulp(DType::BF16, 1.0),
    }
}

fn check(c: &Case, p: &AttentionParams, what: &str) {
    let dtype = c.q.view().dtype();
    let got = run(c, p).unwrap().to_f64();
    let (want, size) = reference(c, p);
    assert_eq!(got.len(), want.len());
    for (i, ((got, want), size)) in got.iter().zip(&want).zip(&size).enumerate() {
        // the smallest that f16 tells apart
        let floor = if dtype == DType::F16 { 1e-7 } else { 1e-30 };
        let off = (got - want).abs();
        assert!(off <= tolerance(dtype) * size + floor, "{what}: {i}: {got} instead of {want}, terms {size}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn gradients_agree_with_f64(
        seed in any::<u64>(),
        b in 1usize..3, group in 1usize..4, hk in 1usize..3,
        sq in 1usize..40,
        extra in prop::sample::select(vec![0usize, 1, 25, 64, 101]),
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
        let (h, skv) = (group * hk, sq + extra);
        // a window must leave each row a key that no mask hides
        let mask = match masked {
            _ if window.is_some() => None,
            0 => None,
            1 => Some(vec![sq, skv]),
            _ => Some(vec![b, 1, 1, skv]),
        };
        let c = case(&mut rng, dtype, layout, (b, h, hk, sq, skv, d, dv), mask.as_deref());
        let p = AttentionParams { scale: 1.0 / (d as f64).sqrt(), causal, softcap: cap, window };
        check(&c, &p, &format!("{} {layout} {p:?}", dtype.as_str()));
    }
}

#[test]
fn many_queries_of_a_head_add_up() {
    let mut rng = Rng(81);
    for (dtype, window) in [(DType::F32, None), (DType::F32, Some(40)), (DType::F64, None), (DType::BF16, None)] {
        let c = case(&mut rng, dtype, "contiguous", (1, 6, 2, 210, 223, 16, 8), None);
        let p = AttentionParams { scale: 0.25, causal: true, softcap: None, window };
        check(&c, &p, &format!("{} {window:?}", dtype.as_str()));
    }
}

/// What the kernel gives in f64 is the derivative of what attention gives in f64.
#[test]
fn gradients_are_finite_differences() {
    let mut rng = Rng(82);
    let step = 1e-5;
    for (causal, softcap, window) in [(false, None, None), (true, Some(3.0), None), (true, None, Some(3))] {
        let mut c = case(&mut rng, DType::F64, "contiguous", (1, 4, 2, 5, 7, 3, 2), Some(&[5, 7]));
        if window.is_some() {
            c.mask = None;
        }
        let p = AttentionParams { scale: 0.4, causal, softcap, window };
        let got = run(&c, &p).unwrap().to_f64();
        let loss = |c: &Case| -> f64 {
            let mut out = Data::new(DType::F64, &vec![0.0; c.g.values().len()]);
            let mask = c.mask.as_ref().map(|m| m.view());
            attention(&c.q.view(), &c.k.view(), &c.v.view(), mask.as_ref(), &p, &mut out.slice_mut()).unwrap();
            out.to_f64().iter().zip(c.g.values()).map(|(y, g)| y * g).sum()
        };
        let mut at = 0;
        for operand in 0..3 {
            let len = [&c.q, &c.k, &c.v][operand].values().len();
            for i in 0..len {
                let mut moved = |by: f64| -> f64 {
                    let x = [&mut c.q, &mut c.k, &mut c.v].into_iter().nth(operand).unwrap();
                    let Data::F64(values) = &mut x.data else { panic!("f64") };
                    values[i] += by;
                    let y = loss(&c);
                    let x = [&mut c.q, &mut c.k, &mut c.v].into_iter().nth(operand).unwrap();
                    if let Data::F64(values) = &mut x.data {
                        values[i] -= by;
                    }
                    y
                };
                let slope = (moved(step) - moved(-step)) / (2.0 * step);
                // rounding over the step and the third derivative times its square
                assert!((slope - got[at]).abs() < 1e-8, "operand {operand}, {i}: {} instead of {slope}", got[at]);
                at += 1;
            }
        }
    }
}

#[test]
fn bits_do_not_depend_on_threads_layout_or_batch() {
    let mut rng = Rng(83);
    for (layout, dtype) in
        LAYOUTS.into_iter().zip([DType::F32, DType::BF16, DType::F32, DType::F64].into_iter().cycle())
    {
        // rows of three parts, so that sums of several threads are joined
        let n = (2, 4, 2, 301, 330, 24, 16);
        let c = case(&mut rng, dtype, layout, n, Some(&[301, 330]));
        let p = AttentionParams::new(0.2).causal();
        let one = on_threads(1, || run(&c, &p).unwrap().bits());
        for threads in [2, 3, 8] {
            assert!(one == on_threads(threads, || run(&c, &p).unwrap().bits()), "{layout} {threads} threads");
        }
        let dense = |o: &Operand| o.dense();
        let whole =
            Case { q: dense(&c.q), k: dense(&c.k), v: dense(&c.v), g: dense(&c.g), mask: c.mask.as_ref().map(dense) };
        assert!(one == run(&whole, &p).unwrap().bits(), "{layout} layout");
        // the second batch alone
        let cut = |o: &Operand| Operand { data: o.data.clone(), layout: o.layout.narrow(0, 1, 1).unwrap() };
        let alone = Case { q: cut(&c.q), k: cut(&c.k), v: cut(&c.v), g: cut(&c.g), mask: c.mask.as_ref().map(dense) };
        let alone = run(&alone, &p).unwrap().bits();
        let (mut from, mut of_alone) = (0, 0);
        for len in [4 * 301 * 24, 2 * 330 * 24, 2 * 330 * 16] {
            let (all, own) = (&one[from + len..from + 2 * len], &alone[of_alone..of_alone + len]);
            assert!(all == own, "{layout} batch");
            (from, of_alone) = (from + 2 * len, of_alone + len);
        }
    }
}

#[test]
fn a_query_without_a_key_spoils_what_it_adds_to_and_nothing_else() {
    let mut rng = Rng(84);
    // two key heads; everything is hidden from the second query of head 0
    let mut c = case(&mut rng, DType::F32, "contiguous", (1, 2, 2, 3, 70, 4, 2), None);
    let mut mask = vec![0.0; 2 * 3 * 70];
    mask[70..140].fill(f64::NEG_INFINITY);
    c.mask = Some(Operand::contiguous(DType::F32, &[1, 2, 3, 70], &mask));
    let got = run(&c, &AttentionParams::new(0.5)).unwrap().to_f64();
    let spoilt = |from: usize, len: usize| got[from..from + len].iter().all(|x| x.is_nan());
    let whole = |from: usize, len: usize| got[from..from + len].iter().all(|x| x.is_finite());
    // dq: the second of six rows
    assert!(whole(0, 4) && spoilt(4, 4) && whole(8, 16));
    // dk and dv: the first of two heads
    assert!(spoilt(24, 280) && whole(24 + 280, 280));
    assert!(spoilt(24 + 560, 140) && whole(24 + 560 + 140, 140));
}

#[test]
fn what_nothing_reaches_gets_zeros() {
    let mut rng = Rng(85);
    // no queries
    let c = case(&mut rng, DType::F32, "contiguous", (1, 2, 1, 0, 3, 4, 4), None);
    assert_eq!(run(&c, &AttentionParams::new(1.0)).unwrap().to_f64(), vec![0.0; 24]);
    // keys behind a window
    let c = case(&mut rng, DType::F32, "contiguous", (1, 1, 1, 1, 200, 4, 4), None);
    let p = AttentionParams { scale: 1.0, causal: true, softcap: None, window: Some(3) };
    let got = run(&c, &p).unwrap().to_f64();
    assert!(got[4..4 + 197 * 4].iter().all(|&x| x == 0.0) && got[4 + 800..4 + 800 + 197 * 4].iter().all(|&x| x == 0.0));
    assert!(got[4 + 800 + 197 * 4..].iter().all(|&x| x != 0.0));
    // nothing at all, and heads without width
    for n in [(0, 2, 1, 3, 3, 4, 4), (1, 2, 1, 3, 3, 4, 0), (1, 2, 1, 3, 3, 0, 4)] {
        let c = case(&mut rng, DType::F32, "contiguous", n, None);
        let got = run(&c, &AttentionParams::new(1.0)).unwrap().to_f64();
        let own = n.0 * (n.1 * n.3 + n.2 * n.4) * n.5;
        assert!(got[..own].iter().all(|&x| x == 0.0), "{n:?} {got:?}");
    }
}

#[test]
fn bad_shapes_are_refused() {
    let base = || case(&mut Rng(1), DType::F32, "contiguous", (1, 4, 2, 3, 5, 8, 8), None);
    let p = AttentionParams::new(1.0);
    assert!(run(&base(), &p).is_ok());
    let odd = |f: &dyn Fn(&mut Case)| {
        let mut c = base();
        f(&mut c);
        let e = run(&c, &p).unwrap_err();
        assert!(e.to_string().starts_with("attention-backward"), "{e}");
    };
    let f = |dims: &[usize]| Operand::contiguous(DType::F32, dims, &vec![1.0; dims.iter().product()]);
    odd(&|c| c.k = f(&[1, 3, 5, 8]));
    odd(&|c| c.g = f(&[1, 4, 3, 7]));
    odd(&|c| c.g = f(&[1, 4, 8]));
    odd(&|c| c.g = Operand::contiguous(DType::F64, &[1, 4, 3, 8], &[1.0; 96]));
    odd(&|c| c.mask = Some(f(&[3, 4])));
    let c = base();
    let mut short = Data::zeros(DType::F32, 3);
    let (q, k, v, g) = (c.q.view(), c.k.view(), c.v.view(), c.g.view());
    assert!(attention_backward(&q, &k, &v, &g, None, &p, &mut short.slice_mut()).is_err());
}
