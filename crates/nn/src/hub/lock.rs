//! One process at a time fetches a model.

use crate::error::{Error, Result};
use std::fs::{File, OpenOptions, TryLockError};
use std::path::Path;

/// A lock on a file, given back when it is dropped. The system gives it back when the process ends, however it ends, so
/// that the file which stays behind blocks nobody.
#[derive(Debug)]
pub(super) struct Lock {
    _file: File,
}

impl Lock {
    /// Waits until no other process has the lock of `path`; tells `waiting` if it has to.
    pub(super) fn acquire(path: &Path, waiting: impl FnOnce()) -> Result<Self> {
        let file = OpenOptions::new().create(true).truncate(false).write(true).open(path);
        let file = file.map_err(|e| Error::io(path, e))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                waiting();
                file.lock().map_err(|e| Error::io(path, e))?;
            }
            Err(TryLockError::Error(e)) => return Err(Error::io(path, e)),
        }
        Ok(Self { _file: file })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;
    use std::time::Duration;

    #[test]
    fn the_second_waits_for_the_first() -> std::result::Result<(), Box<dyn std::error::Error>> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("model.lock");
        let first = Lock::acquire(&path, || panic!("nobody else has it"))?;
        let (send, events) = mpsc::channel();
        let second = std::thread::spawn(move || {
            let waits = send.clone();
            let lock = Lock::acquire(&path, move || {
                let _ = waits.send("waits");
            });
            let _ = send.send("has it");
            lock.map(|_| ())
        });
        assert_eq!(events.recv_timeout(Duration::from_secs(20))?, "waits");
        assert!(events.recv_timeout(Duration::from_millis(100)).is_err(), "the lock is held");
        drop(first);
        assert_eq!(events.recv_timeout(Duration::from_secs(20))?, "has it");
        assert!(matches!(second.join(), Ok(Ok(()))));
        Ok(())
    }

    #[test]
    fn a_lock_that_cannot_be_made_is_named() {
        let error = Lock::acquire(Path::new("no/such/folder/model.lock"), || ()).map(|_| ());
        assert!(matches!(&error, Err(Error::Io { path, .. }) if path.ends_with("model.lock")), "{error:?}");
    }
}
