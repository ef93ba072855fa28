//! The commands `scalebox login` and `scalebox logout`.

use crate::error::Error;
use crate::output::Output;
use crate::settings::{self, Connection};
use crate::terminal::NoEcho;
use scalebox_client::Client;
use std::fs::{self, DirBuilder, File};
use std::io::{self, IsTerminal, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

/// Maximum length of a token on standard input.
const MAX_TOKEN_BYTES: u64 = 64 << 10;

/// Prompts for the token, checks it against the server, and stores address and token.
pub(crate) fn login(url: Option<&str>, flags: &Connection, output: &Output) -> Result<(), Error> {
    let url = url
        .or(flags.url.as_deref())
        .map_or_else(settings::default_url, str::to_owned);
    let token = match &flags.token {
        Some(token) => token.clone(),
        None => ask_for_token(&url, output)?,
    };
    let token = token.trim();
    let client = Client::new(&url, token)?;
    let info = client.info().map_err(|error| match error.status() {
        Some(401) => Error::LoginRefused {
            url: client.url().to_owned(),
        },
        _ => error.into(),
    })?;
    let path = settings::config_path();
    let kept = kept_lines(&path)?;
    let text = format!("{kept}SCALEBOX_URL={}\nSCALEBOX_TOKEN={token}\n", client.url());
    write(&path, &text).map_err(|error| Error::file(&path, error))?;
    if output.json {
        return output.json(&serde_json::json!({ "url": client.url(), "file": path.display().to_string() }));
    }
    output.line(&format!(
        "logged in to {} at {} (scaleboxd {}); stored in {}",
        info.hostname,
        client.url(),
        info.version,
        path.display()
    ))
}

/// Removes the stored address and token.
pub(crate) fn logout(output: &Output) -> Result<(), Error> {
    let path = settings::config_path();
    let failed = |error| Error::file(&path, error);
    if !settings::is_file(&path) {
        output.hint(&format!("not logged in: there is no {}", path.display()));
        return Ok(());
    }
    let kept = kept_lines(&path)?;
    match kept.trim().is_empty() {
        true => fs::remove_file(&path).map_err(failed)?,
        false => write(&path, &kept).map_err(failed)?,
    }
    match output.json {
        true => output.json(&serde_json::json!({ "file": path.display().to_string() })),
        false => output.line(&format!("removed the address and the token from {}", path.display())),
    }
}

fn ask_for_token(url: &str, output: &Output) -> Result<String, Error> {
    let mut token = String::new();
    if !io::stdin().is_terminal() {
        io::stdin().lock().take(MAX_TOKEN_BYTES).read_to_string(&mut token)?;
        return Ok(token);
    }
    output.prompt(&format!(
        "API token of {url} (API_TOKEN in its /etc/scaleboxd/config): "
    ));
    let hidden = NoEcho::enter().map_err(Error::Terminal)?;
    io::stdin().read_line(&mut token)?;
    drop(hidden);
    output.hint("");
    Ok(token)
}

/// Returns the comments of the file; other lines are the address and the token.
fn kept_lines(path: &Path) -> Result<String, Error> {
    let text = match fs::read(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(String::new()),
        Err(error) => return Err(Error::file(path, error)),
    };
    let text = String::from_utf8_lossy(&text).into_owned();
    let kept = text.lines().filter(|line| line.trim_start().starts_with('#'));
    Ok(kept.map(|line| format!("{line}\n")).collect())
}

/// Writes the file with mode 0600. It is renamed into place when it is complete.
fn write(path: &Path, text: &str) -> io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
    let partial = path.with_extension("partial");
    // A file that an interrupted login left may have another mode.
    match fs::remove_file(&partial) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file: File = File::options()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&partial)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    fs::rename(&partial, path)
}
