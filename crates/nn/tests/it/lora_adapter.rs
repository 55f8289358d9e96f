//! Adapters on a decoder: PEFT's own files (`tests/fixtures/lora.py` wrote them), targets, dropout, training.
#![allow(clippy::unwrap_used)] // tests fail so, outside of their own functions too

use crate::common::{builder, close, decoder_vars, relative, row, text, tiny_config, Rng, Vars};
use candle_core::{DType, Device, Tensor, Var};
use candle_lazy_exec::RandomKey;
use candle_lazy_nn::models::{CausalLm, CausalLmConfig};
use candle_lazy_nn::params::Param;
use candle_lazy_nn::{
    loss, Error, LazyTensor, Linear, LoraAdapter, LoraConfig, LoraLinear, LoraTargets, LoraWeights, Module, VarBuilder,
};
use serde::Deserialize;
use std::path::{Path, PathBuf};

#[derive(Deserialize)]
struct Fixture {
    config: serde_json::Value,
    weights: Vec<(String, Vec<usize>)>,
    ids: Vec<u32>,
    base: Vec<Vec<f32>>,
    adapted: Vec<Vec<f32>>,
}

fn fixture() -> (Fixture, CausalLm) {
    let fixture: Fixture = serde_json::from_str(include_str!("../fixtures/lora.json")).unwrap();
    let config = CausalLmConfig::from_json(&fixture.config.to_string()).unwrap();
    let mut rng = Rng::new(1);
    let mut vars = Vars::new();
    for (name, shape) in &fixture.weights {
        let (scale, shift) = if name.contains("norm") { (0.2, 1.) } else { (0.35, 0.) };
        vars.insert(name.clone(), rng.tensor(shape, 1.).unwrap().affine(scale, shift).unwrap());
    }
    let model = CausalLm::load(builder(&vars), &config).unwrap();
    (fixture, model)
}

fn peft_dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/lora")
}

