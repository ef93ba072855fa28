//! `scaleboxd doctor`: what it says of a host that is well, and of ones that are not.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test stops where it cannot go on")]

mod support;

use serde_json::Value;
use std::fs;
use std::net::TcpListener;
use support::{Host, Options, run, said, text};

/// The findings with `settings` over those of the host, after a look that the exit code fits them
/// and each of them has its four fields.
fn examine(host: &Host, settings: &[(&str, &str)]) -> Vec<Value> {
    let mut command = host.scaleboxd(&["doctor", "--json"]);
    let output = command.envs(settings.iter().copied()).output().unwrap();
    let findings: Vec<Value> =
        serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {}", said(&output)));
    for finding in &findings {
        assert_eq!(finding.as_object().unwrap().len(), 4, "{finding}");
        assert!(
            finding["check"].is_string() && finding["finding"].is_string(),
            "{finding}"
        );
        assert_eq!(finding["fix"].is_null(), finding["level"] == "ok", "{finding}");
    }
    let expected = i32::from(findings.iter().any(|finding| finding["level"] == "problem"));
    assert_eq!(output.status.code(), Some(expected), "{}", said(&output));
    findings
}

/// Problems but those of the firewall that the machine of the tests may have.
fn problems(findings: &[Value]) -> Vec<&Value> {
    let ours = |finding: &&Value| finding["level"] == "problem" && finding["check"] != "firewall";
    findings.iter().filter(ours).collect()
}

/// The one problem there is, as check, finding and fix.
fn the_problem(host: &Host, settings: &[(&str, &str)]) -> (String, String, String) {
    let findings = examine(host, settings);
    let [problem] = problems(&findings)[..] else {
        panic!("not one problem: {findings:#?}");
    };
    let field = |key: &str| problem[key].as_str().unwrap().to_owned();
    (field("check"), field("finding"), field("fix"))
}

fn finding<'a>(findings: &'a [Value], check: &str) -> &'a str {
    let found = findings.iter().find(|finding| finding["check"] == check);
    found.unwrap_or_else(|| panic!("no {check} in {findings:#?}"))["finding"]
        .as_str()
        .unwrap()
}

#[test]
fn a_healthy_host_has_no_problem_with_and_without_its_daemon() {
    let mut host = Host::new(&Options::default());
    let findings = examine(&host, &[]);
    assert_eq!(problems(&findings), Vec::<&Value>::new());
    assert!(finding(&findings, "owner").contains("nobody's"), "{findings:#?}");
    assert!(finding(&findings, "api").contains("no daemon runs"), "{findings:#?}");
    assert!(!host.folder.join("state").exists(), "it makes no state");

    host.import_tiny("tiny");
    host.serve();
    let vm = host.create_stopped("tiny", None);
    let port = host.url.rsplit_once(':').unwrap().1.to_owned();
    let findings = examine(&host, &[("API_PORT", &port)]);
    assert_eq!(problems(&findings), Vec::<&Value>::new());
    assert!(
        finding(&findings, "owner").contains("belongs to the state"),
        "{findings:#?}"
    );
    assert!(finding(&findings, "api").contains("a daemon runs"), "{findings:#?}");
    assert_eq!(host.client().vm(&vm.id).unwrap().id, vm.id);

    assert!(host.terminate().success());
    let table = said(&host.scaleboxd(&["doctor"]).output().unwrap());
    assert!(table.contains("ok       pool") && table.contains("Notes: "), "{table}");
    assert!(table.contains("-> scaleboxd template build debian-base"), "{table}");
    // It left the state to the daemon.
    host.serve();
}

