//! Finds the server's address and token. Flags take precedence over the environment, which takes
//! precedence over `~/.config/scalebox/config`. For root, the daemon's settings come last.

use crate::error::Error;
use crate::output::Output;
use crate::source::Source;
use scalebox_client::Client;
use std::env;
use std::fs::{self, File};
use std::io::{self, Read};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

const DEFAULT_URL: &str = "http://127.0.0.1:8080";

/// Settings of this host's daemon, readable by root only.
const DAEMON_CONFIG: &str = "/etc/scaleboxd/config";

/// Options of every command: the server, its token and the output format.
#[derive(Debug, Default, clap::Args)]
#[command(next_help_heading = "Server and output")]
pub(crate) struct Connection {
    /// Address of the server [default: http://127.0.0.1:8080]
    #[arg(long, global = true, value_name = "URL")]
    pub url: Option<String>,
    /// API token; prefer SCALEBOX_TOKEN, because other users can read arguments in the process list
    #[arg(long, global = true, value_name = "TOKEN")]
    pub token: Option<String>,
    /// Print the server's response as JSON
    #[arg(long, global = true)]
    pub json: bool,
}

/// A client of the server, and the source of its token.
pub(crate) struct Server {
    pub client: Client,
    pub token_source: Source,
}

/// Finds the address and the token, and creates the client. It does not send a request.
pub(crate) fn connect(flags: &Connection, output: &Output) -> Result<Server, Error> {
    let path = config_path();
    let url = flags.url.clone().or_else(|| variable("SCALEBOX_URL"));
    let token = flags.token.clone().map(|token| (token, Source::Flag));
    let token = token.or_else(|| variable("SCALEBOX_TOKEN").map(|token| (token, Source::Environment)));
    let file = match (&url, &token) {
        // The file is not needed, so an error in it must not stop the command.
        (Some(_), Some(_)) => Config::default(),
        _ => Config::read(&path, output)?,
    };
    let token = token.or_else(|| file.token.map(|token| (token, Source::File(path.clone()))));
    let daemon = match &token {
        Some(_) => Config::default(),
        None => Config::of_daemon(Path::new(DAEMON_CONFIG)),
    };
    let url = url
        .or(file.url)
        .or(daemon.url)
        .unwrap_or_else(|| DEFAULT_URL.to_owned());
    let token = token.or_else(|| daemon.token.map(|token| (token, Source::File(DAEMON_CONFIG.into()))));
    let (token, token_source) = token.ok_or(Error::NoToken { file: path })?;
    Ok(Server {
        // A token read from a file often ends in a line break.
        client: Client::new(&url, token.trim())?,
        token_source,
    })
}

/// Reads an environment variable; an empty one counts as unset. Bytes that are not UTF-8 are
/// replaced rather than ignored, so that the value is rejected where it is used.
fn variable(name: &str) -> Option<String> {
    let value = env::var_os(name)?.to_string_lossy().into_owned();
    Some(value).filter(|value| !value.is_empty())
}

/// Returns the address to log in to if none is given.
pub(crate) fn default_url() -> String {
    variable("SCALEBOX_URL").unwrap_or_else(|| DEFAULT_URL.to_owned())
}

/// Returns `$XDG_CONFIG_HOME/scalebox`, by default `~/.config/scalebox`.
pub(crate) fn config_folder() -> PathBuf {
    xdg_folder("XDG_CONFIG_HOME", ".config")
}

/// Returns the path of the user's configuration file.
pub(crate) fn config_path() -> PathBuf {
    config_folder().join("config")
}

/// Returns the folder `scalebox` in an XDG base directory. Relative paths in the variable are
/// ignored, as the XDG Base Directory Specification requires.
pub(crate) fn xdg_folder(variable_name: &str, under_home: &str) -> PathBuf {
    let base = variable(variable_name)
        .map(PathBuf::from)
        .filter(|path| path.is_absolute());
    base.unwrap_or_else(|| home().join(under_home)).join("scalebox")
}

/// Returns the home directory. Without one, returns the relative path `~`, which holds no files.
pub(crate) fn home() -> PathBuf {
    env::home_dir()
        .filter(|home| home.is_absolute())
        .unwrap_or_else(|| PathBuf::from("~"))
}

/// The settings in a configuration file.
#[derive(Debug, Default)]
struct Config {
    url: Option<String>,
    token: Option<String>,
}

