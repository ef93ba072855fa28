//! Hosts with other firewalls: their effect on guests' packets, and the reports about them.
//!
//! The rules in `data/` were created by the firewalls themselves, on a host with one network
//! interface: firewalld 1.3.3 and ufw 0.36.2 of Debian 12, saved while they ran; and Docker's, as
//! it creates them for its first bridge. The tests compare each report with the addresses that a
//! guest can reach, before and after following the advice.

// Steps of a test are functions too; a failure in them fails the test.
#![allow(clippy::expect_used, clippy::panic)]

mod common;

use common::{
    Guest, HOST, Namespace, OUTSIDE, SILENCE_TIMEOUT, Session, config, endpoint, greeting, nft, on_a_host, outside,
    run, serve, unreachable,
};
use scalebox_net::{Dropped, FirewallDrop, Network};
use std::io::Write;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

const DOCKER: &str = include_str!("data/docker.save");
const UFW: &str = include_str!("data/ufw.save");
const FIREWALLD: &str = include_str!("data/firewalld.nft");
/// firewalld after the bridge was added to the zone `trusted`.
const FIREWALLD_TRUSTED: &str = include_str!("data/firewalld-trusted.nft");
/// The rules of Red Hat distributions before firewalld.
const FINAL_REJECT: &str = "*filter
:INPUT ACCEPT [0:0]
:FORWARD ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
-A FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A FORWARD -i lo -j ACCEPT
-A FORWARD -j REJECT --reject-with icmp-host-prohibited
COMMIT
";

/// Runs a program in the calling thread's namespace, with input on stdin.
fn feed(program: &str, arguments: &[&str], input: &str) {
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("{program}: {error}"));
    let mut stdin = child.stdin.take().expect("a pipe");
    stdin.write_all(input.as_bytes()).expect("write");
    drop(stdin);
    assert!(child.wait().expect("wait").success(), "{program} {arguments:?}");
}

fn shell(command: &str) {
    run("sh", &["-c", command]).unwrap_or_else(|error| panic!("{command}: {error}"));
}

/// Loads rules, with our test bridge in place of the bridge they name.
fn nft_file(rules: &str) {
    feed("nft", &["-f", "-"], &rules.replace("scalebox0", "sbtest0"));
}

/// A host with a guest, and a machine outside that runs a server.
struct Bench {
    network: Network,
    guest: Guest,
    world: Namespace,
}

impl Bench {
    async fn new() -> Bench {
        let world = outside();
        let network = Network::ensure(config()).await.expect("a network");
        network.attach(&endpoint(1)).await.expect("attach");
        let guest = Guest::boot(&endpoint(1));
        world.run(|| drop(serve(SocketAddrV4::new(OUTSIDE, 443), "internet".to_owned())));
        let bench = Bench { network, guest, world };
        bench.assert_reachable(true, true);
        bench
    }

    /// Asserts whether the guest reaches the outside, and whether the outside reaches the guest
    /// through its forward.
    #[track_caller]
    fn assert_reachable(&self, sends: bool, receives: bool) {
        self.guest.inside.run(|| match sends {
            true => assert_eq!(greeting(OUTSIDE, 443), format!("internet to {HOST}")),
            false => unreachable(OUTSIDE, 443),
        });
        self.world.run(|| match receives {
            true => assert!(greeting(HOST, endpoint(1).ssh_port()).starts_with("guest 10.77.0.11")),
            false => unreachable(HOST, endpoint(1).ssh_port()),
        });
    }

    async fn drops(&self) -> Vec<FirewallDrop> {
        self.network.firewall_drops().await.expect("check")
    }

    /// Asserts that exactly one chain is reported, with `dropped`, and that the packets really do
    /// not pass.
    #[track_caller]
    fn assert_reported(&self, drops: &[FirewallDrop], dropped: Dropped) -> FirewallDrop {
        let [drop] = drops else {
            panic!("expected one report: {drops:?}")
        };
        assert_eq!(drop.dropped, dropped, "{drop}");
        self.assert_reachable(dropped == Dropped::Received, dropped == Dropped::Sent);
        drop.clone()
    }
}

/// Loads `rules`, checks the report, and follows the advice by `follow`, or by running the reported
/// commands.
fn check_report(rules: impl Fn() + Sync, dropped: Dropped, advice: &str, follow: Option<fn()>) {
    on_a_host(async || {
        let bench = Bench::new().await;
        assert_eq!(bench.drops().await, []);
        rules();
        let drop = bench.assert_reported(&bench.drops().await, dropped);
        assert!(drop.remedy().contains(advice), "{drop}");
        match follow {
            Some(follow) => follow(),
            None => shell(&drop.remedy()),
        }
        bench.assert_reachable(true, true);
        assert_eq!(bench.drops().await, []);
    });
}

