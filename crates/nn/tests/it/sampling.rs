//! Sampling against its formulas in f64.

use crate::common::TestResult;
use candle_lazy_nn::sampling::{argmax, argmax_last, penalize_repetition, softmax, Sampler, SamplingOptions};
use candle_lazy_nn::Error;

/// Logits whose probabilities are 0.1, 0.4, 0.2 and 0.3.
fn logits() -> Vec<f32> {
    [0.1f64, 0.4, 0.2, 0.3].iter().map(|p| p.ln() as f32).collect()
}

fn options(temperature: f64, top_k: Option<usize>, top_p: Option<f64>) -> SamplingOptions {
    SamplingOptions { temperature, top_k, top_p }
}

#[track_caller]
fn assert_distribution(got: &[(u32, f64)], want: &[(u32, f64)]) {
    assert_eq!(got.len(), want.len(), "{got:?}");
    for (g, w) in got.iter().zip(want) {
        assert!(g.0 == w.0 && (g.1 - w.1).abs() < 1e-6, "{got:?} against {want:?}");
    }
}

#[track_caller]
fn message<T: std::fmt::Debug>(result: candle_lazy_nn::Result<T>) -> String {
    assert!(matches!(&result, Err(Error::Sampling { .. })), "{result:?}");
    match result {
        Err(Error::Sampling { message }) => message,
        _ => String::new(),
    }
}

#[test]
fn distributions_are_their_formulas() -> TestResult {
    let x = logits();
    assert_distribution(&options(1., None, None).distribution(&x)?, &[(1, 0.4), (3, 0.3), (2, 0.2), (0, 0.1)]);
    assert_distribution(&options(1., Some(2), None).distribution(&x)?, &[(1, 4. / 7.), (3, 3. / 7.)]);
    assert_distribution(&options(1., Some(9), None).distribution(&x)?, &[(1, 0.4), (3, 0.3), (2, 0.2), (0, 0.1)]);
    // 0.4 + 0.3 is the first sum that reaches 0.5, 0.4 alone reaches 0.35
    assert_distribution(&options(1., None, Some(0.5)).distribution(&x)?, &[(1, 4. / 7.), (3, 3. / 7.)]);
    assert_distribution(&options(1., None, Some(0.35)).distribution(&x)?, &[(1, 1.)]);
    assert_distribution(&options(1., None, Some(0.)).distribution(&x)?, &[(1, 1.)]);
    assert_distribution(&options(1., None, Some(0.95)).distribution(&x)?, &[(1, 0.4), (3, 0.3), (2, 0.2), (0, 0.1)]);
    // of the three best (4/9, 3/9, 2/9) two reach 0.75
    assert_distribution(&options(1., Some(3), Some(0.75)).distribution(&x)?, &[(1, 4. / 7.), (3, 3. / 7.)]);
    // a temperature of ½ squares the probabilities
    let sum = 0.16 + 0.09 + 0.04 + 0.01;
    let squared = [(1, 0.16 / sum), (3, 0.09 / sum), (2, 0.04 / sum), (0, 0.01 / sum)];
    assert_distribution(&options(0.5, None, None).distribution(&x)?, &squared);
    assert_distribution(&options(0.0, None, None).distribution(&x)?, &[(1, 1.)]);
    assert_distribution(&options(1e-300, None, None).distribution(&x)?[..1], &[(1, 1.)]);
    for (got, want) in softmax(&x)?.iter().zip([0.1, 0.4, 0.2, 0.3]) {
        assert!((got - want).abs() < 1e-6);
    }
    Ok(())
}

#[test]
fn equals_and_infinities() -> TestResult {
    assert_eq!((argmax(&[1., 3., 3., 2.])?, argmax_last(&[1., 3., 3., 2.])?), (1, 2));
    assert_eq!((argmax(&[f32::NEG_INFINITY; 2])?, argmax_last(&[f32::NEG_INFINITY; 2])?), (0, 1));
    assert_eq!(SamplingOptions::greedy().distribution(&[1., 3., 3.])?, [(1, 1.)]);
    assert_distribution(&options(1., Some(2), None).distribution(&[1.; 4])?, &[(0, 0.5), (1, 0.5)]);
    let infinite = [0., f32::INFINITY, f32::NEG_INFINITY, f32::INFINITY];
    assert_eq!(softmax(&infinite)?, [0., 0.5, 0., 0.5]);
    assert_distribution(&options(2., None, Some(0.9)).distribution(&infinite)?, &[(1, 0.5), (3, 0.5)]);
    Ok(())
}

#[test]
fn draws_follow_the_probabilities_and_the_seed() -> TestResult {
    let (x, all) = (logits(), SamplingOptions::default());
    let mut sampler = Sampler::seeded(7);
    let drawn: Vec<u32> = (0..10_000).map(|_| sampler.sample(&x, &all)).collect::<Result<_, _>>()?;
    for (token, p) in [0.1, 0.4, 0.2, 0.3].into_iter().enumerate() {
        let share = drawn.iter().filter(|&&t| t as usize == token).count() as f64 / 1e4;
        // five standard deviations of a binomial share
        assert!((share - p).abs() < 5. * (p * (1. - p) / 1e4).sqrt(), "{token}: {share}");
    }
    let mut again = Sampler::seeded(7);
    for want in &drawn[..100] {
        assert_eq!(again.sample(&x, &all)?, *want);
    }
    let mut other = Sampler::unseeded();
    for _ in 0..100 {
        assert_ne!(other.sample(&x, &options(1., Some(3), None))?, 0);
    }
    Ok(())
}

#[test]
fn repetition_is_penalised_once_per_id_and_by_sign() -> TestResult {
    let mut x = [4., -1., 0., 2., f32::NEG_INFINITY];
    penalize_repetition(&mut x, &[0, 1, 0, 2, 1, 4, 99], 2.)?;
    assert_eq!(x, [2., -2., 0., 2., f32::NEG_INFINITY]);
    for penalty in [0., -1., f32::NAN, f32::INFINITY] {
        assert!(message(penalize_repetition(&mut x, &[0], penalty)).contains("repetition penalty"));
    }
    assert_eq!(x[0], 2.);
    Ok(())
}

#[test]
fn what_means_nothing_is_refused() {
    let x = logits();
    for temperature in [-1., f64::NAN, f64::INFINITY] {
        assert!(message(options(temperature, None, None).distribution(&x)).contains("temperature"));
    }
    assert!(message(options(1., Some(0), None).distribution(&x)).contains("top-k of 0"));
    for p in [-0.1, 1.1, f64::NAN] {
        assert!(message(options(1., None, Some(p)).distribution(&x)).contains("top-p"));
    }
    for options in [SamplingOptions::default(), SamplingOptions::greedy()] {
        assert_eq!(message(options.distribution(&[])), "there are no logits");
        assert_eq!(message(options.distribution(&[1., f32::NAN])), "logit 1 of 2 is NaN");
    }
    assert_eq!(message(softmax(&[f32::NEG_INFINITY; 3])), "every logit is −∞");
    assert_eq!(message(argmax_last(&[])), "there are no logits");
    assert_eq!(message(Sampler::seeded(0).sample(&[], &SamplingOptions::default())), "there are no logits");
}
