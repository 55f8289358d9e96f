//! Sampling: strategies against probabilities by hand, the penalty, the words of errors.
#![allow(clippy::unwrap_used, clippy::panic)] // tests fail so, outside of their own functions too

use candle_core::{DType, Device, Tensor};
use candle_lazy_compat as metal_candle;
use metal_candle::error::{Error, InferenceError};
use metal_candle::inference::{sample_token_with_metadata, StreamToken};
use metal_candle::{apply_repetition_penalty, sample_token, SamplingStrategy};

fn logits(values: &[f32]) -> Tensor {
    Tensor::new(values, &Device::Cpu).unwrap()
}

fn greedy(values: &[f32]) -> u32 {
    sample_token(&logits(values), &SamplingStrategy::Greedy, &[], 1.0).unwrap()
}

/// How often each of four tokens comes in 4000 draws from the probabilities 0.1, 0.4, 0.2 and 0.3.
fn shares(strategy: &SamplingStrategy) -> [f64; 4] {
    let logits = logits(&[0.1f64, 0.4, 0.2, 0.3].map(|p| p.ln() as f32));
    let mut counts = [0.0; 4];
    for _ in 0..4000 {
        counts[sample_token(&logits, strategy, &[], 1.0).unwrap() as usize] += 1.0;
    }
    counts.map(|count| count / 4000.0)
}

/// Six standard deviations of a share.
#[track_caller]
fn assert_shares(got: [f64; 4], want: [f64; 4]) {
    for (g, p) in got.into_iter().zip(want) {
        assert!((g - p).abs() <= 6.0 * (p * (1.0 - p) / 4000.0).sqrt(), "{got:?} against {want:?}");
    }
}

#[track_caller]
fn invalid<T: std::fmt::Debug>(result: metal_candle::Result<T>, words: &str) {
    let error = result.unwrap_err();
    assert!(matches!(error, Error::Inference(InferenceError::InvalidSampling { .. })), "{error:?}");
    assert!(error.to_string().contains("invalid sampling parameters") && error.to_string().contains(words), "{error}");
}

#[track_caller]
fn unusable<T: std::fmt::Debug>(result: metal_candle::Result<T>, words: &str) {
    let error = result.unwrap_err();
    assert!(matches!(error, Error::Inference(InferenceError::SamplingError { .. })), "{error:?}");
    assert!(error.to_string().contains("sampling error") && error.to_string().contains(words), "{error}");
}

#[test]
fn greedy_takes_the_last_of_the_largest() {
    assert_eq!(greedy(&[1.0, 5.0, 3.0]), 1);
    assert_eq!(greedy(&[1.0, 5.0, 5.0, 3.0]), 2);
    assert_eq!(greedy(&[0.0; 4]), 3);
    assert_eq!(greedy(&[-2.0, -1.0, f32::NEG_INFINITY]), 1);
    assert!(matches!(SamplingStrategy::default(), SamplingStrategy::Greedy));
}

#[test]
fn strategies_draw_by_their_probabilities() {
    assert_shares(shares(&SamplingStrategy::TopK { k: 2 }), [0.0, 4.0 / 7.0, 0.0, 3.0 / 7.0]);
    assert_shares(shares(&SamplingStrategy::TopK { k: 99 }), [0.1, 0.4, 0.2, 0.3]);
    assert_shares(shares(&SamplingStrategy::TopK { k: 1 }), [0.0, 1.0, 0.0, 0.0]);
    assert_shares(shares(&SamplingStrategy::TopP { p: 0.5 }), [0.0, 4.0 / 7.0, 0.0, 3.0 / 7.0]);
    assert_shares(shares(&SamplingStrategy::TopP { p: 0.0 }), [0.0, 1.0, 0.0, 0.0]);
    assert_shares(shares(&SamplingStrategy::TopP { p: 1.0 }), [0.1, 0.4, 0.2, 0.3]);
    assert_shares(shares(&SamplingStrategy::Temperature { temperature: 1.0 }), [0.1, 0.4, 0.2, 0.3]);
    // a temperature of ½ squares: 1, 16, 4 and 9 of 30
    let squared = [1.0, 16.0, 4.0, 9.0].map(|n| n / 30.0);
    assert_shares(shares(&SamplingStrategy::Temperature { temperature: 0.5 }), squared);
    assert_shares(shares(&SamplingStrategy::Temperature { temperature: 0.0 }), [0.0, 1.0, 0.0, 0.0]);
}

