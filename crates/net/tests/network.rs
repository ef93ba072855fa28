//! The network as its users meet it: clients, guests, and a daemon that comes back after a crash.

// The steps of a test are functions too, and what fails in them is the test.
#![allow(clippy::expect_used, clippy::panic)]

mod common;

use common::{
    GATEWAY, Guest, HOST, NEVER, Namespace, OUTSIDE, SOON, SUBNET, Session, answers_ping, config, endpoint, greeting,
    ip, links, nft, on_a_host, open_tap, outside, rules, serve, sysctl, unreachable,
};
use scalebox_net::{Endpoint, Error, Mac, Mbps, NetConfig, Network, Reconciled, port_is_free_on_host};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddrV4, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

const LOOPBACK: Ipv4Addr = Ipv4Addr::LOCALHOST;

async fn network() -> Network {
    Network::ensure(config()).await.expect("a network")
}

#[test]
fn ensure_twice_makes_one_bridge() {
    on_a_host(async || {
        network().await;
        let (before, addresses) = (rules(), ip("-o addr show dev sbtest0"));
        network().await;
        assert_eq!(links(), ["sbtest0"]);
        assert_eq!(rules(), before);
        assert_eq!(ip("-o addr show dev sbtest0"), addresses);
        assert!(addresses.contains("10.77.0.1/24"), "{addresses}");
        assert!(!addresses.contains("inet6"), "{addresses}");
        assert!(ip("link show sbtest0").contains("UP"));
        assert_eq!(
            std::fs::read_to_string("/proc/sys/net/ipv4/ip_forward")
                .expect("sysctl")
                .trim(),
            "1"
        );
    });
}

#[test]
fn ensure_repairs_what_is_half_there() {
    on_a_host(async || {
        let first = network().await;
        first.attach(&endpoint(1)).await.expect("attach");
        let whole = rules();
        ip("addr flush dev sbtest0");
        ip("addr add 10.99.0.1/24 dev sbtest0");
        ip("link set sbtest0 down address 02:5b:00:00:00:01");
        nft("flush chain ip scalebox_sbtest0 forward");
        nft("delete chain ip scalebox_sbtest0 input");
        sysctl("ipv4/ip_forward", "0");
        let again = network().await;
        assert_eq!(
            sorted(&rules()),
            sorted(&whole),
            "rules are back, elements were never gone"
        );
        let bridge = ip("addr show sbtest0");
        assert!(bridge.contains("10.77.0.1/24") && !bridge.contains("10.99"), "{bridge}");
        assert!(
            bridge.contains("02:5b:0a:4d:00:01") && bridge.contains(",UP"),
            "{bridge}"
        );
        assert_eq!(
            again.reconcile(&[endpoint(1)]).await.expect("reconcile"),
            Reconciled::default()
        );
    });
}

/// A chain that was made anew stands at the end of its table.
fn sorted(rules: &str) -> Vec<&str> {
    let mut lines: Vec<&str> = rules.lines().collect();
    lines.sort_unstable();
    lines
}

#[test]
fn a_bridge_that_is_not_ours_is_refused_and_left_alone() {
    on_a_host(async || {
        ip("link add sbtest0 type bridge");
        let before = (ip("-d link"), rules());
        let error = Network::ensure(config())
            .await
            .err()
            .expect("somebody else's")
            .to_string();
        assert!(
            error.contains("sbtest0 exists and is somebody else's bridge") && error.contains("Set BRIDGE"),
            "{error}"
        );
        assert_eq!((ip("-d link"), rules()), before);
        ip("link delete sbtest0");
        ip("link add sbtest0 type veth peer name other");
        let error = Network::ensure(config()).await.err().expect("no bridge").to_string();
        assert!(error.contains("is no bridge"), "{error}");
    });
}

#[test]
fn a_subnet_that_the_host_uses_is_refused() {
    on_a_host(async || {
        ip("link add sbother type bridge");
        for address in ["10.77.0.200/32", "10.0.0.5/8", "10.77.0.3/24"] {
            ip(&format!("addr add {address} dev sbother"));
            let error = Network::ensure(config()).await.err().expect(address).to_string();
            assert!(
                error.contains(&format!("{SUBNET} overlaps with {address} on sbother")),
                "{error}"
            );
            assert!(error.contains("set SUBNET"), "{error}");
            ip("addr flush dev sbother");
        }
        assert_eq!(links(), ["sbother"]);
        assert_eq!(rules(), "");
    });
}

#[test]
fn two_networks_live_side_by_side() {
    on_a_host(async || {
        let first = network().await;
        let config =
            NetConfig::new("sbtest1", "10.78.0.0/24".parse().expect("a subnet"), 23001..=23100).expect("valid");
        let second = Network::ensure(config).await.expect("a second network");
        let here = Endpoint::new("vm-00000000000a", Ipv4Addr::new(10, 77, 0, 10), 22001).expect("valid");
        let there = Endpoint::new("vm-00000000000b", Ipv4Addr::new(10, 78, 0, 10), 23001).expect("valid");
        first.attach(&here).await.expect("attach");
        second.attach(&there).await.expect("attach");
        let first_guest = Guest::boot(&here);
        assert_eq!(greeting(LOOPBACK, 22001), "guest 10.77.0.10 to 10.77.0.1");
        first_guest.inside.run(|| unreachable(Ipv4Addr::new(10, 78, 0, 10), 22));
        first.teardown().await.expect("teardown");
        assert_eq!(links(), ["sb00000000000b", "sbtest1"]);
        assert_eq!(
            second.reconcile(&[there]).await.expect("reconcile"),
            Reconciled::default()
        );
    });
}

