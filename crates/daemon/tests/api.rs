//! The HTTP API, through a real socket, with a real daemon and a real pool. No guest is booted.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed step fails the test"
)]

mod support;

use scalebox_api::{AutoExtend, CreateVm, ErrorCode, UpdateVm, VmStatus};
use scalebox_client::ClientError;
use serde_json::{Value, json};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Barrier;
use support::{Host, HostDisk, KEY, Options, TOKEN, eventually, run, text, unmeasured};

fn error_of(body: &str) -> String {
    let body: Value = serde_json::from_str(body).unwrap_or_else(|error| panic!("{error}: {body:?}"));
    let known = ["error", "code", "field", "details"];
    assert!(
        body.as_object()
            .unwrap()
            .keys()
            .all(|field| known.contains(&field.as_str())),
        "{body}"
    );
    let code = body["code"].as_str().unwrap_or_else(|| panic!("no code: {body}"));
    assert!(ErrorCode::NAMES.contains(&code), "{body}");
    body["error"].as_str().expect("an error").to_owned()
}

fn rejection(error: ClientError) -> (u16, String) {
    match error {
        ClientError::Refused { status, message, .. } => (status, message),
        other => panic!("{other}"),
    }
}

#[test]
fn invalid_input_gets_a_400_that_names_the_field_and_creates_nothing() {
    let host = Host::with_tiny_template(&Options::default());
    let with = |field: &str, value: Value| {
        let mut body = json!({"template": "tiny", "ssh_public_key": KEY, "start": false});
        body[field] = value;
        body.to_string().into_bytes()
    };
    let without = |field: &str| {
        let mut body = json!({"template": "tiny", "ssh_public_key": KEY, "start": false});
        body.as_object_mut().unwrap().remove(field);
        body.to_string().into_bytes()
    };
    let range = "disk_size_gib must be between 1 and 100";
    let mut cases: Vec<(Vec<u8>, &str)> = vec![
        (b"".to_vec(), "body"),
        (b"nonsense".to_vec(), "JSON"),
        (b"[]".to_vec(), "object"),
        (b"null".to_vec(), "object"),
        (b"\xff\xfe".to_vec(), "JSON"),
        (vec![b'['; 100_000], "JSON"),
        (with("disk_size_gb", json!(10)), "disk_size_gb"),
        (without("template"), "template"),
        (with("template", json!("")), "template"),
        (with("template", json!("../x")), "template"),
        (with("template", json!(7)), "template"),
        (with("ssh_public_key", json!("")), "ssh_public_key"),
        (with("ssh_public_key", json!("hello")), "ssh_public_key"),
        (with("ssh_public_key", json!(format!("{KEY}\n{KEY}"))), "ssh_public_key"),
        (
            with("ssh_public_key", json!(format!("command=\"id\" {KEY}"))),
            "ssh_public_key",
        ),
        (with("vcpu_count", json!(0)), "vcpu_count"),
        (with("vcpu_count", json!(100_000)), "vcpu_count"),
        (with("mem_size_mib", json!(1)), "mem_size_mib"),
        (with("mem_size_mib", json!(1u64 << 40)), "mem_size_mib"),
        (with("name", json!("Upper")), "name"),
        (with("name", json!("-x")), "name"),
        (with("name", json!("a".repeat(64))), "name"),
        (with("name", json!("vm-0123456789ab")), "name"),
        (with("start", json!("yes")), "start"),
    ];
    for size in [
        json!(0),
        json!(-1),
        json!(1.5),
        json!("10"),
        json!(1e300),
        json!(null),
        json!(101),
        json!(200),
    ] {
        cases.push((with("disk_size_gib", size), range));
    }
    for (body, expected) in cases {
        let shown = String::from_utf8_lossy(&body[..body.len().min(120)]).into_owned();
        let (status, answer) = host.send("POST", "/vms", &body);
        assert_eq!(status, 400, "{shown}: {answer}");
        let message = error_of(&answer);
        assert!(message.contains(expected), "{shown}: {message}");
        if expected == range {
            assert_eq!(message, range);
        }
    }
    assert_eq!(host.client().vms().unwrap(), []);
    assert_eq!(host.leftovers(), Vec::<String>::new());
    assert_eq!(host.client().pool().unwrap().reserved_bytes, 0);
}

