//! An optimiser's state in a safetensors file: what is kept of each parameter as `<parameter>.<what>`, in the header the rule and how many
//! steps each parameter took.

use super::optimizer::{compute_dtype, Optimizer};
use crate::error::{Error, Result};
use crate::params::{check_file, quoted, values};
use crate::weights::{save_safetensors, SafetensorsFile};
use std::collections::BTreeMap;
use std::path::Path;

const FORMAT: &str = "optimizer state";
/// The header's entries.
const RULE: &str = "rule";
const STEPS: &str = "steps";
const UPDATES: &str = "updates";

impl Optimizer {
    /// Writes the state to a file, whole or not at all. The parameters themselves are not part of it
    /// ([`Params::save`](crate::params::Params::save)), nor are rule, groups and schedule.
    ///
    /// # Errors
    /// As [`save_safetensors`].
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let (mut named, mut updates) = (Vec::new(), BTreeMap::new());
        for slot in self.slots.iter().filter(|slot| slot.updates > 0) {
            updates.insert(slot.param.name(), slot.updates);
            for (what, kept) in self.rule.kept().iter().zip(&slot.kept) {
                named.push((format!("{}.{what}", slot.param.name()), kept.clone()));
            }
        }
        let updates = serde_json::to_string(&updates).map_err(|e| Error::format(&path, FORMAT, e))?;
        let metadata = [(RULE, self.rule.name().to_string()), (STEPS, self.steps.to_string()), (UPDATES, updates)];
        let metadata = metadata.map(|(name, text)| (name.to_string(), text));
        save_safetensors(path, &values(&named)?, &BTreeMap::from(metadata))
    }

    /// Goes on from the state of a file that [`Optimizer::save`] wrote: with the parameters of the same moment, the same rule, groups and
    /// schedule, every later step has the bits that it would have had without the interruption.
    ///
    /// # Errors
    /// As [`SafetensorsFile::open`]; [`Error::Format`] where the file is no such state, is another rule's, or has parameters that are not
    /// here, by name; [`Error::TensorShape`] and [`Error::Tensor`] for another shape or dtype. The optimiser is as it was then.
    pub fn load(&mut self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        let file = SafetensorsFile::open(path)?;
        let bad = |message: String| Error::format(path, FORMAT, message);
        let entry = |name: &str| {
            let entry = file.metadata().get(name);
            entry.ok_or_else(|| bad(format!("the header has no entry `{name}`")))
        };
        let (rule, here) = (entry(RULE)?, self.rule.name());
        if rule != here {
            return Err(bad(format!("it is of the rule `{rule}`, here it is `{here}`")));
        }
        let steps: u64 = entry(STEPS)?.parse().map_err(|e| bad(format!("entry `{STEPS}`: {e}")))?;
        let mut updates: BTreeMap<String, u64> =
            serde_json::from_str(entry(UPDATES)?).map_err(|e| bad(format!("entry `{UPDATES}`: {e}")))?;
        let known: Vec<u64> = self.slots.iter().map(|slot| updates.remove(slot.param.name()).unwrap_or(0)).collect();
        if !updates.is_empty() {
            return Err(bad(format!("nothing here is called {}", quoted(updates.keys()))));
        }
        let kept = self.rule.kept();
        let name_of = |param: &str, what: &str| format!("{param}.{what}");
        let mut names = Vec::new();
        for (slot, _) in self.slots.iter().zip(&known).filter(|(_, updates)| **updates > 0) {
            names.extend(kept.iter().map(|what| (name_of(slot.param.name(), what), slot)));
        }
        let wanted: Vec<_> = names
            .iter()
            .map(|(name, slot)| (name.as_str(), slot.param.shape(), Some(compute_dtype(&slot.param))))
            .collect();
        check_file(&file, &wanted)?;
        let mut read = Vec::with_capacity(self.slots.len());
        for (slot, updates) in self.slots.iter().zip(&known) {
            let mut tensors = Vec::new();
            for what in kept.iter().filter(|_| *updates > 0) {
                let name = name_of(slot.param.name(), what);
                tensors.push(file.tensor(&name, compute_dtype(&slot.param), slot.param.device())?.into());
            }
            read.push((tensors, *updates));
        }
        for (slot, (tensors, updates)) in self.slots.iter_mut().zip(read) {
            (slot.kept, slot.updates) = (tensors, updates);
        }
        self.steps = steps;
        Ok(())
    }
}
