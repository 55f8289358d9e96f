//! Modules against candle_nn on the same weights, and what they refuse.

use crate::common::{builder, close, Rng, TestResult, Vars};
use candle_core::{DType, Device, Tensor};
use candle_lazy_nn::{
    embedding, layer_norm, linear, linear_no_bias, rms_norm, Activation, Embedding, Error, FeedForward, LayerNorm,
    LazyTensor, Linear, Mlp, Module, RmsNorm, RopeScaling, RopeTable, VarBuilder,
};
use candle_nn::Module as _;
use proptest::prelude::*;

const TOLERANCE: f64 = 2e-6;

fn vars(pairs: &[(&str, &Tensor)]) -> Vars {
    pairs.iter().map(|(name, tensor)| ((*name).to_string(), (*tensor).clone())).collect()
}

fn lazy(tensor: &Tensor) -> LazyTensor {
    LazyTensor::from(tensor.clone())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn linear_is_candles(
        lead in prop::collection::vec(1usize..4, 1..4),
        input in 1usize..40,
        out in 1usize..40,
        bias in any::<bool>(),
        seed in any::<u64>(),
    ) {
        let run = || -> TestResult {
            let mut rng = Rng::new(seed);
            let weight = rng.tensor(&[out, input], 1.)?;
            let shift = rng.tensor(&[out], 1.)?;
            let mut shape = lead.clone();
            shape.push(input);
            let xs = rng.tensor(&shape, 1.)?;
            let vb = builder(&vars(&[("weight", &weight), ("bias", &shift)]));
            let (ours, theirs) = if bias {
                (linear(input, out, vb.clone())?, candle_nn::linear(input, out, vb)?)
            } else {
                (linear_no_bias(input, out, vb.clone())?, candle_nn::linear_no_bias(input, out, vb)?)
            };
            close(&ours.forward(&lazy(&xs))?.eval()?, &theirs.forward(&xs)?, TOLERANCE)
        };
        run().map_err(|e| TestCaseError::fail(e.to_string()))?;
    }

    #[test]
    fn norms_are_candles(rows in 1usize..6, width in 1usize..70, seed in any::<u64>()) {
        let run = || -> TestResult {
            let mut rng = Rng::new(seed);
            let (weight, bias) = (rng.tensor(&[width], 1.)?, rng.tensor(&[width], 1.)?);
            let xs = rng.tensor(&[2, rows, width], 3.)?;
            let vb = builder(&vars(&[("weight", &weight), ("bias", &bias)]));
            let want = candle_nn::rms_norm(width, 1e-5, vb.clone())?.forward(&xs)?;
            close(&rms_norm(width, 1e-5, vb.clone())?.forward(&lazy(&xs))?.eval()?, &want, 1e-5)?;
            let want = candle_nn::layer_norm(width, 1e-3, vb.clone())?.forward(&xs)?;
            let got = layer_norm(width, 1e-3, vb)?.forward(&lazy(&xs))?.eval()?;
            near_for_their_rows(&got, &want, &xs, (&weight, &bias), 1e-3)
        };
        run().map_err(|e| TestCaseError::fail(e.to_string()))?;
    }

    #[test]
    fn embeddings_are_candles(vocab in 1usize..50, width in 1usize..20, b in 1usize..4, s in 1usize..9, seed in any::<u64>()) {
        let run = || -> TestResult {
            let mut rng = Rng::new(seed);
            let table = rng.tensor(&[vocab, width], 1.)?;
            let ids = Tensor::from_vec(rng.ids(b * s, vocab), (b, s), &Device::Cpu)?;
            let vb = builder(&vars(&[("weight", &table)]));
            let want = candle_nn::embedding(vocab, width, vb.clone())?.forward(&ids)?;
            close(&embedding(vocab, width, vb)?.forward(&lazy(&ids))?.eval()?, &want, 0.)
        };
        run().map_err(|e| TestCaseError::fail(e.to_string()))?;
    }
}

/// Both sides of a layer norm against f64. Ours is within 16 units in the last place of f32 at the scale of what a row's
/// subtraction cancels: a mean that is off by a rounding of the row's largest number shows divided by the row's deviation.
/// candle-nn takes the variance as the mean square less the squared mean, which cancels at the square of that.
fn near_for_their_rows(
    got: &Tensor,
    candles: &Tensor,
    xs: &Tensor,
    (weight, bias): (&Tensor, &Tensor),
    eps: f64,
) -> TestResult {
    let width = xs.dim(2)?;
    let rows = |t: &Tensor| t.reshape(((), width))?.to_dtype(DType::F64)?.to_vec2::<f64>();
    let largest = |row: &[f64]| row.iter().fold(0f64, |m, x| m.max(x.abs()));
    let vector = |t: &Tensor| t.to_dtype(DType::F64)?.to_vec1::<f64>();
    let (weight, bias) = (vector(weight)?, vector(bias)?);
    for ((got, candles), xs) in rows(got)?.iter().zip(rows(candles)?).zip(rows(xs)?) {
        let mean = xs.iter().sum::<f64>() / width as f64;
        let root = (xs.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / width as f64 + eps).sqrt();
        let lost = (largest(&xs) / root).max(1.);
        let unit = |lost: f64| 16. * f64::from(f32::EPSILON) * (lost * largest(&weight) + largest(&bias));
        for (i, (ours, theirs)) in got.iter().zip(&candles).enumerate() {
            let exact = (xs[i] - mean) / root * weight[i] + bias[i];
            assert!((ours - exact).abs() <= unit(lost), "{ours} instead of {exact}, a row that loses {lost}");
            assert!((theirs - exact).abs() <= unit(lost * lost), "candle: {theirs} instead of {exact}");
        }
    }
    Ok(())
}

