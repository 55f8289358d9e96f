//! The safetensors format: eight bytes of header length, a JSON header, then the tensors' bytes without gaps.
//!
//! Source: <https://github.com/huggingface/safetensors#format>.

use super::read::{read_tensor, Extent};
use crate::error::{Error, Result};
use candle_core::{DType, Device, Shape, Tensor};
use candle_lazy_exec::buffer::HugePages;
use candle_nn::var_builder::SimpleBackend;
use candle_nn::{Init, VarBuilder};
use parking_lot::Mutex;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

/// No real header comes near this; a larger length is a corrupt file (the format's own limit).
const MAX_HEADER: u64 = 100_000_000;

#[derive(Deserialize)]
struct Entry {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: (u64, u64),
}

/// One tensor of the file: its extent, or the name of a dtype that Candle does not have.
struct Stored {
    shape: Shape,
    extent: std::result::Result<Extent, String>,
}

/// An open file whose header has been checked against its size.
pub struct SafetensorsFile {
    path: PathBuf,
    file: Mutex<File>,
    tensors: BTreeMap<String, Stored>,
    metadata: BTreeMap<String, String>,
}

impl std::fmt::Debug for SafetensorsFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SafetensorsFile").field("path", &self.path).field("tensors", &self.tensors.len()).finish()
    }
}

/// Bits per element and Candle's dtype, where it has one, of a dtype name.
fn dtype_of(name: &str) -> Option<(u64, Option<DType>)> {
    Some(match name {
        "F64" => (64, Some(DType::F64)),
        "F32" => (32, Some(DType::F32)),
        "F16" => (16, Some(DType::F16)),
        "BF16" => (16, Some(DType::BF16)),
        "I64" => (64, Some(DType::I64)),
        "I32" => (32, Some(DType::I32)),
        "I16" => (16, Some(DType::I16)),
        "U32" => (32, Some(DType::U32)),
        "U8" => (8, Some(DType::U8)),
        "BOOL" | "I8" | "F8_E4M3" | "F8_E5M2" | "F8_E8M0" => (8, None),
        "U16" => (16, None),
        "U64" | "C64" => (64, None),
        _ => return None,
    })
}

impl SafetensorsFile {
    /// Opens a file and checks its header: lengths, offsets, shapes and dtypes against each other and the file's size.
    ///
    /// # Errors
    /// [`Error::Io`], and [`Error::Format`] for a truncated or corrupt file, naming the first tensor that does not fit.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let mut file = File::open(path).map_err(|e| Error::io(path, e))?;
        let size = file.metadata().map_err(|e| Error::io(path, e))?.len();
        let bad = |message: String| Error::format(path, "safetensors", message);
        if size < 8 {
            return Err(bad(format!("{size} bytes are too few for a header length")));
        }
        let mut raw = [0u8; 8];
        file.read_exact(&mut raw).map_err(|e| Error::io(path, e))?;
        let header_len = u64::from_le_bytes(raw);
        if header_len > MAX_HEADER {
            return Err(bad(format!("a header of {header_len} bytes is beyond the format's limit of {MAX_HEADER}")));
        }
        let data_len = match size.checked_sub(8 + header_len) {
            Some(data_len) => data_len,
            None => return Err(bad(format!("truncated: the header has {header_len} bytes, the file {size}"))),
        };
        let mut header = vec![0u8; usize::try_from(header_len).map_err(|e| bad(e.to_string()))?];
        file.read_exact(&mut header).map_err(|e| Error::io(path, e))?;
        let header: BTreeMap<String, serde_json::Value> =
            serde_json::from_slice(&header).map_err(|e| bad(format!("the header is no JSON object: {e}")))?;
        let (mut tensors, mut metadata) = (BTreeMap::new(), BTreeMap::new());
        let mut ranges = Vec::new();
        for (name, value) in header {
            if name == "__metadata__" {
                // the format wants texts under names; others' entries are nothing to refuse a file for
                metadata = serde_json::from_value(value).unwrap_or_default();
                continue;
            }
            let entry: Entry = serde_json::from_value(value).map_err(|e| bad(format!("tensor `{name}`: {e}")))?;
            let (begin, end) = entry.data_offsets;
            if begin > end || end > data_len {
                return Err(bad(format!(
                    "tensor `{name}` lies at bytes {begin}..{end}, the file has {data_len} after its header (truncated?)"
                )));
            }
            let Some((bits, dtype)) = dtype_of(&entry.dtype) else {
                return Err(bad(format!("tensor `{name}` has the unknown dtype `{}`", entry.dtype)));
            };
            let elements = super::elements(&entry.shape);
            let bytes = elements.and_then(|n| n.checked_mul(bits)).map(|n| n / 8);
            if bytes != Some(end - begin) {
                return Err(bad(format!(
                    "tensor `{name}`: shape {:?} of {} does not fill its {} bytes",
                    entry.shape,
                    entry.dtype,
                    end - begin
                )));
            }
            ranges.push((begin, end));
            let shape = Shape::from(entry.shape);
            let extent = match dtype {
                Some(stored) => Ok(Extent { offset: 8 + header_len + begin, stored, shape: shape.clone() }),
                None => Err(entry.dtype),
            };
            tensors.insert(name, Stored { shape, extent });
        }
        ranges.sort_unstable();
        let mut covered = 0;
        for (begin, end) in ranges {
            if begin != covered {
                return Err(bad(format!("tensors overlap or leave a gap at byte {covered} of the data")));
            }
            covered = end;
        }
        if covered != data_len {
            return Err(bad(format!("{} bytes follow the last tensor", data_len - covered)));
        }
        Ok(Self { path: path.to_path_buf(), file: Mutex::new(file), tensors, metadata })
    }

    /// The file's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Names of the tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Shape of a tensor; `None` where there is no such tensor or Candle does not have its dtype.
    pub fn shape(&self, name: &str) -> Option<&Shape> {
        self.tensors.get(name).and_then(|t| t.extent.as_ref().ok()).map(|extent| &extent.shape)
    }

    /// The dtype that a tensor is stored in; `None` as for [`SafetensorsFile::shape`].
    pub fn dtype(&self, name: &str) -> Option<DType> {
        self.tensors.get(name).and_then(|t| t.extent.as_ref().ok()).map(|extent| extent.stored)
    }

    /// What the header says beside the tensors.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// Reads one tensor as `dtype`.
    ///
    /// # Errors
    /// [`Error::MissingTensor`], [`Error::Tensor`] where it cannot be read as `dtype`.
    pub fn tensor(&self, name: &str, dtype: DType, device: &Device) -> Result<Tensor> {
        self.read(name, None, dtype, device).map_err(|e| Error::from_var(e, name))
    }

    /// Names and shapes of all tensors, sorted by name; those of dtypes that Candle does not have too.
    pub fn all_shapes(&self) -> impl Iterator<Item = (&str, &Shape)> {
        self.tensors.iter().map(|(name, stored)| (name.as_str(), &stored.shape))
    }

    /// Reads one tensor, of the expected shape if one is given. The error is Candle's, as a `VarBuilder` needs it.
    fn read(&self, name: &str, expected: Option<&Shape>, dtype: DType, device: &Device) -> candle_core::Result<Tensor> {
        let stored = self
            .tensors
            .get(name)
            .ok_or_else(|| candle_core::Error::CannotFindTensor { path: name.to_string() }.with_path(&self.path))?;
        let extent = stored.extent.as_ref().map_err(|found| {
            candle_core::Error::Msg(format!("is stored as {found}, which Candle does not have")).with_path(&self.path)
        })?;
        if let Some(expected) = expected.filter(|expected| *expected != &extent.shape) {
            return Err(candle_core::Error::UnexpectedShape {
                msg: format!("shape mismatch for {name}"),
                expected: expected.clone(),
                got: extent.shape.clone(),
            }
            .with_path(&self.path));
        }
        // A parameter of a network is no whole number: a file that says so was written wrongly, or its header is corrupt.
        if dtype.is_float() && !extent.stored.is_float() {
            let message = format!("is stored as {:?}, where a float is wanted ({dtype:?})", extent.stored);
            return Err(candle_core::Error::Msg(message).with_path(&self.path));
        }
        read_tensor(&mut self.file.lock(), extent, dtype, device).map_err(|e| e.with_path(&self.path))
    }
}