#[test]
fn dockers_policy_is_reported_with_its_user_chain() {
    let advice = "iptables -I DOCKER-USER -i sbtest0 -j ACCEPT";
    check_report(|| feed("iptables-nft-restore", &[], DOCKER), Dropped::All, advice, None);
}

#[test]
fn dockers_policy_in_iptables_legacy_is_reported() {
    check_report(
        || feed("iptables-legacy-restore", &[], DOCKER),
        Dropped::All,
        "iptables -I DOCKER-USER -i sbtest0 -j ACCEPT",
        // On hosts where Docker uses iptables-legacy, `iptables` is that variant.
        Some(|| shell("for way in -i -o; do iptables-legacy -I DOCKER-USER $way sbtest0 -j ACCEPT; done")),
    );
}

#[test]
fn ufw_is_reported_with_its_own_command() {
    for restore in ["iptables-nft-restore", "iptables-legacy-restore"] {
        check_report(
            || feed(restore, &[], UFW),
            Dropped::All,
            "ufw route allow in on sbtest0 && ufw route allow out on sbtest0",
            // The rules that these commands create.
            Some(match restore {
                "iptables-nft-restore" => {
                    || shell("for way in -i -o; do iptables-nft -A ufw-user-forward $way sbtest0 -j ACCEPT; done")
                }
                _ => || shell("for way in -i -o; do iptables-legacy -A ufw-user-forward $way sbtest0 -j ACCEPT; done"),
            }),
        );
    }
}

#[test]
fn firewallds_final_reject_is_reported_with_its_own_command() {
    check_report(
        || nft_file(FIREWALLD),
        // firewalld itself accepts forwarded connections whose destination was translated.
        Dropped::Sent,
        "firewall-cmd --permanent --zone=trusted --add-interface=sbtest0",
        Some(|| {
            nft("delete table inet firewalld");
            nft_file(FIREWALLD_TRUSTED);
        }),
    );
}

#[test]
fn a_final_reject_in_iptables_is_reported() {
    let advice = "iptables -I FORWARD -i sbtest0 -j ACCEPT";
    check_report(
        || feed("iptables-nft-restore", &[], FINAL_REJECT),
        Dropped::All,
        advice,
        None,
    );
    let advice = "iptables-legacy -I FORWARD -i sbtest0 -j ACCEPT";
    check_report(
        || feed("iptables-legacy-restore", &[], FINAL_REJECT),
        Dropped::All,
        advice,
        None,
    );
}

#[test]
fn hand_written_nftables_rules_are_reported_by_family_table_and_chain() {
    for (rules, dropped) in [
        (
            "table inet filter { chain forward { type filter hook forward priority 0; policy drop; }; }",
            Dropped::All,
        ),
        (
            "table inet filter { chain forward { type filter hook forward priority 0; policy accept; \
             ct state established,related accept; reject; }; }",
            Dropped::All,
        ),
        (
            "table ip guard { chain passing { type filter hook forward priority -10; policy drop; \
             ct state vmap { established : accept, related : accept, invalid : drop }; \
             iifname \"up0\" accept; tcp dport 443 ip daddr 192.0.2.0/24 accept; }; }",
            Dropped::Sent,
        ),
        (
            "table inet filter { chain forward { type filter hook forward priority 0; policy drop; \
             ct state { established, related } accept; iifname \"sbtest0\" accept; }; }",
            Dropped::Received,
        ),
        (
            "table inet filter { chain late { drop; }; chain forward { type filter hook forward priority 0; policy accept; \
             ct state established accept; iifname \"docker0\" accept; goto late; }; }",
            Dropped::All,
        ),
    ] {
        let words: Vec<&str> = rules.split_whitespace().collect();
        let (family, table) = (words[1], words[2]);
        let chain = if table == "guard" { "passing" } else { "forward" };
        let advice = format!("nft insert rule {family} {table} {chain} iifname sbtest0 accept");
        check_report(|| nft_file(rules), dropped, &advice, None);
    }
}

