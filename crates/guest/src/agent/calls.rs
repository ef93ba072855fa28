//! The typed requests. Values in responses are checked: the agent is not trusted.

use crate::agent::connection::{AgentConnection, Call, Download, Upload, header, read_json};
use crate::agent::error::AgentError;
use crate::agent::output::Output;
use hyper::Method;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_encode};
use scalebox_agent_api::exec::{MAX_ENDED, MAX_RUNNING};
use scalebox_agent_api::files::MAX_ENTRIES;
use scalebox_agent_api::{
    Clock, ExecEnd, ExecStatus, FileInfo, Info, Listing, RootSize, Shutdown, Signal, StartExec, Stats, Trimmed,
    WindowSize, headers,
};
use std::time::Duration;

/// Timeout of most requests. An emulated guest under load responds in about half a second.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(10);
/// Timeout of a request that starts a command or reads its output. It exceeds the agent's queue
/// timeout of 45 s for starts.
const EXEC_TIMEOUT: Duration = Duration::from_secs(60);
/// Timeout of a request that changes many files, or walks a file system.
const LONG_TIMEOUT: Duration = Duration::from_secs(120);

/// Characters that stay as they are in a query.
const QUERY: &AsciiSet = &NON_ALPHANUMERIC
    .remove(b'/')
    .remove(b'-')
    .remove(b'_')
    .remove(b'.')
    .remove(b'~');

/// The properties of a file whose content follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileHead {
    /// The permissions: the lowest 12 bits of the mode.
    pub mode: u32,
    /// The owner's number.
    pub uid: u32,
    /// The group's number.
    pub gid: u32,
    /// The time of the last change of the content, in milliseconds since 1970.
    pub modified_ms: i64,
    /// The size in bytes.
    pub size: u64,
}

/// The properties of a file or directory that is created.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PutFile {
    /// The permissions: the lowest 12 bits of the mode.
    pub mode: Option<u32>,
    /// The owner: `NAME`, `UID`, `NAME:GROUP` or `UID:GID`.
    pub user: Option<String>,
    /// `true` to create missing parent directories.
    pub parents: bool,
}

impl PutFile {
    fn query(&self) -> String {
        let mode = self.mode.map(|mode| format!("&mode={mode:o}")).unwrap_or_default();
        let user = self
            .user
            .as_ref()
            .map(|user| format!("&user={}", encoded(user.as_bytes())));
        format!("{mode}{}&parents={}", user.unwrap_or_default(), self.parents)
    }
}

fn encoded(bytes: &[u8]) -> String {
    percent_encode(bytes, QUERY).to_string()
}

/// Commands. Every method fails with an [`AgentError`].
#[allow(clippy::missing_errors_doc, reason = "the section names the error of all methods")]
impl AgentConnection {
    /// Returns the agent's version and the guest's boot id.
    pub async fn info(&self) -> Result<Info, AgentError> {
        self.json(Call::get("/v1/info".to_owned()), RESPONSE_TIMEOUT).await
    }

    /// Starts a command.
    pub async fn start_exec(&self, exec: &StartExec) -> Result<ExecStatus, AgentError> {
        let call = Call::post("/v1/execs".to_owned()).with_json(exec);
        let status = self.json(call, EXEC_TIMEOUT).await?;
        checked(status, &exec.id)
    }

    /// Starts a command, and returns its output until it ends: as [`start_exec`](Self::start_exec)
    /// and [`output`](Self::output), in one request.
    pub async fn start_and_follow(&self, exec: &StartExec) -> Result<Output, AgentError> {
        let call = Call::post("/v1/execs?follow=true".to_owned()).with_json(exec);
        let response = self.send(call, EXEC_TIMEOUT).await?;
        Ok(Output::new(Download::new(response.into_body(), self), 0))
    }

    /// Lists the commands that run or have ended recently.
    pub async fn execs(&self) -> Result<Vec<ExecStatus>, AgentError> {
        let call = Call::get("/v1/execs".to_owned());
        let all: Vec<ExecStatus> = self.json(call, RESPONSE_TIMEOUT).await?;
        if all.len() > MAX_RUNNING + MAX_ENDED {
            return Err(AgentError::malformed(format!("a list of {} execs", all.len())));
        }
        let check = |status: ExecStatus| {
            let id = status.id.clone();
            match is_exec_id(&id) {
                true => checked(status, &id),
                false => Err(AgentError::malformed("an invalid id of an exec")),
            }
        };
        all.into_iter().map(check).collect()
    }

