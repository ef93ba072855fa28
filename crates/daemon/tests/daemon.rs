//! The daemon as a process: its settings, its shutdown, and recovery after a crash.

mod support;

use scalebox_api::{CreateVm, UpdateVm};
use std::collections::HashSet;
use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::{AtomicBool, Ordering};
use support::{Host, Options, eventually, run, text, unmeasured};

#[test]
fn an_invalid_setting_stops_the_daemon_with_its_name_its_value_and_the_expected_form() {
    let mut host = Host::new(&Options::default());
    for (key, value, right) in [
        ("MAX_DISK_SIZE_GIB", "lots", "whole number"),
        ("STORAGE_SIZE", "0", "100G"),
        ("SUBNET", "10.0.0.0/40", "172.16.0.0/16"),
        ("VMM", "xen", "qemu"),
        ("LOG_LEVEL", "=/=", "info"),
    ] {
        host.set(key, value);
        let printed = host.scaleboxd_fails(&["serve"]);
        assert!(
            printed.contains(&format!("{key}=\"{value}\"")) && printed.contains(right),
            "{printed}"
        );
        host.set(key, "");
    }
    host.set("API_TOKEN", "");
    let printed = host.scaleboxd_fails(&["serve"]);
    assert!(
        printed.contains("API_TOKEN is not set") && printed.contains("no default"),
        "{printed}"
    );
}

#[test]
fn the_environment_overrides_the_settings_file() {
    let host = Host::new(&Options::default());
    let file = host.folder.join("config");
    fs::write(&file, "MAX_DISK_SIZE_GIB=lots\n").unwrap();
    let serve = |env: &[(&str, &str)]| {
        let mut command = host.scaleboxd(&["template", "import", "x", "/nonexistent"]);
        command.args(["--config", text(&file)]).envs(env.iter().copied());
        support::output_of(&command.output().unwrap())
    };
    // `--config` is allowed only once, and the harness passes one too.
    assert!(serve(&[]).contains("cannot be used multiple times"));
    let printed = support::output_of(
        &std::process::Command::new(env!("CARGO_BIN_EXE_scaleboxd"))
            .args(["pool", "init", "--config", text(&file)])
            .env_clear()
            .output()
            .unwrap(),
    );
    assert!(printed.contains("MAX_DISK_SIZE_GIB=\"lots\""), "{printed}");
}

#[test]
fn a_missing_pool_a_second_daemon_and_a_used_port_are_reported_clearly() {
    let mut host = Host::new(&Options::default());
    host.serve();
    let printed = host.scaleboxd_fails(&["serve"]);
    assert!(printed.contains("another scaleboxd uses"), "{printed}");
    assert!(host.scaleboxd_fails(&["down"]).contains("another scaleboxd uses"));
    assert!(host.terminate().success());

    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    host.set("API_PORT", &taken.local_addr().unwrap().port().to_string());
    let printed = host.scaleboxd_fails(&["serve"]);
    assert!(
        printed.contains("cannot listen on 127.0.0.1") && printed.contains("API_PORT"),
        "{printed}"
    );

    host.set("API_PORT", "0");
    host.scaleboxd_ok(&["down"]);
    let printed = host.scaleboxd_fails(&["serve"]);
    assert!(printed.contains("scaleboxd pool init"), "{printed}");
}

#[test]
fn pool_init_prints_the_fixed_messages_and_does_nothing_the_second_time() {
    let host = Host::new(&Options {
        pool_size: "100G",
        ..Options::default()
    });
    assert_eq!(fs::metadata(host.folder.join("pool.img")).unwrap().len(), 100 << 30);
    assert_eq!(
        fs::metadata(host.folder.join("pool.img")).unwrap().mode() & 0o777,
        0o600
    );
    let printed = host.scaleboxd_ok(&["pool", "init"]);
    assert_eq!(
        printed,
        format!(
            "Storage already mounted at {}\nNothing to do.\n",
            host.folder.join("pool").display()
        )
    );
}

