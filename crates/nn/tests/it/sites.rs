//! Every module and both models: what is refused names this file's line, and the module where there is one.

// A test's own set-up that fails is a failed test.
#![allow(clippy::panic)]

use crate::common::{builder, decoder_vars, random_vars, tiny_config, Rng, TestResult, Vars};
use candle_core::{DType, Device, Tensor};
use candle_lazy_nn::models::{BertConfig, BertModel, Cache, CausalLm, GenerateOptions, SentenceEncoder};
use candle_lazy_nn::{
    embedding, layer_norm, linear, rms_norm, Activation, CausalSelfAttention, Embedding, Error, FeedForward, KvCache,
    LayerNorm, LazyTensor, Linear, LoraLinear, LoraWeights, Mlp, Module, Positions, Result, RmsNorm, RopeScaling,
    RopeTable,
};

/// The call on this line failed, and its error names the line and everything else asked for.
fn names<T>(line: u32, result: Result<T>, parts: &[&str]) {
    let Err(error) = result else {
        panic!("line {line} was not refused");
    };
    let text = error.to_string();
    let place = format!("tests/it/sites.rs:{line}:");
    for part in parts.iter().copied().chain([place.as_str()]) {
        assert!(text.contains(part), "{text} lacks {part}");
    }
}

fn zeros(dims: &[usize]) -> LazyTensor {
    LazyTensor::from(Tensor::zeros(dims, DType::F32, &Device::Cpu).unwrap_or_else(|e| panic!("{e}")))
}

fn named(shapes: &[(&str, &[usize])]) -> candle_core::Result<Vars> {
    let shapes: Vec<(String, Vec<usize>)> = shapes.iter().map(|(n, s)| ((*n).to_string(), s.to_vec())).collect();
    random_vars(&shapes, 1)
}

#[test]
fn modules_name_the_line_and_their_path() -> TestResult {
    let vars = named(&[("m.weight", &[3, 4]), ("m.bias", &[3]), ("n.weight", &[4]), ("n.bias", &[4])])?;
    let vb = builder(&vars);
    let x = zeros(&[2, 5]);
    let (m, n) = (vb.pp("m"), vb.pp("n"));
    let module = linear(4, 3, m.clone())?;
    names(line!(), module.forward(&x), &["linear", "f32 [2, 5], f32 [3, 4]", "(in m)"]);
    names(line!(), LoraLinear::new(module.clone()).forward(&x), &["linear", "(in m)"]);
    let module = embedding(3, 4, m.clone())?;
    names(line!(), module.forward(&x), &["embedding", "f32 [2, 5]", ".to_dtype(DType::U32)", "(in m)"]);
    let module = rms_norm(4, 1e-5, n.clone())?;
    names(line!(), module.forward(&x), &["rms_norm", "f32 [2, 5]", "(in n)"]);
    let module = layer_norm(4, 1e-5, n)?;
    names(line!(), module.forward(&x), &["layer_norm", "f32 [2, 5]", "(in n)"]);
    let ids = LazyTensor::new(&[1u32], &Device::Cpu)?;
    for (name, activation) in
        [("gelu_erf", Activation::Gelu), ("gelu", Activation::GeluTanh), ("silu", Activation::Silu)]
    {
        names(line!(), activation.forward(&ids), &[name, "u32 [1]", ".to_dtype(DType::F32)"]);
    }
    let boxed: Box<dyn Module> = Box::new(Activation::Silu);
    names(line!(), boxed.forward(&ids), &["silu", "u32 [1]"]);
    let shared: std::sync::Arc<dyn Module> = std::sync::Arc::new(Activation::Silu);
    names(line!(), shared.forward(&ids), &["silu", "u32 [1]"]);
    let dense = |i: usize, o: usize| Linear::new(zeros(&[o, i]), None);
    let module = Mlp::new(dense(4, 6)?, dense(4, 6)?, dense(6, 4)?);
    names(line!(), module.forward(&x), &["linear", "f32 [2, 5], f32 [6, 4]"]);
    let module = FeedForward::new(dense(4, 6)?, Activation::Relu, dense(6, 4)?);
    names(line!(), module.forward(&x), &["linear", "f32 [2, 5], f32 [6, 4]"]);
    Ok(())
}

