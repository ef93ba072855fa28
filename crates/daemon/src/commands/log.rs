//! The log on standard error: as text, as JSON, or for the systemd journal.
//!
//! The journal reads a line's priority from its prefix, such as `<3>` (sd-daemon(3)). Without the
//! prefix every line has priority 6, and `journalctl -p err` shows nothing. The journal adds its
//! own timestamps.

use crate::commands::failed::CommandFailed;
use crate::host::advice::advised;
use crate::settings::{LogFormat, Settings};
use std::env;
use std::io::{self, IsTerminal, Stderr, Write};
use tracing::{Level, Metadata};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;

/// Parses `LOG_LEVEL`.
pub(crate) fn filter(settings: &Settings) -> Result<EnvFilter, CommandFailed> {
    let level = &settings.log_level;
    EnvFilter::try_new(level).map_err(|_| CommandFailed::LogLevel(level.clone()))
}

/// Starts logging according to the settings.
///
/// # Errors
/// [`CommandFailed::LogLevel`].
pub(crate) fn start(settings: &Settings) -> Result<(), CommandFailed> {
    let journal = Journal { is_there: is_journal() };
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter(settings)?)
        .with_writer(journal)
        .with_ansi(io::stderr().is_terminal());
    match (settings.log_format, journal.is_there) {
        (LogFormat::Text, true) => log.with_target(false).without_time().init(),
        (LogFormat::Text, false) => log.with_target(false).init(),
        (LogFormat::Json, _) => log.json().init(),
    }
    Ok(())
}

/// Reports the error that ends the program, even if logging was not started.
pub(crate) fn report(error: &CommandFailed) {
    let priority = if is_journal() { priority(Level::ERROR) } else { "" };
    eprintln!("{priority}error: {}", advised(error));
}

/// Returns whether standard error is connected to the journal: systemd passes its device and inode.
fn is_journal() -> bool {
    let Ok(stream) = env::var("JOURNAL_STREAM") else {
        return false;
    };
    let stat = rustix::fs::fstat(io::stderr());
    stat.is_ok_and(|stat| stream == format!("{}:{}", stat.st_dev, stat.st_ino))
}

/// Returns the prefix of a level, numbered as in syslog(3).
fn priority(level: Level) -> &'static str {
    match level {
        Level::ERROR => "<3>",
        Level::WARN => "<4>",
        Level::INFO => "<6>",
        Level::DEBUG | Level::TRACE => "<7>",
    }
}

/// Writes to standard error, with priorities if the journal reads them.
#[derive(Debug, Clone, Copy)]
struct Journal {
    is_there: bool,
}

impl<'a> MakeWriter<'a> for Journal {
    type Writer = Lines<Stderr>;

    fn make_writer(&'a self) -> Self::Writer {
        Lines {
            to: io::stderr(),
            priority: "",
        }
    }

    fn make_writer_for(&'a self, meta: &Metadata<'_>) -> Self::Writer {
        Lines {
            to: io::stderr(),
            priority: if self.is_there { priority(*meta.level()) } else { "" },
        }
    }
}

/// Writes one event; each of its lines starts with the priority.
struct Lines<W> {
    to: W,
    priority: &'static str,
}

impl<W: Write> Write for Lines<W> {
    /// Writes an event in one piece, as it arrives, so that lines of different threads do not mix.
    fn write(&mut self, event: &[u8]) -> io::Result<usize> {
        if self.priority.is_empty() {
            return self.to.write(event);
        }
        let mut lines = Vec::with_capacity(event.len() + 2 * self.priority.len());
        for line in event.split_inclusive(|&byte| byte == b'\n') {
            lines.extend(self.priority.as_bytes());
            lines.extend(line);
        }
        self.to.write_all(&lines)?;
        Ok(event.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(priority: &'static str, event: &str) -> String {
        let mut lines = Lines {
            to: Vec::new(),
            priority,
        };
        lines.write_all(event.as_bytes()).unwrap();
        String::from_utf8(lines.to).unwrap()
    }

    #[test]
    fn every_line_of_an_event_starts_with_its_priority() {
        assert_eq!(written("<3>", "one\ntwo\n"), "<3>one\n<3>two\n");
        assert_eq!(written("", "one\ntwo\n"), "one\ntwo\n");
    }
}
