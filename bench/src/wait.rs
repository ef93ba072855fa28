//! Waits for something to happen.

use crate::outcome::Outcome;
use std::thread;
use std::time::{Duration, Instant};

/// Timeout of every wait; an emulated Debian boots in half a minute on a busy machine.
const WAIT_TIMEOUT: Duration = Duration::from_secs(240);

/// Waits until the condition holds.
///
/// # Errors
/// If it does not hold in time.
pub(crate) fn wait_until(description: &str, mut condition: impl FnMut() -> Outcome<bool>) -> Outcome<()> {
    let deadline = Instant::now() + WAIT_TIMEOUT;
    while !condition()? {
        if Instant::now() > deadline {
            let seconds = WAIT_TIMEOUT.as_secs();
            return Err(format!("timed out after {seconds} s waiting until {description}").into());
        }
        thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}
