//! Copies, casts, fills and selection against plain loops and against Candle.

#![allow(clippy::unwrap_used, clippy::expect_used)] // what tests share fails by unwrapping, as tests do

mod common;

use candle_core::{DType, Device, Tensor};
use candle_lazy_ops::kernels;
use candle_lazy_ops::view::{SliceMut, Strided, View};
use candle_lazy_ops::Error;
use common::*;
use half::{bf16, f16};
use proptest::prelude::{any, prop, proptest, ProptestConfig};

proptest! {
    #![proptest_config(ProptestConfig { cases: 120, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn copies_move_every_element(
        seed in any::<u64>(),
        dims in prop::collection::vec(0usize..6, 0..5),
        from in prop::sample::select(LAYOUTS.to_vec()),
        to in prop::sample::select(vec!["contiguous", "transposed", "narrowed", "offset"]),
        dtype in prop::sample::select(vec![DType::U8, DType::F32, DType::F64, DType::BF16, DType::I64]),
    ) {
        let mut rng = Rng(seed);
        let src = operand(&mut rng, from, dtype, &dims, 100.0);
        let mut dst = operand(&mut rng, to, dtype, &dims, 100.0);
        let before = dst.data.to_f64();
        let layout = dst.layout.clone();
        kernels::copy_into(&src.view(), &mut dst.data.slice_mut(), &layout).unwrap();
        assert_eq!(dst.values(), src.values());
        // Nothing outside the destination's layout is touched.
        let mut touched = vec![false; before.len()];
        for i in indices(&dims) {
            touched[offset(&layout, &i)] = true;
        }
        let after = dst.data.to_f64();
        for (i, t) in touched.iter().enumerate() {
            assert!(*t || after[i] == before[i]);
        }
    }

    #[test]
    fn selection_agrees_with_a_loop(
        seed in any::<u64>(),
        dims in prop::collection::vec(1usize..6, 1..4),
        at in 0usize..3,
        ids_dims in prop::collection::vec(0usize..4, 0..3),
        layout in prop::sample::select(LAYOUTS.to_vec()),
        id_layout in prop::sample::select(LAYOUTS.to_vec()),
        id_type in prop::sample::select(vec![DType::U8, DType::U32, DType::I64]),
    ) {
        let mut rng = Rng(seed);
        let dim = at % dims.len();
        let src = operand(&mut rng, layout, DType::F32, &dims, 10.0);
        let mut ids = operand(&mut rng, id_layout, DType::F64, &ids_dims, 10.0);
        let raw: Vec<f64> = ids.data.to_f64().iter().map(|v| (v.abs() as usize % dims[dim]) as f64).collect();
        ids.data = Data::new(id_type, &raw);
        let out_dims = [&dims[..dim], &ids_dims[..], &dims[dim + 1..]].concat();
        let n: usize = out_dims.iter().product();
        let mut out = Data::zeros(DType::F32, n);
        kernels::index_select(&src.view(), &ids.view(), dim, &mut out.slice_mut()).unwrap();
        let (sv, iv) = (src.data.to_f64(), ids.data.to_f64());
        let want: Vec<f64> = indices(&out_dims)
            .map(|i| {
                let id = iv[offset(&ids.layout, &i[dim..dim + ids_dims.len()])] as usize;
                let full = [&i[..dim], &[id], &i[dim + ids_dims.len()..]].concat();
                sv[offset(&src.layout, &full)]
            })
            .collect();
        assert_eq!(out.to_f64(), want);
    }
}

#[test]
fn casts_are_candles_for_every_pair() {
    let cpu = Device::Cpu;
    let all = [DType::U8, DType::U32, DType::I64, DType::BF16, DType::F16, DType::F32, DType::F64];
    let mut values: Vec<f64> = vec![
        0.0,
        -0.0,
        1.0,
        -1.0,
        0.5,
        1.5,
        2.5,
        -2.5,
        3.999,
        255.0,
        256.0,
        300.7,
        -3.0,
        65504.0,
        65520.0,
        70000.0,
        4294967295.0,
        4294967296.0,
        1e10,
        -1e10,
        1e30,
        -1e30,
        1e-8,
        6e-8,
        1e-40,
        16777217.0,
        2147483649.0,
        0.333_333_333_333,
        1.000_976_562_5,
        f64::INFINITY,
        f64::NEG_INFINITY,
        f64::NAN,
    ];
    values.extend(Rng(51).floats(300, 1000.0));
    for from in all {
        let t = Tensor::new(values.as_slice(), &cpu).unwrap().to_dtype(from).unwrap();
        let src = read(&t);
        for to in all {
            let want = read(&t.to_dtype(to).unwrap());
            let mut out = Data::zeros(to, values.len());
            let layout = Strided::contiguous(&[values.len()]);
            let view = View::new(src.slice(), layout).unwrap();
            kernels::cast(&view, &mut out.slice_mut()).unwrap();
            let same = max_diff(&out.to_f64(), &want.to_f64()) == 0.0;
            assert!(same, "{} to {}", from.as_str(), to.as_str());
        }
    }
}

fn read(t: &Tensor) -> Data {
    let t = t.flatten_all().unwrap();
    match t.dtype() {
        DType::U8 => Data::U8(t.to_vec1().unwrap()),
        DType::U32 => Data::U32(t.to_vec1().unwrap()),
        DType::I64 => Data::I64(t.to_vec1().unwrap()),
        DType::BF16 => Data::BF16(t.to_vec1().unwrap()),
        DType::F16 => Data::F16(t.to_vec1().unwrap()),
        DType::F32 => Data::F32(t.to_vec1().unwrap()),
        _ => Data::F64(t.to_vec1().unwrap()),
    }
}

