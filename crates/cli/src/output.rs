//! Prints results to standard output, as tables for people or as JSON for programs. Errors,
//! warnings, questions and progress go to standard error.

use crate::error::Error;
use clap_complete::Shell;
use clap_complete::env::Shells;
use comfy_table::presets::NOTHING;
use comfy_table::{Cell, CellAlignment, Color};
use indicatif::{ProgressBar, ProgressFinish, ProgressStyle};
use scalebox_api::VmStatus;
use serde::Serialize;
use std::env;
use std::io::{self, IsTerminal, Write};
use std::time::Duration;

/// Prints in the requested format, with color where the terminal supports it.
pub(crate) struct Output {
    /// `true` if results are printed as JSON.
    pub json: bool,
    color: bool,
    error_color: bool,
}

impl Output {
    /// Enables color for terminals only, and honors <https://no-color.org>.
    pub(crate) fn new(json: bool) -> Self {
        let wanted = env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
            && env::var_os("TERM").is_none_or(|term| term != "dumb");
        Output {
            json,
            color: wanted && io::stdout().is_terminal(),
            error_color: wanted && io::stderr().is_terminal(),
        }
    }

    /// Prints a result as indented JSON.
    pub(crate) fn json(&self, result: &impl Serialize) -> Result<(), Error> {
        let text = serde_json::to_string_pretty(result).map_err(io::Error::from)?;
        print(&format!("{text}\n"))
    }

    /// Prints a result as JSON on a single line.
    pub(crate) fn json_line(&self, result: &impl Serialize) -> Result<(), Error> {
        let text = serde_json::to_string(result).map_err(io::Error::from)?;
        print(&format!("{text}\n"))
    }

    /// Prints a line of text.
    pub(crate) fn line(&self, text: &str) -> Result<(), Error> {
        print(&format!("{}\n", printable(text)))
    }

    /// Prints a table, without the columns that do not fit the terminal.
    pub(crate) fn table(&self, table: Table) -> Result<(), Error> {
        let width = comfy_table::Table::new().width();
        print(&table.render(width.map(usize::from), self.color))
    }

    /// Prints an object's properties, one per line.
    pub(crate) fn properties(&self, properties: &[(&str, String)]) -> Result<(), Error> {
        let width = properties.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
        let lines = properties
            .iter()
            .map(|(name, value)| format!("{name:width$}  {}\n", printable(value)));
        print(&lines.collect::<String>())
    }

    /// Prints the completion script for `shell`. It calls this program for the candidates.
    pub(crate) fn completions(&self, shell: Shell) -> Result<(), Error> {
        let mut script = Vec::new();
        if let Some(completer) = Shells::builtins().completer(&shell.to_string()) {
            completer.write_registration("COMPLETE", "scalebox", "scalebox", "scalebox", &mut script)?;
        }
        print(&String::from_utf8_lossy(&script))
    }

    /// Clears the terminal for an update; elsewhere prints an empty line between two updates.
    pub(crate) fn clear(&self) -> Result<(), Error> {
        match io::stdout().is_terminal() {
            true => print("\x1b[H\x1b[J"),
            false => print("\n"),
        }
    }

    /// Prints a question to standard error, without a line break.
    pub(crate) fn prompt(&self, question: &str) {
        print_to_stderr(&printable(question));
    }

    /// Reports an error that ended the command or a part of it.
    pub(crate) fn error(&self, error: &Error) {
        match serde_json::to_string(&error.body()) {
            Ok(body) if self.json => print_to_stderr(&format!("{body}\n")),
            _ => self.report("error", "31", &error.to_string()),
        }
    }

    /// Reports a problem that does not stop the command.
    pub(crate) fn warning(&self, text: &str) {
        self.report("warning", "33", text);
    }

    /// Prints a suggestion or a note to standard error.
    pub(crate) fn hint(&self, text: &str) {
        print_to_stderr(&format!("{}\n", printable(text)));
    }

