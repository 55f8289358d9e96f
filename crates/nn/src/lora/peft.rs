//! Adapters in the format of Hugging Face's PEFT: a directory with `adapter_config.json` and `adapter_model.safetensors`.
//!
//! Source: <https://huggingface.co/docs/peft/developer_guides/checkpoint>, and what PEFT 0.21 writes.

use super::adapter::{targets, LoraAdapter};
use super::{LoraConfig, LoraTargets};
use crate::error::{Error, Result};
use crate::models::CausalLm;
use crate::params::check_file;
use crate::weights::{write_whole, SafetensorsFile};
use candle_core::Shape;
use serde_json::{json, Map, Value};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";

/// Fields that change no result of an adapter that has been trained.
const WITHOUT_EFFECT: &[&str] = &[
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
];

/// Whether a field says nothing.
fn says_nothing(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.is_empty(),
        _ => false,
    }
}

/// Takes a field out of a config.
struct Fields<'a> {
    fields: Map<String, Value>,
    what: &'a str,
}

impl Fields<'_> {
    fn refuse<T>(&self, message: std::fmt::Arguments<'_>) -> Result<T> {
        Err(Error::config(self.what, message))
    }

    fn unsupported<T>(&self, name: &str, found: &Value, supported: &str) -> Result<T> {
        self.refuse(format_args!("`{name}` is {found}, which is not supported (supported: {supported})"))
    }

    fn take(&mut self, name: &str) -> Value {
        self.fields.remove(name).unwrap_or(Value::Null)
    }

    /// Refuses another value than one of these.
    fn must_be(&mut self, name: &str, allowed: &[Value]) -> Result<()> {
        let found = self.take(name);
        if allowed.contains(&found) {
            return Ok(());
        }
        let allowed: Vec<String> = allowed.iter().map(Value::to_string).collect();
        self.unsupported(name, &found, &allowed.join(", "))
    }

    fn number(&mut self, name: &str, default: f64) -> Result<f64> {
        match self.take(name) {
            Value::Null => Ok(default),
            Value::Number(number) => Ok(number.as_f64().unwrap_or(f64::NAN)),
            other => self.refuse(format_args!("`{name}` is {other}: a number is needed")),
        }
    }

    fn flag(&mut self, name: &str) -> Result<bool> {
        match self.take(name) {
            Value::Null => Ok(false),
            Value::Bool(flag) => Ok(flag),
            other => self.refuse(format_args!("`{name}` is {other}: true or false is needed")),
        }
    }
}

impl LoraConfig {
    /// From the `adapter_config.json` of a directory, which must have the adapter's weights too; they are not read.
    ///
    /// # Errors
    /// [`Error::MissingFile`] where one of the two files is not there, [`Error::Io`], and as [`LoraConfig::from_peft`].
    pub fn from_dir(dir: impl AsRef<Path>) -> Result<Self> {
        let dir = dir.as_ref();
        for name in [CONFIG, WEIGHTS] {
            if !dir.join(name).is_file() {
                return Err(Error::MissingFile { dir: dir.to_path_buf(), expected: name.to_string() });
            }
        }
        let path = dir.join(CONFIG);
        let text = std::fs::read_to_string(&path).map_err(|e| Error::io(&path, e))?;
        Self::from_peft(&text, &path.display().to_string())
    }

    /// From the text of an `adapter_config.json`; `what` names it in errors.
    ///
    /// # Errors
    /// [`Error::Config`] for what is no such config, and naming the field, known or not, that asks for something that is not supported:
    /// a field that is not known may be null, false or empty.
    pub fn from_peft(text: &str, what: &str) -> Result<Self> {
        let fields: Map<String, Value> = serde_json::from_str(text).map_err(|e| Error::config(what, e))?;
        let mut fields = Fields { fields, what };
        fields.must_be("peft_type", &[json!("LORA")])?;
        fields.must_be("task_type", &[json!("CAUSAL_LM"), Value::Null])?;
        fields.must_be("bias", &[json!("none"), Value::Null])?;
        let plain = [json!(true), json!(false), json!("gaussian"), Value::Null];
        fields.must_be("init_lora_weights", &plain)?;
        let rank = match fields.take("r") {
            Value::Number(rank) => rank.as_u64().and_then(|rank| usize::try_from(rank).ok()),
            _ => None,
        };
        let Some(rank) = rank.filter(|rank| *rank > 0) else {
            return fields.refuse(format_args!("`r` must be a whole number above 0"));
        };
        let alpha = fields.number("lora_alpha", 8.0)?;
        let dropout = fields.number("lora_dropout", 0.0)?;
        let rank_stabilized = fields.flag("use_rslora")?;
        let targets = match fields.take("target_modules") {
            Value::String(name) if name.eq_ignore_ascii_case("all-linear") => LoraTargets::AllLinear,
            Value::String(pattern) => LoraTargets::Pattern(pattern),
            Value::Array(names) => {
                let names: Option<Vec<String>> = names.iter().map(|name| name.as_str().map(String::from)).collect();
                match names {
                    Some(names) => LoraTargets::Names(names),
                    None => return fields.refuse(format_args!("`target_modules` must be names")),
                }
            }
            other => return fields.refuse(format_args!("`target_modules` is {other}: names or a pattern are needed")),
        };
        for name in WITHOUT_EFFECT {
            fields.take(name);
        }
        if let Some((name, value)) = fields.fields.iter().find(|(_, value)| !says_nothing(value)) {
            return fields.unsupported(name, value, "nothing, or the field left out");
        }
        let config = Self { rank, alpha, dropout, rank_stabilized, targets };
        config.validate()?;
        Ok(config)
    }
}

