//! Commands in VMs: `POST /vms/{vm}/exec` and the routes below `/vms/{vm}/execs`.

use crate::host::Host;
use crate::host::error::ServiceError;
use crate::http::error;
use crate::http::exec_result;
use crate::http::extract::{ExecPath, RawBody, Segment};
use crate::http::query::{MAX_OFFSET, Params};
use crate::http::upload::upload;
use crate::vm::exec::{self, Follow};
use crate::vm::guest;
use axum::Json;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::header::{ACCEPT, CONTENT_TYPE, LOCATION};
use axum::http::{HeaderMap, StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use futures::stream::{self, Stream};
use scalebox_agent_api::frame::Frame;
use scalebox_api::{CreateExec, Exec, ExecList, ExecResult, OutputLine, SignalExec, StartedExec, WindowSize};
use std::convert::Infallible;

/// The media type of a stream of JSON lines.
const NDJSON: &str = "application/x-ndjson";
/// Runs a command in a VM, and returns its output and exit status.
///
/// With `Accept: application/x-ndjson` the output is streamed while the command runs. With
/// `background` the response has only the id of the command.
#[utoipa::path(
    post, path = "/vms/{vm}/exec", tag = "Exec", request_body = CreateExec,
    params(
        ("vm" = String, Path, description = "Id or name of the VM."),
        ("Accept" = Option<String>, Header, description = "`application/x-ndjson` for a stream of lines."),
    ),
    responses(
        (status = 200, description = "The command has ended, or its output follows.", content(
            (ExecResult = "application/json"), (OutputLine = "application/x-ndjson")
        )),
        (status = 202, body = StartedExec, description = "The command runs in the background.", headers(
            ("Location" = String, description = "The path of the exec.")
        )),
        (status = 400, description = "A field is invalid; the error names it."),
        (status = 403, description = "The guest's kernel does not allow the user to run the program."),
        (status = 404, description = "No such VM, or no such program, directory or user in it."),
        (status = 409, description = "The VM is not running, or too many commands run in it."),
        (status = 503, description = "The VM's agent does not respond, or too many requests are in progress."),
    )
)]
pub(crate) async fn run(
    State(host): State<Host>,
    Segment(vm): Segment,
    headers: HeaderMap,
    RawBody(body): RawBody,
) -> Result<Response, ServiceError> {
    let request = CreateExec::parse(&body)?;
    if !request.background && !accepts_lines(&headers) {
        let finished = exec::run(&host, &vm, &request).await?;
        let json = [(CONTENT_TYPE, "application/json")];
        return Ok((json, exec_result::body(finished)).into_response());
    }
    let started = exec::start(&host, &vm, &request).await?;
    let id = started.id.clone();
    if request.background {
        let location = format!("/vms/{}/execs/{id}", started.guest.record.id);
        let body = Json(StartedExec { exec: id });
        return Ok((StatusCode::ACCEPTED, [(LOCATION, location)], body).into_response());
    }
    let first = OutputLine::Started { exec: id };
    let follow = started.follow().await?;
    Ok(ndjson(lines(Some(first), follow, true)))
}

fn accepts_lines(headers: &HeaderMap) -> bool {
    let accepted = headers.get_all(ACCEPT).iter().filter_map(|value| value.to_str().ok());
    accepted
        .flat_map(|value| value.split(','))
        .any(|range| range.split(';').next().is_some_and(|media| media.trim() == NDJSON))
}

fn ndjson(lines: impl Stream<Item = Result<Bytes, Infallible>> + Send + 'static) -> Response {
    ([(CONTENT_TYPE, NDJSON)], Body::from_stream(lines)).into_response()
}

/// Returns the lines of a command's output. With `to_the_end`, the last line is the end of the
/// command or an error.
fn lines(
    first: Option<OutputLine>,
    follow: Follow,
    to_the_end: bool,
) -> impl Stream<Item = Result<Bytes, Infallible>> + Send {
    stream::unfold(Some((first, follow)), move |state| async move {
        let (first, mut follow) = state?;
        if let Some(line) = first {
            return Some((Ok(encode(&line)), Some((None, follow))));
        }
        let (line, is_last) = match follow.next().await {
            None if !to_the_end => return None,
            None => (failed(&follow.interrupted()), true),
            Some(Err(error)) => (failed(&error), true),
            Some(Ok(Frame::End { end, .. })) => {
                let exit = follow.end(end).await;
                (OutputLine::Exit { exit }, true)
            }
            Some(Ok(Frame::Stdout { offset, bytes })) => (OutputLine::Stdout { bytes, offset }, false),
            Some(Ok(Frame::Stderr { offset, bytes })) => (OutputLine::Stderr { bytes, offset }, false),
            Some(Ok(Frame::Lost { offset, count })) => (OutputLine::Lost { lost: count, offset }, false),
        };
        Some((Ok(encode(&line)), (!is_last).then_some((None, follow))))
    })
}

fn failed(error: &ServiceError) -> OutputLine {
    tracing::info!(%error, "the output of a command ended early");
    OutputLine::Failed(error::body(error))
}

fn encode(line: &OutputLine) -> Bytes {
    // Serialization cannot fail: the type has only strings as keys.
    let mut json = serde_json::to_vec(line).unwrap_or_default();
    json.push(b'\n');
    json.into()
}

