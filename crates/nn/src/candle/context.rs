//! `context(…)` on results and options.

use candle_lazy_exec::{Error, Result};
use std::error::Error as StdError;
use std::fmt::Display;

/// Says what was being done when something failed or was missing; the lazy twin of `candle_core::Context`.
pub trait Context<T> {
    /// The value, or an error that begins with `context`.
    ///
    /// # Errors
    /// When there is no value.
    fn context<C: Display + Send + Sync + 'static>(self, context: C) -> Result<T>;

    /// The same, with a context that is made only when it is needed.
    ///
    /// # Errors
    /// When there is no value.
    fn with_context<C: Display + Send + Sync + 'static, F: FnOnce() -> C>(self, context: F) -> Result<T>;
}

/// Any error as the engine's; its own and Candle's stay what they are.
fn engine_error<E: StdError + Send + Sync + 'static>(error: E) -> Error {
    let error: Box<dyn StdError + Send + Sync> = Box::new(error);
    let error = match error.downcast::<Error>() {
        Ok(error) => return *error,
        Err(error) => error,
    };
    match error.downcast::<candle_core::Error>() {
        Ok(error) => Error::Candle(*error),
        Err(error) => Error::Other(error),
    }
}

impl<T, E: StdError + Send + Sync + 'static> Context<T> for std::result::Result<T, E> {
    fn context<C: Display + Send + Sync + 'static>(self, context: C) -> Result<T> {
        self.map_err(|error| engine_error(error).context(context))
    }

    fn with_context<C: Display + Send + Sync + 'static, F: FnOnce() -> C>(self, context: F) -> Result<T> {
        self.map_err(|error| engine_error(error).context(context()))
    }
}

impl<T> Context<T> for Option<T> {
    fn context<C: Display + Send + Sync + 'static>(self, context: C) -> Result<T> {
        self.ok_or_else(|| Error::msg(context))
    }

    fn with_context<C: Display + Send + Sync + 'static, F: FnOnce() -> C>(self, context: F) -> Result<T> {
        self.ok_or_else(|| Error::msg(context()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn context_stands_before_the_error_and_its_kind_stays() {
        let missing: Option<u8> = None;
        assert_eq!(missing.context("no head").unwrap_err().to_string(), "no head");
        let parse = "x".parse::<u8>().with_context(|| "the layer count").unwrap_err();
        assert!(parse.to_string().starts_with("the layer count\ninvalid digit"), "{parse}");
        let candle: candle_core::Result<()> = Err(candle_core::Error::Msg("m".into()));
        let error = candle.context("loading").unwrap_err();
        assert!(matches!(error, Error::Context { inner, .. } if matches!(*inner, Error::Candle(_))));
        let own: Result<u8> = Err(Error::msg("m"));
        assert!(
            matches!(own.context("a").unwrap_err(), Error::Context { inner, .. } if matches!(*inner, Error::Msg(_)))
        );
        assert_eq!(Ok::<u8, Error>(3).context("a").unwrap(), 3);
    }
}
