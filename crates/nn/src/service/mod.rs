//! Services: one model, many callers that know nothing of each other.
//!
//! [`EmbeddingService`] turns texts into vectors, [`GenerationService`] continues texts. Each has a thread of its own that takes what
//! callers have submitted, computes it together, and answers each caller. A request's result is bit for bit what the model gives for it
//! alone, whatever it was computed with; an error, a panic or a caller that goes away concerns its own request only.
//!
//! Callers submit from any thread and wait on a thread or in any async runtime. Dropping what a submission returned cancels it.
//!
//! ```
//! # use candle_core::{DType, Device, Tensor};
//! # use candle_lazy_nn::models::{CausalLm, CausalLmConfig};
//! use candle_lazy_nn::service::{GenerationOptions, GenerationRequest, GenerationService, SubmitOptions};
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let config = CausalLmConfig::from_json(r#"{"vocab_size": 32, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1,
//! #     "num_attention_heads": 2, "max_position_embeddings": 32, "rms_norm_eps": 1e-5}"#)?;
//! # let weights = candle_nn::VarMap::new();
//! # let vb = candle_nn::VarBuilder::from_varmap(&weights, DType::F32, &Device::Cpu);
//! # let model = CausalLm::load(vb, &config)?;
//! let service = GenerationService::new(model, GenerationOptions::default())?;
//! let one = service.submit(GenerationRequest::new(vec![1, 2, 3]).max_new_tokens(4), &SubmitOptions::default())?;
//! let other = service.submit(GenerationRequest::new(vec![7]).max_new_tokens(2), &SubmitOptions::default())?;
//! // both are computed together, whoever waits first
//! assert_eq!(other.wait()?.tokens.len(), 2);
//! assert_eq!(one.wait()?.tokens.len(), 4);
//! # Ok(())
//! # }
//! ```

mod embedding;
mod generation;
mod stats;

pub use candle_lazy_exec::batch::{MaxWait, Priority, Shutdown, SubmitOptions, Window};
pub use embedding::{EmbeddingOptions, EmbeddingService, Embeddings};
pub use generation::{Completion, Finish, Generating, GenerationOptions, GenerationRequest, GenerationService, Piece};
pub use stats::{Histogram, ServiceStats};

use crate::error::{Error, Result};
use std::any::Any;
use std::panic::{catch_unwind, AssertUnwindSafe};

/// The target of the services' spans, which is the engine's.
const TARGET: &str = "candle_lazy";
use std::thread::JoinHandle;

/// What `work` gives; a panic becomes an error. What it left half done must be thrown away by the caller.
fn contained<T>(service: &'static str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(work))
        .unwrap_or_else(|panic| Err(Error::service(service, format_args!("a panic: {}", said(panic.as_ref())))))
}

/// What a panic said.
fn said(panic: &(dyn Any + Send)) -> &str {
    match (panic.downcast_ref::<&str>(), panic.downcast_ref::<String>()) {
        (Some(text), _) => text,
        (None, Some(text)) => text,
        (None, None) => "of an unknown kind",
    }
}

/// A thread of a service, that ends when its queue is closed; dropping this waits for it.
#[derive(Debug)]
struct Worker(Option<JoinHandle<()>>);

impl Worker {
    fn start(name: &str, work: impl FnOnce() + Send + 'static) -> Result<Self> {
        let thread = std::thread::Builder::new().name(name.to_string()).spawn(work);
        thread.map(|thread| Self(Some(thread))).map_err(|error| Error::io(name, error))
    }

    fn join(&mut self) {
        if let Some(thread) = self.0.take() {
            // what it panicked with was reported to those who wait: every job that it dropped is an error to its caller
            drop(thread.join());
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.join();
    }
}
