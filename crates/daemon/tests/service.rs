//! The daemon as a service: notifications to the service manager, the journal, logins, and restarts
//! of VMs.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed step fails the test"
)]

#[path = "../../vmm/tests/support/guest.rs"]
#[allow(dead_code, reason = "only one of its guests is used")]
mod bare_guest;
mod support;

use bare_guest::Guest;
use scalebox_api::{CreateVm, UpdateVm, Vm, VmStatus};
use std::fs::{self, File};
use std::net::TcpListener;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::time::Duration;
use support::guest::machines;
use support::{Host, Options, TOKEN, eventually, output_of, text};

/// Creates a host whose guests do nothing but respond to the power button.
fn host_with_kernel(options: &Options) -> Host {
    let host = Host::with_tiny_template(options);
    let kernel = host.kernel_folder();
    Guest::Obedient.write_to(&kernel.join("vmlinuz"));
    fs::write(kernel.join("initrd.img"), b"").unwrap();
    host
}

fn create_running(host: &Host) -> Vm {
    let request = CreateVm {
        start: true,
        ..host.stopped("tiny")
    };
    host.client().create_vm(&request).unwrap()
}

fn change_state(host: &Host, sql: &str) {
    let state = rusqlite::Connection::open(host.folder.join("state/state.db")).unwrap();
    state.execute(sql, []).unwrap();
}

fn driver_of(host: &Host, vm: &Vm) -> Option<String> {
    let state = rusqlite::Connection::open(host.folder.join("state/state.db")).unwrap();
    let query = "SELECT vmm FROM vms WHERE id = ?";
    state.query_row(query, [&vm.id], |row| row.get(0)).unwrap()
}

#[test]
fn the_service_manager_is_notified_when_the_daemon_responds() {
    let mut host = Host::new(&Options::default());
    let socket = host.folder.join("notify");
    let manager = UnixDatagram::bind(&socket).unwrap();
    manager.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    host.set("NOTIFY_SOCKET", text(&socket));
    host.serve();
    let mut message = [0; 64];
    let length = manager.recv(&mut message).unwrap();
    assert_eq!(message[..length].trim_ascii(), b"READY=1");
    assert!(host.client().vms().unwrap().is_empty());
}

#[test]
fn an_invalid_configuration_has_its_own_exit_status() {
    let mut host = Host::new(&Options::default());
    let status = |host: &Host| host.scaleboxd(&["serve"]).output().unwrap().status.code();
    host.set("MAX_DISK_SIZE_GIB", "lots");
    assert_eq!(status(&host), Some(78));
    host.set("MAX_DISK_SIZE_GIB", "");
    // A port used by another program may become free, so it is not a wrong configuration.
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    host.set("API_PORT", &taken.local_addr().unwrap().port().to_string());
    assert_eq!(status(&host), Some(1));
}

#[test]
fn journal_lines_have_priorities_and_no_timestamps() {
    let mut host = Host::new(&Options::default());
    File::create(host.log_path()).unwrap();
    let log = fs::metadata(host.log_path()).unwrap();
    host.set("JOURNAL_STREAM", &format!("{}:{}", log.dev(), log.ino()));
    host.serve();
    let refused = ureq_status(&host, "Bearer wrong");
    assert_eq!(refused, 401);
    assert!(host.terminate().success());
    let lines = host.log();
    let with = |text: &str| {
        lines
            .lines()
            .find(|line| line.contains(text))
            .unwrap_or_else(|| panic!("{text}: {lines}"))
    };
    assert!(with(" ready ").starts_with("<6> INFO"), "{lines}");
    assert!(with("failed login").starts_with("<4> WARN"), "{lines}");

    // A daemon that fails to start, as systemd sees it. Other streams get no priority.
    host.set("API_TOKEN", "");
    let failing = host
        .scaleboxd(&["serve"])
        .stderr(File::options().append(true).open(host.log_path()).unwrap())
        .status();
    assert_eq!(failing.unwrap().code(), Some(78));
    assert!(
        host.log().lines().last().unwrap().starts_with("<3>error: API_TOKEN"),
        "{}",
        host.log()
    );
    assert!(output_of(&host.scaleboxd(&["serve"]).output().unwrap()).starts_with("error: API_TOKEN"));
}

/// Returns the status of a request with this header.
fn ureq_status(host: &Host, authorization: &str) -> u16 {
    let request =
        format!("GET /vms HTTP/1.1\r\nHost: x\r\nAuthorization: {authorization}\r\nConnection: close\r\n\r\n");
    host.raw(request.as_bytes()).0
}

