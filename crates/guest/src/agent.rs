//! The guest agent, asked from the host: `qemu-guest-agent` in the guest, over its serial port or a
//! vsock.
//!
//! Protocol: <https://www.qemu.org/docs/master/interop/qemu-ga-ref.html>. A serial port takes one
//! client at a time, so a connection is held for one errand and dropped. Every question has a
//! deadline: a guest that boots, hangs or has no agent does not answer.

use qapi::futures::{QapiService, QgaStreamTokio};
use qapi::qga;
use scalebox_units::Bytes;
use std::io;
use std::time::Duration;
use tokio::io::{AsyncReadExt, WriteHalf};
use tokio::net::UnixStream;
use tokio::time::timeout;

/// How long an agent may take to answer. An emulated guest under load takes about half a second.
const DEADLINE: Duration = Duration::from_secs(3);
/// How long trimming may take: it walks all free space of the guest.
const TRIM_DEADLINE: Duration = Duration::from_secs(120);

/// What an agent may say over one connection, in bytes: it is a guest's program, and answers are
/// read whole. The longest tells of each file system that is mounted in the guest.
const MOST_SAID: u64 = 1 << 20;

/// How long to wait before the same question is put again.
const BETWEEN_QUESTIONS: Duration = Duration::from_millis(50);

/// Why the agent said nothing useful.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// This host gives no random numbers.
    #[error("the guest agent cannot be asked: no random number: {0}")]
    Random(io::Error),
    /// It does not answer: the guest boots, hangs, or runs no agent.
    #[error("the guest agent does not answer within {} s", DEADLINE.as_secs())]
    Silent,
    /// It answered with an error.
    #[error("the guest agent could not {asked}: {answer}")]
    Refused {
        /// What was asked.
        asked: &'static str,
        /// What it said.
        answer: String,
    },
    /// It began a long errand and did not end it.
    #[error("the guest agent did not {asked} within {} s", TRIM_DEADLINE.as_secs())]
    Unfinished {
        /// What was asked.
        asked: &'static str,
    },
    /// The guest's root file system is not among those it told of.
    #[error("the guest agent tells of no file system mounted at /")]
    NoRoot,
}

/// A file system as the guest sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileSystem {
    /// What its files can take in all: its size, less what it keeps for itself and for root.
    pub total: Bytes,
    /// What they take now.
    pub used: Bytes,
}

/// A connection to the agent of one guest.
pub struct Agent {
    service: QapiService<QgaStreamTokio<WriteHalf<UnixStream>>>,
    reader: tokio::task::JoinHandle<()>,
}

impl Agent {
    /// Waits until the agent at the other end of `stream` answers.
    ///
    /// # Errors
    /// [`AgentError::Silent`], [`AgentError::Refused`].
    pub async fn begin(stream: UnixStream) -> Result<Agent, AgentError> {
        let (answers, questions) = tokio::io::split(stream);
        let (service, reader) = QgaStreamTokio::open_split(answers.take(MOST_SAID), questions).spawn_tokio();
        let agent = Agent { service, reader };
        // An answer to an earlier client may still be on its way: the number tells it from ours.
        let number = sync_number().map_err(AgentError::Random)?;
        match timeout(DEADLINE, agent.service.guest_sync(number)).await {
            Ok(Ok(())) => Ok(agent),
            Ok(Err(error)) => Err(AgentError::Refused {
                asked: "begin",
                answer: error.to_string(),
            }),
            Err(_) => Err(AgentError::Silent),
        }
    }

    /// The guest's root file system.
    ///
    /// # Errors
    /// [`AgentError::Silent`], [`AgentError::Refused`], [`AgentError::NoRoot`].
    pub async fn root_file_system(&self) -> Result<FileSystem, AgentError> {
        let answer = timeout(DEADLINE, self.service.execute(qga::guest_get_fsinfo {})).await;
        let all = match answer {
            Ok(Ok(all)) => all,
            Ok(Err(error)) => {
                return Err(AgentError::Refused {
                    asked: "list its file systems",
                    answer: error.to_string(),
                });
            }
            Err(_) => return Err(AgentError::Silent),
        };
        let root = all.into_iter().find(|found| found.mountpoint == "/");
        let sizes = root
            .and_then(|root| root.total_bytes.zip(root.used_bytes))
            .ok_or(AgentError::NoRoot)?;
        Ok(FileSystem {
            total: Bytes::new(sizes.0),
            used: Bytes::new(sizes.1),
        })
    }

