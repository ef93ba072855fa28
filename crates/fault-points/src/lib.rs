//! Named steps at which a build for tests ends the process or returns an error.
//!
//! Code that changes something durable calls one of two functions behind each step, with a name that no other step has:
//! [`fault_point`] where an error of the next step must be undone, [`crash_point`] where the operation has succeeded and
//! no later error can change that. Without the feature `enabled` both do nothing and read no variable. With it, these
//! environment variables decide:
//!
//! | variable | meaning |
//! |---|---|
//! | `SCALEBOX_FAULT` | `end STEP`: the process ends at that step, as by `kill -9`: no destructor, no flush |
//! | | `once STEP`: the step returns an error the first time it is reached |
//! | | `lasting STEP`: the step returns an error each time it is reached |
//! | `SCALEBOX_FAULT_TRACE` | a file to which the name of each step is appended as it is reached |
//! | `SCALEBOX_FAULT_PROGRAMS` | a folder of programs that stand in for outside programs, for instance to make their writes fail |
//!
//! The trace lists the steps of an operation, and the sources list all steps, so a test can walk every one of them.

use std::ffi::OsString;
use std::io;

/// Marks a step whose successor can fail. The error stands for that failure; its kind is `Other`.
///
/// # Errors
/// Only in a build for tests, where `SCALEBOX_FAULT` names this step.
#[cfg(not(feature = "enabled"))]
#[inline(always)]
pub fn fault_point(_step: &'static str) -> io::Result<()> {
    Ok(())
}

/// Marks a step whose successor can fail. The error stands for that failure; its kind is `Other`.
///
/// # Errors
/// Only in a build for tests, where `SCALEBOX_FAULT` names this step.
#[cfg(feature = "enabled")]
pub fn fault_point(step: &'static str) -> io::Result<()> {
    enabled::reached(step)
}

/// Marks a step behind which the operation has succeeded: tests can end the process here, but nothing can fail.
#[cfg(not(feature = "enabled"))]
#[inline(always)]
pub fn crash_point(_step: &'static str) {}

/// Marks a step behind which the operation has succeeded: tests can end the process here, but nothing can fail.
#[cfg(feature = "enabled")]
pub fn crash_point(step: &'static str) {
    if enabled::reached(step).is_err() {
        enabled::fail(&format!(
            "the step {step:?} cannot return an error: it is a crash point"
        ));
    }
}

/// Returns the folder in which outside programs are to be looked for first. Always `None` in a release.
#[cfg(not(feature = "enabled"))]
#[inline(always)]
pub fn programs() -> Option<OsString> {
    None
}

/// Returns the folder in which outside programs are to be looked for first.
#[cfg(feature = "enabled")]
pub fn programs() -> Option<OsString> {
    std::env::var_os("SCALEBOX_FAULT_PROGRAMS").filter(|folder| !folder.is_empty())
}

#[cfg(feature = "enabled")]
mod enabled {
    use rustix::process::{Signal, getpid, kill_process};
    use std::env;
    use std::fs::File;
    use std::io::{self, Write};
    use std::sync::LazyLock;
    use std::sync::atomic::{AtomicBool, Ordering};

    #[derive(Clone, Copy, PartialEq, Eq)]
    enum Mode {
        End,
        Once,
        Lasting,
    }

    static FAULT: LazyLock<Option<(Mode, String)>> = LazyLock::new(|| {
        let value = env::var("SCALEBOX_FAULT").ok().filter(|value| !value.is_empty())?;
        let (mode, step) = value.split_once(' ').unwrap_or_default();
        let mode = match mode {
            "end" => Mode::End,
            "once" => Mode::Once,
            "lasting" => Mode::Lasting,
            _ => fail(&format!(
                "SCALEBOX_FAULT={value}: write end, once or lasting, then a step"
            )),
        };
        Some((mode, step.to_owned()))
    });
    static INJECTED: AtomicBool = AtomicBool::new(false);
    static TRACE: LazyLock<Option<File>> = LazyLock::new(|| {
        let path = env::var_os("SCALEBOX_FAULT_TRACE").filter(|path| !path.is_empty())?;
        Some(
            File::options()
                .create(true)
                .append(true)
                .open(&path)
                .unwrap_or_else(|error| fail(&format!("SCALEBOX_FAULT_TRACE={}: {error}", path.display()))),
        )
    });

    pub fn reached(step: &'static str) -> io::Result<()> {
        if let Some(mut trace) = TRACE.as_ref() {
            // One write per line, so that the lines of two threads do not mix.
            let written = trace.write_all(format!("{step}\n").as_bytes());
            written.unwrap_or_else(|error| fail(&format!("cannot append to the trace of steps: {error}")));
        }
        match FAULT.as_ref() {
            Some((mode, at)) if at == step => inject(*mode, step),
            _ => Ok(()),
        }
    }

    fn inject(mode: Mode, step: &'static str) -> io::Result<()> {
        let injected_before = INJECTED.swap(true, Ordering::SeqCst);
        match mode {
            Mode::End => {
                let killed = kill_process(getpid(), Signal::KILL);
                killed.unwrap_or_else(|error| fail(&format!("cannot end the process at {step:?}: {error}")));
                Ok(())
            }
            Mode::Once if injected_before => Ok(()),
            Mode::Once | Mode::Lasting => Err(io::Error::other(format!("injected behind the step {step:?}"))),
        }
    }

    /// Ends a test that cannot do what it was asked to, so that it does not look like one that passed.
    pub fn fail(problem: &str) -> ! {
        eprintln!("{problem}");
        std::process::abort()
    }
}
