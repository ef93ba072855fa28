//! The result of a step.

/// The result of a step. An error ends the run and is reported at its end.
pub(crate) type Outcome<T> = Result<T, Box<dyn std::error::Error + Send + Sync>>;
