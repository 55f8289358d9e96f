//! Parameters: named cells that a module reads and an optimiser writes, and the tree of a model's parameters.
//!
//! ```
//! use candle_core::{Device, Tensor};
//! use candle_lazy_nn::params::Params;
//!
//! # fn main() -> candle_lazy_nn::Result<()> {
//! let mut params = Params::new();
//! let weight = params.insert("layers.0.weight", Tensor::new(&[1f32, 2.], &Device::Cpu)?)?;
//! params.insert("layers.0.bias", Tensor::new(&[0f32], &Device::Cpu)?)?;
//! params.freeze("*.bias")?;
//! let y = weight.value().affine(2.0, 0.0)?; // recorded on the value of now
//! weight.set(Tensor::new(&[5f32, 6.], &Device::Cpu)?)?;
//! assert_eq!(y.to_vec1::<f32>()?, [2., 4.]);
//! assert_eq!(params.trainable().map(|p| p.name()).collect::<Vec<_>>(), ["layers.0.weight"]);
//! # Ok(())
//! # }
//! ```

mod file;
mod grad;
mod gradients;
mod pattern;

pub(crate) use file::{check_file, copied, values};
pub use grad::{GradEntry, GradOutcome, GradReport};
pub use gradients::Gradients;
pub(crate) use pattern::{quoted, Glob};

use crate::error::{Error, Result};
use candle_core::{DType, Device, Shape};
use candle_lazy_exec::LazyTensor;
use parking_lot::RwLock;
use std::collections::BTreeMap;
use std::sync::Arc;

/// A parameter: a name and the value that it has now. Clones are handles on one cell.
///
/// Shape, dtype and device stay those of the first value. What was recorded with a value keeps that value.
#[derive(Debug, Clone)]
pub struct Param(Arc<Cell>);

#[derive(Debug)]
struct Cell {
    name: String,
    shape: Shape,
    dtype: DType,
    device: Device,
    state: RwLock<State>,
}

#[derive(Debug)]
struct State {
    value: LazyTensor,
    trainable: bool,
}

impl Param {
    /// A trainable parameter.
    ///
    /// # Errors
    /// [`Error::Params`] where the name is empty or has an empty part between dots, or the value is no float tensor.
    #[track_caller]
    pub fn new(name: impl Into<String>, value: impl Into<LazyTensor>) -> Result<Self> {
        let (name, value) = (name.into(), value.into());
        if name.split('.').any(str::is_empty) {
            return Err(Error::params(format_args!("`{name}` is no name: parts between dots are needed")));
        }
        if !value.dtype().is_float() {
            return Err(Error::params(format_args!("`{name}` is {:?}: a float tensor is needed", value.dtype())));
        }
        let (shape, dtype, device) = (value.shape().clone(), value.dtype(), value.device().clone());
        let state = RwLock::new(State { value: value.variable()?, trainable: true });
        Ok(Self(Arc::new(Cell { name, shape, dtype, device, state })))
    }

    /// The dotted name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// The value of now: the same handle until another value is set, a variable where the parameter is trainable, so that gradients can be
    /// taken with respect to it ([`Params::grad`]).
    #[must_use]
    pub fn value(&self) -> LazyTensor {
        self.0.state.read().value.clone()
    }

    /// Gives it another value of the same shape, dtype and device.
    ///
    /// # Errors
    /// [`Error::Params`] where one of them differs; the value is as it was then.
    #[track_caller]
    pub fn set(&self, value: impl Into<LazyTensor>) -> Result<()> {
        let value = value.into();
        self.fits("the value", &value)?;
        self.replace(value)?;
        Ok(())
    }

    /// Refuses what has not the parameter's shape, dtype and device.
    #[track_caller]
    pub(crate) fn fits(&self, what: &str, value: &LazyTensor) -> Result<()> {
        let Cell { name, shape, dtype, device, .. } = &*self.0;
        if value.shape() != shape || value.dtype() != *dtype {
            return Err(Error::params(format_args!(
                "`{name}` is {shape:?} of {dtype:?}, {what} is {:?} of {:?}",
                value.shape(),
                value.dtype()
            )));
        }
        if !value.device().same_device(device) {
            let (has, found) = (device.location(), value.device().location());
            return Err(Error::params(format_args!("`{name}` is on {has:?}, {what} on {found:?}")));
        }
        Ok(())
    }

    /// Puts a value that fits in the place of the old one: as a variable where the parameter is trainable.
    #[track_caller]
    pub(crate) fn replace(&self, value: LazyTensor) -> Result<LazyTensor> {
        let mut state = self.0.state.write();
        let value = if state.trainable { value.variable()? } else { value };
        Ok(std::mem::replace(&mut state.value, value))
    }