#[test]
fn sigterm_finishes_the_requests_in_progress_and_exits_with_0() {
    let mut host = Host::with_tiny_template(&Options::default());
    let client = host.client();
    let stopping = AtomicBool::new(false);
    let request = host.stopped("tiny");
    std::thread::scope(|scope| {
        // Creates VMs until the daemon accepts no more requests. Every creation that was begun gets
        // a response.
        let worker = scope.spawn(|| {
            let mut made = 0;
            loop {
                match client.create_vm(&request) {
                    Ok(_) => made += 1,
                    Err(error) => {
                        assert!(
                            stopping.load(Ordering::SeqCst),
                            "rejected before the daemon received SIGTERM: {error}"
                        );
                        assert_eq!(error.status(), None, "{error}");
                        return made;
                    }
                }
            }
        });
        eventually("a few VMs", || (host.client().vms().unwrap().len() >= 3).then_some(()));
        stopping.store(true, Ordering::SeqCst);
        assert_eq!(host.terminate().code(), Some(0));
        let made = worker.join().unwrap();
        // Nothing was created without a response to its client.
        host.serve();
        assert_eq!(host.client().vms().unwrap().len(), made);
    });
}

#[test]
fn after_a_crash_during_creations_every_reported_vm_exists_and_nothing_else() {
    let mut host = Host::with_tiny_template(&Options {
        env: &[("OVERCOMMIT_RATIO", "1000")],
        ..Options::default()
    });
    let mut reported: HashSet<String> = HashSet::new();
    for round in 0..5 {
        let client = host.client();
        // A new size in each round, so that crashes also hit the creation of a base image.
        let request = CreateVm {
            disk_size_gib: Some(2 + round),
            ..host.stopped("tiny")
        };
        std::thread::scope(|scope| {
            let workers: Vec<_> = (0..8)
                .map(|_| {
                    scope.spawn(|| {
                        let mut reported = Vec::new();
                        while let Ok(vm) = client.create_vm(&request) {
                            reported.push(vm.id);
                        }
                        reported
                    })
                })
                .collect();
            let before = reported.len();
            eventually("some VMs", || {
                (host.client().vms().unwrap().len() >= before + 4 + round as usize).then_some(())
            });
            host.crash();
            reported.extend(workers.into_iter().flat_map(|worker| worker.join().unwrap()));
        });
        host.serve();

        let listed = host.client().vms().unwrap();
        let ids: HashSet<String> = listed.iter().map(|vm| vm.id.clone()).collect();
        assert!(reported.is_subset(&ids), "lost: {:?}", reported.difference(&ids));
        let disks: HashSet<String> = host.leftovers().into_iter().collect();
        let expected: HashSet<String> = ids.iter().map(|id| format!("{id}.ext4")).collect();
        assert_eq!(disks, expected, "each VM has its disk, and no disk is orphaned");
        let pool = host.client().pool().unwrap();
        assert_eq!(pool.reserved_bytes, 0);
        assert_eq!(
            pool.committed_bytes,
            listed.iter().map(|vm| vm.disk_size_gib << 30).sum::<u64>()
        );
        // A VM recorded before the crash but not yet reported exists too: it can be seen and
        // deleted.
        reported = ids;
    }
    let vm = host.client().vms().unwrap().pop().unwrap();
    run("e2fsck", &["-fn", text(&host.disk(&vm))]);
    host.client().delete_vm(&vm.id).unwrap();
}

#[test]
fn a_daemon_rejects_a_pool_with_disks_that_are_not_in_its_state() {
    let mut host = Host::with_tiny_template(&Options::default());
    let vm = host.create_stopped("tiny", None);
    let right = text(&host.folder.join("state")).to_owned();
    let wrong = text(&host.folder.join("other")).to_owned();

    // A second daemon starts while the first one uses the pool.
    host.set("STATE_DIR", &wrong);
    let printed = host.scaleboxd_fails(&["serve"]);
    assert!(printed.contains("in use by another scaleboxd"), "{printed}");
    // The second daemon starts when the first one has stopped.
    assert!(host.terminate().success());
    for command in ["serve", "down"] {
        let printed = host.scaleboxd_fails(&[command]);
        assert!(
            printed.contains("has 1 disks") && printed.contains("STATE_DIR"),
            "{command}: {printed}"
        );
        assert!(host.disk(&vm).exists());
    }
    host.set("STATE_DIR", &right);
    host.serve();
    assert_eq!(unmeasured(host.client().vms().unwrap()), std::slice::from_ref(&vm));

    // An empty pool can be claimed by any daemon.
    host.client().delete_vm(&vm.id).unwrap();
    assert!(host.terminate().success());
    host.set("STATE_DIR", &wrong);
    host.serve();
    let vm = host.create_stopped("tiny", None);
    assert!(host.disk(&vm).exists());
}