fn logits(model: &CausalLm, ids: &[u32]) -> Vec<f32> {
    let at = model.positions(ids.len()).unwrap();
    let logits = model.forward_causal(&row(ids).unwrap().into(), &at).unwrap();
    logits.eval().unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

fn tiny(seed: u64) -> CausalLm {
    let config = tiny_config();
    CausalLm::load(builder(&decoder_vars(&config, seed).unwrap()), &config).unwrap()
}

fn values(param: &Param) -> Vec<f32> {
    param.value().eval().unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn pefts_adapter_gives_pefts_logits() {
    let (fixture, mut model) = fixture();
    assert!(relative(&logits(&model, &fixture.ids), &fixture.base.concat()) < 1e-5);
    let adapter = LoraAdapter::load(&mut model, peft_dir()).unwrap();
    assert!(relative(&logits(&model, &fixture.ids), &fixture.adapted.concat()) < 1e-5);
    let moved = relative(&fixture.adapted.concat(), &fixture.base.concat());
    assert!(moved > 0.1, "the adapter does something: {moved}");
    let config = adapter.config();
    assert_eq!((config.rank, config.alpha, config.dropout, config.rank_stabilized), (3, 6., 0.1, true));
    assert!((config.scale() - 6. / 3f64.sqrt()).abs() < 1e-12);
    assert_eq!((adapter.paths().len(), adapter.params().len()), (9, 18));
    assert_eq!(adapter.params().elem_count(), 3 * 3 * (24 + 24 + 24 + 8 + 40 + 24));
}

#[test]
fn what_is_saved_comes_back_bit_for_bit() {
    let (fixture, mut model) = fixture();
    let adapter = LoraAdapter::load(&mut model, peft_dir()).unwrap();
    let want = logits(&model, &fixture.ids);
    let dir = tempfile::tempdir().unwrap();
    let saved = dir.path().join("new").join("adapter");
    adapter.save(&saved, Some("some/model")).unwrap();
    let mut files: Vec<_> = std::fs::read_dir(&saved).unwrap().map(|e| e.unwrap().file_name()).collect();
    files.sort();
    assert_eq!(files, ["adapter_config.json", "adapter_model.safetensors"]);
    let config: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(saved.join("adapter_config.json")).unwrap()).unwrap();
    for (field, value) in [
        ("peft_type", serde_json::json!("LORA")),
        ("task_type", "CAUSAL_LM".into()),
        ("base_model_name_or_path", "some/model".into()),
        ("inference_mode", true.into()),
        ("r", 3.into()),
        ("lora_alpha", 6.into()),
        ("use_rslora", true.into()),
        ("target_modules", serde_json::json!(["down_proj", "v_proj", "q_proj"])),
    ] {
        assert_eq!(config[field], value, "{field}");
    }
    model.clear_lora().unwrap();
    let again = LoraAdapter::load(&mut model, &saved).unwrap();
    assert_eq!(again.config(), adapter.config());
    assert_eq!(logits(&model, &fixture.ids), want);
    // PEFT's own file has the same names, shapes and numbers
    let load =
        |dir: &Path| candle_core::safetensors::load(dir.join("adapter_model.safetensors"), &Device::Cpu).unwrap();
    let (ours, theirs) = (load(&saved), load(&peft_dir()));
    assert_eq!(ours.len(), theirs.len());
    for (name, theirs) in theirs {
        close(&ours[&name], &theirs, 0.).unwrap();
    }
}

#[test]
fn a_new_adapter_is_pefts_and_changes_nothing_yet() {
    let mut model = tiny(1);
    let ids = Rng::new(2).ids(7, 61);
    let base = logits(&model, &ids);
    let config = LoraConfig { rank: 4, targets: LoraTargets::AllLinear, ..LoraConfig::default() };
    let adapter = LoraAdapter::attach(&mut model, &config, 7).unwrap();
    assert_eq!(logits(&model, &ids), base);
    assert_eq!(adapter.paths().len(), 3 * 7);
    let a = adapter.params().get("base_model.model.model.layers.2.mlp.down_proj.lora_A.weight").unwrap();
    let b = adapter.params().get("base_model.model.model.layers.2.mlp.down_proj.lora_B.weight").unwrap();
    assert_eq!((a.shape().dims(), b.shape().dims()), (&[4, 40][..], &[24, 4][..]));
    assert!(values(b).iter().all(|v| *v == 0.));
    // uniform over ±1/√40: of variance bound²/3
    let (a, bound) = (values(a), 1. / 40f32.sqrt());
    assert!(a.iter().all(|v| v.abs() <= bound));
    let variance = a.iter().map(|v| v * v).sum::<f32>() / 160.;
    assert!((variance / (bound * bound / 3.) - 1.).abs() < 0.3, "{variance}");
    let first = |adapter: &LoraAdapter| values(adapter.params().iter().next().unwrap());
    let again = LoraAdapter::attach(&mut tiny(1), &config, 7).unwrap();
    let other = LoraAdapter::attach(&mut tiny(1), &config, 8).unwrap();
    assert_eq!(first(&again), first(&adapter));
    assert_ne!(first(&other), first(&adapter));
    // all A differ from one another
    let mut all: Vec<_> = adapter.params().matching("*.lora_A.weight").unwrap().into_iter().map(values).collect();
    all.iter_mut().for_each(|a| a.truncate(8));
    all.sort_by(|x, y| x[0].total_cmp(&y[0]));
    all.dedup();
    assert_eq!(all.len(), 21);
}

#[test]
fn the_model_reads_the_values_of_now() {
    let mut model = tiny(1);
    let ids = Rng::new(2).ids(7, 61);
    let adapter = LoraAdapter::attach(&mut model, &LoraConfig::default(), 7).unwrap();
    let before = logits(&model, &ids);
    let copy = model.clone();
    let mut rng = Rng::new(3);
    for param in adapter.params().matching("*.lora_B.weight").unwrap() {
        param.set(rng.tensor(param.shape().dims(), 0.5).unwrap()).unwrap();
    }
    let after = logits(&model, &ids);
    assert!(relative(&after, &before) > 1e-3);
    assert_eq!(logits(&copy, &ids), after);
    // a new adapter takes the old one's place
    LoraAdapter::attach(&mut model, &LoraConfig::default(), 7).unwrap();
    assert_eq!(logits(&model, &ids), before);
}

#[test]
fn targets_follow_pefts_rule() {
    let paths = |targets: LoraTargets| {
        let config = LoraConfig { targets, ..LoraConfig::default() };
        LoraAdapter::attach(&mut tiny(1), &config, 0).map(|adapter| adapter.paths().to_vec())
    };
    let names = |names: &[&str]| LoraTargets::Names(names.iter().map(|name| (*name).to_string()).collect());
    assert_eq!(
        paths(names(&["q_proj"])).unwrap()[..2],
        ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]
    );
    assert_eq!(paths(names(&["mlp.up_proj", "other"])).unwrap().len(), 3);
    assert_eq!(paths(names(&["model.layers.1.mlp.up_proj"])).unwrap(), ["model.layers.1.mlp.up_proj"]);
    // the end of a name is no name
    let error = text(paths(names(&["proj", "head"])));
    let wanted = "config of the adapter: the targets `proj`, `head` match no linear map of the model, which has \
                  `model.layers.0.self_attn.q_proj`, ";
    assert!(error.starts_with(wanted), "{error}");
    let pattern = |pattern: &str| LoraTargets::Pattern(pattern.to_string());
    assert_eq!(paths(pattern(r".*\.[02]\.self_attn\.[qk]_proj")).unwrap().len(), 4);
    assert!(text(paths(pattern("q_proj"))).contains("targets by the pattern `q_proj` match no linear map"));
    assert!(text(paths(pattern("("))).contains("the target pattern `(`"));
    assert!(text(paths(names(&[]))).contains("no target module is named"));
    let refuse = |config: LoraConfig| text(LoraAdapter::attach(&mut tiny(1), &config, 0));
    assert!(refuse(LoraConfig { rank: 0, ..LoraConfig::default() }).contains("a rank of 0 adapts nothing"));
    assert!(refuse(LoraConfig { alpha: f64::NAN, ..LoraConfig::default() }).contains("alpha must be finite, got NaN"));
    assert!(refuse(LoraConfig { dropout: 1., ..LoraConfig::default() }).contains("a dropout of 1: needs 0 ≤ p < 1"));
    let scale = |rank_stabilized| LoraConfig { rank: 16, alpha: 8., rank_stabilized, ..LoraConfig::default() }.scale();
    assert_eq!((scale(false), scale(true)), (0.5, 2.));
}