#[test]
fn a_forward_reaches_the_guest_from_loopback_and_from_outside() {
    on_a_host(async || {
        let world = outside();
        let network = network().await;
        network.attach(&endpoint(1)).await.expect("attach");
        network.attach(&endpoint(2)).await.expect("attach");
        let _guests = [Guest::boot(&endpoint(1)), Guest::boot(&endpoint(2))];

        // As hosts differ: with Docker's br_netfilter or without, with strict checks of the way
        // back or none.
        for (bridged_too, reverse_path) in [("1", "0"), ("0", "1"), ("1", "1")] {
            sysctl("bridge/bridge-nf-call-iptables", bridged_too);
            sysctl("ipv4/conf/all/rp_filter", reverse_path);
            assert_eq!(greeting(LOOPBACK, 22002), "guest 10.77.0.11 to 10.77.0.1");
            assert_eq!(greeting(LOOPBACK, 22003), "guest 10.77.0.12 to 10.77.0.1");
            assert_eq!(greeting(HOST, 22002), format!("guest 10.77.0.11 to {HOST}"));
            assert_eq!(greeting(GATEWAY, 22002), format!("guest 10.77.0.11 to {GATEWAY}"));
            world.run(|| assert_eq!(greeting(HOST, 22003), format!("guest 10.77.0.12 to {OUTSIDE}")));
        }
    });
}

#[test]
fn a_forward_takes_nothing_from_the_hosts_other_ports() {
    on_a_host(async || {
        let world = outside();
        let network = network().await;
        network.attach(&endpoint(1)).await.expect("attach");
        let _clients = serve(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 22050), "host".to_owned());
        assert_eq!(greeting(LOOPBACK, 22050), format!("host to {LOOPBACK}"));
        world.run(|| assert_eq!(greeting(HOST, 22050), format!("host to {OUTSIDE}")));
    });
}

#[test]
fn nothing_else_comes_in_from_outside() {
    on_a_host(async || {
        let world = outside();
        let network = network().await;
        network.attach(&endpoint(1)).await.expect("attach");
        let guest = Guest::boot(&endpoint(1));
        guest
            .inside
            .run(|| drop(serve(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 80), "web".to_owned())));
        world.run(|| {
            ip(&format!("route add {SUBNET} via {HOST}"));
            unreachable(endpoint(1).guest_ip(), 22);
            unreachable(endpoint(1).guest_ip(), 80);
            assert_eq!(
                greeting(HOST, 22002),
                format!("guest 10.77.0.11 to {OUTSIDE}"),
                "the forward, though, is open"
            );
        });
        assert_eq!(
            greeting(endpoint(1).guest_ip(), 80),
            format!("web to {GATEWAY}"),
            "the host itself may"
        );
    });
}

#[test]
fn a_guest_reaches_the_outside_from_the_hosts_address() {
    on_a_host(async || {
        let world = outside();
        let network = network().await;
        network.attach(&endpoint(1)).await.expect("attach");
        let guest = Guest::boot(&endpoint(1));
        let _clients = world.run(|| serve(SocketAddrV4::new(OUTSIDE, 443), "internet".to_owned()));
        guest
            .inside
            .run(|| assert_eq!(greeting(OUTSIDE, 443), format!("internet to {HOST}")));
    });
}

#[test]
fn a_guest_cannot_reach_what_is_denied_but_a_resolver_there() {
    const METADATA: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);
    const LAN: Ipv4Addr = Ipv4Addr::new(192, 168, 7, 7);
    on_a_host(async || {
        let world = outside();
        world.run(|| {
            for address in [METADATA, LAN] {
                ip(&format!("addr add {address}/32 dev eth0"));
            }
        });
        for address in [METADATA, LAN] {
            ip(&format!("route add {address}/32 via {OUTSIDE}"));
        }
        let served = [(OUTSIDE, 443), (METADATA, 80), (METADATA, 53), (LAN, 80), (LAN, 53)];
        let _clients =
            world.run(|| served.map(|(address, port)| serve(SocketAddrV4::new(address, port), "it".to_owned())));
        let denied = |networks: &[&str]| {
            let networks: Vec<_> = networks
                .iter()
                .map(|network| network.parse().expect("a network"))
                .collect();
            config().with_denied(&networks)
        };
        let reached = |guest: &Guest, address, port| {
            guest
                .inside
                .run(|| assert_eq!(greeting(address, port), format!("it to {HOST}")));
        };
        let not_reached = |guest: &Guest, address, port| guest.inside.run(|| unreachable(address, port));

        // Whatever the settings say, not the cloud's credentials.
        let network = Network::ensure(config()).await.expect("a network");
        network.attach(&endpoint(1)).await.expect("attach");
        let guest = Guest::boot(&endpoint(1));
        reached(&guest, LAN, 80);
        not_reached(&guest, METADATA, 80);

        // Of a network that is denied, a resolver's questions are answered and nothing else; the
        // internet is as it was.
        let settings = denied(&["192.168.0.0/16", "192.168.7.0/24"]).with_resolvers(&[LAN]);
        Network::ensure(settings).await.expect("a network");
        not_reached(&guest, LAN, 80);
        reached(&guest, LAN, 53);
        reached(&guest, OUTSIDE, 443);
        not_reached(&guest, METADATA, 80);
        not_reached(&guest, METADATA, 53);

        // A cloud's resolver at the address of its metadata: questions are answered there, and
        // nothing else.
        Network::ensure(config().with_resolvers(&[METADATA]))
            .await
            .expect("a network");
        reached(&guest, METADATA, 53);
        not_reached(&guest, METADATA, 80);

        // Who asks the guest from there is answered.
        Network::ensure(denied(&["198.51.100.0/24"])).await.expect("a network");
        not_reached(&guest, OUTSIDE, 443);
        world.run(|| assert!(greeting(HOST, endpoint(1).ssh_port()).starts_with("guest 10.77.0.11")));
    });
}

