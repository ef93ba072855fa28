//! Other people's firewall tables that drop what our guests send and receive. They are found and
//! reported, never changed.
//!
//! In nftables a packet has to pass the chains of every table: our `accept` does not overrule
//! another's drop, be it the policy of a chain or a verdict at its end. So each of those chains is
//! walked with the packets that guests send and receive.

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

/// The tables of the older iptables that are in use, by the kernel's word. Of the calling thread's
/// network namespace.
const LEGACY_TABLES: &str = "/proc/thread-self/net/ip_tables_names";

/// A chain of another table that drops packets of guests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FirewallDrop {
    /// Where the chain is: `nftables table ip filter`, or `iptables-legacy table filter`.
    pub table: String,
    /// The chain, such as `FORWARD`.
    pub chain: String,
    /// Our bridge.
    pub bridge: String,
    /// What it drops.
    pub dropped: Dropped,
    manager: Manager,
}

/// What a firewall drops.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dropped {
    /// What guests send, or the replies to that.
    Sent,
    /// Connections to guests from other machines.
    Received,
    /// Both.
    All,
    /// The questions of guests to a resolver that is an address of this host.
    Questions(Ipv4Addr),
}

/// Who makes the rules, as their names tell: what changes them must go the same way, or it is gone
/// at the next reload.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Manager {
    Docker,
    Ufw,
    Firewalld,
    /// `iptables`, or `iptables-legacy`.
    Iptables(&'static str),
    /// Rules of nftables written by hand; the family and the table.
    Nftables(String),
}

impl FirewallDrop {
    /// What it keeps from working.
    pub fn finding(&self) -> String {
        let what = match self.dropped {
            Dropped::Sent => "what guests send to the network".to_owned(),
            Dropped::Received => "connections from other machines to guests".to_owned(),
            Dropped::All => "what guests send and receive".to_owned(),
            Dropped::Questions(resolver) => {
                format!("the questions of guests to their resolver {resolver}, which is this host")
            }
        };
        format!(
            "the firewall of this host (chain {} of the {}) drops {what}",
            self.chain, self.table
        )
    }

    /// The commands that let the bridge through.
    pub fn remedy(&self) -> String {
        let FirewallDrop { bridge, chain, .. } = self;
        let asks = matches!(self.dropped, Dropped::Questions(_));
        match &self.manager {
            Manager::Firewalld => {
                format!("firewall-cmd --permanent --zone=trusted --add-interface={bridge} && firewall-cmd --reload")
            }
            Manager::Ufw if asks => format!("ufw allow in on {bridge} to any port 53"),
            Manager::Ufw => format!("ufw route allow in on {bridge} && ufw route allow out on {bridge}"),
            Manager::Docker | Manager::Iptables(_) if asks => {
                let program = self.iptables();
                format!(
                    "{program} -I {chain} -i {bridge} -p udp --dport 53 -j ACCEPT && {program} -I {chain} -i {bridge} -p tcp --dport 53 -j ACCEPT"
                )
            }
            Manager::Docker => format!(
                "iptables -I DOCKER-USER -i {bridge} -j ACCEPT && iptables -I DOCKER-USER -o {bridge} -j ACCEPT"
            ),
            Manager::Iptables(program) => {
                format!("{program} -I {chain} -i {bridge} -j ACCEPT && {program} -I {chain} -o {bridge} -j ACCEPT")
            }
            Manager::Nftables(table) if asks => {
                format!(
                    "nft insert rule {table} {chain} iifname {bridge} meta l4proto {{ tcp, udp }} th dport 53 accept"
                )
            }
            Manager::Nftables(table) => format!(
                "nft insert rule {table} {chain} iifname {bridge} accept && nft insert rule {table} {chain} oifname {bridge} accept"
            ),
        }
    }

    fn iptables(&self) -> &'static str {
        match self.manager {
            Manager::Iptables(program) => program,
            _ => "iptables",
        }
    }

    /// Where the rules are kept for the next boot, if the commands do not see to that.
    fn keeper(&self) -> Option<&'static str> {
        match self.manager {
            Manager::Firewalld | Manager::Ufw => None,
            Manager::Nftables(_) => {
                Some("write the same rules to /etc/nftables.conf, so that they are there after a reload")
            }
            Manager::Docker | Manager::Iptables(_) => {
                Some("keep them with iptables-persistent, or run them at each boot")
            }
        }
    }
}

