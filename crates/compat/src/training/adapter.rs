//! A set of low-rank layers for the projections of a transformer.

use super::{LoRAConfig, LoRALayer};
use crate::error::Result;
use candle_core::{Device, Tensor};

/// A projection of a transformer's layer.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum TargetModule {
    /// Queries.
    QProj,
    /// Keys.
    KProj,
    /// Values.
    VProj,
    /// What the attention gives back.
    OProj,
    /// The gate of the feed-forward block.
    GateProj,
    /// Its way up.
    UpProj,
    /// Its way down.
    DownProj,
}

impl TargetModule {
    const ALL: [Self; 7] =
        [Self::QProj, Self::KProj, Self::VProj, Self::OProj, Self::GateProj, Self::UpProj, Self::DownProj];

    /// The name that weights of models have: `q_proj` and so on.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::QProj => "q_proj",
            Self::KProj => "k_proj",
            Self::VProj => "v_proj",
            Self::OProj => "o_proj",
            Self::GateProj => "gate_proj",
            Self::UpProj => "up_proj",
            Self::DownProj => "down_proj",
        }
    }

    /// The projection of that name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|target| target.name() == name)
    }
}

/// Which projections are adapted, and how.
#[derive(Debug, Clone)]
pub struct LoRAAdapterConfig {
    /// As [`LoRAConfig::rank`].
    pub rank: usize,
    /// As [`LoRAConfig::alpha`].
    pub alpha: f32,
    /// As [`LoRAConfig::dropout`].
    pub dropout: f32,
    /// The projections, of every layer. Queries and values by default.
    pub target_modules: Vec<TargetModule>,
}

impl Default for LoRAAdapterConfig {
    fn default() -> Self {
        let LoRAConfig { rank, alpha, dropout } = LoRAConfig::default();
        Self { rank, alpha, dropout, target_modules: vec![TargetModule::QProj, TargetModule::VProj] }
    }
}

impl LoRAAdapterConfig {
    /// The numbers of each layer.
    #[must_use]
    pub const fn to_lora_config(&self) -> LoRAConfig {
        LoRAConfig { rank: self.rank, alpha: self.alpha, dropout: self.dropout }
    }

    /// Whether `target` is adapted.
    #[must_use]
    pub fn is_target(&self, target: &TargetModule) -> bool {
        self.target_modules.contains(target)
    }
}

/// The widths that the projections of a model map between.
///
/// With grouped-query attention keys and values are narrower than queries, and queries need not be as wide as the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProjectionSizes {
    /// The model's width.
    pub hidden: usize,
    /// Query heads times the size of a head.
    pub query: usize,
    /// Key/value heads times the size of a head.
    pub key_value: usize,
    /// The width of the feed-forward block.
    pub intermediate: usize,
}

impl ProjectionSizes {
    /// Queries, keys and values as wide as the model, as [`LoRAAdapter::new`] has them.
    #[must_use]
    pub const fn uniform(hidden: usize, intermediate: usize) -> Self {
        Self { hidden, query: hidden, key_value: hidden, intermediate }
    }

    /// The width of a projection's input and of its result.
    #[must_use]
    pub const fn of(&self, target: &TargetModule) -> (usize, usize) {
        match target {
            TargetModule::QProj => (self.hidden, self.query),
            TargetModule::KProj | TargetModule::VProj => (self.hidden, self.key_value),
            TargetModule::OProj => (self.query, self.hidden),
            TargetModule::GateProj | TargetModule::UpProj => (self.hidden, self.intermediate),
            TargetModule::DownProj => (self.intermediate, self.hidden),
        }
    }
}

/// A low-rank layer for each adapted projection of each layer of a model.
///
/// A clone has the same variables: what is trained through one is seen through the other. Only [`LoRAAdapter::set_training`] is each
/// one's own.
#[derive(Debug)]
pub struct LoRAAdapter {
    /// By layer, in it by target.
    layers: Vec<(String, LoRALayer)>,
    /// Each once.
    targets: Vec<TargetModule>,
    config: LoRAAdapterConfig,
    num_layers: usize,
}

impl Clone for LoRAAdapter {
    fn clone(&self) -> Self {
        let layers = self.layers.iter().map(|(name, layer)| (name.clone(), layer.sharing_variables())).collect();
        let (targets, config) = (self.targets.clone(), self.config.clone());
        Self { layers, targets, config, num_layers: self.num_layers }
    }
}

