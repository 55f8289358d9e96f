//! Several adapters under names, one of them active.

use super::checkpoint::load_checkpoint;
use super::LoRAAdapter;
use crate::error::{Result, TrainingError};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

/// Adapters by name. At most one is active.
#[derive(Debug, Default)]
pub struct AdapterRegistry {
    adapters: BTreeMap<String, Arc<LoRAAdapter>>,
    active: Option<String>,
}

impl AdapterRegistry {
    /// A registry without adapters.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Fills `adapter` from a checkpoint and adds it.
    ///
    /// # Errors
    /// As [`AdapterRegistry::add_adapter`] and [`load_checkpoint`]; nothing is added then.
    pub fn load_adapter_from_checkpoint(
        &mut self,
        name: String,
        mut adapter: LoRAAdapter,
        path: impl AsRef<Path>,
    ) -> Result<()> {
        self.refuse_known(&name)?;
        load_checkpoint(&mut adapter, path)?;
        self.add_adapter(name, adapter)
    }

    /// Adds an adapter; it is not active.
    ///
    /// # Errors
    /// [`TrainingError::StateError`] where the name is taken: [`AdapterRegistry::unload_adapter`] frees it.
    pub fn add_adapter(&mut self, name: String, adapter: LoRAAdapter) -> Result<()> {
        self.refuse_known(&name)?;
        self.adapters.insert(name, Arc::new(adapter));
        Ok(())
    }

    fn refuse_known(&self, name: &str) -> Result<()> {
        if self.adapters.contains_key(name) {
            return Err(TrainingError::state(format_args!("adapter '{name}' already exists")).into());
        }
        Ok(())
    }

    /// Removes an adapter; where it was active, none is active then.
    ///
    /// # Errors
    /// [`TrainingError::StateError`] for a name that is not known.
    pub fn unload_adapter(&mut self, name: &str) -> Result<()> {
        if self.adapters.remove(name).is_none() {
            return Err(self.unknown(name).into());
        }
        if self.active.as_deref() == Some(name) {
            self.active = None;
        }
        Ok(())
    }

    fn unknown(&self, name: &str) -> TrainingError {
        TrainingError::state(format_args!("adapter '{name}' not found, known are {:?}", self.list_adapters()))
    }

    /// Makes an adapter the active one.
    ///
    /// # Errors
    /// [`TrainingError::StateError`] for a name that is not known; what was active stays so.
    pub fn activate(&mut self, name: &str) -> Result<()> {
        if !self.adapters.contains_key(name) {
            return Err(self.unknown(name).into());
        }
        self.active = Some(name.to_string());
        Ok(())
    }

    /// No adapter is active any more.
    pub fn deactivate(&mut self) {
        self.active = None;
    }

    /// The name of the active adapter.
    #[must_use]
    pub fn active_adapter(&self) -> Option<&str> {
        self.active.as_deref()
    }

    /// The active adapter.
    #[must_use]
    pub fn get_active(&self) -> Option<&Arc<LoRAAdapter>> {
        self.adapters.get(self.active.as_deref()?)
    }

    /// The adapter of that name.
    #[must_use]
    pub fn get_adapter(&self, name: &str) -> Option<&Arc<LoRAAdapter>> {
        self.adapters.get(name)
    }

    /// All names, sorted.
    #[must_use]
    pub fn list_adapters(&self) -> Vec<String> {
        self.adapters.keys().cloned().collect()
    }

    /// Number of adapters.
    #[must_use]
    pub fn len(&self) -> usize {
        self.adapters.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.adapters.is_empty()
    }
}
