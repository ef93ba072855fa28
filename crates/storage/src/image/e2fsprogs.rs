//! Runs e2fsprogs on an image, and judges their output.
//!
//! Exit code and standard error together decide whether a program succeeded: several of e2fsprogs
//! exit with 0 after printing an error. The callers verify that a program changed nothing else.

use scalebox_programs::{Program, ProgramError, Run};
use std::ffi::OsString;
use std::fs::File;
use std::path::Path;

/// The result of a program that worked on an image.
#[derive(Debug)]
pub(crate) struct ImageRun {
    /// Exit code; `None` when a signal killed the program.
    pub(crate) code: Option<i32>,
    /// The exit code or the signal, as text.
    pub(crate) status: String,
    stdout: String,
    /// Standard error, without the banner.
    complaints: String,
    /// The name under which the program got the image.
    image: String,
}

impl ImageRun {
    /// Returns the first line on standard error that is not `harmless`. A program that prints such
    /// a line has failed, whatever its exit code.
    pub(crate) fn complaint(&self, harmless: impl Fn(&str) -> bool) -> Option<&str> {
        let mut lines = self.complaints.lines().map(str::trim);
        lines.find(|line| !line.is_empty() && !harmless(line))
    }

    /// Returns the program's output on both streams, with the name of the image replaced.
    pub(crate) fn output(&self) -> String {
        let stdout = self.stdout.replace(&self.image, "the image");
        let parts = [stdout.trim(), self.complaints.trim()];
        parts
            .into_iter()
            .filter(|part| !part.is_empty())
            .collect::<Vec<_>>()
            .join("\n")
    }

    /// Returns whether the host caused the failure, not the image: a system call failed, or the
    /// program was killed.
    pub(crate) fn is_fault_of_host(&self) -> bool {
        let output = self.output();
        self.code.is_none() || HOST_FAULTS.iter().any(|fault| output.contains(fault))
    }

    /// Returns the same as [`ImageRun::is_fault_of_host`], for an image that was just found sound
    /// and is therefore readable.
    pub(crate) fn is_fault_on_sound_image(&self) -> bool {
        let output = self.output();
        self.is_fault_of_host() || UNREADABLE.iter().any(|fault| output.contains(fault))
    }
}

/// Messages of e2fsprogs when they cannot read or write part of an image, whatever the cause.
const UNREADABLE: [&str; 3] = ["Can't read ", "Can't write ", "Attempt to "];

/// Messages of the C library and e2fsprogs for errors that a sound host does not have. A truncated
/// or damaged file system has other messages, such as "Attempt to read block from filesystem
/// resulted in short read".
const HOST_FAULTS: [&str; 16] = [
    "Input/output error",
    "No space left on device",
    "Disk quota exceeded",
    "Read-only file system",
    "Cannot allocate memory",
    "Memory allocation failed",
    "Too many open files",
    "File too large",
    "Permission denied",
    "Operation not permitted",
    "No such file or directory",
    "Bad file descriptor",
    "Interrupted system call",
    "resulted in short write",
    "Device or resource busy",
    "Resource temporarily unavailable",
];

/// Runs a program on an image. The program runs in the image's folder and gets the bare name, so
/// that its output contains no path. `input` becomes its standard input.
pub(crate) fn run_on_image(
    image: &Path,
    program: Program,
    options: &[&str],
    input: Option<File>,
) -> Result<ImageRun, ProgramError> {
    let bare = bare_name(image);
    let mut run = Run::of(program).args(options).args([&bare]);
    if let Some(folder) = image.parent() {
        run = run.folder(folder);
    }
    if let Some(input) = input {
        run = run.input_file(input);
    }
    let output = run.output()?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    let complaints: Vec<&str> = stderr.lines().filter(|line| !is_banner(program, line)).collect();
    let image = bare.to_string_lossy().into_owned();
    Ok(ImageRun {
        code: output.status.code(),
        status: output.status.to_string(),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        complaints: complaints.join("\n").replace(&image, "the image"),
        image,
    })
}

/// Returns the file's name relative to its folder, in a form that no program mistakes for an
/// option.
pub(crate) fn bare_name(file: &Path) -> OsString {
    let mut name = OsString::from("./");
    name.push(file.file_name().unwrap_or_default());
    name
}

/// Recognizes `debugfs 1.47.0 (5-Feb-2023)`, the first line of e2fsprogs on standard error.
fn is_banner(program: Program, line: &str) -> bool {
    let version = line
        .strip_prefix(program.name())
        .and_then(|rest| rest.strip_prefix(' '));
    version.is_some_and(|rest| rest.starts_with(|digit: char| digit.is_ascii_digit()) && rest.ends_with(')'))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::programs::{DEBUGFS, E2FSCK};

    #[test]
    fn any_exit_status_is_returned_with_the_output_and_without_paths() {
        let folder = tempfile::tempdir().unwrap();
        let run = run_on_image(&folder.path().join("absent"), E2FSCK, &["-n"], None).unwrap();
        let output = run.output();
        assert!(run.code.is_some_and(|code| code != 0), "{}", run.status);
        assert!(output.contains("No such file or directory"), "{output}");
        assert!(!output.contains("absent") && output.contains("the image"), "{output}");
        assert!(run.is_fault_of_host());
    }

    fn answer(code: i32, complaints: &str) -> ImageRun {
        ImageRun {
            code: Some(code),
            status: format!("exit status: {code}"),
            stdout: String::new(),
            complaints: complaints.to_owned(),
            image: "./x".to_owned(),
        }
    }

    #[test]
    fn any_line_on_standard_error_except_the_banner_is_a_complaint() {
        assert!(is_banner(DEBUGFS, "debugfs 1.47.0 (5-Feb-2023)"));
        assert!(!is_banner(E2FSCK, "debugfs 1.47.0 (5-Feb-2023)"));
        assert!(!is_banner(E2FSCK, "e2fsck: Input/output error"));
        assert_eq!(answer(0, "\n \n").complaint(|_| false), None);
        let complains = answer(0, "fine\nresize2fs: Input/output error while closing");
        assert_eq!(
            complains.complaint(|line| line == "fine"),
            Some("resize2fs: Input/output error while closing")
        );
    }

    #[test]
    fn failed_system_calls_are_host_faults_and_short_reads_are_not() {
        assert!(answer(4, "Error writing block 7 (Input/output error).").is_fault_of_host());
        assert!(
            !answer(
                4,
                "Error reading block 7 (Attempt to read block from filesystem resulted in short read)"
            )
            .is_fault_of_host()
        );
        assert!(
            ImageRun {
                code: None,
                ..answer(0, "")
            }
            .is_fault_of_host()
        );
    }
}
