//! Checks the request to start an exec.

use crate::server::Failure;
use scalebox_agent_api::exec::{MAX_ARGUMENT, MAX_ARGUMENT_BYTES, MAX_ARGUMENTS, MAX_BUFFER};
use scalebox_agent_api::{FailureCode, StartExec};

/// Checks everything that does not depend on the guest.
///
/// # Errors
/// [`FailureCode::Invalid`].
pub(crate) fn check(request: &StartExec) -> Result<(), Failure> {
    check_id(&request.id)?;
    check_command(request)?;
    if request.timeout_ms == Some(0) {
        return invalid("the timeout is 0 ms");
    }
    if request.buffer.is_some_and(|size| size > MAX_BUFFER) {
        return invalid(format!("the buffer is larger than {MAX_BUFFER} bytes"));
    }
    Ok(())
}

/// Checks the command itself: arguments, environment, working directory.
///
/// # Errors
/// [`FailureCode::Invalid`].
pub(crate) fn check_command(request: &StartExec) -> Result<(), Failure> {
    check_strings(request)?;
    check_size(request)?;
    if let Some(cwd) = &request.cwd
        && !cwd.starts_with('/')
    {
        return invalid(format!("the working directory {cwd:?} is not an absolute path"));
    }
    Ok(())
}

fn invalid<T>(error: impl Into<String>) -> Result<T, Failure> {
    Err(Failure::new(FailureCode::Invalid, error))
}

fn check_id(id: &str) -> Result<(), Failure> {
    match id.strip_prefix("exec-") {
        Some(digits) if digits.len() == 12 && digits.bytes().all(|byte| byte.is_ascii_hexdigit()) => Ok(()),
        _ => invalid("the exec's id is not exec- and 12 hexadecimal digits"),
    }
}

fn check_strings(request: &StartExec) -> Result<(), Failure> {
    let Some(program) = request.argv.first() else {
        return invalid("argv is empty");
    };
    if program.is_empty() {
        return invalid("the program's name is empty");
    }
    if request.argv.iter().any(|argument| argument.contains('\0')) {
        return invalid("an argument contains a zero byte");
    }
    for (name, value) in &request.env {
        if name.is_empty() || name.contains(['=', '\0']) {
            return invalid(format!(
                "the name {name:?} of a variable is empty or contains = or a zero byte"
            ));
        }
        if value.contains('\0') {
            return invalid(format!("the variable {name} contains a zero byte"));
        }
    }
    let term = request.tty.as_ref().and_then(|tty| tty.term.as_ref());
    let others = [request.cwd.as_ref(), request.user.as_ref(), term];
    match others.into_iter().flatten().any(|text| text.contains('\0')) {
        true => invalid("the working directory, the user or TERM contains a zero byte"),
        false => Ok(()),
    }
}

/// Checks the limits of the kernel before it does: then the error names the limit.
fn check_size(request: &StartExec) -> Result<(), Failure> {
    if request.argv.len() > MAX_ARGUMENTS || request.env.len() > MAX_ARGUMENTS {
        return invalid(format!(
            "the command has more than {MAX_ARGUMENTS} arguments or variables"
        ));
    }
    let arguments = request.argv.iter().map(String::len);
    let variables = request.env.iter().map(|(name, value)| name.len() + 1 + value.len());
    if arguments
        .clone()
        .chain(variables.clone())
        .any(|length| length > MAX_ARGUMENT)
    {
        return invalid(format!("an argument or variable is longer than {MAX_ARGUMENT} bytes"));
    }
    let total: usize = arguments.chain(variables).map(|length| length + 1).sum();
    match total > MAX_ARGUMENT_BYTES {
        true => invalid(format!(
            "arguments and environment take more than {MAX_ARGUMENT_BYTES} bytes"
        )),
        false => Ok(()),
    }
}
