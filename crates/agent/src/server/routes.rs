//! Finds the handler of a request.

use crate::server::{Agent, Failure, Request, Response};
use crate::{exec, files, system};
use scalebox_agent_api::FailureCode;
use std::sync::Arc;

/// Responds to a request; an error becomes a response too.
pub(crate) async fn respond(agent: &Arc<Agent>, request: Request) -> Response {
    let path = request.uri().path().to_owned();
    let parts: Vec<&str> = path.split('/').skip(1).collect();
    let responded = match parts.as_slice() {
        ["v1", "execs", rest @ ..] => exec::respond(&agent.execs, request, rest).await,
        ["v1", "files", rest @ ..] => files::respond(request, rest).await,
        ["v1", rest @ ..] => system::respond(agent, request, rest).await,
        _ => Err(no_route(&request)),
    };
    responded.unwrap_or_else(|failure| failure.response())
}

/// Returns the failure for a method and path that the protocol does not have.
pub(crate) fn no_route(request: &Request) -> Failure {
    Failure::new(
        FailureCode::Unsupported,
        format!(
            "this agent does not support {} {}",
            request.method(),
            request.uri().path()
        ),
    )
}
