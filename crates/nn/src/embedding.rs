//! The table of token vectors.

use crate::error::{Error, Result};
use crate::module::{detached, var_init, Module};
use crate::scope;
use candle_lazy_exec::LazyTensor;
use candle_nn::{Init, VarBuilder};
use std::sync::Arc;

/// Rows of a table (vocab, hidden), picked by ids.
#[derive(Debug, Clone)]
pub struct Embedding {
    table: LazyTensor,
    path: Arc<str>,
}

impl Embedding {
    /// From a table (vocab, hidden).
    ///
    /// # Errors
    /// Where the table is no matrix.
    #[track_caller]
    pub fn new(table: impl Into<LazyTensor>) -> Result<Self> {
        Self::with_path(table.into(), "")
    }

    #[track_caller]
    pub(crate) fn with_path(table: LazyTensor, path: &str) -> Result<Self> {
        if table.rank() != 2 {
            return Err(Error::module(
                "embedding",
                path,
                format_args!("the table must have shape (vocab, hidden), found {:?}", table.shape()),
            ));
        }
        Ok(Self { table, path: path.into() })
    }

    /// The same module on the same memory, whose results carry no gradient.
    ///
    /// # Errors
    /// Where a table that is not computed yet cannot be computed.
    #[track_caller]
    pub fn detached(&self) -> Result<Self> {
        Ok(Self { table: detached(&self.table)?, path: Arc::clone(&self.path) })
    }

    /// The table, (vocab, hidden).
    pub fn embeddings(&self) -> &LazyTensor {
        &self.table
    }
}

impl Module for Embedding {
    /// `xs` holds ids (u32, u8 or i64) of any shape S; the result has shape (S…, hidden).
    #[track_caller]
    fn forward(&self, xs: &LazyTensor) -> Result<LazyTensor> {
        let _scope = scope::enter(&self.path);
        Ok(self.table.embedding(xs)?)
    }
}

/// An embedding from `weight` (vocab, hidden) of the builder.
///
/// # Errors
/// Where the tensor is missing or has another shape.
#[track_caller]
pub fn embedding(vocab: usize, hidden: usize, vb: VarBuilder<'_>) -> Result<Embedding> {
    let _scope = scope::enter(&vb.prefix());
    let table = var_init(&vb, (vocab, hidden), "weight", Init::Randn { mean: 0., stdev: 1. })?;
    Embedding::with_path(table.into(), &vb.prefix())
}
