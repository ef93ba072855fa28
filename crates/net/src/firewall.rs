//! Detects firewalls on the host that drop guests' packets. They are reported, never changed.
//!
//! In nftables a packet must pass the chains of every table: our `accept` cannot override another
//! table's drop, whether by a chain's policy or by a rule. So each such chain is simulated with the
//! packets that guests send and receive.

use crate::chains::{Addresses, Chains, Packet, Verdict, all_of};
use crate::config::NetConfig;
use crate::error::{Error, Result};
use crate::links::Links;
use crate::{chains_legacy, chains_nft, nft};
use serde_json::Value;
use std::collections::HashMap;
use std::fmt;
use std::net::Ipv4Addr;
use tracing::warn;

/// Names of the iptables-legacy tables in use, in the calling thread's network namespace.
const LEGACY_TABLES: &str = "/proc/thread-self/net/ip_tables_names";

/// A firewall chain of the host that drops guests' packets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FirewallDrop {
    /// The table: `nftables table ip filter`, or `iptables-legacy table filter`.
    pub table: String,
    /// The chain, such as `FORWARD`.
    pub chain: String,
    /// Our bridge.
    pub bridge: String,
    /// The traffic that the chain drops.
    pub dropped: Dropped,
    tool: FirewallTool,
}

/// The traffic of guests that a firewall drops.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dropped {
    /// Outgoing connections of guests, or the replies to them.
    Sent,
    /// Connections to guests from other machines.
    Received,
    /// Traffic in both directions.
    All,
    /// DNS queries of guests to a resolver that is an address of this host.
    DnsQueries(Ipv4Addr),
}

/// The tool that manages the rules, recognised by their names. Changes must be made with the same
/// tool, or its next reload discards them.
#[derive(Debug, Clone, PartialEq, Eq)]
enum FirewallTool {
    Docker,
    Ufw,
    Firewalld,
    /// `iptables`, or `iptables-legacy`.
    Iptables(&'static str),
    /// Hand-written nftables rules; holds the family and the table.
    Nftables(String),
}

impl FirewallDrop {
    /// Returns the finding on a host on which Docker drops guests' packets.
    #[cfg(any(test, feature = "simulated"))]
    pub(crate) fn of_docker(bridge: &str, dropped: Dropped) -> FirewallDrop {
        FirewallDrop {
            table: "nftables table ip filter".to_owned(),
            chain: "FORWARD".to_owned(),
            bridge: bridge.to_owned(),
            dropped,
            tool: FirewallTool::Docker,
        }
    }

    /// Describes the traffic that the firewall drops.
    pub fn finding(&self) -> String {
        let what = match self.dropped {
            Dropped::Sent => "outgoing traffic of guests".to_owned(),
            Dropped::Received => "connections from other machines to guests".to_owned(),
            Dropped::All => "outgoing and incoming traffic of guests".to_owned(),
            Dropped::DnsQueries(resolver) => {
                format!("DNS queries of guests to their resolver {resolver}, which is this host")
            }
        };
        format!(
            "the firewall of this host (chain {} of the {}) drops {what}",
            self.chain, self.table
        )
    }

    /// Returns the commands that let the bridge's traffic through.
    pub fn remedy(&self) -> String {
        let FirewallDrop { bridge, chain, .. } = self;
        let is_dns = matches!(self.dropped, Dropped::DnsQueries(_));
        match &self.tool {
            FirewallTool::Firewalld => {
                format!("firewall-cmd --permanent --zone=trusted --add-interface={bridge} && firewall-cmd --reload")
            }
            FirewallTool::Ufw if is_dns => format!("ufw allow in on {bridge} to any port 53"),
            FirewallTool::Ufw => format!("ufw route allow in on {bridge} && ufw route allow out on {bridge}"),
            FirewallTool::Docker | FirewallTool::Iptables(_) if is_dns => {
                let program = self.iptables();
                format!(
                    "{program} -I {chain} -i {bridge} -p udp --dport 53 -j ACCEPT && {program} -I {chain} -i {bridge} -p tcp --dport 53 -j ACCEPT"
                )
            }
            FirewallTool::Docker => format!(
                "iptables -I DOCKER-USER -i {bridge} -j ACCEPT && iptables -I DOCKER-USER -o {bridge} -j ACCEPT"
            ),
            FirewallTool::Iptables(program) => {
                format!("{program} -I {chain} -i {bridge} -j ACCEPT && {program} -I {chain} -o {bridge} -j ACCEPT")
            }
            FirewallTool::Nftables(table) if is_dns => {
                format!(
                    "nft insert rule {table} {chain} iifname {bridge} meta l4proto {{ tcp, udp }} th dport 53 accept"
                )
            }
            FirewallTool::Nftables(table) => format!(
                "nft insert rule {table} {chain} iifname {bridge} accept && nft insert rule {table} {chain} oifname {bridge} accept"
            ),
        }
    }