#[test]
fn a_guest_asks_a_resolver_that_is_the_host_and_reaches_nothing_else_there() {
    on_a_host(async || {
        let _world = outside();
        let network = Network::ensure(config().with_resolvers(&[HOST]))
            .await
            .expect("a network");
        network.attach(&endpoint(1)).await.expect("attach");
        let guest = Guest::boot(&endpoint(1));
        let _clients = [53, 80].map(|port| serve(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, port), "host".to_owned()));
        let questions = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 53)).expect("listen");
        std::thread::spawn(move || {
            let mut question = [0; 512];
            while let Ok((length, from)) = questions.recv_from(&mut question) {
                // A client that has gone hears nothing.
                let _sent = questions.send_to(&question[..length], from);
            }
        });
        let answered = |to: Ipv4Addr, limit: Duration| {
            let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).expect("a socket");
            socket.set_read_timeout(Some(limit)).expect("a deadline");
            socket.send_to(b"question", (to, 53)).expect("send");
            let mut answer = [0; 512];
            socket
                .recv(&mut answer)
                .is_ok_and(|length| answer[..length] == *b"question")
        };
        assert!(answered(HOST, SOON) && answered(GATEWAY, SOON), "the host itself");
        guest.inside.run(|| {
            assert_eq!(greeting(HOST, 53), format!("host to {}", endpoint(1).guest_ip()));
            assert!(answered(HOST, SOON));
            unreachable(HOST, 80);
            // Of the host's addresses, only the one that is the resolver.
            unreachable(GATEWAY, 53);
            assert!(!answered(GATEWAY, NEVER));
            assert!(!answers_ping(HOST));
        });
        // It is the setting that opens the port.
        Network::ensure(config()).await.expect("a network");
        guest.inside.run(|| {
            unreachable(HOST, 53);
            assert!(!answered(HOST, NEVER));
        });
    });
}

#[test]
fn a_guest_cannot_reach_another_guest() {
    on_a_host(async || {
        let _world = outside();
        let network = network().await;
        let (one, two) = (endpoint(1), endpoint(2));
        network.attach(&one).await.expect("attach");
        network.attach(&two).await.expect("attach");
        let guests = [Guest::boot(&one), Guest::boot(&two)];
        assert_eq!(
            greeting(LOOPBACK, two.ssh_port()),
            "guest 10.77.0.12 to 10.77.0.1",
            "it is there"
        );

        // The other one sends its answers by way of the gateway too.
        let accomplice = || {
            guests[1]
                .inside
                .run(|| drop(ip(&format!("route add {}/32 via {GATEWAY}", one.guest_ip()))))
        };
        guests[0].inside.run(|| {
            // On the wire; then by way of the gateway; then through the other one's forward.
            unreachable(two.guest_ip(), 22);
            let neighbours = ip("neigh show dev eth0");
            assert!(!neighbours.contains(&two.mac().to_string()), "{neighbours}");
            ip(&format!(
                "neigh replace {} lladdr {} dev eth0",
                two.guest_ip(),
                two.mac()
            ));
            unreachable(two.guest_ip(), 22);
            ip(&format!("neigh del {} dev eth0", two.guest_ip()));
            ip(&format!("route add {}/32 via {GATEWAY}", two.guest_ip()));
            accomplice();
            unreachable(two.guest_ip(), 22);
            unreachable(HOST, two.ssh_port());
            unreachable(GATEWAY, two.ssh_port());
        });
    });
}

#[test]
fn a_guest_cannot_reach_a_service_of_the_host() {
    on_a_host(async || {
        let _world = outside();
        let network = network().await;
        network.attach(&endpoint(1)).await.expect("attach");
        let guest = Guest::boot(&endpoint(1));
        let everywhere = serve(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 8080), "api".to_owned());
        let on_loopback = serve(SocketAddrV4::new(LOOPBACK, 8081), "private".to_owned());
        assert_eq!(greeting(GATEWAY, 8080), format!("api to {GATEWAY}"));
        everywhere.recv().expect("that was the host itself");

        guest.inside.run(|| {
            assert!(answers_ping(GATEWAY), "the one thing that the host answers");
            assert!(!answers_ping(HOST));
            unreachable(GATEWAY, 8080);
            unreachable(HOST, 8080);
            // A guest whose kernel sends 127/8 out to the wire.
            sysctl("ipv4/conf/all/route_localnet", "1");
            ip("link set lo down");
            ip("route flush table local dev lo");
            ip(&format!(
                "route add 127.0.0.0/8 via {GATEWAY} dev eth0 src {}",
                endpoint(1).guest_ip()
            ));
            unreachable(LOOPBACK, 8080);
            unreachable(LOOPBACK, 8081);
        });
        assert!(counted("ip", "127.0.0.0/8"), "those were really sent: {}", rules());
        assert!(everywhere.try_recv().is_err() && on_loopback.try_recv().is_err());
    });
}

