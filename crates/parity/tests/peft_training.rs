//! Twenty steps of a LoRA training beside PyTorch's, on made-up weights; `cargo xtask verify --models --train` has them on real ones.

#![allow(clippy::unwrap_used)] // a test that fails says so

use candle_lazy_parity::models::{PeftRun, FACTOR_TOLERANCE, LOSS_TOLERANCE};

#[test]
fn losses_and_factors_are_pytorchs() {
    let run = PeftRun::tiny().unwrap();
    let agreement = run.compare(&mut run.model().unwrap()).unwrap();
    assert_eq!((agreement.losses.len(), agreement.factors.len()), (20, 3 * 7 * 2));
    assert!(agreement.worst_loss() <= LOSS_TOLERANCE, "{agreement:?}");
    assert!(agreement.worst_factor() <= FACTOR_TOLERANCE, "{agreement:?}");
    // the steps moved every factor a hundred times farther than that
    for (name, factor) in &agreement.factors {
        assert!(factor.moved > 100. * FACTOR_TOLERANCE, "{name}: {factor:?}");
    }
    assert_eq!(agreement.wrong(), [None, None]);
}

#[test]
fn what_is_off_is_said() {
    let run = PeftRun::tiny().unwrap();
    let mut agreement = run.compare(&mut run.model().unwrap()).unwrap();
    agreement.losses[7] = f64::NAN;
    agreement.factors[3].1.difference = 2. * FACTOR_TOLERANCE;
    let [loss, factor] = agreement.wrong();
    assert!(agreement.worst_loss().is_nan());
    assert!(loss.unwrap().contains("step 8"));
    assert!(factor.unwrap().starts_with("base_model.model.model.layers.0."));
    let smollm2 = PeftRun::smollm2().unwrap();
    assert!(smollm2.model().is_err(), "its weights are real ones");
}
