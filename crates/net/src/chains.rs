//! A firewall's chains, as far as they decide what becomes of a guest's packets; and the walk of a
//! packet through them.
//!
//! Not every condition of a rule can be answered for a packet that was never sent: a port, a mark,
//! a rate. Such a rule *may* match. A rule that may match and names the bridge or the guests'
//! subnet was written by somebody who thought of them: its `accept` counts. So does one for all
//! that comes or goes by a card of the host. Any other that may match counts for nothing: it is
//! about some packets, and the question is what becomes of the rest.

use ipnet::Ipv4Net;
use std::collections::HashMap;
use std::net::Ipv4Addr;
use std::ops::RangeInclusive;

/// How deep chains may call one another before the walk gives up: more than the kernel's own limit
/// of 16.
const MAX_DEPTH: usize = 32;

/// The chains of one table, by name.
pub(crate) type Chains = HashMap<String, Vec<Rule>>;

/// One rule: what it does with packets for which all conditions hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Rule {
    pub(crate) conditions: Vec<Condition>,
    pub(crate) action: Action,
}

/// What a rule does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Action {
    Accept,
    /// Drops, or rejects with an answer.
    Drop,
    Return,
    Jump(String),
    Goto(String),
    /// Counts, logs, marks.
    Continue,
}

/// What a rule asks of a packet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Condition {
    InInterface(Vec<String>),
    OutInterface(Vec<String>),
    /// Words of `ct state`.
    State(Vec<String>),
    /// Its destination was translated.
    DestinationTranslated,
    Source(Vec<Addresses>),
    Destination(Vec<Addresses>),
    DestinationPort(Vec<RangeInclusive<u16>>),
    Not(Box<Condition>),
    /// Only for packets of IPv6, or others that no guest sends.
    Never,
    /// Anything else.
    Unknown,
}

/// Addresses from the first to the last.
pub(crate) type Addresses = RangeInclusive<Ipv4Addr>;

/// All addresses of a network.
pub(crate) fn all_of(network: Ipv4Net) -> Addresses {
    network.network()..=network.broadcast()
}

/// A packet, as far as it is known.
#[derive(Debug, Clone)]
pub(crate) struct Packet<'a> {
    pub(crate) bridge: &'a str,
    /// The host's cards, one of which leads to the network.
    pub(crate) uplinks: &'a [String],
    /// Comes from the bridge; else it goes there, or the host itself is its destination.
    pub(crate) from_bridge: bool,
    pub(crate) to_bridge: bool,
    /// Belongs to a connection that is there; else it begins one.
    pub(crate) established: bool,
    pub(crate) destination_translated: bool,
    /// `None`: any address there is.
    pub(crate) source: Option<Addresses>,
    pub(crate) destination: Option<Addresses>,
    pub(crate) destination_port: Option<u16>,
}

/// Whether something holds for a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fit {
    Yes,
    No,
    Perhaps,
}

impl Fit {
    fn of(holds: bool) -> Fit {
        if holds { Fit::Yes } else { Fit::No }
    }
}

/// What becomes of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    Accept,
    Drop,
}

/// How far a rule, and those that led to it, are known to match.
#[derive(Debug, Clone, Copy)]
struct Path {
    certain: bool,
    named: bool,
}

