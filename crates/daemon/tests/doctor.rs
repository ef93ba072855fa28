//! `scaleboxd doctor`: its findings on healthy hosts and on hosts with problems.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a failed step fails the test")]

mod support;

use serde_json::Value;
use std::fs;
use std::net::TcpListener;
use support::{Host, Options, output_of, run, text};

/// Returns the findings with `settings` over those of the host. Checks that the exit code matches
/// them and that each has its four fields.
fn examine(host: &Host, settings: &[(&str, &str)]) -> Vec<Value> {
    let mut command = host.scaleboxd(&["doctor", "--json"]);
    let output = command.envs(settings.iter().copied()).output().unwrap();
    let findings: Vec<Value> =
        serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {}", output_of(&output)));
    for finding in &findings {
        assert_eq!(finding.as_object().unwrap().len(), 4, "{finding}");
        assert!(
            finding["check"].is_string() && finding["finding"].is_string(),
            "{finding}"
        );
        assert_eq!(finding["fix"].is_null(), finding["level"] == "ok", "{finding}");
    }
    let expected = i32::from(findings.iter().any(|finding| finding["level"] == "problem"));
    assert_eq!(output.status.code(), Some(expected), "{}", output_of(&output));
    findings
}

/// Returns the problems, except those of a firewall on the test machine.
fn problems(findings: &[Value]) -> Vec<&Value> {
    let ours = |finding: &&Value| finding["level"] == "problem" && finding["check"] != "firewall";
    findings.iter().filter(ours).collect()
}

/// Returns check, finding and fix of the only problem.
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
fn a_healthy_host_has_no_problem_with_and_without_a_daemon() {
    let mut host = Host::new(&Options::default());
    let findings = examine(&host, &[]);
    assert_eq!(problems(&findings), Vec::<&Value>::new());
    assert!(finding(&findings, "owner").contains("no owner yet"), "{findings:#?}");
    assert!(
        finding(&findings, "api").contains("no daemon is running"),
        "{findings:#?}"
    );
    assert!(!host.folder.join("state").exists(), "doctor creates no state");

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
    assert!(
        finding(&findings, "api").contains("a daemon is running"),
        "{findings:#?}"
    );
    assert_eq!(host.client().vm(&vm.id).unwrap().id, vm.id);

    assert!(host.terminate().success());
    let table = output_of(&host.scaleboxd(&["doctor"]).output().unwrap());
    assert!(table.contains("ok       pool") && table.contains("Notes: "), "{table}");
    assert!(table.contains("-> scaleboxd template build debian-base"), "{table}");
    // Doctor did not lock the state.
    host.serve();
}

#[test]
fn a_missing_or_unmounted_pool_is_reported_with_the_command_that_fixes_it() {
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
    assert!(!host.folder.join("pool.img").exists(), "doctor changes nothing");
}

#[test]
fn disks_of_another_state_are_reported() {
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
fn invalid_settings_a_missing_token_and_used_ports_are_reported() {
    let host = Host::new(&Options::default());
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = &taken.local_addr().unwrap().port().to_string();
    for (settings, check, finding, fix) in [
        (
            &[("MAX_DISK_SIZE_GIB", "lots")][..],
            "settings",
            "MAX_DISK_SIZE_GIB=\"lots\"",
            "correct the setting",
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
        let problem = the_problem(&host, settings);
        assert!(
            problem.0 == check && problem.1.contains(finding) && problem.2.contains(fix),
            "{settings:?}: {problem:?}"
        );
    }
}

#[test]
fn a_subnet_that_is_in_use_on_the_host_is_reported() {
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
fn doctor_advises_against_a_new_pool_while_the_state_has_vms() {
    let mut host = Host::with_tiny_template(&Options::default());
    host.create_stopped("tiny", None);
    assert!(host.terminate().success());
    let (pool, image) = (host.folder.join("pool"), host.folder.join("pool.img"));
    run("umount", &[text(&pool)]);
    let (check, finding, fix) = the_problem(&host, &[]);
    assert_eq!(check, "pool");
    assert!(
        finding.contains(&format!("mounts {} there", text(&image))) && finding.contains("the state has 1 VMs"),
        "{finding}"
    );
    assert!(fix.starts_with(&format!("mount {}", text(&pool))), "{fix}");

    // The disk under the pool is missing too.
    let away = host.folder.join("away.img");
    fs::rename(&image, &away).unwrap();
    let (_, finding, fix) = the_problem(&host, &[]);
    assert!(
        finding.contains("the state has 1 VMs")
            && fix.contains("restore the disk")
            && fix.contains("do not create a new pool"),
        "{finding}: {fix}"
    );
    fs::rename(&away, &image).unwrap();
    host.scaleboxd_ok(&["pool", "init"]);
    assert_eq!(problems(&examine(&host, &[])), Vec::<&Value>::new());
}

#[test]
fn a_missing_sysfs_is_distinguished_from_a_missing_pool() {
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
        serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {}", output_of(&output)));
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
fn an_exposed_api_is_noted() {
    let host = Host::new(&Options::default());
    let findings = examine(&host, &[("API_BIND", "0.0.0.0")]);
    let note = findings
        .iter()
        .find(|finding| finding["check"] == "settings" && finding["level"] == "note");
    let note = note.unwrap_or_else(|| panic!("{findings:#?}"));
    assert!(note["finding"].as_str().unwrap().contains("unencrypted"), "{note}");
    assert!(note["fix"].as_str().unwrap().contains("TLS proxy"), "{note}");
}

#[test]
fn firewalls_of_other_programs_are_reported_with_the_command_that_fixes_them() {
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
            serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {}", output_of(&output)));
        let named = findings.iter().any(|finding| {
            finding["check"] == "firewall"
                && finding["level"] == "problem"
                && finding["finding"].as_str().unwrap().contains(found)
                && finding["fix"].as_str().unwrap().contains(&fix)
        });
        assert!(named, "{rules}: {findings:#?}");
    }
}
