//! Models that adapters can be put on.

use super::LoRAAdapter;
use crate::error::Result;
use std::sync::Arc;

/// A model whose forward pass adds what an adapter computes.
pub trait ApplyAdapter {
    /// Puts `adapter` on the model, in place of one that it has.
    ///
    /// # Errors
    /// Where the adapter does not fit the model.
    fn apply_adapter(&mut self, adapter: Arc<LoRAAdapter>) -> Result<()>;

    /// Takes the adapter off; a model without one stays as it is.
    ///
    /// # Errors
    /// Where the model cannot be without.
    fn remove_adapter(&mut self) -> Result<()>;

    /// Whether the model has an adapter.
    fn has_adapter(&self) -> bool;
}
