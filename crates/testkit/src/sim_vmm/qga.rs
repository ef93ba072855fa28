//! The simulated `qemu-guest-agent`: the part of its protocol that the host uses.
//!
//! A connection is served by a blocking task while the agent responds: such a task holds a paused
//! clock, so that no timeout passes before a response that is already on its way. A connection that
//! is idle or gets no response is left to an ordinary task, which lets the clock run.

use crate::sim_vmm::body::{Body, Inside};
use crate::sim_vmm::guest::SimQga;
use crate::sim_vmm::world::World;
use scalebox_vmm::MachineState;
use serde_json::{Value, json};
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream as StdStream;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;
use tokio::task::{JoinHandle, spawn_blocking};

/// Real time without a request after which a connection counts as idle.
const IDLE_TIMEOUT: Duration = Duration::from_millis(100);

/// Opens a connection to the agent.
pub(crate) fn connect(world: &Arc<World>, body: &Arc<Body>) -> io::Result<UnixStream> {
    let (ours, theirs) = StdStream::pair()?;
    let mut inside = body.lock();
    let is_unreachable = inside.guest.qga == SimQga::Unreachable;
    if is_unreachable || matches!(inside.state, MachineState::Ended(_)) {
        return Err(io::ErrorKind::ConnectionRefused.into());
    }
    inside.add_connection(theirs.try_clone()?);
    let responds = inside.qga_responds();
    drop(inside);
    ours.set_nonblocking(true)?;
    theirs.set_read_timeout(Some(IDLE_TIMEOUT))?;
    let mut session = Session {
        world: world.clone(),
        body: body.clone(),
        stream: theirs,
        received: Vec::new(),
    };
    if responds {
        // The task is started here, and not in the other one: from now on a paused clock waits for
        // the agent.
        let serving = spawn_blocking(move || (session.serve(), session));
        tokio::spawn(follow(serving));
    } else {
        tokio::spawn(session.stay_silent());
    }
    UnixStream::from_std(ours)
}

/// Serves a connection until it is closed.
async fn follow(mut serving: JoinHandle<(Outcome, Session)>) {
    // An error means that the runtime shuts down.
    while let Ok((outcome, session)) = serving.await {
        let mut session = match outcome {
            Outcome::Closed => return,
            Outcome::Silent => return session.stay_silent().await,
            Outcome::Idle => match session.wait_for_request().await {
                Ok(session) => session,
                Err(_closed) => return,
            },
        };
        serving = spawn_blocking(move || (session.serve(), session));
    }
}

struct Session {
    world: Arc<World>,
    body: Arc<Body>,
    stream: StdStream,
    /// The beginning of a request.
    received: Vec<u8>,
}

/// The reason why the agent does not serve a connection at the moment.
enum Outcome {
    Closed,
    Idle,
    Silent,
}

impl Session {
    /// Responds to requests until there are none. Blocks.
    fn serve(&mut self) -> Outcome {
        let mut buffer = [0; 4096];
        loop {
            while let Some(end) = self.received.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = self.received.drain(..=end).collect();
                let Some(response) = self.response(&line) else {
                    return Outcome::Silent;
                };
                if self.stream.write_all(format!("{response}\n").as_bytes()).is_err() {
                    return Outcome::Closed;
                }
            }
            match self.stream.read(&mut buffer) {
                Ok(0) => return Outcome::Closed,
                Ok(read) => self.received.extend(&buffer[..read]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Outcome::Idle,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return Outcome::Closed,
            }
        }
    }

    async fn wait_for_request(mut self) -> io::Result<Session> {
        self.stream.set_nonblocking(true)?;
        let stream = UnixStream::from_std(self.stream)?;
        stream.readable().await?;
        self.stream = stream.into_std()?;
        self.stream.set_nonblocking(false)?;
        Ok(self)
    }

    /// Keeps the connection open until the client or the machine closes it.
    async fn stay_silent(self) {
        let stream = self.stream.set_nonblocking(true);
        let Ok(mut stream) = stream.and_then(|()| UnixStream::from_std(self.stream)) else {
            return;
        };
        let mut buffer = [0; 4096];
        while stream.read(&mut buffer).await.is_ok_and(|read| read > 0) {}
    }

    /// Returns the response to one request; `None` if there is none.
    fn response(&self, line: &[u8]) -> Option<Value> {
        // Clients may send a delimiter first.
        let start = line.iter().position(|&byte| byte == b'{')?;
        let request: Value = serde_json::from_slice(&line[start..]).ok()?;
        let command = request["execute"].as_str()?;
        let mut inside = self.body.lock();
        if !inside.qga_responds() || inside.guest.unanswered.contains(&command) {
            return None;
        }
        if command == "guest-shutdown" {
            drop(inside);
            self.world.request_shutdown(&self.body);
            return None;
        }
        if inside.guest.rejected.contains(&command) || (inside.is_frozen && !works_frozen(command)) {
            return Some(error(&format!("Command {command} has been disabled")));
        }
        Some(match execute(&mut inside, command, &request["arguments"]) {
            Some(result) => json!({ "return": result }),
            None => error(&format!("The command {command} has not been found")),
        })
    }
}

fn works_frozen(command: &str) -> bool {
    matches!(command, "guest-ping" | "guest-sync") || command.starts_with("guest-fsfreeze-")
}

fn error(description: &str) -> Value {
    json!({ "error": { "class": "GenericError", "desc": description } })
}

fn execute(inside: &mut Inside, command: &str, arguments: &Value) -> Option<Value> {
    Some(match command {
        "guest-ping" => json!({}),
        "guest-sync" => arguments["id"].clone(),
        "guest-get-fsinfo" => json!([{
            "name": "vda", "mountpoint": "/", "type": "ext4", "disk": [],
            "total-bytes": inside.fs_total().as_u64(), "used-bytes": inside.guest.fs_used.as_u64(),
        }]),
        "guest-fstrim" => {
            inside.trims += 1;
            let trimmed = std::mem::take(&mut inside.guest.trimmable);
            json!({ "paths": [{ "path": "/", "trimmed": trimmed.as_u64(), "minimum": 0 }] })
        }
        // Every program ends at once, successfully.
        "guest-exec" => json!({ "pid": 1 }),
        "guest-exec-status" => json!({ "exited": true, "exitcode": 0 }),
        "guest-fsfreeze-freeze" => {
            inside.is_frozen = true;
            json!(1)
        }
        "guest-fsfreeze-thaw" => {
            inside.is_frozen = false;
            json!(1)
        }
        "guest-fsfreeze-status" => json!(if inside.is_frozen { "frozen" } else { "thawed" }),
        _ => return None,
    })
}