impl Packet<'_> {
    /// What the chain `name` does with the packet; `None` when it comes to the chain's end.
    pub(crate) fn walk(&self, chains: &Chains, name: &str) -> Option<Verdict> {
        let begin = Path {
            certain: true,
            named: false,
        };
        match self.walk_chain(chains, name, begin, 0) {
            Step::Verdict(verdict) => Some(verdict),
            Step::End | Step::Return => None,
        }
    }

    fn walk_chain(&self, chains: &Chains, name: &str, path: Path, depth: usize) -> Step {
        let rules = chains.get(name).filter(|_| depth < MAX_DEPTH);
        let mut comes_here = path.certain;
        for rule in rules.into_iter().flatten() {
            let Some((fit, named)) = self.fit_all(&rule.conditions) else {
                continue;
            };
            let path = Path {
                certain: comes_here && fit == Fit::Yes,
                named: path.named || named,
            };
            // What may have gone back does not come to the rules behind for sure.
            comes_here &= fit == Fit::Yes || rule.action != Action::Return;
            match (self.act(chains, &rule.action, path, depth), &rule.action) {
                (Step::Verdict(verdict), _) => return Step::Verdict(verdict),
                (Step::Return, _) => return Step::Return,
                // What is sent to another chain for good does not come back here.
                (Step::End, Action::Goto(_)) if path.certain => return Step::End,
                (Step::End, _) => {}
            }
        }
        Step::End
    }

    fn act(&self, chains: &Chains, action: &Action, path: Path, depth: usize) -> Step {
        match action {
            // Replies are accepted by every firewall in use; what a rule about them asks is not
            // worth a doubt.
            Action::Accept if path.certain || path.named || self.established => Step::Verdict(Verdict::Accept),
            Action::Drop if path.certain => Step::Verdict(Verdict::Drop),
            Action::Return if path.certain => Step::Return,
            Action::Jump(chain) | Action::Goto(chain) => match self.walk_chain(chains, chain, path, depth + 1) {
                Step::Return => Step::End,
                other => other,
            },
            Action::Accept | Action::Drop | Action::Return | Action::Continue => Step::End,
        }
    }

    /// `None` when a condition does not hold; else whether all do, and whether one of them names
    /// the bridge or the guests' subnet.
    fn fit_all(&self, conditions: &[Condition]) -> Option<(Fit, bool)> {
        let (mut all, mut named) = (Fit::Yes, false);
        for condition in conditions {
            match self.fit(condition) {
                Fit::No => return None,
                Fit::Perhaps => {
                    all = Fit::Perhaps;
                    named |= self.is_by_uplink(condition);
                }
                Fit::Yes => named |= self.is_named_by(condition),
            }
        }
        Some((all, named))
    }

    fn is_named_by(&self, condition: &Condition) -> bool {
        let everywhere = |ranges: &[Addresses]| ranges.iter().any(|range| range.start().is_unspecified());
        match condition {
            Condition::InInterface(names) | Condition::OutInterface(names) => {
                names.iter().any(|name| name == self.bridge)
            }
            Condition::Source(ranges) | Condition::Destination(ranges) => !everywhere(ranges),
            _ => false,
        }
    }

    fn is_by_uplink(&self, condition: &Condition) -> bool {
        match condition {
            Condition::InInterface(names) | Condition::OutInterface(names) => {
                let means = |uplink: &String| names.iter().any(|name| matches_interface(name, uplink));
                self.uplinks.iter().any(means)
            }
            _ => false,
        }
    }

    fn fit(&self, condition: &Condition) -> Fit {
        match condition {
            Condition::InInterface(names) => self.fit_interface(self.from_bridge, names),
            Condition::OutInterface(names) => self.fit_interface(self.to_bridge, names),
            Condition::State(words) => {
                let state = if self.established { "established" } else { "new" };
                Fit::of(words.iter().any(|word| word == state))
            }
            Condition::DestinationTranslated => Fit::of(self.destination_translated),
            Condition::Source(ranges) => fit_addresses(self.source.as_ref(), ranges),
            Condition::Destination(ranges) => fit_addresses(self.destination.as_ref(), ranges),
            Condition::DestinationPort(ports) => match self.destination_port {
                None => Fit::Perhaps,
                Some(port) => Fit::of(ports.iter().any(|range| range.contains(&port))),
            },
            Condition::Not(condition) => match self.fit(condition) {
                Fit::Yes => Fit::No,
                Fit::No => Fit::Yes,
                Fit::Perhaps => Fit::Perhaps,
            },
            Condition::Never => Fit::No,
            Condition::Unknown => Fit::Perhaps,
        }
    }

    fn fit_interface(&self, is_bridge: bool, names: &[String]) -> Fit {
        let means_bridge = names.iter().any(|name| matches_interface(name, self.bridge));
        match (is_bridge, means_bridge) {
            (true, _) => Fit::of(means_bridge),
            // Another interface, and which is not known. A rule for all of them holds; one for the
            // loopback does not.
            (false, _) if names.iter().any(|name| matches!(name.as_str(), "*" | "+")) => Fit::Yes,
            (false, _) if names.iter().all(|name| name == "lo" || name == self.bridge) => Fit::No,
            (false, _) => Fit::Perhaps,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Verdict(Verdict),
    Return,
    /// The next rule.
    End,
}

/// nftables writes `br-*`, iptables `br-+`.
fn matches_interface(pattern: &str, name: &str) -> bool {
    match pattern.strip_suffix(['*', '+']) {
        Some(prefix) => name.starts_with(prefix),
        None => pattern == name,
    }
}

fn fit_addresses(packet: Option<&Addresses>, ranges: &[Addresses]) -> Fit {
    let everything = |range: &Addresses| range.start().is_unspecified() && range.end().is_broadcast();
    if ranges.iter().any(everything) {
        return Fit::Yes;
    }
    let Some(packet) = packet else { return Fit::Perhaps };
    if ranges
        .iter()
        .any(|range| range.contains(packet.start()) && range.contains(packet.end()))
    {
        return Fit::Yes;
    }
    let touches = |range: &Addresses| range.start() <= packet.end() && packet.start() <= range.end();
    if ranges.iter().any(touches) {
        Fit::Perhaps
    } else {
        Fit::No
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
    fn only_rules_that_surely_match_drop_and_those_that_name_the_guests_may_accept() {
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
        let gone = [rule(&[], Action::Goto("back".to_owned())), rule(&[], Action::Drop)];
        assert_eq!(verdict(&gone), None, "what goes to another chain does not come back");
    }
}
