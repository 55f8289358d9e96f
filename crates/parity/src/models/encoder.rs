//! The sentence encoder.

use super::measure::{measure, relative_difference, Way};
use super::{ModelRow, TOLERANCE};
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use candle_lazy_exec::EvalReport;
use candle_lazy_nn::models::SentenceEncoder;
use candle_lazy_nn::ModelDir;
use candle_transformers::models::bert;
use std::path::Path;

/// Two sentences that mean the same and one that does not.
pub const SENTENCES: [&str; 3] = ["A man is eating food.", "A man is eating a meal.", "The stock market fell sharply."];

/// What their cosines are (first with second, first with third), to four digits.
const COSINES: [f64; 2] = [0.9262, -0.0044];

/// The cosine of the angle between two vectors.
#[must_use]
pub fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum::<f64>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

fn file_error(path: &Path, detail: &dyn std::fmt::Display) -> Error {
    Error::File { path: path.display().to_string(), detail: detail.to_string() }
}

/// The texts as rows of ids of one length, and the mask.
pub(super) struct Batch {
    ids: Tensor,
    segments: Tensor,
    mask: Tensor,
}

impl Batch {
    pub(super) fn new(texts: &[Vec<u32>], pad: u32) -> Result<Self> {
        let longest = texts.iter().map(Vec::len).max().unwrap_or(0);
        let mut ids = Vec::new();
        let mut mask = Vec::new();
        for text in texts {
            ids.extend(text.iter().copied().chain(std::iter::repeat_n(pad, longest - text.len())));
            mask.extend((0..longest).map(|at| if at < text.len() { 1f32 } else { 0f32 }));
        }
        let shape = (texts.len(), longest);
        let ids = Tensor::from_vec(ids, shape, &Device::Cpu)?;
        let segments = ids.zeros_like()?;
        Ok(Self { ids, segments, mask: Tensor::from_vec(mask, shape, &Device::Cpu)? })
    }
}

/// Mean pooling and normalisation, by eager Candle.
pub(super) fn eager_embed(model: &bert::BertModel, batch: &Batch) -> Result<Tensor> {
    let hidden = model.forward(&batch.ids, &batch.segments, Some(&batch.mask))?;
    let sum = hidden.broadcast_mul(&batch.mask.unsqueeze(2)?)?.sum(1)?;
    let mean = sum.broadcast_div(&batch.mask.sum_keepdim(1)?)?;
    Ok(mean.broadcast_div(&mean.sqr()?.sum_keepdim(1)?.sqrt()?)?)
}

struct Encoder {
    lazy: SentenceEncoder,
    ids: Vec<Vec<u32>>,
    pad: u32,
}

fn load(dir: &ModelDir) -> Result<Encoder> {
    let lazy = dir.sentence_encoder(DType::F32, &Device::Cpu)?;
    let tokenizer = dir.tokenizer()?;
    let ids = SENTENCES.iter().map(|s| tokenizer.encode_for_model(s)).collect::<candle_lazy_nn::Result<Vec<_>>>()?;
    let pad = lazy.model().pad_token_id();
    Ok(Encoder { lazy, ids, pad })
}

/// The eager model, or why there is none.
pub(super) fn eager(dir: &ModelDir) -> Result<std::result::Result<bert::BertModel, String>> {
    let path = dir.file("config.json")?;
    let text = std::fs::read_to_string(&path).map_err(|e| file_error(&path, &e))?;
    let config: bert::Config = match serde_json::from_str(&text) {
        Ok(config) => config,
        // the lazy model was loaded with the same file: what is missing in it is missing for candle-transformers alone
        Err(error) => return Ok(Err(format!("candle-transformers' bert does not take the config: {error}"))),
    };
    Ok(Ok(bert::BertModel::load(dir.var_builder(DType::F32, &Device::Cpu)?, &config)?))
}

struct Eager<'a> {
    model: &'a bert::BertModel,
    ids: &'a [Vec<u32>],
    pad: u32,
}

impl Way for Eager<'_> {
    fn begin(&mut self) -> Result<()> {
        Ok(())
    }

    fn step(&mut self, _: usize) -> Result<Option<EvalReport>> {
        eager_embed(self.model, &Batch::new(self.ids, self.pad)?)?;
        Ok(None)
    }

    fn end(&mut self) {}
}

impl Way for Encoder {
    fn begin(&mut self) -> Result<()> {
        Ok(())
    }

    fn step(&mut self, _: usize) -> Result<Option<EvalReport>> {
        Ok(Some(self.lazy.embed(&self.ids)?.eval_with_report()?.1))
    }

    fn end(&mut self) {}
}

/// The three sentences as one batch, eager and lazy.
pub(super) fn compare(dir: &ModelDir, repetitions: usize) -> Result<Vec<ModelRow>> {
    let mut encoder = load(dir)?;
    let (ids, pad) = (encoder.ids.clone(), encoder.pad);
    let model = eager(dir)?;
    let compared = match &model {
        Ok(model) => {
            let want = eager_embed(model, &Batch::new(&ids, pad)?)?.flatten_all()?.to_vec1::<f32>()?;
            let got = encoder.lazy.embed(&ids)?.eval()?.flatten_all()?.to_vec1::<f32>()?;
            let difference = relative_difference(&got, &want);
            Ok((difference, difference <= TOLERANCE))
        }
        Err(why) => Err(why.clone()),
    };
    let mut eager = model.as_ref().ok().map(|model| Eager { model, ids: &ids, pad });
    let eager = eager.as_mut().map(|eager| eager as &mut dyn Way);
    Ok(vec![measure(repetitions, 1, eager, &mut encoder)?.row("encoder, 3 sentences".into(), compared)])
}

/// The similarity of the three sentences.
pub(super) fn facts(dir: &ModelDir) -> Result<Vec<(String, Option<String>)>> {
    let encoder = load(dir)?;
    let rows = encoder.lazy.embed(&encoder.ids)?.to_vec2::<f32>()?;
    let [first, others @ ..] = rows.as_slice() else {
        return Err(Error::NoTwin("no embedding".into()));
    };
    Ok(others
        .iter()
        .zip(COSINES)
        .zip(&SENTENCES[1..])
        .map(|((other, want), text)| {
            let got = cosine(first, other);
            // four digits were written down
            let near = (got - want).abs() <= 5.1e-5;
            let wrong = (!near).then(|| format!("{got:.5}"));
            (format!("the cosine of {:?} and {text:?} is {want}", SENTENCES[0]), wrong)
        })
        .collect())
}
