//! The tables of a network: their rules, what they hold, and the difference between what is there
//! and what should be.
//!
//! Rules are constant for a network; a VM is only an element of the maps and sets they look into.
//! Adding and removing a VM therefore touches nothing of another one, and a script is one
//! transaction: packets see the state before or after it. A connection keeps its translation in the
//! kernel's connection table whatever happens to the rules.
//!
//! Scripts are built from typed values only: names checked by [`NetConfig`] and [`Endpoint`],
//! addresses, ports.

use crate::config::NetConfig;
use crate::endpoint::{Endpoint, Mac, Mbps};
use crate::error::{Error, Result};
use crate::nft;
use serde_json::Value;
use std::collections::BTreeSet;
use std::fmt::{self, Write};
use std::net::Ipv4Addr;

/// The guest's port that forwards lead to.
const SSH: u16 = 22;

/// As the elements of a set.
fn listed(items: &[impl ToString]) -> String {
    let items: Vec<String> = items.iter().map(ToString::to_string).collect();
    items.join(", ")
}

/// How closely a guest's frames are checked, by what the kernel can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Guard {
    /// Every frame, as it leaves the tap, against the MAC and address of that tap's VM.
    PerTap,
    /// IPv4 packets that enter the host, against the pairs of MAC and address of all VMs: a kernel
    /// without `CONFIG_NF_TABLES_BRIDGE`.
    PerGuest,
}

/// The tables of one network.
#[derive(Debug, Clone)]
pub(crate) struct Ruleset {
    config: NetConfig,
    guard: Guard,
}

/// What the maps and sets hold: all that the tables know of VMs.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Elements(BTreeSet<Element>);

/// What was found.
#[derive(Debug)]
pub(crate) struct Present {
    pub(crate) elements: Elements,
    /// Whether all tables are there; a `flush ruleset` of somebody else sweeps them away.
    pub(crate) is_whole: bool,
}

/// Elements to take away and to put in.
#[derive(Debug, Default)]
pub(crate) struct Change {
    pub(crate) removed: Vec<Element>,
    pub(crate) added: Vec<Element>,
}

/// What may pass at once beyond what the rate gives in a second, in bytes. A guest's card and the
/// kernel put up to 64 KiB into one packet, which must never be more than all that may pass.
/// (nftables' limits hold a second's worth and this: `nft_limit_init` in
/// `net/netfilter/nft_limit.c`.)
const BURST: u64 = 64 << 10;

/// Seen from the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Direction {
    Up,
    Down,
}

