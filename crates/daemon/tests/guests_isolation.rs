//! Tests the isolation of guests. Each attempt is made from inside a real guest, next to a similar
//! attempt that must succeed, so that a rejection is meaningful.
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
use support::{Host, Options, eventually, guarantee, run};

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

/// Two booted guests on a host with services. Attempts are made from `inside`.
struct Neighbours {
    host: Host,
    key: Key,
    inside: Vm,
    other: Vm,
    /// The addresses of `inside` and of `other`.
    own: String,
    others: String,
    /// The gateway of `inside`, and the device that leads to it.
    gateway: String,
    device: String,
    host_address: String,
    /// Listens on all addresses of the host.
    _service: TcpListener,
    service_port: u16,
}

#[test]
fn a_guest_reaches_neither_guests_nor_host_nor_api_and_cannot_spoof_its_address() {
    let mut neighbours = Neighbours::boot();
    guarantee(&mut neighbours, Neighbours::only_permitted_attempts_get_through);
    guarantee(&mut neighbours, Neighbours::deleted_tables_are_restored);
    guarantee(&mut neighbours, Neighbours::frames_with_another_mac_are_dropped);
    guarantee(&mut neighbours, Neighbours::deleted_vms_leave_nothing_behind);
}

impl Neighbours {
    /// Boots two guests in the worst case: the API and another service listen on all addresses of
    /// the host.
    fn boot() -> Neighbours {
        let mut host = Host::new(&Options {
            env: &[("API_BIND", "0.0.0.0")],
            ..Options::default()
        });
        host.import_debian();
        host.serve();
        let service = TcpListener::bind("0.0.0.0:0").unwrap();
        let service_port = service.local_addr().unwrap().port();
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
        Neighbours {
            host,
            key,
            inside,
            other,
            own,
            others,
            gateway,
            device,
            host_address,
            _service: service,
            service_port,
        }
    }

    /// Lists all attempts with a title and whether each must succeed.
    fn attempts(&self) -> Vec<(&'static str, bool, String)> {
        let Neighbours {
            own,
            others,
            gateway,
            host_address,
            ..
        } = self;
        let api_port: u16 = self.host.url.rsplit(':').next().unwrap().parse().unwrap();
        // An unused address in the subnet.
        let unused = own.rsplit_once('.').map(|(net, _)| format!("{net}.250")).unwrap();
        vec![
            (
                "the gateway's ping, from its own address",
                true,
                format!("ping -c 1 -W 5 {gateway}"),
            ),
            ("its own SSH server", true, connect(own, 22)),
            ("another guest: ping", false, format!("ping -c 1 -W 3 {others}")),
            ("another guest: its SSH server", false, connect(others, 22)),
            (
                "another guest, by the forward on the gateway",
                false,
                connect(gateway, self.other.ssh_port),
            ),
            (
                "another guest, by the forward on the host",
                false,
                connect(host_address, self.other.ssh_port),
            ),
            (
                "a service of the host, on the gateway",
                false,
                connect(gateway, self.service_port),
            ),
            (
                "a service of the host, on its own address",
                false,
                connect(host_address, self.service_port),
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
            ("a spoofed source, unused", false, self.spoofed(&unused)),
            ("a spoofed source, the other guest's", false, self.spoofed(others)),
        ]
    }

    /// Returns a shell command that pings the gateway from the address `source`.
    fn spoofed(&self, source: &str) -> String {
        let (device, gateway) = (&self.device, &self.gateway);
        format!(
            "sudo ip address add {source}/32 dev {device} && ping -c 2 -W 2 -I {source} {gateway}; \
             printed=$?; sudo ip address del {source}/32 dev {device}; test $printed = 0"
        )
    }

    fn only_permitted_attempts_get_through(&mut self) {
        let attempts = self.attempts();
        let before = dropped_frames(&self.host);
        let mut wrong = Vec::new();
        println!("| attempt from inside a guest | outcome |\n|---|---|");
        for (title, expected, attempt) in &attempts {
            let through = gets_through(&self.key, &self.inside, attempt);
            println!("| {title} | {} |", if through { "gets through" } else { "refused" });
            if through != *expected {
                wrong.push(*title);
            }
        }
        assert_eq!(wrong, Vec::<&str>::new(), "attempts with the wrong outcome");
        assert!(
            dropped_frames(&self.host) > before,
            "the spoofed frames were sent, and dropped at the tap"
        );
        assert_eq!(
            self.key.run(&self.other, "hostname"),
            "other",
            "the other guest kept its address"
        );
    }

    /// Deletes all tables, as a restart of a firewall does. Checks that the guest is isolated again
    /// once they are restored.
    fn deleted_tables_are_restored(&mut self) {
        let Neighbours { host, key, inside, .. } = self;
        for family in ["ip", "bridge"] {
            run(
                "nft",
                &["delete", "table", family, &format!("scalebox_{}", host.bridge)],
            );
        }
        eventually("the forward to be restored", || {
            key.ssh(inside, "true").output().unwrap().status.success().then_some(())
        });
        assert!(!gets_through(key, inside, &connect(&self.gateway, self.service_port)));
    }

    /// Lets the guest send with another MAC. That also cuts its own connection, so it tries by
    /// itself and reports later.
    fn frames_with_another_mac_are_dropped(&mut self) {
        let Neighbours {
            key,
            inside,
            gateway,
            device,
            ..
        } = self;
        let mac = key.run(inside, &format!("cat /sys/class/net/{device}/address"));
        let attempt = format!(
            "ip link set {device} address 02:00:00:00:00:99; ping -c 2 -W 2 {gateway} > /dev/null; echo $? > /run/attempt; \
             ip link set {device} address {mac}; ping -c 2 -W 5 {gateway} > /dev/null; echo $? >> /run/attempt"
        );
        key.run(inside, &format!("sudo systemd-run -q --unit attempt sh -c '{attempt}'"));
        let printed = eventually("the attempt with another MAC", || {
            let printed = key.ssh(inside, "cat /run/attempt").output().unwrap();
            let printed = String::from_utf8_lossy(&printed.stdout).into_owned();
            (printed.lines().count() == 2).then_some(printed)
        });
        assert_eq!(printed, "1\n0\n", "rejected with another MAC, accepted with its own");
        println!("| a spoofed MAC | refused |");
    }

    fn deleted_vms_leave_nothing_behind(&mut self) {
        for vm in [&self.inside, &self.other] {
            self.host.client().delete_vm(&vm.id).unwrap();
        }
        assert_eq!(self.host.leftovers(), Vec::<String>::new());
    }
}