#[test]
fn a_pool_that_is_missing_or_not_mounted_is_named_with_the_command_that_mends_it() {
    let host = Host::new(&Options::default());
    host.scaleboxd_ok(&["down"]);
    let (check, finding, fix) = the_problem(&host, &[]);
    assert_eq!(check, "pool");
    assert!(
        finding.contains("is not mounted at") && fix.starts_with("scaleboxd pool init"),
        "{finding}: {fix}"
    );

    fs::remove_file(host.folder.join("pool.img")).unwrap();
    let (check, finding, fix) = the_problem(&host, &[]);
    assert_eq!((check.as_str(), fix.as_str()), ("pool", "scaleboxd pool init"));
    assert!(finding.contains(text(&host.folder.join("pool"))), "{finding}");
    assert!(!host.folder.join("pool.img").exists(), "it only looks");
}

#[test]
fn the_disks_of_another_state_are_told_before_the_daemon_refuses_them() {
    let mut host = Host::with_tiny_template(&Options::default());
    host.create_stopped("tiny", None);
    assert!(host.terminate().success());
    let other = host.folder.join("other");
    let (check, finding, fix) = the_problem(&host, &[("STATE_DIR", text(&other))]);
    assert_eq!(check, "owner");
    assert!(
        finding.contains("1 disks") && fix.contains("STATE_DIR"),
        "{finding}: {fix}"
    );
    assert_eq!(problems(&examine(&host, &[])), Vec::<&Value>::new());
}

#[test]
fn bad_settings_a_missing_token_and_taken_ports_are_named() {
    let host = Host::new(&Options::default());
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = &taken.local_addr().unwrap().port().to_string();
    for (settings, check, finding, fix) in [
        (
            &[("MAX_DISK_SIZE_GIB", "lots")][..],
            "settings",
            "MAX_DISK_SIZE_GIB=\"lots\"",
            "correct it",
        ),
        (
            &[("LOG_LEVEL", "=/=")],
            "settings",
            "LOG_LEVEL=\"=/=\"",
            "correct LOG_LEVEL",
        ),
        (
            &[("API_TOKEN", "")],
            "token",
            "API_TOKEN is not set",
            "/etc/scaleboxd/config",
        ),
        (&[("API_PORT", port)], "api", port, "API_PORT"),
        (
            &[("PORT_MIN", port), ("PORT_MAX", port)],
            "ports",
            "0 of the 1 ports",
            "PORT_MIN",
        ),
    ] {
        let told = the_problem(&host, settings);
        assert!(
            told.0 == check && told.1.contains(finding) && told.2.contains(fix),
            "{settings:?}: {told:?}"
        );
    }
}

#[test]
fn a_subnet_that_is_in_use_on_the_host_is_named() {
    let mut neighbour = Host::new(&Options::default());
    neighbour.serve();
    let host = Host::new(&Options::default());
    let number = neighbour.bridge.strip_prefix("sbtest").unwrap();
    let (check, finding, fix) = the_problem(&host, &[("SUBNET", &format!("172.31.{number}.0/24"))]);
    assert_eq!(check, "network");
    assert!(
        finding.contains(&neighbour.bridge) && fix.contains("SUBNET"),
        "{finding}: {fix}"
    );
}

#[test]
fn a_pool_that_holds_vms_and_is_not_mounted_is_not_to_be_made_anew() {
    let mut host = Host::with_tiny_template(&Options::default());
    host.create_stopped("tiny", None);
    assert!(host.terminate().success());
    let (pool, image) = (host.folder.join("pool"), host.folder.join("pool.img"));
    run("umount", &[text(&pool)]);
    let (check, finding, fix) = the_problem(&host, &[]);
    assert_eq!(check, "pool");
    assert!(
        finding.contains(&format!("mounts {} there", text(&image))) && finding.contains("the state knows 1 VMs"),
        "{finding}"
    );
    assert!(fix.starts_with(&format!("mount {}", text(&pool))), "{fix}");

    // The disk that it lies on is gone.
    let away = host.folder.join("away.img");
    fs::rename(&image, &away).unwrap();
    let (_, finding, fix) = the_problem(&host, &[]);
    assert!(
        finding.contains("the state knows 1 VMs")
            && fix.contains("bring back the disk")
            && fix.contains("do not make a new pool"),
        "{finding}: {fix}"
    );
    fs::rename(&away, &image).unwrap();
    host.scaleboxd_ok(&["pool", "init"]);
    assert_eq!(problems(&examine(&host, &[])), Vec::<&Value>::new());
}

