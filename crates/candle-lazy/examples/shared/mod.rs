//! What the examples share: progress bars for fetching, and how a program ends.

use candle_lazy::nn::hub::Progress;
use indicatif::{ProgressBar, ProgressStyle};
use std::cell::{Cell, RefCell};
use std::error::Error;
use std::fmt::Display;
use std::io::{ErrorKind, Write};
use std::process::ExitCode;
use std::time::Duration;

/// Bars on stderr; where that is no terminal, a line per step and per quarter of it.
#[derive(Default)]
pub(crate) struct Bars {
    bar: RefCell<Option<ProgressBar>>,
    quarters: Cell<u64>,
}

const BYTES: &str = "{msg} [{wide_bar}] {bytes}/{total_bytes}";
const COUNT: &str = "{msg} {spinner}";

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

impl Progress for Bars {
    fn start(&self, what: &str, total: Option<u64>) {
        let bar = match total {
            Some(total) => ProgressBar::new(total).with_style(style(BYTES)),
            None => ProgressBar::new_spinner().with_style(style(COUNT)),
        };
        bar.set_message(what.to_string());
        bar.enable_steady_tick(Duration::from_millis(200));
        if bar.is_hidden() {
            say(what);
        }
        self.quarters.set(0);
        if let Some(before) = self.bar.borrow_mut().replace(bar) {
            before.finish();
        }
    }

    fn update(&self, done: u64, total: Option<u64>) {
        if let Some(bar) = &*self.bar.borrow() {
            if let Some(total) = total.filter(|total| bar.length() != Some(*total)) {
                bar.set_length(total);
                bar.set_style(style(BYTES));
            }
            bar.set_position(done);
            let quarters = done.saturating_mul(4) / total.unwrap_or(u64::MAX).max(1);
            if bar.is_hidden() && quarters > self.quarters.replace(quarters) {
                say(format_args!("{}: {} %", bar.message(), quarters * 25));
            }
        }
    }

    fn finish(&self) {
        if let Some(bar) = self.bar.borrow_mut().take() {
            bar.finish();
        }
    }
}

/// A line on stderr. One that cannot be written is no reason to stop.
pub(crate) fn say(line: impl Display) {
    drop(writeln!(std::io::stderr(), "{line}"));
}

/// Success, or the error on stderr. A reader that has enough and closes the pipe (`| head`) is no error.
pub(crate) fn exit(result: Result<(), Box<dyn Error>>) -> ExitCode {
    let Err(error) = result else {
        return ExitCode::SUCCESS;
    };
    match error.downcast_ref::<std::io::Error>() {
        Some(io) if io.kind() == ErrorKind::BrokenPipe => return ExitCode::SUCCESS,
        // The library names the file in its own errors: this is the output.
        Some(io) => say(format_args!("error: writing the output: {io}")),
        None => say(format_args!("error: {error}")),
    }
    ExitCode::FAILURE
}
