//! The virtio-serial port of the agent.

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use scalebox_agent_api::PORT_NAME;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// The ports of the machine.
const PORTS: &str = "/sys/class/virtio-ports";

/// Opens the agent's port; `None` if the machine has none. A port can be opened once at a time.
///
/// # Errors
/// The errors of reading `/sys` and of opening the device.
pub(crate) fn open() -> io::Result<Option<OwnedFd>> {
    let ports = match fs::read_dir(PORTS) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        ports => ports?,
    };
    for entry in ports {
        let entry = entry?;
        let name = fs::read_to_string(entry.path().join("name")).unwrap_or_default();
        if name.trim_end() == PORT_NAME {
            let device = Path::new("/dev").join(entry.file_name());
            let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
            return Ok(Some(rustix::fs::open(device, flags, Mode::empty())?));
        }
    }
    Ok(None)
}

/// The port during one connection. The connection ends when the host disconnects: the port then
/// reads as ended.
///
/// Each connection registers the port again. The runtime treats a hang-up as final, but the port
/// continues when a host connects.
pub(crate) struct Port(AsyncFd<OwnedFd>);

impl Port {
    /// Takes a port that was opened without blocking.
    pub(crate) fn new(port: OwnedFd) -> io::Result<Port> {
        // SAFETY: `OwnedFd` owns a valid descriptor, which nothing replaces or closes before.
        let registered = unsafe { AsyncFd::register(port) };
        Ok(Port(registered.map_err(io::Error::from)?))
    }
}

impl AsyncRead for Port {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        loop {
            let mut guard = ready!(self.0.poll_read_ready(context))?;
            let read = guard.try_io(|port| Ok(rustix::io::read(port, buffer.initialize_unfilled())?));
            match read {
                Ok(read) => {
                    buffer.advance(read?);
                    return Poll::Ready(Ok(()));
                }
                // The host has disconnected, and connected again since.
                Err(_would_block) if guard.ready().is_read_closed() => return Poll::Ready(Ok(())),
                Err(_would_block) => {}
            }
        }
    }
}

impl AsyncWrite for Port {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let disconnected = || io::Error::from(io::ErrorKind::BrokenPipe);
        loop {
            let mut guard = ready!(self.0.poll_write_ready(context))?;
            let written = guard.try_io(|port| match rustix::io::write(port, bytes) {
                Ok(0) | Err(Errno::PIPE | Errno::NODEV) => Err(disconnected()),
                other => Ok(other?),
            });
            match written {
                Ok(written) => return Poll::Ready(written),
                // Without a host, the port accepts no bytes.
                Err(_would_block) if guard.ready().is_write_closed() => return Poll::Ready(Err(disconnected())),
                Err(_would_block) => {}
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    /// Does nothing: the port stays open for the next connection.
    fn poll_shutdown(self: Pin<&mut Self>, _context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
