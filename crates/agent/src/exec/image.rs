//! A program with its arguments and environment, ready to be executed after fork(2), where no
//! memory may be allocated.

use crate::exec::user::Account;
use scalebox_agent_api::StartExec;
use std::collections::HashMap;
use std::ffi::{CString, NulError, c_char};
use std::io;

const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
const DEFAULT_TERM: &str = "xterm-256color";

/// A program to execute.
pub(crate) struct Image {
    /// The paths at which the program may be, in the order of `PATH`.
    candidates: Vec<CString>,
    arguments: Vector,
    environment: Vector,
}

impl Image {
    /// Prepares the program of a request, with the variables that the agent adds.
    ///
    /// # Errors
    /// A zero byte in a string.
    pub(crate) fn new(request: &StartExec, account: &Account) -> Result<Image, NulError> {
        let environment = environment(request, account);
        let path = environment.iter().find(|(name, _)| *name == "PATH");
        let candidates = candidates(
            request.argv.first().map_or("", String::as_str),
            path.map_or("", |(_, path)| path),
        );
        let variables = environment.iter().map(|(name, value)| format!("{name}={value}"));
        Ok(Image {
            candidates: candidates.into_iter().map(CString::new).collect::<Result<_, _>>()?,
            arguments: Vector::new(request.argv.iter().cloned())?,
            environment: Vector::new(variables)?,
        })
    }

    /// Replaces this process by the program; returns only if that fails. Tries the candidates as
    /// execvp(3) does, but never runs a file without `#!` as a shell script. Allocates nothing.
    pub(crate) fn execute(&self) -> io::Error {
        let mut failed = libc::ENOENT;
        for candidate in &self.candidates {
            // SAFETY: the pointers are valid strings and arrays that end with a null pointer.
            unsafe { libc::execve(candidate.as_ptr(), self.arguments.as_ptr(), self.environment.as_ptr()) };
            let error = io::Error::last_os_error();
            match error.raw_os_error() {
                Some(libc::EACCES) => failed = libc::EACCES,
                Some(libc::ENOENT | libc::ENOTDIR) if self.candidates.len() > 1 => {}
                _ => return error,
            }
        }
        io::Error::from_raw_os_error(failed)
    }
}

fn candidates(program: &str, path: &str) -> Vec<String> {
    if program.contains('/') {
        return vec![program.to_owned()];
    }
    let folders = path
        .split(':')
        .map(|folder| if folder.is_empty() { "." } else { folder });
    folders.map(|folder| format!("{folder}/{program}")).collect()
}

/// Returns the variables; of two with the same name, the last one.
fn environment<'a>(request: &'a StartExec, account: &'a Account) -> Vec<(&'a str, &'a str)> {
    let name = account.name.as_deref().or((account.uid == 0).then_some("root"));
    let term = request
        .tty
        .as_ref()
        .map(|tty| tty.term.as_deref().unwrap_or(DEFAULT_TERM));
    let added = [
        ("PATH", Some(DEFAULT_PATH)),
        ("HOME", Some(account.home.as_str())),
        ("USER", name),
        ("LOGNAME", name),
        ("SHELL", account.shell.as_deref()),
        ("TERM", term),
    ];
    let added = added.into_iter().filter_map(|(name, value)| Some((name, value?)));
    let requested = request.env.iter().map(|(name, value)| (name.as_str(), value.as_str()));
    let (mut variables, mut positions) = (Vec::new(), HashMap::new());
    for (name, value) in added.chain(requested) {
        let position = *positions.entry(name).or_insert(variables.len());
        match variables.get_mut(position) {
            Some(variable) => *variable = (name, value),
            None => variables.push((name, value)),
        }
    }
    variables
}

/// Strings, and the array of pointers to them that execve(2) takes.
struct Vector {
    pointers: Vec<*const c_char>,
    _strings: Vec<CString>,
}

// SAFETY: the pointers point to the heap memory of the strings, which nothing changes.
unsafe impl Send for Vector {}
// SAFETY: as above.
unsafe impl Sync for Vector {}

impl Vector {
    fn new(strings: impl Iterator<Item = String>) -> Result<Vector, NulError> {
        let strings: Vec<CString> = strings.map(CString::new).collect::<Result<_, _>>()?;
        let pointers = strings.iter().map(|string| string.as_ptr());
        Ok(Vector {
            pointers: pointers.chain([std::ptr::null()]).collect(),
            _strings: strings,
        })
    }

    fn as_ptr(&self) -> *const *const c_char {
        self.pointers.as_ptr()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_searched_for_in_the_path() {
        assert_eq!(candidates("./a", "/bin"), ["./a"]);
        assert_eq!(candidates("a", "/bin::/sbin"), ["/bin/a", "./a", "/sbin/a"]);
    }
}