#[test]
fn constructors_name_the_line() -> TestResult {
    let (v, m) = (zeros(&[4]), zeros(&[3, 4]));
    names(line!(), Linear::new(v.clone(), None), &["linear", "[4]"]);
    names(line!(), Linear::new(m.clone(), Some(v.clone())), &["linear", "[3]", "[4]"]);
    names(line!(), Embedding::new(v.clone()), &["embedding", "[4]"]);
    names(line!(), RmsNorm::new(m.clone(), 1e-5), &["rms_norm", "[3, 4]"]);
    names(line!(), LayerNorm::new(m.clone(), None, 1e-5), &["layer_norm", "[3, 4]"]);
    names(line!(), LayerNorm::new(v.clone(), Some(zeros(&[5])), 1e-5), &["layer_norm", "[5]"]);
    names(line!(), LoraWeights::new(v.clone(), m.clone(), 1.), &["lora", "[4]", "[3, 4]"]);
    let dense = |i: usize, o: usize| Linear::new(zeros(&[o, i]), None);
    let mut lora = LoraLinear::new(dense(4, 3)?);
    let wrong = LoraWeights::new(zeros(&[5, 2]), zeros(&[2, 3]), 1.)?;
    names(line!(), lora.set_adapter(Some(wrong)), &["lora", "[5, 2]"]);
    let attention = CausalSelfAttention::new(dense(4, 4)?, dense(4, 4)?, dense(4, 4)?, dense(4, 4)?, 3, 2);
    names(line!() - 1, attention, &["attention", "3 heads"]);
    Ok(())
}

#[test]
fn attention_caches_and_tables_name_the_line() -> TestResult {
    let dense = |i: usize, o: usize| Linear::new(zeros(&[o, i]), None);
    let attention = CausalSelfAttention::new(dense(8, 8)?, dense(8, 4)?, dense(8, 4)?, dense(8, 8)?, 2, 1)?;
    let table = RopeTable::new(4, 1e4, &RopeScaling::None, 16, DType::F32, &Device::Cpu)?;
    let (cos, sin) = table.slice(0, 3)?;
    let at = Positions { cos, sin };
    let mut cache = KvCache::new(2);
    names(line!(), attention.forward(&zeros(&[1, 3, 7]), &at, &mut cache), &["linear", "f32 [1, 3, 7]"]);
    names(line!(), attention.forward(&zeros(&[1, 2, 8]), &at, &mut cache), &["rope", "f32 [1, 2, 2, 4]"]);
    names(line!(), attention.forward(&zeros(&[1, 3, 8]), &at, &mut cache), &["capacity of 2"]);
    names(line!(), cache.append(&zeros(&[1, 1, 1, 4]), &zeros(&[1, 2, 1, 4])), &["[1, 1, 1, 4]", "[1, 2, 1, 4]"]);
    names(line!(), cache.append(&zeros(&[1, 4]), &zeros(&[1, 4])), &["dims4", "f32 [1, 4]"]);
    names(line!(), table.slice(15, 2), &["narrow", "f32 [16, 2]"]);
    Ok(())
}