    fn report(&self, kind: &str, color: &str, text: &str) {
        let kind = if self.error_color {
            format!("\x1b[1;{color}m{kind}:\x1b[0m")
        } else {
            format!("{kind}:")
        };
        print_to_stderr(&format!("{kind} {}\n", printable(text)));
    }

    /// Prompts for confirmation. Without a terminal there is no prompt, and the command proceeds.
    pub(crate) fn confirm(&self, question: &str) -> Result<(), Error> {
        if !(io::stdin().is_terminal() && io::stderr().is_terminal()) {
            return Ok(());
        }
        print_to_stderr(&format!("{} [y/N] ", printable(question)));
        let mut answer = String::new();
        io::stdin().read_line(&mut answer)?;
        match answer.trim().to_lowercase().as_str() {
            "y" | "yes" => Ok(()),
            _ => Err(Error::Declined),
        }
    }

    /// Shows a progress bar on a terminal; it disappears when finished. Without a known size, it
    /// shows a spinner.
    pub(crate) fn bar(&self, text: &str, total_bytes: Option<u64>) -> ProgressBar {
        let Some(total_bytes) = total_bytes else {
            let spinner = self.progress(text);
            if let Ok(style) = ProgressStyle::with_template("{spinner} {elapsed}  {bytes}, {bytes_per_sec}  {wide_msg}")
            {
                spinner.set_style(style);
            }
            return spinner;
        };
        let bar = ProgressBar::new(total_bytes).with_finish(ProgressFinish::AndClear);
        let style = "{msg}  {bar:30} {percent:>3}%  {bytes} of {total_bytes}, {bytes_per_sec}, {eta} left";
        if let Ok(style) = ProgressStyle::with_template(style) {
            bar.set_style(style.progress_chars("━╸ "));
        }
        bar.set_message(printable(text));
        bar
    }

    /// Shows a spinner with the elapsed time on a terminal; it disappears when dropped.
    pub(crate) fn progress(&self, text: &str) -> ProgressBar {
        let style = ProgressStyle::with_template("{spinner} {elapsed}  {wide_msg}");
        let progress = ProgressBar::new_spinner().with_finish(ProgressFinish::AndClear);
        if let Ok(style) = style {
            progress.set_style(style);
        }
        progress.set_message(printable(text));
        progress.enable_steady_tick(Duration::from_millis(120));
        progress
    }
}

fn print(text: &str) -> Result<(), Error> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(text.as_bytes())?;
    Ok(stdout.flush()?)
}

/// Prints to standard error. A failure is ignored: there is no other place to report it.
fn print_to_stderr(text: &str) {
    let _ = io::stderr().lock().write_all(text.as_bytes());
}

/// Replaces control characters. Otherwise a server or a guest could send escape sequences to the
/// terminal.
fn printable(text: &str) -> String {
    text.chars()
        .map(|c| {
            if c.is_control() && c != '\n' && c != '\t' {
                '\u{fffd}'
            } else {
                c
            }
        })
        .collect()
}

/// One column of a [`Table`].
pub(crate) struct Column {
    title: &'static str,
    right_aligned: bool,
    /// Order in which columns are left out when the terminal is too narrow, from the highest number
    /// down. A column with 0 is always shown.
    drop_order: u8,
}

/// Returns a left-aligned column.
pub(crate) const fn text(title: &'static str, drop_order: u8) -> Column {
    Column {
        title,
        right_aligned: false,
        drop_order,
    }
}

/// Returns a right-aligned column.
pub(crate) const fn number(title: &'static str, drop_order: u8) -> Column {
    Column {
        title,
        right_aligned: true,
        drop_order,
    }
}

/// Rows of text under column titles.
pub(crate) struct Table {
    columns: Vec<Column>,
    rows: Vec<Vec<String>>,
}

/// Number of spaces between two columns.
const GAP: usize = 2;

impl Table {
    /// Creates a table. Every row must have one cell per column.
    pub(crate) fn new(columns: Vec<Column>, rows: Vec<Vec<String>>) -> Self {
        let rows = rows
            .into_iter()
            .map(|row| row.iter().map(|cell| printable(cell)).collect())
            .collect();
        Table { columns, rows }
    }

