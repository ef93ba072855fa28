//! The nftables tables of a network: their rules, their elements, and the difference between actual
//! and desired state.
//!
//! The rules of a network are constant; a VM is only an element of the maps and sets that the rules
//! use. Adding or removing a VM therefore does not affect other VMs. A script is one transaction:
//! packets see the state before or after it. An established connection keeps its translation in the
//! kernel's connection table, whatever happens to the rules.
//!
//! Scripts are built from typed values only: names checked by [`NetConfig`] and [`Endpoint`],
//! addresses, ports.

use crate::config::NetConfig;
use crate::endpoint::{Endpoint, Mbps};
use crate::error::{Error, Result};
use crate::nft;
use scalebox_units::Mac;
use serde_json::Value;
use std::collections::BTreeSet;
use std::fmt::{self, Write};
use std::net::Ipv4Addr;

/// The guest port that forwards lead to.
const SSH_PORT: u16 = 22;

/// Formats items as the elements of a set.
fn listed(items: &[impl ToString]) -> String {
    let items: Vec<String> = items.iter().map(ToString::to_string).collect();
    items.join(", ")
}

/// The strictness of the check of guests' frames; depends on the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Guard {
    /// Every frame that leaves a tap is checked against the MAC and address of the tap's VM.
    PerTap,
    /// IPv4 packets that enter the host are checked against the MAC and address pairs of all VMs.
    /// For kernels without `CONFIG_NF_TABLES_BRIDGE`.
    PerGuest,
}

/// The tables of one network.
#[derive(Debug, Clone)]
pub(crate) struct Ruleset {
    config: NetConfig,
    guard: Guard,
}

/// The content of the maps and sets: all data about VMs in the tables.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Elements(BTreeSet<Element>);

/// The actual state of the tables.
#[derive(Debug)]
pub(crate) struct Present {
    pub(crate) elements: Elements,
    /// `true` if all tables exist. Another program's `flush ruleset` deletes them.
    pub(crate) is_whole: bool,
}

/// Elements to remove and to add.
#[derive(Debug, Default)]
pub(crate) struct Change {
    pub(crate) removed: Vec<Element>,
    pub(crate) added: Vec<Element>,
}

/// Bytes that may pass at once beyond one second's worth. Guests and the kernel build packets of up
/// to 64 KiB, and no packet may be larger than the whole allowance. (An nftables limit allows one
/// second's worth plus this burst: `nft_limit_init` in `net/netfilter/nft_limit.c`.)
const BURST_BYTES: u64 = 64 << 10;

/// Direction of traffic, seen from the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Direction {
    Up,
    Down,
}

/// One element of a map or set.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Element {
    /// A forward from a host port to a guest.
    Forward(u16, Ipv4Addr),
    /// A MAC and address pair that may send packets through the bridge.
    Guest(Mac, Ipv4Addr),
    /// A bridge port whose frames are checked.
    Tap(String),
    /// A MAC and address pair that may send frames out of a tap.
    Binding(String, Mac, Ipv4Addr),
    /// A rate limit for one guest and direction, in bytes per second. It consists of a limit object
    /// and the element that refers to it.
    Rate(Direction, Ipv4Addr, u64),
}

impl Ruleset {
    pub(crate) fn new(config: &NetConfig, guard: Guard) -> Ruleset {
        Ruleset {
            config: config.clone(),
            guard,
        }
    }

    pub(crate) fn guard(&self) -> Guard {
        self.guard
    }

    /// Returns the name of our tables, unique per network.
    pub(crate) fn table(&self) -> String {
        format!("scalebox_{}", self.config.bridge())
    }

    /// Reads the content of the tables.
    ///
    /// # Errors
    ///
    /// The errors of [`nft::list`], and [`Error::ForeignElement`].
    pub(crate) async fn read(&self) -> Result<Present> {
        let mut present = Present {
            elements: Elements::default(),
            is_whole: true,
        };
        for family in self.families() {
            match nft::list(&["table", family, &self.table()]).await {
                Ok(items) => present.elements.add_listed(family, &self.table(), &items)?,
                Err(Error::Nft { output, .. }) if nft::is_gone(&output) => present.is_whole = false,
                Err(error) => return Err(error),
            }
        }
        Ok(present)
    }