#[test]
fn a_kernel_that_shows_nothing_of_btrfs_is_distinguished_from_a_pool_that_is_missing() {
    let host = Host::new(&Options::default());
    let daemon = host.scaleboxd(&["doctor", "--json"]);
    let mut command = std::process::Command::new("unshare");
    command
        .args([
            "--mount",
            "sh",
            "-ec",
            "mount -t tmpfs none /sys/fs/btrfs; exec \"$0\" \"$@\"",
        ])
        .arg(daemon.get_program())
        .args(daemon.get_args());
    command.envs(daemon.get_envs().filter_map(|(key, value)| Some((key, value?))));
    let output = command.output().unwrap();
    let findings: Vec<Value> =
        serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {}", said(&output)));
    let [problem] = problems(&findings)[..] else {
        panic!("not one problem: {findings:#?}");
    };
    assert_eq!(problem["check"], "pool");
    assert!(
        problem["finding"]
            .as_str()
            .unwrap()
            .contains("/sys/fs/btrfs has no entry")
            && !problem["fix"].as_str().unwrap().contains("pool init"),
        "{problem}"
    );
}

#[test]
fn an_api_that_listens_beyond_the_host_is_noted() {
    let host = Host::new(&Options::default());
    let findings = examine(&host, &[("API_BIND", "0.0.0.0")]);
    let note = findings
        .iter()
        .find(|finding| finding["check"] == "settings" && finding["level"] == "note");
    let note = note.unwrap_or_else(|| panic!("{findings:#?}"));
    assert!(note["finding"].as_str().unwrap().contains("in the clear"), "{note}");
    assert!(note["fix"].as_str().unwrap().contains("TLS proxy"), "{note}");
}

#[test]
fn other_programs_firewalls_are_named_with_the_command_that_helps() {
    let host = Host::new(&Options::default());
    let bridge = &host.bridge;
    let data = concat!(env!("CARGO_MANIFEST_DIR"), "/../net/tests/data");
    for (rules, found, fix) in [
        (
            format!("nft -f {data}/firewalld.nft"),
            "chain filter_FORWARD of the nftables table inet firewalld",
            format!("firewall-cmd --permanent --zone=trusted --add-interface={bridge}"),
        ),
        (
            format!("iptables-nft-restore {data}/ufw.save"),
            "chain FORWARD of the nftables table ip filter",
            format!("ufw route allow in on {bridge}"),
        ),
        (
            format!("iptables-legacy-restore {data}/docker.save"),
            "chain FORWARD of the iptables-legacy table filter",
            format!("iptables -I DOCKER-USER -i {bridge} -j ACCEPT"),
        ),
        (
            "nft 'table inet filter { chain forward { type filter hook forward priority 0; policy drop; }; }'"
                .to_owned(),
            "chain forward of the nftables table inet filter",
            format!("nft insert rule inet filter forward iifname {bridge} accept"),
        ),
    ] {
        let daemon = host.scaleboxd(&["doctor", "--json"]);
        let mut command = std::process::Command::new("unshare");
        command
            .args([
                "--net",
                "sh",
                "-ec",
                &format!("ip link set lo up; {rules}; exec \"$0\" \"$@\""),
            ])
            .arg(daemon.get_program())
            .args(daemon.get_args());
        command.envs(daemon.get_envs().filter_map(|(key, value)| Some((key, value?))));
        let output = command.output().unwrap();
        let findings: Vec<Value> =
            serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {}", said(&output)));
        let named = findings.iter().any(|finding| {
            finding["check"] == "firewall"
                && finding["level"] == "problem"
                && finding["finding"].as_str().unwrap().contains(found)
                && finding["fix"].as_str().unwrap().contains(&fix)
        });
        assert!(named, "{rules}: {findings:#?}");
    }
}
