//! Matmul, LoRA, RoPE, selection, copies and casts against plain loops and against Candle.

#![allow(clippy::unwrap_used, clippy::expect_used)] // what tests share fails by unwrapping, as tests do

mod common;

use candle_core::{DType, Device, Tensor};
use candle_lazy_ops::kernels;
use candle_lazy_ops::view::Strided;
use candle_lazy_ops::Error;
use common::*;
use proptest::prelude::{any, prop, proptest, ProptestConfig};

const FLOATS: [DType; 4] = [DType::F32, DType::F64, DType::F16, DType::BF16];

/// Σ over k in f64, and the largest Σ|a·b| of the product, for broadcast batch dims.
fn matmul_ref(a: &Operand, b: &Operand) -> (Vec<usize>, Vec<f64>, f64) {
    let (ad, bd) = (&a.layout.dims, &b.layout.dims);
    let (m, k, n) = (ad[ad.len() - 2], ad[ad.len() - 1], bd[bd.len() - 1]);
    let rank = ad.len().max(bd.len()) - 2;
    let dim = |d: &[usize], i: usize| {
        let own = d.len() - 2;
        (i + own).checked_sub(rank).map_or(1, |j| d[j])
    };
    let batch: Vec<usize> = (0..rank).map(|i| dim(ad, i).max(dim(bd, i))).collect();
    let batch: Vec<usize> =
        batch.iter().enumerate().map(|(i, &d)| if dim(ad, i) == 0 || dim(bd, i) == 0 { 0 } else { d }).collect();
    let (av, bv) = (a.data.to_f64(), b.data.to_f64());
    let mut out = Vec::new();
    let mut scale = 0f64;
    for ix in indices(&batch) {
        let pick = |d: &[usize]| -> Vec<usize> {
            let own = d.len() - 2;
            (0..own).map(|j| if d[j] == 1 { 0 } else { ix[rank - own + j] }).collect()
        };
        let (ai, bi) = (pick(ad), pick(bd));
        for i in 0..m {
            for j in 0..n {
                let (mut s, mut abs) = (0f64, 0f64);
                for l in 0..k {
                    let x = av[offset(&a.layout, &[&ai[..], &[i, l]].concat())];
                    let y = bv[offset(&b.layout, &[&bi[..], &[l, j]].concat())];
                    s += x * y;
                    abs += (x * y).abs();
                }
                scale = scale.max(abs);
                out.push(s);
            }
        }
    }
    let mut dims = batch;
    dims.extend([m, n]);
    (dims, out, scale)
}

fn matmul(a: &Operand, b: &Operand, n: usize) -> Result<Data, Error> {
    let dtype = a.data.slice().dtype();
    let mut out = Data::new(dtype, &vec![9.0; n]);
    kernels::matmul(&a.view(), &b.view(), &mut out.slice_mut())?;
    Ok(out)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 120, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn matmul_agrees_with_f64(
        seed in any::<u64>(),
        m in 1usize..9, k in 0usize..40, n in 1usize..9,
        batch in prop::sample::select(vec![(vec![], vec![]), (vec![3], vec![]), (vec![2, 3], vec![3]),
            (vec![2, 1], vec![1, 3]), (vec![1], vec![4]), (vec![], vec![2, 2])]),
        dtype in prop::sample::select(FLOATS.to_vec()),
        la in prop::sample::select(LAYOUTS.to_vec()),
        lb in prop::sample::select(LAYOUTS.to_vec()),
    ) {
        let mut rng = Rng(seed);
        let a = operand(&mut rng, la, dtype, &[&batch.0[..], &[m, k]].concat(), 1.0);
        let b = operand(&mut rng, lb, dtype, &[&batch.1[..], &[k, n]].concat(), 1.0);
        let (_, want, scale) = matmul_ref(&a, &b);
        let got = matmul(&a, &b, want.len()).unwrap().to_f64();
        // Any order of k additions errs by at most k half ulps of Σ|a·b| (equal terms come close to it); in f64 the reference
        // errs as much. f16 and bf16 round an f32 sum once.
        let ulps = match dtype {
            DType::F16 | DType::BF16 => 2.0,
            DType::F64 => 2.0 + k as f64,
            _ => 2.0 + k as f64 / 2.0,
        };
        assert_ulps(&got, &want, dtype, ulps, scale.max(1e-3), &format!("{la} {lb} {m}x{k}x{n}"));
    }
}

