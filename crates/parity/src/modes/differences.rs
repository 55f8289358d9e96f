//! Recorded gradients against finite differences, in f64.
//!
//! The loss is Σ y·w, as for Candle's autograd, and one input at a time moves along a random direction d: (L(x + hd) − L(x − hd))/2h with
//! h and h/2, extrapolated (Richardson), must be Σ g·d. Both sides are lazy evaluations: what they say of the op itself is
//! the other modes' concern. Inputs are moved off the numbers at which functions have corners and extremes have ties.

use super::gradient::{recorded, weights};
use super::{Gradients, Subject};
use crate::case::{Case, Layout};
use crate::reference::{Acc, Arr};
use crate::rng::Rng;
use crate::value::{to_arr, to_tensor};
use crate::{lazy, Result};
use candle_core::{DType, Tensor};
use candle_lazy_exec::LazyTensor;
use candle_lazy_graph::{Op, ReduceOp};

/// The step, as a share of the input's largest number.
const STEP: f64 = 1e-4;
/// How far numbers are moved first, as a share of the same: many steps, from corners at zero, one and whole numbers.
const AWAY: f64 = 1e-2;
/// What the difference and the gradient may be apart, as a share of all terms of both.
const ALLOWED: f64 = 1e-6;
/// What a slope of zero may come to: terms of about one that cancel, in f64.
const NOTHING: f64 = 1e-12;
/// Where the differences of h and h/2 are further apart than this share, they say nothing.
const SMOOTH: f64 = 1e-4;

fn largest(x: &Arr) -> f64 {
    x.max_abs().max(f64::MIN_POSITIVE)
}

/// The storages, off corners and ties.
fn moved(case: &Case, seed: u64) -> Result<Vec<Tensor>> {
    let mut rng = Rng::named(seed, "off corners");
    let off = |(storage, spec): (Tensor, &crate::case::InputSpec)| {
        if !spec.dtype.is_float() {
            return Ok(storage);
        }
        let mut x = to_arr(&storage)?;
        let far = AWAY * largest(&x);
        for x in &mut x.data {
            let by = far * rng.range(0.5, 1.0);
            // a positive number stays one
            *x += if *x < 0.0 { -by } else { by };
        }
        to_tensor(&x, DType::F64)
    };
    case.storages(seed)?.into_iter().zip(&case.inputs).map(off).collect()
}

/// Σ y·w and Σ |y·w|; `None` where it is no number.
fn loss(case: &Case, storages: &[Tensor]) -> Result<Option<Acc>> {
    let leaves: Vec<LazyTensor> = case.views(storages)?.iter().map(LazyTensor::from).collect();
    let y = to_arr(&lazy::record_case(case, &leaves)?.eval()?)?;
    let mut sum = Acc::default();
    for (y, w) in y.data.iter().zip(weights(&y.dims, y.data.len()).data) {
        sum.add_product(*y, w);
    }
    Ok(sum.value().is_finite().then_some(sum))
}

/// The slope of the loss along direction `d` of input `i`, how far off it may be (how far the differences of two steps are apart, and the
/// corners within a step), and the terms of the loss, which is `here` at the storages.
fn slope(case: &Case, storages: &[Tensor], here: &Acc, i: usize, d: &Arr) -> Result<Option<(f64, f64, f64)>> {
    let x = to_arr(&storages[i])?;
    let step = STEP * largest(&x);
    let at = |by: f64| -> Result<Option<Acc>> {
        let mut there = storages.to_vec();
        let data = x.data.iter().zip(&d.data).map(|(x, d)| x + by * d).collect();
        there[i] = to_tensor(&Arr { dims: x.dims.clone(), data }, DType::F64)?;
        loss(case, &there)
    };
    // the slope between both sides, and by how much the slopes of the two sides differ
    let difference = |h: f64| -> Result<Option<(f64, f64, f64)>> {
        let (Some(above), Some(below)) = (at(h)?, at(-h)?) else {
            return Ok(None);
        };
        let (up, down) = (above.value() - here.value(), here.value() - below.value());
        Ok(Some(((up + down) / (2.0 * h), (up - down) / h, above.magnitude().max(below.magnitude()))))
    };
    let (Some((coarse, bend, terms)), Some((fine, half_bend, _))) = (difference(step)?, difference(step / 2.0)?) else {
        return Ok(None);
    };
    // the bend of a smooth function halves with the step, that of a corner stays
    let corner = (2.0 * half_bend - bend).abs();
    // a loss that is rounded moves by as much
    let rounding = f64::EPSILON * terms / step;
    Ok(Some(((4.0 * fine - coarse) / 3.0, (fine - coarse).abs() + corner + 16.0 * rounding, terms)))
}