/// Whether a rule with this text has counted a packet.
fn counted(family: &str, rule: &str) -> bool {
    let table = nft(&format!("list table {family} scalebox_sbtest0"));
    let line = table
        .lines()
        .find(|line| line.contains(rule) && line.contains("counter"));
    !line
        .unwrap_or_else(|| panic!("no rule with {rule}: {table}"))
        .contains("packets 0 ")
}

#[test]
fn a_spoofed_address_or_mac_does_not_leave_the_tap() {
    on_a_host(async || {
        let world = outside();
        let network = network().await;
        let (own, other) = (endpoint(1), endpoint(2));
        network.attach(&own).await.expect("attach");
        network.attach(&other).await.expect("attach");
        assert!(network.guards_taps(), "this kernel has the bridge family");
        let guest = Guest::boot(&own);
        let internet = world.run(|| serve(SocketAddrV4::new(OUTSIDE, 443), "internet".to_owned()));
        let as_address = |source: Ipv4Addr| {
            ip(&format!("route replace {OUTSIDE} via {GATEWAY} src {source}"));
            unreachable(OUTSIDE, 443);
        };

        guest.inside.run(|| {
            assert_eq!(greeting(OUTSIDE, 443), format!("internet to {HOST}"));

            // A free address, the other VM's, one of nobody's net: each with a gateway that needs
            // no question.
            ip("neigh replace 10.77.0.1 lladdr 02:5b:0a:4d:00:01 dev eth0");
            for source in [
                Ipv4Addr::new(10, 77, 0, 99),
                other.guest_ip(),
                Ipv4Addr::new(203, 0, 113, 7),
            ] {
                ip(&format!("addr add {source}/32 dev eth0"));
                as_address(source);
            }
            // The own address with another MAC, then the other VM's address and MAC both.
            ip("link set eth0 address 02:00:00:00:00:07");
            as_address(own.guest_ip());
            ip(&format!("link set eth0 address {}", other.mac()));
            as_address(other.guest_ip());
            ip(&format!("link set eth0 address {}", own.mac()));
            as_own(&own);
        });
        assert!(counted("bridge", "@taps"));
        assert_eq!(
            internet.try_iter().count(),
            2,
            "the honest ones, at the beginning and at the end"
        );
    });
}

fn as_own(own: &Endpoint) {
    ip(&format!("route replace {OUTSIDE} via {GATEWAY} src {}", own.guest_ip()));
    assert_eq!(greeting(OUTSIDE, 443), format!("internet to {HOST}"));
}

#[test]
fn a_guest_cannot_answer_arp_for_another() {
    on_a_host(async || {
        let network = network().await;
        let (own, victim) = (endpoint(1), endpoint(2));
        network.attach(&own).await.expect("attach");
        network.attach(&victim).await.expect("attach");
        let thief = Guest::boot(&own);
        // The victim is switched off; the thief takes its address and would answer for it.
        thief.inside.run(|| {
            ip(&format!("addr add {}/24 dev eth0", victim.guest_ip()));
        });
        unreachable(victim.guest_ip(), 22);
        unreachable(LOOPBACK, victim.ssh_port());
        let neighbours = ip("neigh show dev sbtest0");
        assert!(
            !neighbours.contains(&format!("{} lladdr", victim.guest_ip())),
            "{neighbours}"
        );
        assert!(counted("bridge", "@taps"));
        assert_eq!(greeting(LOOPBACK, own.ssh_port()), "guest 10.77.0.11 to 10.77.0.1");

        nft("delete table bridge scalebox_sbtest0");
        unreachable(victim.guest_ip(), 22);
        let neighbours = ip("neigh show dev sbtest0");
        assert!(
            neighbours.contains(&format!("{} lladdr {}", victim.guest_ip(), own.mac())),
            "{neighbours}"
        );
    });
}