    /// Returns whether all tables exist, whatever their content.
    ///
    /// # Errors
    ///
    /// The errors of [`nft::list`].
    pub(crate) async fn is_there(&self) -> Result<bool> {
        let (ours, listed) = (self.table(), nft::list(&["tables"]).await?);
        let has = |family: &&str| {
            listed
                .iter()
                .any(|item| item["table"]["name"] == *ours && item["table"]["family"] == **family)
        };
        Ok(self.families().iter().all(has))
    }

    /// Creates or repairs the rules and applies `change`, in one transaction. Other elements are
    /// not touched.
    pub(crate) async fn apply_whole(&self, change: &Change) -> Result<()> {
        let mut script = self.rules();
        self.write_change(&mut script, change);
        nft::run(&format!("set up the tables {}", self.table()), &script).await
    }

    /// Applies `change` in one transaction. Does nothing if it is empty.
    pub(crate) async fn apply(&self, change: &Change) -> Result<()> {
        if change.is_empty() {
            return Ok(());
        }
        let mut script = String::new();
        self.write_change(&mut script, change);
        nft::run(&format!("change {change} in the tables {}", self.table()), &script).await
    }

    /// Removes the tables. Missing ones are created first, because old versions of nft have no "if
    /// exists".
    pub(crate) async fn remove(&self) -> Result<()> {
        let table = self.table();
        let mut script = String::new();
        for family in self.families() {
            push_line(
                &mut script,
                format_args!("add table {family} {table}\ndelete table {family} {table}"),
            );
        }
        nft::run(&format!("remove the tables {table}"), &script).await
    }

