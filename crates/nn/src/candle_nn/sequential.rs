//! Modules one after the other.

use super::func::func;
use crate::candle::{Module, Result, Tensor};

/// Modules, each applied to the result of the one before.
#[derive(Default)]
pub struct Sequential {
    layers: Vec<Box<dyn Module>>,
}

impl std::fmt::Debug for Sequential {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sequential").field("layers", &self.layers.len()).finish()
    }
}

/// No modules yet.
#[must_use]
pub fn seq() -> Sequential {
    Sequential::default()
}

impl Sequential {
    /// The number of modules.
    #[must_use]
    pub fn len(&self) -> i64 {
        self.layers.len() as i64
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.layers.is_empty()
    }

    /// With one more module at the end.
    #[allow(clippy::should_implement_trait)] // Candle's name
    #[must_use]
    pub fn add<M: Module + 'static>(mut self, layer: M) -> Self {
        self.layers.push(Box::new(layer));
        self
    }

    /// With one more function at the end.
    #[must_use]
    pub fn add_fn<F: Fn(&Tensor) -> Result<Tensor> + Send + Sync + 'static>(self, f: F) -> Self {
        self.add(func(f))
    }

    /// The results of all modules, in order.
    ///
    /// # Errors
    /// As the modules.
    #[track_caller]
    pub fn forward_all(&self, xs: &Tensor) -> Result<Vec<Tensor>> {
        let mut all: Vec<Tensor> = Vec::with_capacity(self.layers.len());
        for layer in &self.layers {
            let next = layer.forward(all.last().unwrap_or(xs))?;
            all.push(next);
        }
        Ok(all)
    }
}

impl Module for Sequential {
    #[track_caller]
    fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        let mut xs = xs.clone();
        for layer in &self.layers {
            xs = layer.forward(&xs)?;
        }
        Ok(xs)
    }
}
