//! Writes to the stdin of an exec.

use crate::exec::table::{Exec, Fd};
use crate::server::{Failure, no_content};
use crate::server::{Request, Response};
use http_body_util::BodyExt;
use rustix::io::Errno;
use rustix::termios::{LocalModes, SpecialCodeIndex, tcgetattr};
use scalebox_agent_api::FailureCode;

/// Writes the body of a request to stdin as fast as the command reads it, then closes stdin if
/// requested. Requests for the same exec follow one another.
///
/// # Errors
/// [`FailureCode::Ended`] if the exec has no stdin, or it was closed by either side, or the command
/// has ended.
pub(crate) async fn respond(exec: &Exec, request: Request, close: bool) -> Result<Response, Failure> {
    let mut body = request.into_body();
    let _order = exec.input_order.lock().await;
    let input = exec.input().ok_or_else(|| without_input(exec))?;
    loop {
        let frame = tokio::select! {
            frame = body.frame() => frame,
            () = exec.exited() => return Err(exec.has_ended()),
        };
        match frame {
            None => break,
            Some(Err(error)) => {
                let error = format!("the request for stdin of exec {} was interrupted: {error}", exec.id);
                return Err(Failure::new(FailureCode::Other, error));
            }
            Some(Ok(frame)) => {
                if let Ok(bytes) = frame.into_data() {
                    write_all(exec, &input, &bytes).await?;
                }
            }
        }
    }
    if close {
        match exec.tty {
            true => end_of_file(exec, &input).await?,
            false => exec.close_input(),
        }
    }
    Ok(no_content())
}

fn without_input(exec: &Exec) -> Failure {
    match exec.is_running() {
        true => Failure::new(FailureCode::Ended, format!("stdin of exec {} is closed", exec.id)),
        false => exec.has_ended(),
    }
}

async fn write_all(exec: &Exec, input: &Fd, mut bytes: &[u8]) -> Result<(), Failure> {
    while !bytes.is_empty() {
        tokio::task::consume_budget().await;
        let ready = tokio::select! {
            ready = input.writable() => ready,
            () = exec.exited() => return Err(exec.has_ended()),
        };
        let mut ready = ready.map_err(Failure::io("write to stdin"))?;
        match ready.try_io(|fd| Ok(rustix::io::write(fd, bytes)?)) {
            Ok(Ok(written)) => bytes = &bytes[written..],
            Ok(Err(error)) if is_closed(Errno::from_io_error(&error)) => {
                let error = format!("the command of exec {} has closed its stdin", exec.id);
                return Err(Failure::new(FailureCode::Ended, error));
            }
            Ok(Err(error)) => return Err(Failure::io("write to stdin")(error)),
            Err(_would_block) => {}
        }
    }
    Ok(())
}

/// Returns whether an error means that no process has the pipe or the terminal open.
fn is_closed(error: Option<Errno>) -> bool {
    matches!(error, Some(Errno::PIPE | Errno::IO))
}

/// Sends the character that means the end of the input to a command that reads lines.
async fn end_of_file(exec: &Exec, terminal: &Fd) -> Result<(), Failure> {
    let attributes = tcgetattr(terminal.get_ref()).map_err(Failure::io("read the terminal's mode"))?;
    match attributes.local_modes.contains(LocalModes::ICANON) {
        true => write_all(exec, terminal, &[attributes.special_codes[SpecialCodeIndex::VEOF]]).await,
        false => Ok(()),
    }
}
