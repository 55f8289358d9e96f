//! Progress bars for what takes long: fetching, unpacking, loading.

use crate::output::complain;
use candle_lazy::nn::hub::Progress;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::cell::{Cell, RefCell};
use std::time::Duration;

/// Bars on stderr; where that is no terminal, a line per step and per quarter of it.
#[derive(Debug, Default)]
pub struct Bars {
    current: RefCell<Option<ProgressBar>>,
    quarters: Cell<u64>,
}

const BYTES: &str = "{msg:40!} {bar:30} {bytes:>10} of {total_bytes} {eta:>4}";
const COUNT: &str = "{msg:40!} {spinner} {bytes}";

fn style(template: &str) -> ProgressStyle {
    // a template that is wrong would be a defect of this file; the default style still shows something
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

impl Progress for Bars {
    fn start(&self, what: &str, total: Option<u64>) {
        let bar = match total {
            Some(total) => ProgressBar::new(total).with_style(style(BYTES)),
            None => ProgressBar::new_spinner().with_style(style(COUNT)),
        };
        bar.set_draw_target(ProgressDrawTarget::stderr());
        bar.set_message(what.to_string());
        bar.enable_steady_tick(Duration::from_millis(200));
        if bar.is_hidden() {
            complain!("{what}");
        }
        self.quarters.set(0);
        if let Some(before) = self.current.borrow_mut().replace(bar) {
            before.finish();
        }
    }

    fn update(&self, done: u64, total: Option<u64>) {
        if let Some(bar) = &*self.current.borrow() {
            if let Some(total) = total.filter(|total| bar.length() != Some(*total)) {
                bar.set_length(total);
                bar.set_style(style(BYTES));
            }
            bar.set_position(done);
            let quarters = done.saturating_mul(4) / total.unwrap_or(u64::MAX).max(1);
            if bar.is_hidden() && quarters > self.quarters.replace(quarters) {
                complain!("{}: {} %", bar.message(), quarters * 25);
            }
        }
    }

    fn finish(&self) {
        if let Some(bar) = self.current.borrow_mut().take() {
            bar.finish();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_templates_are_valid() {
        for template in [BYTES, COUNT] {
            assert!(ProgressStyle::with_template(template).is_ok(), "{template}");
        }
    }

    #[test]
    fn steps_may_come_in_any_order() {
        let bars = Bars::default();
        bars.update(1, None);
        bars.finish();
        bars.start("a", None);
        bars.update(5, Some(10));
        let length = bars.current.borrow().as_ref().and_then(ProgressBar::length);
        assert_eq!(length, Some(10));
        bars.start("b", Some(3));
        bars.finish();
        assert!(bars.current.borrow().is_none());
    }
}