impl Config {
    /// Reads the user's configuration file; a missing file counts as empty.
    fn read(path: &Path, output: &Output) -> Result<Self, Error> {
        /// The limit is far more than the two lines that the file holds.
        const MAX_CONFIG_BYTES: u64 = 64 << 10;
        let unreadable = |why| Error::ConfigUnreadable {
            path: path.to_owned(),
            why,
        };
        let file = match File::open(path) {
            Ok(file) => file,
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
                return Ok(Config::default());
            }
            Err(error) => return Err(unreadable(error)),
        };
        let metadata = file.metadata().map_err(unreadable)?;
        let mut text = Vec::new();
        file.take(MAX_CONFIG_BYTES).read_to_end(&mut text).map_err(unreadable)?;
        // Comments may be in any encoding; settings are ASCII.
        let text = String::from_utf8_lossy(&text);
        let config = Config::parse(text.trim_start_matches('\u{feff}')).map_err(|(line, why)| Error::ConfigLine {
            path: path.to_owned(),
            line,
            why,
        })?;
        if config.token.is_some() && metadata.mode() & 0o077 != 0 {
            let path = path.display();
            output.warning(&format!(
                "{path} holds a token and is readable or writable by other users; run: chmod 600 {path}"
            ));
        }
        Ok(config)
    }

    /// Reads address and token from the daemon's settings. An unreadable file counts as empty; the
    /// other settings are not checked.
    fn of_daemon(path: &Path) -> Self {
        let text = fs::read_to_string(path).unwrap_or_default();
        let setting = |key: &str| {
            let lines = text.lines().filter_map(|line| line.split_once('='));
            let values = lines.filter(|(found, _)| found.trim() == key);
            let mut values = values.map(|(_, value)| unquoted(value.trim()).to_owned());
            values.rfind(|value| !value.is_empty())
        };
        let address = match setting("API_BIND").and_then(|bind| bind.parse::<IpAddr>().ok()) {
            Some(address) if !address.is_unspecified() => address,
            _ => IpAddr::V4(Ipv4Addr::LOCALHOST),
        };
        let port = setting("API_PORT").and_then(|port| port.parse().ok()).unwrap_or(8080);
        Config {
            url: Some(format!("http://{}", SocketAddr::new(address, port))),
            token: setting("API_TOKEN"),
        }
    }

    /// Parses lines of `KEY=VALUE`. Blank lines and lines that begin with `#` are skipped; values
    /// may be quoted.
    fn parse(text: &str) -> Result<Self, (usize, String)> {
        let mut config = Config::default();
        for (number, line) in (1..).zip(text.lines()) {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let (key, value) = line.split_once('=').ok_or((number, "the = is missing".to_owned()))?;
            let value = Some(unquoted(value.trim()).to_owned()).filter(|value| !value.is_empty());
            match key.trim() {
                "SCALEBOX_URL" => config.url = value,
                "SCALEBOX_TOKEN" => config.token = value,
                other => return Err((number, format!("unknown setting {other:?}"))),
            }
        }
        Ok(config)
    }
}

fn unquoted(value: &str) -> &str {
    ['"', '\'']
        .into_iter()
        .find_map(|quote| value.strip_prefix(quote)?.strip_suffix(quote))
        .unwrap_or(value)
}

/// Returns whether `path` is a regular file; `false` if that cannot be determined.
pub(crate) fn is_file(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|metadata| metadata.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn config_values_may_be_quoted_or_empty() {
        let text = "# mine\n\n SCALEBOX_URL = \"https://box.example\" \nSCALEBOX_TOKEN='a=b'\n";
        let config = Config::parse(text).unwrap();
        assert_eq!(
            (config.url.as_deref(), config.token.as_deref()),
            (Some("https://box.example"), Some("a=b"))
        );
        let empty = Config::parse("SCALEBOX_TOKEN=\nSCALEBOX_URL=\"\"").unwrap();
        assert!(empty.url.is_none() && empty.token.is_none());
    }

    #[test]
    fn address_and_token_are_read_from_the_daemons_settings() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("config");
        for (text, url, token) in [
            ("API_TOKEN=abc\n", "http://127.0.0.1:8080", Some("abc")),
            (
                "# API_TOKEN=no\nAPI_TOKEN = \"a=b\"\nAPI_PORT=9000\nAPI_BIND=::\n",
                "http://127.0.0.1:9000",
                Some("a=b"),
            ),
            ("API_BIND=fd00::1\nAPI_TOKEN=\n", "http://[fd00::1]:8080", None),
        ] {
            fs::write(&file, text).unwrap();
            let found = Config::of_daemon(&file);
            assert_eq!(
                (found.url.as_deref(), found.token.as_deref()),
                (Some(url), token),
                "{text}"
            );
        }
        assert_eq!(Config::of_daemon(&folder.path().join("missing")).token, None);
    }

    #[test]
    fn config_errors_name_the_line() {
        assert_eq!(
            Config::parse("\nSCALEBOX_TOKE=x").unwrap_err(),
            (2, "unknown setting \"SCALEBOX_TOKE\"".into())
        );
        assert_eq!(Config::parse("secret").unwrap_err().0, 1);
    }
}
