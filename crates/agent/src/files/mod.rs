//! Files and directories.

use crate::server::{Failure, Request, Response, no_route};

/// Responds to a request below `/v1/files`; `rest` is the path after it.
pub(crate) async fn respond(request: Request, _rest: &[&str]) -> Result<Response, Failure> {
    Err(no_route(&request))
}
