//! Parses the chains of iptables-legacy, which nftables does not show, from the output of
//! `iptables-legacy-save`.

use crate::chains::{Action, Addresses, Chains, Condition, Rule, Verdict, all_of};
use ipnet::Ipv4Net;
use std::net::Ipv4Addr;
use std::ops::RangeInclusive;

/// The table `filter`: the policies of its base chains, and all chains.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Table {
    pub(crate) policies: Vec<(String, Verdict)>,
    pub(crate) chains: Chains,
}

impl Table {
    /// Parses the program's output.
    pub(crate) fn read(text: &str) -> Table {
        let mut table = Table::default();
        for line in text.lines() {
            if let Some((chain, rest)) = line.strip_prefix(':').and_then(|line| line.split_once(' ')) {
                table.chains.entry(chain.to_owned()).or_default();
                match rest.split(' ').next() {
                    Some("ACCEPT") => table.policies.push((chain.to_owned(), Verdict::Accept)),
                    Some("DROP") => table.policies.push((chain.to_owned(), Verdict::Drop)),
                    _ => {}
                }
            }
            let words = words(line);
            if let [append, chain, options @ ..] = words.as_slice()
                && append == "-A"
            {
                table.chains.entry(chain.clone()).or_default().push(rule(options));
            }
        }
        table
    }
}

/// Splits a line into words; words with spaces are in double quotes.
fn words(line: &str) -> Vec<String> {
    let (mut words, mut word, mut quoted) = (Vec::new(), None::<String>, false);
    let mut characters = line.chars();
    while let Some(character) = characters.next() {
        match character {
            '"' => {
                quoted = !quoted;
                word.get_or_insert_default();
            }
            '\\' if quoted => word.get_or_insert_default().extend(characters.next()),
            ' ' if !quoted => words.extend(word.take()),
            other => word.get_or_insert_default().push(other),
        }
    }
    words.extend(word);
    words
}

fn rule(options: &[String]) -> Rule {
    let mut rule = Rule {
        conditions: Vec::new(),
        action: Action::Continue,
    };
    let mut options = options.iter().map(String::as_str).peekable();
    let mut negated = false;
    while let Some(option) = options.next() {
        if option == "!" {
            negated = true;
            continue;
        }
        // The values of an option are the words up to the next option.
        let mut values = Vec::new();
        while let Some(value) = options.next_if(|word| !word.starts_with('-') && *word != "!") {
            values.push(value);
        }
        let value = values.first().copied().unwrap_or_default();
        match option {
            "-j" => rule.action = target(value),
            "-g" => rule.action = Action::Goto(value.to_owned()),
            _ => {
                let condition = condition(option, value);
                rule.conditions.extend(match negated {
                    true => condition.map(|condition| Condition::Not(Box::new(condition))),
                    false => condition,
                });
            }
        }
        negated = false;
    }
    rule
}

fn target(name: &str) -> Action {
    match name {
        "ACCEPT" | "NFQUEUE" | "QUEUE" => Action::Accept,
        "DROP" | "REJECT" => Action::Drop,
        "RETURN" => Action::Return,
        // A chain may have a name in capitals, like the kernel's targets. A chain that does not
        // exist has no rules.
        other => Action::Jump(other.to_owned()),
    }
}

/// Returns `None` for an option that is not a condition.
fn condition(option: &str, value: &str) -> Option<Condition> {
    let listed = || value.split(',').map(str::to_lowercase).collect::<Vec<_>>();
    Some(match option {
        "-i" => Condition::InInterface(vec![value.to_owned()]),
        "-o" => Condition::OutInterface(vec![value.to_owned()]),
        "-s" => network(value).map_or(Condition::Unknown, |range| Condition::Source(vec![range])),
        "-d" => network(value).map_or(Condition::Unknown, |range| Condition::Destination(vec![range])),
        "--ctstate" | "--state" => Condition::State(listed()),
        "--ctstatus" if value == "DNAT" => Condition::DestinationTranslated,
        "--dport" | "--dports" => Condition::DestinationPort(listed().iter().filter_map(|text| ports(text)).collect()),
        // `-m NAME` only loads the match of the following options; the rest controls how a packet
        // is rejected or logged.
        "-m" | "--comment" | "--reject-with" | "--log-prefix" | "--log-level" => return None,
        _ => Condition::Unknown,
    })
}

fn network(text: &str) -> Option<Addresses> {
    let network = text.parse::<Ipv4Net>().ok();
    network
        .or_else(|| Some(Ipv4Net::from(text.parse::<Ipv4Addr>().ok()?)))
        .map(all_of)
}

fn ports(text: &str) -> Option<RangeInclusive<u16>> {
    let (first, last) = text.split_once(':').unwrap_or((text, text));
    Some(first.parse().ok()?..=last.parse().ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn policies_and_quoted_words_are_parsed() {
        let table = Table::read(
            "# Generated\n*filter\n:INPUT ACCEPT [0:0]\n:FORWARD DROP [0:0]\n:mine - [0:0]\n\
             -A FORWARD -i br-+ ! -o eth0 -m comment --comment \"a \\\"b\\\" -j DROP\" -j mine\n\
             -A mine -s 10.0.0.0/8 -p tcp -m tcp --dport 53 -j REJECT --reject-with icmp-port-unreachable\nCOMMIT\n",
        );
        assert_eq!(
            table.policies,
            [
                ("INPUT".to_owned(), Verdict::Accept),
                ("FORWARD".to_owned(), Verdict::Drop)
            ]
        );
        assert_eq!(
            table.chains["FORWARD"],
            [Rule {
                conditions: vec![
                    Condition::InInterface(vec!["br-+".to_owned()]),
                    Condition::Not(Box::new(Condition::OutInterface(vec!["eth0".to_owned()]))),
                ],
                action: Action::Jump("mine".to_owned()),
            }]
        );
        let rule = &table.chains["mine"][0];
        assert_eq!((rule.conditions.len(), &rule.action), (3, &Action::Drop));
        assert!(rule.conditions.contains(&Condition::DestinationPort(vec![53..=53])));
    }
}
