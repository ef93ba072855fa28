//! `scaleboxd settings`: the settings in effect, with their meanings.

use crate::commands::failed::CommandFailed;
use crate::settings::{self, Origin, SettingInEffect};
use comfy_table::{ContentArrangement, Table, presets};
use std::io::{self, Write as _};
use std::path::Path;

/// Prints all settings as a table, or as JSON for programs.
///
/// # Errors
/// A setting is invalid, or the list cannot be printed.
pub(crate) fn print(config: Option<&Path>, json: bool) -> Result<(), CommandFailed> {
    let listed = settings::list(config)?;
    let text = match json {
        true => serde_json::to_string_pretty(&listed).map_err(io::Error::from),
        false => Ok(table(&listed, config.unwrap_or(Path::new(settings::DEFAULT_FILE)))),
    };
    write(text)
}

/// Prints the names of all settings, without reading any.
///
/// # Errors
/// The list cannot be printed.
pub(crate) fn print_keys() -> Result<(), CommandFailed> {
    write(Ok(settings::keys().collect::<Vec<_>>().join("\n")))
}

fn write(text: io::Result<String>) -> Result<(), CommandFailed> {
    text.and_then(|text| writeln!(io::stdout().lock(), "{text}"))
        .map_err(|source| CommandFailed::Io {
            doing: "write the settings",
            source,
        })
}

/// Formats a table that fits into the terminal.
fn table(listed: &[SettingInEffect], file: &Path) -> String {
    let mut table = Table::new();
    table
        .load_style(presets::NOTHING)
        .set_content_arrangement(ContentArrangement::Dynamic)
        .set_header(["SETTING", "VALUE", "FROM", "DEFAULT", "MEANING"]);
    for setting in listed {
        let from = match setting.source {
            Origin::Environment => "environment".to_owned(),
            Origin::File => file.display().to_string(),
            Origin::Default => "default".to_owned(),
        };
        let value = match (&setting.value, setting.source) {
            (Some(value), _) => value.as_str(),
            (None, Origin::Default) => "-",
            // The token.
            (None, _) => "…",
        };
        table.add_row([setting.key, value, &from, &setting.default, &setting.meaning]);
    }
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    table.trim_fmt()
}