/// One element of one map or set.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Element {
    /// Host port → guest.
    Forward(u16, Ipv4Addr),
    /// Who may send packets through the bridge.
    Guest(Mac, Ipv4Addr),
    /// Which bridge port is guarded.
    Tap(String),
    /// Who may send frames out of which tap.
    Binding(String, Mac, Ipv4Addr),
    /// How many bytes a second a guest may send, or receive: a limit of its own, and the element
    /// that leads to it.
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

    /// The name of our tables: one network's is never another's.
    pub(crate) fn table(&self) -> String {
        format!("scalebox_{}", self.config.bridge())
    }

    /// What the tables hold.
    ///
    /// # Errors
    ///
    /// Those of [`nft::list`], and [`Error::ForeignElement`].
    pub(crate) async fn read(&self) -> Result<Present> {
        let mut present = Present {
            elements: Elements::default(),
            is_whole: true,
        };
        for family in self.families() {
            match nft::list(&["table", family, &self.table()]).await {
                Ok(items) => present.elements.take_in(family, &self.table(), &items)?,
                Err(Error::Nft { output, .. }) if nft::is_gone(&output) => present.is_whole = false,
                Err(error) => return Err(error),
            }
        }
        Ok(present)
    }

    /// Whether all tables are there, whatever they hold.
    ///
    /// # Errors
    ///
    /// Those of [`nft::list`].
    pub(crate) async fn is_there(&self) -> Result<bool> {
        let (ours, listed) = (self.table(), nft::list(&["tables"]).await?);
        let has = |family: &&str| {
            listed
                .iter()
                .any(|item| item["table"]["name"] == *ours && item["table"]["family"] == **family)
        };
        Ok(self.families().iter().all(has))
    }

    /// Makes or repairs the rules, and changes elements, in one transaction. Elements that are in
    /// no change stay untouched.
    pub(crate) async fn apply_whole(&self, change: &Change) -> Result<()> {
        let mut script = self.rules();
        self.write_change(&mut script, change);
        nft::run(&format!("set up the tables {}", self.table()), &script).await
    }

    /// Changes elements, in one transaction. Nothing to change is nothing to do.
    pub(crate) async fn apply(&self, change: &Change) -> Result<()> {
        if change.is_empty() {
            return Ok(());
        }
        let mut script = String::new();
        self.write_change(&mut script, change);
        nft::run(&format!("change {change} in the tables {}", self.table()), &script).await
    }

    /// Removes the tables; those that are not there are made first, because old versions of nft
    /// cannot say "if it exists".
    pub(crate) async fn remove(&self) -> Result<()> {
        let table = self.table();
        let mut script = String::new();
        for family in self.families() {
            put(
                &mut script,
                format_args!("add table {family} {table}\ndelete table {family} {table}"),
            );
        }
        nft::run(&format!("remove the tables {table}"), &script).await
    }

    /// The elements that these endpoints need.
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

    /// The tables as they should be. Rules are emptied and written again, so that those of an older
    /// version, or half of them, do not survive; `flush table` leaves maps, sets and their elements
    /// alone.
    fn rules(&self) -> String {
        match self.guard {
            Guard::PerTap => self.ip_rules() + &self.bridge_rules(),
            Guard::PerGuest => self.ip_rules(),
        }
    }

    /// Priorities are numbers, because nft of Debian 12 does not know their names in every hook:
    /// -300 is before connection tracking (raw), -100 dstnat, 0 filter, 100 srcnat. The policy is
    /// to accept: what is not our bridge's is not our affair.
    fn ip_rules(&self) -> String {
        let table = self.table();
        let (bridge, subnet, gateway) = (self.config.bridge(), self.config.subnet(), self.config.gateway());
        let denied = listed(self.config.denied());
        // A set cannot be empty, in a rule.
        let resolvers = match self.config.resolvers() {
            [] => String::new(),
            some => format!(
                r#"iifname "{bridge}" ip daddr {{ {} }} meta l4proto {{ tcp, udp }} th dport 53 accept"#,
                listed(some)
            ),
        };
        format!(
            r#"add table ip {table}
flush table ip {table}
table ip {table} {{
    map forwards {{ type inet_service : ipv4_addr; }}
    set guests {{ type ether_addr . ipv4_addr; }}
    map uploads {{ type ipv4_addr : limit; }}
    map downloads {{ type ipv4_addr : limit; }}

    # Answers to a masqueraded client on 127.0.0.1 still carry the gateway's address here: what is addressed to
    # 127/8 is a guest's own invention.
    chain guard {{
        type filter hook prerouting priority -300; policy accept;
        iifname "{bridge}" ip daddr 127.0.0.0/8 counter drop
        iifname "{bridge}" ether saddr . ip saddr != @guests counter drop
    }}

    # What a guest sends and receives beyond its limit, from and to wherever.
    chain upload {{
        type filter hook prerouting priority -290; policy accept;
        iifname "{bridge}" limit name ip saddr map @uploads counter drop
    }}
    chain download {{
        type filter hook postrouting priority 300; policy accept;
        oifname "{bridge}" limit name ip daddr map @downloads counter drop
    }}

    # The way in. Guests do not get it: a forward is a way to another guest.
    chain prerouting {{
        type nat hook prerouting priority -100; policy accept;
        iifname != "{bridge}" fib daddr type local dnat to tcp dport map @forwards:{SSH}
    }}
    chain output {{
        type nat hook output priority -100; policy accept;
        fib daddr type local dnat to tcp dport map @forwards:{SSH}
    }}

    # For clients on 127.0.0.1 a source that a guest can answer; and the way out.
    chain postrouting {{
        type nat hook postrouting priority 100; policy accept;
        oifname "{bridge}" ip saddr 127.0.0.0/8 masquerade
        oifname != {{ "{bridge}", "lo" }} ip saddr {subnet} masquerade
    }}

    # Packets that belong to no connection would leave with the guest's private address. What a guest answers goes to
    # wherever it was asked from; what it begins, to the internet and the resolvers.
    chain forward {{
        type filter hook forward priority 0; policy accept;
        iifname "{bridge}" oifname "{bridge}" counter drop
        iifname "{bridge}" ct state invalid counter drop
        iifname "{bridge}" ct state established,related accept
        {resolvers}
        iifname "{bridge}" ip daddr {{ {denied} }} counter drop
        iifname "{bridge}" accept
        oifname "{bridge}" ct state established,related accept
        oifname "{bridge}" ct status dnat tcp dport {SSH} accept
        oifname "{bridge}" counter drop
    }}
    # A resolver may be an address of this host: it is asked here, and nothing else is.
    chain input {{
        type filter hook input priority 0; policy accept;
        iifname "{bridge}" ct state established,related accept
        {resolvers}
        iifname "{bridge}" ip daddr {gateway} icmp type echo-request accept
        iifname "{bridge}" counter drop
    }}
}}
"#
        )
    }

    /// Before the bridge learns where a MAC is: the sender of the frame and, in ARP, the sender
    /// inside.
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

    /// First what goes, so that a key may come back with another value.
    fn write_change(&self, script: &mut String, change: &Change) {
        let table = self.table();
        for element in &change.removed {
            let (family, set) = element.place();
            put(
                script,
                format_args!("delete element {family} {table} {set} {{ {} }}", element.key()),
            );
            if let Element::Rate(..) = element {
                put(
                    script,
                    format_args!("delete limit {family} {table} {}", element.limit()),
                );
            }
        }
        for element in &change.added {
            let (family, set) = element.place();
            if let Element::Rate(_, _, rate) = element {
                let name = element.limit();
                put(
                    script,
                    format_args!(
                        "add limit {family} {table} {name} {{ rate over {rate} bytes/second burst {BURST} bytes; }}"
                    ),
                );
            }
            put(
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
    /// The family of the table, and the map or set.
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

    /// The name of a rate's limit, which tells all of it: nothing else need be read back.
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

    /// What the key leads to, with its colon: nothing in a set.
    fn value(&self) -> String {
        match self {
            Element::Forward(_, ip) => format!(" : {ip}"),
            Element::Rate(..) => format!(" : \"{}\"", self.limit()),
            Element::Guest(..) | Element::Tap(_) | Element::Binding(..) => String::new(),
        }
    }

    /// Reads one as nft lists it; `None` for what we never put there.
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
            Element::Tap(tap) => write!(f, "guarded tap {tap}"),
            Element::Binding(tap, mac, ip) => write!(f, "sender {mac} {ip} on {tap}"),
            Element::Rate(Direction::Up, ip, rate) => write!(f, "{rate} bytes a second from {ip}"),
            Element::Rate(Direction::Down, ip, rate) => write!(f, "{rate} bytes a second to {ip}"),
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

    /// What undoes it.
    pub(crate) fn reversed(self) -> Change {
        Change {
            removed: self.added,
            added: self.removed,
        }
    }
}

impl Elements {
    /// The names in the set of guarded taps.
    pub(crate) fn taps(&self) -> impl Iterator<Item = &str> {
        self.0.iter().filter_map(|element| match element {
            Element::Tap(tap) => Some(tap.as_str()),
            _ => None,
        })
    }

    /// Adds what is missing of `wanted`, what one endpoint needs; takes nothing away but another
    /// rate of its own.
    pub(crate) fn adding(&self, wanted: &Elements, endpoint: &Endpoint) -> Change {
        let rates = self.rates_of(endpoint);
        Change {
            removed: rates.filter(|rate| !wanted.0.contains(rate)).cloned().collect(),
            added: wanted.without(self),
        }
    }

    /// Takes away what is there of `unwanted`, what one endpoint needs, and whatever rate it has. A
    /// forward of the same port to another guest is not it.
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

    /// Makes `wanted` of these.
    pub(crate) fn becoming(&self, wanted: &Elements) -> Change {
        Change {
            removed: self.without(wanted),
            added: wanted.without(self),
        }
    }

    /// Whether the port, the address or the tap of an endpoint is another VM's.
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

    /// Reads the maps and sets of one of our tables, as nft lists them.
    fn take_in(&mut self, family: &str, table: &str, items: &[Value]) -> Result<()> {
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

/// The strings of `{"concat": [...]}`.
fn concatenated(element: &Value) -> Option<Vec<&str>> {
    element.get("concat")?.as_array()?.iter().map(Value::as_str).collect()
}

/// One line. Writing to a string cannot fail.
fn put(script: &mut String, line: fmt::Arguments<'_>) {
    let _infallible = writeln!(script, "{line}");
}