impl LoraAdapter {
    /// Writes the adapter into a directory, which is made if it is not there, as PEFT reads it. `base_model` is the name of the model that
    /// it is for, on the hub or as a path. Each file is written whole or not at all, the config last.
    ///
    /// # Errors
    /// [`Error::Io`], and as [`Params::save`](crate::params::Params::save).
    pub fn save(&self, dir: impl AsRef<Path>, base_model: Option<&str>) -> Result<()> {
        let dir = dir.as_ref();
        std::fs::create_dir_all(dir).map_err(|e| Error::io(dir, e))?;
        let metadata = BTreeMap::from([("format".to_string(), "pt".to_string())]);
        self.params().save_with(dir.join(WEIGHTS), &metadata)?;
        let LoraConfig { rank, alpha, dropout, rank_stabilized, targets } = self.config();
        let targets = match targets {
            LoraTargets::Names(names) => json!(names),
            LoraTargets::Pattern(pattern) => json!(pattern),
            LoraTargets::AllLinear => {
                // every map's last name: what PEFT makes of the word depends on its version
                let names: BTreeSet<&str> = self.paths().iter().filter_map(|path| path.rsplit('.').next()).collect();
                json!(names)
            }
        };
        // PEFT has whole numbers there
        let whole = alpha.fract() == 0.0 && alpha.abs() < 1e15;
        let alpha = if whole { json!(*alpha as i64) } else { json!(alpha) };
        let config = json!({
            "alpha_pattern": {},
            "auto_mapping": null,
            "base_model_name_or_path": base_model,
            "bias": "none",
            "fan_in_fan_out": false,
            "inference_mode": true,
            "init_lora_weights": true,
            "layers_pattern": null,
            "layers_to_transform": null,
            "lora_alpha": alpha,
            "lora_dropout": dropout,
            "modules_to_save": null,
            "peft_type": "LORA",
            "r": rank,
            "rank_pattern": {},
            "revision": null,
            "target_modules": targets,
            "task_type": "CAUSAL_LM",
            "use_dora": false,
            "use_rslora": rank_stabilized,
        });
        let path = dir.join(CONFIG);
        let text = serde_json::to_string_pretty(&config).map_err(|e| Error::format(&path, "JSON", e))?;
        write_whole(path, (text + "\n").as_bytes())
    }

    /// Reads an adapter that PEFT or [`LoraAdapter::save`] wrote, and puts it on the model, in the place of any that it has. Factors of
    /// other float dtypes are converted to those of [`LoraAdapter::attach`].
    ///
    /// # Errors
    /// As [`LoraConfig::from_dir`]; [`Error::Config`] where the targets
    /// match no map of the model; [`Error::Format`] where the file of weights lacks a factor or has tensors that belong to none, by name;
    /// [`Error::TensorShape`] where a factor does not fit its map. The model has the adapter that it had before then.
    #[track_caller]
    pub fn load(model: &mut CausalLm, dir: impl AsRef<Path>) -> Result<Self> {
        let dir = dir.as_ref();
        let config = LoraConfig::from_dir(dir)?;
        let targets = targets(model, &config)?;
        let file = SafetensorsFile::open(dir.join(WEIGHTS))?;
        let named: Vec<(String, Shape)> = targets
            .iter()
            .flat_map(|target| target.factors(config.rank))
            .map(|(name, shape)| (name, Shape::from(shape)))
            .collect();
        let wanted: Vec<_> = named.iter().map(|(name, shape)| (name.as_str(), shape, None)).collect();
        check_file(&file, &wanted)?;
        let mut factors = Vec::with_capacity(targets.len());
        for target in &targets {
            let [(a, _), (b, _)] = target.factors(config.rank);
            let read = |name: &str| file.tensor(name, target.dtype, &target.device);
            factors.push([read(&a)?, read(&b)?]);
        }
        Self::with_factors(model, &config, &targets, factors)
    }
}