    fn iptables(&self) -> &'static str {
        match self.tool {
            FirewallTool::Iptables(program) => program,
            _ => "iptables",
        }
    }

    /// Returns how to make the commands permanent, if they are not by themselves.
    fn persistence_hint(&self) -> Option<&'static str> {
        match self.tool {
            FirewallTool::Firewalld | FirewallTool::Ufw => None,
            FirewallTool::Nftables(_) => Some("add the same rules to /etc/nftables.conf to keep them after a reload"),
            FirewallTool::Docker | FirewallTool::Iptables(_) => {
                Some("keep the rules with iptables-persistent, or run the commands at each boot")
            }
        }
    }
}

impl fmt::Display for FirewallDrop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}; to let the bridge through, run: {}",
            self.finding(),
            self.remedy()
        )?;
        self.persistence_hint().map_or(Ok(()), |hint| write!(f, "; {hint}"))
    }
}

/// Returns the chains that drop packets of the guests of `config`, except for those of the table
/// `own`.
pub(crate) async fn drops(config: &NetConfig, own: &str, links: &Links) -> Result<Vec<FirewallDrop>> {
    let here: Vec<Ipv4Addr> = links
        .addresses()
        .await?
        .iter()
        .map(|address| address.net.addr())
        .collect();
    let resolvers = config.resolvers().iter().filter(|resolver| here.contains(resolver));
    let mut uplinks = links.all().await?;
    uplinks.retain(|link| link.name != "lo" && link.controller.is_none() && !link.is_bridge() && !link.is_tap());
    let simulation = Simulation {
        bridge: config.bridge(),
        uplinks: uplinks.into_iter().map(|link| link.name).collect(),
        subnet: all_of(config.subnet()),
        resolvers: resolvers.copied().collect(),
    };
    let mut drops = in_nftables(&simulation, own).await?;
    drops.extend(in_legacy(&simulation).await);
    Ok(drops)
}

async fn in_nftables(simulation: &Simulation<'_>, own: &str) -> Result<Vec<FirewallDrop>> {
    let mut tables: HashMap<(String, String), chains_nft::Table> = HashMap::new();
    let mut drops = Vec::new();
    for item in nft::list(&["chains"]).await? {
        let chain = &item["chain"];
        let (family, table, hook) = (text(chain, "family"), text(chain, "table"), text(chain, "hook"));
        if !matches!(family, "ip" | "inet") || !matches!(hook, "forward" | "input") || table == own {
            continue;
        }
        let key = (family.to_owned(), table.to_owned());
        if !tables.contains_key(&key) {
            let items = match nft::list(&["table", family, table]).await {
                // The table was removed since the listing: it drops nothing any more.
                Err(Error::Nft { output, .. }) if nft::is_gone(&output) => continue,
                other => other?,
            };
            tables.insert(key.clone(), chains_nft::Table::read(&items));
        }
        let Some(read) = tables.get(&key) else { continue };
        let policy = match text(chain, "policy") {
            "drop" => Verdict::Drop,
            _ => Verdict::Accept,
        };
        let name = text(chain, "name");
        for dropped in simulation.dropped(&read.chains, name, hook, policy) {
            drops.push(FirewallDrop {
                table: format!("nftables table {family} {table}"),
                chain: name.to_owned(),
                bridge: simulation.bridge.to_owned(),
                dropped,
                tool: tool(family, table, read),
            });
        }
    }
    Ok(drops)
}