#[test]
fn firewalls_that_accept_guests_are_not_reported() {
    for rules in [
        // The bridge by name, by pattern, in a set, in a map; the subnet.
        "iifname \"sbtest0\" accept; oifname \"sbtest0\" accept;",
        "ct state established,related accept; iifname \"sb*\" accept; ct status dnat accept;",
        "iifname { \"docker0\", \"sbtest0\" } accept; oifname @bridges accept;",
        "iifname vmap { \"lo\" : accept, \"sbtest0\" : jump fine }; oifname \"sbtest0\" accept;",
        "ip saddr 10.77.0.0/16 accept; ip daddr 10.77.0.0-10.77.0.255 accept;",
        "iifname \"sbtest0\" ct state new,established limit rate 1000/second accept; oifname \"sbtest0\" accept;",
        // These drops concern other packets.
        "iifname \"up0\" ip saddr 203.0.113.0/24 drop; iifname \"docker0\" drop; ip6 daddr ::/0 drop; counter accept; drop;",
        "ip saddr != 10.77.0.0/24 ip daddr != 10.77.0.0/24 drop; accept;",
    ] {
        on_a_host(async || {
            let bench = Bench::new().await;
            let policy = if rules.contains("; accept;") || rules.contains("counter accept") {
                "accept"
            } else {
                "drop"
            };
            nft_file(&format!(
                "table inet theirs {{ set bridges {{ type ifname; elements = {{ \"sbtest0\" }}; }}; chain fine {{ accept; }}; \
                 chain forward {{ type filter hook forward priority 0; policy {policy}; {rules} }}; }}"
            ));
            bench.assert_reachable(true, true);
            assert_eq!(bench.drops().await, [], "{rules}");
        });
    }
}

#[test]
fn firewalls_that_drop_dns_queries_to_the_host_are_reported() {
    let input = "chain input { type filter hook input priority 0; policy drop; \
                 ct state established,related accept; iifname \"lo\" accept; tcp dport 22 accept; };";
    for (rules, advice, follow) in [
        (
            Some(format!("table inet filter {{ {input} }}")),
            "nft insert rule inet filter input iifname sbtest0",
            None,
        ),
        (
            None,
            "ufw allow in on sbtest0 to any port 53",
            Some("iptables-nft -A ufw-user-input -i sbtest0 -p tcp --dport 53 -j ACCEPT"),
        ),
    ] {
        on_a_host(async || {
            let _world = outside();
            let settings = config().with_resolvers(&[HOST, OUTSIDE]);
            let network = Network::ensure(settings).await.expect("a network");
            network.attach(&endpoint(1)).await.expect("attach");
            let guest = Guest::boot(&endpoint(1));
            let _clients = serve(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 53), "host".to_owned());
            let reached = || {
                guest
                    .inside
                    .run(|| Session::open_within(HOST, 53, SILENCE_TIMEOUT).is_ok())
            };
            assert!(reached());
            match &rules {
                Some(rules) => nft_file(rules),
                None => feed("iptables-nft-restore", &[], UFW),
            }
            assert!(!reached());
            let mut drops = network.firewall_drops().await.expect("check");
            drops.retain(|drop| matches!(drop.dropped, Dropped::DnsQueries(_)));
            let [drop] = drops.as_slice() else { panic!("{drops:?}") };
            assert_eq!(drop.dropped, Dropped::DnsQueries(HOST));
            assert!(drop.remedy().starts_with(advice), "{drop}");
            shell(follow.unwrap_or(&drop.remedy()));
            assert!(reached(), "{drop}");
            let drops = network.firewall_drops().await.expect("check");
            assert!(
                drops.iter().all(|drop| !matches!(drop.dropped, Dropped::DnsQueries(_))),
                "{drops:?}"
            );
        });
    }
}

#[test]
fn a_table_that_disappears_during_the_check_is_not_an_error() {
    on_a_host(async || {
        let network = Network::ensure(config()).await.expect("a network");
        let (here, done) = (Namespace::current(), Arc::new(AtomicBool::new(false)));
        // Another program's table appears and disappears.
        let seen = Arc::clone(&done);
        let other = std::thread::spawn(move || {
            here.run(|| {
                while !seen.load(Ordering::Relaxed) {
                    nft("add table inet theirs { chain forward { type filter hook forward priority 0; policy drop; }; }");
                    nft("delete table inet theirs");
                }
            });
        });
        let mut failed = None;
        for _ in 0..100 {
            failed = failed.or(network.firewall_drops().await.err());
        }
        done.store(true, Ordering::Relaxed);
        other.join().expect("the other program");
        assert!(failed.is_none(), "{failed:?}");
    });
}