/// Several files with the tensors of one model.
struct Shards {
    files: Vec<SafetensorsFile>,
    by_name: BTreeMap<String, usize>,
    /// Where the tensors lie that were read: they go to huge pages when the model has all it wants.
    pages: HugePages,
}

impl Shards {
    fn read(&self, name: &str, expected: Option<&Shape>, dtype: DType, dev: &Device) -> candle_core::Result<Tensor> {
        self.file_of(name)?.read(name, expected, dtype, dev).inspect(|tensor| self.pages.note(tensor))
    }

    fn file_of(&self, name: &str) -> candle_core::Result<&SafetensorsFile> {
        let index = self.by_name.get(name).copied();
        // A model in one file names that file also for what it lacks.
        let index = index.or(if self.files.len() == 1 { Some(0) } else { None });
        index
            .and_then(|index| self.files.get(index))
            .ok_or_else(|| candle_core::Error::CannotFindTensor { path: name.to_string() })
    }
}

impl SimpleBackend for Shards {
    fn get(&self, s: Shape, name: &str, _: Init, dtype: DType, dev: &Device) -> candle_core::Result<Tensor> {
        self.read(name, Some(&s), dtype, dev)
    }

    fn get_unchecked(&self, name: &str, dtype: DType, dev: &Device) -> candle_core::Result<Tensor> {
        self.read(name, None, dtype, dev)
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.by_name.contains_key(name)
    }
}

/// A `VarBuilder` over one or more safetensors files, giving every tensor in `dtype` on `device`.
///
/// All headers are read and checked now, tensors when a model asks for them. A tensor of whole numbers is refused where
/// a float is wanted; other dtypes are converted.
///
/// # Errors
/// As [`SafetensorsFile::open`]; [`Error::Format`] too where two files have a tensor of one name.
pub fn safetensors<P: AsRef<Path>>(paths: &[P], dtype: DType, device: &Device) -> Result<VarBuilder<'static>> {
    let mut files = Vec::new();
    let mut by_name = BTreeMap::new();
    for (index, path) in paths.iter().enumerate() {
        let file = SafetensorsFile::open(path)?;
        for name in file.names() {
            if by_name.insert(name.to_string(), index).is_some() {
                return Err(Error::format(
                    path,
                    "safetensors",
                    format_args!("tensor `{name}` is in another file of the model too"),
                ));
            }
        }
        files.push(file);
    }
    Ok(VarBuilder::from_backend(
        Box::new(Shards { files, by_name, pages: HugePages::default() }),
        dtype,
        device.clone(),
    ))
}
