//! The terminal of this process: raw mode and window size.

use rustix::termios::{LocalModes, OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};
use scalebox_api::{CreateExec, Tty, WindowSize};
use std::io;

/// Puts the terminal on standard input into raw mode, and restores it when dropped, also in a
/// panic. In raw mode, keys such as Ctrl-C arrive as bytes.
pub(crate) struct RawMode {
    _restore: Restore,
}

/// Restores the settings of the terminal on standard input.
struct Restore(Termios);

impl Drop for Restore {
    fn drop(&mut self) {
        // The terminal may be gone.
        let _restored = tcsetattr(io::stdin(), OptionalActions::Drain, &self.0);
    }
}

impl RawMode {
    /// Fails if standard input is not a terminal.
    pub(crate) fn enter() -> io::Result<RawMode> {
        let before = tcgetattr(io::stdin())?;
        let mut raw = before.clone();
        raw.make_raw();
        let entered = RawMode {
            _restore: Restore(before),
        };
        tcsetattr(io::stdin(), OptionalActions::Drain, &raw)?;
        Ok(entered)
    }
}

/// Hides typed text until it is dropped.
pub(crate) struct NoEcho {
    _restore: Restore,
}

impl NoEcho {
    /// Fails if standard input is not a terminal.
    pub(crate) fn enter() -> io::Result<NoEcho> {
        let before = tcgetattr(io::stdin())?;
        let mut hidden = before.clone();
        hidden.local_modes.remove(LocalModes::ECHO);
        let entered = NoEcho {
            _restore: Restore(before),
        };
        tcsetattr(io::stdin(), OptionalActions::Drain, &hidden)?;
        Ok(entered)
    }
}

/// Returns the size of the terminal on standard output or input; 24 × 80 if there is none.
pub(crate) fn window_size() -> WindowSize {
    let sizes = [tcgetwinsize(io::stdout()), tcgetwinsize(io::stdin())];
    let known = sizes
        .into_iter()
        .flatten()
        .find(|size| size.ws_row > 0 && size.ws_col > 0);
    match known {
        Some(size) => WindowSize {
            rows: size.ws_row,
            cols: size.ws_col,
        },
        None => WindowSize { rows: 24, cols: 80 },
    }
}

/// Gives a command a terminal like this one.
pub(crate) fn add_to(request: &mut CreateExec) {
    request.tty = Some(Tty::Size(window_size()));
    if let Ok(term) = std::env::var("TERM") {
        request.env.entry("TERM".to_owned()).or_insert(term);
    }
}