#[test]
fn a_frame_is_checked_outside_and_inside() {
    on_a_host(async || {
        let network = network().await;
        let (own, other) = (endpoint(1), endpoint(2));
        network.attach(&own).await.expect("attach");
        network.attach(&other).await.expect("attach");
        let mut tap = open_tap(own.tap());
        let (mac, ip) = (own.mac().octets(), own.guest_ip());
        let tagged = [&[0x81, 0x00, 0x00, 0x07][..], &arp_request(mac, mac, ip)[12..]].concat();
        for (lie, frame) in [
            ("the frame's MAC", arp_request(other.mac().octets(), mac, ip)),
            ("the MAC inside", arp_request(mac, other.mac().octets(), ip)),
            ("the address inside", arp_request(mac, mac, other.guest_ip())),
            ("a VLAN", [&arp_request(mac, mac, ip)[..12], &tagged].concat()),
            (
                "all of another VM's",
                arp_request(other.mac().octets(), other.mac().octets(), other.guest_ip()),
            ),
        ] {
            let dropped = dropped_at_the_taps();
            tap.write_all(&frame).expect("send");
            // A tap hands its frame on before the write returns.
            assert_eq!(dropped_at_the_taps(), dropped + 1, "{lie}");
        }
        let dropped = dropped_at_the_taps();
        tap.write_all(&arp_request(mac, mac, ip)).expect("send");
        assert_eq!(dropped_at_the_taps(), dropped, "the truth");
        let mut answer = [0; 64];
        while answer[12..14] != [0x08, 0x06] {
            let length = tap.read(&mut answer).expect("receive");
            assert!(length > 14);
        }
        assert_eq!(
            answer[22..32],
            [&Mac::from_ip(GATEWAY).octets()[..], &GATEWAY.octets()].concat()
        );
    });
}

/// A broadcast "who has the gateway's address?" (RFC 826), with the sender's MAC outside and
/// inside.
fn arp_request(outside: [u8; 6], inside: [u8; 6], ip: Ipv4Addr) -> Vec<u8> {
    let ethernet = [&[0xff; 6][..], &outside, &[0x08, 0x06]].concat();
    let ipv4_over_ethernet_request = [0, 1, 0x08, 0, 6, 4, 0, 1];
    [
        &ethernet[..],
        &ipv4_over_ethernet_request,
        &inside,
        &ip.octets(),
        &[0; 6],
        &GATEWAY.octets(),
    ]
    .concat()
}

/// How many frames the guard of the taps has dropped.
fn dropped_at_the_taps() -> u64 {
    let table = nft("list table bridge scalebox_sbtest0");
    let (_, count) = table.split_once("@taps counter packets ").expect("the last rule");
    count
        .split(' ')
        .next()
        .and_then(|count| count.parse().ok())
        .expect("a number")
}

#[test]
fn ipv6_does_not_leave_the_tap() {
    on_a_host(async || {
        let network = network().await;
        network.attach(&endpoint(1)).await.expect("attach");
        network.attach(&endpoint(2)).await.expect("attach");
        for link in links() {
            assert_eq!(ip(&format!("-6 addr show dev {link}")), "", "{link}");
        }
        let guest = Guest::boot(&endpoint(1));
        // Even if somebody gives the bridge an address of IPv6.
        sysctl("ipv6/conf/sbtest0/disable_ipv6", "0");
        ip("addr add fd77::1/64 dev sbtest0 nodad");
        let listener = std::net::TcpListener::bind("[fd77::1]:8080").expect("listen");
        let at = listener.local_addr().expect("an address");
        guest.inside.run(|| {
            ip("addr add fd77::2/64 dev eth0 nodad");
            assert!(TcpStream::connect_timeout(&at, NEVER).is_err());
        });
        assert!(counted("bridge", "@taps"));
        nft("delete table bridge scalebox_sbtest0");
        guest
            .inside
            .run(|| drop(TcpStream::connect_timeout(&at, SOON).expect("it is the guard that dropped it")));
    });
}

#[test]
fn a_session_survives_reconcile() {
    on_a_host(async || {
        let world = outside();
        let first = network().await;
        first.attach(&endpoint(1)).await.expect("attach");
        let _guest = Guest::boot(&endpoint(1));
        let mut local = Session::open(LOOPBACK, 22002).expect("a session");
        let mut remote = world.run(|| Session::open(HOST, 22002)).expect("a session");
        local.echo("before").expect("echo");
        drop(first);

        // The daemon is back; beside the VM there are a leftover to remove and a VM to bring back.
        let again = network().await;
        again.attach(&endpoint(2)).await.expect("attach");
        let done = again.reconcile(&[endpoint(1), endpoint(3)]).await.expect("reconcile");
        assert!(!done.added.is_empty() && !done.removed.is_empty());
        local.echo("after").expect("the local session goes on");
        remote.echo("after").expect("the remote session goes on");
        assert_eq!(
            again.reconcile(&[endpoint(1), endpoint(3)]).await.expect("reconcile"),
            Reconciled::default()
        );
        local.echo("at last").expect("the local session goes on");
        assert_eq!(
            greeting(LOOPBACK, 22002),
            "guest 10.77.0.11 to 10.77.0.1",
            "and a new one comes in"
        );
    });
}

#[test]
fn a_session_survives_a_flushed_ruleset() {
    on_a_host(async || {
        let first = network().await;
        first.attach(&endpoint(1)).await.expect("attach");
        let _guest = Guest::boot(&endpoint(1));
        let mut session = Session::open(LOOPBACK, 22002).expect("a session");
        // What a restart of the distribution's firewall service does.
        nft("flush ruleset");
        unreachable(LOOPBACK, 22002);
        first.reconcile(&[endpoint(1)]).await.expect("reconcile");
        assert_eq!(greeting(LOOPBACK, 22002), "guest 10.77.0.11 to 10.77.0.1");
        session.echo("still there").expect("the session goes on");
        assert!(first.is_whole().await.expect("a look"));
        nft("flush ruleset");
        assert!(!first.is_whole().await.expect("a look"));
        first.repair().await.expect("repair");
        assert!(first.is_whole().await.expect("a look"));
        unreachable(LOOPBACK, 22002);
        nft("flush ruleset");
        first
            .attach(&endpoint(1))
            .await
            .expect("attach alone brings the tables back too");
        assert_eq!(greeting(LOOPBACK, 22002), "guest 10.77.0.11 to 10.77.0.1");
    });
}