#[test]
fn every_bf16_rounding_case_is_halfs() {
    // All upper halves with the lower halves that decide rounding.
    let mut src = Vec::new();
    for hi in (0..=u16::MAX).step_by(7) {
        for lo in [0u32, 1, 0x7fff, 0x8000, 0x8001, 0xffff] {
            src.push(f32::from_bits((hi as u32) << 16 | lo));
        }
    }
    let mut out = vec![bf16::ZERO; src.len()];
    let view = View::new(candle_lazy_ops::view::Slice::F32(&src), Strided::contiguous(&[src.len()])).unwrap();
    kernels::cast(&view, &mut SliceMut::BF16(&mut out)).unwrap();
    for (o, s) in out.iter().zip(&src) {
        let want = bf16::from_f32(*s);
        assert!(o.to_bits() == want.to_bits() || o.is_nan() && want.is_nan(), "{s}");
    }
}

#[test]
fn casts_of_strided_views_are_dense() {
    let mut rng = Rng(52);
    for layout in LAYOUTS {
        for dims in [vec![3usize, 70], vec![2, 3, 17], vec![], vec![0, 3]] {
            let x = operand(&mut rng, layout, DType::F32, &dims, 5.0);
            let want: Vec<f64> = x.values().iter().map(|&v| f16::from_f64(v).to_f64()).collect();
            let mut out = Data::zeros(DType::F16, want.len());
            kernels::cast(&x.view(), &mut out.slice_mut()).unwrap();
            assert_eq!(out.to_f64(), want, "{layout} {dims:?}");
        }
    }
}

#[test]
fn fills_and_bad_copies() {
    for dtype in [DType::U8, DType::U32, DType::I64, DType::BF16, DType::F16, DType::F32, DType::F64] {
        let mut out = Data::zeros(dtype, 5);
        kernels::fill(&mut out.slice_mut(), 2.0).unwrap();
        assert_eq!(out.to_f64(), [2.0; 5]);
    }
    let x = Operand::contiguous(DType::F32, &[2, 3], &[1.0; 6]);
    let mut out = Data::zeros(DType::F32, 6);
    let l = Strided::contiguous(&[3, 2]);
    assert!(kernels::copy_into(&x.view(), &mut out.slice_mut(), &l).is_err());
    let mut l = Strided::contiguous(&[2, 3]);
    l.offset = 1;
    assert!(kernels::copy_into(&x.view(), &mut out.slice_mut(), &l).is_err());
    let mut other = Data::zeros(DType::F64, 6);
    let l = Strided::contiguous(&[2, 3]);
    assert!(kernels::copy_into(&x.view(), &mut other.slice_mut(), &l).is_err());
    let mut short = Data::zeros(DType::F64, 5);
    assert!(kernels::cast(&x.view(), &mut short.slice_mut()).is_err());
}

#[test]
fn an_index_out_of_range_is_named() {
    let src = Operand::contiguous(DType::F32, &[3, 2], &[1.0; 6]);
    let ids = Operand::contiguous(DType::I64, &[2, 2], &[0.0, 2.0, 3.0, 1.0]);
    let mut out = Data::zeros(DType::F32, 8);
    let e = kernels::index_select(&src.view(), &ids.view(), 0, &mut out.slice_mut()).unwrap_err();
    assert!(matches!(e, Error::IndexOutOfRange { index: 3, size: 3, position: 2, .. }), "{e}");
    let neg = Operand::contiguous(DType::I64, &[1], &[-1.0]);
    let mut two = Data::zeros(DType::F32, 2);
    assert!(kernels::index_select(&src.view(), &neg.view(), 0, &mut two.slice_mut()).is_err());
    assert!(kernels::index_select(&src.view(), &neg.view(), 2, &mut two.slice_mut()).is_err());
    let float = Operand::contiguous(DType::F32, &[1], &[1.0]);
    assert!(kernels::index_select(&src.view(), &float.view(), 0, &mut two.slice_mut()).is_err());
}

#[test]
fn the_largest_index_gives_zeros_as_candles_does() {
    let cpu = Device::Cpu;
    let src = Tensor::new(&[[1f32, 2.], [3., 4.]], &cpu).unwrap();
    let ids = Tensor::new(&[1u32, u32::MAX], &cpu).unwrap();
    let eager: Vec<f32> = src.index_select(&ids, 0).unwrap().flatten_all().unwrap().to_vec1().unwrap();
    let s = Operand::contiguous(DType::F32, &[2, 2], &[1.0, 2.0, 3.0, 4.0]);
    let i = Operand { data: Data::U32(vec![1, u32::MAX]), layout: Strided::contiguous(&[2]) };
    let mut out = Data::zeros(DType::F32, 4);
    kernels::index_select(&s.view(), &i.view(), 0, &mut out.slice_mut()).unwrap();
    assert!(out == Data::F32(eager));
}

#[test]
fn large_selections_run_in_parallel_to_the_same_result() {
    let mut rng = Rng(61);
    let src = operand(&mut rng, "contiguous", DType::F32, &[50, 256], 1.0);
    let ids: Vec<f64> = (0..600).map(|_| rng.below(50) as f64).collect();
    let ids = Operand::contiguous(DType::U32, &[600], &ids);
    let go = || {
        let mut out = Data::zeros(DType::F32, 600 * 256);
        kernels::index_select(&src.view(), &ids.view(), 0, &mut out.slice_mut()).unwrap();
        out
    };
    assert!(on_threads(1, go) == on_threads(4, go));
}