impl LoRAAdapter {
    /// Layers for a model whose queries, keys and values are as wide as itself. [`LoRAAdapter::with_sizes`] knows other models.
    ///
    /// # Errors
    /// As [`LoRALayer::new`].
    pub fn new(
        hidden_size: usize,
        intermediate_size: usize,
        num_layers: usize,
        config: &LoRAAdapterConfig,
        device: &Device,
    ) -> Result<Self> {
        Self::with_sizes(&ProjectionSizes::uniform(hidden_size, intermediate_size), num_layers, config, device)
    }

    /// Layers of these widths.
    ///
    /// # Errors
    /// As [`LoRALayer::new`].
    pub fn with_sizes(
        sizes: &ProjectionSizes,
        num_layers: usize,
        config: &LoRAAdapterConfig,
        device: &Device,
    ) -> Result<Self> {
        let lora = config.to_lora_config();
        lora.validate()?;
        let mut targets: Vec<TargetModule> = Vec::new();
        for target in &config.target_modules {
            if !targets.contains(target) {
                targets.push(target.clone());
            }
        }
        let mut layers = Vec::new();
        for index in 0..num_layers {
            for target in &targets {
                let (input, output) = sizes.of(target);
                let name = format!("layers.{index}.{}", target.name());
                layers.push((name, LoRALayer::new(input, output, &lora, device)?));
            }
        }
        Ok(Self { layers, targets, config: config.clone(), num_layers })
    }

    /// What the projection `target` of layer `layer_idx` has to add for the input (…, in) that it is given itself: (…, out), or
    /// `None` where it is not adapted.
    ///
    /// # Errors
    /// As [`LoRALayer::forward`].
    #[track_caller]
    pub fn forward(&self, layer_idx: usize, target: &TargetModule, input: &Tensor) -> Result<Option<Tensor>> {
        match self.get_layer(layer_idx, target) {
            Some(layer) => Ok(Some(layer.forward(input)?)),
            None => Ok(None),
        }
    }

    /// Elements of all A and B.
    #[must_use]
    pub fn num_trainable_parameters(&self) -> usize {
        self.layers.iter().map(|(_, layer)| layer.num_parameters()).sum()
    }

    /// What of `total_params` is not trained; 0 where there are fewer than trained ones.
    #[must_use]
    pub fn num_frozen_parameters(&self, total_params: usize) -> usize {
        total_params.saturating_sub(self.num_trainable_parameters())
    }

    /// What the adapter was made with.
    #[must_use]
    pub const fn config(&self) -> &LoRAAdapterConfig {
        &self.config
    }

    /// Layers of the model.
    #[must_use]
    pub const fn num_layers(&self) -> usize {
        self.num_layers
    }

    /// All low-rank layers with their names (`layers.0.q_proj`), by layer, in it in the order of the config.
    pub fn layers(&self) -> impl Iterator<Item = (&String, &LoRALayer)> {
        self.layers.iter().map(|(name, layer)| (name, layer))
    }

    /// The low-rank layer of a projection, where it is adapted.
    #[must_use]
    pub fn get_layer(&self, layer_idx: usize, target: &TargetModule) -> Option<&LoRALayer> {
        let place = self.targets.iter().position(|known| known == target)?;
        let at = layer_idx.checked_mul(self.targets.len())?.checked_add(place)?;
        self.layers.get(at).map(|(_, layer)| layer)
    }

    /// Switches dropout on (as in a new adapter) or off, in all layers.
    pub fn set_training(&mut self, training: bool) {
        for (_, layer) in &mut self.layers {
            layer.set_training(training);
        }
    }

    /// The weight (out, in) of a projection with its adapter in it: base + (A·B)ᵀ·scaling; `base` itself where it is not adapted.
    ///
    /// # Errors
    /// For a base of another shape, dtype or device.
    #[track_caller]
    pub fn merge_weights(&self, base: &Tensor, layer_idx: usize, target: &TargetModule) -> Result<Tensor> {
        let Some(layer) = self.get_layer(layer_idx, target) else {
            return Ok(base.clone());
        };
        let product = candle_lazy_ops::matmul(layer.lora_a_tensor(), layer.lora_b_tensor())?;
        let delta = product.affine(f64::from(layer.config().scaling()), 0.0)?.t()?;
        Ok(base.add(&delta)?)
    }
}