#[test]
fn a_session_survives_a_deleted_bridge() {
    on_a_host(async || {
        let network = network().await;
        network.attach(&endpoint(1)).await.expect("attach");
        let _guest = Guest::boot(&endpoint(1));
        let mut session = Session::open(LOOPBACK, 22002).expect("a session");
        ip("link delete sbtest0");
        let done = network.reconcile(&[endpoint(1)]).await.expect("reconcile");
        assert_eq!(done, Reconciled::default(), "no VM's part was missing");
        session.echo("still there").expect("the session goes on");
        let port = ip("-d link show sb000000000001");
        assert!(
            port.contains("isolated on") && port.contains("master sbtest0"),
            "{port}"
        );
    });
}

#[test]
fn attach_twice_is_attach_once() {
    on_a_host(async || {
        let network = network().await;
        network.attach(&endpoint(1)).await.expect("attach");
        let _guest = Guest::boot(&endpoint(1));
        let before = (links(), rules());
        network
            .attach(&endpoint(1))
            .await
            .expect("attach again, with the guest running");
        assert_eq!((links(), rules()), before);
        let port = ip("-d link show sb000000000001");
        assert!(
            port.contains("isolated on") && port.contains("master sbtest0") && port.contains(",UP"),
            "{port}"
        );
        assert!(port.contains("persist on") && port.contains("user root"), "{port}");
    });
}

#[test]
fn a_tap_belongs_to_the_owner_asked_for() {
    on_a_host(async || {
        let network = network().await;
        network.attach(&endpoint(1).with_owner(65534)).await.expect("attach");
        let tap = ip("-d link show sb000000000001");
        assert!(tap.contains("user nobody") || tap.contains("user 65534"), "{tap}");
    });
}

#[test]
fn attach_that_fails_leaves_nothing() {
    on_a_host(async || {
        let network = network().await;
        ip("link add sb000000000001 type veth peer name other");
        let before = (links(), rules());
        let error = network
            .attach(&endpoint(1))
            .await
            .expect_err("the name is taken")
            .to_string();
        assert!(error.contains("sb000000000001 exists and is no tap"), "{error}");
        assert_eq!((links(), rules()), before);
        let error = network
            .detach(&endpoint(1))
            .await
            .expect_err("not ours to delete")
            .to_string();
        assert!(error.contains("is no tap"), "{error}");
        assert_eq!((links(), rules()), before);
    });
}

#[test]
fn a_taken_port_address_or_tap_is_refused() {
    on_a_host(async || {
        let network = network().await;
        network.attach(&endpoint(1)).await.expect("attach");
        let before = (links(), rules());
        let (free_ip, taken_ip) = (Ipv4Addr::new(10, 77, 0, 50), endpoint(1).guest_ip());
        for (key, ip, port) in [
            ("00000000000f", free_ip, 22002),
            ("00000000000f", taken_ip, 22050),
            ("00000000000f", taken_ip, 22002),
            ("000000000001", free_ip, 22050),
        ] {
            let other = Endpoint::new(key, ip, port).expect("valid");
            let error = network.attach(&other).await.expect_err("taken");
            assert!(matches!(error, Error::Taken { .. }), "{error}");
            let error = network.reconcile(&[endpoint(1), other]).await.expect_err("taken");
            assert!(matches!(error, Error::Taken { .. }), "{error}");
        }
        for nobodys in [
            Ipv4Addr::new(10, 77, 0, 0),
            GATEWAY,
            Ipv4Addr::new(10, 77, 0, 255),
            Ipv4Addr::new(10, 78, 0, 5),
        ] {
            let other = Endpoint::new("00000000000f", nobodys, 22050).expect("valid");
            assert!(matches!(
                network.attach(&other).await,
                Err(Error::NotAGuestAddress { .. })
            ));
        }
        assert_eq!((links(), rules()), before);
    });
}

/// Has a server far away repeat so many bytes, from the namespace of the calling thread; how long
/// that takes.
fn there_and_back(bytes: usize) -> Duration {
    let mut there = TcpStream::connect((OUTSIDE, 443)).expect("connect");
    there.set_read_timeout(Some(SOON)).expect("a deadline");
    let mut back = BufReader::new(there.try_clone().expect("another handle"));
    let mut greeting = String::new();
    back.read_line(&mut greeting).expect("a greeting");
    let begun = Instant::now();
    std::thread::scope(|scope| {
        scope.spawn(move || there.write_all(&vec![7; bytes]).expect("send"));
        back.read_exact(&mut vec![0; bytes]).expect("receive");
    });
    begun.elapsed()
}

#[test]
fn every_rate_that_can_be_asked_for_is_attached_and_kept() {
    on_a_host(async || {
        let network = network().await;
        for megabits in [1, 100_000, 147_573, 147_574, 200_000, 1_000_000, u32::MAX] {
            let limited = endpoint(1).with_rate(Some(Mbps::new(megabits)));
            network.attach(&limited).await.expect("attach");
            assert!(rules().contains("bytes/second"), "{megabits}: {}", rules());
            let found = network.reconcile(&[limited]).await.expect("reconcile");
            assert_eq!(found, Reconciled::default(), "{megabits}");
        }
    });
}

