//! Whether a port of the host is taken by another program.

use crate::error::{Error, Result};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, ipproto, socket_with, sockopt};
use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};

/// Whether no program on this host has the TCP port, on any IPv4 address. A forward goes before a
/// listener on the same port, so a taken port must be skipped or that program is cut off.
///
/// The socket is bound and closed, never listened on: no client can meet it. The answer can be out
/// of date at once; a program that comes later finds the forward before it.
///
/// # Errors
///
/// [`Error::HostPort`] when the kernel does not let us ask (too many open files, a port below 1024
/// without root).
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
    // Else a connection in TIME_WAIT would count as a program; a listener still does.
    sockopt::set_socket_reuseaddr(&socket, true)?;
    bind(&socket, &SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, port))
}
