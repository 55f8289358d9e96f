//! Named weights as leaves.

use crate::candle::{here, DType, Device, Error, Result, Shape, Tensor};
use crate::module::full_name;
use crate::weights::safetensors;
use candle_nn::var_builder::{Renamer, SimpleBackend};
use candle_nn::{Init, VarMap};
use std::collections::HashMap;
use std::path::Path;

/// Candle's `VarBuilder` with lazy tensors coming out: the names of its methods, and each tensor a new leaf.
///
/// A model loads from it at once, as in Candle; only what is computed from the weights is lazy. `From` takes any builder of
/// Candle's, so every way to make one there works here too.
#[derive(Clone)]
pub struct VarBuilder<'a> {
    inner: candle_nn::VarBuilder<'a>,
}

impl std::fmt::Debug for VarBuilder<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VarBuilder").field("prefix", &self.prefix()).field("dtype", &self.dtype()).finish()
    }
}

impl<'a> From<candle_nn::VarBuilder<'a>> for VarBuilder<'a> {
    fn from(inner: candle_nn::VarBuilder<'a>) -> Self {
        Self { inner }
    }
}

/// Lazy tensors by name; each is evaluated when a model asks for it.
struct Lazy(HashMap<String, Tensor>);

impl Lazy {
    fn find(&self, name: &str) -> candle_core::Result<candle_core::Tensor> {
        match self.0.get(name) {
            Some(tensor) => Ok(tensor.eval()?),
            None => Err(candle_core::Error::CannotFindTensor { path: name.to_string() }),
        }
    }
}

impl SimpleBackend for Lazy {
    fn get(
        &self,
        shape: Shape,
        name: &str,
        _: Init,
        dtype: DType,
        device: &Device,
    ) -> candle_core::Result<candle_core::Tensor> {
        let tensor = self.get_unchecked(name, dtype, device)?;
        if tensor.shape() != &shape {
            let msg = format!("shape mismatch for {name}");
            return Err(candle_core::Error::UnexpectedShape { msg, expected: shape, got: tensor.shape().clone() });
        }
        Ok(tensor)
    }

    fn get_unchecked(&self, name: &str, dtype: DType, device: &Device) -> candle_core::Result<candle_core::Tensor> {
        self.find(name)?.to_device(device)?.to_dtype(dtype)
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }
}

impl<'a> VarBuilder<'a> {
    /// Over a backend of one's own.
    #[must_use]
    pub fn from_backend(backend: Box<dyn SimpleBackend + 'a>, dtype: DType, device: Device) -> Self {
        candle_nn::VarBuilder::from_backend(backend, dtype, device).into()
    }

    /// Zeros of every shape that is asked for.
    #[must_use]
    pub fn zeros(dtype: DType, device: &Device) -> Self {
        candle_nn::VarBuilder::zeros(dtype, device).into()
    }

    /// Over tensors by name, lazy ones or Candle's.
    #[must_use]
    pub fn from_tensors<T: Into<Tensor>>(tensors: HashMap<String, T>, dtype: DType, device: &Device) -> Self {
        let tensors = tensors.into_iter().map(|(name, tensor)| (name, tensor.into())).collect();
        Self::from_backend(Box::new(Lazy(tensors)), dtype, device.clone())
    }

    /// Over variables, made where they are missing: what is computed from them has gradients in Candle's autograd.
    #[must_use]
    pub fn from_varmap(varmap: &VarMap, dtype: DType, device: &Device) -> Self {
        candle_nn::VarBuilder::from_varmap(varmap, dtype, device).into()
    }

    /// Over safetensors files. Nothing stays mapped: a tensor is read when it is asked for. Candle's function is unsafe
    /// because it maps; an `unsafe` block around this one only warns.
    ///
    /// # Errors
    /// When a file cannot be read or is no safetensors file, or two have a tensor of one name.
    #[track_caller]
    pub fn from_mmaped_safetensors<P: AsRef<Path>>(paths: &[P], dtype: DType, device: &Device) -> Result<Self> {
        Ok(here(safetensors(paths, dtype, device))?.into())
    }

    /// Over a safetensors file in memory.
    ///
    /// # Errors
    /// When it is none.
    #[track_caller]
    pub fn from_buffered_safetensors(data: Vec<u8>, dtype: DType, device: &Device) -> Result<Self> {
        Ok(here(candle_nn::VarBuilder::from_buffered_safetensors(data, dtype, device))?.into())
    }

    /// Over a safetensors file in memory.
    ///
    /// # Errors
    /// When it is none.
    #[track_caller]
    pub fn from_slice_safetensors(data: &'a [u8], dtype: DType, device: &Device) -> Result<Self> {
        Ok(here(candle_nn::VarBuilder::from_slice_safetensors(data, dtype, device))?.into())
    }

    /// Over a numpy file.
    ///
    /// # Errors
    /// When it cannot be read.
    #[track_caller]
    pub fn from_npz<P: AsRef<Path>>(path: P, dtype: DType, device: &Device) -> Result<Self> {
        Ok(here(candle_nn::VarBuilder::from_npz(path, dtype, device))?.into())
    }

