//! The command line's errors: their messages, exit codes and JSON form.

use crate::source::Source;
use scalebox_api::{ErrorBody, ErrorCode, InvalidFormat, VmStatus};
use scalebox_client::ClientError;
use serde_json::Map;
use std::io;
use std::path::PathBuf;
use std::process::ExitCode;

/// An error that ends the command.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// The server refused the request or could not be reached.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// The server returned 401; the message names the source of the token.
    #[error(
        "the server at {url} refused the token from {source_name}; set SCALEBOX_TOKEN to the API_TOKEN of the server \
         (in its /etc/scaleboxd/config)"
    )]
    TokenRefused { url: String, source_name: Source },
    #[error("no API token: set SCALEBOX_TOKEN, write SCALEBOX_TOKEN=... into {}, or pass --token", file.display())]
    NoToken { file: PathBuf },
    #[error("cannot read {}: {why}", path.display())]
    ConfigUnreadable { path: PathBuf, why: io::Error },
    #[error("{}, line {line}: {why}; write SCALEBOX_URL=... or SCALEBOX_TOKEN=...", path.display())]
    ConfigLine { path: PathBuf, line: usize, why: String },
    #[error("cannot read the SSH key {}: {why}", path.display())]
    KeyUnreadable { path: PathBuf, why: io::Error },
    #[error("{}: the SSH key {why}", path.display())]
    Key { path: PathBuf, why: String },
    #[error("{name} is {status}{}; {remedy}", reason_of(reason))]
    NotRunning {
        name: String,
        status: VmStatus,
        reason: Option<String>,
        remedy: String,
    },
    #[error("{name} did not answer SSH at {address} within {seconds} s ({last}); see its console log on the server")]
    SshTimeout {
        name: String,
        address: String,
        seconds: u64,
        last: String,
    },
    #[error("cannot run ssh: {0}; is the OpenSSH client installed?")]
    Ssh(io::Error),
    #[error("cannot create {} for SSH host keys: {why}", path.display())]
    KnownHosts { path: PathBuf, why: io::Error },
    #[error("the server sent {0:?} as a VM's id; is it scaleboxd?")]
    InvalidVmId(String),
    #[error("nothing was deleted")]
    Declined,
    /// Some deletions failed; each failure was reported as it occurred.
    #[error("{failed} of {all} could not be deleted")]
    SomeFailed { failed: usize, all: usize },
    #[error("{} already exists: choose another file, or overwrite it with --force", .0.display())]
    FileExists(PathBuf),
    #[error("{}: {why}", path.display())]
    File { path: PathBuf, why: io::Error },
    /// The server lost the command that this process was attached to.
    #[error("{}", .0.error)]
    Exec(Box<ErrorBody>),
    #[error("cannot use the terminal or handle signals: {0}")]
    Terminal(io::Error),
    #[error("standard input is not a terminal: omit --tty, or run the command in a terminal")]
    NoTerminal,
    #[error("{given:?} is not a path in a VM: the path {form}")]
    RemotePath { given: String, form: InvalidFormat },
    #[error("cannot copy {0}")]
    Copy(&'static str),
    #[error("{0} is a directory: copy it with --recursive")]
    NotRecursive(String),
    #[error("the archive from the VM is damaged or incomplete: {0}")]
    Archive(String),
    #[error("the transfer from the VM failed: {0}")]
    Download(String),
    #[error(
        "there is no template {image:?}; {}; an image of a registry has a tag, such as {image}:latest",
        known_templates(known)
    )]
    NoImage { image: String, known: Vec<String> },
    #[error("name {0} is in use by another VM; choose another, or omit --name to have one generated")]
    NameInUse(String),
    #[error("the server at {url} rejected the token; nothing was stored")]
    LoginRefused { url: String },
    #[error("cannot create an SSH key at {}: {why}", path.display())]
    OwnKey { path: PathBuf, why: String },
    #[error("the export failed: {0}; try again")]
    Export(String),
    #[error("cannot derive the name of a template from {0:?}: choose one with --name")]
    NoTemplateName(String),
    #[error("cannot pull {name}: {reason}")]
    Pull { name: String, reason: String },
    #[error("cannot write the output: {0}")]
    Output(#[from] io::Error),
}

fn known_templates(known: &[String]) -> String {
    match known {
        [] => "create one on the server with: scaleboxd template build debian-base".to_owned(),
        known => format!("the templates are {}", known.join(", ")),
    }
}

fn reason_of(reason: &Option<String>) -> String {
    reason
        .as_ref()
        .map_or_else(String::new, |reason| format!(" ({reason})"))
}

impl Error {
    pub(crate) fn file(path: &std::path::Path, why: io::Error) -> Error {
        Error::File {
            path: path.to_owned(),
            why,
        }
    }

    /// Returns 1 for a refusal or a failure, 2 for a mistake in arguments or local settings.
    pub(crate) fn exit_code(&self) -> ExitCode {
        if self.is_user_error() {
            ExitCode::from(2)
        } else {
            ExitCode::FAILURE
        }
    }

    fn is_user_error(&self) -> bool {
        use Error::*;
        matches!(
            self,
            Client(ClientError::Url { .. } | ClientError::Token)
                | NoToken { .. }
                | ConfigUnreadable { .. }
                | ConfigLine { .. }
                | KeyUnreadable { .. }
                | Key { .. }
                | FileExists(_)
                | NoTemplateName(_)
                | NoTerminal
                | RemotePath { .. }
                | Copy(_)
                | NotRecursive(_)
                | NameInUse(_)
        )
    }

    /// Returns the error in the API's JSON form.
    pub(crate) fn body(&self) -> ErrorBody {
        let (code, field, details) = match self {
            Error::Client(ClientError::Refused { body, .. }) => {
                (body.code.clone(), body.field.clone(), body.details.clone())
            }
            Error::Exec(body) => (body.code.clone(), body.field.clone(), body.details.clone()),
            Error::NoImage { .. } => (ErrorCode::NotFound, None, Map::new()),
            Error::LoginRefused { .. } => (ErrorCode::Unauthorized, None, Map::new()),
            Error::Client(ClientError::Unreachable { .. } | ClientError::Lost { .. }) => {
                (ErrorCode::Unreachable, None, Map::new())
            }
            Error::TokenRefused { .. } | Error::NoToken { .. } => (ErrorCode::Unauthorized, None, Map::new()),
            Error::NotRunning { .. } => (ErrorCode::WrongState, None, Map::new()),
            Error::SshTimeout { .. } => (ErrorCode::Timeout, None, Map::new()),
            Error::FileExists(_) | Error::NameInUse(_) => (ErrorCode::NameTaken, None, Map::new()),
            _ if self.is_user_error() => (ErrorCode::InvalidRequest, None, Map::new()),
            _ => (ErrorCode::Other("failed".to_owned()), None, Map::new()),
        };
        ErrorBody {
            error: self.to_string(),
            code,
            field,
            details,
        }
    }

    /// Adds the source of the token to a 401; returns other errors unchanged.
    pub(crate) fn with_token_source(self, url: &str, source: &Source) -> Self {
        match self {
            Error::Client(error) if error.status() == Some(401) => Error::TokenRefused {
                url: url.to_owned(),
                source_name: source.clone(),
            },
            other => other,
        }
    }
}