#[test]
fn f64_matmul_is_candles_bit_for_bit() {
    let mut rng = Rng(21);
    let cpu = Device::Cpu;
    for (ad, bd) in [
        (vec![1usize, 64], vec![64usize, 96]),
        (vec![7, 100], vec![100, 33]),
        (vec![128, 300], vec![300, 64]),
        (vec![3, 5, 64], vec![3, 64, 9]),
        (vec![2, 4, 31, 64], vec![2, 4, 64, 31]),
    ] {
        let a = operand(&mut rng, "contiguous", DType::F64, &ad, 1.0);
        let b = operand(&mut rng, "contiguous", DType::F64, &bd, 1.0);
        let tensor = |o: &Operand| Tensor::from_vec(o.values(), o.layout.dims.to_vec(), &cpu).unwrap();
        let eager: Vec<f64> = tensor(&a).matmul(&tensor(&b)).unwrap().flatten_all().unwrap().to_vec1().unwrap();
        assert!(matmul(&a, &b, eager.len()).unwrap() == Data::F64(eager), "{ad:?} {bd:?}");
    }
}

/// The same matrix elsewhere: elements of a row so far apart, or those of a column where that is 0.
fn lying(dtype: DType, m: &Operand, (by_row, by_column): (usize, usize)) -> Operand {
    let (rows, cols) = (m.layout.dims[0], m.layout.dims[1]);
    let strides = match by_column {
        0 => [cols * by_row + 1, by_row],
        apart => [apart, rows * apart + 2],
    };
    let mut data = vec![f64::NAN; 3 + rows * strides[0] + cols * strides[1]];
    for (at, v) in m.values().into_iter().enumerate() {
        data[3 + at / cols * strides[0] + at % cols * strides[1]] = v;
    }
    let layout = Strided { dims: m.layout.dims.clone(), strides: strides.as_slice().into(), offset: 3 };
    Operand { data: Data::new(dtype, &data), layout }
}

/// Each row of a product has the bits that it has alone, and so has each column, however the right side lies.
#[test]
fn a_row_of_a_product_does_not_depend_on_its_neighbours_nor_on_the_layout() {
    let mut rng = Rng(23);
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        for (rows, k, n) in [(1usize, 64usize, 40usize), (2, 100, 33), (7, 75, 5), (33, 300, 64), (130, 17, 16)] {
            let w = operand(&mut rng, "contiguous", dtype, &[n, k], 1.0);
            let a = operand(&mut rng, "contiguous", dtype, &[rows, k], 1.0);
            let w = Operand { layout: w.layout.permute(&[1, 0]).unwrap(), ..w.clone() };
            let all = matmul(&a, &w, rows * n).unwrap().bits();
            // rows are runs, columns are, neither is
            for (i, spread) in [(1, 0), (0, 1), (2, 0), (0, 3)].into_iter().enumerate() {
                let b = lying(dtype, &w, spread);
                let what = format!("{} {i} {rows}x{k}x{n}", dtype.as_str());
                assert!(matmul(&lying(dtype, &a, spread), &b, rows * n).unwrap().bits() == all, "{what}");
                for row in [0, rows / 2, rows - 1] {
                    let one = Operand { layout: a.layout.narrow(0, row, 1).unwrap(), ..a.clone() };
                    let alone = matmul(&one, &b, n).unwrap().bits();
                    assert!(alone == all[row * n..(row + 1) * n], "{what}: row {row}");
                    let column = Operand { layout: b.layout.narrow(1, n - 1, 1).unwrap(), ..b.clone() };
                    let alone = matmul(&one, &column, 1).unwrap().bits();
                    assert!(alone == all[(row + 1) * n - 1..(row + 1) * n], "{what}: last column of row {row}");
                }
            }
        }
    }
}

#[test]
fn matmul_bits_do_not_depend_on_threads() {
    let mut rng = Rng(22);
    for dtype in FLOATS {
        let a = operand(&mut rng, "contiguous", dtype, &[96, 300], 1.0);
        let b = operand(&mut rng, "contiguous", dtype, &[300, 128], 1.0);
        let one = on_threads(1, || matmul(&a, &b, 96 * 128).unwrap().bits());
        let four = on_threads(4, || matmul(&a, &b, 96 * 128).unwrap().bits());
        assert!(one == four, "{}", dtype.as_str());
    }
}

#[test]
fn an_empty_inner_dim_gives_zeros() {
    for dtype in FLOATS {
        let a = Operand::contiguous(dtype, &[2, 3, 0], &[]);
        let b = Operand::contiguous(dtype, &[0, 4], &[]);
        assert_eq!(matmul(&a, &b, 24).unwrap().to_f64(), vec![0.0; 24]);
    }
    let a = Operand::contiguous(DType::F32, &[0, 3], &[]);
    let b = Operand::contiguous(DType::F32, &[3, 4], &[1.0; 12]);
    assert_eq!(matmul(&a, &b, 0).unwrap().len(), 0);
}