    /// Returns the elements that these endpoints need.
    pub(crate) fn elements<'a>(&self, endpoints: impl IntoIterator<Item = &'a Endpoint>) -> Elements {
        let mut elements = BTreeSet::new();
        for endpoint in endpoints {
            let (tap, mac, ip) = (endpoint.tap().to_owned(), endpoint.mac(), endpoint.guest_ip());
            elements.insert(Element::Forward(endpoint.ssh_port(), ip));
            elements.insert(Element::Guest(mac, ip));
            if let Some(rate) = endpoint.rate().map(Mbps::bytes_per_second) {
                elements.extend([Direction::Up, Direction::Down].map(|direction| Element::Rate(direction, ip, rate)));
            }
            if self.guard == Guard::PerTap {
                elements.insert(Element::Tap(tap.clone()));
                elements.insert(Element::Binding(tap, mac, ip));
            }
        }
        Elements(elements)
    }

    fn families(&self) -> &'static [&'static str] {
        match self.guard {
            Guard::PerTap => &["ip", "bridge"],
            Guard::PerGuest => &["ip"],
        }
    }

    /// Returns the script for the rules. Existing rules are flushed first, so that no rule of an
    /// older version or of an interrupted change remains. `flush table` keeps maps, sets and their
    /// elements.
    fn rules(&self) -> String {
        match self.guard {
            Guard::PerTap => self.ip_rules() + &self.bridge_rules(),
            Guard::PerGuest => self.ip_rules(),
        }
    }

    /// Returns the rules of the `ip` table.
    ///
    /// Priorities are numbers, because Debian 12's nft does not know their names in every hook:
    /// -300 is before connection tracking (raw), -100 dstnat, 0 filter, 100 srcnat. The policy is
    /// accept, because these rules must not affect traffic that does not involve our bridge.
    fn ip_rules(&self) -> String {
        let table = self.table();
        let (guards, forwards, filters) = (self.guard_chains(), self.forward_chains(), self.filter_chains());
        format!(
            r#"add table ip {table}
flush table ip {table}
table ip {table} {{
    map forwards {{ type inet_service : ipv4_addr; }}
    set guests {{ type ether_addr . ipv4_addr; }}
    map uploads {{ type ipv4_addr : limit; }}
    map downloads {{ type ipv4_addr : limit; }}
{guards}{forwards}{filters}}}
"#
        )
    }

    /// Returns the chains that check the sources of packets and limit rates.
    fn guard_chains(&self) -> String {
        let bridge = self.config.bridge();
        format!(
            r#"
    # Replies to a masqueraded client on 127.0.0.1 are still addressed to the gateway here, so a
    # packet to 127/8 is forged by a guest.
    chain guard {{
        type filter hook prerouting priority -300; policy accept;
        iifname "{bridge}" ip daddr 127.0.0.0/8 counter drop
        iifname "{bridge}" ether saddr . ip saddr != @guests counter drop
    }}

    # Drops traffic of a guest beyond its limits, whatever the other end.
    chain upload {{
        type filter hook prerouting priority -290; policy accept;
        iifname "{bridge}" limit name ip saddr map @uploads counter drop
    }}
    chain download {{
        type filter hook postrouting priority 300; policy accept;
        oifname "{bridge}" limit name ip daddr map @downloads counter drop
    }}
"#
        )
    }

    /// Returns the chains of the SSH forwards and of internet access.
    fn forward_chains(&self) -> String {
        let (bridge, subnet) = (self.config.bridge(), self.config.subnet());
        format!(
            r#"
    # SSH forwards. Not for guests: a forward would let them reach another guest.
    chain prerouting {{
        type nat hook prerouting priority -100; policy accept;
        iifname != "{bridge}" fib daddr type local dnat to tcp dport map @forwards:{SSH_PORT}
    }}
    chain output {{
        type nat hook output priority -100; policy accept;
        fib daddr type local dnat to tcp dport map @forwards:{SSH_PORT}
    }}

    # Gives clients on 127.0.0.1 a source address that a guest can reply to; and internet access.
    chain postrouting {{
        type nat hook postrouting priority 100; policy accept;
        oifname "{bridge}" ip saddr 127.0.0.0/8 masquerade
        oifname != {{ "{bridge}", "lo" }} ip saddr {subnet} masquerade
    }}
"#
        )
    }

    /// Returns the chains that limit the destinations of guests.
    fn filter_chains(&self) -> String {
        let (bridge, gateway) = (self.config.bridge(), self.config.gateway());
        let denied = listed(self.config.denied());
        // A rule cannot contain an empty set.
        let resolvers = match self.config.resolvers() {
            [] => String::new(),
            some => format!(
                r#"iifname "{bridge}" ip daddr {{ {} }} meta l4proto {{ tcp, udp }} th dport 53 accept"#,
                listed(some)
            ),
        };
        format!(
            r#"
    # Packets without a connection would leave with the guest's private address. Replies of a guest
    # may go to any destination; new connections only to the internet and the resolvers.
    chain forward {{
        type filter hook forward priority 0; policy accept;
        iifname "{bridge}" oifname "{bridge}" counter drop
        iifname "{bridge}" ct state invalid counter drop
        iifname "{bridge}" ct state established,related accept
        {resolvers}
        iifname "{bridge}" ip daddr {{ {denied} }} counter drop
        iifname "{bridge}" accept
        oifname "{bridge}" ct state established,related accept
        oifname "{bridge}" ct status dnat tcp dport {SSH_PORT} accept
        oifname "{bridge}" counter drop
    }}
    # A resolver may be an address of this host: guests may query it, but reach nothing else there.
    chain input {{
        type filter hook input priority 0; policy accept;
        iifname "{bridge}" ct state established,related accept
        {resolvers}
        iifname "{bridge}" ip daddr {gateway} icmp type echo-request accept
        iifname "{bridge}" counter drop
    }}
"#
        )
    }

    /// Returns the rules of the `bridge` table.
    ///
    /// They apply before the bridge learns where a MAC is, and check the sender of the frame and,
    /// for ARP, the sender in the payload.
    fn bridge_rules(&self) -> String {
        let table = self.table();
        format!(
            r#"add table bridge {table}
flush table bridge {table}
table bridge {table} {{
    set taps {{ type ifname; }}
    set guests {{ type ifname . ether_addr . ipv4_addr; }}

    chain guard {{
        type filter hook prerouting priority -300; policy accept;
        iifname . ether saddr . ip saddr @guests accept
        iifname . ether saddr . arp saddr ip @guests iifname . arp saddr ether . arp saddr ip @guests accept
        iifname @taps counter drop
    }}
}}
"#
        )
    }

    /// Appends the commands of `change`. Removals come first, so that a key can be added again with
    /// another value.
    fn write_change(&self, script: &mut String, change: &Change) {
        let table = self.table();
        for element in &change.removed {
            let (family, set) = element.place();
            push_line(
                script,
                format_args!("delete element {family} {table} {set} {{ {} }}", element.key()),
            );
            if let Element::Rate(..) = element {
                push_line(
                    script,
                    format_args!("delete limit {family} {table} {}", element.limit()),
                );
            }
        }
        for element in &change.added {
            let (family, set) = element.place();
            if let Element::Rate(_, _, rate) = element {
                let name = element.limit();
                push_line(
                    script,
                    format_args!(
                        "add limit {family} {table} {name} {{ rate over {rate} bytes/second burst {BURST_BYTES} bytes; }}"
                    ),
                );
            }
            push_line(
                script,
                format_args!(
                    "add element {family} {table} {set} {{ {}{} }}",
                    element.key(),
                    element.value()
                ),
            );
        }
    }
}

