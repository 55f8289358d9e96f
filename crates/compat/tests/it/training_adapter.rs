//! Adapters, their registry, and the trait of models that take one.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // tests fail so, outside of their own functions too

use crate::training::{assert_near, numbers, tensor, wide, ALL};
use candle_core::{DType, Device, Tensor};
use candle_lazy_compat::training::{
    AdapterRegistry, ApplyAdapter, LoRAAdapter, LoRAAdapterConfig, ProjectionSizes, TargetModule,
};
use candle_lazy_compat::Result;
use std::sync::Arc;

fn config(targets: &[TargetModule]) -> LoRAAdapterConfig {
    LoRAAdapterConfig { rank: 2, alpha: 6.0, dropout: 0.0, target_modules: targets.to_vec() }
}

fn adapter(targets: &[TargetModule]) -> LoRAAdapter {
    LoRAAdapter::new(8, 12, 2, &config(targets), &Device::Cpu).unwrap()
}

#[test]
fn targets_and_their_names() {
    let names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];
    for (target, name) in ALL.iter().zip(names) {
        assert_eq!(target.name(), name);
        assert_eq!(TargetModule::from_name(name).as_ref(), Some(target));
    }
    for name in ["", "q", "Q_PROJ", "lm_head"] {
        assert_eq!(TargetModule::from_name(name), None);
    }
}

#[test]
fn the_default_config() {
    let config = LoRAAdapterConfig::default();
    assert_eq!((config.rank, config.alpha, config.dropout), (8, 16.0, 0.0));
    assert_eq!(config.target_modules, [TargetModule::QProj, TargetModule::VProj]);
    assert!(config.is_target(&TargetModule::QProj) && !config.is_target(&TargetModule::KProj));
    let lora = LoRAAdapterConfig { rank: 4, alpha: 2.0, dropout: 0.5, ..config }.to_lora_config();
    assert_eq!((lora.rank, lora.alpha, lora.dropout), (4, 2.0, 0.5));
}

#[test]
fn widths_of_every_projection() {
    let adapter = adapter(&ALL);
    let widths = [(8, 8), (8, 8), (8, 8), (8, 8), (8, 12), (8, 12), (12, 8)];
    for index in 0..2 {
        for (target, (input, output)) in ALL.iter().zip(widths) {
            let layer = adapter.get_layer(index, target).unwrap();
            assert_eq!((layer.in_features(), layer.out_features()), (input, output), "{target:?}");
        }
    }
    assert_eq!(adapter.num_layers(), 2);
    assert_eq!(adapter.config().target_modules, ALL);
    // rank 2: four of 16, three of 20, each in two layers
    let trained = 2 * 2 * (4 * 16 + 3 * 20);
    assert_eq!(adapter.num_trainable_parameters(), trained);
    assert_eq!(adapter.num_frozen_parameters(1000), 1000 - trained);
    assert_eq!(adapter.num_frozen_parameters(10), 0);
}

#[test]
fn widths_of_grouped_queries() {
    let sizes = ProjectionSizes { hidden: 8, query: 16, key_value: 4, intermediate: 12 };
    let adapter = LoRAAdapter::with_sizes(&sizes, 1, &config(&ALL), &Device::Cpu).unwrap();
    let widths = [(8, 16), (8, 4), (8, 4), (16, 8), (8, 12), (8, 12), (12, 8)];
    for (target, (input, output)) in ALL.iter().zip(widths) {
        assert_eq!(sizes.of(target), (input, output));
        let layer = adapter.get_layer(0, target).unwrap();
        assert_eq!((layer.in_features(), layer.out_features()), (input, output), "{target:?}");
    }
    let same = ProjectionSizes { hidden: 8, query: 8, key_value: 8, intermediate: 12 };
    assert_eq!(ProjectionSizes::uniform(8, 12), same);
}

#[test]
fn layers_have_names_and_an_order() {
    // a target that is named twice counts once
    let adapter = adapter(&[TargetModule::VProj, TargetModule::DownProj, TargetModule::VProj]);
    let names: Vec<&str> = adapter.layers().map(|(name, _)| name.as_str()).collect();
    let want = ["layers.0.v_proj", "layers.0.down_proj", "layers.1.v_proj", "layers.1.down_proj"];
    assert_eq!(names, want);
    assert!(adapter.get_layer(0, &TargetModule::QProj).is_none());
    assert!(adapter.get_layer(2, &TargetModule::VProj).is_none());
    assert!(adapter.get_layer(usize::MAX, &TargetModule::DownProj).is_none());
    let none = LoRAAdapter::new(8, 12, 0, &config(&ALL), &Device::Cpu).unwrap();
    assert_eq!((none.layers().count(), none.num_trainable_parameters()), (0, 0));
}

