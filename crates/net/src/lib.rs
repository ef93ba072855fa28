//! The network of a Scalebox host: one bridge, one tap a VM, a way out for guests and a way in to
//! their SSH ports.
//!
//! ```text
//!   client ── host port 22001 ──┐ DNAT in the kernel          ┌─ tap sb0123456789ab ─ guest 172.16.0.2, sshd on 22
//!                               ├── bridge scalebox0 ─────────┤
//!   internet ◄── masquerade ────┘   172.16.0.1/16             └─ tap sb… ─ guest 172.16.0.3
//! ```
//!
//! Everything is kept by the kernel: no process of ours carries a packet, so a session through a
//! forward does not notice that the daemon restarts. [`Network::ensure`] makes what is missing,
//! [`Network::attach`] and [`Network::detach`] add and take away one VM, [`Network::reconcile`]
//! puts right what a crash left. All of them may be repeated.
//!
//! # What a guest can reach
//!
//! Whatever lies behind the host's other interfaces, from the host's own address. Nothing else: not
//! another guest (isolated bridge ports; the host does not route from the bridge back into it,
//! forwards included), no service of the host on any of its addresses, nothing in `127.0.0.0/8`. A
//! ping to the gateway is answered, and so are questions to a resolver that is an address of the
//! host. Frames leave a tap only with the MAC and the IPv4 address of its VM, in IPv4 headers and
//! ARP alike; IPv6, VLAN tags and everything else is dropped. Where the kernel has no nftables
//! bridge family, MAC and address are still checked as a pair, but not against the tap: see
//! [`Network::guards_taps`].
//!
//! # What is changed on the host
//!
//! * the bridge, its taps, and the nftables tables `ip scalebox_BRIDGE` and `bridge
//!   scalebox_BRIDGE`; nothing in other tables;
//! * `net.ipv4.ip_forward=1`. It stays after [`Network::teardown`]: others may have come to need
//!   it. An installer should make it permanent, before Docker starts: Docker drops forwarded
//!   packets only where it had to turn forwarding on itself;
//! * settings of the bridge and the taps alone, which go with them: `route_localnet=1` (so that a
//!   client on the host can use `127.0.0.1:PORT`), `arp_ignore=1`, `accept_redirects=0`,
//!   `disable_ipv6=1`.
//!
//! In nftables a packet must pass the chains of *every* table. A firewall of the host that drops
//! forwarded packets (Docker, ufw, firewalld) is therefore not overruled by ours, and not touched:
//! [`Network::firewall_drops`] finds it and says what to do.
//!
//! # Layout
//!
//! * [`config`](NetConfig): which bridge, which subnet, which ports
//! * [`endpoint`](Endpoint): what one VM gets: tap, MAC, address, port
//! * [`addresses`](Addresses): which address and port are next; no I/O
//! * [`host_port`](port_is_free_on_host): whether a port is taken by another program
//! * [`inspect`](inspect()): looking at a host before anything is made on it
//! * [`resolvers`](host_resolvers): the DNS servers that guests can use
//! * [`network`](Network): the five operations, as steps with their undo
//! * `links`: bridge, ports and addresses, by netlink
//! * `tap`: making a tap: the one thing that netlink cannot do
//! * `ruleset`: the tables, and the difference between what is there and what should be
//! * `nft`: the one door to the program `nft`
//! * [`firewall`](FirewallDrop): other people's tables that stand in the way
//! * `chains`: the walk of a packet through such tables; `chains_nft` and `chains_legacy` read them
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
mod host_port;
mod inspect;
mod links;
mod network;
mod nft;
mod resolvers;
mod ruleset;
mod sysctl;
mod tap;

pub use addresses::{Addresses, Lease};
pub use config::{NetConfig, PRIVATE_NETWORKS};
pub use endpoint::{Endpoint, Mac, Mbps, ParseMacError};
pub use error::{Error, Result};
pub use firewall::{Dropped, FirewallDrop};
pub use host_port::port_is_free_on_host;
pub use inspect::{Inspection, inspect};
pub use network::{Network, Reconciled};
pub use resolvers::{Resolvers, host_resolvers, unusable_resolver};
