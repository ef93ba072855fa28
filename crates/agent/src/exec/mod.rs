//! Commands: start, output, signals, terminals.

use crate::server::{Agent, Failure, Request, Response, no_route};
use std::sync::Arc;

/// The commands of a guest: those that run, and the last ones that ended.
#[derive(Default)]
pub(crate) struct Execs {}

impl Execs {
    /// Returns the number of commands that run.
    pub(crate) fn running(&self) -> u64 {
        0
    }
}

/// Responds to a request below `/v1/execs`; `rest` is the path after it.
pub(crate) async fn respond(_agent: &Arc<Agent>, request: Request, _rest: &[&str]) -> Result<Response, Failure> {
    Err(no_route(&request))
}