#[test]
fn dropout_is_of_the_maps_input_and_of_the_steps_key() {
    let mut model = tiny(1);
    let ids = Rng::new(2).ids(7, 61);
    let config = LoraConfig { dropout: 0.5, ..LoraConfig::default() };
    let adapter = LoraAdapter::attach(&mut model, &config, 7).unwrap();
    let mut rng = Rng::new(3);
    for param in adapter.params().matching("*.lora_B.weight").unwrap() {
        param.set(rng.tensor(param.shape().dims(), 0.5).unwrap()).unwrap();
    }
    let without = logits(&model, &ids);
    let key = RandomKey::new(11);
    adapter.train(key);
    let first = logits(&model, &ids);
    assert_eq!(logits(&model, &ids), first);
    adapter.train(key.fold_in(1));
    let at = model.positions(ids.len()).unwrap();
    let (second, report) = model.forward_causal(&row(&ids).unwrap().into(), &at).unwrap().eval_with_report().unwrap();
    assert!(report.cache_hit, "another key is no other plan");
    let second: Vec<f32> = second.flatten_all().unwrap().to_vec1().unwrap();
    assert!(first != second && first != without && second != without);
    adapter.eval();
    assert_eq!(logits(&model, &ids), without);
}

#[test]
fn an_adapter_of_f32_on_a_base_of_half_precision_is_rounded_once() {
    let mut rng = Rng::new(4);
    let half = |t: Tensor| t.to_dtype(DType::BF16).unwrap();
    let (weight, xs) = (half(rng.tensor(&[7, 10], 1.).unwrap()), half(rng.tensor(&[3, 10], 1.).unwrap()));
    let (a, b) = (rng.tensor(&[10, 2], 1.).unwrap(), rng.tensor(&[2, 7], 1.).unwrap());
    let mut layer = LoraLinear::new(Linear::new(weight, None).unwrap());
    let base = layer.forward(&xs.clone().into()).unwrap().eval().unwrap();
    layer.set_adapter(Some(LoraWeights::new(a.clone(), b.clone(), 0.5).unwrap())).unwrap();
    let got = layer.forward(&xs.clone().into()).unwrap().eval().unwrap();
    assert_eq!(got.dtype(), DType::BF16);
    let wide = |t: &Tensor| t.to_dtype(DType::F64).unwrap();
    let product = wide(&xs).matmul(&wide(&a)).unwrap().matmul(&wide(&b)).unwrap().affine(0.5, 0.).unwrap();
    let want = (wide(&base) + product).unwrap().to_dtype(DType::F32).unwrap();
    // half a unit in the last of 8 digits
    close(&got.to_dtype(DType::F32).unwrap(), &want, 1. / 256.).unwrap();
    let config = tiny_config();
    let vars = decoder_vars(&config, 1).unwrap();
    let mut model = CausalLm::load(VarBuilder::from_tensors(vars, DType::BF16, &Device::Cpu), &config).unwrap();
    let adapter = LoraAdapter::attach(&mut model, &LoraConfig::default(), 7).unwrap();
    assert!(adapter.params().iter().all(|param| param.dtype() == DType::F32));
    let at = model.positions(2).unwrap();
    assert_eq!(model.forward_causal(&row(&[3, 4]).unwrap().into(), &at).unwrap().dtype(), DType::BF16);
    let halves = LoraWeights::new(half(a), half(b), 0.5).unwrap();
    let mut wide = LoraLinear::new(Linear::new(rng.tensor(&[7, 10], 1.).unwrap(), None).unwrap());
    assert!(text(wide.set_adapter(Some(halves))).contains("the base is F32, the adapter BF16"));
}

