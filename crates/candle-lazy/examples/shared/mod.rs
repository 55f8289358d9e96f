//! What the examples share: progress bars for fetching, and how a program ends.

use candle_lazy::nn::hub::Progress;
use indicatif::{ProgressBar, ProgressStyle};
use std::cell::RefCell;
use std::error::Error;
use std::process::ExitCode;

/// Bars on stderr.
#[derive(Default)]
pub(crate) struct Bars(RefCell<Option<ProgressBar>>);

impl Progress for Bars {
    fn start(&self, what: &str, total: Option<u64>) {
        let bar = ProgressBar::new(total.unwrap_or(0)).with_message(what.to_string());
        if let Ok(style) = ProgressStyle::with_template("{msg} [{wide_bar}] {bytes}/{total_bytes}") {
            bar.set_style(style);
        }
        *self.0.borrow_mut() = Some(bar);
    }

    fn update(&self, done: u64, total: Option<u64>) {
        if let Some(bar) = &*self.0.borrow() {
            if let Some(total) = total {
                bar.set_length(total);
            }
            bar.set_position(done);
        }
    }

    fn finish(&self) {
        if let Some(bar) = self.0.borrow_mut().take() {
            bar.finish();
        }
    }
}

/// Success, or the error on stderr.
pub(crate) fn exit(result: Result<(), Box<dyn Error>>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}
