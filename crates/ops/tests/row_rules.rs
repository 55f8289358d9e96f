//! Row programs: what is refused, and small facts about builders, scratch and rounding.

#![allow(clippy::unwrap_used, clippy::expect_used)] // what tests share fails by unwrapping, as tests do

mod common;

use candle_core::DType;
use candle_lazy_ops::row::{programs, Class, FloatKind, ReduceFn, Reg, RowProgram, UnaryFn};
use candle_lazy_ops::view::{SliceMut, Strided, View};
use candle_lazy_ops::Error;
use common::*;

#[test]
fn bad_programs_are_refused() {
    let b = RowProgram::builder(Class::F32);
    assert!(matches!(b.finish(), Err(Error::InvalidProgram { .. })), "no output");
    let mut b = RowProgram::builder(Class::F32);
    let x = b.load_row(0);
    let r = b.reduce(ReduceFn::Sum, x);
    b.output(r, DType::F32);
    assert!(b.finish().unwrap_err().to_string().contains("does not vary"));
    let mut b = RowProgram::builder(Class::F32);
    b.unary(UnaryFn::Exp, Reg(4));
    b.output(Reg(0), DType::F32);
    assert!(b.finish().unwrap_err().to_string().contains("register 4"));
    let mut b = RowProgram::builder(Class::F32);
    let x = b.load(0);
    b.output(x, DType::I64);
    assert!(b.finish().is_err());
    let mut b = RowProgram::builder(Class::F32);
    b.load(0);
    b.output(Reg(9), DType::F32);
    assert!(b.finish().is_err());
}

#[test]
fn bad_runs_are_refused() {
    let p = programs::rms_norm(true, DType::F32).unwrap();
    let x = Operand::contiguous(DType::F32, &[2, 3], &[1.0; 6]);
    let ok = [x.clone(), x.clone()];
    assert!(try_run(&p, &[2, 3], 0b10, &ok, &[1e-5]).is_ok());
    assert!(try_run(&p, &[2, 3], 0b100, &ok, &[1e-5]).is_err(), "axis out of range");
    assert!(try_run(&p, &[2, 3], 0b10, &ok[..1], &[1e-5]).is_err(), "missing input");
    assert!(try_run(&p, &[2, 3], 0b10, &ok, &[]).is_err(), "missing parameter");
    assert!(try_run(&p, &[3, 2], 0b10, &ok, &[1e-5]).is_err(), "other dims");
    let wrong = Operand::contiguous(DType::F64, &[2, 3], &[1.0; 6]);
    assert!(try_run(&p, &[2, 3], 0b10, &[x.clone(), wrong], &[1e-5]).is_err(), "dtype");
    let mut small = vec![0f32; 5];
    let views = [x.view(), x.view()];
    let e = p.run(&[2, 3], 0b10, &views, &[1e-5], &mut [SliceMut::F32(&mut small)]).unwrap_err();
    assert!(e.to_string().contains("needs 6 elements"), "{e}");
    // A layout past its data, put together by hand.
    let short = View { data: x.data.slice(), layout: Strided::contiguous(&[2, 4]) };
    let mut out = vec![0f32; 8];
    let e = p.run(&[2, 4], 0b10, &[short.clone(), short], &[1e-5], &mut [SliceMut::F32(&mut out)]).unwrap_err();
    assert!(matches!(e, Error::OutOfBounds { .. }));
    let mut b = RowProgram::builder(Class::F32);
    let r = b.load_row(0);
    b.output(r, DType::F32);
    let p = b.finish().unwrap();
    assert!(try_run(&p, &[2, 3], 0b10, &[x], &[]).is_err(), "varies along the row");
}

#[test]
fn the_builder_merges_identical_instructions() {
    let mut b = RowProgram::builder(Class::F32);
    let (x, y) = (b.load(0), b.load(0));
    assert_eq!(x, y);
    let e1 = b.unary(UnaryFn::Exp, x);
    assert_eq!(e1, b.unary(UnaryFn::Exp, y));
    assert_ne!(e1, b.unary(UnaryFn::Log, y));
    b.output(e1, DType::F32);
    assert_eq!(b.finish().unwrap().instrs().len(), 3);
}

#[test]
fn scratch_is_bounded_whatever_the_row_length() {
    let p = programs::softmax(Class::F32, DType::F32).unwrap();
    let small = on_threads(1, || p.scratch_bytes(&[1, 50_000], 0b10));
    let large = on_threads(1, || p.scratch_bytes(&[1000, 50_000_000], 0b10));
    assert!(small > 0 && large <= small.max(1 << 20), "{small} {large}");
}

#[test]
fn rounding_instructions_round_to_the_storage_type() {
    let mut b = RowProgram::builder(Class::F32);
    let x = b.load(0);
    let (h, bf, f) = (b.round(FloatKind::F16, x), b.round(FloatKind::BF16, x), b.round(FloatKind::F32, x));
    for r in [h, bf, f] {
        b.output(r, DType::F32);
    }
    let p = b.finish().unwrap();
    let mut rng = Rng(1);
    let v: Vec<f64> = rng.floats(500, 1e3).iter().map(|&v| v as f32 as f64).collect();
    let out = run(&p, &[500], 0, &[Operand::contiguous(DType::F32, &[500], &v)], &[]);
    let want16: Vec<f64> = v.iter().map(|&v| half::f16::from_f32(v as f32).to_f64()).collect();
    let wantb: Vec<f64> = v.iter().map(|&v| half::bf16::from_f32(v as f32).to_f64()).collect();
    assert_eq!(out[0].to_f64(), want16);
    assert_eq!(out[1].to_f64(), wantb);
    assert_eq!(out[2].to_f64(), v);
}
