//! Maintainers' commands of candle-lazy, each a module with a `run` that returns the exit code.
//!
//! A library, so that what can be tested about the repository is a test (`tests/repository.rs`) and not only a command.

// A command's words go through `output`.
#![deny(clippy::print_stdout, clippy::print_stderr)]

pub mod api;
pub mod bench;
pub mod demo;
pub mod fetch;
pub mod output;
pub mod port;
pub mod progress;
pub mod stress;
pub mod tidy;
pub mod verify;

/// The blocks of the migration guide, as tests.
#[cfg(doctest)]
#[doc = include_str!("../../docs/MIGRATION_V1_TO_V2.md")]
pub struct MigrationGuide;
