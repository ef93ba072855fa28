//! Handles signals that this process receives.

use rustix::process::Signal;
use std::io::{self, Read};
use std::os::unix::net::UnixStream;
use std::thread;

/// Calls `action` in a thread of its own each time that this process receives `signal`, instead of
/// ending.
pub(crate) fn on_signal(signal: Signal, action: impl Fn() + Send + 'static) -> io::Result<()> {
    let (mut received, handler) = UnixStream::pair()?;
    signal_hook::low_level::pipe::register(signal.as_raw(), handler)?;
    thread::Builder::new().name("signal".to_owned()).spawn(move || {
        let mut byte = [0];
        while received.read_exact(&mut byte).is_ok() {
            action();
        }
    })?;
    Ok(())
}
