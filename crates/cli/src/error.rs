//! What can go wrong, in words for a person at a terminal, and the exit code of each.

use crate::settings::{Server, Source};
use scalebox_client::{ClientError, ErrorBody, ErrorCode, VmStatus};
use serde_json::Map;
use std::io;
use std::path::PathBuf;
use std::process::ExitCode;

/// What ended the command.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The server's no, or none at all.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// 401: the server says no more, but we know where the token came from.
    #[error(
        "the server at {url} refused the token that {source_name} gave; set SCALEBOX_TOKEN to the API_TOKEN of the server \
         (in its /etc/scaleboxd/config)"
    )]
    TokenRefused { url: String, source_name: Source },
    #[error("no API token: set SCALEBOX_TOKEN, or write SCALEBOX_TOKEN=... into {}, or give --token", file.display())]
    NoToken { file: PathBuf },
    #[error("cannot read {}: {why}", path.display())]
    ConfigUnreadable { path: PathBuf, why: io::Error },
    #[error("{}, line {line}: {why}; a line is SCALEBOX_URL=... or SCALEBOX_TOKEN=...", path.display())]
    ConfigLine { path: PathBuf, line: usize, why: String },
    #[error("no SSH key found (looked for {looked_for}): name one with --key, or make one: ssh-keygen -t ed25519")]
    NoKey { looked_for: String },
    #[error("cannot read the SSH key {}: {why}", path.display())]
    KeyUnreadable { path: PathBuf, why: io::Error },
    #[error("{}: the SSH key {why}", path.display())]
    Key { path: PathBuf, why: String },
    #[error("{name} is {status}{}; {way_out}", reason_of(reason))]
    NotRunning {
        name: String,
        status: VmStatus,
        reason: Option<String>,
        way_out: String,
    },
    #[error(
        "{name} did not answer SSH at {address} within {seconds} s ({last}); its console log on the server may tell why"
    )]
    Silent {
        name: String,
        address: String,
        seconds: u64,
        last: String,
    },
    #[error("cannot run ssh: {0}; is the OpenSSH client installed?")]
    Ssh(io::Error),
    #[error("cannot keep host keys in {}: {why}", path.display())]
    KnownHosts { path: PathBuf, why: io::Error },
    #[error("the server sent {0:?} as a VM's id; is it a scaleboxd?")]
    StrangeId(String),
    #[error("nothing was deleted")]
    Declined,
    /// Each was reported when it happened.
    #[error("{failed} of {all} could not be deleted")]
    SomeFailed { failed: usize, all: usize },
    #[error("{} is there already: name another file, or write over it with --force", .0.display())]
    FileExists(PathBuf),
    #[error("{}: {why}", path.display())]
    File { path: PathBuf, why: io::Error },
    #[error("the export broke off: {0}; nothing of it is kept, so try again")]
    Export(String),
    #[error("cannot write the output: {0}")]
    Output(#[from] io::Error),
}

fn reason_of(reason: &Option<String>) -> String {
    reason
        .as_ref()
        .map_or_else(String::new, |reason| format!(" ({reason})"))
}

impl Error {
    pub fn file(path: &std::path::Path, why: io::Error) -> Error {
        Error::File {
            path: path.to_owned(),
            why,
        }
    }

    /// 1 for a refusal or a failure, 2 for what the user has to put right first.
    pub fn exit_code(&self) -> ExitCode {
        if self.is_the_users() {
            ExitCode::from(2)
        } else {
            ExitCode::FAILURE
        }
    }

    fn is_the_users(&self) -> bool {
        use Error::*;
        matches!(
            self,
            Client(ClientError::Url { .. } | ClientError::Token)
                | NoToken { .. }
                | ConfigUnreadable { .. }
                | ConfigLine { .. }
                | NoKey { .. }
                | KeyUnreadable { .. }
                | Key { .. }
                | FileExists(_)
        )
    }

    /// The error for programs, as the API would answer it.
    pub fn body(&self) -> ErrorBody {
        let (code, field, details) = match self {
            Error::Client(ClientError::Refused { body, .. }) => {
                (body.code.clone(), body.field.clone(), body.details.clone())
            }
            Error::Client(ClientError::Unreachable { .. } | ClientError::Lost { .. }) => {
                (ErrorCode::Unreachable, None, Map::new())
            }
            Error::TokenRefused { .. } | Error::NoToken { .. } => (ErrorCode::Unauthorized, None, Map::new()),
            Error::NotRunning { .. } => (ErrorCode::WrongState, None, Map::new()),
            Error::Silent { .. } => (ErrorCode::Timeout, None, Map::new()),
            Error::FileExists(_) => (ErrorCode::NameTaken, None, Map::new()),
            _ if self.is_the_users() => (ErrorCode::InvalidRequest, None, Map::new()),
            _ => (ErrorCode::Other("failed".to_owned()), None, Map::new()),
        };
        ErrorBody {
            error: self.to_string(),
            code,
            field,
            details,
        }
    }

    /// With what we know of the token where the server refused it.
    pub fn about_token(self, server: &Server) -> Self {
        match self {
            Error::Client(error) if error.status() == Some(401) => Error::TokenRefused {
                url: server.client.url().to_owned(),
                source_name: server.token_from.clone(),
            },
            other => other,
        }
    }
}
