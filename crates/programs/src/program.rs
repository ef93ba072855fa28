//! The description of an outside program: its name, its package and its limits.

use crate::error::ProgramError;
use std::ffi::OsString;
use std::path::Path;
use std::time::Duration;

/// The folders that are searched for programs, whatever `PATH` the caller has.
const SEARCH_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// An outside program. Each crate lists the ones that it runs as constants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Program {
    name: &'static str,
    package: &'static str,
    time_limit: Option<Duration>,
}

impl Program {
    /// Describes a program by the name of its executable and the Debian package that contains it.
    /// The program has no time limit.
    pub const fn new(name: &'static str, package: &'static str) -> Program {
        Program {
            name,
            package,
            time_limit: None,
        }
    }

    /// Returns the same program with a time limit, after which it is killed.
    pub const fn within(self, limit: Duration) -> Program {
        Program {
            time_limit: Some(limit),
            ..self
        }
    }

    /// Returns the name of the executable.
    pub const fn name(self) -> &'static str {
        self.name
    }

    /// Returns the Debian package that contains the program.
    pub const fn package(self) -> &'static str {
        self.package
    }

    /// Returns the time limit of the program; `None` if its duration depends on the size of its
    /// task.
    pub const fn time_limit(self) -> Option<Duration> {
        self.time_limit
    }

    /// Returns whether the program is installed in the search path, which is not the caller's
    /// `PATH`.
    pub fn is_installed(self) -> bool {
        SEARCH_PATH
            .split(':')
            .any(|folder| Path::new(folder).join(self.name).is_file())
    }

    pub(crate) fn missing(self) -> ProgramError {
        ProgramError::Missing {
            program: self.name,
            package: self.package,
        }
    }
}

/// Checks that every program is installed.
///
/// # Errors
/// [`ProgramError::Missing`] for the first missing program.
pub fn require(programs: &[Program]) -> Result<(), ProgramError> {
    match programs.iter().find(|program| !program.is_installed()) {
        Some(program) => Err(program.missing()),
        None => Ok(()),
    }
}

/// Returns the search path for programs; tests can prepend a folder.
pub(crate) fn search_path() -> OsString {
    let mut path = OsString::new();
    if let Some(first) = scalebox_fault_points::programs() {
        path.push(first);
        path.push(":");
    }
    path.push(SEARCH_PATH);
    path
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_missing_program_is_reported_with_its_package() {
        let (shell, absent) = (
            Program::new("sh", "dash"),
            Program::new("no-such-program", "no-package"),
        );
        assert!(require(&[shell]).is_ok());
        assert_eq!(
            require(&[shell, absent]).unwrap_err().to_string(),
            "the program no-such-program is missing"
        );
    }
}
