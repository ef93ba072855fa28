//! Changes the size of terminals.

use crate::exec::streams;
use crate::exec::table::Exec;
use crate::server::Failure;
use scalebox_agent_api::{FailureCode, WindowSize};

/// Changes the size of an exec's terminal.
///
/// # Errors
/// [`FailureCode::Ended`] if the exec has ended or has no terminal.
pub(crate) fn resize(exec: &Exec, size: WindowSize) -> Result<(), Failure> {
    if !exec.tty {
        let error = format!("exec {} has no terminal", exec.id);
        return Err(Failure::new(FailureCode::Ended, error));
    }
    let terminal = exec.input().ok_or_else(|| exec.has_ended())?;
    streams::resize(terminal.get_ref(), size).map_err(Failure::io("change the size of the terminal"))
}
