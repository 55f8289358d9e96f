//! The header of a GGUF file: metadata and the list of tensors.
//!
//! Source: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>. Candle has a reader too; this one exists because
//! a corrupt header must become an error here, and Candle's divides by an alignment of zero and multiplies dims that
//! overflow.

use crate::error::{Error, Result};
use candle_core::quantized::gguf_file::Value;
use candle_core::quantized::GgmlDType;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;

/// Deepest nesting of arrays that is followed; real files have none.
const MAX_DEPTH: usize = 4;
/// Most dims of a tensor (ggml's own limit).
const MAX_DIMS: u32 = 4;

/// One tensor of the file.
#[derive(Debug, Clone)]
pub struct GgufTensorInfo {
    /// Shape in row-major order (the file stores the reverse).
    pub shape: Vec<usize>,
    /// How the numbers are stored.
    pub dtype: GgmlDType,
    /// Bytes from the beginning of the file.
    pub offset: u64,
    /// Bytes in the file.
    pub size: u64,
}

impl GgufTensorInfo {
    /// Number of elements.
    pub fn elem_count(&self) -> usize {
        // The product was checked when the header was read.
        self.shape.iter().fold(1usize, |n, &dim| n.saturating_mul(dim))
    }
}

/// Metadata and tensor list, checked against the file's size.
#[derive(Debug, Clone)]
pub struct GgufHeader {
    /// Metadata by key.
    pub metadata: BTreeMap<String, Value>,
    /// Tensors by the file's own names.
    pub tensors: BTreeMap<String, GgufTensorInfo>,
}

/// The storage of dtype number `id`; the ones that Candle can dequantise.
fn dtype_of(id: u32) -> Option<GgmlDType> {
    Some(match id {
        0 => GgmlDType::F32,
        1 => GgmlDType::F16,
        2 => GgmlDType::Q4_0,
        3 => GgmlDType::Q4_1,
        6 => GgmlDType::Q5_0,
        7 => GgmlDType::Q5_1,
        8 => GgmlDType::Q8_0,
        10 => GgmlDType::Q2K,
        11 => GgmlDType::Q3K,
        12 => GgmlDType::Q4K,
        13 => GgmlDType::Q5K,
        14 => GgmlDType::Q6K,
        30 => GgmlDType::BF16,
        _ => return None,
    })
}

/// Reads the header and never past the end of the file.
struct Cursor<'a> {
    reader: BufReader<File>,
    path: &'a Path,
    position: u64,
    size: u64,
}

impl Cursor<'_> {
    fn bad(&self, message: impl std::fmt::Display) -> Error {
        Error::format(self.path, "GGUF", message)
    }

    fn left(&self) -> u64 {
        self.size.saturating_sub(self.position)
    }

    fn take<const N: usize>(&mut self) -> Result<[u8; N]> {
        if self.left() < N as u64 {
            return Err(self.bad(format_args!("truncated in the header, at byte {}", self.position)));
        }
        let mut raw = [0u8; N];
        self.reader.read_exact(&mut raw).map_err(|e| Error::io(self.path, e))?;
        self.position += N as u64;
        Ok(raw)
    }

    fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.take()?))
    }

    fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.take()?))
    }

    /// A count of things that take at least `least` bytes each: more than fit into the rest of the file is corrupt.
    fn count(&mut self, least: u64, what: &str) -> Result<usize> {
        let count = self.u64()?;
        let fits = count.checked_mul(least).is_some_and(|bytes| bytes <= self.left());
        match usize::try_from(count) {
            Ok(count) if fits => Ok(count),
            _ => Err(self.bad(format_args!(
                "{count} {what} do not fit into the {} bytes left (truncated or corrupt)",
                self.left()
            ))),
        }
    }

    fn string(&mut self) -> Result<String> {
        let len = self.count(1, "bytes of a string")?;
        let mut raw = vec![0u8; len];
        self.reader.read_exact(&mut raw).map_err(|e| Error::io(self.path, e))?;
        self.position += len as u64;
        String::from_utf8(raw).map_err(|e| self.bad(format_args!("a string that is no UTF-8: {e}")))
    }

    fn value(&mut self, kind: u32, depth: usize) -> Result<Value> {
        Ok(match kind {
            0 => Value::U8(u8::from_le_bytes(self.take()?)),
            1 => Value::I8(i8::from_le_bytes(self.take()?)),
            2 => Value::U16(u16::from_le_bytes(self.take()?)),
            3 => Value::I16(i16::from_le_bytes(self.take()?)),
            4 => Value::U32(self.u32()?),
            5 => Value::I32(i32::from_le_bytes(self.take()?)),
            6 => Value::F32(f32::from_le_bytes(self.take()?)),
            7 => match self.take::<1>()? {
                [0] => Value::Bool(false),
                [1] => Value::Bool(true),
                [other] => return Err(self.bad(format_args!("a truth value of {other}"))),
            },
            8 => Value::String(self.string()?),
            9 => {
                if depth == MAX_DEPTH {
                    return Err(self.bad(format_args!("arrays nested more than {MAX_DEPTH} deep")));
                }
                let kind = self.u32()?;
                let least = match kind {
                    0 | 1 | 7 => 1,
                    2 | 3 => 2,
                    4..=6 => 4,
                    8 | 10..=12 => 8,
                    9 => 12,
                    other => return Err(self.bad(format_args!("an array of the unknown type {other}"))),
                };
                let count = self.count(least, "array elements")?;
                let mut values = Vec::new();
                for _ in 0..count {
                    values.push(self.value(kind, depth + 1)?);
                }
                Value::Array(values)
            }
            10 => Value::U64(self.u64()?),
            11 => Value::I64(i64::from_le_bytes(self.take()?)),
            12 => Value::F64(f64::from_le_bytes(self.take()?)),
            other => return Err(self.bad(format_args!("a value of the unknown type {other}"))),
        })
    }

    /// One entry of the tensor list; `offset` still counts from the beginning of the data.
    fn tensor(&mut self) -> Result<(String, GgufTensorInfo)> {
        let name = self.string()?;
        let rank = self.u32()?;
        if rank > MAX_DIMS {
            return Err(self.bad(format_args!("tensor `{name}` has {rank} dims, at most {MAX_DIMS} are legal")));
        }
        let mut shape = Vec::new();
        for _ in 0..rank {
            let dim = self.u64()?;
            shape.push(usize::try_from(dim).map_err(|e| self.bad(format_args!("tensor `{name}`: {e}")))?);
        }
        shape.reverse();
        let elements = super::elements(&shape);
        let id = self.u32()?;
        let offset = self.u64()?;
        let Some(dtype) = dtype_of(id) else {
            return Err(
                self.bad(format_args!("tensor `{name}` has storage type {id}, which cannot be dequantised here"))
            );
        };
        let block = dtype.block_size() as u64;
        // Rows are stored whole, so it is the last dim that blocks must divide.
        if shape.last().is_some_and(|&row| !(row as u64).is_multiple_of(block)) {
            return Err(self.bad(format_args!(
                "tensor `{name}`: rows of {:?} do not divide into {dtype:?} blocks of {block}",
                shape.last()
            )));
        }
        let size = elements
            .filter(|n| n.is_multiple_of(block))
            .and_then(|n| (n / block).checked_mul(dtype.type_size() as u64));
        match size {
            Some(size) if size <= self.size => Ok((name, GgufTensorInfo { shape, dtype, offset, size })),
            _ => Err(self.bad(format_args!(
                "tensor `{name}` of shape {shape:?} ({dtype:?}) is larger than the file (truncated or corrupt)"
            ))),
        }
    }
}

