//! `cargo xtask fetch`: the two real models, into the cache.

use crate::output::complain;
use crate::progress::Bars;
use candle_lazy::nn::hub::{cache_dir, ModelSource, ALL_MINILM_L6_V2, SMOLLM2_135M_INSTRUCT};
use std::io::{stdout, Write};

/// Fetches what the cache does not have yet and prints where it lies; the exit code is 1 where that fails.
#[must_use]
pub fn run() -> i32 {
    let fetch = || -> candle_lazy::Result<()> {
        let cache = cache_dir()?;
        for model in [&ALL_MINILM_L6_V2, &SMOLLM2_135M_INSTRUCT] {
            let dir = model.fetch(&cache, &Bars::default())?;
            // what is fetched stays fetched, also where nobody reads the path
            drop(writeln!(stdout(), "{}", dir.path().display()));
        }
        Ok(())
    };
    match fetch() {
        Ok(()) => 0,
        Err(error) => {
            complain!("fetch: {error}");
            1
        }
    }
}
