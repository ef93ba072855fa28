//! A terminal with a screen: tmux, which runs one command in a window without a status line.

use super::{eventually, run, text};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A tmux server of its own; dropping it ends it and its command.
pub(crate) struct Tmux {
    socket: PathBuf,
}

impl Tmux {
    /// Runs a shell command in a window of `rows` × `cols` characters. The server's files are in
    /// `folder`.
    pub(crate) fn start(folder: &Path, rows: u16, cols: u16, command: &str) -> Tmux {
        let (socket, settings) = (folder.join("tmux"), folder.join("tmux.conf"));
        fs::write(&settings, "set -g status off\n").unwrap();
        let tmux = Tmux { socket };
        let (rows, cols) = (rows.to_string(), cols.to_string());
        tmux.run(&[
            "-f",
            text(&settings),
            "new-session",
            "-d",
            "-y",
            &rows,
            "-x",
            &cols,
            command,
        ]);
        tmux
    }

    fn run(&self, args: &[&str]) -> String {
        // Without UTF-8, tmux would show only ASCII.
        run("tmux", &[&["-u", "-S", text(&self.socket)], args].concat())
    }

    /// Types a text.
    pub(crate) fn type_text(&self, typed: &str) {
        self.run(&["send-keys", "-l", "--", typed]);
    }

    /// Presses keys by their names in tmux, such as `Enter` and `C-c`.
    pub(crate) fn press(&self, keys: &[&str]) {
        self.run(&[&["send-keys"], keys].concat());
    }

    /// Types a line and presses Enter.
    pub(crate) fn enter(&self, line: &str) {
        self.type_text(line);
        self.press(&["Enter"]);
    }

    pub(crate) fn resize(&self, rows: u16, cols: u16) {
        self.run(&["resize-window", "-y", &rows.to_string(), "-x", &cols.to_string()]);
    }

    /// Returns the lines of the screen, without spaces at their ends.
    pub(crate) fn screen(&self) -> Vec<String> {
        let shown = self.run(&["capture-pane", "-p"]);
        shown.lines().map(|line| line.trim_end().to_owned()).collect()
    }

    /// Waits until the screen satisfies `condition`, and prints and returns it.
    pub(crate) fn wait_for(&self, event: &str, condition: impl Fn(&[String]) -> bool) -> Vec<String> {
        let mut last = Vec::new();
        let found = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            eventually(event, || {
                last = self.screen();
                condition(&last).then_some(())
            });
        }));
        println!("---- the screen: {event} ----\n{}\n----", last.join("\n"));
        if let Err(panic) = found {
            std::panic::resume_unwind(panic);
        }
        last
    }
}

impl Drop for Tmux {
    fn drop(&mut self) {
        let _ended = Command::new("tmux")
            .args(["-S", text(&self.socket), "kill-server"])
            .status();
    }
}
