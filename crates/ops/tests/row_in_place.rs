//! Elementwise programs that write over what they read.

#![allow(clippy::unwrap_used, clippy::expect_used)] // what tests share fails by unwrapping, as tests do

mod common;

use candle_core::DType;
use candle_lazy_ops::row::{BinaryFn, Class, Input, RowProgram, UnaryFn};
use candle_lazy_ops::Error;
use common::*;

/// θ, m, v and their gradient to the next θ, m and v, with θ read again behind the first output's place.
fn moments(dtype: DType) -> RowProgram {
    let mut b = RowProgram::builder(Class::of(dtype).unwrap());
    let (theta, m, v, g) = (b.load(0), b.load(1), b.load(2), b.load(3));
    let (keep, rate) = (b.param(0), b.param(1));
    let part = b.binary(BinaryFn::Mul, m, keep);
    let next_m = b.binary(BinaryFn::Add, part, g);
    let sqr = b.unary(UnaryFn::Sqr, g);
    let part = b.binary(BinaryFn::Mul, v, keep);
    let next_v = b.binary(BinaryFn::Add, part, sqr);
    let root = b.unary(UnaryFn::Sqrt, next_v);
    let step = b.binary(BinaryFn::Div, next_m, root);
    let step = b.binary(BinaryFn::Mul, step, rate);
    let moved = b.binary(BinaryFn::Sub, theta, step);
    let decay = b.binary(BinaryFn::Mul, theta, rate);
    let next = b.binary(BinaryFn::Sub, moved, decay);
    b.output(next_m, dtype);
    b.output(next_v, dtype);
    b.output(next, dtype);
    b.finish().unwrap()
}

#[test]
fn an_update_in_place_has_the_bits_of_one_beside() {
    let mut rng = Rng(7);
    for dtype in [DType::F32, DType::F64, DType::BF16, DType::F16] {
        let p = moments(dtype);
        // within a tile, several tiles, one row cut in two, several threads, rows that no tile divides
        for dims in [vec![], vec![5], vec![2049], vec![4096], vec![70_001], vec![300, 1001], vec![3, 0, 4]] {
            for layout in ["contiguous", "transposed", "broadcast"] {
                let own: Vec<Operand> =
                    (0..3).map(|_| operand(&mut rng, "contiguous", dtype, &dims, 2.0).dense()).collect();
                // what is divided by the root of must not be less than 0
                let squares: Vec<f64> = own[2].values().iter().map(|v| v * v).collect();
                let own = [own[0].clone(), own[1].clone(), Operand::contiguous(dtype, &dims, &squares)];
                let g = operand(&mut rng, layout, dtype, &dims, 1.0);
                let inputs = [own[0].clone(), own[1].clone(), own[2].clone(), g.clone()];
                let want = run(&p, &dims, 0, &inputs, &[0.9, 0.01]);
                for threads in [1, 3] {
                    let mut outs = [own[1].data.clone(), own[2].data.clone(), own[0].data.clone()];
                    let mut slices: Vec<_> = outs.iter_mut().map(Data::slice_mut).collect();
                    let given = [Input::Output(2), Input::Output(0), Input::Output(1), Input::View(g.view())];
                    on_threads(threads, || p.run_in_place(&dims, &given, &[0.9, 0.01], &mut slices)).unwrap();
                    for (k, (got, want)) in outs.iter().zip(&want).enumerate() {
                        assert!(got.bits() == want.bits(), "{} {dims:?} {layout}: output {k}", dtype.as_str());
                    }
                }
            }
        }
    }
}

#[test]
fn what_has_no_place_of_its_own_is_refused() {
    let mut b = RowProgram::builder(Class::F32);
    let (x, scalar) = (b.load(0), b.param(0));
    let twice = b.binary(BinaryFn::Add, x, x);
    b.output(scalar, DType::F32);
    b.output(twice, DType::F32);
    let p = b.finish().unwrap();
    assert_eq!([0, 1, 2].map(|k| p.may_run_in_place(k)), [false, true, false]);
    let (mut one, mut all) = (Data::zeros(DType::F32, 1), Data::new(DType::F32, &[1.0, 2.0, 3.0]));
    for k in [0, 2] {
        let mut outs = [one.slice_mut(), all.slice_mut()];
        let refused = p.run_in_place(&[3], &[Input::Output(k)], &[5.0], &mut outs);
        assert!(matches!(refused, Err(Error::InvalidProgram { .. })), "{refused:?}");
    }
    // of another length: nothing is written
    let mut outs = [one.slice_mut(), all.slice_mut()];
    assert!(p.run_in_place(&[4], &[Input::Output(1)], &[5.0], &mut outs).is_err());
    assert_eq!(all.to_f64(), [1.0, 2.0, 3.0]);
    let mut outs = [one.slice_mut(), all.slice_mut()];
    p.run_in_place(&[3], &[Input::Output(1)], &[5.0], &mut outs).unwrap();
    assert_eq!((one.to_f64(), all.to_f64()), (vec![5.0], vec![2.0, 4.0, 6.0]));
}