#[test]
fn factors_that_are_parameters_must_fit() {
    let param = |shape: &[usize], dtype| Param::new("p", Tensor::zeros(shape, dtype, &Device::Cpu).unwrap()).unwrap();
    let new = |a: &[usize], b: &[usize]| LoraWeights::from_params(&param(a, DType::F32), &param(b, DType::F32), 1.);
    assert!(text(new(&[2, 10], &[7, 3])).contains("expected a (r, in) and b (out, r), found a [2, 10] and b [7, 3]"));
    let error = text(LoraWeights::from_params(&param(&[2, 10], DType::F32), &param(&[7, 2], DType::F64), 1.));
    assert!(error.contains("a is F32 and b is F64: both must have one dtype"), "{error}");
    let weights = new(&[2, 10], &[7, 2]).unwrap();
    assert_eq!((weights.rank(), weights.scale()), (2, 1.));
    assert_eq!((weights.a().unwrap().dims(), weights.b().unwrap().dims()), (&[10, 2][..], &[2, 7][..]));
    let mut layer =
        LoraLinear::new(Linear::new(Tensor::zeros((7, 9), DType::F32, &Device::Cpu).unwrap(), None).unwrap());
    let error = text(layer.set_adapter(Some(weights.clone())));
    assert!(error.contains("in 9, out 7 needs a (9, r) and b (r, 7), found a [10, 2] and b [2, 7]"), "{error}");
    let fixed = weights.detached().unwrap();
    assert_eq!((fixed.rank(), fixed.a().unwrap().dims()), (2, &[10, 2][..]));
}

