//! A timeline of what the engine did, for Perfetto (ui.perfetto.dev) and for chrome://tracing.

use std::error::Error;
use std::path::Path;
use tracing_chrome::{ChromeLayerBuilder, FlushGuard};
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::{Layer, SubscriberExt};

/// From now on, the engine's spans and events on all threads go into the file at `path`, which is complete when the guard is dropped.
pub(crate) fn begin(path: &Path) -> Result<FlushGuard, Box<dyn Error>> {
    let file = std::fs::File::create(path).map_err(|e| format!("{}: {e}", path.display()))?;
    let (layer, guard) = ChromeLayerBuilder::new().writer(file).include_args(true).build();
    let ours = Targets::new().with_target("candle_lazy", LevelFilter::TRACE);
    tracing::subscriber::set_global_default(tracing_subscriber::registry().with(layer.with_filter(ours)))?;
    Ok(guard)
}
