//! What is shown, and where: answers on the standard output, as tables for people or as JSON for
//! programs; everything said about them (errors, warnings, questions, progress) on the standard
//! error.

use crate::error::Error;
use clap_complete::{Shell, generate};
use comfy_table::presets::NOTHING;
use comfy_table::{Cell, CellAlignment, Color};
use indicatif::{ProgressBar, ProgressFinish, ProgressStyle};
use scalebox_client::VmStatus;
use serde::Serialize;
use std::env;
use std::io::{self, IsTerminal, Write};
use std::time::Duration;

/// Knows the form that was asked for and what the terminal can show.
pub struct Output {
    /// Answers as JSON.
    pub json: bool,
    color: bool,
    error_color: bool,
}

impl Output {
    /// Colors only for a terminal, and never against <https://no-color.org>.
    pub fn new(json: bool) -> Self {
        let wanted = env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
            && env::var_os("TERM").is_none_or(|term| term != "dumb");
        Output {
            json,
            color: wanted && io::stdout().is_terminal(),
            error_color: wanted && io::stderr().is_terminal(),
        }
    }

    /// The server's answer.
    pub fn answer(&self, answer: &impl Serialize) -> Result<(), Error> {
        let text = serde_json::to_string_pretty(answer).map_err(io::Error::from)?;
        print(&format!("{text}\n"))
    }

    /// One of many answers, on a line of its own.
    pub fn json_line(&self, answer: &impl Serialize) -> Result<(), Error> {
        let text = serde_json::to_string(answer).map_err(io::Error::from)?;
        print(&format!("{text}\n"))
    }

    /// A line for people.
    pub fn line(&self, text: &str) -> Result<(), Error> {
        print(&format!("{}\n", printable(text)))
    }

    /// Rows under a header, without the columns that the terminal has no room for.
    pub fn table(&self, table: Table) -> Result<(), Error> {
        let width = comfy_table::Table::new().width();
        print(&table.render(width.map(usize::from), self.color))
    }

    /// A thing's properties, one a line.
    pub fn facts(&self, facts: &[(&str, String)]) -> Result<(), Error> {
        let width = facts.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
        let lines = facts
            .iter()
            .map(|(name, value)| format!("{name:width$}  {}\n", printable(value)));
        print(&lines.collect::<String>())
    }

    /// A script for `shell`.
    pub fn completions(&self, shell: Shell, mut command: clap::Command) -> Result<(), Error> {
        let mut script = Vec::new();
        generate(shell, &mut command, "scalebox", &mut script);
        print(&String::from_utf8_lossy(&script))
    }

    /// What ended the command, or one part of it.
    pub fn error(&self, error: &Error) {
        match serde_json::to_string(&error.body()) {
            Ok(body) if self.json => say(&format!("{body}\n")),
            _ => self.say("error", "31", &error.to_string()),
        }
    }

    /// What is wrong and does not stop us.
    pub fn warning(&self, text: &str) {
        self.say("warning", "33", text);
    }

    /// What else might help, when nothing is wrong.
    pub fn hint(&self, text: &str) {
        say(&format!("{}\n", printable(text)));
    }

    fn say(&self, kind: &str, color: &str, text: &str) {
        let kind = if self.error_color {
            format!("\x1b[1;{color}m{kind}:\x1b[0m")
        } else {
            format!("{kind}:")
        };
        say(&format!("{kind} {}\n", printable(text)));
    }

    /// Asks before something that cannot be undone. Where nobody can answer, the command itself is
    /// the yes.
    pub fn confirm(&self, question: &str) -> Result<(), Error> {
        if !(io::stdin().is_terminal() && io::stderr().is_terminal()) {
            return Ok(());
        }
        say(&format!("{} [y/N] ", printable(question)));
        let mut answer = String::new();
        io::stdin().read_line(&mut answer)?;
        match answer.trim().to_lowercase().as_str() {
            "y" | "yes" => Ok(()),
            _ => Err(Error::Declined),
        }
    }

    /// How much of something is done, gone when finished; nothing where no terminal is.
    pub fn bar(&self, text: &str, whole: Option<u64>) -> ProgressBar {
        let Some(whole) = whole else {
            return self.progress(text);
        };
        let bar = ProgressBar::new(whole).with_finish(ProgressFinish::AndClear);
        let style = "{msg}  {bar:30} {percent:>3}%  {bytes} of {total_bytes}, {bytes_per_sec}, {eta} left";
        if let Ok(style) = ProgressStyle::with_template(style) {
            bar.set_style(style.progress_chars("━╸ "));
        }
        bar.set_message(printable(text));
        bar
    }

    /// A line that shows life and the time so far, gone when dropped; nothing where no terminal is.
    pub fn progress(&self, text: &str) -> ProgressBar {
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

/// With nobody at the other end of the standard error there is nobody left to tell.
fn say(text: &str) {
    let _ = io::stderr().lock().write_all(text.as_bytes());
}

/// A text from the server without what would drive the terminal: an escape sequence in a console's
/// last words is not to repaint the screen of who reads them.
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
pub struct Column {
    title: &'static str,
    right: bool,
    /// The highest goes first when there is no room; 0 always stays.
    spare: u8,
}

/// A column of text.
pub const fn text(title: &'static str, spare: u8) -> Column {
    Column {
        title,
        right: false,
        spare,
    }
}

/// A column of numbers.
pub const fn number(title: &'static str, spare: u8) -> Column {
    Column {
        title,
        right: true,
        spare,
    }
}

/// What a list shows.
pub struct Table {
    columns: Vec<Column>,
    rows: Vec<Vec<String>>,
}

/// Spaces between two columns.
const GAP: usize = 2;

impl Table {
    /// Every row has as many cells as there are columns.
    pub fn new(columns: Vec<Column>, rows: Vec<Vec<String>>) -> Self {
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
            if self.columns[i].right {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
        table.trim_fmt() + "\n"
    }

    /// Indices of the columns that fit, the most dispensable left out first.
    fn columns_within(&self, width: Option<usize>) -> Vec<usize> {
        let mut shown: Vec<usize> = (0..self.columns.len()).collect();
        let Some(width) = width else { return shown };
        while shown.iter().map(|&i| self.width_of(i) + GAP).sum::<usize>() > width + GAP {
            let spare = shown.iter().copied().max_by_key(|&i| self.columns[i].spare);
            match spare.filter(|&i| self.columns[i].spare > 0) {
                Some(spare) => shown.retain(|&i| i != spare),
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

/// A status has the color that it has on every dashboard.
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

/// The title of a column of statuses.
pub const STATUS: &str = "STATUS";

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
    fn columns_are_aligned_and_nothing_trails() {
        let expected = "NAME          STATUS     DISK\ncalm-red-fox  running  10 GiB\nbox           failed    2 GiB\n";
        assert_eq!(table().render(None, false), expected);
        assert_eq!(table().render(Some(29), false), expected);
    }

    #[test]
    fn a_narrow_terminal_has_fewer_columns_and_no_broken_lines() {
        assert_eq!(
            table().render(Some(28), false),
            "NAME          STATUS\ncalm-red-fox  running\nbox           failed\n"
        );
        for width in [20, 5, 0] {
            assert_eq!(table().render(Some(width), false), "NAME\ncalm-red-fox\nbox\n");
        }
    }

    #[test]
    fn a_server_cannot_drive_the_terminal() {
        let hostile = Table::new(vec![text("NAME", 0)], vec![vec!["\x1b[2Jx".to_owned()]]);
        assert_eq!(hostile.render(None, false), "NAME\n\u{fffd}[2Jx\n");
    }

    #[test]
    fn color_changes_no_width() {
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