    /// Over a PyTorch file.
    ///
    /// # Errors
    /// When it cannot be read.
    #[track_caller]
    pub fn from_pth<P: AsRef<Path>>(path: P, dtype: DType, device: &Device) -> Result<Self> {
        Ok(here(candle_nn::VarBuilder::from_pth(path, dtype, device))?.into())
    }

    /// Over one state of a PyTorch file.
    ///
    /// # Errors
    /// When it cannot be read.
    #[track_caller]
    pub fn from_pth_with_state<P: AsRef<Path>>(path: P, dtype: DType, state: &str, device: &Device) -> Result<Self> {
        Ok(here(candle_nn::VarBuilder::from_pth_with_state(path, dtype, state, device))?.into())
    }

    /// The same, asking for other names.
    #[must_use]
    pub fn rename_f<F: Fn(&str) -> String + Sync + Send + 'static>(self, f: F) -> Self {
        self.inner.rename_f(f).into()
    }

    /// The same, asking for other names.
    #[must_use]
    pub fn rename<R: Renamer + Send + Sync + 'a>(self, renamer: R) -> Self {
        self.inner.rename(renamer).into()
    }

    /// Candle's builder, for a module of [`crate`] beside ported ones.
    #[must_use]
    pub fn into_inner(self) -> candle_nn::VarBuilder<'a> {
        self.inner
    }

    /// What stands before every name, with a dot between.
    #[must_use]
    pub fn prefix(&self) -> String {
        self.inner.prefix()
    }

    /// The same without a prefix.
    #[must_use]
    pub fn root(&self) -> Self {
        self.inner.root().into()
    }

    /// The same with this prefix only.
    #[must_use]
    pub fn set_prefix(&self, prefix: impl ToString) -> Self {
        self.inner.set_prefix(prefix).into()
    }

    /// The same with one more part in the prefix.
    #[must_use]
    pub fn push_prefix<S: ToString>(&self, part: S) -> Self {
        self.inner.push_prefix(part).into()
    }

    /// The same as [`VarBuilder::push_prefix`].
    #[must_use]
    pub fn pp<S: ToString>(&self, part: S) -> Self {
        self.push_prefix(part)
    }

    /// Where tensors are made.
    #[must_use]
    pub fn device(&self) -> &Device {
        self.inner.device()
    }

    /// The dtype of tensors.
    #[must_use]
    pub fn dtype(&self) -> DType {
        self.inner.dtype()
    }

    /// The same with another dtype.
    #[must_use]
    pub fn to_dtype(&self, dtype: DType) -> Self {
        self.inner.to_dtype(dtype).into()
    }

    /// The same on another device.
    #[must_use]
    pub fn set_device(self, device: Device) -> Self {
        self.inner.set_device(device).into()
    }

    /// The same with another dtype.
    #[must_use]
    pub fn set_dtype(self, dtype: DType) -> Self {
        self.inner.set_dtype(dtype).into()
    }

    /// Whether there is a tensor of exactly this name under the prefix.
    #[must_use]
    pub fn contains_tensor(&self, name: &str) -> bool {
        self.inner.contains_tensor(name)
    }

    /// The tensor of this name under the prefix.
    ///
    /// # Errors
    /// When it is missing, has another shape or cannot be read: the error names it, its file, and the caller's line.
    #[track_caller]
    pub fn get<S: Into<Shape>>(&self, shape: S, name: &str) -> Result<Tensor> {
        self.leaf(name, self.inner.get(shape, name))
    }

    /// The tensor of this name, made by `hints` where the builder makes variables.
    ///
    /// # Errors
    /// As [`VarBuilder::get`].
    #[track_caller]
    pub fn get_with_hints<S: Into<Shape>>(&self, shape: S, name: &str, hints: Init) -> Result<Tensor> {
        self.leaf(name, self.inner.get_with_hints(shape, name, hints))
    }

    /// The tensor of this name in another dtype.
    ///
    /// # Errors
    /// As [`VarBuilder::get`].
    #[track_caller]
    pub fn get_with_hints_dtype<S: Into<Shape>>(
        &self,
        shape: S,
        name: &str,
        hints: Init,
        dtype: DType,
    ) -> Result<Tensor> {
        self.leaf(name, self.inner.get_with_hints_dtype(shape, name, hints, dtype))
    }

    /// The tensor of this name, whatever its shape.
    ///
    /// # Errors
    /// As [`VarBuilder::get`].
    #[track_caller]
    pub fn get_unchecked(&self, name: &str) -> Result<Tensor> {
        self.leaf(name, self.inner.get_unchecked(name))
    }

    /// The tensor of this name in another dtype, whatever its shape.
    ///
    /// # Errors
    /// As [`VarBuilder::get`].
    #[track_caller]
    pub fn get_unchecked_dtype(&self, name: &str, dtype: DType) -> Result<Tensor> {
        self.leaf(name, self.inner.get_unchecked_dtype(name, dtype))
    }

    #[track_caller]
    fn leaf(&self, name: &str, tensor: candle_core::Result<candle_core::Tensor>) -> Result<Tensor> {
        match tensor {
            Ok(tensor) => Ok(Tensor::from(tensor)),
            Err(error) => {
                let error = crate::Error::from_var(error, &full_name(&self.inner, name));
                Err(Error::from(error).at_caller())
            }
        }
    }
}
