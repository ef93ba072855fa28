//! A firewall's chains, as far as they affect guests' packets, and the simulation of a packet's way
//! through them.
//!
//! Some conditions of a rule cannot be evaluated for a hypothetical packet: a port, a mark, a rate.
//! Such a rule *may* match. If a rule that may match names the bridge or the guests' subnet, it was
//! written for guests: its `accept` counts. So does the `accept` of a rule for all traffic of one
//! of the host's uplinks. Any other rule that may match is ignored: it concerns only some packets,
//! and the verdict is about the others.

use ipnet::Ipv4Net;
use std::collections::HashMap;
use std::net::Ipv4Addr;
use std::ops::RangeInclusive;

/// Maximum depth of chains that jump to one another. The kernel's own limit is 16.
const MAX_DEPTH: usize = 32;

/// The chains of one table, by name.
pub(crate) type Chains = HashMap<String, Vec<Rule>>;

/// A rule: the action for packets that match all conditions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Rule {
    pub(crate) conditions: Vec<Condition>,
    pub(crate) action: Action,
}

/// The action of a rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Action {
    Accept,
    /// Drops the packet, or rejects it with an error.
    Drop,
    Return,
    Jump(String),
    Goto(String),
    /// Counts, logs or marks the packet.
    Continue,
}

/// A condition of a rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Condition {
    InInterface(Vec<String>),
    OutInterface(Vec<String>),
    /// Values of `ct state`.
    State(Vec<String>),
    /// The packet's destination was translated (DNAT).
    DestinationTranslated,
    Source(Vec<Addresses>),
    Destination(Vec<Addresses>),
    DestinationPort(Vec<RangeInclusive<u16>>),
    Not(Box<Condition>),
    /// Holds only for IPv6 packets, or others that no guest sends.
    Never,
    /// A condition that cannot be evaluated.
    Unknown,
}

/// An inclusive range of addresses.
pub(crate) type Addresses = RangeInclusive<Ipv4Addr>;

/// Returns all addresses of a network.
pub(crate) fn all_of(network: Ipv4Net) -> Addresses {
    network.network()..=network.broadcast()
}

/// The known properties of a hypothetical packet.
#[derive(Debug, Clone)]
pub(crate) struct Packet<'a> {
    pub(crate) bridge: &'a str,
    /// The host's uplink interfaces; one of them leads to the network.
    pub(crate) uplinks: &'a [String],
    /// The packet enters by the bridge.
    pub(crate) from_bridge: bool,
    /// The packet leaves by the bridge; otherwise by another interface, or it is for the host.
    pub(crate) to_bridge: bool,
    /// `true` if the packet belongs to an existing connection; otherwise it starts one.
    pub(crate) established: bool,
    pub(crate) destination_translated: bool,
    /// The source addresses of the packet; `None` for any address.
    pub(crate) source: Option<Addresses>,
    pub(crate) destination: Option<Addresses>,
    pub(crate) destination_port: Option<u16>,
}

/// The result of a condition for a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Match {
    Yes,
    No,
    Perhaps,
}

impl Match {
    fn of(holds: bool) -> Match {
        if holds { Match::Yes } else { Match::No }
    }
}

/// The fate of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    Accept,
    Drop,
}

/// The certainty that a packet reaches a rule. `certain`: the rule and those that jumped to it
/// match for certain. `named`: one of them names the guests.
#[derive(Debug, Clone, Copy)]
struct Certainty {
    certain: bool,
    named: bool,
}

