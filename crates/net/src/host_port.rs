//! Checks whether a port of the host is in use by another program.

use crate::error::{Error, Result};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, ipproto, socket_with, sockopt};
use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};

/// Returns whether no program on this host uses the TCP port, on any IPv4 address. A forward takes
/// precedence over a listener on the same port, so a used port must be skipped, or the program
/// becomes unreachable.
///
/// The socket is bound and closed but never listens, so no client can connect to it. The result may
/// be outdated at once; a program that binds the port later is shadowed by the forward.
///
/// # Errors
///
/// [`Error::HostPort`] if the check itself fails (too many open files, or a port below 1024 without
/// root).
pub fn port_is_free_on_host(port: u16) -> Result<bool> {
    match try_bind(port) {
        Ok(()) => Ok(true),
        Err(Errno::ADDRINUSE) => Ok(false),
        Err(errno) => Err(Error::HostPort {
            port,
            source: io::Error::from(errno),
        }),
    }
}

fn try_bind(port: u16) -> std::result::Result<(), Errno> {
    let socket = socket_with(
        AddressFamily::INET,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        Some(ipproto::TCP),
    )?;
    // Without this option, a connection in TIME_WAIT would count as in use. A listener still does.
    sockopt::set_socket_reuseaddr(&socket, true)?;
    bind(&socket, &SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, port))
}
