//! Finds the programs of the hypervisors on the `PATH`, and their versions.

use crate::error::{Error, Result};
use scalebox_programs::{ProgramError, Run};
use std::env;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Timeout of a program that prints its version.
const VERSION_TIMEOUT: Duration = Duration::from_secs(30);

/// Major and minor version.
pub(crate) type Version = (u32, u32);

/// Returns the first executable of that name on the `PATH`.
pub(crate) fn on_path(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .map(|folder| folder.join(program))
        .find(|candidate| is_executable(candidate))
}

/// Returns whether the file exists and can be executed.
pub(crate) fn is_executable(file: &Path) -> bool {
    file.metadata()
        .is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

/// Returns the error of a program that is installed but cannot be used.
pub(crate) fn unusable(program: &Path, why: impl ToString) -> Error {
    Error::Unusable {
        program: program.display().to_string(),
        why: why.to_string(),
    }
}

/// Runs `program --version`; `find` extracts the version from the output.
///
/// # Errors
/// [`Error::Unusable`] if the program fails, or is older than `min`.
pub(crate) fn query_version(
    program: &Path,
    min: Version,
    find: impl Fn(&str) -> Option<&str>,
) -> Result<(String, Version)> {
    let output = Run::of_file(program, VERSION_TIMEOUT)
        .args(["--version"])
        .output()
        .map_err(|error| match error {
            ProgramError::Start { source, .. } => unusable(program, source),
            other => unusable(program, other),
        })?;
    let text = String::from_utf8_lossy(&output.stdout);
    let found = find(&text).filter(|_| output.status.success());
    let Some((version, numbers)) = found.and_then(|version| Some((version, major_minor(version)?))) else {
        let errors = String::from_utf8_lossy(&output.stderr);
        let why = format!("--version: {}: {text}{errors}", output.status);
        return Err(unusable(program, why));
    };
    if numbers < min {
        let (major, minor) = min;
        let why = format!("version {version} is too old; {major}.{minor} or later is required");
        return Err(unusable(program, why));
    }
    Ok((version.to_owned(), numbers))
}

fn major_minor(version: &str) -> Option<Version> {
    let mut parts = version.split('.');
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_compared_by_their_first_two_numbers() {
        assert_eq!(major_minor("7.2.22"), Some((7, 2)));
        assert_eq!(major_minor("1.17.0-dev"), Some((1, 17)));
        assert!((1, 17) > (1, 8));
        assert_eq!(major_minor("seven"), None);
    }
}
