//! The guest as a whole: statistics, flush, freeze, trim, growth, clock, shutdown.

use crate::server::{Agent, Failure, Request, Response, no_route};
use std::sync::Arc;

/// Responds to the other requests below `/v1`; `rest` is the path after it.
pub(crate) async fn respond(_agent: &Arc<Agent>, request: Request, _rest: &[&str]) -> Result<Response, Failure> {
    Err(no_route(&request))
}

/// Ends the guest: stops its processes, flushes and unmounts its file systems. Does not return if
/// that succeeds.
pub(crate) fn end_guest(_how: rustix::system::RebootCommand) {}
