//! Sends signals to execs.

use crate::exec::table::Exec;
use crate::server::Failure;
use scalebox_agent_api::FailureCode;
use std::io;

/// Sends a signal to the process group of an exec.
///
/// # Errors
/// [`FailureCode::Invalid`] for a number that is not 1 to 64; [`FailureCode::Ended`].
pub(crate) fn send(exec: &Exec, signal: i32) -> Result<(), Failure> {
    if !(1..=64).contains(&signal) {
        let error = format!("the signal {signal} is not 1 to 64");
        return Err(Failure::new(FailureCode::Invalid, error));
    }
    // After the end, the number may belong to another process group.
    let Some(pid) = exec.pid.filter(|_| exec.is_running()) else {
        return Err(exec.has_ended());
    };
    // SAFETY: has no effect on the memory of this process.
    match unsafe { libc::kill(-pid.as_raw_pid(), signal) } {
        0 => Ok(()),
        _ => Err(Failure::io(format!("send the signal {signal} to exec {}", exec.id))(
            io::Error::last_os_error(),
        )),
    }
}