impl Element {
    /// Returns the family of the table, and the name of the map or set.
    fn place(&self) -> (&'static str, &'static str) {
        match self {
            Element::Forward(..) => ("ip", "forwards"),
            Element::Guest(..) => ("ip", "guests"),
            Element::Tap(_) => ("bridge", "taps"),
            Element::Binding(..) => ("bridge", "guests"),
            Element::Rate(Direction::Up, ..) => ("ip", "uploads"),
            Element::Rate(Direction::Down, ..) => ("ip", "downloads"),
        }
    }

    /// Returns the name of a rate's limit object. It encodes the whole rate, so that the object
    /// itself need not be read.
    fn limit(&self) -> String {
        match self {
            Element::Rate(direction, ip, rate) => {
                let direction = match direction {
                    Direction::Up => "up",
                    Direction::Down => "down",
                };
                format!("{direction}_{:08x}_{rate}", u32::from(*ip))
            }
            _ => String::new(),
        }
    }

    fn key(&self) -> String {
        match self {
            Element::Forward(port, _) => port.to_string(),
            Element::Guest(mac, ip) => format!("{mac} . {ip}"),
            Element::Tap(tap) => format!("\"{tap}\""),
            Element::Binding(tap, mac, ip) => format!("\"{tap}\" . {mac} . {ip}"),
            Element::Rate(_, ip, _) => ip.to_string(),
        }
    }

    /// Returns the value that the key maps to, with its colon; an empty string for a set.
    fn value(&self) -> String {
        match self {
            Element::Forward(_, ip) => format!(" : {ip}"),
            Element::Rate(..) => format!(" : \"{}\"", self.limit()),
            Element::Guest(..) | Element::Tap(_) | Element::Binding(..) => String::new(),
        }
    }

    /// Parses an element as listed by nft; `None` if it is not of a form that we add.
    fn read(family: &str, set: &str, listed: &Value) -> Option<Element> {
        match (family, set) {
            ("ip", "forwards") => {
                let [port, ip] = listed.as_array()?.as_slice() else {
                    return None;
                };
                Some(Element::Forward(
                    port.as_u64()?.try_into().ok()?,
                    ip.as_str()?.parse().ok()?,
                ))
            }
            ("ip", "guests") => {
                let [mac, ip] = concatenated(listed)?.try_into().ok()?;
                Some(Element::Guest(mac.parse().ok()?, ip.parse().ok()?))
            }
            ("bridge", "taps") => Some(Element::Tap(listed.as_str()?.to_owned())),
            ("bridge", "guests") => {
                let [tap, mac, ip] = concatenated(listed)?.try_into().ok()?;
                Some(Element::Binding(tap.to_owned(), mac.parse().ok()?, ip.parse().ok()?))
            }
            ("ip", "uploads" | "downloads") => {
                let [ip, limit] = listed.as_array()?.as_slice() else {
                    return None;
                };
                let direction = if set == "uploads" {
                    Direction::Up
                } else {
                    Direction::Down
                };
                let rate = limit.as_str()?.rsplit_once('_')?.1.parse().ok()?;
                Some(Element::Rate(direction, ip.as_str()?.parse().ok()?, rate))
            }
            _ => None,
        }
    }
}

impl fmt::Display for Element {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Element::Forward(port, ip) => write!(f, "forward {port} to {ip}"),
            Element::Guest(mac, ip) => write!(f, "guest {mac} {ip}"),
            Element::Tap(tap) => write!(f, "checked tap {tap}"),
            Element::Binding(tap, mac, ip) => write!(f, "sender {mac} {ip} on {tap}"),
            Element::Rate(Direction::Up, ip, rate) => write!(f, "{rate} bytes per second from {ip}"),
            Element::Rate(Direction::Down, ip, rate) => write!(f, "{rate} bytes per second to {ip}"),
        }
    }
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let removed = self.removed.iter().map(|element| format!("-{element}"));
        let added = self.added.iter().map(|element| format!("+{element}"));
        f.write_str(&removed.chain(added).collect::<Vec<_>>().join(", "))
    }
}

