//! The table of token vectors.

use super::var_builder::VarBuilder;
use crate::candle::{Module, Result, Tensor};
use crate::scope;
use candle_nn::Init;
use std::sync::Arc;

/// Rows of a table (vocab, hidden), picked by ids of any shape.
#[derive(Clone, Debug)]
pub struct Embedding {
    embeddings: Tensor,
    hidden_size: usize,
    path: Arc<str>,
}

impl Embedding {
    /// From a table (vocab, hidden).
    #[must_use]
    pub fn new(embeddings: Tensor, hidden_size: usize) -> Self {
        Self { embeddings, hidden_size, path: "".into() }
    }

    /// The table.
    #[must_use]
    pub fn embeddings(&self) -> &Tensor {
        &self.embeddings
    }

    /// The width of a row.
    #[must_use]
    pub fn hidden_size(&self) -> usize {
        self.hidden_size
    }
}

impl Module for Embedding {
    #[track_caller]
    fn forward(&self, ids: &Tensor) -> Result<Tensor> {
        let _scope = scope::enter(&self.path);
        self.embeddings.embedding(ids)
    }
}

/// An embedding from `weight` (vocab, hidden).
///
/// # Errors
/// When the tensor is missing or has another shape.
#[track_caller]
pub fn embedding(in_size: usize, out_size: usize, vb: VarBuilder<'_>) -> Result<Embedding> {
    let embeddings = vb.get_with_hints((in_size, out_size), "weight", Init::Randn { mean: 0., stdev: 1. })?;
    Ok(Embedding { embeddings, hidden_size: out_size, path: vb.prefix().into() })
}