    /// Has the guest tell its disks which blocks it does not use. Returns how much that is, in all
    /// file systems that can trim; ext4 leaves out what it told since it was mounted.
    ///
    /// # Errors
    /// [`AgentError::Unfinished`]; [`AgentError::Refused`], also when no file system could be
    /// trimmed.
    pub async fn trim(&self) -> Result<Bytes, AgentError> {
        const ASKED: &str = "trim its file systems";
        let refused = |answer| AgentError::Refused { asked: ASKED, answer };
        let answer = timeout(TRIM_DEADLINE, self.service.execute(qga::guest_fstrim { minimum: None })).await;
        let paths = match answer {
            Ok(Ok(response)) => response.paths,
            Ok(Err(error)) => return Err(refused(error.to_string())),
            Err(_) => return Err(AgentError::Unfinished { asked: ASKED }),
        };
        let sizes: Vec<u64> = paths.iter().filter_map(|path| path.trimmed?.try_into().ok()).collect();
        if sizes.is_empty() {
            let errors: Vec<String> = paths
                .into_iter()
                .filter_map(|path| Some(format!("{}: {}", path.path, path.error?)))
                .collect();
            return Err(refused(format!("no file system was trimmed. {}", errors.join(", "))));
        }
        // A guest may say anything: the sum does not overflow for it.
        Ok(Bytes::new(sizes.into_iter().fold(0, u64::saturating_add)))
    }
}

impl Agent {
    /// Has the guest write out what it holds back, for at most `within`, so that a
    /// [freeze](Agent::freeze) finds little left to write.
    ///
    /// # Errors
    /// [`AgentError::Silent`], [`AgentError::Refused`], also where the agent runs no programs.
    pub async fn flush(&self, within: Duration) -> Result<(), AgentError> {
        let run = qga::guest_exec {
            path: "sync".to_owned(),
            arg: None,
            capture_output: None,
            env: None,
            input_data: None,
        };
        let started = self.ask("run sync", DEADLINE, run).await?;
        let ended = async {
            loop {
                let status = qga::guest_exec_status { pid: started.pid };
                if self.ask("tell of sync", DEADLINE, status).await?.exited {
                    return Ok(());
                }
                tokio::time::sleep(BETWEEN_QUESTIONS).await;
            }
        };
        timeout(within, ended).await.unwrap_or(Err(AgentError::Silent))
    }

    /// Freezes the guest's file systems: what writes to them waits until the [thaw](Agent::thaw).
    /// After an error they may be frozen all the same: thaw them.
    ///
    /// # Errors
    /// [`AgentError::Silent`], [`AgentError::Refused`].
    pub async fn freeze(&self) -> Result<(), AgentError> {
        self.ask("freeze its file systems", DEADLINE, qga::guest_fsfreeze_freeze {})
            .await
            .map(drop)
    }

    /// Thaws the guest's file systems; none that is not frozen minds.
    ///
    /// # Errors
    /// [`AgentError::Silent`], [`AgentError::Refused`].
    pub async fn thaw(&self) -> Result<(), AgentError> {
        self.ask("thaw its file systems", DEADLINE, qga::guest_fsfreeze_thaw {})
            .await
            .map(drop)
    }

    async fn ask<C: qga::QgaCommand>(
        &self,
        asked: &'static str,
        within: Duration,
        command: C,
    ) -> Result<C::Ok, AgentError> {
        match timeout(within, self.service.execute(command)).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(error)) => Err(AgentError::Refused {
                asked,
                answer: error.to_string(),
            }),
            Err(_) => Err(AgentError::Silent),
        }
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

/// A number that no earlier client has used.
fn sync_number() -> io::Result<i32> {
    let mut bytes = [0; 4];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
    Ok(i32::from_ne_bytes(bytes) & i32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};

    /// Answers the first question as an agent does, and the second with a line that has no end.
    /// Returns how much of it was taken.
    async fn endless(stream: UnixStream) -> usize {
        let (questions, mut answers) = tokio::io::split(stream);
        let mut questions = BufReader::new(questions).lines();
        let sync = questions.next_line().await.unwrap().unwrap();
        let number: String = sync.chars().filter(char::is_ascii_digit).collect();
        let answer = format!("{{\"return\": {number}}}\n");
        answers.write_all(answer.as_bytes()).await.unwrap();
        let _trim = questions.next_line().await.unwrap().unwrap();
        answers.write_all(b"{\"return\": {\"paths\": [").await.unwrap();
        let mut said = 0;
        while let Ok(taken) = answers.write(&[b' '; 65536]).await {
            said += taken;
        }
        said
    }

    #[tokio::test]
    async fn an_agent_that_does_not_stop_talking_is_not_listened_to() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let agent = tokio::spawn(endless(theirs));
        let asked = Agent::begin(ours).await.unwrap();
        let error = asked.trim().await.unwrap_err();
        assert!(matches!(error, AgentError::Refused { .. }), "{error}");
        drop(asked);
        // What the sockets hold is beside what was read.
        let said = agent.await.unwrap();
        assert!(said < 4 * MOST_SAID as usize, "{said}");
    }
}