#[test]
fn layer_norm_takes_the_old_names() -> TestResult {
    let mut rng = Rng::new(1);
    let (weight, bias, xs) = (rng.tensor(&[8], 1.)?, rng.tensor(&[8], 1.)?, rng.tensor(&[3, 8], 1.)?);
    let new = layer_norm(8, 1e-5, builder(&vars(&[("weight", &weight), ("bias", &bias)])))?;
    let old = layer_norm(8, 1e-5, builder(&vars(&[("gamma", &weight), ("beta", &bias)])))?;
    close(&old.forward(&lazy(&xs))?.eval()?, &new.forward(&lazy(&xs))?.eval()?, 0.)
}

#[test]
fn activations_are_candles() -> TestResult {
    let xs = Rng::new(2).tensor(&[5, 33], 4.)?;
    let cases = [
        ("gelu", xs.gelu_erf()?),
        ("gelu_new", xs.gelu()?),
        ("gelu_pytorch_tanh", xs.gelu()?),
        ("relu", xs.relu()?),
        ("silu", xs.silu()?),
        ("swish", xs.silu()?),
        ("sigmoid", candle_nn::ops::sigmoid(&xs)?),
        ("tanh", xs.tanh()?),
    ];
    for (name, want) in cases {
        close(&Activation::from_name(name)?.forward(&lazy(&xs))?.eval()?, &want, 5e-6)?;
    }
    Ok(())
}

#[test]
fn an_unknown_activation_is_refused_by_name() {
    let error = Activation::from_name("snake").map(|_| ());
    assert!(matches!(&error, Err(Error::Unsupported { found, .. }) if found == "snake"), "{error:?}");
}

#[test]
fn swiglu_is_candles_composition() -> TestResult {
    let mut rng = Rng::new(3);
    let (gate, up, down) = (rng.tensor(&[20, 8], 1.)?, rng.tensor(&[20, 8], 1.)?, rng.tensor(&[8, 20], 1.)?);
    let xs = rng.tensor(&[2, 3, 8], 1.)?;
    let vb = builder(&vars(&[("gate_proj.weight", &gate), ("up_proj.weight", &up), ("down_proj.weight", &down)]));
    let plain = |w: &Tensor| candle_nn::Linear::new(w.clone(), None);
    let hidden = (plain(&gate).forward(&xs)?.silu()? * plain(&up).forward(&xs)?)?;
    let want = plain(&down).forward(&hidden)?;
    close(&Mlp::load(8, 20, false, vb)?.forward(&lazy(&xs))?.eval()?, &want, 5e-6)?;
    let built = Mlp::new(Linear::new(gate, None)?, Linear::new(up, None)?, Linear::new(down, None)?);
    close(&built.forward(&lazy(&xs))?.eval()?, &want, 5e-6)
}

#[test]
fn feed_forward_is_candles_composition() -> TestResult {
    let mut rng = Rng::new(4);
    let (up, up_bias) = (rng.tensor(&[20, 8], 1.)?, rng.tensor(&[20], 1.)?);
    let (down, down_bias) = (rng.tensor(&[8, 20], 1.)?, rng.tensor(&[8], 1.)?);
    let xs = rng.tensor(&[4, 8], 1.)?;
    let want = candle_nn::Linear::new(down.clone(), Some(down_bias.clone()))
        .forward(&candle_nn::Linear::new(up.clone(), Some(up_bias.clone())).forward(&xs)?.gelu_erf()?)?;
    let ours = FeedForward::new(
        Linear::new(up, Some(up_bias.into()))?,
        Activation::Gelu,
        Linear::new(down, Some(down_bias.into()))?,
    );
    close(&ours.forward(&lazy(&xs))?.eval()?, &want, 5e-6)
}

#[test]
fn a_missing_tensor_is_named_with_its_prefix() {
    let error = linear(4, 4, builder(&Vars::new()).pp("model").pp("q_proj")).map(|_| ());
    assert!(matches!(&error, Err(Error::MissingTensor { name, .. }) if name == "model.q_proj.weight"), "{error:?}");
}

#[test]
fn a_wrong_shape_is_named_with_both_shapes() -> TestResult {
    let weight = Rng::new(5).tensor(&[4, 5], 1.)?;
    let error = linear_no_bias(6, 4, builder(&vars(&[("weight", &weight)]))).map(|_| ());
    match error {
        Err(Error::TensorShape { name, expected, found, .. }) => {
            assert_eq!((name.as_str(), expected.dims(), found.dims()), ("weight", &[4, 6][..], &[4, 5][..]));
        }
        other => return Err(format!("{other:?}").into()),
    }
    Ok(())
}