#[test]
fn bad_products_are_refused() {
    let f = |dims: &[usize]| Operand::contiguous(DType::F32, dims, &vec![1.0; dims.iter().product()]);
    let e = matmul(&f(&[2, 3]), &f(&[4, 5]), 10).unwrap_err();
    assert!(e.to_string().contains("[2, 3] x [4, 5]"), "{e}");
    assert!(matmul(&f(&[2, 2, 3]), &f(&[3, 3, 5]), 20).is_err(), "batch");
    assert!(matmul(&f(&[3]), &f(&[3, 5]), 5).is_err(), "rank");
    assert!(matmul(&f(&[2, 3]), &f(&[3, 5]), 9).is_err(), "output length");
    let ints = Operand::contiguous(DType::I64, &[2, 2], &[1.0; 4]);
    assert!(matches!(matmul(&ints, &ints, 4), Err(Error::Unsupported { .. })));
    let d = Operand::contiguous(DType::F64, &[3, 5], &[1.0; 15]);
    assert!(matches!(matmul(&f(&[2, 3]), &d, 10), Err(Error::DTypeMismatch { .. })));
}

#[test]
fn lora_agrees_with_f64_in_every_layout() {
    let mut rng = Rng(31);
    for dtype in FLOATS {
        for layout in LAYOUTS {
            for with_base in [false, true] {
                let (k, r, n) = (24, 3, 17);
                let x = operand(&mut rng, layout, dtype, &[2, 5, k], 1.0);
                let a = operand(&mut rng, layout, dtype, &[k, r], 1.0);
                let b = operand(&mut rng, layout, dtype, &[r, n], 1.0);
                let base = operand(&mut rng, layout, dtype, &[2, 5, n], 1.0);
                let mut out = Data::new(dtype, &[5.0; 170]);
                let view = base.view();
                let opt = with_base.then_some(&view);
                kernels::lora(&x.view(), &a.view(), &b.view(), opt, 0.5, &mut out.slice_mut()).unwrap();
                let (xv, av, bv, base_v) = (x.values(), a.values(), b.values(), base.values());
                let mut want = Vec::new();
                let mut scale = 0f64;
                for row in 0..10 {
                    for j in 0..n {
                        let (mut s, mut abs) = (0f64, 0f64);
                        for l in 0..r {
                            for i in 0..k {
                                let p = xv[row * k + i] * av[i * r + l] * bv[l * n + j] * 0.5;
                                s += p;
                                abs += p.abs();
                            }
                        }
                        if with_base {
                            s += base_v[row * n + j];
                            abs += base_v[row * n + j].abs();
                        }
                        scale = scale.max(abs);
                        want.push(s);
                    }
                }
                // The low ranks are rounded by the library in f16 and f32 at most once per product.
                // In f64 the reference rounds each of its 72 terms as well.
                let ulps = if dtype == DType::F64 { 8.0 } else { 2.0 };
                assert_ulps(&out.to_f64(), &want, dtype, ulps, scale, &format!("{layout} {}", dtype.as_str()));
            }
        }
    }
}

#[test]
fn lora_of_rank_zero_is_the_base() {
    let x = Operand::contiguous(DType::F32, &[2, 3], &[1.0; 6]);
    let a = Operand::contiguous(DType::F32, &[3, 0], &[]);
    let b = Operand::contiguous(DType::F32, &[0, 2], &[]);
    let base = Operand::contiguous(DType::F32, &[2, 2], &[1.0, 2.0, 3.0, 4.0]);
    let mut out = Data::new(DType::F32, &[9.0; 4]);
    let view = base.view();
    kernels::lora(&x.view(), &a.view(), &b.view(), Some(&view), 2.0, &mut out.slice_mut()).unwrap();
    assert_eq!(out.to_f64(), [1.0, 2.0, 3.0, 4.0]);
    kernels::lora(&x.view(), &a.view(), &b.view(), None, 2.0, &mut out.slice_mut()).unwrap();
    assert_eq!(out.to_f64(), [0.0; 4]);
}

#[test]
fn bad_lora_shapes_are_refused() {
    let f = |dims: &[usize]| Operand::contiguous(DType::F32, dims, &vec![1.0; dims.iter().product()]);
    let (x, a, b) = (f(&[2, 3]), f(&[3, 2]), f(&[2, 4]));
    let mut out = Data::zeros(DType::F32, 8);
    let mut go = |x: &Operand, a: &Operand, b: &Operand, base: Option<&Operand>| {
        let base = base.map(|o| o.view());
        kernels::lora(&x.view(), &a.view(), &b.view(), base.as_ref(), 1.0, &mut out.slice_mut())
    };
    assert!(go(&x, &a, &b, None).is_ok());
    assert!(go(&x, &f(&[4, 2]), &b, None).is_err());
    assert!(go(&x, &a, &f(&[3, 4]), None).is_err());
    assert!(go(&x, &a, &b, Some(&f(&[2, 3]))).is_err());
    assert!(go(&f(&[]), &a, &b, None).is_err());
    assert!(go(&x, &f(&[3, 2, 1]), &b, None).is_err());
}

