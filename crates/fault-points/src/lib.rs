//! Named steps at which a test build kills the process or returns an error.
//!
//! Code that changes durable state calls one of two functions after each step, with a unique name:
//! [`fault_point`] where a later step can fail, so that an error must be rolled back, and
//! [`crash_point`] where the operation has succeeded and no later error can change that. Without
//! the feature `enabled` both do nothing. With it, the environment variable `SCALEBOX_FAULTS` names
//! a folder with these optional files:
//!
//! | file | meaning |
//! |---|---|
//! | `trace` | each reached step appends its name |
//! | `fault` | `MODE N STEP`: the action at the Nth time that the step is reached, counted since the file has this content |
//! | `programs/` | replacements for outside programs, for example with failing system calls |
//!
//! | mode | action |
//! |---|---|
//! | `kill` | the process is killed, as by `kill -9`: no destructor runs, and nothing is flushed |
//! | `once` | the step returns an error |
//! | `lasting` | the step and every later one of this name return an error |
//!
//! The trace lists the steps of an operation and the sources list all steps, so a test can visit
//! every one of them.

use std::io;
use std::path::PathBuf;

/// Marks a step after which the operation can still fail. The error stands for such a failure; its
/// kind is `Other`.
///
/// # Errors
/// Only in a test build, at the request of a test.
#[cfg(not(feature = "enabled"))]
#[inline(always)]
pub fn fault_point(_step: &'static str) -> io::Result<()> {
    Ok(())
}

/// Marks a step after which the operation can still fail. The error stands for such a failure; its
/// kind is `Other`.
///
/// # Errors
/// Only in a test build, at the request of a test.
#[cfg(feature = "enabled")]
pub fn fault_point(step: &'static str) -> io::Result<()> {
    enabled::reached(step)
}

/// Marks a step after which the operation has succeeded: tests can kill the process here, but
/// nothing can fail.
#[cfg(not(feature = "enabled"))]
#[inline(always)]
pub fn crash_point(_step: &'static str) {}

/// Marks a step after which the operation has succeeded: tests can kill the process here, but
/// nothing can fail.
#[cfg(feature = "enabled")]
pub fn crash_point(step: &'static str) {
    if enabled::reached(step).is_err() {
        enabled::fail(&format!(
            "the step {step:?} cannot return an error: it is a crash point"
        ));
    }
}

/// Returns the folder that is searched first for outside programs. Always `None` in a release.
#[cfg(not(feature = "enabled"))]
#[inline(always)]
pub fn programs() -> Option<PathBuf> {
    None
}

/// Returns the folder that is searched first for outside programs.
#[cfg(feature = "enabled")]
pub fn programs() -> Option<PathBuf> {
    enabled::programs()
}

#[cfg(feature = "enabled")]
mod enabled {
    use rustix::process::{Signal, getpid, kill_process};
    use std::env;
    use std::fs::{self, File};
    use std::io::{self, Write};
    use std::path::{Path, PathBuf};
    use std::sync::{LazyLock, Mutex, PoisonError};

    static FOLDER: LazyLock<Option<PathBuf>> = LazyLock::new(|| {
        let folder = env::var_os("SCALEBOX_FAULTS").filter(|folder| !folder.is_empty())?;
        Some(PathBuf::from(folder))
    });
    static ARMED: Mutex<Armed> = Mutex::new(Armed {
        text: String::new(),
        seen: 0,
    });

    /// The content of the file `fault`, and how often its step was reached since.
    struct Armed {
        text: String,
        seen: usize,
    }

    enum Action {
        Nothing,
        Kill,
        Error,
    }

    pub(crate) fn programs() -> Option<PathBuf> {
        let programs = FOLDER.as_ref()?.join("programs");
        programs.is_dir().then_some(programs)
    }

    pub(crate) fn reached(step: &'static str) -> io::Result<()> {
        let Some(folder) = FOLDER.as_ref() else { return Ok(()) };
        trace(folder, step).unwrap_or_else(|error| fail(&format!("cannot append to the trace of steps: {error}")));
        match action(folder, step) {
            Action::Nothing => Ok(()),
            Action::Kill => {
                let killed = kill_process(getpid(), Signal::KILL);
                killed.unwrap_or_else(|error| fail(&format!("cannot kill the process at {step:?}: {error}")));
                Ok(())
            }
            Action::Error => Err(io::Error::other(format!("injected after the step {step:?}"))),
        }
    }

    fn trace(folder: &Path, step: &str) -> io::Result<()> {
        match File::options().append(true).open(folder.join("trace")) {
            // One write per line, so that the lines of two threads do not mix.
            Ok(mut trace) => trace.write_all(format!("{step}\n").as_bytes()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
        }
    }

    fn action(folder: &Path, step: &str) -> Action {
        let text = fs::read_to_string(folder.join("fault")).unwrap_or_default();
        let mut armed = ARMED.lock().unwrap_or_else(PoisonError::into_inner);
        if armed.text != text {
            *armed = Armed { text, seen: 0 };
        }
        if armed.text.is_empty() {
            return Action::Nothing;
        }
        let mut words = armed.text.splitn(3, ' ');
        let (mode, nth, at) = (words.next(), words.next(), words.next());
        let Some(nth) = nth.and_then(|nth| nth.parse::<usize>().ok()) else {
            fail(&format!("the fault {:?} is not MODE N STEP", armed.text))
        };
        if at != Some(step) {
            return Action::Nothing;
        }
        let seen = armed.seen + 1;
        let action = match mode {
            Some("kill") if seen == nth => Action::Kill,
            Some("once") if seen == nth => Action::Error,
            Some("lasting") if seen >= nth => Action::Error,
            Some("kill" | "once" | "lasting") => Action::Nothing,
            _ => fail(&format!("the fault {:?} is not MODE N STEP", armed.text)),
        };
        armed.seen = seen;
        action
    }

    /// Aborts a test that cannot follow its request, so that it does not pass by accident.
    pub(crate) fn fail(problem: &str) -> ! {
        eprintln!("{problem}");
        std::process::abort()
    }
}
