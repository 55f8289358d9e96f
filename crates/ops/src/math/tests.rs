//! Dense sweeps of the f32 functions against f64.

use super::Real;

/// Distance in units of the last place of the true value.
fn ulps(got: f32, want: f64) -> f64 {
    if want.is_nan() {
        return if got.is_nan() { 0.0 } else { f64::INFINITY };
    }
    if want.abs() > f32::MAX as f64 * (1.0 + 1e-7) {
        let same = got.is_infinite() && (got > 0.0) == (want > 0.0);
        return if same { 0.0 } else { f64::INFINITY };
    }
    if !got.is_finite() {
        return f64::INFINITY;
    }
    let e = if want == 0.0 { -149 } else { (want.abs().log2().floor() as i32 - 23).max(-149) };
    (got as f64 - want).abs() / 2f64.powi(e)
}

/// The largest error of `f` over all f32 in steps of `step` bit patterns, both signs.
fn worst(f: fn(f32) -> f32, truth: fn(f64) -> f64, step: usize) -> (f64, f32) {
    let mut worst = (0.0, 0.0);
    for bits in (0..0x7f80_0000u32).step_by(step) {
        for sign in [0, 0x8000_0000] {
            let x = f32::from_bits(bits | sign);
            let e = ulps(f(x), truth(x as f64));
            if e > worst.0 {
                worst = (e, x);
            }
        }
    }
    worst
}

/// The same over evenly spaced arguments.
fn worst_in(f: fn(f32) -> f32, truth: fn(f64) -> f64, from: f64, to: f64) -> (f64, f32) {
    let n = 400_000;
    let mut worst = (0.0, 0.0);
    for i in 0..=n {
        let x = (from + (to - from) * i as f64 / n as f64) as f32;
        let e = ulps(f(x), truth(x as f64));
        if e > worst.0 {
            worst = (e, x);
        }
    }
    worst
}

fn check(name: &str, (e, x): (f64, f32), limit: f64) {
    assert!(e <= limit, "{name}({x:e}) is off by {e} ulp");
}

#[test]
fn exp_is_within_1_1_ulps_everywhere() {
    check("exp", worst(<f32 as Real>::exp::<false>, f64::exp, 2039), 1.1);
    check("exp", worst(<f32 as Real>::exp::<true>, f64::exp, 2039), 1.1);
    check("exp", worst_in(<f32 as Real>::exp::<false>, f64::exp, -104.5, 89.5), 1.1);
    check("exp", worst_in(<f32 as Real>::exp::<true>, f64::exp, -104.5, 89.5), 1.1);
    check("exp", worst_in(<f32 as Real>::exp::<false>, f64::exp, -1.0, 1.0), 1.1);
    check("exp", worst_in(<f32 as Real>::exp::<true>, f64::exp, -1.0, 1.0), 1.1);
}

#[test]
fn log_is_within_two_ulps_everywhere() {
    check("log", worst(<f32 as Real>::log::<false>, f64::ln, 2039), 2.0);
    check("log", worst(<f32 as Real>::log::<true>, f64::ln, 2039), 2.0);
    check("log", worst_in(<f32 as Real>::log::<false>, f64::ln, 0.5, 2.0), 2.0);
    check("log", worst_in(<f32 as Real>::log::<true>, f64::ln, 0.5, 2.0), 2.0);
}

#[test]
fn tanh_is_within_two_ulps_everywhere() {
    check("tanh", worst(<f32 as Real>::tanh::<false>, f64::tanh, 2039), 2.0);
    check("tanh", worst(<f32 as Real>::tanh::<true>, f64::tanh, 2039), 2.0);
    check("tanh", worst_in(<f32 as Real>::tanh::<false>, f64::tanh, -10.0, 10.0), 2.0);
    check("tanh", worst_in(<f32 as Real>::tanh::<true>, f64::tanh, -10.0, 10.0), 2.0);
}

#[test]
fn erf_is_within_two_ulps_everywhere() {
    check("erf", worst(<f32 as Real>::erf::<false>, libm::erf, 2039), 2.0);
    check("erf", worst(<f32 as Real>::erf::<true>, libm::erf, 2039), 2.0);
    check("erf", worst_in(<f32 as Real>::erf::<false>, libm::erf, -4.5, 4.5), 2.0);
    check("erf", worst_in(<f32 as Real>::erf::<true>, libm::erf, -4.5, 4.5), 2.0);
}