#[test]
fn a_guest_sends_and_receives_no_faster_than_its_rate_and_others_as_fast_as_they_can() {
    on_a_host(async || {
        const MEGABYTE: usize = 1_000_000;
        let world = outside();
        let network = network().await;
        let limited = |megabits| endpoint(1).with_rate(Some(Mbps::new(megabits)));
        network.attach(&limited(8)).await.expect("attach");
        network.attach(&endpoint(2)).await.expect("attach");
        let _clients = world.run(|| serve(SocketAddrV4::new(OUTSIDE, 443), "internet".to_owned()));
        let (slow, fast) = (Guest::boot(&endpoint(1)), Guest::boot(&endpoint(2)));

        // At 1 MB a second, less the second's worth that may pass at once.
        let took = slow.inside.run(|| there_and_back(4 * MEGABYTE));
        assert!(took > Duration::from_millis(2800), "{took:?}");
        let free = fast.inside.run(|| there_and_back(4 * MEGABYTE));
        assert!(free < took, "{free:?} without a rate");

        // From the host itself too, by the forward.
        let begun = Instant::now();
        let mut session = TcpStream::connect((LOOPBACK, 22002)).expect("connect");
        let mut back = session.try_clone().expect("another handle");
        std::thread::scope(|scope| {
            scope.spawn(move || session.write_all(&vec![7; 3 * MEGABYTE]).expect("send"));
            back.read_exact(&mut vec![0; 3 * MEGABYTE]).expect("receive");
        });
        assert!(begun.elapsed() > Duration::from_millis(1800), "{:?}", begun.elapsed());

        // A rate is changed while the guest runs, without another attach's doing, and is not undone
        // by a reconcile.
        network.attach(&limited(80)).await.expect("another rate");
        let wanted = [limited(80), endpoint(2)];
        assert_eq!(
            network.reconcile(&wanted).await.expect("reconcile"),
            Reconciled::default()
        );
        let faster = slow.inside.run(|| there_and_back(4 * MEGABYTE));
        assert!(faster < took, "{faster:?} at ten times the rate");
        network.attach(&endpoint(1)).await.expect("no rate");
        assert!(
            !rules().contains("bytes/second") && !rules().contains("limit up_"),
            "{}",
            rules()
        );

        // What a crash left of another rate goes with the guest.
        network.attach(&limited(8)).await.expect("attach");
        network.detach(&limited(16)).await.expect("detach");
        assert!(!rules().contains("10.77.0.11"), "{}", rules());
    });
}

#[test]
fn detach_leaves_nothing() {
    on_a_host(async || {
        let network = network().await;
        network.attach(&endpoint(2)).await.expect("attach");
        let before = (links(), rules());
        network.attach(&endpoint(1)).await.expect("attach");
        assert_ne!((links(), rules()), before);
        let guest = Guest::boot(&endpoint(1));
        assert_eq!(greeting(LOOPBACK, 22002), "guest 10.77.0.11 to 10.77.0.1");
        network
            .detach(&endpoint(1))
            .await
            .expect("detach, with the guest running");
        assert_eq!((links(), rules()), before);
        unreachable(LOOPBACK, 22002);
        drop(guest);
        network.detach(&endpoint(1)).await.expect("nothing to detach");
        assert_eq!((links(), rules()), before);
    });
}

#[test]
fn sixteen_at_once_each_have_their_own() {
    on_a_host(async || {
        let network = network().await;
        let endpoints: Vec<Endpoint> = (0..16).map(endpoint).collect();
        let all = endpoints.iter().map(|endpoint| network.attach(endpoint));
        futures::future::try_join_all(all).await.expect("attach");
        assert_eq!(links().len(), 17);
        assert_eq!(
            network.reconcile(&endpoints).await.expect("reconcile"),
            Reconciled::default()
        );
        let all = endpoints.iter().map(|endpoint| network.detach(endpoint));
        futures::future::try_join_all(all).await.expect("detach");
        assert_eq!(links(), ["sbtest0"]);
    });
}