#[test]
fn failed_logins_are_logged_with_their_peer_and_rate_limited() {
    let host = Host::new(&Options::default());
    let mut host = host;
    host.serve();
    for _ in 0..40 {
        assert_eq!(ureq_status(&host, "Bearer wrong"), 401);
    }
    assert_eq!(ureq_status(&host, &format!("Bearer {TOKEN}")), 200);
    let log = host.log();
    let failed: Vec<_> = log.lines().filter(|line| line.contains("failed login")).collect();
    assert!(failed[0].contains("peer=127.0.0.1 attempts=1"), "{failed:?}");
    // A slow machine needs more than one interval for the requests.
    assert!(failed.len() < 10, "{failed:?}");
    let is_unexpected = |line: &&str| line.contains("GET") && !line.contains("DEBUG") && !line.contains("failed login");
    assert_eq!(
        log.lines().find(is_unexpected),
        None,
        "requests are logged at DEBUG only"
    );
}

#[test]
fn running_vms_are_started_again_after_down() {
    let mut host = host_with_kernel(&Options::default());
    let (one, other) = (create_running(&host), create_running(&host));
    let stopped = host.create_stopped("tiny", None);
    let no_autostart = UpdateVm {
        autostart: Some(false),
        ..UpdateVm::default()
    };
    host.client().update_vm(&other.id, &no_autostart).unwrap();
    assert!(host.terminate().success());
    host.scaleboxd_ok(&["down"]);
    assert_eq!(machines(&host), Vec::<String>::new());
    // Running it twice makes no difference.
    host.scaleboxd_ok(&["pool", "init"]);
    host.scaleboxd_ok(&["down"]);

    host.scaleboxd_ok(&["pool", "init"]);
    host.serve();
    eventually("the VM that ran", || {
        (host.client().vm(&one.id).unwrap().status == VmStatus::Running).then_some(())
    });
    let other = host.client().vm(&other.id).unwrap();
    assert_eq!(other.status, VmStatus::Stopped);
    assert!(other.status_reason.unwrap().contains("autostart is off"));
    assert_eq!(host.client().vm(&stopped.id).unwrap().status, VmStatus::Stopped);

    // A VM that is stopped afterwards stays stopped.
    host.client().stop_vm(&one.id).unwrap();
    assert!(host.terminate().success());
    host.serve();
    assert_eq!(host.client().vm(&one.id).unwrap().status, VmStatus::Stopped);
}

#[test]
fn a_machine_is_adopted_by_the_driver_that_launched_it() {
    let mut host = host_with_kernel(&Options::default());
    // A Firecracker that was removed since left this folder.
    fs::create_dir(host.folder.join("pool/jails")).unwrap();
    let vm = create_running(&host);
    assert_eq!(driver_of(&host, &vm).as_deref(), Some("qemu"));
    let before = machines(&host);
    // The records are those of an earlier release, and of a crash during a change.
    for recorded in ["NULL", "'firecracker'"] {
        host.crash();
        change_state(&host, &format!("UPDATE vms SET vmm = {recorded}"));
        host.serve();
        assert_eq!(
            host.client().vm(&vm.id).unwrap().status,
            VmStatus::Running,
            "{recorded}"
        );
        assert_eq!(machines(&host), before, "{recorded}");
    }
    assert!(doctor(&host).contains("1 VMs use firecracker, new VMs use qemu"));

    // A VM whose driver is missing is started with an available one.
    host.client().stop_vm(&vm.id).unwrap();
    host.client().start_vm(&vm.id).unwrap();
    assert_eq!(driver_of(&host, &vm).as_deref(), Some("qemu"));
    assert!(!doctor(&host).contains("VMs use"));
    host.client().delete_vm(&vm.id).unwrap();
    assert_eq!(host.leftovers(), Vec::<String>::new());
}

fn doctor(host: &Host) -> String {
    output_of(&host.scaleboxd(&["doctor"]).output().unwrap())
}

#[test]
fn client_config_prints_settings_that_log_a_user_in() {
    let mut host = Host::new(&Options::default());
    host.set("API_BIND", "0.0.0.0");
    host.set("API_PORT", "8099");
    let printed = host.scaleboxd(&["client-config"]).output().unwrap();
    assert_eq!(
        String::from_utf8_lossy(&printed.stdout),
        format!("SCALEBOX_URL=http://127.0.0.1:8099\nSCALEBOX_TOKEN={TOKEN}\n")
    );
    host.set("API_BIND", "127.0.0.1");
    host.set("API_PORT", "0");
    host.serve();
    let home = host.folder.join("home/.config/scalebox");
    fs::create_dir_all(&home).unwrap();
    let printed = String::from_utf8(printed.stdout).unwrap();
    fs::write(home.join("config"), printed.replace("http://127.0.0.1:8099", &host.url)).unwrap();
    let program = Path::new(env!("CARGO_BIN_EXE_scaleboxd")).with_file_name("scalebox");
    let output = std::process::Command::new(program)
        .arg("status")
        .env_clear()
        .env("HOME", host.folder.join("home"))
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", output_of(&output));
}