#[test]
fn a_config_that_does_not_fit() {
    let wide = LoRAAdapterConfig { rank: 9, ..config(&ALL) };
    let error = LoRAAdapter::new(8, 12, 2, &wide, &Device::Cpu).unwrap_err().to_string();
    assert!(error.contains("invalid training configuration") && error.contains("rank 9"), "{error}");
    // also where there is no layer that would say so
    let zero = LoRAAdapterConfig { rank: 0, ..config(&ALL) };
    let error = LoRAAdapter::new(8, 12, 0, &zero, &Device::Cpu).unwrap_err().to_string();
    assert!(error.contains("rank must be greater than 0"), "{error}");
}

#[test]
fn forward_is_the_layers() {
    let adapter = adapter(&[TargetModule::QProj, TargetModule::UpProj]);
    let layer = adapter.get_layer(1, &TargetModule::UpProj).unwrap();
    layer.lora_b().set(&tensor(&[2, 12], 3)).unwrap();
    let x = tensor(&[2, 3, 8], 1);
    let y = adapter.forward(1, &TargetModule::UpProj, &x).unwrap().unwrap();
    assert_eq!(y.dims(), [2, 3, 12]);
    let want = wide(&layer.forward(&x).unwrap());
    assert!(want.iter().any(|v| v.abs() > 0.1));
    assert_near(&y, &want, 0.0);
    assert!(adapter.forward(1, &TargetModule::KProj, &x).unwrap().is_none());
    assert!(adapter.forward(2, &TargetModule::QProj, &x).unwrap().is_none());
    assert!(adapter.forward(0, &TargetModule::QProj, &tensor(&[2, 7], 1)).is_err());
}

#[test]
fn merged_weights() {
    let adapter = adapter(&[TargetModule::GateProj]);
    let layer = adapter.get_layer(0, &TargetModule::GateProj).unwrap();
    layer.lora_a().set(&tensor(&[8, 2], 2)).unwrap();
    layer.lora_b().set(&tensor(&[2, 12], 3)).unwrap();
    let base = tensor(&[12, 8], 4);
    let merged = adapter.merge_weights(&base, 0, &TargetModule::GateProj).unwrap();
    assert_eq!(merged.dims(), [12, 8]);
    let (a, b, w) = (numbers(16, 2), numbers(24, 3), numbers(96, 4));
    // base(o, i) + 3·Σ a(i, r)·b(r, o)
    let at = |o: usize, i: usize| w[o * 8 + i] + 3.0 * (0..2).map(|r| a[i * 2 + r] * b[r * 12 + o]).sum::<f64>();
    let want: Vec<f64> = (0..96).map(|n| at(n / 8, n % 8)).collect();
    assert_near(&merged, &want, 1e-6);
    // x·Wᵀ + forward(x) = x·mergedᵀ
    let x = tensor(&[3, 8], 1);
    let sum = x.matmul(&base.t().unwrap()).unwrap() + layer.forward(&x).unwrap();
    assert_near(&x.matmul(&merged.t().unwrap()).unwrap(), &wide(&sum.unwrap()), 1e-5);
    for (index, target) in [(0, TargetModule::QProj), (2, TargetModule::GateProj)] {
        let same = adapter.merge_weights(&base, index, &target).unwrap();
        assert_eq!(same.id(), base.id());
    }
    let error = adapter.merge_weights(&tensor(&[8, 12], 4), 0, &TargetModule::GateProj).unwrap_err().to_string();
    assert!(error.contains("shape mismatch") && error.contains("[8, 12]"), "{error}");
}

#[test]
fn a_clone_has_the_same_variables() {
    let config = LoRAAdapterConfig { dropout: 0.5, ..config(&[TargetModule::QProj]) };
    let mut adapter = LoRAAdapter::new(8, 12, 2, &config, &Device::Cpu).unwrap();
    let clone = adapter.clone();
    let (old, new) = (adapter.get_layer(1, &TargetModule::QProj).unwrap(), clone.get_layer(1, &TargetModule::QProj));
    old.lora_b().set(&tensor(&[2, 8], 3)).unwrap();
    assert_near(new.unwrap().lora_b_tensor(), &numbers(16, 3), 0.0);
    assert_eq!(new.unwrap().lora_a_tensor().id(), old.lora_a_tensor().id());
    adapter.set_training(false);
    assert!(adapter.layers().all(|(_, layer)| !layer.is_training()));
    assert!(clone.layers().all(|(_, layer)| layer.is_training()));
}

