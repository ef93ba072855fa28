//! A client for `qemu-guest-agent` in the guest, over a virtio serial port or a vsock.
//!
//! Protocol: <https://www.qemu.org/docs/master/interop/qemu-ga-ref.html>. A serial port serves one
//! client at a time, so a connection is used for one task and then dropped. Every request has a
//! timeout: a guest that is booting, hangs or has no agent does not respond.

use qapi::futures::{QapiService, QgaStreamTokio};
use qapi::qga;
use scalebox_units::Bytes;
use std::io;
use std::time::Duration;
use tokio::io::{AsyncReadExt, WriteHalf};
use tokio::net::UnixStream;
use tokio::time::timeout;

/// Timeout of most requests. An emulated guest under load responds in about half a second.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(3);
/// Timeout of a trim, which walks all free space of the guest.
const TRIM_TIMEOUT: Duration = Duration::from_secs(120);

/// Limit on the responses of one connection. The agent runs in the guest and is not trusted, and
/// responses are buffered whole. The largest response lists every mounted file system of the guest.
const MAX_RESPONSE_BYTES: u64 = 1 << 20;

/// Interval between two polls of the same status.
const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// The error of a request to the agent.
#[derive(Debug, thiserror::Error)]
pub enum QgaError {
    /// The host could not provide a random number.
    #[error("cannot query the guest agent: no random number: {0}")]
    Random(io::Error),
    /// No response: the guest is booting, hangs, or has no agent.
    #[error("the guest agent does not respond within {} s", RESPONSE_TIMEOUT.as_secs())]
    Timeout,
    /// The agent responded with an error.
    #[error("the guest agent could not {action}: {response}")]
    Refused {
        /// The requested operation.
        action: &'static str,
        /// The agent's error.
        response: String,
    },
    /// A long operation did not finish in time.
    #[error("the guest agent did not {action} within {} s", TRIM_TIMEOUT.as_secs())]
    Unfinished {
        /// The requested operation.
        action: &'static str,
    },
    /// The guest's root file system is missing in the agent's list.
    #[error("the guest agent reports no file system mounted at /")]
    NoRoot,
}

/// Size and usage of a file system, as reported by the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FsUsage {
    /// Capacity for files: the size, minus metadata and the blocks reserved for root.
    pub total: Bytes,
    /// Bytes in use.
    pub used: Bytes,
}

/// A connection to the agent of one guest.
pub struct Qga {
    service: QapiService<QgaStreamTokio<WriteHalf<UnixStream>>>,
    read_task: tokio::task::JoinHandle<()>,
}

impl Qga {
    /// Waits until the agent at the other end of `stream` responds.
    ///
    /// # Errors
    /// [`QgaError::Timeout`], [`QgaError::Refused`].
    pub async fn connect(stream: UnixStream) -> Result<Qga, QgaError> {
        let (reader, writer) = tokio::io::split(stream);
        let (service, read_task) = QgaStreamTokio::open_split(reader.take(MAX_RESPONSE_BYTES), writer).spawn_tokio();
        let agent = Qga { service, read_task };
        // A response to an earlier client may still be on its way; the number distinguishes it from
        // ours.
        let number = sync_number().map_err(QgaError::Random)?;
        match timeout(RESPONSE_TIMEOUT, agent.service.guest_sync(number)).await {
            Ok(Ok(())) => Ok(agent),
            Ok(Err(error)) => Err(QgaError::Refused {
                action: "start a session",
                response: error.to_string(),
            }),
            Err(_) => Err(QgaError::Timeout),
        }
    }

    /// Returns the usage of the guest's root file system.
    ///
    /// # Errors
    /// [`QgaError::Timeout`], [`QgaError::Refused`], [`QgaError::NoRoot`].
    pub async fn root_file_system(&self) -> Result<FsUsage, QgaError> {
        let response = timeout(RESPONSE_TIMEOUT, self.service.execute(qga::guest_get_fsinfo {})).await;
        let all = match response {
            Ok(Ok(all)) => all,
            Ok(Err(error)) => {
                return Err(QgaError::Refused {
                    action: "list the guest's file systems",
                    response: error.to_string(),
                });
            }
            Err(_) => return Err(QgaError::Timeout),
        };
        let root = all.into_iter().find(|found| found.mountpoint == "/");
        let sizes = root
            .and_then(|root| root.total_bytes.zip(root.used_bytes))
            .ok_or(QgaError::NoRoot)?;
        Ok(FsUsage {
            total: Bytes::new(sizes.0),
            used: Bytes::new(sizes.1),
        })
    }