#[test]
fn the_decoder_names_the_line_and_the_module() -> TestResult {
    let config = tiny_config();
    let model = CausalLm::load(builder(&decoder_vars(&config, 3)?), &config)?;
    let mut cache = model.new_cache(8)?;
    let ids = |ids: &[u32]| LazyTensor::from_slice(ids, (1, ids.len()), &Device::Cpu);
    let floats = zeros(&[1, 2]);
    names(line!(), model.forward(&floats, &mut cache), &["embedding", "f32 [1, 2]", "(in model.embed_tokens)"]);
    names(line!(), model.forward_all(&floats, &mut cache), &["embedding", "(in model.embed_tokens)"]);
    names(line!(), model.forward(&zeros(&[3]), &mut cache), &["causal_lm", "[3]"]);
    names(line!(), model.forward(&zeros(&[1, 0]), &mut cache), &["empty"]);
    names(line!(), model.forward(&ids(&[1; 9])?, &mut cache), &["capacity of 8"]);
    names(line!(), model.new_cache(65), &["65 tokens", "64"]);
    names(line!(), Cache::new(&config, 65, DType::F32, &Device::Cpu), &["65 tokens"]);
    names(line!(), model.generate(&[], GenerateOptions::default()), &["empty"]);
    names(line!(), model.generate(&[61], GenerateOptions::default()), &["token id 61", "61"]);
    // a run-time failure names the same: the line that called the model, and the module
    let result = model.forward(&ids(&[99])?, &mut cache)?.eval().map_err(Error::from);
    names(line!() - 1, result, &["embedding(f32 [61, 24], u32 [1, 1])", "(in model.embed_tokens)", "99"]);
    // an adapter of half precision was let in on purpose: the deep module that refuses it is named
    let mut wrong = decoder_vars(&config, 3)?;
    let name = "model.layers.2.self_attn.q_proj.weight";
    wrong.insert(name.to_string(), Rng::new(1).tensor(&[24, 23], 1.)?);
    let refused = CausalLm::load(builder(&wrong), &config).map(|_| ());
    assert!(matches!(&refused, Err(Error::TensorShape { name: n, .. }) if n == name), "{refused:?}");
    Ok(())
}

#[test]
fn a_deep_module_is_named_with_its_whole_path() -> TestResult {
    let config = tiny_config();
    let mut vars = decoder_vars(&config, 3)?;
    // a weight that is no number, deep inside
    let name = "model.layers.1.self_attn.q_proj.weight";
    if let Some(weight) = vars.get_mut(name) {
        *weight = (weight.clone() * f64::NAN)?;
    }
    let line = line!() + 1;
    let model = CausalLm::load(builder(&vars), &config)?;
    let mut cache = model.new_cache(4)?;
    let ids = LazyTensor::new(&[[1u32, 2]], &Device::Cpu)?;
    let logits = model.forward(&ids, &mut cache)?;
    let found = logits.first_nonfinite()?.map(|f| f.to_string()).unwrap_or_default();
    for part in ["leaf", "model.layers.1.self_attn.q_proj", &format!("sites.rs:{line}:")] {
        assert!(found.contains(part), "{found} lacks {part}");
    }
    Ok(())
}

#[test]
fn whole_models_pass_checked_mode() -> TestResult {
    let config = tiny_config();
    let model = CausalLm::load(builder(&decoder_vars(&config, 3)?), &config)?;
    let mut cache = model.new_cache(16)?;
    for ids in [vec![1u32, 2, 3, 4, 5], vec![6], vec![7]] {
        let ids = LazyTensor::from_vec(ids.clone(), (1, ids.len()), &Device::Cpu)?;
        let logits = model.forward(&ids, &mut cache)?;
        logits.eval_checked()?;
    }
    let config = bert_config()?;
    let encoder = SentenceEncoder::load(builder(&random_vars(&bert_shapes(&config), 5)?), &config)?;
    encoder.embed(&[vec![1u32, 2, 3], vec![4]])?.eval_checked()?;
    Ok(())
}

fn bert_config() -> Result<BertConfig> {
    BertConfig::from_json(
        r#"{"model_type": "bert", "vocab_size": 20, "hidden_size": 12, "num_hidden_layers": 2,
            "num_attention_heads": 3, "intermediate_size": 16, "max_position_embeddings": 8}"#,
    )
}

