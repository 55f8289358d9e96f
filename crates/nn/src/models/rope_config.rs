//! How a config of Hugging Face's describes rotary positions: `rope_scaling` in older files, `rope_parameters` in newer ones.

use crate::error::{Error, Result};
use crate::rope::RopeScaling;
use serde::Deserialize;
use std::collections::BTreeMap;

/// One of the two objects.
#[derive(Debug, Deserialize)]
pub(super) struct RopeJson {
    rope_type: Option<String>,
    /// The older name of `rope_type`; files written in between have both.
    #[serde(rename = "type")]
    older_type: Option<String>,
    rope_theta: Option<f32>,
    partial_rotary_factor: Option<f64>,
    factor: Option<f32>,
    low_freq_factor: Option<f32>,
    high_freq_factor: Option<f32>,
    original_max_position_embeddings: Option<usize>,
    /// Whatever else it says: a rule that is not known here.
    #[serde(flatten)]
    rest: BTreeMap<String, serde_json::Value>,
}

/// What both objects say together.
#[derive(Debug)]
pub(super) struct Rope {
    pub(super) scaling: RopeScaling,
    pub(super) theta: Option<f32>,
}

/// The error for heads that are rotated in part.
pub(super) fn partial(factor: f64) -> Error {
    Error::Unsupported {
        what: "partial_rotary_factor",
        found: factor.to_string(),
        supported: "1: whole heads are rotated",
    }
}

/// Reads both objects. What one of them says about scaling must not be said otherwise by the other.
pub(super) fn read(scaling: Option<RopeJson>, parameters: Option<RopeJson>, what: &str) -> Result<Rope> {
    let mut found = Rope { scaling: RopeScaling::None, theta: None };
    let mut named = None;
    for (name, json) in [("rope_scaling", scaling), ("rope_parameters", parameters)] {
        let Some(json) = json else { continue };
        if let Some(factor) = json.partial_rotary_factor.filter(|factor| *factor != 1.) {
            return Err(partial(factor));
        }
        match (found.theta, json.rope_theta) {
            (Some(a), Some(b)) if a != b => {
                return Err(Error::config(
                    what,
                    format_args!("rope_theta is {a} in rope_scaling, {b} in rope_parameters"),
                ))
            }
            (known, theta) => found.theta = known.or(theta),
        }
        let own = json.scaling(name, what)?;
        match &named {
            // an empty object, or one with a theta alone, says nothing about scaling
            _ if json.kind().is_none() => {}
            Some(other) if found.scaling != own => {
                return Err(Error::config(what, format_args!("{other} and {name} scale positions in different ways")))
            }
            _ => {
                found.scaling = own;
                named = Some(name);
            }
        }
    }
    Ok(found)
}

impl RopeJson {
    fn kind(&self) -> Option<&str> {
        self.rope_type.as_deref().or(self.older_type.as_deref())
    }

    fn scaling(&self, name: &str, what: &str) -> Result<RopeScaling> {
        let field = |field: &str, value: Option<f32>| match value {
            Some(value) if value.is_finite() && value > 0. => Ok(value),
            Some(value) => Err(Error::config(what, format_args!("{name}.{field} is {value}"))),
            None => Err(Error::config(what, format_args!("{name} has no {field}"))),
        };
        if let (Some(new), Some(old)) = (&self.rope_type, &self.older_type) {
            if new != old {
                return Err(Error::config(what, format_args!("{name} has rope_type {new} and type {old}")));
            }
        }
        let scaling = match self.kind() {
            Some("default") => RopeScaling::None,
            None => {
                let factors = [self.factor, self.low_freq_factor, self.high_freq_factor];
                if factors.iter().any(Option::is_some) || self.original_max_position_embeddings.is_some() {
                    return Err(Error::config(
                        what,
                        format_args!("{name} has factors and no rope_type: how they scale is not said"),
                    ));
                }
                RopeScaling::None
            }
            Some("linear") => RopeScaling::Linear { factor: field("factor", self.factor)? },
            Some("llama3") => {
                let low_freq_factor = field("low_freq_factor", self.low_freq_factor)?;
                let high_freq_factor = field("high_freq_factor", self.high_freq_factor)?;
                if low_freq_factor >= high_freq_factor {
                    return Err(Error::config(
                        what,
                        format_args!(
                            "{name}.low_freq_factor is {low_freq_factor}, not below high_freq_factor {high_freq_factor}"
                        ),
                    ));
                }
                let original = self.original_max_position_embeddings.filter(|positions| *positions > 0);
                RopeScaling::Llama3 {
                    factor: field("factor", self.factor)?,
                    low_freq_factor,
                    high_freq_factor,
                    original_context: original.ok_or_else(|| {
                        Error::config(what, format_args!("{name} has no original_max_position_embeddings above 0"))
                    })?,
                }
            }
            Some(other) => {
                return Err(Error::Unsupported {
                    what: "rope scaling",
                    found: other.to_string(),
                    supported: "default, linear, llama3",
                })
            }
        };
        match self.rest.iter().find(|(_, value)| !value.is_null()) {
            None => Ok(scaling),
            Some((key, _)) => {
                Err(Error::config(what, format_args!("{name}.{key} is no part of a scaling that is computed")))
            }
        }
    }
}