impl Change {
    pub(crate) fn is_empty(&self) -> bool {
        self.removed.is_empty() && self.added.is_empty()
    }

    /// Returns the change that undoes this one.
    pub(crate) fn reversed(self) -> Change {
        Change {
            removed: self.added,
            added: self.removed,
        }
    }
}

impl Elements {
    /// Returns the names in the set of checked taps.
    pub(crate) fn taps(&self) -> impl Iterator<Item = &str> {
        self.0.iter().filter_map(|element| match element {
            Element::Tap(tap) => Some(tap.as_str()),
            _ => None,
        })
    }

    /// Returns the change that adds the missing elements of `wanted`, which belong to one endpoint.
    /// The change removes nothing but another rate of that endpoint.
    pub(crate) fn adding(&self, wanted: &Elements, endpoint: &Endpoint) -> Change {
        let rates = self.rates_of(endpoint);
        Change {
            removed: rates.filter(|rate| !wanted.0.contains(rate)).cloned().collect(),
            added: wanted.without(self),
        }
    }

    /// Returns the change that removes the elements of one endpoint. These are the existing
    /// elements of `unwanted`, and any rate of the endpoint. A forward of the same port to another
    /// guest is kept.
    pub(crate) fn removing(&self, unwanted: &Elements, endpoint: &Endpoint) -> Change {
        let rates: BTreeSet<Element> = self.rates_of(endpoint).cloned().collect();
        let removed: BTreeSet<Element> = self.0.intersection(&unwanted.0).cloned().collect();
        Change {
            removed: removed.union(&rates).cloned().collect(),
            added: Vec::new(),
        }
    }

    fn rates_of(&self, endpoint: &Endpoint) -> impl Iterator<Item = &Element> {
        let own = endpoint.guest_ip();
        self.0
            .iter()
            .filter(move |element| matches!(element, Element::Rate(_, ip, _) if *ip == own))
    }

    /// Returns the change from these elements to `wanted`.
    pub(crate) fn change_to(&self, wanted: &Elements) -> Change {
        Change {
            removed: self.without(wanted),
            added: wanted.without(self),
        }
    }

    /// Checks that no other VM has the endpoint's port, address or tap.
    ///
    /// # Errors
    ///
    /// [`Error::Taken`].
    pub(crate) fn check_free(&self, endpoint: &Endpoint) -> Result<()> {
        let (own_port, own_ip) = (endpoint.ssh_port(), endpoint.guest_ip());
        for element in &self.0 {
            let (what, owner) = match element {
                Element::Forward(port, ip) if *port == own_port && *ip != own_ip => {
                    (format!("port {port}"), ip.to_string())
                }
                Element::Forward(port, ip) if *ip == own_ip && *port != own_port => {
                    (format!("address {ip}"), format!("port {port}"))
                }
                Element::Binding(tap, _, ip) if *ip == own_ip && tap != endpoint.tap() => {
                    (format!("address {ip}"), tap.clone())
                }
                Element::Binding(tap, _, ip) if tap == endpoint.tap() && *ip != own_ip => {
                    (format!("tap {tap}"), ip.to_string())
                }
                _ => continue,
            };
            return Err(Error::Taken { what, owner });
        }
        Ok(())
    }

    fn without(&self, others: &Elements) -> Vec<Element> {
        self.0.difference(&others.0).cloned().collect()
    }

    /// Adds the elements of one of our tables, as listed by nft.
    fn add_listed(&mut self, family: &str, table: &str, items: &[Value]) -> Result<()> {
        for item in items {
            let Some(set) = item.get("map").or_else(|| item.get("set")) else {
                continue;
            };
            let name = set.get("name").and_then(Value::as_str).unwrap_or_default();
            for listed in set.get("elem").and_then(Value::as_array).into_iter().flatten() {
                let element = Element::read(family, name, listed).ok_or_else(|| Error::ForeignElement {
                    table: format!("{family} {table}"),
                    what: format!("{listed} in {name}"),
                })?;
                self.0.insert(element);
            }
        }
        Ok(())
    }
}

/// Returns the strings of `{"concat": [...]}`.
fn concatenated(element: &Value) -> Option<Vec<&str>> {
    element.get("concat")?.as_array()?.iter().map(Value::as_str).collect()
}

/// Appends one line. Writing to a string cannot fail.
fn push_line(script: &mut String, line: fmt::Arguments<'_>) {
    let _infallible = writeln!(script, "{line}");
}