impl GgufHeader {
    /// Reads the header of a GGUF file (versions 2 and 3) and checks every count, size and offset in it.
    ///
    /// # Errors
    /// [`Error::Io`], and [`Error::Format`] with the first thing that is wrong.
    pub fn read(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let file = File::open(path).map_err(|e| Error::io(path, e))?;
        let size = file.metadata().map_err(|e| Error::io(path, e))?.len();
        let mut cursor = Cursor { reader: BufReader::new(file), path, position: 0, size };
        if &cursor.take::<4>()? != b"GGUF" {
            return Err(cursor.bad("it does not begin with `GGUF`"));
        }
        let version = cursor.u32()?;
        if !(2..=3).contains(&version) {
            return Err(cursor.bad(format_args!("version {version} cannot be read (2 and 3 can)")));
        }
        // An entry of the tensor list: name length, rank, storage type, offset. One of metadata: key length, type, a byte.
        let tensor_count = cursor.count(24, "tensors")?;
        let metadata_count = cursor.count(13, "metadata entries")?;
        let mut metadata = BTreeMap::new();
        for _ in 0..metadata_count {
            let key = cursor.string()?;
            let kind = cursor.u32()?;
            let value = cursor.value(kind, 0)?;
            metadata.insert(key, value);
        }
        let mut tensors = BTreeMap::new();
        for _ in 0..tensor_count {
            let (name, info) = cursor.tensor()?;
            if tensors.contains_key(&name) {
                return Err(cursor.bad(format_args!("tensor `{name}` is listed twice")));
            }
            tensors.insert(name, info);
        }
        let alignment = match metadata.get("general.alignment") {
            None => 32,
            Some(value) => match value.to_u64() {
                Ok(alignment) if alignment > 0 && alignment.is_multiple_of(8) => alignment,
                _ => return Err(cursor.bad(format_args!("an alignment of {value:?} (a multiple of 8 is legal)"))),
            },
        };
        let data = cursor
            .position
            .checked_next_multiple_of(alignment)
            .ok_or_else(|| cursor.bad(format_args!("an alignment of {alignment}")))?;
        for (name, info) in &mut tensors {
            let begin = data.checked_add(info.offset);
            let end = begin.and_then(|begin| begin.checked_add(info.size));
            match (begin, end) {
                (Some(begin), Some(end)) if end <= size => info.offset = begin,
                _ => {
                    return Err(cursor.bad(format_args!(
                        "truncated: tensor `{name}` needs {} bytes at {} of the data, the file ends before",
                        info.size, info.offset
                    )))
                }
            }
        }
        Ok(Self { metadata, tensors })
    }
}
