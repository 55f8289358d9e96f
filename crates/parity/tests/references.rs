//! The references against numbers worked out by hand.

// A test's own set-up that fails is a failed test.
#![allow(clippy::unwrap_used)]

use candle_lazy_parity::reference::*;

fn arr(dims: &[usize], data: &[f64]) -> Arr {
    Arr::new(dims, data.to_vec()).unwrap()
}

fn near(got: &[f64], want: &[f64]) {
    assert_eq!(got.len(), want.len());
    for (g, w) in got.iter().zip(want) {
        assert!((g - w).abs() <= 1e-12 * (1.0 + w.abs()), "{got:?} {want:?}");
    }
}

#[test]
fn sums_keep_what_a_plain_sum_loses() {
    let x = arr(&[4], &[1.0, 1e100, 1.0, -1e100]);
    let sum = reduce(Reduction::Sum, &x, 1, false).unwrap();
    assert_eq!(sum.value.data, [2.0]);
    assert_eq!(sum.value.dims, [0usize; 0]);
    assert_eq!(sum.magnitude.data, [2e100]);
}

#[test]
fn reductions_over_any_dims() {
    let x = arr(&[2, 3], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
    assert_eq!(reduce(Reduction::Sum, &x, 0b01, true).unwrap().value, arr(&[1, 3], &[5.0, 7.0, 9.0]));
    assert_eq!(reduce(Reduction::Mean, &x, 0b10, false).unwrap().value, arr(&[2], &[2.0, 5.0]));
    assert_eq!(reduce(Reduction::Max, &x, 0b11, false).unwrap().value, arr(&[], &[6.0]));
    assert_eq!(reduce(Reduction::Min, &x, 0b10, true).unwrap().value, arr(&[2, 1], &[1.0, 4.0]));
    let empty = arr(&[0, 2], &[]);
    assert_eq!(reduce(Reduction::Sum, &empty, 0b01, false).unwrap().value, arr(&[2], &[0.0, 0.0]));
    assert!(reduce(Reduction::Max, &empty, 0b01, false).is_err());
}

#[test]
fn products_with_broadcast_batches() {
    let a = arr(&[2, 1, 2], &[1.0, 2.0, 3.0, 4.0]);
    let b = arr(&[2, 2], &[5.0, 6.0, 7.0, 8.0]);
    let got = matmul(&a, &b).unwrap();
    assert_eq!(got.value, arr(&[2, 1, 2], &[19.0, 22.0, 43.0, 50.0]));
    assert!(matmul(&a, &arr(&[3, 1], &[1.0; 3])).is_err());
    let w = arr(&[1, 2], &[10.0, -1.0]);
    let got = linear(&a, &w, Some(&arr(&[1], &[0.5]))).unwrap();
    assert_eq!(got.value, arr(&[2, 1, 1], &[8.5, 26.5]));
    assert_eq!(got.magnitude.data, [12.5, 34.5]);
}

#[test]
fn lora_is_two_products() {
    let x = arr(&[1, 2], &[1.0, 2.0]);
    let (a, b) = (arr(&[2, 1], &[3.0, 4.0]), arr(&[1, 2], &[5.0, -6.0]));
    assert_eq!(lora(&x, &a, &b, 2.0, None).unwrap().value.data, [110.0, -132.0]);
    let base = arr(&[1, 2], &[1.0, 1.0]);
    assert_eq!(lora(&x, &a, &b, 2.0, Some(&base)).unwrap().value.data, [111.0, -131.0]);
}

#[test]
fn softmax_over_any_dim() {
    let ln = |x: f64| x.ln();
    let x = arr(&[2, 2], &[ln(1.0), ln(2.0), ln(3.0), ln(6.0)]);
    near(&softmax(&x, 1).data, &[1.0 / 3.0, 2.0 / 3.0, 1.0 / 3.0, 2.0 / 3.0]);
    near(&softmax(&x, 0).data, &[0.25, 0.25, 0.75, 0.75]);
    near(&log_softmax(&x, 0).data, &[ln(0.25), ln(0.25), ln(0.75), ln(0.75)]);
}

#[test]
fn norms() {
    let x = arr(&[1, 2], &[3.0, 4.0]);
    // √((9 + 16)/2) = 5/√2
    near(&rms_norm(&x, None, 0.0).unwrap().data, &[3.0 * 2f64.sqrt() / 5.0, 4.0 * 2f64.sqrt() / 5.0]);
    let (w, b) = (arr(&[2], &[2.0, 3.0]), arr(&[2], &[1.0, -1.0]));
    near(&layer_norm(&x, Some(&w), Some(&b), 0.0).unwrap().value.data, &[-1.0, 2.0]);
    near(&layer_norm(&x, None, Some(&b), 0.0).unwrap().value.data, &[0.0, 0.0]);
}

#[test]
fn rotary_embedding_turns_pairs() {
    // a quarter turn: (u, v) becomes (−v, u)
    let x = arr(&[1, 1, 1, 4], &[1.0, 2.0, 3.0, 4.0]);
    let (cos, sin) = (arr(&[1, 2], &[0.0, 0.0]), arr(&[1, 2], &[1.0, 1.0]));
    assert_eq!(rope(&x, &cos, &sin, false).unwrap().value.data, [-3.0, -4.0, 1.0, 2.0]);
    assert_eq!(rope(&x, &cos, &sin, true).unwrap().value.data, [-2.0, 1.0, -4.0, 3.0]);
}

#[test]
fn a_causal_mask_aligns_at_the_end() {
    let inf = f64::NEG_INFINITY;
    assert_eq!(causal_mask(2, 3, None).data, [0.0, 0.0, inf, 0.0, 0.0, 0.0]);
    assert_eq!(causal_mask(2, 3, Some(2)).data, [0.0, 0.0, inf, inf, 0.0, 0.0]);
}

#[test]
fn attention_of_equal_scores_is_the_mean_of_what_is_seen() {
    let spec = AttentionSpec { scale: 1.0, causal: true, softcap: None, window: None };
    let q = arr(&[1, 2, 2, 1], &[0.0; 4]);
    let k = arr(&[1, 1, 2, 1], &[1.0, 2.0]);
    let v = arr(&[1, 1, 2, 1], &[10.0, 20.0]);
    // both heads share the one key head
    near(&attention(&q, &k, &v, None, &spec).unwrap().value.data, &[10.0, 15.0, 10.0, 15.0]);
    let mask = arr(&[1, 1, 1, 2], &[f64::NEG_INFINITY, 0.0]);
    let open = AttentionSpec { causal: false, ..spec };
    near(&attention(&q, &k, &v, Some(&mask), &open).unwrap().value.data, &[20.0; 4]);
    // scores 1 and 2, capped: cap·tanh(score/cap) → weights of e^0.5·tanh…
    let q = arr(&[1, 1, 1, 1], &[1.0]);
    let capped = AttentionSpec { softcap: Some(0.5), ..open };
    let (a, b) = ((0.5 * 2f64.tanh()).exp(), (0.5 * 4f64.tanh()).exp());
    near(&attention(&q, &k, &v, None, &capped).unwrap().value.data, &[(10.0 * a + 20.0 * b) / (a + b)]);
}

#[test]
fn gradients_of_rows() {
    // y = (¼, ¾), g = (1, 0): Σ g·y = ¼, so y·(g − ¼) = (3/16, −3/16)
    let x = arr(&[1, 2], &[0.0, 3f64.ln()]);
    let g = arr(&[1, 2], &[1.0, 0.0]);
    near(&softmax_gradient(&x, &g, 1).data, &[3.0 / 16.0, -3.0 / 16.0]);
    near(&log_softmax_gradient(&x, &g, 1).data, &[0.75, -0.75]);
    near(&cross_entropy_gradient(&x, &arr(&[1], &[1.0]), 2.0).data, &[0.5, -0.5]);
    // a row of two is ±1 whatever it holds: without eps its gradient is zero
    let shape = NormShape { width: 2, channels: 2, behind: 1, centred: true, eps: 0.0 };
    let (w, x) = (arr(&[2], &[2.0, 5.0]), arr(&[1, 2], &[1.0, 3.0]));
    let [dx, dw, db] = norm_gradient(&x, Some(&w), &g, shape);
    near(&dx.data, &[0.0, 0.0]);
    near(&dw.data, &[-1.0, 0.0]);
    near(&db.data, &[1.0, 0.0]);
    // x/√(mean x²) at (3, 4): inv = √2/5, x̂ = (3, 4)·inv, mean(g·x̂) = 3·inv/2
    let inv = 2f64.sqrt() / 5.0;
    let shape = NormShape { centred: false, ..shape };
    let [dx, ..] = norm_gradient(&arr(&[1, 2], &[3.0, 4.0]), None, &g, shape);
    near(&dx.data, &[inv * (1.0 - 4.5 * inv * inv), -6.0 * inv * inv * inv]);
}

#[test]
fn gradients_of_reductions_and_powers_by_hand() {
    // (1, 3 | 5, 9) by columns: means 3 and 6, so ∓2·2/(2 − 1) and ∓3·2, times g
    let x = arr(&[2, 2], &[1.0, 3.0, 5.0, 9.0]);
    near(&variance_gradient(&x, &arr(&[2], &[1.0, 0.5]), 0b01).data, &[-4.0, -3.0, 4.0, 3.0]);
    near(&variance_gradient(&x, &arr(&[2], &[1.0, 0.5]), 0b10).data, &[-2.0, 2.0, -2.0, 2.0]);
    // 2³ and 4³ with a shared exponent: 3·2², 3·4²; 8·ln 2 + 64·ln 4, g = 1 and ½
    let [da, db] = power_gradient(&arr(&[2], &[2.0, 4.0]), &arr(&[1], &[3.0]), &arr(&[2], &[1.0, 0.5]));
    near(&da.data, &[12.0, 24.0]);
    near(&db.data, &[8.0 * 2f64.ln() + 32.0 * 4f64.ln()]);
}

#[test]
fn data_moves() {
    let x = arr(&[2, 3], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
    assert_eq!(permute(&x, &[1, 0]), arr(&[3, 2], &[1.0, 4.0, 2.0, 5.0, 3.0, 6.0]));
    assert_eq!(narrow(&x, 1, 1, 2), arr(&[2, 2], &[2.0, 3.0, 5.0, 6.0]));
    assert_eq!(broadcast(&arr(&[2, 1], &[7.0, 8.0]), &[2, 2]), arr(&[2, 2], &[7.0, 7.0, 8.0, 8.0]));
    assert_eq!(concat(&[&x, &arr(&[2, 1], &[0.0, 9.0])], 1).unwrap().data, [1.0, 2.0, 3.0, 0.0, 4.0, 5.0, 6.0, 9.0]);
    assert_eq!(index_select(&x, &arr(&[2], &[2.0, 0.0]), 1).unwrap(), arr(&[2, 2], &[3.0, 1.0, 6.0, 4.0]));
    assert!(index_select(&x, &arr(&[1], &[3.0]), 1).is_err());
    assert_eq!(embedding(&x, &arr(&[1, 1], &[1.0])).unwrap(), arr(&[1, 1, 3], &[4.0, 5.0, 6.0]));
    let written = slice_assign(&x, &arr(&[2, 1], &[0.0, 0.0]), 1, 2);
    assert_eq!(written.data, [1.0, 2.0, 0.0, 4.0, 5.0, 0.0]);
    assert!(reshape(&x, &[4]).is_err());
}

#[test]
fn elementwise_functions_at_known_points() {
    let at = |f, x: f64| unary(f, &arr(&[1], &[x])).data[0];
    assert_eq!(at(Unary::Round, -2.5), -3.0);
    assert_eq!(at(Unary::Sign, -0.1), -1.0);
    assert_eq!(at(Unary::Rsqrt, 4.0), 0.5);
    // tables of the error function: erf(1) = 0.842700792949715
    near(&[at(Unary::Erf, 1.0)], &[0.842_700_792_949_715]);
    near(&[at(Unary::GeluErf, 2f64.sqrt())], &[2f64.sqrt() * (1.0 + 0.842_700_792_949_715) / 2.0]);
    near(&[at(Unary::Sigmoid, 3f64.ln())], &[0.75]);
    near(&[at(Unary::Silu, 3f64.ln())], &[0.75 * 3f64.ln()]);
    let y = (2.0 / std::f64::consts::PI).sqrt() * 1.044715;
    near(&[at(Unary::Gelu, 1.0)], &[0.5 * (1.0 + y.tanh())]);
    // in the far tail x/2·(1 + erf) would cancel to 0
    assert!(at(Unary::GeluErf, -9.0) < 0.0);
    let (a, b) = (arr(&[2, 1], &[1.0, 5.0]), arr(&[2], &[2.0, 3.0]));
    assert_eq!(binary(Binary::Sub, &a, &b).unwrap(), arr(&[2, 2], &[-1.0, -2.0, 3.0, 2.0]));
    assert_eq!(compare(Compare::Le, &a, &b).unwrap().data, [1.0, 1.0, 0.0, 0.0]);
    assert_eq!(select(&arr(&[1], &[1.0]), &a, &b).unwrap().data, [1.0, 1.0, 5.0, 5.0]);
    assert!(binary(Binary::Add, &arr(&[3], &[0.0; 3]), &b).is_err());
}

#[test]
fn gated_units() {
    let (gate, up) = (arr(&[1], &[3f64.ln()]), arr(&[1], &[4.0]));
    near(&glu(Unary::Silu, &gate, &up).data, &[3.0 * 3f64.ln()]);
    assert_eq!(glu(Unary::Relu, &arr(&[1], &[-1.0]), &up).data, [0.0]);
}