#[test]
fn sigmoid_and_silu_follow_exp() {
    let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
    check("sigmoid", worst_in(<f32 as Real>::sigmoid::<false>, sigmoid, -80.0, 30.0), 4.0);
    check("sigmoid", worst_in(<f32 as Real>::sigmoid::<true>, sigmoid, -80.0, 30.0), 4.0);
    let silu = |x: f64| x / (1.0 + (-x).exp());
    check("silu", worst_in(<f32 as Real>::silu::<false>, silu, -80.0, 30.0), 4.0);
    check("silu", worst_in(<f32 as Real>::silu::<true>, silu, -80.0, 30.0), 4.0);
}

#[test]
fn special_values_come_out_right() {
    special_values::<false>();
    special_values::<true>();
}

fn special_values<const FMA: bool>() {
    let (inf, nan) = (f32::INFINITY, f32::NAN);
    let exp = <f32 as Real>::exp::<FMA>;
    assert_eq!(exp(inf), inf);
    assert_eq!(exp(-inf), 0.0);
    assert!(exp(nan).is_nan());
    assert_eq!(exp(0.0), 1.0);
    assert_eq!(exp(-0.0), 1.0);
    assert_eq!(exp(1e30), inf);
    assert_eq!(exp(-1e30), 0.0);
    assert!(exp(-103.0) > 0.0, "subnormal results are kept");
    let log = <f32 as Real>::log::<FMA>;
    assert_eq!(log(0.0), -inf);
    assert_eq!(log(-0.0), -inf);
    assert_eq!(log(1.0), 0.0);
    assert_eq!(log(inf), inf);
    assert!(log(-1.0).is_nan() && log(-inf).is_nan() && log(nan).is_nan());
    let tanh = <f32 as Real>::tanh::<FMA>;
    assert_eq!((tanh(inf), tanh(-inf), tanh(0.0)), (1.0, -1.0, 0.0));
    assert!(tanh(nan).is_nan());
    assert!(tanh(-0.0).is_sign_negative());
    let erf = <f32 as Real>::erf::<FMA>;
    assert_eq!((erf(inf), erf(-inf), erf(0.0)), (1.0, -1.0, 0.0));
    assert!(erf(nan).is_nan());
    assert!(erf(-0.0).is_sign_negative());
    assert_eq!(<f32 as Real>::sigmoid::<FMA>(-inf), 0.0);
    assert_eq!(<f32 as Real>::sigmoid::<FMA>(inf), 1.0);
    assert!(<f32 as Real>::silu::<FMA>(-inf).is_nan(), "as Candle's");
}

#[test]
fn a_loop_gives_each_element_the_bits_of_a_single_call() {
    bits_of_a_loop::<false>();
    bits_of_a_loop::<true>();
}

fn bits_of_a_loop<const FMA: bool>() {
    let x: Vec<f32> = (0..1003).map(|i| (i as f32 - 500.0) * 0.173).collect();
    for f in [
        <f32 as Real>::exp::<FMA>,
        <f32 as Real>::log::<FMA>,
        <f32 as Real>::tanh::<FMA>,
        <f32 as Real>::erf::<FMA>,
        <f32 as Real>::gelu::<FMA>,
    ] {
        let all: Vec<u32> = x.iter().map(|&v| f(v).to_bits()).collect();
        for (i, &v) in x.iter().enumerate() {
            let one = std::hint::black_box(f(std::hint::black_box(v))).to_bits();
            assert!(one == all[i] || f(v).is_nan(), "element {i}");
        }
    }
}

#[test]
fn f64_functions_are_the_platforms() {
    for x in [-3.0, -0.5, 0.0, 0.7, 12.0f64] {
        assert_eq!(<f64 as Real>::exp::<false>(x), x.exp());
        assert_eq!(<f64 as Real>::tanh::<false>(x), x.tanh());
        assert_eq!(<f64 as Real>::erf::<false>(x), libm::erf(x));
    }
}

#[test]
fn softcap_rounds_once() {
    for (slope, cap) in [(0.375 / 4.0, 4.0), (1.0, 1.0), (0.125 / 50.0, 50.0)] {
        let mut worst = (0.0, 0.0);
        for i in -200_000..=200_000 {
            // dense around zero and up to where every cap is reached
            let x = (i as f64 / 200_000.0).powi(3) as f32 * 2000.0;
            let e = ulps(Real::softcap(x, slope, cap), cap * (f64::from(x) * slope).tanh());
            if e > worst.0 {
                worst = (e, x);
            }
        }
        check("softcap", worst, 0.51);
    }
    assert_eq!(Real::softcap(f32::INFINITY, 1.0, 3.0), 3.0);
    assert_eq!(Real::softcap(f32::NEG_INFINITY, 1.0, 3.0), -3.0);
    assert!(Real::is_nan(Real::softcap(f32::NAN, 1.0, 3.0)));
    assert_eq!(Real::softcap(-0.0f32, 1.0, 3.0).to_bits(), (-0.0f32).to_bits());
}