fn tool(family: &str, table: &str, read: &chains_nft::Table) -> FirewallTool {
    if table == "firewalld" {
        return FirewallTool::Firewalld;
    }
    // If both Docker and ufw are installed, their chains are in the same table. Rules of ufw
    // survive a reboot.
    by_chains(&read.chains).unwrap_or_else(|| match read.by_iptables {
        true => FirewallTool::Iptables("iptables"),
        false => FirewallTool::Nftables(format!("{family} {table}")),
    })
}

fn by_chains(chains: &Chains) -> Option<FirewallTool> {
    if chains.keys().any(|name| name.starts_with("ufw-")) {
        Some(FirewallTool::Ufw)
    } else {
        chains.contains_key("DOCKER-USER").then_some(FirewallTool::Docker)
    }
}

/// Checks the `filter` table of iptables-legacy, if the kernel uses one. If it cannot be read, the
/// findings in nftables are still reported.
async fn in_legacy(simulation: &Simulation<'_>) -> Vec<FirewallDrop> {
    let names = std::fs::read(LEGACY_TABLES).unwrap_or_default();
    if !String::from_utf8_lossy(&names).lines().any(|name| name == "filter") {
        return Vec::new();
    }
    let saved = match nft::save_legacy().await {
        Ok(saved) => saved,
        Err(error) => {
            warn!("cannot check whether iptables-legacy drops guests' packets: {error}");
            return Vec::new();
        }
    };
    let table = chains_legacy::Table::read(&saved);
    let hooks = [("FORWARD", "forward"), ("INPUT", "input")];
    let mut drops = Vec::new();
    for (chain, policy) in &table.policies {
        let Some((_, hook)) = hooks.iter().find(|(name, _)| name == chain) else {
            continue;
        };
        for dropped in simulation.dropped(&table.chains, chain, hook, *policy) {
            drops.push(FirewallDrop {
                table: "iptables-legacy table filter".to_owned(),
                chain: chain.clone(),
                bridge: simulation.bridge.to_owned(),
                dropped,
                tool: by_chains(&table.chains).unwrap_or(FirewallTool::Iptables("iptables-legacy")),
            });
        }
    }
    drops
}

/// The packets with which chains are simulated.
struct Simulation<'a> {
    bridge: &'a str,
    uplinks: Vec<String>,
    subnet: Addresses,
    /// The resolvers that are addresses of this host.
    resolvers: Vec<Ipv4Addr>,
}

impl Simulation<'_> {
    /// Returns which traffic of guests the base chain `name` drops.
    fn dropped(&self, chains: &Chains, name: &str, hook: &str, policy: Verdict) -> Vec<Dropped> {
        let drops = |packet: Packet<'_>| packet.walk(chains, name).unwrap_or(policy) == Verdict::Drop;
        if hook == "input" {
            let resolvers = self.resolvers.iter().copied();
            return resolvers
                .filter(|resolver| drops(self.dns_query(*resolver)))
                .map(Dropped::DnsQueries)
                .collect();
        }
        let sent = drops(self.sent(false)) || drops(self.received(true));
        let received = drops(self.received(false)) || drops(self.sent(true));
        match (sent, received) {
            (true, true) => vec![Dropped::All],
            (true, false) => vec![Dropped::Sent],
            (false, true) => vec![Dropped::Received],
            (false, false) => Vec::new(),
        }
    }

    fn sent(&self, established: bool) -> Packet<'_> {
        Packet {
            bridge: self.bridge,
            uplinks: &self.uplinks,
            from_bridge: true,
            to_bridge: false,
            established,
            destination_translated: established,
            source: Some(self.subnet.clone()),
            destination: None,
            destination_port: None,
        }
    }

    /// Returns a reply to a guest's packet, or a client's first packet through a forward.
    fn received(&self, established: bool) -> Packet<'_> {
        Packet {
            from_bridge: false,
            to_bridge: true,
            destination_translated: !established,
            source: None,
            destination: Some(self.subnet.clone()),
            destination_port: (!established).then_some(22),
            ..self.sent(established)
        }
    }

    fn dns_query(&self, resolver: Ipv4Addr) -> Packet<'_> {
        Packet {
            destination: Some(resolver..=resolver),
            destination_port: Some(53),
            ..self.sent(false)
        }
    }
}

fn text<'a>(object: &'a Value, key: &str) -> &'a str {
    object.get(key).and_then(Value::as_str).unwrap_or_default()
}
