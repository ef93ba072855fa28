//! The errors of outside programs.

use std::io;

/// Maximum output in an error, in bytes from its start and from its end.
const MAX_START: usize = 64 << 10;
const MAX_END: usize = 192 << 10;

/// The errors of outside programs.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProgramError {
    /// The program is not installed.
    #[error("the program {program} is missing")]
    Missing {
        /// The program's name.
        program: &'static str,
        /// The Debian package that contains it.
        package: &'static str,
    },
    /// The program could not be started, fed, read or waited for.
    #[error("cannot run {program}: {source}")]
    Start {
        /// The program's name or path.
        program: String,
        /// The cause.
        source: io::Error,
    },
    /// The program ended with a failure.
    #[error("{command} failed ({status}):{}{output}", separator(output))]
    Failed {
        /// The program and its arguments.
        command: String,
        /// The exit status, or the signal that killed the program.
        status: String,
        /// The output on both streams, trimmed. The middle of an output over 256 KiB is omitted.
        output: String,
    },
    /// The program was killed: it did not end, or wrote too much.
    #[error("{command} was killed: it {why}")]
    Killed {
        /// The program and its arguments.
        command: String,
        /// The cause, such as "did not end within 300 s".
        why: String,
    },
}

/// Returns the text before an output: a line break if the output has several lines.
fn separator(output: &str) -> &'static str {
    if output.contains('\n') { "\n" } else { " " }
}

/// Shortens output for an error, which is logged.
pub(crate) fn bounded(output: &str) -> String {
    let output = output.trim();
    if output.len() <= MAX_START + MAX_END {
        return output.to_owned();
    }
    let (start, end) = (
        output.floor_char_boundary(MAX_START),
        output.ceil_char_boundary(output.len() - MAX_END),
    );
    format!(
        "{}\n[… {} bytes left out …]\n{}",
        &output[..start],
        end - start,
        &output[end..]
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_contains_the_start_and_the_end_of_long_output() {
        assert_eq!(bounded(" short\n"), "short");
        let long = format!("first{}last", "ü".repeat(1 << 20));
        let short = bounded(&long);
        assert!(short.len() <= MAX_START + MAX_END + 64, "{}", short.len());
        assert!(short.starts_with("first") && short.ends_with("last"));
        assert!(short.contains("bytes left out"));
    }

    #[test]
    fn several_lines_of_output_begin_on_their_own_line() {
        let failed = |output: &str| {
            let (command, status) = ("tool -x".to_owned(), "exit status: 1".to_owned());
            ProgramError::Failed {
                command,
                status,
                output: output.to_owned(),
            }
            .to_string()
        };
        assert_eq!(failed("no space"), "tool -x failed (exit status: 1): no space");
        assert_eq!(failed("one\ntwo"), "tool -x failed (exit status: 1):\none\ntwo");
    }
}
