//! Low-rank adapters on the decoder's projections.

use super::ModelConfig;
use crate::error::{Result, TrainingError};
use crate::training::{LoRAAdapter, LoRAAdapterConfig, LoRALayer, ProjectionSizes, TargetModule};
use candle_core::Device;
use candle_lazy_exec::RandomKey;
use candle_lazy_nn::models::DecoderBlock;
use candle_lazy_nn::{Linear, LoraWeights};

impl LoRAAdapter {
    /// Layers of the widths that the projections of a model have: keys and values narrower than queries where it groups heads.
    ///
    /// # Errors
    /// As [`ModelConfig::validate`] and [`LoRALayer::new`].
    pub fn for_model(model: &ModelConfig, config: &LoRAAdapterConfig, device: &Device) -> Result<Self> {
        model.validate()?;
        let sizes = ProjectionSizes {
            hidden: model.hidden_size,
            query: model.hidden_size,
            key_value: model.num_kv_heads() * model.head_dim(),
            intermediate: model.intermediate_size,
        };
        Self::with_sizes(&sizes, model.num_hidden_layers, config, device)
    }
}

/// The block with the adapter's layers for it on its projections; each acts on what its projection is given. Variables of the adapter are
/// shared, and in training mode its dropout acts.
///
/// # Errors
/// [`TrainingError::InvalidConfig`], naming the projection, where a layer does not fit.
#[track_caller]
pub(super) fn adapted(block: &DecoderBlock, index: usize, adapter: &LoRAAdapter) -> Result<DecoderBlock> {
    let mut block = block.clone();
    for target in &adapter.config().target_modules {
        let (Some(layer), Some(projection)) = (adapter.get_layer(index, target), block.projection_mut(target.name()))
        else {
            continue;
        };
        let factors = factors(layer, index, target, projection.base())?;
        projection.set_adapter(Some(factors))?;
    }
    Ok(block)
}

/// The factors for a projection.
///
/// [`LoRAAdapter::new`] knows no grouped heads and makes keys and values as wide as the model. Of such a B the first columns are used,
/// as many as the projection has results; the others do nothing and get no gradient.
#[track_caller]
fn factors(layer: &LoRALayer, index: usize, target: &TargetModule, base: &Linear) -> Result<LoraWeights> {
    let (input, output) = (base.in_features(), base.out_features());
    let (a, b) = (layer.lora_a_tensor(), layer.lora_b_tensor());
    let name = target.name();
    let grouped = matches!(target, TargetModule::KProj | TargetModule::VProj)
        && layer.out_features() == layer.in_features()
        && layer.out_features() > output;
    if layer.in_features() != input || (layer.out_features() != output && !grouped) {
        let reason = format!(
            "the adapter's layers.{index}.{name} maps {} to {}, the model's {name} maps {input} to {output}",
            layer.in_features(),
            layer.out_features()
        );
        return Err(TrainingError::InvalidConfig { reason }.into());
    }
    if a.dtype() != base.weight().dtype() {
        let reason = format!(
            "the adapter's layers.{index}.{name} is {:?}, the model {:?}: load the model in {:?}",
            a.dtype(),
            base.weight().dtype(),
            a.dtype()
        );
        return Err(TrainingError::InvalidConfig { reason }.into());
    }
    let b = if grouped { b.narrow(1, 0, output)? } else { b.clone() };
    let factors = LoraWeights::new(a, b, f64::from(layer.config().scaling()))?;
    let dropout = f64::from(layer.config().dropout);
    if layer.is_training() && dropout > 0.0 {
        return Ok(factors.with_dropout(dropout, RandomKey::new(rand::random()))?);
    }
    Ok(factors)
}