impl fmt::Display for FirewallDrop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}; let the bridge through: {}", self.finding(), self.remedy())?;
        self.keeper().map_or(Ok(()), |keeper| write!(f, "; {keeper}"))
    }
}

/// The chains that drop packets of the guests of `config`, those of the table `own` left out.
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
    let walk = Walk {
        bridge: config.bridge(),
        uplinks: uplinks.into_iter().map(|link| link.name).collect(),
        subnet: all_of(config.subnet()),
        resolvers: resolvers.copied().collect(),
    };
    let mut drops = in_nftables(&walk, own).await?;
    drops.extend(in_legacy(&walk).await);
    Ok(drops)
}

async fn in_nftables(walk: &Walk<'_>, own: &str) -> Result<Vec<FirewallDrop>> {
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
                // Removed between the listing and now: it drops nothing any more.
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
        for dropped in walk.dropped(&read.chains, name, hook, policy) {
            drops.push(FirewallDrop {
                table: format!("nftables table {family} {table}"),
                chain: name.to_owned(),
                bridge: walk.bridge.to_owned(),
                dropped,
                manager: manager(family, table, read),
            });
        }
    }
    Ok(drops)
}

fn manager(family: &str, table: &str, read: &chains_nft::Table) -> Manager {
    if table == "firewalld" {
        return Manager::Firewalld;
    }
    // Docker's and ufw's chains stand in one table where both are installed; what ufw knows
    // outlives a reboot.
    by_chains(&read.chains).unwrap_or_else(|| match read.by_iptables {
        true => Manager::Iptables("iptables"),
        false => Manager::Nftables(format!("{family} {table}")),
    })
}

fn by_chains(chains: &Chains) -> Option<Manager> {
    if chains.keys().any(|name| name.starts_with("ufw-")) {
        Some(Manager::Ufw)
    } else {
        chains.contains_key("DOCKER-USER").then_some(Manager::Docker)
    }
}

/// The older iptables' filter, where the kernel has one in use. Not to be able to read it is no
/// reason to say nothing of nftables.
async fn in_legacy(walk: &Walk<'_>) -> Vec<FirewallDrop> {
    let names = std::fs::read(LEGACY_TABLES).unwrap_or_default();
    if !String::from_utf8_lossy(&names).lines().any(|name| name == "filter") {
        return Vec::new();
    }
    let saved = match nft::save_legacy().await {
        Ok(saved) => saved,
        Err(error) => {
            warn!("cannot see whether the rules of iptables-legacy stand in the way of guests: {error}");
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
        for dropped in walk.dropped(&table.chains, chain, hook, *policy) {
            drops.push(FirewallDrop {
                table: "iptables-legacy table filter".to_owned(),
                chain: chain.clone(),
                bridge: walk.bridge.to_owned(),
                dropped,
                manager: by_chains(&table.chains).unwrap_or(Manager::Iptables("iptables-legacy")),
            });
        }
    }
    drops
}

/// The packets that a chain is walked with.
struct Walk<'a> {
    bridge: &'a str,
    uplinks: Vec<String>,
    subnet: Addresses,
    /// Those that are addresses of this host.
    resolvers: Vec<Ipv4Addr>,
}

impl Walk<'_> {
    /// What the base chain `name` drops of what guests send and receive.
    fn dropped(&self, chains: &Chains, name: &str, hook: &str, policy: Verdict) -> Vec<Dropped> {
        let drops = |packet: Packet<'_>| packet.walk(chains, name).unwrap_or(policy) == Verdict::Drop;
        if hook == "input" {
            let questions = self.resolvers.iter().copied();
            return questions
                .filter(|resolver| drops(self.question(*resolver)))
                .map(Dropped::Questions)
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

    /// A reply to what a guest sent, or a client's first packet through the forward.
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

    fn question(&self, resolver: Ipv4Addr) -> Packet<'_> {
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