    /// Returns the state of one command.
    pub async fn exec(&self, id: &str) -> Result<ExecStatus, AgentError> {
        let call = Call::get(format!("/v1/execs/{}", encoded(id.as_bytes())));
        let status = self.json(call, RESPONSE_TIMEOUT).await?;
        checked(status, id)
    }

    /// Returns a command's output from the offset `since`; with `follow`, until the command ends.
    pub async fn output(&self, id: &str, since: u64, follow: bool) -> Result<Output, AgentError> {
        let id = encoded(id.as_bytes());
        let call = Call::get(format!("/v1/execs/{id}/output?since={since}&follow={follow}"));
        let response = self.send(call, EXEC_TIMEOUT).await?;
        Ok(Output::new(Download::new(response.into_body(), self), since))
    }

    /// Writes to a command's stdin, and closes it if `close`.
    pub async fn write_stdin(&self, id: &str, bytes: Upload, close: bool) -> Result<(), AgentError> {
        let id = encoded(id.as_bytes());
        let call = Call::post(format!("/v1/execs/{id}/stdin?close={close}"));
        self.upload(call, bytes).await.map(drop)
    }

    /// Sends a signal to a command's process group.
    pub async fn signal(&self, id: &str, signal: Signal) -> Result<(), AgentError> {
        let call = Call::post(format!("/v1/execs/{}/signal", encoded(id.as_bytes())));
        self.done(call.with_json(&signal), RESPONSE_TIMEOUT).await
    }

    /// Sets the size of a command's terminal.
    pub async fn resize(&self, id: &str, size: WindowSize) -> Result<(), AgentError> {
        let call = Call::post(format!("/v1/execs/{}/resize", encoded(id.as_bytes())));
        self.done(call.with_json(&size), RESPONSE_TIMEOUT).await
    }
}

/// Files. A path is absolute and may be any bytes except zero. Every method fails with an
/// [`AgentError`].
#[allow(clippy::missing_errors_doc, reason = "the section names the error of all methods")]
impl AgentConnection {
    /// Opens a regular file.
    pub async fn read_file(&self, path: &[u8]) -> Result<(FileHead, Download), AgentError> {
        let call = Call::get(format!("/v1/files?path={}", encoded(path)));
        let response = self.send(call, RESPONSE_TIMEOUT).await?;
        let octal = |text: &str| u32::from_str_radix(text, 8).ok().filter(|mode| *mode <= 0o7777);
        let all = response.headers();
        let head = FileHead {
            mode: header(all, headers::MODE, octal)?,
            uid: header(all, headers::UID, |text| text.parse().ok())?,
            gid: header(all, headers::GID, |text| text.parse().ok())?,
            modified_ms: header(all, headers::MODIFIED_MS, |text| text.parse().ok())?,
            size: header(all, headers::SIZE, |text| text.parse().ok())?,
        };
        Ok((head, Download::new(response.into_body(), self)))
    }

    /// Replaces or creates a file, atomically.
    pub async fn write_file(&self, path: &[u8], put: &PutFile, content: Upload) -> Result<FileInfo, AgentError> {
        let target = format!("/v1/files?path={}{}", encoded(path), put.query());
        let response = self.upload(Call::new(Method::PUT, target), content).await?;
        self.entry(read_json(response.into_body())).await
    }

    /// Removes a file or directory.
    pub async fn remove(&self, path: &[u8], recursive: bool) -> Result<(), AgentError> {
        let target = format!("/v1/files?path={}&recursive={recursive}", encoded(path));
        self.done(Call::new(Method::DELETE, target), LONG_TIMEOUT).await
    }

    /// Returns the properties of a file, without following a symbolic link.
    pub async fn file_info(&self, path: &[u8]) -> Result<FileInfo, AgentError> {
        let call = Call::get(format!("/v1/files/info?path={}", encoded(path)));
        self.entry(self.json(call, RESPONSE_TIMEOUT)).await
    }

    /// Lists a directory.
    pub async fn list(&self, path: &[u8]) -> Result<Listing, AgentError> {
        let call = Call::get(format!("/v1/files/list?path={}", encoded(path)));
        let listing: Listing = self.json(call, LONG_TIMEOUT).await?;
        match listing.entries.len() <= MAX_ENTRIES {
            true => Ok(listing),
            false => Err(AgentError::malformed("a listing that is too long")),
        }
    }

    /// Opens a file or directory as a tar archive.
    pub async fn read_tar(&self, path: &[u8]) -> Result<Download, AgentError> {
        let call = Call::get(format!("/v1/files/tar?path={}", encoded(path)));
        let response = self.send(call, RESPONSE_TIMEOUT).await?;
        Ok(Download::new(response.into_body(), self))
    }