#[test]
fn the_penalty_divides_positive_logits_and_multiplies_negative_ones_once_per_id() {
    let mut x = logits(&[4.0, -1.0, 0.0, 2.0]);
    apply_repetition_penalty(&mut x, &[0, 1, 2, 0, 0, 77], 2.0).unwrap();
    assert_eq!(x.to_vec1::<f32>().unwrap(), [2.0, -2.0, 0.0, 2.0]);
    for penalty in [1.0, 1.0 + 5e-8] {
        apply_repetition_penalty(&mut x, &[0, 1], penalty).unwrap();
    }
    apply_repetition_penalty(&mut x, &[], 3.0).unwrap();
    assert_eq!(x.to_vec1::<f32>().unwrap(), [2.0, -2.0, 0.0, 2.0]);
    apply_repetition_penalty(&mut x, &[0, 1], 0.5).unwrap();
    assert_eq!(x.to_vec1::<f32>().unwrap(), [4.0, -1.0, 0.0, 2.0]);
    // 4/3 and 2 stay in order, 4/1.5 and 3 do not
    let x = logits(&[4.0, 3.0]);
    assert_eq!(sample_token(&x, &SamplingStrategy::Greedy, &[0], 1.2).unwrap(), 0);
    assert_eq!(sample_token(&x, &SamplingStrategy::Greedy, &[0], 1.5).unwrap(), 1);
    // a negative logit is not raised
    let x = logits(&[-1.0, -1.5]);
    assert_eq!(sample_token(&x, &SamplingStrategy::Greedy, &[1], 2.0).unwrap(), 0);
    for penalty in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        invalid(sample_token(&x, &SamplingStrategy::Greedy, &[0], penalty), "repetition penalty");
        invalid(apply_repetition_penalty(&mut x.clone(), &[], penalty), "repetition penalty");
    }
}

#[test]
fn other_dtypes_are_converted_and_stay() {
    for dtype in [DType::F16, DType::BF16, DType::F64] {
        let mut x = logits(&[1.0, 4.0, 2.0]).to_dtype(dtype).unwrap();
        assert_eq!(sample_token(&x, &SamplingStrategy::Greedy, &[], 1.0).unwrap(), 1);
        apply_repetition_penalty(&mut x, &[1], 4.0).unwrap();
        assert_eq!(x.dtype(), dtype);
        assert_eq!(x.to_dtype(DType::F32).unwrap().to_vec1::<f32>().unwrap(), [1.0, 1.0, 2.0]);
    }
}

#[test]
fn a_token_is_described_by_the_whole_vocabulary() {
    let x = logits(&[0.1f64, 0.4, 0.2, 0.3].map(|p| p.ln() as f32));
    let token = sample_token_with_metadata(&x, &SamplingStrategy::TopK { k: 1 }, &[], 1.0, Some(1)).unwrap();
    assert_eq!((token.token_id, token.text.clone(), token.is_eos), (1, None, true));
    // neither k nor a temperature changes the probability
    assert!((token.probability - 0.4).abs() < 1e-6 && token.logit == 0.4f64.ln() as f32);
    let cold = SamplingStrategy::Temperature { temperature: 1e-3 };
    let again = sample_token_with_metadata(&x, &cold, &[], 1.0, Some(2)).unwrap();
    assert_eq!(again, StreamToken { is_eos: false, ..token });
    // the penalty does: ln 0.4 doubled is the logarithm of 0.16, of 0.1 + 0.16 + 0.2 + 0.3 in all
    let token = sample_token_with_metadata(&x, &SamplingStrategy::Greedy, &[1], 2.0, None).unwrap();
    assert_eq!((token.token_id, token.is_eos), (3, false));
    assert!((f64::from(token.probability) - 0.3 / 0.76).abs() < 1e-6, "{token:?}");
    let all_the_way = logits(&[f32::NEG_INFINITY; 2]);
    unusable(sample_token_with_metadata(&all_the_way, &SamplingStrategy::Greedy, &[], 1.0, None), "every logit is −∞");
}

#[test]
fn what_means_nothing_is_an_error() {
    let x = logits(&[1.0, 2.0]);
    let all = [
        (SamplingStrategy::TopK { k: 0 }, "top-k of 0"),
        (SamplingStrategy::TopP { p: -0.1 }, "top-p of -0.1"),
        (SamplingStrategy::TopP { p: 1.5 }, "top-p of 1.5"),
        (SamplingStrategy::TopP { p: f64::NAN }, "top-p of NaN"),
        (SamplingStrategy::Temperature { temperature: -1.0 }, "temperature of -1"),
        (SamplingStrategy::Temperature { temperature: f64::NAN }, "temperature of NaN"),
        (SamplingStrategy::Temperature { temperature: f64::INFINITY }, "temperature of inf"),
    ];
    for (strategy, words) in all {
        invalid(sample_token(&x, &strategy, &[], 1.0), words);
        invalid(sample_token_with_metadata(&x, &strategy, &[], 1.0, None), words);
    }
}

#[test]
fn logits_that_cannot_be_used_are_errors() {
    let strategies = [
        SamplingStrategy::Greedy,
        SamplingStrategy::TopK { k: 1 },
        SamplingStrategy::TopP { p: 0.9 },
        SamplingStrategy::Temperature { temperature: 0.7 },
    ];
    for strategy in strategies {
        unusable(sample_token(&logits(&[1.0, f32::NAN, 0.0]), &strategy, &[], 1.0), "logit 1 of 3 is NaN");
        unusable(sample_token(&logits(&[]), &strategy, &[], 1.0), "there are no logits");
        let matrix = Tensor::zeros((1, 4), DType::F32, &Device::Cpu).unwrap();
        unusable(sample_token(&matrix, &strategy, &[], 1.0), "logits must be floats of shape (vocab), got [1, 4]");
        let whole = Tensor::zeros(4, DType::U32, &Device::Cpu).unwrap();
        unusable(sample_token(&whole, &strategy, &[], 1.0), "U32");
        unusable(apply_repetition_penalty(&mut matrix.clone(), &[0], 2.0), "[1, 4]");
    }
}