#[test]
fn reconcile_removes_what_nobody_wants_and_leaves_the_foreign_alone() {
    on_a_host(async || {
        let crashed = network().await;
        for n in 1..=3 {
            crashed.attach(&endpoint(n)).await.expect("attach");
        }
        drop(crashed);
        // Ours: a forward without a tap, a tap without a forward, a tap whose bridge was deleted
        // under it.
        nft("add element ip scalebox_sbtest0 forwards { 22099 : 10.77.0.99 }");
        ip("tuntap add sbaaaaaaaaaaaa mode tap");
        ip("link set sbaaaaaaaaaaaa master sbtest0");
        ip("link set sb000000000003 nomaster");
        // Not ours: a port of another name, taps of our form elsewhere or nowhere, another table.
        ip("tuntap add tap-of-mine mode tap");
        ip("link set tap-of-mine master sbtest0");
        ip("tuntap add sbbbbbbbbbbbbb mode tap");
        ip("link add sbother type bridge");
        ip("tuntap add sbcccccccccccc mode tap");
        ip("link set sbcccccccccccc master sbother");
        nft("add table ip theirs { chain c { type filter hook forward priority 0; policy accept; }; }");
        let theirs = nft("list table ip theirs");

        // Wanted: 1, which is there; 2, with half of it missing; 4, which was never made.
        ip("link delete sb000000000002");
        let again = network().await;
        let done = again
            .reconcile(&[endpoint(1), endpoint(2), endpoint(4)])
            .await
            .expect("reconcile");
        for gone in [
            "sbaaaaaaaaaaaa",
            "sb000000000003",
            "forward 22099 to 10.77.0.99",
            "forward 22004 to 10.77.0.13",
        ] {
            assert!(done.removed.iter().any(|removed| removed == gone), "{gone}: {done:?}");
        }
        for back in ["sb000000000002", "sb000000000004", "forward 22005 to 10.77.0.14"] {
            assert!(done.added.iter().any(|added| added == back), "{back}: {done:?}");
        }
        assert!(
            !format!("{done:?}").contains("10.77.0.11"),
            "the first VM was not touched: {done:?}"
        );
        let left = [
            "sb000000000001",
            "sb000000000002",
            "sb000000000004",
            "sbbbbbbbbbbbbb",
            "sbcccccccccccc",
        ];
        assert_eq!(links(), [&left[..], &["sbother", "sbtest0", "tap-of-mine"]].concat());
        assert_eq!(nft("list table ip theirs"), theirs);
        let _guests = [
            Guest::boot(&endpoint(1)),
            Guest::boot(&endpoint(2)),
            Guest::boot(&endpoint(4)),
        ];
        for n in [1, 2, 4] {
            assert!(greeting(LOOPBACK, endpoint(n).ssh_port()).starts_with("guest"), "{n}");
        }
        assert_eq!(
            again
                .reconcile(&[endpoint(1), endpoint(2), endpoint(4)])
                .await
                .expect("again"),
            Reconciled::default()
        );
    });
}

#[test]
fn reconcile_brings_everything_back_after_a_reboot() {
    on_a_host(async || {
        let network = network().await;
        let done = network.reconcile(&[endpoint(1)]).await.expect("reconcile");
        assert!(
            done.removed.is_empty() && done.added.contains(&"sb000000000001".to_owned()),
            "{done:?}"
        );
        let _guest = Guest::boot(&endpoint(1));
        assert_eq!(greeting(LOOPBACK, 22002), "guest 10.77.0.11 to 10.77.0.1");
    });
}

#[test]
fn teardown_leaves_nothing() {
    on_a_host(async || {
        ip("tuntap add sbbbbbbbbbbbbb mode tap");
        nft("add table ip theirs");
        let before = (links(), rules());
        let network = network().await;
        network.attach(&endpoint(1)).await.expect("attach");
        let _guest = Guest::boot(&endpoint(1));
        network.teardown().await.expect("teardown");
        assert_eq!((links(), rules()), before);
        network.teardown().await.expect("nothing to tear down");
        assert_eq!((links(), rules()), before);
        let error = network.attach(&endpoint(1)).await.expect_err("no bridge").to_string();
        assert!(
            error.contains("sbtest0") && error.contains("restart the daemon"),
            "{error}"
        );
    });
}

#[test]
fn a_port_of_another_program_is_not_free() {
    on_a_host(async || {
        for address in [Ipv4Addr::UNSPECIFIED, LOOPBACK] {
            let listener = std::net::TcpListener::bind((address, 22010)).expect("listen");
            assert!(!port_is_free_on_host(22010).expect("look"), "{address}");
            drop(listener);
            assert!(port_is_free_on_host(22010).expect("look"), "{address}");
        }
        let both = std::net::TcpListener::bind("[::]:22010").expect("listen");
        assert!(
            !port_is_free_on_host(22010).expect("look"),
            "[::] is every IPv4 address too"
        );
        drop(both);
    });
}

#[test]
fn a_vmm_that_is_gone_leaves_its_tap_for_the_next() {
    on_a_host(async || {
        let network = network().await;
        network.attach(&endpoint(1)).await.expect("attach");
        drop(open_tap("sb000000000001"));
        assert_eq!(links(), ["sb000000000001", "sbtest0"]);
        let _guest = Guest::boot(&endpoint(1));
        assert_eq!(greeting(LOOPBACK, 22002), "guest 10.77.0.11 to 10.77.0.1");
    });
}

#[test]
fn a_process_that_may_not_change_the_network_is_told_so() {
    let namespace = Namespace::new();
    let refused = namespace.run(|| {
        // Of this thread alone; it ends with the closure.
        let mut capabilities = rustix::thread::capabilities(None).expect("capabilities");
        capabilities.effective.remove(rustix::thread::CapabilitySet::NET_ADMIN);
        capabilities.permitted.remove(rustix::thread::CapabilitySet::NET_ADMIN);
        rustix::thread::set_capabilities(None, capabilities).expect("drop a capability");
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("a runtime");
        runtime
            .block_on(Network::ensure(config()))
            .err()
            .expect("refused")
            .to_string()
    });
    assert!(
        refused.contains("not permitted") && refused.contains("needs CAP_NET_ADMIN"),
        "{refused}"
    );
}