impl Packet<'_> {
    /// Returns the verdict of the chain `name`; `None` if the packet reaches the end of the chain.
    pub(crate) fn walk(&self, chains: &Chains, name: &str) -> Option<Verdict> {
        let begin = Certainty {
            certain: true,
            named: false,
        };
        match self.walk_chain(chains, name, begin, 0) {
            Step::Verdict(verdict) => Some(verdict),
            Step::End | Step::Return => None,
        }
    }

    fn walk_chain(&self, chains: &Chains, name: &str, certainty: Certainty, depth: usize) -> Step {
        let rules = chains.get(name).filter(|_| depth < MAX_DEPTH);
        let mut certain_here = certainty.certain;
        for rule in rules.into_iter().flatten() {
            let Some((matched, named)) = self.match_all(&rule.conditions) else {
                continue;
            };
            let certainty = Certainty {
                certain: certain_here && matched == Match::Yes,
                named: certainty.named || named,
            };
            // After a `return` that may have matched, it is no longer certain that the packet
            // reaches the following rules.
            certain_here &= matched == Match::Yes || rule.action != Action::Return;
            match (self.act(chains, &rule.action, certainty, depth), &rule.action) {
                (Step::Verdict(verdict), _) => return Step::Verdict(verdict),
                (Step::Return, _) => return Step::Return,
                // A packet that certainly left for another chain by goto does not return.
                (Step::End, Action::Goto(_)) if certainty.certain => return Step::End,
                (Step::End, _) => {}
            }
        }
        Step::End
    }

    fn act(&self, chains: &Chains, action: &Action, certainty: Certainty, depth: usize) -> Step {
        match action {
            // Every common firewall accepts replies, so the other conditions of such a rule are
            // assumed to hold.
            Action::Accept if certainty.certain || certainty.named || self.established => {
                Step::Verdict(Verdict::Accept)
            }
            Action::Drop if certainty.certain => Step::Verdict(Verdict::Drop),
            Action::Return if certainty.certain => Step::Return,
            Action::Jump(chain) | Action::Goto(chain) => match self.walk_chain(chains, chain, certainty, depth + 1) {
                Step::Return => Step::End,
                other => other,
            },
            Action::Accept | Action::Drop | Action::Return | Action::Continue => Step::End,
        }
    }

    /// Evaluates all conditions of a rule. Returns `None` if one does not hold; otherwise whether
    /// all hold for certain, and whether one of them names the bridge or the guests' subnet.
    fn match_all(&self, conditions: &[Condition]) -> Option<(Match, bool)> {
        let (mut all, mut named) = (Match::Yes, false);
        for condition in conditions {
            match self.evaluate(condition) {
                Match::No => return None,
                Match::Perhaps => {
                    all = Match::Perhaps;
                    named |= self.names_uplink(condition);
                }
                Match::Yes => named |= self.names_guests(condition),
            }
        }
        Some((all, named))
    }

    fn names_guests(&self, condition: &Condition) -> bool {
        let everywhere = |ranges: &[Addresses]| ranges.iter().any(|range| range.start().is_unspecified());
        match condition {
            Condition::InInterface(names) | Condition::OutInterface(names) => {
                names.iter().any(|name| name == self.bridge)
            }
            Condition::Source(ranges) | Condition::Destination(ranges) => !everywhere(ranges),
            _ => false,
        }
    }

    fn names_uplink(&self, condition: &Condition) -> bool {
        match condition {
            Condition::InInterface(names) | Condition::OutInterface(names) => {
                let matches = |uplink: &String| names.iter().any(|name| interface_matches(name, uplink));
                self.uplinks.iter().any(matches)
            }
            _ => false,
        }
    }

    fn evaluate(&self, condition: &Condition) -> Match {
        match condition {
            Condition::InInterface(names) => self.match_interface(self.from_bridge, names),
            Condition::OutInterface(names) => self.match_interface(self.to_bridge, names),
            Condition::State(words) => {
                let state = if self.established { "established" } else { "new" };
                Match::of(words.iter().any(|word| word == state))
            }
            Condition::DestinationTranslated => Match::of(self.destination_translated),
            Condition::Source(ranges) => match_addresses(self.source.as_ref(), ranges),
            Condition::Destination(ranges) => match_addresses(self.destination.as_ref(), ranges),
            Condition::DestinationPort(ports) => match self.destination_port {
                None => Match::Perhaps,
                Some(port) => Match::of(ports.iter().any(|range| range.contains(&port))),
            },
            Condition::Not(condition) => match self.evaluate(condition) {
                Match::Yes => Match::No,
                Match::No => Match::Yes,
                Match::Perhaps => Match::Perhaps,
            },
            Condition::Never => Match::No,
            Condition::Unknown => Match::Perhaps,
        }
    }

    fn match_interface(&self, is_bridge: bool, names: &[String]) -> Match {
        let pattern_matches = names.iter().any(|name| interface_matches(name, self.bridge));
        match (is_bridge, pattern_matches) {
            (true, _) => Match::of(pattern_matches),
            // The packet uses another interface, which one is unknown. A rule for all interfaces
            // matches; one for the loopback does not.
            (false, _) if names.iter().any(|name| matches!(name.as_str(), "*" | "+")) => Match::Yes,
            (false, _) if names.iter().all(|name| name == "lo" || name == self.bridge) => Match::No,
            (false, _) => Match::Perhaps,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Verdict(Verdict),
    Return,
    /// The packet reached the end of the chain.
    End,
}

/// Matches an interface pattern: `br-*` in nftables, `br-+` in iptables.
fn interface_matches(pattern: &str, name: &str) -> bool {
    match pattern.strip_suffix(['*', '+']) {
        Some(prefix) => name.starts_with(prefix),
        None => pattern == name,
    }
}

fn match_addresses(packet: Option<&Addresses>, ranges: &[Addresses]) -> Match {
    let everything = |range: &Addresses| range.start().is_unspecified() && range.end().is_broadcast();
    if ranges.iter().any(everything) {
        return Match::Yes;
    }
    let Some(packet) = packet else { return Match::Perhaps };
    if ranges
        .iter()
        .any(|range| range.contains(packet.start()) && range.contains(packet.end()))
    {
        return Match::Yes;
    }
    let touches = |range: &Addresses| range.start() <= packet.end() && packet.start() <= range.end();
    if ranges.iter().any(touches) {
        Match::Perhaps
    } else {
        Match::No
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn from_guest() -> Packet<'static> {
        Packet {
            bridge: "br0",
            uplinks: &[],
            from_bridge: true,
            to_bridge: false,
            established: false,
            destination_translated: false,
            source: Some(all_of("10.1.0.0/16".parse().expect("a network"))),
            destination: None,
            destination_port: None,
        }
    }

    fn rule(conditions: &[Condition], action: Action) -> Rule {
        Rule {
            conditions: conditions.to_vec(),
            action,
        }
    }

    fn verdict(rules: &[Rule]) -> Option<Verdict> {
        let chains = HashMap::from([
            ("c".to_owned(), rules.to_vec()),
            ("all".to_owned(), vec![rule(&[], Action::Accept)]),
            (
                "back".to_owned(),
                vec![rule(&[], Action::Return), rule(&[], Action::Drop)],
            ),
            ("round".to_owned(), vec![rule(&[], Action::Jump("round".to_owned()))]),
        ]);
        from_guest().walk(&chains, "c")
    }

    #[test]
    fn only_certain_matches_drop_but_rules_that_name_guests_may_accept() {
        let interface = |name: &str| Condition::InInterface(vec![name.to_owned()]);
        let network = |text: &str| Condition::Source(vec![all_of(text.parse().expect("a network"))]);
        let jump = |chain: &str| Action::Jump(chain.to_owned());
        for (conditions, action, expected) in [
            (&[][..], Action::Drop, Some(Verdict::Drop)),
            (&[Condition::Unknown], Action::Drop, None),
            (&[Condition::Unknown], Action::Accept, None),
            (
                &[interface("br0"), Condition::Unknown],
                Action::Accept,
                Some(Verdict::Accept),
            ),
            (&[interface("br*")], Action::Accept, Some(Verdict::Accept)),
            (&[interface("eth0")], Action::Accept, None),
            (
                &[Condition::Not(Box::new(interface("eth0")))],
                Action::Drop,
                Some(Verdict::Drop),
            ),
            (&[network("10.0.0.0/8")], Action::Accept, Some(Verdict::Accept)),
            (&[network("10.1.4.0/24")], Action::Drop, None),
            (&[network("192.168.0.0/16")], Action::Drop, None),
            (&[network("0.0.0.0/0"), Condition::Unknown], Action::Accept, None),
            (
                &[Condition::State(vec!["established".to_owned()])],
                Action::Accept,
                None,
            ),
            (&[], jump("all"), Some(Verdict::Accept)),
            (&[Condition::Unknown], jump("all"), None),
            (
                &[interface("br0")],
                Action::Goto("all".to_owned()),
                Some(Verdict::Accept),
            ),
            (&[], jump("back"), None),
            (&[], jump("round"), None),
            (&[Condition::Never], Action::Drop, None),
        ] {
            assert_eq!(
                verdict(&[rule(conditions, action.clone())]),
                expected,
                "{conditions:?} {action:?}"
            );
        }
        let rules = [rule(&[], Action::Goto("back".to_owned())), rule(&[], Action::Drop)];
        assert_eq!(verdict(&rules), None, "goto does not return");
    }
}