#[test]
fn fields_that_are_not_supported_are_refused_by_name() {
    let config = std::fs::read_to_string(peft_dir().join("adapter_config.json")).unwrap();
    let with = |field: &str, value: serde_json::Value| {
        let mut config: serde_json::Value = serde_json::from_str(&config).unwrap();
        config[field] = value;
        LoraConfig::from_peft(&config.to_string(), "adapter_config.json")
    };
    for (field, value) in [
        ("use_dora", serde_json::json!(true)),
        ("use_qalora", true.into()),
        ("lora_bias", true.into()),
        ("fan_in_fan_out", true.into()),
        ("bias", "all".into()),
        ("peft_type", "IA3".into()),
        ("task_type", "SEQ_CLS".into()),
        ("init_lora_weights", "pissa".into()),
        ("modules_to_save", serde_json::json!(["lm_head"])),
        ("rank_pattern", serde_json::json!({"q_proj": 4})),
        ("alpha_pattern", serde_json::json!({"q_proj": 4})),
        ("layers_to_transform", serde_json::json!([0])),
        ("exclude_modules", "q_proj".into()),
        ("trainable_token_indices", serde_json::json!([1])),
        ("a_field_of_the_future", 3.into()),
    ] {
        let error = text(with(field, value.clone()));
        let wanted =
            format!("config of adapter_config.json: `{field}` is {value}, which is not supported (supported: ");
        assert!(error.starts_with(&wanted), "{error}");
    }
    assert!(with("a_field_of_the_future", serde_json::Value::Null).is_ok());
    for (field, value, message) in [
        ("r", serde_json::json!(0), "`r` must be a whole number above 0"),
        ("r", serde_json::json!(2.5), "`r` must be a whole number above 0"),
        ("lora_alpha", "x".into(), "`lora_alpha` is \"x\": a number is needed"),
        ("use_rslora", "yes".into(), "`use_rslora` is \"yes\": true or false is needed"),
        ("lora_dropout", serde_json::json!(1.5), "a dropout of 1.5"),
        ("target_modules", serde_json::Value::Null, "`target_modules` is null: names or a pattern are needed"),
        ("target_modules", serde_json::json!([1]), "`target_modules` must be names"),
    ] {
        let error = text(with(field, value));
        assert!(error.contains(message), "{error}");
    }
    assert!(text(LoraConfig::from_peft("no", "x")).starts_with("config of x: "));
    let all = with("target_modules", "all-linear".into()).unwrap();
    assert_eq!(all.targets, LoraTargets::AllLinear);
    let pattern = with("target_modules", r".*\.q_proj".into()).unwrap();
    assert_eq!(pattern.targets, LoraTargets::Pattern(r".*\.q_proj".into()));
}

#[test]
fn a_directory_that_does_not_fit_is_refused_and_the_model_keeps_its_adapter() {
    let (fixture, mut model) = fixture();
    LoraAdapter::load(&mut model, peft_dir()).unwrap();
    let before = logits(&model, &fixture.ids);
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let mut load = || text(LoraAdapter::load(&mut model, dir.path()));
    assert!(load().ends_with("has no adapter_config.json"));
    let config = std::fs::read_to_string(peft_dir().join("adapter_config.json")).unwrap();
    std::fs::write(path("adapter_config.json"), &config).unwrap();
    assert!(load().ends_with("has no adapter_model.safetensors"));
    let stored = candle_core::safetensors::load(peft_dir().join("adapter_model.safetensors"), &Device::Cpu).unwrap();
    let save = |tensors: &std::collections::HashMap<String, Tensor>| {
        candle_core::safetensors::save(tensors, path("adapter_model.safetensors")).unwrap();
    };
    let name = "base_model.model.model.layers.1.mlp.down_proj.lora_B.weight";
    let mut fewer = stored.clone();
    let factor = fewer.remove(name).unwrap();
    save(&fewer);
    assert!(load().ends_with(&format!("it lacks `{name}`")));
    let mut more = stored.clone();
    more.insert("base_model.model.lm_head.weight".to_string(), factor.clone());
    save(&more);
    assert!(load().ends_with("nothing here is called `base_model.model.lm_head.weight`"));
    let mut other = stored.clone();
    other.insert(name.to_string(), factor.t().unwrap().contiguous().unwrap());
    save(&other);
    let error = load();
    assert!(error.contains(name) && error.ends_with("expected shape [24, 3], found [3, 24]"), "{error}");
    std::fs::write(path("adapter_model.safetensors"), b"no").unwrap();
    assert!(load().contains("is not a valid safetensors file"));
    std::fs::write(path("adapter_config.json"), config.replace("_proj", "_projection")).unwrap();
    assert!(load().contains("match no linear map of the model"));
    assert_eq!(logits(&model, &fixture.ids), before);
    // factors of half precision are taken too
    let halves = stored.into_iter().map(|(name, t)| (name, t.to_dtype(DType::F16).unwrap())).collect();
    save(&halves);
    std::fs::write(path("adapter_config.json"), config).unwrap();
    let adapter = LoraAdapter::load(&mut model, dir.path()).unwrap();
    assert!(adapter.params().iter().all(|param| param.dtype() == DType::F32));
    assert!(relative(&logits(&model, &fixture.ids), &before) < 1e-2);
    assert!(matches!(adapter.save(path("adapter_config.json"), None), Err(Error::Io { .. })));
}

