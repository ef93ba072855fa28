//! Finds the handler of a request.

use crate::server::http::failed;
use crate::server::{Agent, Request, Response, no_route};
use crate::{exec, files, system};
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
    responded.unwrap_or_else(|failure| failed(&failure))
}