    /// Unpacks a tar archive into a directory.
    pub async fn write_tar(&self, path: &[u8], archive: Upload) -> Result<(), AgentError> {
        let target = format!("/v1/files/tar?path={}", encoded(path));
        self.upload(Call::new(Method::PUT, target), archive).await.map(drop)
    }

    /// Creates a directory.
    pub async fn make_directory(&self, path: &[u8], put: &PutFile) -> Result<FileInfo, AgentError> {
        let call = Call::post(format!("/v1/files/mkdir?path={}{}", encoded(path), put.query()));
        self.entry(self.json(call, RESPONSE_TIMEOUT)).await
    }

    /// Renames a file or directory.
    pub async fn rename(&self, path: &[u8], to: &[u8]) -> Result<FileInfo, AgentError> {
        let call = Call::post(format!("/v1/files/rename?path={}&to={}", encoded(path), encoded(to)));
        self.entry(self.json(call, RESPONSE_TIMEOUT)).await
    }

    async fn entry(&self, reading: impl Future<Output = Result<FileInfo, AgentError>>) -> Result<FileInfo, AgentError> {
        let read = tokio::time::timeout(LONG_TIMEOUT, reading).await;
        read.unwrap_or(Err(AgentError::Timeout { after: LONG_TIMEOUT }))
    }
}

/// The guest as a whole. Every method fails with an [`AgentError`].
#[allow(clippy::missing_errors_doc, reason = "the section names the error of all methods")]
impl AgentConnection {
    /// Returns load and memory of the guest.
    pub async fn stats(&self) -> Result<Stats, AgentError> {
        self.json(Call::get("/v1/stats".to_owned()), RESPONSE_TIMEOUT).await
    }

    /// Flushes the guest's file systems, for at most `within`.
    pub async fn sync(&self, within: Duration) -> Result<(), AgentError> {
        self.done(Call::post("/v1/sync".to_owned()), within).await
    }

    /// Freezes the guest's file systems: writes wait until the [thaw](AgentConnection::thaw). After
    /// an error they may be frozen nevertheless, so thaw them.
    pub async fn freeze(&self) -> Result<(), AgentError> {
        self.done(Call::post("/v1/freeze".to_owned()), RESPONSE_TIMEOUT).await
    }

    /// Thaws the guest's file systems. Does nothing if they are not frozen.
    pub async fn thaw(&self) -> Result<(), AgentError> {
        self.done(Call::post("/v1/thaw".to_owned()), RESPONSE_TIMEOUT).await
    }

    /// Makes the guest discard its unused blocks.
    pub async fn trim(&self) -> Result<Trimmed, AgentError> {
        self.json(Call::post("/v1/trim".to_owned()), LONG_TIMEOUT).await
    }

    /// Grows the root file system to the size of its disk.
    pub async fn grow(&self) -> Result<RootSize, AgentError> {
        self.json(Call::post("/v1/grow".to_owned()), LONG_TIMEOUT).await
    }

    /// Sets the guest's clock.
    pub async fn set_clock(&self, unix_ns: u64) -> Result<(), AgentError> {
        let call = Call::post("/v1/clock".to_owned()).with_json(&Clock { unix_ns });
        self.done(call, RESPONSE_TIMEOUT).await
    }

    /// Requests a shutdown of the guest. The end of its machine shows success.
    pub async fn shut_down(&self, reboot: bool) -> Result<(), AgentError> {
        let call = Call::post("/v1/shutdown".to_owned()).with_json(&Shutdown { reboot });
        self.done(call, RESPONSE_TIMEOUT).await
    }
}

/// Checks that the state is that of the requested exec, and its numbers.
fn checked(status: ExecStatus, id: &str) -> Result<ExecStatus, AgentError> {
    if status.id != id {
        return Err(AgentError::malformed("the state of another exec"));
    }
    let valid = status.output_start <= status.output_end
        && status.end.is_none_or(|end| match end {
            ExecEnd {
                exit_code: Some(code),
                signal: None,
                ..
            } => (0..=255).contains(&code),
            ExecEnd {
                exit_code: None,
                signal: Some(signal),
                ..
            } => (1..=64).contains(&signal),
            _ => false,
        });
    match valid {
        true => Ok(status),
        false => Err(AgentError::malformed("the state of an exec with numbers out of bounds")),
    }
}

/// Returns whether an id is `exec-` and 12 hexadecimal digits.
fn is_exec_id(id: &str) -> bool {
    let digits = id.strip_prefix("exec-").unwrap_or_default();
    digits.len() == 12 && digits.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}