#[test]
fn rejections_of_every_kind_have_the_same_json_body_and_are_never_a_500() {
    let host = Host::with_tiny_template(&Options::default());
    let body = json!({"template": "absent", "ssh_public_key": KEY}).to_string();
    for (method, path, body, status) in [
        ("POST", "/vms", body.as_bytes(), 404),
        ("GET", "/vms/nobody", b"", 404),
        ("GET", "/vms/..%2f..%2fetc", b"", 404),
        ("DELETE", "/vms/vm-0123456789ab", b"", 404),
        ("POST", "/vms/nobody/start", b"", 404),
        ("POST", "/vms/nobody/stop", b"", 404),
        ("POST", "/vms/nobody/trim", b"", 404),
        ("GET", "/templates/absent", b"", 404),
        ("GET", "/templates/..%2fx", b"", 404),
        ("DELETE", "/templates/absent", b"", 404),
        ("DELETE", "/templates/..%2fx", b"", 404),
        ("DELETE", "/templates/debian-base", b"", 403),
        ("GET", "/nothing/here", b"", 404),
        ("GET", "/vms/%ff", b"", 400),
        ("GET", "/vms/line%0abreak", b"", 404),
        ("PUT", "/vms", b"", 405),
        ("DELETE", "/health", b"", 405),
        ("POST", "/pool", b"", 405),
        ("POST", "/vms", &vec![b' '; (1 << 20) + 1], 413),
    ] {
        let (found, answer) = host.send(method, path, body);
        assert_eq!(found, status, "{method} {path}: {answer}");
        error_of(&answer);
    }
}

