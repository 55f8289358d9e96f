//! Words on stdout and stderr that end no command in a panic: whoever reads them may leave, and a disk may be full.

use std::fmt;
use std::io::{self, Write};

/// The exit code where the reader of stdout left before the verdict: what a shell shows for a process that SIGPIPE ended.
pub const READER_LEFT: i32 = 141;

/// Stdout could not be written.
#[derive(Debug, thiserror::Error)]
#[error("stdout cannot be written: {0}")]
pub struct Error(#[from] io::Error);

/// Writes `text` to stdout and shows it at once.
///
/// # Errors
/// Where the system does not take it.
pub fn text(text: fmt::Arguments<'_>) -> Result<(), Error> {
    write_to(&mut io::stdout().lock(), text, "")
}

/// Writes `text` and a line end to stdout.
///
/// # Errors
/// As [`text`].
pub fn line(text: fmt::Arguments<'_>) -> Result<(), Error> {
    write_to(&mut io::stdout().lock(), text, "\n")
}

fn write_to(out: &mut dyn Write, text: fmt::Arguments<'_>, end: &str) -> Result<(), Error> {
    out.write_fmt(text)?;
    out.write_all(end.as_bytes())?;
    out.flush()?;
    Ok(())
}

/// Writes a line to stderr. Where that fails there is nobody left to tell.
pub fn complaint(text: fmt::Arguments<'_>) {
    drop(write_to(&mut io::stderr().lock(), text, "\n"));
}

/// The exit code of a command whose words did not arrive: quiet where the reader left, else an error like any other.
#[must_use]
pub fn failed(command: &str, error: &Error) -> i32 {
    if error.0.kind() == io::ErrorKind::BrokenPipe {
        return READER_LEFT;
    }
    complaint(format_args!("{command}: {error}"));
    1
}

/// `println!` with the error returned.
macro_rules! say {
    ($($text:tt)*) => {
        $crate::output::line(format_args!($($text)*))
    };
}

/// `eprintln!` without a panic.
macro_rules! complain {
    ($($text:tt)*) => {
        $crate::output::complaint(format_args!($($text)*))
    };
}

pub(crate) use {complain, say};

#[cfg(test)]
mod tests {
    use super::*;

    struct Refuses(io::ErrorKind);

    impl Write for Refuses {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(self.0.into())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_reader_that_left_and_a_full_disk_have_codes_of_their_own() {
        let code = |kind| failed("x", &write_to(&mut Refuses(kind), format_args!("a"), "\n").unwrap_err());
        assert_eq!(code(io::ErrorKind::BrokenPipe), READER_LEFT);
        assert_eq!(code(io::ErrorKind::StorageFull), 1);
    }

    #[test]
    fn a_line_ends() {
        let mut out = Vec::new();
        write_to(&mut out, format_args!("{} is {}", "a", 1), "\n").unwrap();
        assert_eq!(out, b"a is 1\n");
    }
}