    fn render(&self, width: Option<usize>, color: bool) -> String {
        let shown = self.columns_within(width);
        let mut table = comfy_table::Table::new();
        table.load_style(NOTHING).force_no_tty();
        if color {
            table.enforce_styling();
        }
        table.set_header(shown.iter().map(|&i| self.columns[i].title));
        for row in &self.rows {
            table.add_row(shown.iter().map(|&i| cell(&row[i], self.columns[i].title, color)));
        }
        for (column, &i) in table.column_iter_mut().zip(&shown) {
            column.set_padding((0, GAP as u16));
            if self.columns[i].right_aligned {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
        table.trim_fmt() + "\n"
    }

    /// Returns the indices of the columns that fit into `width`.
    fn columns_within(&self, width: Option<usize>) -> Vec<usize> {
        let mut shown: Vec<usize> = (0..self.columns.len()).collect();
        let Some(width) = width else { return shown };
        while shown.iter().map(|&i| self.width_of(i) + GAP).sum::<usize>() > width + GAP {
            let dropped = shown.iter().copied().max_by_key(|&i| self.columns[i].drop_order);
            match dropped.filter(|&i| self.columns[i].drop_order > 0) {
                Some(dropped) => shown.retain(|&i| i != dropped),
                None => break,
            }
        }
        shown
    }

    fn width_of(&self, column: usize) -> usize {
        let cells = self.rows.iter().map(|row| row[column].chars().count());
        cells.max().unwrap_or(0).max(self.columns[column].title.len())
    }
}

/// Formats a cell, and colors it if it is a VM's status.
fn cell(text: &str, title: &str, color: bool) -> Cell {
    let cell = Cell::new(text);
    if !(color && title == STATUS) {
        return cell;
    }
    match text {
        text if text == VmStatus::Running.as_str() => cell.fg(Color::DarkGreen),
        text if text == VmStatus::Failed.as_str() => cell.fg(Color::DarkRed),
        _ => cell.fg(Color::DarkYellow),
    }
}

/// Title of a column of VM statuses.
pub(crate) const STATUS: &str = "STATUS";

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> Table {
        let columns = vec![text("NAME", 0), text(STATUS, 1), number("DISK", 2)];
        let row = |cells: [&str; 3]| cells.map(str::to_owned).to_vec();
        Table::new(
            columns,
            vec![
                row(["calm-red-fox", "running", "10 GiB"]),
                row(["box", "failed", "2 GiB"]),
            ],
        )
    }

    #[test]
    fn columns_are_aligned_without_trailing_spaces() {
        let expected = "NAME          STATUS     DISK\ncalm-red-fox  running  10 GiB\nbox           failed    2 GiB\n";
        assert_eq!(table().render(None, false), expected);
        assert_eq!(table().render(Some(29), false), expected);
    }

    #[test]
    fn narrow_terminals_show_fewer_columns_and_no_broken_lines() {
        assert_eq!(
            table().render(Some(28), false),
            "NAME          STATUS\ncalm-red-fox  running\nbox           failed\n"
        );
        for width in [20, 5, 0] {
            assert_eq!(table().render(Some(width), false), "NAME\ncalm-red-fox\nbox\n");
        }
    }

    #[test]
    fn escape_sequences_from_the_server_are_replaced() {
        let hostile = Table::new(vec![text("NAME", 0)], vec![vec!["\x1b[2Jx".to_owned()]]);
        assert_eq!(hostile.render(None, false), "NAME\n\u{fffd}[2Jx\n");
    }

    #[test]
    fn color_does_not_change_column_widths() {
        let colored = table().render(None, true);
        assert!(colored.contains("\x1b["), "{colored:?}");
        let mut plain = String::new();
        let mut rest = colored.as_str();
        while let Some((before, escape)) = rest.split_once('\x1b') {
            plain += before;
            rest = escape.split_once('m').unwrap().1;
        }
        assert_eq!(plain + rest, table().render(None, false));
    }
}
