//! What can go wrong, in words that tell the way out.

use ipnet::Ipv4Net;
use std::io;
use std::net::Ipv4Addr;

/// The result of everything in this crate that can fail.
pub type Result<T> = std::result::Result<T, Error>;

/// Why the network is not as asked for.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A bridge name that the kernel, or a rule, would not take.
    #[error(
        "{0:?} is no name for a bridge: write 1 to 15 letters, digits, '-' or '_', a letter first, such as scalebox0 (and not all, default or lo)"
    )]
    BridgeName(String),
    /// A subnet that cannot hold guests.
    #[error("the subnet {subnet} {why}: use a private one such as 172.16.0.0/16")]
    Subnet {
        /// What was asked for.
        subnet: Ipv4Net,
        /// What is wrong with it.
        why: &'static str,
    },
    /// A range with nothing in it, or with ports that belong to others.
    #[error("{min}..{max} is no range of ports for SSH: the first must be at least 1024 and at most the last")]
    Ports {
        /// The first port.
        min: u16,
        /// The last port.
        max: u16,
    },
    /// A VM key of another form.
    #[error("{0:?} is no key of a VM: it is 12 hex digits in lower case, with or without vm- before them")]
    VmKey(String),
    /// An address that guests cannot have.
    #[error(
        "{ip} is no guest's address in {subnet}: the first address is the gateway's, network and broadcast are nobody's"
    )]
    NotAGuestAddress {
        /// The address.
        ip: Ipv4Addr,
        /// The subnet that it should be in.
        subnet: Ipv4Net,
    },
    /// Every address is taken.
    #[error("no free address in {0}: delete a VM, or set SUBNET to a larger one")]
    NoFreeAddress(Ipv4Net),
    /// Every port is taken, by us or by other programs.
    #[error(
        "no free port in {min}..{max}: {used} are forwarded to VMs, {skipped} are in use by other programs; delete a VM, or widen PORT_MIN..PORT_MAX"
    )]
    NoFreePort {
        /// The first port.
        min: u16,
        /// The last port.
        max: u16,
        /// How many are VMs'.
        used: usize,
        /// How many the caller said are not usable.
        skipped: usize,
    },
    /// Two VMs with the same port or address.
    #[error("{what} already belongs to another VM ({owner}): detach that one first, or choose another")]
    Taken {
        /// The port or address.
        what: String,
        /// Whose it is.
        owner: String,
    },
    /// Something of that name exists and is not ours: it is left alone.
    #[error("the interface {name} exists and {why}; it is left alone. {way_out}")]
    Foreign {
        /// Its name.
        name: String,
        /// How we know.
        why: String,
        /// What to do.
        way_out: &'static str,
    },
    /// Something of ours was deleted under us.
    #[error("the interface {0} is gone, something else deleted it: restart the daemon, which makes it anew")]
    Gone(String),
    /// Guests would have addresses that the host uses elsewhere.
    #[error(
        "the subnet {subnet} overlaps with {address} on {interface}: set SUBNET to a private range that this host does not use"
    )]
    Overlap {
        /// The subnet of the guests.
        subnet: Ipv4Net,
        /// The address that is there.
        address: Ipv4Net,
        /// Where it is.
        interface: String,
    },
    /// The kernel refused a change of links or addresses.
    #[error("cannot {action}: {source}; this needs CAP_NET_ADMIN (run as root)")]
    Netlink {
        /// What was to be done.
        action: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// A tap was not made.
    #[error("cannot {action}: {source}; this needs /dev/net/tun (modprobe tun) and CAP_NET_ADMIN (run as root)")]
    Tap {
        /// What was to be done.
        action: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// A kernel setting that cannot be read or written.
    #[error(
        "cannot set {key}={value}: {source}; run `sysctl -w {key}={value}` as root, and look whether /proc/sys is writable here"
    )]
    Sysctl {
        /// The key, as `sysctl` writes it.
        key: String,
        /// The value that is needed.
        value: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// The program `nft` is not installed.
    #[error("the program nft is missing: install the package nftables (apt-get install nftables)")]
    NftMissing,
    /// The program `nft`, or another one that lists rules, could not be run.
    #[error("cannot run {program} to {action}: {source}")]
    NftStart {
        /// Its name.
        program: String,
        /// What was to be done.
        action: String,
        /// Why not.
        source: io::Error,
    },
    /// The program `nft` said no. Nothing was changed: a script is one transaction.
    #[error("nft could not {action} ({status}), nothing was changed: {output}")]
    Nft {
        /// What was to be done.
        action: String,
        /// How it ended.
        status: std::process::ExitStatus,
        /// All that it wrote.
        output: String,
    },
    /// Our tables hold something that we never put there.
    #[error(
        "the nftables table {table} holds {what}, which is not ours: remove it with `nft delete table {table}` and restart, which makes the table anew"
    )]
    ForeignElement {
        /// Family and name.
        table: String,
        /// What was found.
        what: String,
    },
    /// A port could not be looked at.
    #[error("cannot see whether port {port} is free: {source}")]
    HostPort {
        /// The port.
        port: u16,
        /// What the kernel said.
        source: io::Error,
    },
}