#[test]
fn modules_from_tensors_check_their_shapes() -> TestResult {
    let mut rng = Rng::new(6);
    let (vector, matrix) = (rng.tensor(&[4], 1.)?, rng.tensor(&[3, 4], 1.)?);
    assert!(matches!(Linear::new(vector.clone(), None), Err(Error::Module { .. })));
    assert!(matches!(Linear::new(matrix.clone(), Some(lazy(&vector))), Err(Error::Module { .. })));
    assert!(matches!(Embedding::new(vector.clone()), Err(Error::Module { .. })));
    assert!(matches!(RmsNorm::new(matrix.clone(), 1e-5), Err(Error::Module { .. })));
    assert!(matches!(LayerNorm::new(matrix.clone(), None, 1e-5), Err(Error::Module { .. })));
    assert!(matches!(LayerNorm::new(vector, Some(lazy(&rng.tensor(&[5], 1.)?)), 1e-5), Err(Error::Module { .. })));
    Ok(())
}

#[test]
fn an_input_of_the_wrong_width_is_refused_while_recording() -> TestResult {
    let mut rng = Rng::new(7);
    let layer = Linear::new(rng.tensor(&[3, 4], 1.)?, None)?;
    let error = layer.forward(&lazy(&rng.tensor(&[2, 5], 1.)?)).map(|_| ());
    assert!(matches!(error, Err(Error::Exec(_))), "{error:?}");
    Ok(())
}

#[test]
fn layer_norm_without_bias() -> TestResult {
    let mut rng = Rng::new(8);
    let (weight, xs) = (rng.tensor(&[6], 1.)?, rng.tensor(&[3, 6], 1.)?);
    let want = candle_nn::LayerNorm::new_no_bias(weight.clone(), 1e-5).forward(&xs)?;
    close(&LayerNorm::new(weight, None, 1e-5)?.forward(&lazy(&xs))?.eval()?, &want, 5e-6)
}

#[test]
fn fresh_variables_can_be_made_for_training() -> TestResult {
    let map = candle_nn::VarMap::new();
    let vb = VarBuilder::from_varmap(&map, DType::F32, &Device::Cpu);
    let layer = linear(4, 3, vb.pp("a"))?;
    layer_norm(3, 1e-5, vb.pp("b"))?;
    embedding(7, 3, vb.pp("c"))?;
    assert_eq!((layer.in_features(), layer.out_features(), layer.path()), (4, 3, "a"));
    assert!(layer.bias().is_some());
    assert_eq!(map.all_vars().len(), 5);
    Ok(())
}

#[test]
fn modules_work_behind_references_and_boxes() -> TestResult {
    let xs = lazy(&Rng::new(9).tensor(&[2, 3], 1.)?);
    let layers: Vec<Box<dyn Module>> = vec![Box::new(Activation::Relu), Box::new(Activation::Tanh)];
    let mut ys = xs.clone();
    for layer in &layers {
        ys = layer.forward(&ys)?;
    }
    let want = xs.eval()?.relu()?.tanh()?;
    close(&ys.eval()?, &want, TOLERANCE)
}

#[test]
fn the_rotary_table_holds_cosines_and_sines() -> TestResult {
    let table = RopeTable::new(8, 100., &RopeScaling::None, 10, DType::F32, &Device::Cpu)?;
    assert_eq!(table.positions(), 10);
    let (cos, sin) = table.slice(3, 5)?;
    let (cos, sin) = (cos.eval()?.to_vec2::<f32>()?, sin.eval()?.to_vec2::<f32>()?);
    for (row, (cos, sin)) in cos.iter().zip(&sin).enumerate() {
        for (i, (cos, sin)) in cos.iter().zip(sin).enumerate() {
            let angle = (row + 3) as f64 * 100f64.powf(-2. * i as f64 / 8.);
            assert!((f64::from(*cos) - angle.cos()).abs() < 2e-6, "{row} {i}");
            assert!((f64::from(*sin) - angle.sin()).abs() < 2e-6, "{row} {i}");
        }
    }
    assert!(table.slice(8, 3).is_err(), "beyond the table");
    Ok(())
}

#[test]
fn an_error_names_the_users_line_and_the_modules_path() -> TestResult {
    let mut rng = Rng::new(10);
    let weight = rng.tensor(&[3, 4], 1.)?;
    let vb = builder(&vars(&[("model.fc.weight", &weight)]));
    let layer = linear_no_bias(4, 3, vb.pp("model").pp("fc"))?;
    let (result, line) = (layer.forward(&lazy(&rng.tensor(&[2, 5], 1.)?)), line!());
    let text = result.map(|_| ()).unwrap_err().to_string();
    for part in [format!("modules.rs:{line}"), "model.fc".to_string(), "[2, 5]".to_string(), "[3, 4]".to_string()] {
        assert!(text.contains(&part), "{text} lacks {part}");
    }
    Ok(())
}
