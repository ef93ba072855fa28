//! The network from the point of view of clients, guests, and a daemon that restarts after a crash.

// Steps of a test are functions too; a failure in them fails the test.
#![allow(clippy::expect_used, clippy::panic)]

mod common;

use common::{
    EVENT_TIMEOUT, GATEWAY, Guest, HOST, Namespace, OUTSIDE, SILENCE_TIMEOUT, SUBNET, Session, config, endpoint,
    greeting, id, ip, links, nft, on_a_host, open_tap, outside, responds_to_ping, rules, serve, sysctl, unreachable,
};
use scalebox_net::{Endpoint, Error, Mbps, NetConfig, Network, Reconciled, mac_from_ip, port_is_free_on_host};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddrV4, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

const LOOPBACK: Ipv4Addr = Ipv4Addr::LOCALHOST;

async fn network() -> Network {
    Network::ensure(config()).await.expect("a network")
}

#[test]
fn ensure_can_be_repeated() {
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
fn ensure_repairs_an_incomplete_network() {
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
            "rules are restored, elements were kept"
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

/// Sorts the lines: a chain that was created again is at the end of its table.
fn sorted(rules: &str) -> Vec<&str> {
    let mut lines: Vec<&str> = rules.lines().collect();
    lines.sort_unstable();
    lines
}

#[test]
fn foreign_interfaces_are_rejected_and_not_changed() {
    on_a_host(async || {
        ip("link add sbtest0 type bridge");
        let before = (ip("-d link"), rules());
        let error = Network::ensure(config())
            .await
            .err()
            .expect("a foreign bridge")
            .to_string();
        assert!(
            error.contains("sbtest0 exists and is a bridge that Scalebox did not create"),
            "{error}"
        );
        assert_eq!((ip("-d link"), rules()), before);
        ip("link delete sbtest0");
        ip("link add sbtest0 type veth peer name other");
        let error = Network::ensure(config()).await.err().expect("not a bridge").to_string();
        assert!(error.contains("is not a bridge"), "{error}");
    });
}

#[test]
fn a_subnet_in_use_on_the_host_is_rejected() {
    on_a_host(async || {
        ip("link add sbother type bridge");
        for address in ["10.77.0.200/32", "10.0.0.5/8", "10.77.0.3/24"] {
            ip(&format!("addr add {address} dev sbother"));
            let error = Network::ensure(config()).await.err().expect(address).to_string();
            assert!(
                error.contains(&format!("{SUBNET} overlaps with {address} on sbother")),
                "{error}"
            );
            ip("addr flush dev sbother");
        }
        assert_eq!(links(), ["sbother"]);
        assert_eq!(rules(), "");
    });
}

#[test]
fn two_networks_coexist() {
    on_a_host(async || {
        let first = network().await;
        let config =
            NetConfig::new("sbtest1", "10.78.0.0/24".parse().expect("a subnet"), 23001..=23100).expect("valid");
        let second = Network::ensure(config).await.expect("a second network");
        let here = Endpoint::new(&id("vm-00000000000a"), Ipv4Addr::new(10, 77, 0, 10), 22001);
        let there = Endpoint::new(&id("vm-00000000000b"), Ipv4Addr::new(10, 78, 0, 10), 23001);
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
fn a_forward_works_from_loopback_and_from_outside() {
    on_a_host(async || {
        let world = outside();
        let network = network().await;
        network.attach(&endpoint(1)).await.expect("attach");
        network.attach(&endpoint(2)).await.expect("attach");
        let _guests = [Guest::boot(&endpoint(1)), Guest::boot(&endpoint(2))];

        // Configurations that occur on hosts: with and without Docker's br_netfilter, with and
        // without strict reverse path checks.
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
fn a_forward_does_not_affect_other_host_ports() {
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
fn only_the_forward_is_reachable_from_outside() {
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
                "the forward is open"
            );
        });
        assert_eq!(
            greeting(endpoint(1).guest_ip(), 80),
            format!("web to {GATEWAY}"),
            "the host itself can connect"
        );
    });
}

#[test]
fn a_guest_reaches_the_internet_with_the_hosts_address() {
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
fn denied_networks_are_unreachable_except_for_resolvers() {
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

        // The cloud's metadata address is denied whatever the settings.
        let network = Network::ensure(config()).await.expect("a network");
        network.attach(&endpoint(1)).await.expect("attach");
        let guest = Guest::boot(&endpoint(1));
        reached(&guest, LAN, 80);
        not_reached(&guest, METADATA, 80);

        // In a denied network, DNS queries to a resolver are allowed and nothing else; the internet
        // stays reachable.
        let settings = denied(&["192.168.0.0/16", "192.168.7.0/24"]).with_resolvers(&[LAN]);
        Network::ensure(settings).await.expect("a network");
        not_reached(&guest, LAN, 80);
        reached(&guest, LAN, 53);
        reached(&guest, OUTSIDE, 443);
        not_reached(&guest, METADATA, 80);
        not_reached(&guest, METADATA, 53);

        // A cloud's resolver at its metadata address: DNS queries are allowed there, and nothing
        // else.
        Network::ensure(config().with_resolvers(&[METADATA]))
            .await
            .expect("a network");
        reached(&guest, METADATA, 53);
        not_reached(&guest, METADATA, 80);

        // Clients in a denied network can still connect to the guest.
        Network::ensure(denied(&["198.51.100.0/24"])).await.expect("a network");
        not_reached(&guest, OUTSIDE, 443);
        world.run(|| assert!(greeting(HOST, endpoint(1).ssh_port()).starts_with("guest 10.77.0.11")));
    });
}

#[test]
fn a_guest_reaches_only_the_resolver_on_the_host() {
    on_a_host(async || {
        let _world = outside();
        let network = Network::ensure(config().with_resolvers(&[HOST]))
            .await
            .expect("a network");
        network.attach(&endpoint(1)).await.expect("attach");
        let guest = Guest::boot(&endpoint(1));
        let _clients = [53, 80].map(|port| serve(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, port), "host".to_owned()));
        let server = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 53)).expect("listen");
        std::thread::spawn(move || {
            let mut query = [0; 512];
            while let Ok((length, from)) = server.recv_from(&mut query) {
                // The client may have gone.
                let _ignored = server.send_to(&query[..length], from);
            }
        });
        let responds = |to: Ipv4Addr, limit: Duration| {
            let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).expect("a socket");
            socket.set_read_timeout(Some(limit)).expect("a deadline");
            socket.send_to(b"query", (to, 53)).expect("send");
            let mut response = [0; 512];
            socket
                .recv(&mut response)
                .is_ok_and(|length| response[..length] == *b"query")
        };
        assert!(
            responds(HOST, EVENT_TIMEOUT) && responds(GATEWAY, EVENT_TIMEOUT),
            "the host itself"
        );
        guest.inside.run(|| {
            assert_eq!(greeting(HOST, 53), format!("host to {}", endpoint(1).guest_ip()));
            assert!(responds(HOST, EVENT_TIMEOUT));
            unreachable(HOST, 80);
            // The guest reaches port 53 of the resolver's address only, not of the host's other
            // addresses.
            unreachable(GATEWAY, 53);
            assert!(!responds(GATEWAY, SILENCE_TIMEOUT));
            assert!(!responds_to_ping(HOST));
        });
        // Without the setting the port is closed.
        Network::ensure(config()).await.expect("a network");
        guest.inside.run(|| {
            unreachable(HOST, 53);
            assert!(!responds(HOST, SILENCE_TIMEOUT));
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
            "the other guest is up"
        );

        // The other guest sends its replies through the gateway too.
        let accomplice = || {
            guests[1]
                .inside
                .run(|| drop(ip(&format!("route add {}/32 via {GATEWAY}", one.guest_ip()))))
        };
        guests[0].inside.run(|| {
            // The attempts go directly, through the gateway, and through the other guest's forward.
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
        everywhere.recv().expect("the host's own connection");

        guest.inside.run(|| {
            assert!(responds_to_ping(GATEWAY), "pings are the only service of the host");
            assert!(!responds_to_ping(HOST));
            unreachable(GATEWAY, 8080);
            unreachable(HOST, 8080);
            // Simulates a guest whose kernel sends 127/8 to the network.
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
        assert!(
            counted("ip", "127.0.0.0/8"),
            "the packets were really sent: {}",
            rules()
        );
        assert!(everywhere.try_recv().is_err() && on_loopback.try_recv().is_err());
    });
}

/// Returns whether the rule that contains this text has counted a packet.
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
fn spoofed_addresses_and_macs_are_dropped_at_the_tap() {
    on_a_host(async || {
        let world = outside();
        let network = network().await;
        let (own, other) = (endpoint(1), endpoint(2));
        network.attach(&own).await.expect("attach");
        network.attach(&other).await.expect("attach");
        assert!(network.guards_taps(), "this kernel has the bridge family");
        let guest = Guest::boot(&own);
        let internet = world.run(|| serve(SocketAddrV4::new(OUTSIDE, 443), "internet".to_owned()));
        let connect_as = |source: Ipv4Addr| {
            ip(&format!("route replace {OUTSIDE} via {GATEWAY} src {source}"));
            unreachable(OUTSIDE, 443);
        };

        guest.inside.run(|| {
            assert_eq!(greeting(OUTSIDE, 443), format!("internet to {HOST}"));

            // A free address, the other VM's, and one of a foreign network, each with a static ARP
            // entry for the gateway.
            ip("neigh replace 10.77.0.1 lladdr 02:5b:0a:4d:00:01 dev eth0");
            for source in [
                Ipv4Addr::new(10, 77, 0, 99),
                other.guest_ip(),
                Ipv4Addr::new(203, 0, 113, 7),
            ] {
                ip(&format!("addr add {source}/32 dev eth0"));
                connect_as(source);
            }
            // The guest's own address with another MAC, then the other VM's address and MAC.
            ip("link set eth0 address 02:00:00:00:00:07");
            connect_as(own.guest_ip());
            ip(&format!("link set eth0 address {}", other.mac()));
            connect_as(other.guest_ip());
            ip(&format!("link set eth0 address {}", own.mac()));
            connect_as_own(&own);
        });
        assert!(counted("bridge", "@taps"));
        assert_eq!(internet.try_iter().count(), 2, "the two connections without spoofing");
    });
}

fn connect_as_own(own: &Endpoint) {
    ip(&format!("route replace {OUTSIDE} via {GATEWAY} src {}", own.guest_ip()));
    assert_eq!(greeting(OUTSIDE, 443), format!("internet to {HOST}"));
}

#[test]
fn a_guest_cannot_respond_to_arp_for_another() {
    on_a_host(async || {
        let network = network().await;
        let (own, victim) = (endpoint(1), endpoint(2));
        network.attach(&own).await.expect("attach");
        network.attach(&victim).await.expect("attach");
        let thief = Guest::boot(&own);
        // The victim is switched off; the thief takes its address and would respond in its place.
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
fn frame_headers_and_arp_payloads_are_checked() {
    on_a_host(async || {
        let network = network().await;
        let (own, other) = (endpoint(1), endpoint(2));
        network.attach(&own).await.expect("attach");
        network.attach(&other).await.expect("attach");
        let mut tap = open_tap(own.tap());
        let (mac, ip) = (own.mac().octets(), own.guest_ip());
        let tagged = [&[0x81, 0x00, 0x00, 0x07][..], &arp_request(mac, mac, ip)[12..]].concat();
        for (spoofed, frame) in [
            ("the frame's MAC", arp_request(other.mac().octets(), mac, ip)),
            ("the MAC inside", arp_request(mac, other.mac().octets(), ip)),
            ("the address inside", arp_request(mac, mac, other.guest_ip())),
            ("a VLAN", [&arp_request(mac, mac, ip)[..12], &tagged].concat()),
            (
                "all of another VM's",
                arp_request(other.mac().octets(), other.mac().octets(), other.guest_ip()),
            ),
        ] {
            let dropped = dropped_at_taps();
            tap.write_all(&frame).expect("send");
            // The kernel has processed the frame before the write returns.
            assert_eq!(dropped_at_taps(), dropped + 1, "{spoofed}");
        }
        let dropped = dropped_at_taps();
        tap.write_all(&arp_request(mac, mac, ip)).expect("send");
        assert_eq!(dropped_at_taps(), dropped, "nothing is spoofed");
        let mut reply = [0; 64];
        while reply[12..14] != [0x08, 0x06] {
            let length = tap.read(&mut reply).expect("receive");
            assert!(length > 14);
        }
        assert_eq!(
            reply[22..32],
            [&mac_from_ip(GATEWAY).octets()[..], &GATEWAY.octets()].concat()
        );
    });
}

/// Returns a broadcast ARP request for the gateway's address (RFC 826). `outside` is the sender's
/// MAC in the frame, `inside` the one in the payload.
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

/// Returns the number of frames dropped by the per-tap checks.
fn dropped_at_taps() -> u64 {
    let table = nft("list table bridge scalebox_sbtest0");
    let (_, count) = table.split_once("@taps counter packets ").expect("the last rule");
    count
        .split(' ')
        .next()
        .and_then(|count| count.parse().ok())
        .expect("a number")
}

#[test]
fn ipv6_is_dropped_at_the_tap() {
    on_a_host(async || {
        let network = network().await;
        network.attach(&endpoint(1)).await.expect("attach");
        network.attach(&endpoint(2)).await.expect("attach");
        for link in links() {
            assert_eq!(ip(&format!("-6 addr show dev {link}")), "", "{link}");
        }
        let guest = Guest::boot(&endpoint(1));
        // Even if an administrator gives the bridge an IPv6 address.
        sysctl("ipv6/conf/sbtest0/disable_ipv6", "0");
        ip("addr add fd77::1/64 dev sbtest0 nodad");
        let listener = std::net::TcpListener::bind("[fd77::1]:8080").expect("listen");
        let at = listener.local_addr().expect("an address");
        guest.inside.run(|| {
            ip("addr add fd77::2/64 dev eth0 nodad");
            assert!(TcpStream::connect_timeout(&at, SILENCE_TIMEOUT).is_err());
        });
        assert!(counted("bridge", "@taps"));
        nft("delete table bridge scalebox_sbtest0");
        guest.inside.run(|| {
            drop(TcpStream::connect_timeout(&at, EVENT_TIMEOUT).expect("without the table the connection works"))
        });
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

        // The daemon restarts. Besides the VM there are a leftover to remove and a VM to restore.
        let again = network().await;
        again.attach(&endpoint(2)).await.expect("attach");
        let done = again.reconcile(&[endpoint(1), endpoint(3)]).await.expect("reconcile");
        assert!(!done.added.is_empty() && !done.removed.is_empty());
        local.echo("after").expect("the local session continues");
        remote.echo("after").expect("the remote session continues");
        assert_eq!(
            again.reconcile(&[endpoint(1), endpoint(3)]).await.expect("reconcile"),
            Reconciled::default()
        );
        local.echo("at last").expect("the local session continues");
        assert_eq!(
            greeting(LOOPBACK, 22002),
            "guest 10.77.0.11 to 10.77.0.1",
            "a new session can be opened"
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
        // A restart of the distribution's firewall service does the same.
        nft("flush ruleset");
        unreachable(LOOPBACK, 22002);
        first.reconcile(&[endpoint(1)]).await.expect("reconcile");
        assert_eq!(greeting(LOOPBACK, 22002), "guest 10.77.0.11 to 10.77.0.1");
        session.echo("still there").expect("the session continues");
        assert!(first.is_whole().await.expect("check"));
        nft("flush ruleset");
        assert!(!first.is_whole().await.expect("check"));
        first.repair().await.expect("repair");
        assert!(first.is_whole().await.expect("check"));
        unreachable(LOOPBACK, 22002);
        nft("flush ruleset");
        first
            .attach(&endpoint(1))
            .await
            .expect("attach also restores the tables");
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
        assert_eq!(done, Reconciled::default(), "no item of a VM was missing");
        session.echo("still there").expect("the session continues");
        let port = ip("-d link show sb000000000001");
        assert!(
            port.contains("isolated on") && port.contains("master sbtest0"),
            "{port}"
        );
    });
}

#[test]
fn attach_can_be_repeated() {
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
fn a_tap_belongs_to_the_requested_owner() {
    on_a_host(async || {
        let network = network().await;
        network.attach(&endpoint(1).with_owner(65534)).await.expect("attach");
        let tap = ip("-d link show sb000000000001");
        assert!(tap.contains("user nobody") || tap.contains("user 65534"), "{tap}");
    });
}

#[test]
fn failed_attaches_leave_nothing() {
    on_a_host(async || {
        let network = network().await;
        ip("link add sb000000000001 type veth peer name other");
        let before = (links(), rules());
        let error = network
            .attach(&endpoint(1))
            .await
            .expect_err("the name is in use")
            .to_string();
        assert!(error.contains("sb000000000001 exists and is not a tap"), "{error}");
        assert_eq!((links(), rules()), before);
        let error = network
            .detach(&endpoint(1))
            .await
            .expect_err("a foreign interface")
            .to_string();
        assert!(error.contains("is not a tap"), "{error}");
        assert_eq!((links(), rules()), before);
    });
}

#[test]
fn ports_addresses_and_taps_in_use_are_rejected() {
    on_a_host(async || {
        let network = network().await;
        network.attach(&endpoint(1)).await.expect("attach");
        let before = (links(), rules());
        let (free_ip, taken_ip) = (Ipv4Addr::new(10, 77, 0, 50), endpoint(1).guest_ip());
        for (text, ip, port) in [
            ("vm-00000000000f", free_ip, 22002),
            ("vm-00000000000f", taken_ip, 22050),
            ("vm-00000000000f", taken_ip, 22002),
            ("vm-000000000001", free_ip, 22050),
        ] {
            let other = Endpoint::new(&id(text), ip, port);
            let error = network.attach(&other).await.expect_err("in use");
            assert!(matches!(error, Error::Taken { .. }), "{error}");
            let error = network.reconcile(&[endpoint(1), other]).await.expect_err("in use");
            assert!(matches!(error, Error::Taken { .. }), "{error}");
        }
        for reserved in [
            Ipv4Addr::new(10, 77, 0, 0),
            GATEWAY,
            Ipv4Addr::new(10, 77, 0, 255),
            Ipv4Addr::new(10, 78, 0, 5),
        ] {
            let other = Endpoint::new(&id("vm-00000000000f"), reserved, 22050);
            assert!(matches!(
                network.attach(&other).await,
                Err(Error::NotAGuestAddress { .. })
            ));
        }
        assert_eq!((links(), rules()), before);
    });
}

/// Sends bytes to an echo server outside, from the calling thread's namespace. Returns the time
/// until all are back.
fn round_trip(bytes: usize) -> Duration {
    let mut there = TcpStream::connect((OUTSIDE, 443)).expect("connect");
    there.set_read_timeout(Some(EVENT_TIMEOUT)).expect("a deadline");
    let mut back = BufReader::new(there.try_clone().expect("another handle"));
    let mut greeting = String::new();
    back.read_line(&mut greeting).expect("a greeting");
    let start = Instant::now();
    std::thread::scope(|scope| {
        scope.spawn(move || there.write_all(&vec![7; bytes]).expect("send"));
        back.read_exact(&mut vec![0; bytes]).expect("receive");
    });
    start.elapsed()
}

#[test]
fn every_requested_rate_is_applied_and_kept() {
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
fn rates_limit_their_own_guest_and_no_other() {
    on_a_host(async || {
        const MEGABYTE: usize = 1_000_000;
        let world = outside();
        let network = network().await;
        let limited = |megabits| endpoint(1).with_rate(Some(Mbps::new(megabits)));
        network.attach(&limited(8)).await.expect("attach");
        network.attach(&endpoint(2)).await.expect("attach");
        let _clients = world.run(|| serve(SocketAddrV4::new(OUTSIDE, 443), "internet".to_owned()));
        let (slow, fast) = (Guest::boot(&endpoint(1)), Guest::boot(&endpoint(2)));

        // The minimum time is that at 1 MB per second, minus the second's worth that may pass at
        // once.
        let took = slow.inside.run(|| round_trip(4 * MEGABYTE));
        assert!(took > Duration::from_millis(2800), "{took:?}");
        let free = fast.inside.run(|| round_trip(4 * MEGABYTE));
        assert!(free < took, "{free:?} without a rate");

        // The limit also applies to a client on the host itself, through the forward.
        let start = Instant::now();
        let mut session = TcpStream::connect((LOOPBACK, 22002)).expect("connect");
        let mut back = session.try_clone().expect("another handle");
        std::thread::scope(|scope| {
            scope.spawn(move || session.write_all(&vec![7; 3 * MEGABYTE]).expect("send"));
            back.read_exact(&mut vec![0; 3 * MEGABYTE]).expect("receive");
        });
        assert!(start.elapsed() > Duration::from_millis(1800), "{:?}", start.elapsed());

        // The rate can be changed while the guest runs, without affecting other guests, and a
        // reconcile keeps it.
        network.attach(&limited(80)).await.expect("another rate");
        let wanted = [limited(80), endpoint(2)];
        assert_eq!(
            network.reconcile(&wanted).await.expect("reconcile"),
            Reconciled::default()
        );
        let faster = slow.inside.run(|| round_trip(4 * MEGABYTE));
        assert!(faster < took, "{faster:?} at ten times the rate");
        network.attach(&endpoint(1)).await.expect("no rate");
        assert!(
            !rules().contains("bytes/second") && !rules().contains("limit up_"),
            "{}",
            rules()
        );

        // Another rate, left by a crash, is removed with the guest.
        network.attach(&limited(8)).await.expect("attach");
        network.detach(&limited(16)).await.expect("detach");
        assert!(!rules().contains("10.77.0.11"), "{}", rules());
    });
}

#[test]
fn detach_leaves_nothing_behind() {
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
fn sixteen_vms_can_be_attached_concurrently() {
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
fn reconcile_removes_orphaned_items_and_keeps_foreign_ones() {
    on_a_host(async || {
        let crashed = network().await;
        for n in 1..=3 {
            crashed.attach(&endpoint(n)).await.expect("attach");
        }
        drop(crashed);
        // Ours: a forward without a tap, a tap without a forward, a tap whose bridge was deleted.
        nft("add element ip scalebox_sbtest0 forwards { 22099 : 10.77.0.99 }");
        ip("tuntap add sbaaaaaaaaaaaa mode tap");
        ip("link set sbaaaaaaaaaaaa master sbtest0");
        ip("link set sb000000000003 nomaster");
        // Foreign: a port with another name, taps of our form on another bridge or on none, another
        // table.
        ip("tuntap add tap-foreign mode tap");
        ip("link set tap-foreign master sbtest0");
        ip("tuntap add sbbbbbbbbbbbbb mode tap");
        ip("link add sbother type bridge");
        ip("tuntap add sbcccccccccccc mode tap");
        ip("link set sbcccccccccccc master sbother");
        nft("add table ip theirs { chain c { type filter hook forward priority 0; policy accept; }; }");
        let theirs = nft("list table ip theirs");

        // Three endpoints are wanted: 1, which exists; 2, which is partly missing; 4, which was
        // never created.
        ip("link delete sb000000000002");
        let again = network().await;
        let done = again
            .reconcile(&[endpoint(1), endpoint(2), endpoint(4)])
            .await
            .expect("reconcile");
        for orphaned in [
            "sbaaaaaaaaaaaa",
            "sb000000000003",
            "forward 22099 to 10.77.0.99",
            "forward 22004 to 10.77.0.13",
        ] {
            assert!(
                done.removed.iter().any(|removed| removed == orphaned),
                "{orphaned}: {done:?}"
            );
        }
        for restored in ["sb000000000002", "sb000000000004", "forward 22005 to 10.77.0.14"] {
            assert!(done.added.iter().any(|added| added == restored), "{restored}: {done:?}");
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
        assert_eq!(links(), [&left[..], &["sbother", "sbtest0", "tap-foreign"]].concat());
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
fn reconcile_restores_everything_after_a_reboot() {
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
fn teardown_leaves_nothing_behind() {
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
        let error = network.attach(&endpoint(1)).await.expect_err("no bridge");
        assert!(
            matches!(&error, Error::Gone(interface) if interface == "sbtest0"),
            "{error}"
        );
    });
}

#[test]
fn a_port_of_another_program_is_not_free() {
    on_a_host(async || {
        for address in [Ipv4Addr::UNSPECIFIED, LOOPBACK] {
            let listener = std::net::TcpListener::bind((address, 22010)).expect("listen");
            assert!(!port_is_free_on_host(22010).expect("check"), "{address}");
            drop(listener);
            assert!(port_is_free_on_host(22010).expect("check"), "{address}");
        }
        let both = std::net::TcpListener::bind("[::]:22010").expect("listen");
        assert!(
            !port_is_free_on_host(22010).expect("check"),
            "[::] is every IPv4 address too"
        );
        drop(both);
    });
}

#[test]
fn a_tap_survives_its_vmm() {
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
fn a_missing_capability_is_reported() {
    let namespace = Namespace::new();
    let error = namespace.run(|| {
        // Affects only this thread, which ends with the closure.
        let mut capabilities = rustix::thread::capabilities(None).expect("capabilities");
        capabilities.effective.remove(rustix::thread::CapabilitySet::NET_ADMIN);
        capabilities.permitted.remove(rustix::thread::CapabilitySet::NET_ADMIN);
        rustix::thread::set_capabilities(None, capabilities).expect("drop a capability");
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("a runtime");
        runtime.block_on(Network::ensure(config())).err().expect("an error")
    });
    assert!(
        matches!(error, Error::Netlink { .. } | Error::Tap { .. }) && error.to_string().contains("not permitted"),
        "{error}"
    );
}