#[test]
fn whole_sequences_need_no_cache() {
    let config = tiny_config();
    let vars = decoder_vars(&config, 5).unwrap();
    for window in [None, Some(3)] {
        let config = CausalLmConfig { sliding_window: window, ..config.clone() };
        let model = CausalLm::load(builder(&vars), &config).unwrap();
        let ids: LazyTensor = Tensor::from_vec(Rng::new(6).ids(18, 61), (2, 9), &Device::Cpu).unwrap().into();
        let with = model.forward_all(&ids, &mut model.new_cache(9).unwrap()).unwrap().eval().unwrap();
        let without = model.forward_causal(&ids, &model.positions(9).unwrap()).unwrap().eval().unwrap();
        close(&without, &with, 1e-6).unwrap();
    }
    let model = tiny(5);
    assert!(matches!(model.positions(65), Err(Error::PromptTooLong { len: 65, context: 64, .. })));
    let at = model.positions(3).unwrap();
    let ids = |shape: &[usize]| LazyTensor::zeros(shape, DType::U32, &Device::Cpu).unwrap();
    assert!(text(model.forward_causal(&ids(&[3]), &at)).contains("ids must have shape (batch, length), found [3]"));
    assert!(matches!(model.forward_causal(&ids(&[1, 0]), &at), Err(Error::EmptyPrompt { .. })));
    assert!(model.forward_causal(&ids(&[1, 4]), &at).is_err());
}

#[test]
fn gradients_are_those_of_candles_tape() {
    let (mut model, mut taped) = (tiny(1), tiny(1));
    let config = LoraConfig { targets: LoraTargets::AllLinear, ..LoraConfig::default() };
    let adapter = LoraAdapter::attach(&mut model, &config, 7).unwrap();
    let mut rng = Rng::new(3);
    for param in adapter.params().matching("*.lora_B.weight").unwrap() {
        param.set(rng.tensor(param.shape().dims(), 0.3).unwrap()).unwrap();
    }
    // the same factors as variables of Candle's, on another model
    let mut vars = Vec::new();
    for path in adapter.paths() {
        let [a, b] = ["lora_A", "lora_B"].map(|factor| {
            let param = adapter.params().get(&format!("base_model.model.{path}.{factor}.weight")).unwrap();
            Var::from_tensor(&param.value().eval().unwrap()).unwrap()
        });
        let weights = LoraWeights::new(a.t().unwrap(), b.t().unwrap(), config.scale()).unwrap();
        taped.set_lora(path, Some(weights)).unwrap();
        vars.push((path, [a, b]));
    }
    let ids = Rng::new(2).ids(9, 61);
    let targets = Tensor::from_slice(&ids[1..], 8, &Device::Cpu).unwrap();
    let forward = |model: &CausalLm| {
        let at = model.positions(8).unwrap();
        model.forward_causal(&row(&ids[..8]).unwrap().into(), &at).unwrap().squeeze(0).unwrap()
    };
    let store = loss::cross_entropy(&forward(&taped).eval().unwrap(), &targets, None).unwrap().backward().unwrap();
    let recorded = forward(&model).cross_entropy(&targets.into()).unwrap();
    let grads = adapter.params().grad(&recorded).unwrap();
    for (path, factors) in &vars {
        for (factor, var) in ["lora_A", "lora_B"].iter().zip(factors) {
            let got = grads.get(&format!("base_model.model.{path}.{factor}.weight")).unwrap().eval().unwrap();
            close(&got, store.get(var).unwrap(), 1e-4).unwrap();
        }
    }
}