/// Lists the commands that run in a VM, and the latest that have ended.
#[utoipa::path(
    get, path = "/vms/{vm}/execs", tag = "Exec", params(("vm" = String, Path, description = "Id or name of the VM.")),
    responses(
        (status = 200, body = ExecList), (status = 404, description = "No such VM."),
        (status = 409, description = "The VM is not running."), (status = 503, description = "The VM's agent does not respond."),
    )
)]
pub(crate) async fn list(State(host): State<Host>, Segment(vm): Segment) -> Result<Json<ExecList>, ServiceError> {
    let execs = exec::list(&host, &vm).await?;
    Ok(Json(ExecList { execs }))
}

/// Returns one command.
#[utoipa::path(
    get, path = "/vms/{vm}/execs/{exec}", tag = "Exec",
    params(("vm" = String, Path, description = "Id or name of the VM."), ("exec" = String, Path, description = "Id of the exec.")),
    responses(
        (status = 200, body = Exec), (status = 404, description = "No such VM or exec."),
        (status = 409, description = "The VM is not running."), (status = 503, description = "The VM's agent does not respond."),
    )
)]
pub(crate) async fn get(State(host): State<Host>, ExecPath { vm, exec }: ExecPath) -> Result<Json<Exec>, ServiceError> {
    exec::get(&host, &vm, &exec).await.map(Json)
}

/// Returns a command's output as lines of JSON.
#[utoipa::path(
    get, path = "/vms/{vm}/execs/{exec}/output", tag = "Exec",
    params(
        ("vm" = String, Path, description = "Id or name of the VM."), ("exec" = String, Path, description = "Id of the exec."),
        ("since" = Option<u64>, Query, description = "Offset of the first byte; by default 0. Bytes that the guest no longer has are reported as `lost`."),
        ("follow" = Option<bool>, Query, description = "`true` continues until the command ends; otherwise the stream ends after the output so far."),
    ),
    responses(
        (status = 200, content_type = "application/x-ndjson", body = OutputLine),
        (status = 400, description = "A query parameter is invalid; the error names it."),
        (status = 404, description = "No such VM or exec."),
        (status = 409, description = "The VM is not running."), (status = 503, description = "The VM's agent does not respond."),
    )
)]
pub(crate) async fn output(
    State(host): State<Host>,
    ExecPath { vm, exec }: ExecPath,
    uri: Uri,
) -> Result<Response, ServiceError> {
    let params = Params::parse(&uri, &["since", "follow"])?;
    let since = params.number("since", MAX_OFFSET)?.unwrap_or(0);
    let follow = params.flag("follow")?;
    let output = exec::output(&host, &vm, &exec, since, follow).await?;
    Ok(ndjson(lines(None, output, follow)))
}

/// Writes to a command's stdin.
#[utoipa::path(
    post, path = "/vms/{vm}/execs/{exec}/stdin", tag = "Exec",
    params(
        ("vm" = String, Path, description = "Id or name of the VM."), ("exec" = String, Path, description = "Id of the exec."),
        ("close" = Option<bool>, Query, description = "`true` closes stdin after the body."),
    ),
    request_body(content = [u8], content_type = "application/octet-stream"),
    responses(
        (status = 204, description = "The whole body was written to the command's pipe or terminal."),
        (status = 404, description = "No such VM or exec."),
        (status = 409, description = "The VM is not running, the command has ended, or its stdin is closed."),
        (status = 503, description = "The VM's agent does not respond."),
        (status = 504, description = "The command did not read its stdin in time."),
    )
)]
pub(crate) async fn stdin(
    State(host): State<Host>,
    ExecPath { vm, exec }: ExecPath,
    uri: Uri,
    body: Body,
) -> Result<StatusCode, ServiceError> {
    let close = Params::parse(&uri, &["close"])?.flag("close")?;
    let guest = guest::reach(&host, &vm).await?;
    let (bytes, failure) = upload(body);
    let written = guest.agent.write_stdin(exec.as_str(), bytes, close).await;
    failure.explain(written.map_err(|error| guest.failed(&error)))?;
    Ok(StatusCode::NO_CONTENT)
}

/// Sends a signal to a command and its children.
#[utoipa::path(
    post, path = "/vms/{vm}/execs/{exec}/signal", tag = "Exec", request_body = SignalExec,
    params(("vm" = String, Path, description = "Id or name of the VM."), ("exec" = String, Path, description = "Id of the exec.")),
    responses(
        (status = 204), (status = 404, description = "No such VM or exec."),
        (status = 409, description = "The VM is not running, or the command has ended."),
        (status = 503, description = "The VM's agent does not respond."),
    )
)]
pub(crate) async fn signal(
    State(host): State<Host>,
    ExecPath { vm, exec }: ExecPath,
    RawBody(body): RawBody,
) -> Result<StatusCode, ServiceError> {
    let SignalExec { signal } = SignalExec::parse(&body)?;
    exec::signal(&host, &vm, &exec, signal).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Sets the size of a command's terminal.
#[utoipa::path(
    post, path = "/vms/{vm}/execs/{exec}/resize", tag = "Exec", request_body = WindowSize,
    params(("vm" = String, Path, description = "Id or name of the VM."), ("exec" = String, Path, description = "Id of the exec.")),
    responses(
        (status = 204), (status = 400, description = "A field is invalid; the error names it."),
        (status = 404, description = "No such VM or exec."),
        (status = 409, description = "The VM is not running, the command has ended, or it has no terminal."),
        (status = 503, description = "The VM's agent does not respond."),
    )
)]
pub(crate) async fn resize(
    State(host): State<Host>,
    ExecPath { vm, exec }: ExecPath,
    RawBody(body): RawBody,
) -> Result<StatusCode, ServiceError> {
    let size = WindowSize::parse(&body)?;
    exec::resize(&host, &vm, &exec, size).await?;
    Ok(StatusCode::NO_CONTENT)
}