#[test]
fn a_run_dir_that_is_too_long_for_sockets_is_rejected_at_start() {
    let mut host = Host::new(&Options::default());
    let long = host.folder.join("x".repeat(90));
    host.set("RUN_DIR", text(&long));
    let printed = host.scaleboxd_fails(&["serve"]);
    assert!(printed.contains("RUN_DIR") && printed.contains("shorter"), "{printed}");
    host.set("RUN_DIR", text(&host.folder.join("run").clone()));
}

#[test]
fn a_client_that_never_finishes_its_request_does_not_delay_the_shutdown() {
    let mut host = Host::with_tiny_template(&Options::default());
    let mut slow = std::net::TcpStream::connect(host.url.strip_prefix("http://").unwrap()).unwrap();
    std::io::Write::write_all(&mut slow, b"GET /health HTTP/1.1\r\n").unwrap();
    assert_eq!(host.client().vms().unwrap(), []);
    assert_eq!(host.terminate().code(), Some(0));
}

#[test]
fn a_growth_interrupted_by_a_crash_is_completed() {
    let mut host = Host::with_tiny_template(&Options::default());
    let vm = host.create_stopped("tiny", None);
    host.crash();
    // The state after a crash between recording the intent and growing the disk.
    let state = rusqlite::Connection::open(host.folder.join("state/state.db")).unwrap();
    state.execute("UPDATE vms SET disk_size_gib = 7", []).unwrap();
    drop(state);
    host.serve();
    assert_eq!(host.client().vm(&vm.id).unwrap().disk_size_gib, 7);
    assert_eq!(fs::metadata(host.disk(&vm)).unwrap().len(), 7 << 30);
    run("e2fsck", &["-fn", text(&host.disk(&vm))]);
    assert_eq!(host.client().pool().unwrap().committed_bytes, 7 << 30);
}

#[test]
fn a_missing_disk_is_reported_and_the_vm_can_be_deleted() {
    let mut host = Host::with_tiny_template(&Options::default());
    let vm = host.create_stopped("tiny", None);
    assert!(host.terminate().success());
    fs::remove_file(host.disk(&vm)).unwrap();
    host.serve();
    let found = host.client().vm(&vm.id).unwrap();
    assert_eq!(found.status, scalebox_api::VmStatus::Failed);
    assert!(found.status_reason.unwrap().contains("disk"), "the reason names it");
    host.client().delete_vm(&vm.id).unwrap();
}

#[test]
fn down_removes_mount_bridge_and_tables_and_keeps_the_vms() {
    let mut host = Host::with_tiny_template(&Options::default());
    let vm = host.create_stopped("tiny", Some(5));
    assert!(host.terminate().success());
    host.scaleboxd_ok(&["down"]);
    assert!(!std::path::Path::new("/sys/class/net").join(&host.bridge).exists());
    assert!(!run("nft", &["list", "tables"]).contains(&host.bridge));
    assert!(
        !fs::read_to_string("/proc/self/mountinfo")
            .unwrap()
            .contains(text(&host.folder))
    );
    assert_eq!(run("losetup", &["-j", text(&host.folder.join("pool.img"))]), "");
    host.scaleboxd_ok(&["down"]);

    host.scaleboxd_ok(&["pool", "init"]);
    host.serve();
    assert_eq!(unmeasured(host.client().vms().unwrap()), [vm]);
}

#[test]
fn a_file_size_limit_fails_the_request_but_does_not_stop_the_daemon() {
    let host = Host::with_tiny_template(&Options::default());
    let vm = host.create_stopped("tiny", Some(1));
    let pid = host.daemon_pid().to_string();
    run("prlimit", &["--pid", &pid, "--fsize=2147483648:unlimited"]);
    let refusal = host.client().update_vm(&vm.id, &UpdateVm::grow(3)).unwrap_err();
    assert!(refusal.to_string().contains("File too large"), "{refusal}");
    assert_eq!(host.client().vm(&vm.id).unwrap().disk_size_gib, 1);
    run("prlimit", &["--pid", &pid, "--fsize=unlimited:unlimited"]);
    assert_eq!(
        host.client()
            .update_vm(&vm.id, &UpdateVm::grow(3))
            .unwrap()
            .disk_size_gib,
        3
    );
}
