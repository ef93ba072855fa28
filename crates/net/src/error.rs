//! The errors of this crate.

use ipnet::Ipv4Net;
use std::io;
use std::net::Ipv4Addr;

/// The result of this crate's fallible functions.
pub type Result<T> = std::result::Result<T, Error>;

/// The error of an operation on the network.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A bridge name that is not valid for the kernel, or in a rule.
    #[error(
        "{0:?} is not a valid bridge name; use 1 to 15 letters, digits, '-' or '_', starting with a letter, such as scalebox0 (but not all, default or lo)"
    )]
    BridgeName(String),
    /// A subnet that cannot be used for guests.
    #[error("the subnet {subnet} {why}; use a private one such as 172.16.0.0/16")]
    Subnet {
        /// The subnet.
        subnet: Ipv4Net,
        /// The reason.
        why: &'static str,
    },
    /// A range of ports that is empty or contains privileged ports.
    #[error("{min}..{max} is not a valid range of SSH ports; the first must be at least 1024 and at most the last")]
    Ports {
        /// The first port.
        min: u16,
        /// The last port.
        max: u16,
    },
    /// An address that a guest cannot have.
    #[error(
        "{ip} is not a guest address in {subnet}; the gateway has the first address, and the network and broadcast addresses are reserved"
    )]
    NotAGuestAddress {
        /// The address.
        ip: Ipv4Addr,
        /// The guests' subnet.
        subnet: Ipv4Net,
    },
    /// Every address of the subnet is in use.
    #[error("no free address in {0}")]
    NoFreeAddress(Ipv4Net),
    /// Every port is in use, by VMs or by other programs.
    #[error("no free port in {min}..{max}: {used} are forwarded to VMs, {skipped} are in use by other programs")]
    NoFreePort {
        /// The first port.
        min: u16,
        /// The last port.
        max: u16,
        /// The number of ports forwarded to VMs.
        used: usize,
        /// The number of ports that the caller rejected.
        skipped: usize,
    },
    /// Two VMs share a port, an address or a tap.
    #[error("{what} is in use by another VM ({owner})")]
    Taken {
        /// The port, address or tap.
        what: String,
        /// The VM that has the port, address or tap.
        owner: String,
    },
    /// An existing interface of another owner has the bridge's name; it is not changed.
    #[error("the interface {name} exists and {why}; it was not changed")]
    ForeignBridge {
        /// The name of the interface.
        name: String,
        /// The evidence for another owner.
        why: &'static str,
    },
    /// An existing interface of another owner has a tap's name; it is not changed.
    #[error("the interface {name} exists and {why}; it was not changed")]
    ForeignTap {
        /// The name of the interface.
        name: String,
        /// The evidence for another owner.
        why: &'static str,
    },
    /// One of our interfaces was deleted by another program.
    #[error("the interface {0} was deleted by another program")]
    Gone(String),
    /// The guests' subnet contains addresses that another interface of the host has.
    #[error("the subnet {subnet} overlaps with {address} on {interface}")]
    Overlap {
        /// The guests' subnet.
        subnet: Ipv4Net,
        /// The existing address.
        address: Ipv4Net,
        /// The interface that has the address.
        interface: String,
    },
    /// The kernel rejected a change of links or addresses.
    #[error("cannot {action}: {source}")]
    Netlink {
        /// The operation.
        action: String,
        /// The kernel's error.
        source: io::Error,
    },
    /// A tap could not be created.
    #[error("cannot {action}: {source}")]
    Tap {
        /// The operation.
        action: String,
        /// The kernel's error.
        source: io::Error,
    },
    /// A kernel setting could not be read or written.
    #[error("cannot set {key}={value}: {source}")]
    Sysctl {
        /// The key, as `sysctl` writes it.
        key: String,
        /// The required value.
        value: &'static str,
        /// The kernel's error.
        source: io::Error,
    },
    /// The program `nft` is not installed.
    #[error("the program nft is missing")]
    NftMissing {
        /// The Debian package that contains it.
        package: &'static str,
    },
    /// The program `nft`, or another one that lists rules, could not be run.
    #[error("cannot run {program} to {action}: {source}")]
    NftStart {
        /// The program's name.
        program: String,
        /// The operation.
        action: String,
        /// The cause.
        source: io::Error,
    },
    /// The program `nft` failed. Nothing was changed: a script is one transaction.
    #[error("nft could not {action} ({status}); nothing was changed: {output}")]
    Nft {
        /// The operation.
        action: String,
        /// The exit status.
        status: std::process::ExitStatus,
        /// The program's whole output.
        output: String,
    },
    /// Our tables contain an element that this crate did not add.
    #[error("the nftables table {table} contains {what}, which Scalebox did not add")]
    ForeignElement {
        /// Family and name.
        table: String,
        /// The element.
        what: String,
    },
    /// A port could not be checked.
    #[error("cannot check whether port {port} is free: {source}")]
    HostPort {
        /// The port.
        port: u16,
        /// The kernel's error.
        source: io::Error,
    },
}