#[test]
fn rope_agrees_with_f64_in_every_layout() {
    let mut rng = Rng(41);
    for dtype in FLOATS {
        for layout in LAYOUTS {
            for interleaved in [false, true] {
                for per_batch in [false, true] {
                    let (b, h, s, d) = (2, 3, 5, 8);
                    let x = operand(&mut rng, layout, dtype, &[b, h, s, d], 2.0);
                    let t_dims: &[usize] = if per_batch { &[2, 5, 4] } else { &[5, 4] };
                    let half = matches!(dtype, DType::F16 | DType::BF16);
                    let t_type = if half && per_batch { DType::F32 } else { dtype };
                    let cos = operand(&mut rng, layout, t_type, t_dims, 1.0);
                    let sin = operand(&mut rng, layout, t_type, t_dims, 1.0);
                    let mut out = Data::zeros(dtype, b * h * s * d);
                    kernels::rope(&x.view(), &cos.view(), &sin.view(), interleaved, &mut out.slice_mut()).unwrap();
                    let (xv, cv, sv) = (x.values(), cos.values(), sin.values());
                    let mut want = vec![0.0; b * h * s * d];
                    for row in 0..b * h * s {
                        let t = if per_batch { row / (h * s) * s + row % s } else { row % s };
                        for j in 0..d / 2 {
                            let (p, q) = if interleaved { (2 * j, 2 * j + 1) } else { (j, j + d / 2) };
                            let (x, y) = (xv[row * d + p], xv[row * d + q]);
                            let (c, n) = (cv[t * d / 2 + j], sv[t * d / 2 + j]);
                            want[row * d + p] = x * c - y * n;
                            want[row * d + q] = x * n + y * c;
                        }
                    }
                    assert_ulps(&out.to_f64(), &want, dtype, 1.5, 4.0, layout);
                }
            }
        }
    }
}

#[test]
fn rope_in_f32_is_candles_bit_for_bit() {
    let mut rng = Rng(42);
    let cpu = Device::Cpu;
    let draw = |rng: &mut Rng, dims: &[usize]| {
        let v: Vec<f32> = rng.floats(dims.iter().product(), 1.0).iter().map(|&v| v as f32).collect();
        (v.clone(), Tensor::from_vec(v, dims, &cpu).unwrap())
    };
    let (xv, x) = draw(&mut rng, &[2, 3, 7, 16]);
    let (cv, c) = draw(&mut rng, &[7, 8]);
    let (sv, s) = draw(&mut rng, &[7, 8]);
    let op = |v: &[f32], dims: &[usize]| Operand { data: Data::F32(v.to_vec()), layout: Strided::contiguous(dims) };
    for interleaved in [false, true] {
        let eager = if interleaved {
            candle_nn::rotary_emb::rope_i(&x, &c, &s)
        } else {
            candle_nn::rotary_emb::rope(&x, &c, &s)
        };
        let eager: Vec<f32> = eager.unwrap().flatten_all().unwrap().to_vec1().unwrap();
        let mut out = Data::zeros(DType::F32, eager.len());
        let (x, c, s) = (op(&xv, &[2, 3, 7, 16]), op(&cv, &[7, 8]), op(&sv, &[7, 8]));
        kernels::rope(&x.view(), &c.view(), &s.view(), interleaved, &mut out.slice_mut()).unwrap();
        assert!(out == Data::F32(eager));
    }
}

#[test]
fn bad_rope_shapes_are_refused() {
    let f = |dims: &[usize]| Operand::contiguous(DType::F32, dims, &vec![1.0; dims.iter().product()]);
    let mut out = Data::zeros(DType::F32, 16);
    let mut go = |x: &Operand, c: &Operand, s: &Operand| {
        kernels::rope(&x.view(), &c.view(), &s.view(), false, &mut out.slice_mut())
    };
    let x = f(&[1, 1, 4, 4]);
    assert!(go(&x, &f(&[4, 2]), &f(&[4, 2])).is_ok());
    assert!(go(&x, &f(&[9, 2]), &f(&[4, 2])).is_ok(), "longer tables");
    assert!(go(&x, &f(&[3, 2]), &f(&[4, 2])).is_err(), "short table");
    assert!(go(&x, &f(&[4, 4]), &f(&[4, 2])).is_err(), "wide table");
    assert!(go(&x, &f(&[2, 4, 2]), &f(&[4, 2])).is_err(), "batch");
    assert!(go(&f(&[4, 4]), &f(&[4, 2]), &f(&[4, 2])).is_err(), "rank");
    assert!(go(&f(&[1, 1, 4, 3]), &f(&[4, 1]), &f(&[4, 1])).is_err(), "odd");
}