    /// Puts a value back that was replaced.
    pub(crate) fn put_back(&self, value: LazyTensor) {
        self.0.state.write().value = value;
    }

    /// Whether an optimiser changes it; so in a new one.
    #[must_use]
    pub fn is_trainable(&self) -> bool {
        self.0.state.read().trainable
    }

    /// Trainable, or frozen.
    ///
    /// [`Param::value`] is another handle from then on: a variable, which gradients can be taken with respect to, where it is trainable.
    ///
    /// # Errors
    /// None for a float tensor, which a parameter is.
    #[track_caller]
    pub fn set_trainable(&self, trainable: bool) -> Result<()> {
        let mut state = self.0.state.write();
        if state.trainable != trainable {
            state.value = if trainable { state.value.variable()? } else { state.value.detach() };
            state.trainable = trainable;
        }
        Ok(())
    }

    /// The shape.
    #[must_use]
    pub fn shape(&self) -> &Shape {
        &self.0.shape
    }

    /// The dtype.
    #[must_use]
    pub fn dtype(&self) -> DType {
        self.0.dtype
    }

    /// The device.
    #[must_use]
    pub fn device(&self) -> &Device {
        &self.0.device
    }

    /// The number of elements.
    #[must_use]
    pub fn elem_count(&self) -> usize {
        self.0.shape.elem_count()
    }
}

/// Parameters by their dotted names. Clones are other lists of the same cells.
///
/// Patterns name whole names: `*` stands for any characters, dots too, `?` for one, everything else for itself.
#[derive(Debug, Clone, Default)]
pub struct Params {
    by_name: BTreeMap<String, Param>,
}

impl Params {
    /// Without parameters.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a trainable parameter.
    ///
    /// # Errors
    /// As [`Param::new`], and [`Error::Params`] where the name is taken.
    #[track_caller]
    pub fn insert(&mut self, name: impl Into<String>, value: impl Into<LazyTensor>) -> Result<Param> {
        let param = Param::new(name, value)?;
        self.add(param.clone())?;
        Ok(param)
    }

    /// Adds a parameter that exists.
    ///
    /// # Errors
    /// [`Error::Params`] where its name is taken.
    #[track_caller]
    pub fn add(&mut self, param: Param) -> Result<()> {
        let name = param.name();
        if self.by_name.contains_key(name) {
            return Err(Error::params(format_args!("there is a `{name}` already")));
        }
        self.by_name.insert(name.to_string(), param);
        Ok(())
    }

    /// The parameter of a name.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&Param> {
        self.by_name.get(name)
    }

    /// All parameters, sorted by name.
    pub fn iter(&self) -> impl Iterator<Item = &Param> {
        self.by_name.values()
    }

    /// Those that are not frozen, sorted by name.
    pub fn trainable(&self) -> impl Iterator<Item = &Param> {
        self.iter().filter(|param| param.is_trainable())
    }

    /// Those whose names a pattern names, sorted by name.
    ///
    /// # Errors
    /// [`Error::Params`] where it names none.
    #[track_caller]
    pub fn matching(&self, pattern: &str) -> Result<Vec<&Param>> {
        let glob = Glob::new(pattern)?;
        let found: Vec<&Param> = self.iter().filter(|param| glob.matches(param.name())).collect();
        if found.is_empty() {
            let names = quoted(self.by_name.keys());
            return Err(Error::params(format_args!("the pattern `{pattern}` names none of {names}")));
        }
        Ok(found)
    }

    /// Freezes those that a pattern names, and says how many they are: gradients are not asked for, no optimiser changes them.
    ///
    /// # Errors
    /// As [`Params::matching`].
    #[track_caller]
    pub fn freeze(&self, pattern: &str) -> Result<usize> {
        self.set_trainable(pattern, false)
    }

    /// The opposite of [`Params::freeze`].
    ///
    /// # Errors
    /// As [`Params::matching`].
    #[track_caller]
    pub fn unfreeze(&self, pattern: &str) -> Result<usize> {
        self.set_trainable(pattern, true)
    }

    #[track_caller]
    fn set_trainable(&self, pattern: &str, trainable: bool) -> Result<usize> {
        let found = self.matching(pattern)?;
        for param in &found {
            param.set_trainable(trainable)?;
        }
        Ok(found.len())
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.by_name.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.by_name.is_empty()
    }

    /// The elements of all together.
    #[must_use]
    pub fn elem_count(&self) -> usize {
        self.iter().map(Param::elem_count).sum()
    }

    /// The elements of the trainable ones together.
    #[must_use]
    pub fn trainable_elem_count(&self) -> usize {
        self.trainable().map(Param::elem_count).sum()
    }
}