    /// Makes the guest discard its unused blocks. Returns their total size, over all file systems
    /// that support it. ext4 skips blocks that were already discarded since the mount.
    ///
    /// # Errors
    /// [`QgaError::Unfinished`]; [`QgaError::Refused`], also if no file system could be
    /// trimmed.
    pub async fn trim(&self) -> Result<Bytes, QgaError> {
        const ACTION: &str = "trim the guest's file systems";
        let refused = |response| QgaError::Refused {
            action: ACTION,
            response,
        };
        let response = timeout(TRIM_TIMEOUT, self.service.execute(qga::guest_fstrim { minimum: None })).await;
        let paths = match response {
            Ok(Ok(response)) => response.paths,
            Ok(Err(error)) => return Err(refused(error.to_string())),
            Err(_) => return Err(QgaError::Unfinished { action: ACTION }),
        };
        let sizes: Vec<u64> = paths.iter().filter_map(|path| path.trimmed?.try_into().ok()).collect();
        if sizes.is_empty() {
            let errors: Vec<String> = paths
                .into_iter()
                .filter_map(|path| Some(format!("{}: {}", path.path, path.error?)))
                .collect();
            return Err(refused(format!("no file system was trimmed: {}", errors.join(", "))));
        }
        // The guest's numbers are not trusted: saturate instead of overflowing.
        Ok(Bytes::new(sizes.into_iter().fold(0, u64::saturating_add)))
    }
}

impl Qga {
    /// Flushes the guest's file systems, for at most `within`, so that a [freeze](Qga::freeze)
    /// has little left to write.
    ///
    /// # Errors
    /// [`QgaError::Timeout`]; [`QgaError::Refused`], also if the agent does not run programs.
    pub async fn flush(&self, within: Duration) -> Result<(), QgaError> {
        let run = qga::guest_exec {
            path: "sync".to_owned(),
            arg: None,
            capture_output: None,
            env: None,
            input_data: None,
        };
        let started = self.request("run sync", RESPONSE_TIMEOUT, run).await?;
        let ended = async {
            loop {
                let status = qga::guest_exec_status { pid: started.pid };
                if self
                    .request("report the status of sync", RESPONSE_TIMEOUT, status)
                    .await?
                    .exited
                {
                    return Ok(());
                }
                tokio::time::sleep(POLL_INTERVAL).await;
            }
        };
        timeout(within, ended).await.unwrap_or(Err(QgaError::Timeout))
    }

    /// Freezes the guest's file systems: writes wait until the [thaw](Qga::thaw). After an error
    /// they may be frozen nevertheless, so thaw them.
    ///
    /// # Errors
    /// [`QgaError::Timeout`], [`QgaError::Refused`].
    pub async fn freeze(&self) -> Result<(), QgaError> {
        self.request(
            "freeze the guest's file systems",
            RESPONSE_TIMEOUT,
            qga::guest_fsfreeze_freeze {},
        )
        .await
        .map(drop)
    }

    /// Thaws the guest's file systems. Does nothing if they are not frozen.
    ///
    /// # Errors
    /// [`QgaError::Timeout`], [`QgaError::Refused`].
    pub async fn thaw(&self) -> Result<(), QgaError> {
        self.request(
            "thaw the guest's file systems",
            RESPONSE_TIMEOUT,
            qga::guest_fsfreeze_thaw {},
        )
        .await
        .map(drop)
    }

    async fn request<C: qga::QgaCommand>(
        &self,
        action: &'static str,
        within: Duration,
        command: C,
    ) -> Result<C::Ok, QgaError> {
        match timeout(within, self.service.execute(command)).await {
            Ok(Ok(response)) => Ok(response),
            Ok(Err(error)) => Err(QgaError::Refused {
                action,
                response: error.to_string(),
            }),
            Err(_) => Err(QgaError::Timeout),
        }
    }
}

impl Drop for Qga {
    fn drop(&mut self) {
        self.read_task.abort();
    }
}

/// Returns a random number, to distinguish this client from earlier ones.
fn sync_number() -> io::Result<i32> {
    let mut bytes = [0; 4];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
    Ok(i32::from_ne_bytes(bytes) & i32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};

    /// Responds to the first request as an agent does, and to the second with an endless line.
    /// Returns how many bytes of it were accepted.
    async fn endless(stream: UnixStream) -> usize {
        let (questions, mut answers) = tokio::io::split(stream);
        let mut questions = BufReader::new(questions).lines();
        let sync = questions.next_line().await.unwrap().unwrap();
        let number: String = sync.chars().filter(char::is_ascii_digit).collect();
        let answer = format!("{{\"return\": {number}}}\n");
        answers.write_all(answer.as_bytes()).await.unwrap();
        let _trim = questions.next_line().await.unwrap().unwrap();
        answers.write_all(b"{\"return\": {\"paths\": [").await.unwrap();
        let mut sent = 0;
        while let Ok(taken) = answers.write(&[b' '; 65536]).await {
            sent += taken;
        }
        sent
    }

    #[tokio::test]
    async fn endless_responses_are_cut_off() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let agent = tokio::spawn(endless(theirs));
        let client = Qga::connect(ours).await.unwrap();
        let error = client.trim().await.unwrap_err();
        assert!(matches!(error, QgaError::Refused { .. }), "{error}");
        drop(client);
        // The sockets buffer some bytes in addition to those that were read.
        let sent = agent.await.unwrap();
        assert!(sent < 4 * MAX_RESPONSE_BYTES as usize, "{sent}");
    }
}
