//! Parses nftables chains from the output of `nft -j` (`man libnftables-json`), including those
//! that `iptables` keeps in nftables. For iptables matches that nft does not support, the output
//! has only the name.

use crate::chains::{Action, Addresses, Chains, Condition, Rule, all_of};
use ipnet::Ipv4Net;
use serde_json::Value;
use std::collections::HashMap;
use std::net::Ipv4Addr;
use std::ops::RangeInclusive;

/// The chains of a table, and its named sets and maps.
#[derive(Debug, Default)]
pub(crate) struct Table {
    pub(crate) chains: Chains,
    /// `true` if `iptables` created rules in this table.
    pub(crate) by_iptables: bool,
    sets: HashMap<String, Vec<Value>>,
}

impl Table {
    /// Parses the items of `nft -j list table`.
    pub(crate) fn read(items: &[Value]) -> Table {
        let mut table = Table::default();
        for set in items.iter().flat_map(|item| [&item["set"], &item["map"]]) {
            if let (Some(name), Some(elements)) = (set["name"].as_str(), set["elem"].as_array()) {
                table.sets.insert(name.to_owned(), elements.clone());
            }
        }
        for item in items {
            if let Some(name) = item["chain"]["name"].as_str() {
                table.chains.entry(name.to_owned()).or_default();
            }
            let rule = &item["rule"];
            if let (Some(chain), Some(expressions)) = (rule["chain"].as_str(), rule["expr"].as_array()) {
                table.by_iptables |= expressions.iter().any(|expression| !expression["xt"].is_null());
                let rules = table.rules(expressions);
                table.chains.entry(chain.to_owned()).or_default().extend(rules);
            }
        }
        table
    }

    /// Parses a rule; returns several rules if a verdict map determines the action.
    fn rules(&self, expressions: &[Value]) -> Vec<Rule> {
        let mut conditions = Vec::new();
        let mut rules = Vec::new();
        for expression in expressions {
            let Some((kind, value)) = expression.as_object().and_then(|object| object.iter().next()) else {
                continue;
            };
            match kind.as_str() {
                "match" => conditions.push(self.condition(value)),
                "xt" => match xt(value) {
                    Xt::Condition(condition) => conditions.extend(condition),
                    Xt::Action(action) => rules.push((None, action)),
                },
                "vmap" => rules.extend(self.vmap_entries(value)),
                // A limit, or a set that is updated by packets: some packets pass and others do
                // not.
                "limit" | "set" | "quota" | "connlimit" | "ct count" => conditions.push(Condition::Unknown),
                _ => rules.extend(action(kind, value).map(|action| (None, action))),
            }
        }
        let with = |(more, action): (Option<Condition>, Action)| Rule {
            conditions: conditions.iter().cloned().chain(more).collect(),
            action,
        };
        rules.into_iter().map(with).collect()
    }

    /// Returns the entries of a verdict map as pairs of condition and action.
    fn vmap_entries(&self, map: &Value) -> Vec<(Option<Condition>, Action)> {
        let elements = match &map["data"] {
            Value::String(name) => name.strip_prefix('@').and_then(|name| self.sets.get(name)),
            data => data["set"].as_array(),
        };
        let pair = |element: &Value| {
            let [key, verdict] = element.as_array()?.as_slice() else {
                return None;
            };
            let (kind, value) = verdict.as_object()?.iter().next()?;
            let condition = self.comparison(&map["key"], std::slice::from_ref(key));
            Some((Some(condition), action(kind, value)?))
        };
        elements.into_iter().flatten().filter_map(pair).collect()
    }

    fn condition(&self, value: &Value) -> Condition {
        let right = match &value["right"] {
            Value::String(name) if name.starts_with('@') => self.sets.get(&name[1..]).cloned(),
            Value::Array(values) => Some(values.clone()),
            other => match other["set"].as_array() {
                Some(values) => Some(values.clone()),
                None => Some(vec![other.clone()]),
            },
        };
        let Some(right) = right else { return Condition::Unknown };
        let condition = self.comparison(&value["left"], &right);
        match value["op"].as_str() {
            Some("==" | "in") => condition,
            Some("!=") => Condition::Not(Box::new(condition)),
            _ => Condition::Unknown,
        }
    }

