//! Named steps at which a build for tests ends the process, as `kill -9` does: no destructor runs, nothing is flushed.
//!
//! What changes something durable calls [`crash_point`] behind each step, with a name that no other step has. Without the feature `enabled`
//! that is nothing at all, and no variable is read. With it, two variables of the environment say what happens:
//!
//! | variable | meaning |
//! |---|---|
//! | `SCALEBOX_CRASH_AT` | the name of the step at which the process ends, the first time that it gets there |
//! | `SCALEBOX_CRASH_TRACE` | a file to which the name of each step is added as it is reached |
//!
//! The trace tells a test which steps an operation has; the sources tell it which there are. So no step can be forgotten.

/// A step was taken. Ends the process if this is the step at which it is to crash.
#[cfg(not(feature = "enabled"))]
#[inline(always)]
pub fn crash_point(_step: &'static str) {}

/// A step was taken. Ends the process if this is the step at which it is to crash.
#[cfg(feature = "enabled")]
pub fn crash_point(step: &'static str) {
    enabled::reached(step);
}

#[cfg(feature = "enabled")]
mod enabled {
    use rustix::process::{Signal, getpid, kill_process};
    use std::env;
    use std::fs::File;
    use std::io::Write;
    use std::sync::LazyLock;

    static CRASH_AT: LazyLock<Option<String>> = LazyLock::new(|| env::var("SCALEBOX_CRASH_AT").ok());
    static TRACE: LazyLock<Option<File>> = LazyLock::new(|| {
        let path = env::var_os("SCALEBOX_CRASH_TRACE").filter(|path| !path.is_empty())?;
        Some(
            File::options()
                .create(true)
                .append(true)
                .open(&path)
                .unwrap_or_else(|error| fail(&format!("SCALEBOX_CRASH_TRACE={}: {error}", path.display()))),
        )
    });

    pub fn reached(step: &'static str) {
        if let Some(mut trace) = TRACE.as_ref() {
            // One write: lines of threads beside each other do not mix.
            let written = trace.write_all(format!("{step}\n").as_bytes());
            written.unwrap_or_else(|error| fail(&format!("the trace of steps: {error}")));
        }
        if CRASH_AT.as_deref() == Some(step) {
            let killed = kill_process(getpid(), Signal::KILL);
            killed.unwrap_or_else(|error| fail(&format!("the crash at {step:?}: {error}")));
        }
    }

    /// A test that cannot do what it was told must not look like one that passed.
    fn fail(problem: &str) -> ! {
        eprintln!("{problem}");
        std::process::abort()
    }
}
