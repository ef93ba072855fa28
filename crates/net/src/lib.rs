//! The network of a Scalebox host: a bridge, one tap per VM, internet access, and SSH forwards to
//! guests.
//!
//! ```text
//!   client ── host port 22001 ──┐ DNAT               ┌─ tap sb0123456789ab ─ guest 172.16.0.2:22
//!                               ├─ bridge scalebox0 ─┤
//!   internet ◄── masquerade ────┘  172.16.0.1/16     └─ tap sb… ─ guest 172.16.0.3
//! ```
//!
//! The kernel does all the work: no process of ours carries packets, so a session through a forward
//! survives a restart of the daemon. [`Network::ensure`] creates missing parts, [`Network::attach`]
//! and [`Network::detach`] add and remove one VM, and [`Network::reconcile`] repairs the state
//! after a crash. All of them can be repeated.
//!
//! # What a guest can reach
//!
//! A guest can reach everything behind the host's other interfaces, with the host's address as its
//! source, and nothing else. It cannot reach another guest: bridge ports are isolated, and the host
//! does not route from the bridge back into it, including forwards. It cannot reach services of the
//! host on any of its addresses, nor `127.0.0.0/8`. The gateway responds to pings, and a resolver
//! on an address of the host responds to DNS queries.
//!
//! A frame leaves a tap only with the MAC and IPv4 address of its VM, in IPv4 headers and in ARP.
//! IPv6, VLAN tags and all other protocols are dropped. On kernels without the nftables bridge
//! family, MAC and address are still checked as a pair, but not against the tap: see
//! [`Network::guards_taps`].
//!
//! # Changes to the host
//!
//! * the bridge, its taps, and the nftables tables `ip scalebox_BRIDGE` and `bridge
//!   scalebox_BRIDGE`; other tables are not touched;
//! * `net.ipv4.ip_forward=1`. It stays set after [`Network::teardown`], because other software may
//!   rely on it by then. An installer should make it permanent before Docker starts: Docker drops
//!   forwarded packets only if it had to enable forwarding itself;
//! * settings of the bridge and the taps, which are removed with them: `route_localnet=1` (so that
//!   a client on the host can use `127.0.0.1:PORT`), `arp_ignore=1`, `accept_redirects=0`,
//!   `disable_ipv6=1`.
//!
//! In nftables a packet must pass the chains of *every* table. So our rules cannot override a
//! firewall on the host that drops forwarded packets (Docker, ufw, firewalld), and its rules are
//! not touched. [`Network::firewall_drops`] detects it and names the remedy.
//!
//! # Layout
//!
//! * [`config`](NetConfig): bridge, subnet and ports
//! * [`endpoint`](Endpoint): the tap, MAC, address and port of one VM
//! * [`addresses`](Addresses): allocates addresses and ports; no I/O
//! * [`host_port`](port_is_free_on_host): whether another program uses a port
//! * [`inspect`](inspect()): checks a host without changing it
//! * [`resolvers`](host_resolvers): the DNS servers that guests can use
//! * [`network`](Network): the network of a host, or its simulation
//! * `host_network`: the operations on a host, as steps with their undo
//! * `simulated`: the same operations in memory, for tests (feature `simulated`)
//! * [`reconciled`](Reconciled): the report of a repair
//! * `links`: bridge, ports and addresses, by netlink
//! * `tap`: creates a tap, the only step that netlink cannot do
//! * `ruleset`: the nftables tables, and the difference between actual and desired state
//! * `nft`: runs the program `nft`
//! * [`firewall`](FirewallDrop): detects other firewalls that drop guests' packets
//! * `chains`: simulates a packet's way through such firewalls; `chains_nft` and `chains_legacy`
//!   parse their rules
//! * `sysctl`: kernel settings

#[cfg(test)]
extern crate self as scalebox_net;
#[cfg(test)]
#[path = "../tests/common/mod.rs"]
mod common;

mod addresses;
mod chains;
mod chains_legacy;
mod chains_nft;
mod config;
mod endpoint;
mod error;
mod firewall;
mod host_network;
mod host_port;
mod inspect;
mod links;
mod network;
mod nft;
mod reconciled;
mod resolvers;
mod ruleset;
#[cfg(any(test, feature = "simulated"))]
mod simulated;
mod sysctl;
mod tap;

pub use addresses::{Addresses, Lease};
pub use config::{NetConfig, PRIVATE_NETWORKS};
pub use endpoint::{Endpoint, Mbps, mac_from_ip};
pub use error::{Error, Result};
pub use firewall::{Dropped, FirewallDrop};
pub use host_port::port_is_free_on_host;
pub use inspect::{Inspection, inspect};
pub use network::Network;
pub use reconciled::Reconciled;
pub use resolvers::{Resolvers, host_resolvers, unusable_resolver};
#[cfg(any(test, feature = "simulated"))]
pub use simulated::{NetworkCall, Simulation};