/// Why a gradient is not the slope by design.
fn no_slope(case: &Case) -> Option<&'static str> {
    let ties = case.inputs.iter().any(|i| i.layout == Layout::Broadcast && i.layout_applies());
    match case.op {
        Op::Detach | Op::Barrier => Some("the gradient ends there"),
        Op::Reduce { op: ReduceOp::Max | ReduceOp::Min, .. } if ties => {
            Some("Candle gives each of several equal extremes the whole gradient, and so do we")
        }
        _ => None,
    }
}

/// What is wrong with the recorded gradients, if anything; `None` too where differences say nothing.
pub(super) fn disagreement(subject: &Subject) -> Result<Option<String>> {
    let case = &subject.case;
    if case.inputs.iter().any(|i| i.dtype.is_float() && i.dtype != DType::F64) || no_slope(case).is_some() {
        return Ok(None);
    }
    let storages = moved(case, subject.seed)?;
    let Some((gradients, dtype, _)) = recorded(case, &storages)? else {
        return Ok(None);
    };
    // a result in fewer digits moves in steps
    if dtype != DType::F64 {
        return Ok(None);
    }
    wrong(case, subject.seed, &storages, &gradients)
}

/// The first input of which the gradient is not the slope.
fn wrong(case: &Case, seed: u64, storages: &[Tensor], gradients: &Gradients) -> Result<Option<String>> {
    let Some(here) = loss(case, storages)? else {
        return Ok(None);
    };
    let mut rng = Rng::named(seed, "directions");
    for (i, spec) in case.inputs.iter().enumerate().filter(|(_, spec)| spec.is_tracked()) {
        let dims = spec.storage_dims();
        let data = (0..dims.iter().product()).map(|_| rng.range(-1.0, 1.0)).collect();
        let d = Arr { dims, data };
        let Some((slope, apart, terms)) = slope(case, storages, &here, i, &d)? else {
            continue;
        };
        let mut along = Acc::default();
        if let Some(g) = &gradients[i] {
            to_arr(g)?.data.iter().zip(&d.data).for_each(|(&g, &d)| along.add_product(g, d));
        }
        let scale = along.magnitude() + terms;
        if apart > SMOOTH * scale {
            continue;
        }
        let off = (slope - along.value()).abs();
        if off.is_nan() || off > ALLOWED * scale + apart + NOTHING {
            return Ok(Some(format!(
                "along a direction of input {i} the gradient is {:e}, by finite differences {slope:e} (of terms of {scale:e})",
                along.value()
            )));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    // A test's own set-up that fails is a failed test.
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::case::{Domain, InputSpec};

    #[test]
    fn a_gradient_that_is_not_the_slope_is_caught() {
        let x = InputSpec::new(&[3, 5], DType::F64, Layout::Transposed, Domain::Any);
        let case = Case::new(Op::Softmax { dim: 1 }, &[], vec![x]);
        let subject = Subject::new(case.clone(), 1).unwrap();
        assert_eq!(disagreement(&subject).unwrap(), None);
        let storages = moved(&case, 1).unwrap();
        let (right, ..) = recorded(&case, &storages).unwrap().unwrap();
        assert_eq!(wrong(&case, 1, &storages, &right).unwrap(), None);
        // all of it a thousandth too large, and one element a tenth
        let larger = right[0].as_ref().map(|g| (g * 1.001).unwrap());
        assert!(wrong(&case, 1, &storages, &vec![larger]).unwrap().is_some());
        let mut one = to_arr(right[0].as_ref().unwrap()).unwrap();
        one.data[7] += 0.1;
        assert!(wrong(&case, 1, &storages, &vec![Some(to_tensor(&one, DType::F64).unwrap())]).unwrap().is_some());
        assert!(wrong(&case, 1, &storages, &vec![None]).unwrap().is_some());
    }

    #[test]
    fn numbers_are_moved_off_corners_and_ties() {
        let x = InputSpec::new(&[400], DType::F64, Layout::Contiguous, Domain::Any);
        let case = Case::new(Op::Affine, &[1.0, 0.0], vec![x]);
        let x = to_arr(&moved(&case, 1).unwrap()[0]).unwrap();
        let far = 0.4 * AWAY * x.max_abs();
        assert!(x.data.iter().all(|x| x.abs() > far && STEP * 3.0 < far), "{:?}", x.data);
        let mut sorted = x.data.clone();
        sorted.sort_by(f64::total_cmp);
        assert!(sorted.windows(2).all(|pair| pair[0] < pair[1]));
    }
}