#[test]
fn a_registry_from_empty_to_empty() {
    let mut registry = AdapterRegistry::new();
    assert!(registry.is_empty() && registry.list_adapters().is_empty());
    assert_eq!(AdapterRegistry::new().list_adapters().len(), registry.len());
    registry.add_adapter("law".to_string(), adapter(&[TargetModule::QProj])).unwrap();
    registry.add_adapter("code".to_string(), adapter(&[TargetModule::VProj])).unwrap();
    assert_eq!((registry.len(), registry.is_empty()), (2, false));
    assert_eq!(registry.list_adapters(), ["code", "law"]);
    assert!(registry.active_adapter().is_none() && registry.get_active().is_none());
    registry.activate("law").unwrap();
    assert_eq!(registry.active_adapter(), Some("law"));
    let active = registry.get_active().unwrap();
    assert!(Arc::ptr_eq(active, registry.get_adapter("law").unwrap()));
    assert!(active.config().is_target(&TargetModule::QProj));
    registry.activate("code").unwrap();
    assert_eq!(registry.active_adapter(), Some("code"));
    registry.deactivate();
    assert!(registry.get_active().is_none());
    registry.activate("law").unwrap();
    registry.unload_adapter("code").unwrap();
    assert_eq!(registry.active_adapter(), Some("law"));
    registry.unload_adapter("law").unwrap();
    assert!(registry.active_adapter().is_none() && registry.get_adapter("law").is_none() && registry.is_empty());
    assert!(AdapterRegistry::default().is_empty());
}

#[test]
fn names_that_a_registry_does_not_know() {
    let mut registry = AdapterRegistry::new();
    registry.add_adapter("law".to_string(), adapter(&[TargetModule::QProj])).unwrap();
    registry.activate("law").unwrap();
    for error in [registry.activate("code").unwrap_err(), registry.unload_adapter("code").unwrap_err()] {
        let text = error.to_string();
        assert!(text.contains("training state error") && text.contains("'code' not found"), "{text}");
    }
    assert_eq!(registry.active_adapter(), Some("law"));
    let error = registry.add_adapter("law".to_string(), adapter(&[TargetModule::VProj])).unwrap_err().to_string();
    assert!(error.contains("training state error") && error.contains("'law' already exists"), "{error}");
    assert!(registry.get_adapter("law").unwrap().config().is_target(&TargetModule::QProj));
}

/// A model of one projection.
struct Model {
    weight: Tensor,
    adapter: Option<Arc<LoRAAdapter>>,
}

impl ApplyAdapter for Model {
    fn apply_adapter(&mut self, adapter: Arc<LoRAAdapter>) -> Result<()> {
        self.adapter = Some(adapter);
        Ok(())
    }

    fn remove_adapter(&mut self) -> Result<()> {
        self.adapter = None;
        Ok(())
    }

    fn has_adapter(&self) -> bool {
        self.adapter.is_some()
    }
}

#[test]
fn a_model_with_an_adapter_that_is_not_its_own() {
    let mut model = Model { weight: Tensor::zeros((8, 8), DType::F32, &Device::Cpu).unwrap(), adapter: None };
    let adapter = Arc::new(adapter(&[TargetModule::QProj]));
    let taker: &mut dyn ApplyAdapter = &mut model;
    assert!(!taker.has_adapter());
    taker.apply_adapter(Arc::clone(&adapter)).unwrap();
    assert!(taker.has_adapter());
    adapter.get_layer(0, &TargetModule::QProj).unwrap().lora_b().set(&tensor(&[2, 8], 3)).unwrap();
    let on = model.adapter.as_ref().unwrap();
    let merged = on.merge_weights(&model.weight, 0, &TargetModule::QProj).unwrap();
    assert!(wide(&merged).iter().any(|v| v.abs() > 0.1));
    model.remove_adapter().unwrap();
    assert!(!model.has_adapter());
    assert_eq!(Arc::strong_count(&adapter), 1);
}
