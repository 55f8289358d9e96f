//! The encoder.

use crate::check::{Check, Result};
use crate::models::bert as ported;
use crate::weights::{Random, RandomWeights};
use candle_core::{DType, Device, Tensor};
use candle_lazy::exec::LazyTensor;
use candle_lazy::nn::ModelDir;
use candle_transformers::models::bert as eager;
use serde_json::json;
use std::path::Path;

/// A mask (b, s): the first entry whole, the others shorter and shorter.
fn mask((batch, len): (usize, usize)) -> Result<Tensor> {
    let seen = |row: usize, at: usize| u32::from(at < len.saturating_sub(row).max(1));
    let mask: Vec<u32> = (0..batch).flat_map(|row| (0..len).map(move |at| seen(row, at))).collect();
    Ok(Tensor::from_vec(mask, (batch, len), &Device::Cpu)?)
}

/// Several configs, with and without a mask, the encoder alone and with its head.
pub fn random(check: &mut Check) -> Result<()> {
    for (seed, act) in ["gelu", "geluapproximate", "relu", "gelu"].into_iter().enumerate() {
        let (heads, head_dim) = [(4, 8), (2, 6), (3, 4), (1, 16)][seed];
        let config = json!({
            "vocab_size": 97, "hidden_size": heads * head_dim, "num_hidden_layers": 1 + seed,
            "num_attention_heads": heads, "intermediate_size": 40 + seed, "hidden_act": act,
            "hidden_dropout_prob": 0.1, "max_position_embeddings": 24, "type_vocab_size": 2,
            "initializer_range": 0.02, "layer_norm_eps": 1e-12, "pad_token_id": 0, "model_type": "bert",
        });
        let absent: &[&str] = &["bert"];
        let weights = RandomWeights { seed: seed as u64, biases: seed != 2, absent };
        let eager_config: eager::Config = serde_json::from_value(config.clone())?;
        let ported_config: ported::Config = serde_json::from_value(config)?;
        let model = eager::BertModel::load(weights.eager(), &eager_config)?;
        let lazy = ported::BertModel::load(weights.ported(), &ported_config)?;
        let with_head = eager::BertForMaskedLM::load(weights.eager(), &eager_config)?;
        let lazy_with_head = ported::BertForMaskedLM::load(weights.ported(), &ported_config)?;
        check.another_model();
        let mut random = Random::new(seed as u64);
        for (batch, len) in [(1, 7), (3, 11), (2, 1)] {
            let ids = random.ids((batch, len), 97)?;
            let segments = random.ids((batch, len), 2)?;
            let (lazy_ids, lazy_segments) = (LazyTensor::from(&ids), LazyTensor::from(&segments));
            let mask = mask((batch, len))?;
            let lazy_mask = LazyTensor::from(&mask);
            for masked in [false, true] {
                let (mask, lazy_mask) = (masked.then_some(&mask), masked.then_some(&lazy_mask));
                let name = format!("seed {seed}, {batch} x {len}, masked {masked}");
                let want = model.forward(&ids, &segments, mask)?;
                check.compare(&name, &want, &lazy.forward(&lazy_ids, &lazy_segments, lazy_mask)?)?;
                let want = with_head.forward(&ids, &segments, mask)?;
                let got = lazy_with_head.forward(&lazy_ids, &lazy_segments, lazy_mask)?;
                check.compare(&format!("{name}, with head"), &want, &got)?;
            }
        }
    }
    Ok(())
}

const TEXTS: [&str; 3] = ["A man is eating food.", "Rain fell all night on the old stone bridge.", "Yes."];

/// The encoder in `dir`, on sentences of different lengths.
pub fn real(check: &mut Check, dir: &Path) -> Result<()> {
    let dir = ModelDir::open(dir)?;
    let config = std::fs::read_to_string(dir.file("config.json")?)?;
    let vb = || dir.var_builder(DType::F32, &Device::Cpu);
    let model = eager::BertModel::load(vb()?, &serde_json::from_str(&config)?)?;
    let lazy = ported::BertModel::load(vb()?.into(), &serde_json::from_str(&config)?)?;
    check.another_model();
    let tokenizer = dir.tokenizer()?;
    let mut texts = Vec::new();
    for text in TEXTS {
        texts.push(tokenizer.encode_for_model(text)?);
    }
    let len = texts.iter().map(Vec::len).max().unwrap_or(0);
    let mut mask = Vec::new();
    for text in &mut texts {
        mask.push((0..len).map(|at| u32::from(at < text.len())).collect::<Vec<_>>());
        text.resize(len, 0);
    }
    let (ids, mask) = (Tensor::new(texts, &Device::Cpu)?, Tensor::new(mask, &Device::Cpu)?);
    let segments = ids.zeros_like()?;
    let want = model.forward(&ids, &segments, Some(&mask))?;
    let got = lazy.forward(&LazyTensor::from(&ids), &LazyTensor::from(&segments), Some(&LazyTensor::from(&mask)))?;
    check.compare("three sentences", &want, &got)
}
