//! What the fuzz targets share: bytes as a source of choices, a file to load, and which panics are known.
//!
//! A panic that the library contains (it becomes an `Error::Panic`) must not end the fuzzer, one that escapes must. So the
//! fuzzer's own hook, which aborts at every panic, is replaced by one that remembers the message.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, Once, PoisonError};

static LAST: Mutex<String> = Mutex::new(String::new());

/// Runs `body`; a panic that escapes it is printed and ends the process.
pub fn contained(body: impl FnOnce() + std::panic::UnwindSafe) {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        std::panic::set_hook(Box::new(|info| {
            *LAST.lock().unwrap_or_else(PoisonError::into_inner) = info.to_string();
        }));
    });
    if std::panic::catch_unwind(body).is_err() {
        eprintln!("escaped: {}", LAST.lock().unwrap_or_else(PoisonError::into_inner));
        std::process::abort();
    }
}

/// Bytes as choices; when they run out, every further one is 0.
#[derive(Debug)]
pub struct Choices<'a>(&'a [u8]);

impl<'a> Choices<'a> {
    /// Choices made by `bytes`.
    #[must_use]
    pub fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    /// Whether every byte was used.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The next byte.
    pub fn byte(&mut self) -> u8 {
        match self.0.split_first() {
            Some((first, rest)) => {
                self.0 = rest;
                *first
            }
            None => 0,
        }
    }

    /// A number below `n`.
    pub fn below(&mut self, n: usize) -> usize {
        usize::from(self.byte()) % n.max(1)
    }
}

/// A file of these bytes. One per process, overwritten by the next call.
///
/// # Errors
/// When it cannot be written.
pub fn file_of(bytes: &[u8], extension: &str) -> std::io::Result<PathBuf> {
    // memory where there is some: thousands of files a second
    let folder = Path::new("/dev/shm");
    let folder = if folder.is_dir() { folder.to_path_buf() } else { std::env::temp_dir() };
    let path = folder.join(format!("candle-lazy-fuzz-{}.{extension}", std::process::id()));
    std::fs::write(&path, bytes)?;
    Ok(path)
}