#[test]
fn a_body_of_unknown_length_is_limited_to_one_mebibyte() {
    let host = Host::with_tiny_template(&Options::default());
    let mut request = format!(
        "POST /vms HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: Bearer {TOKEN}\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    .into_bytes();
    let chunk = [b"40000\r\n".as_slice(), &[b' '; 0x40000], b"\r\n"].concat();
    for _ in 0..5 {
        request.extend_from_slice(&chunk);
    }
    request.extend_from_slice(b"0\r\n\r\n");
    let (status, answer) = host.raw(&request);
    assert_eq!(status, 413, "{answer}");
    error_of(&answer);
}

#[test]
fn only_health_responds_without_a_token() {
    let host = Host::with_tiny_template(&Options::default());
    let longer = format!("Bearer {TOKEN}x");
    let shorter = format!("Bearer {}", &TOKEN[..TOKEN.len() - 1]);
    let as_user = format!("Basic {TOKEN}");
    let mut answers = Vec::new();
    for header in ["", "Bearer", "Bearer ", longer.as_str(), &shorter, &as_user, TOKEN] {
        let header = if header.is_empty() {
            String::new()
        } else {
            format!("Authorization: {header}\r\n")
        };
        for path in ["/vms", "/info", "/pool", "/templates", "/nothing/here", "/vms/nobody"] {
            let (status, answer) =
                host.raw(format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{header}\r\n").as_bytes());
            assert_eq!(status, 401, "{header}{path}: {answer}");
            answers.push(error_of(&answer));
        }
    }
    answers.dedup();
    assert_eq!(answers.len(), 1, "responses must not differ: {answers:?}");
    let (status, answer) = host.raw(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    assert_eq!((status, answer.as_str()), (200, r#"{"status":"ok"}"#));
}

#[test]
fn a_vm_gets_the_requested_disk_size_or_the_default() {
    let host = Host::with_tiny_template(&Options::default());
    for (asked, expected) in [(None, 2), (Some(1), 1), (Some(10), 10)] {
        let vm = host.create_stopped("tiny", asked);
        assert_eq!(vm.disk_size_gib, expected);
        assert_eq!(fs::metadata(host.disk(&vm)).unwrap().len(), expected << 30);
        run("e2fsck", &["-fn", text(&host.disk(&vm))]);
        let header = run("dumpe2fs", &["-h", text(&host.disk(&vm))]);
        let field = |key: &str| -> u64 {
            header
                .lines()
                .find_map(|line| line.strip_prefix(key))
                .expect(key)
                .trim()
                .parse()
                .expect(key)
        };
        assert_eq!(field("Block count:") * field("Block size:"), expected << 30);
    }
    let error = host
        .client()
        .create_vm(&CreateVm {
            disk_size_gib: Some(200),
            ..host.stopped("tiny")
        })
        .unwrap_err();
    assert_eq!(
        rejection(error),
        (400, "disk_size_gib must be between 1 and 100".to_owned())
    );
    assert_eq!(host.client().pool().unwrap().committed_bytes, 13 << 30);
}

#[test]
fn a_disk_smaller_than_its_template_is_a_400_with_the_size_of_the_template() {
    let host = Host::with_tiny_template(&Options::default());
    let image = host.folder.join("large.image");
    run("mke2fs", &["-q", "-t", "ext4", text(&image), "3G"]);
    host.scaleboxd_ok(&["template", "import", "large", text(&image)]);
    let error = host
        .client()
        .create_vm(&CreateVm {
            disk_size_gib: Some(2),
            ..host.stopped("large")
        })
        .unwrap_err();
    assert_eq!(
        rejection(error),
        (
            400,
            "disk_size_gib must be at least 3: the template large has 3 GiB".to_owned()
        )
    );
    assert_eq!(
        host.create_stopped("large", None).disk_size_gib,
        3,
        "the template is larger than the default"
    );
}

#[test]
fn a_vm_is_created_found_listed_and_deleted() {
    let host = Host::with_tiny_template(&Options::default());
    let client = host.client();
    let vm = client
        .create_vm(&CreateVm {
            name: Some("my-box".parse().unwrap()),
            ..host.stopped("tiny")
        })
        .unwrap();
    let vm = unmeasured([vm]).remove(0);
    assert!(vm.id.parse::<scalebox_units::VmId>().is_ok(), "{}", vm.id);
    assert_eq!(
        (vm.name.as_str(), vm.template.as_str(), vm.status),
        ("my-box", "tiny", VmStatus::Stopped)
    );
    assert_eq!((vm.ip.as_str(), vm.vcpu_count, vm.mem_size_mib), ("127.0.0.1", 1, 512));
    assert_eq!(vm.ssh, format!("ssh -p {} user@127.0.0.1", vm.ssh_port));
    assert!(
        vm.created_at.ends_with('Z') && vm.created_at.contains('T'),
        "{}",
        vm.created_at
    );
    assert_eq!(fs::metadata(host.disk(&vm)).unwrap().mode() & 0o777, 0o600);

    assert_eq!(unmeasured([client.vm("my-box").unwrap()]), std::slice::from_ref(&vm));
    assert_eq!(unmeasured([client.vm(&vm.id).unwrap()]), std::slice::from_ref(&vm));
    let unnamed = host.create_stopped("tiny", None);
    assert_eq!(unnamed.name.split('-').count(), 3, "{}", unnamed.name);
    assert_eq!(unmeasured(client.vms().unwrap()), [vm.clone(), unnamed.clone()]);
    let taken = client.create_vm(&CreateVm {
        name: Some("my-box".parse().unwrap()),
        ..host.stopped("tiny")
    });
    let (status, message) = rejection(taken.unwrap_err());
    assert!(status == 409 && message.contains("my-box"), "{message}");

    let templates = client.templates().unwrap();
    assert_eq!(
        (
            templates[0].name.as_str(),
            templates[0].used_by,
            templates[0].size_bytes
        ),
        ("tiny", 2, 64 << 20)
    );
    let info = client.info().unwrap();
    assert_eq!((info.vms.total, info.vms.stopped, info.templates), (2, 2, 1));
    assert_eq!((info.host_ip.as_str(), info.vmm.as_str()), ("127.0.0.1", "qemu"));

    client.delete_vm("my-box").unwrap();
    client.delete_vm(&unnamed.id).unwrap();
    assert_eq!(rejection(client.delete_vm("my-box").unwrap_err()).0, 404);
    assert_eq!(host.leftovers(), Vec::<String>::new());
    client.delete_template("tiny").unwrap();
    assert_eq!(client.templates().unwrap(), []);
}

#[test]
fn the_pool_figures_match_the_pool() {
    let host = Host::with_tiny_template(&Options {
        pool_size: "100G",
        ..Options::default()
    });
    host.create_stopped("tiny", Some(10));
    let pool = host.client().pool().unwrap();
    assert_eq!(pool.capacity_bytes, 100 << 30);
    assert_eq!(pool.committed_bytes, 10 << 30);
    assert_eq!(pool.commitment_limit_bytes, 400 << 30);
    assert_eq!((pool.reserved_bytes, pool.buffer_bytes), (0, 2 << 30));
    let host_free = pool.host_free_bytes.expect("an image has a host disk");
    assert!(
        pool.free_bytes <= 100 << 30 && pool.free_bytes <= host_free + (1 << 30),
        "{pool:?}"
    );
    assert_eq!(Path::new(&pool.path), host.folder.join("pool"));
    assert_eq!(
        pool.image.as_deref().map(Path::new),
        Some(host.folder.join("pool.img").as_path())
    );
}

#[test]
fn a_stopped_vm_s_disk_grows_with_its_file_system_and_never_shrinks() {
    let host = Host::with_tiny_template(&Options {
        env: &[("OVERCOMMIT_RATIO", "1")],
        ..Options::default()
    });
    let vm = host.create_stopped("tiny", Some(5));
    let resize = |size: u64| host.client().update_vm(&vm.id, &UpdateVm::grow(size));
    let grown = resize(8).unwrap();
    assert_eq!(grown.disk_size_gib, 8);
    assert!(grown.disk.expect("the state of the file system").confirmed);
    assert_eq!(fs::metadata(host.disk(&vm)).unwrap().len(), 8 << 30);
    run("e2fsck", &["-fn", text(&host.disk(&vm))]);
    assert_eq!(host.client().pool().unwrap().committed_bytes, 8 << 30);
    assert_eq!(resize(8).unwrap().disk_size_gib, 8, "the same size changes nothing");

    let (status, message) = rejection(resize(5).unwrap_err());
    assert!(
        status == 400 && message.contains("at least 8") && message.contains("do not shrink"),
        "{message}"
    );
    assert_eq!(
        rejection(resize(101).unwrap_err()),
        (400, "disk_size_gib must be between 1 and 100".to_owned())
    );
    assert_eq!(
        rejection(resize(60).unwrap_err()),
        (507, "Insufficient storage: 18GB available, need 54GB".to_owned())
    );
    for (body, expected) in [
        (&b"{}"[..], "disk_size_gib"),
        (b"", "body"),
        (br#"{"disk_size_gib": 9, "name": "x"}"#, "name"),
    ] {
        let (status, answer) = host.send("PATCH", &format!("/vms/{}", vm.id), body);
        assert!(status == 400 && error_of(&answer).contains(expected), "{answer}");
    }
    let pool = host.client().pool().unwrap();
    assert_eq!((pool.committed_bytes, pool.reserved_bytes), (8 << 30, 0));
    host.client().delete_vm(&vm.id).unwrap();
    eventually("the deleted disk's commitment to be released", || {
        (host.client().pool().unwrap().committed_bytes == 0).then_some(())
    });
}

#[test]
fn auto_extend_policies_are_set_changed_kept_and_removed() {
    let mut host = Host::with_tiny_template(&Options::default());
    let policy = |limit_gib| AutoExtend {
        threshold_percent: 80,
        increment_gib: 5,
        limit_gib,
    };
    let request = |limit| CreateVm {
        disk_size_gib: Some(10),
        disk_auto_extend: Some(policy(limit)),
        ..host.stopped("tiny")
    };
    let too_small = "disk_auto_extend.limit_gib must be at least the size of the disk, which is 10 GiB";
    assert_eq!(
        rejection(host.client().create_vm(&request(9)).unwrap_err()),
        (400, too_small.to_owned())
    );
    assert_eq!(host.client().pool().unwrap().committed_bytes, 0);
    let vm = host.client().create_vm(&request(20)).unwrap();
    assert_eq!(vm.disk_auto_extend, Some(policy(20)));

    let set = |host: &Host, extend| {
        host.client().update_vm(
            &vm.id,
            &UpdateVm {
                disk_auto_extend: Some(extend),
                ..UpdateVm::default()
            },
        )
    };
    assert_eq!(
        rejection(set(&host, Some(policy(9))).unwrap_err()),
        (400, too_small.to_owned())
    );
    let changed = set(&host, Some(policy(30))).unwrap();
    assert_eq!((changed.disk_auto_extend, changed.disk), (Some(policy(30)), None));
    host.crash();
    host.serve();
    assert_eq!(host.client().vm(&vm.id).unwrap().disk_auto_extend, Some(policy(30)));
    assert_eq!(set(&host, None).unwrap().disk_auto_extend, None);
}

#[test]
fn the_largest_size_wins_when_ten_clients_grow_the_same_disk() {
    let host = Host::with_tiny_template(&Options {
        pool_size: "100G",
        ..Options::default()
    });
    let vm = host.create_stopped("tiny", None);
    let start = Barrier::new(10);
    std::thread::scope(|scope| {
        for size in 11..=20 {
            let (host, vm, start) = (&host, &vm, &start);
            scope.spawn(move || {
                start.wait();
                // A larger size may have come first; then this one is rejected as shrinking.
                if let Err(error) = host.client().update_vm(&vm.id, &UpdateVm::grow(size)) {
                    assert_eq!(rejection(error).0, 400);
                }
            });
        }
    });
    assert_eq!(host.client().vm(&vm.id).unwrap().disk_size_gib, 20);
    assert_eq!(fs::metadata(host.disk(&vm)).unwrap().len(), 20 << 30);
    let pool = host.client().pool().unwrap();
    assert_eq!((pool.committed_bytes, pool.reserved_bytes), (20 << 30, 0));
    run("e2fsck", &["-fn", text(&host.disk(&vm))]);
}

#[test]
fn the_pool_grows_shrinks_and_is_trimmed_while_in_use() {
    let disk = HostDisk::ext4("100G");
    let host = Host::with_tiny_template(&Options {
        image_dir: Some(&disk.folder),
        env: &[("OVERCOMMIT_RATIO", "1")],
        ..Options::default()
    });
    let client = host.client();
    let vm = host.create_stopped("tiny", Some(20));
    let request = CreateVm {
        disk_size_gib: Some(20),
        ..host.stopped("tiny")
    };
    assert_eq!(rejection(client.create_vm(&request).unwrap_err()).0, 507);
    assert_eq!(client.grow_pool(Some(60)).unwrap().capacity_bytes, 60 << 30);
    let second = client.create_vm(&request).unwrap();

    let (status, message) = rejection(client.shrink_pool(35).unwrap_err());
    assert!(status == 400 && message.contains("40 GiB are committed"), "{message}");
    client.delete_vm(&second.id).unwrap();
    assert_eq!(client.shrink_pool(40).unwrap().capacity_bytes, 40 << 30);
    assert_eq!(fs::metadata(disk.folder.join("pool.img")).unwrap().len(), 40 << 30);
    client.trim_pool().unwrap();
    let (status, answer) = host.send("POST", "/pool/grow", b"");
    assert_eq!(status, 200, "{answer}");
    assert!(client.pool().unwrap().capacity_bytes >= 75 << 30);
    for (path, body, expected) in [
        ("/pool/grow", &br#"{"size_gib": 50}"#[..], "is not larger"),
        ("/pool/grow", br#"{"size_gib": 5000}"#, "at most"),
        ("/pool/grow", br#"{"size_gib": 1.5}"#, "size_gib"),
        ("/pool/shrink", b"{}", "size_gib"),
        ("/pool/shrink", b"", "body"),
    ] {
        let (status, answer) = host.send("POST", path, body);
        assert!(
            status == 400 && error_of(&answer).contains(expected),
            "{path}: {status} {answer}"
        );
    }
    run("e2fsck", &["-fn", text(&host.disk(&vm))]);
}

#[test]
fn eight_concurrent_creations_share_the_space_for_one_vm_and_a_delete_frees_it() {
    let host = Host::with_tiny_template(&Options {
        env: &[("OVERCOMMIT_RATIO", "1")],
        ..Options::default()
    });
    let request = CreateVm {
        disk_size_gib: Some(20),
        ..host.stopped("tiny")
    };
    let start = Barrier::new(8);
    let attempt = || {
        let client = host.client();
        start.wait();
        client.create_vm(&request)
    };
    let results: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..8).map(|_| scope.spawn(attempt)).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    let (made, refusals): (Vec<_>, Vec<_>) = results.into_iter().partition(Result::is_ok);
    assert_eq!((made.len(), refusals.len()), (1, 7));
    for refusal in refusals {
        let (status, message) = rejection(refusal.unwrap_err());
        assert_eq!(status, 507);
        assert!(
            message.starts_with("Insufficient storage: ") && message.ends_with("GB available, need 22GB"),
            "{message}"
        );
    }
    let vm = made.into_iter().next().unwrap().unwrap();
    assert_eq!(unmeasured(host.client().vms().unwrap()), unmeasured([vm.clone()]));
    assert_eq!(host.leftovers(), [format!("{}.ext4", vm.id)]);
    assert_eq!(host.client().pool().unwrap().reserved_bytes, 0);
    host.client().delete_vm(&vm.id).unwrap();
    host.client().create_vm(&request).unwrap();
}

#[test]
fn a_pool_grows_automatically_up_to_80_percent_of_its_host_disk() {
    let disk = HostDisk::ext4("100G");
    let mut host = Host::with_tiny_template(&Options {
        image_dir: Some(&disk.folder),
        env: &[
            ("OVERCOMMIT_RATIO", "1"),
            ("POOL_AUTO_GROW", "on"),
            ("POOL_LOW_WATER_GIB", "0"),
        ],
        ..Options::default()
    });
    let capacity = |host: &Host| host.client().pool().unwrap().capacity_bytes >> 30;
    let expected = 75..=80;

    // Several concurrent requests make the pool grow instead of being rejected.
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| host.create_stopped("tiny", Some(15)));
        }
    });
    assert!(expected.contains(&capacity(&host)), "{} GiB", capacity(&host));
    let too_much = CreateVm {
        disk_size_gib: Some(60),
        ..host.stopped("tiny")
    };
    assert_eq!(rejection(host.client().create_vm(&too_much).unwrap_err()).0, 507);

    // The pool also grows at the low-water mark, and not before.
    for vm in host.client().vms().unwrap() {
        host.client().delete_vm(&vm.id).unwrap();
    }
    host.client().shrink_pool(40).unwrap();
    host.terminate();
    host.set("POOL_LOW_WATER_GIB", "25");
    host.serve();
    assert_eq!(capacity(&host), 40);
    let ballast = host.folder.join("pool/vms/ballast");
    run("fallocate", &["-l", "20G", text(&ballast)]);
    eventually("the pool to grow", || expected.contains(&capacity(&host)).then_some(()));
    assert!(host.log().contains("pool grown automatically"));
}

#[test]
fn a_nearly_full_pool_gives_507_and_creates_nothing() {
    let host = Host::with_tiny_template(&Options::default());
    let free = host.client().pool().unwrap().free_bytes;
    let left = (5 << 30) + (512 << 20);
    run(
        "fallocate",
        &[
            "-l",
            &(free - left).to_string(),
            text(&host.folder.join("pool/ballast")),
        ],
    );
    let error = host
        .client()
        .create_vm(&CreateVm {
            disk_size_gib: Some(10),
            ..host.stopped("tiny")
        })
        .unwrap_err();
    assert_eq!(
        rejection(error),
        (507, "Insufficient storage: 5GB available, need 12GB".to_owned())
    );
    assert_eq!(host.leftovers(), Vec::<String>::new());
    assert_eq!(host.create_stopped("tiny", Some(3)).disk_size_gib, 3);
}

#[test]
fn a_host_disk_that_fills_up_under_the_pool_gives_507() {
    let disk = HostDisk::ext4("60G");
    let host = Host::with_tiny_template(&Options {
        image_dir: Some(&disk.folder),
        ..Options::default()
    });
    let request = CreateVm {
        disk_size_gib: Some(10),
        ..host.stopped("tiny")
    };
    host.client().create_vm(&request).unwrap();
    let free = host
        .client()
        .pool()
        .unwrap()
        .host_free_bytes
        .expect("an image has a host disk");
    let left = (4 << 30) + (512 << 20);
    run(
        "fallocate",
        &["-l", &(free - left).to_string(), text(&disk.folder.join("ballast"))],
    );
    let (status, message) = rejection(host.client().create_vm(&request).unwrap_err());
    assert_eq!(
        (status, message.as_str()),
        (507, "Insufficient storage: 4GB available, need 12GB")
    );
    assert_eq!(host.client().vms().unwrap().len(), 1);
    fs::remove_file(disk.folder.join("ballast")).unwrap();
    host.client().create_vm(&request).unwrap();
}

#[test]
fn a_failed_start_undoes_every_step() {
    // There is a template but no kernel, so the failure comes after disk, seed drive and tap.
    let host = Host::with_tiny_template(&Options::default());
    let (status, message) = rejection(
        host.client()
            .create_vm(&CreateVm {
                start: true,
                ..host.stopped("tiny")
            })
            .unwrap_err(),
    );
    assert!(
        status == 503 && message.contains("scaleboxd template build debian-base"),
        "{status} {message}"
    );
    assert_eq!(host.leftovers(), Vec::<String>::new());
    assert_eq!(host.client().vms().unwrap(), []);
    let pool = host.client().pool().unwrap();
    assert_eq!((pool.reserved_bytes, pool.committed_bytes), (0, 0));

    let vm = host.create_stopped("tiny", None);
    assert_eq!(rejection(host.client().start_vm(&vm.id).unwrap_err()).0, 503);
    assert_eq!(
        unmeasured([host.client().vm(&vm.id).unwrap()]),
        std::slice::from_ref(&vm)
    );
    assert_eq!(rejection(host.client().stop_vm(&vm.id).unwrap_err()).0, 409);
    assert_eq!(host.taps(), Vec::<String>::new());
}

#[test]
fn every_response_has_a_request_id_that_is_in_the_log() {
    let host = Host::with_tiny_template(&Options::default());
    let body = json!({"template": "tiny", "ssh_public_key": KEY, "start": false}).to_string();
    let request = format!(
        "POST /vms HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: Bearer {TOKEN}\r\nX-Request-Id: build-17\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    assert_eq!(host.raw(request.as_bytes()).0, 201);
    let log = host.log();
    let lines: Vec<_> = log.lines().filter(|line| line.contains("build-17")).collect();
    for step in ["VM admitted", "VM created", "request finished"] {
        assert!(lines.iter().any(|line| line.contains(step)), "{step}: {lines:#?}");
    }
    assert!(!log.contains(TOKEN), "the token is in the log");
}

#[test]
fn each_rejection_has_a_code_and_the_field_with_the_error() {
    let host = Host::with_tiny_template(&Options::default());
    let vm = host.create_stopped("tiny", Some(3));
    let (vm, name) = (format!("/vms/{}", vm.id), vm.name);
    let key = support::KEY;
    let create = |more: &str| format!(r#"{{"template": "tiny", "ssh_public_key": "{key}", "start": false{more}}}"#);
    for (method, path, body, code, field) in [
        ("POST", "/vms", "{".to_owned(), "invalid_request", None),
        (
            "POST",
            "/vms",
            create(r#", "disk_size_gib": 0"#),
            "invalid_request",
            Some("disk_size_gib"),
        ),
        (
            "POST",
            "/vms",
            create(r#", "name": "A b""#),
            "invalid_request",
            Some("name"),
        ),
        (
            "POST",
            "/vms",
            create(&format!(r#", "name": "{name}""#)),
            "name_taken",
            None,
        ),
        ("POST", "/vms", create("").replace("tiny", "absent"), "not_found", None),
        (
            "PATCH",
            &vm,
            r#"{"disk_size_gib": 2}"#.to_owned(),
            "invalid_request",
            Some("disk_size_gib"),
        ),
        ("POST", &format!("{vm}/stop"), String::new(), "wrong_state", None),
        ("POST", &format!("{vm}/start"), String::new(), "not_ready", None),
        ("GET", "/vms/absent", String::new(), "not_found", None),
        ("PUT", "/vms", String::new(), "method_not_allowed", None),
        ("DELETE", "/templates/debian-base", String::new(), "forbidden", None),
        (
            "POST",
            "/pool/grow",
            r#"{"size_gib": 1}"#.to_owned(),
            "invalid_request",
            Some("size_gib"),
        ),
        ("POST", "/vms", " ".repeat(2 << 20), "payload_too_large", None),
    ] {
        let (_, answer) = host.send(method, path, body.as_bytes());
        let answer: Value = serde_json::from_str(&answer).unwrap();
        let shown = &body[..body.len().min(200)];
        assert_eq!(answer["code"], code, "{method} {path} {shown}: {answer}");
        assert_eq!(answer["field"].as_str(), field, "{method} {path} {shown}: {answer}");
    }
    let (_, answer) = host.send("POST", "/vms", create(r#", "disk_size_gib": 100"#).as_bytes());
    let answer: Value = serde_json::from_str(&answer).unwrap();
    assert_eq!(answer["code"], "insufficient_storage");
    assert_eq!(answer["details"]["need_gib"], 102);
    let available = answer["details"]["available_gib"].as_u64().unwrap();
    assert_eq!(
        answer["error"],
        format!("Insufficient storage: {available}GB available, need 102GB")
    );
}