    /// Returns the condition that `left` is one of `values`.
    fn comparison(&self, left: &Value, values: &[Value]) -> Condition {
        let words = || -> Vec<String> {
            values
                .iter()
                .filter_map(|value| plain(value).as_str())
                .map(str::to_owned)
                .collect()
        };
        let meta = left["meta"]["key"].as_str().unwrap_or_default();
        let ct = left["ct"]["key"].as_str().unwrap_or_default();
        let (protocol, field) = (left["payload"]["protocol"].as_str(), left["payload"]["field"].as_str());
        match (meta, ct, protocol, field) {
            ("iifname" | "iif", ..) => Condition::InInterface(words()),
            ("oifname" | "oif", ..) => Condition::OutInterface(words()),
            ("nfproto", ..) if words().iter().all(|word| word != "ipv4") => Condition::Never,
            ("nfproto", ..) => Condition::Not(Box::new(Condition::Never)),
            (_, "state", ..) => Condition::State(words()),
            (_, "status", ..) if words() == ["dnat"] => Condition::DestinationTranslated,
            (_, _, Some("ip6" | "icmpv6"), _) => Condition::Never,
            (_, _, Some("ip"), Some("saddr")) => Condition::Source(addresses(values)),
            (_, _, Some("ip"), Some("daddr")) => Condition::Destination(addresses(values)),
            (_, _, Some("tcp" | "udp" | "th"), Some("dport")) => Condition::DestinationPort(ports(values)),
            _ => Condition::Unknown,
        }
    }
}

enum Xt {
    Condition(Option<Condition>),
    Action(Action),
}

/// Parses a match or a target of `iptables`, of which only the name is known.
fn xt(value: &Value) -> Xt {
    match (value["type"].as_str(), value["name"].as_str()) {
        (Some("target"), Some("REJECT" | "DROP" | "STEAL" | "TARPIT")) => Xt::Action(Action::Drop),
        (Some("target"), Some("ACCEPT" | "NFQUEUE" | "QUEUE")) => Xt::Action(Action::Accept),
        (Some("target"), _) => Xt::Action(Action::Continue),
        (_, Some("comment")) => Xt::Condition(None),
        _ => Xt::Condition(Some(Condition::Unknown)),
    }
}

fn action(kind: &str, value: &Value) -> Option<Action> {
    let target = || value["target"].as_str().map(str::to_owned);
    match kind {
        // `queue` passes the packet to a program; assume that it accepts.
        "accept" | "queue" => Some(Action::Accept),
        "drop" | "reject" => Some(Action::Drop),
        "return" => Some(Action::Return),
        "jump" => target().map(Action::Jump),
        "goto" => target().map(Action::Goto),
        _ => None,
    }
}

/// Unwraps an element that has a comment or a timeout.
fn plain(value: &Value) -> &Value {
    match &value["elem"]["val"] {
        Value::Null => value,
        inner => inner,
    }
}

fn addresses(values: &[Value]) -> Vec<Addresses> {
    let address = |value: &Value| value.as_str()?.parse::<Ipv4Addr>().ok();
    let one = |value: &Value| {
        let value = plain(value);
        let (prefix, range) = (&value["prefix"], &value["range"]);
        if let Some(length) = prefix["len"].as_u64() {
            let network = Ipv4Net::new(address(&prefix["addr"])?, u8::try_from(length).ok()?).ok()?;
            return Some(all_of(network));
        }
        if range.is_array() {
            return Some(address(&range[0])?..=address(&range[1])?);
        }
        let single = address(value)?;
        Some(single..=single)
    };
    values.iter().filter_map(one).collect()
}

fn ports(values: &[Value]) -> Vec<RangeInclusive<u16>> {
    let port = |value: &Value| u16::try_from(value.as_u64()?).ok();
    let one = |value: &Value| {
        let value = plain(value);
        if value["range"].is_array() {
            return Some(port(&value["range"][0])?..=port(&value["range"][1])?);
        }
        let single = port(value)?;
        Some(single..=single)
    };
    values.iter().filter_map(one).collect()
}
