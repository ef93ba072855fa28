//! Isolation of guests. Each attempt is made from inside a real guest, together with one that must
//! succeed, so that a rejection is meaningful.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed step fails the test"
)]

mod support;

use scalebox_api::Vm;
use std::net::TcpListener;
use support::guest::{Key, wait_for_ssh};
use support::{Host, Options, eventually, run};

/// Makes one attempt from inside `vm` and returns whether it succeeded.
fn gets_through(key: &Key, vm: &Vm, attempt: &str) -> bool {
    let printed = key.run(
        vm,
        &format!("{{ {attempt}; }} >/dev/null 2>&1 && echo through || echo refused"),
    );
    match printed.as_str() {
        "through" => true,
        "refused" => false,
        other => panic!("{attempt}: {other}"),
    }
}

/// Returns a shell command that opens a TCP connection.
fn connect(address: &str, port: u16) -> String {
    format!("timeout 5 bash -c ': < /dev/tcp/{address}/{port}'")
}

/// Returns how many frames the bridge's rules have dropped.
fn dropped_frames(host: &Host) -> u64 {
    let table = run(
        "nft",
        &["list", "table", "bridge", &format!("scalebox_{}", host.bridge)],
    );
    let counters = table.lines().filter_map(|line| line.split_once("counter packets "));
    counters
        .map(|(_, rest)| rest.split(' ').next().unwrap().parse::<u64>().unwrap())
        .sum()
}

#[test]
fn a_guest_reaches_neither_guests_nor_host_nor_api_and_cannot_spoof_its_address() {
    // The worst case: the API and another service listen on all addresses of the host.
    let mut host = Host::new(&Options {
        env: &[("API_BIND", "0.0.0.0")],
        ..Options::default()
    });
    host.import_debian();
    host.serve();
    let service = TcpListener::bind("0.0.0.0:0").unwrap();
    let service_port = service.local_addr().unwrap().port();
    let api_port: u16 = host.url.rsplit(':').next().unwrap().parse().unwrap();
    let key = Key::new(&host, "key");
    let inside = host.client().create_vm(&key.request("inside")).unwrap();
    let other = host.client().create_vm(&key.request("other")).unwrap();
    wait_for_ssh(&inside);
    wait_for_ssh(&other);

    let address = |vm: &Vm| key.run(vm, "hostname -I").split(' ').next().unwrap().to_owned();
    let (own, others) = (address(&inside), address(&other));
    let gateway = key.run(&inside, "ip -4 route show default | cut -d' ' -f3");
    let device = key.run(&inside, "ip -4 route show default | cut -d' ' -f5");
    let host_address = run("hostname", &["-I"]).split(' ').next().unwrap().trim().to_owned();
    // An unused address in the subnet.
    let unused = own.rsplit_once('.').map(|(net, _)| format!("{net}.250")).unwrap();

    let spoofed = |source: &str| {
        format!(
            "sudo ip address add {source}/32 dev {device} && ping -c 2 -W 2 -I {source} {gateway}; \
             printed=$?; sudo ip address del {source}/32 dev {device}; test $printed = 0"
        )
    };
    let attempts = [
        (
            "the gateway's ping, from its own address",
            true,
            format!("ping -c 1 -W 5 {gateway}"),
        ),
        ("its own SSH server", true, connect(&own, 22)),
        ("another guest: ping", false, format!("ping -c 1 -W 3 {others}")),
        ("another guest: its SSH server", false, connect(&others, 22)),
        (
            "another guest, by the forward on the gateway",
            false,
            connect(&gateway, other.ssh_port),
        ),
        (
            "another guest, by the forward on the host",
            false,
            connect(&host_address, other.ssh_port),
        ),
        (
            "a service of the host, on the gateway",
            false,
            connect(&gateway, service_port),
        ),
        (
            "a service of the host, on its own address",
            false,
            connect(&host_address, service_port),
        ),
        (
            "the API, on the gateway",
            false,
            format!("curl -m 5 -s http://{gateway}:{api_port}/health"),
        ),
        (
            "the API, on the host's address",
            false,
            format!("curl -m 5 -s http://{host_address}:{api_port}/health"),
        ),
        ("a spoofed source, unused", false, spoofed(&unused)),
        ("a spoofed source, the other guest's", false, spoofed(&others)),
    ];
    let before = dropped_frames(&host);
    let mut wrong = Vec::new();
    println!("| attempt from inside a guest | outcome |\n|---|---|");
    for (what, expected, attempt) in &attempts {
        let through = gets_through(&key, &inside, attempt);
        println!("| {what} | {} |", if through { "gets through" } else { "refused" });
        if through != *expected {
            wrong.push(*what);
        }
    }
    assert_eq!(wrong, Vec::<&str>::new(), "attempts with the wrong outcome");
    assert!(
        dropped_frames(&host) > before,
        "the spoofed frames were sent, and dropped at the tap"
    );
    assert_eq!(key.run(&other, "hostname"), "other", "the other guest kept its address");

    // Removes our tables, as a restart of a firewall does: they are restored, and the guest is
    // isolated again.
    for family in ["ip", "bridge"] {
        run(
            "nft",
            &["delete", "table", family, &format!("scalebox_{}", host.bridge)],
        );
    }
    eventually("the forward to be restored", || {
        key.ssh(&inside, "true")
            .output()
            .unwrap()
            .status
            .success()
            .then_some(())
    });
    assert!(!gets_through(&key, &inside, &connect(&gateway, service_port)));

    // Another MAC also cuts the guest's own connection, so the guest tries by itself and reports
    // later.
    let mac = key.run(&inside, &format!("cat /sys/class/net/{device}/address"));
    let attempt = format!(
        "ip link set {device} address 02:00:00:00:00:99; ping -c 2 -W 2 {gateway} > /dev/null; echo $? > /run/attempt; \
         ip link set {device} address {mac}; ping -c 2 -W 5 {gateway} > /dev/null; echo $? >> /run/attempt"
    );
    key.run(
        &inside,
        &format!("sudo systemd-run -q --unit attempt sh -c '{attempt}'"),
    );
    let printed = eventually("the attempt with another MAC", || {
        let printed = key.ssh(&inside, "cat /run/attempt").output().unwrap();
        let printed = String::from_utf8_lossy(&printed.stdout).into_owned();
        (printed.lines().count() == 2).then_some(printed)
    });
    assert_eq!(printed, "1\n0\n", "rejected with another MAC, accepted with its own");
    println!("| a spoofed MAC | refused |");

    for vm in [&inside, &other] {
        host.client().delete_vm(&vm.id).unwrap();
    }
    assert_eq!(host.leftovers(), Vec::<String>::new());
}