fn bert_shapes(config: &BertConfig) -> Vec<(String, Vec<usize>)> {
    let (hidden, ffn) = (config.hidden_size, config.intermediate_size);
    let mut shapes = Vec::new();
    let mut push = |name: String, shape: &[usize]| shapes.push((name, shape.to_vec()));
    for (name, rows) in [
        ("word_embeddings", config.vocab_size),
        ("position_embeddings", config.max_position_embeddings),
        ("token_type_embeddings", config.type_vocab_size),
    ] {
        push(format!("embeddings.{name}.weight"), &[rows, hidden]);
    }
    let mut norms = vec!["embeddings.LayerNorm".to_string()];
    for layer in 0..config.num_hidden_layers {
        let own = format!("encoder.layer.{layer}");
        for (name, out, input) in [
            ("attention.self.query", hidden, hidden),
            ("attention.self.key", hidden, hidden),
            ("attention.self.value", hidden, hidden),
            ("attention.output.dense", hidden, hidden),
            ("intermediate.dense", ffn, hidden),
            ("output.dense", hidden, ffn),
        ] {
            push(format!("{own}.{name}.weight"), &[out, input]);
            push(format!("{own}.{name}.bias"), &[out]);
        }
        norms.extend([format!("{own}.attention.output.LayerNorm"), format!("{own}.output.LayerNorm")]);
    }
    for norm in norms {
        push(format!("{norm}.weight"), &[hidden]);
        push(format!("{norm}.bias"), &[hidden]);
    }
    shapes
}

#[test]
fn the_encoder_names_the_line_and_the_module() -> TestResult {
    let config = bert_config()?;
    let model = BertModel::load(builder(&random_vars(&bert_shapes(&config), 5)?), &config)?;
    let ids = |dims: (usize, usize)| LazyTensor::zeros(dims, DType::U32, &Device::Cpu);
    let floats = zeros(&[1, 2]);
    let parts = ["embedding", "f32 [1, 2]", "(in embeddings.word_embeddings)"];
    names(line!(), model.forward(&floats, &floats, None), &parts);
    names(line!(), model.forward(&zeros(&[3]), &zeros(&[3]), None), &["bert", "[3]"]);
    names(line!(), model.forward(&ids((1, 0))?, &ids((1, 0))?, None), &["empty"]);
    names(line!(), model.forward(&ids((1, 9))?, &ids((1, 9))?, None), &["9 tokens"]);
    names(line!(), model.forward(&ids((1, 2))?, &ids((1, 3))?, None), &["token_type_ids", "[1, 3]"]);
    let encoder = SentenceEncoder::new(model.clone());
    names(line!(), encoder.embed(&[vec![0u32; 9]]), &["9 tokens"]);
    names(line!(), encoder.embed(&[vec![20u32]]), &["token id 20"]);
    names(line!(), encoder.embed(&[Vec::<u32>::new()]), &["empty"]);
    let segments = LazyTensor::from_vec(vec![7u32], (1, 1), &Device::Cpu)?;
    let result = model.forward(&ids((1, 1))?, &segments, None)?.eval().map_err(Error::from);
    names(line!() - 1, result, &["embedding(f32 [2, 12], u32 [1, 1])", "(in embeddings.token_type_embeddings)", "7"]);
    Ok(())
}

/// A module of the user's own, whose `forward` is more than a call of another.
struct Own;

/// The line of the op in `Own`.
const OWN: u32 = line!() + 4;

impl Module for Own {
    fn forward(&self, xs: &LazyTensor) -> Result<LazyTensor> {
        Ok(xs.narrow(0, 5, 1)?)
    }
}

#[test]
fn a_module_of_ones_own_is_named_by_its_own_line() {
    let x = zeros(&[2, 5]);
    names(OWN, Own.forward(&x), &["narrow"]);
    let boxed: Box<dyn Module> = Box::new(Own);
    names(OWN, boxed.forward(&x), &["narrow"]);
    let lent: &dyn Module = &boxed;
    names(OWN, Module::forward(&lent, &x), &["narrow"]);
}
