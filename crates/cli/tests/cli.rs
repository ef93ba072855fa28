//! Tests `scalebox` from outside: its requests, its output and its exit codes.
#![allow(clippy::unwrap_used)] // clippy does not count the helper modules as tests

#[allow(dead_code, reason = "the tests of guests use more of it")]
mod api;

use api::{Home, Server, TOKEN, info, pool, run, vm};
use serde_json::{Value, json};
use std::io::{self, Write};
use std::net::TcpListener;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

const KEY: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIKu6/ItCJ89EaUvwZxaYjzC8kOadG6pYNRTO562Y9T9S me@laptop";

fn two_vms() -> Value {
    json!({"vms": [
        vm(json!({"storage": {"provisioned_bytes": 10u64 << 30, "used_bytes": 2u64 << 30, "exclusive_bytes": 300u64 << 20,
                  "measured_at": "2026-01-02T03:04:05.000Z"}})),
        vm(json!({"id": "vm-0000000000ff", "name": "box", "status": "failed", "status_reason": "its process ended",
                  "mem_size_mib": 2048, "disk_size_gib": 2, "ssh_port": 22002})),
    ]})
}

#[test]
fn lists_are_plain_aligned_tables_in_a_pipe() {
    let server = Server::new(vec![("GET /vms", 200, two_vms())]);
    let ran = run(&mut Home::new().scalebox(&server, &["vm", "list"]));
    assert_eq!((ran.code, ran.err.as_str()), (0, ""));
    let lines: Vec<&str> = ran.out.lines().collect();
    let [header, first, second] = lines[..] else {
        panic!("{}", ran.out)
    };
    assert!(
        header.starts_with("NAME          STATUS     DISK   USED  EXCLUSIVE  CPUS   MEMORY  SSH              TEMPLATE"),
        "{header}"
    );
    assert!(
        first.starts_with(
            "calm-red-fox  running  10 GiB  2 GiB    300 MiB     1  512 MiB  127.0.0.1:22001  debian-base"
        ),
        "{first}"
    );
    assert!(
        second.starts_with(
            "box           failed    2 GiB      -          -     1    2 GiB  127.0.0.1:22002  debian-base"
        ),
        "{second}"
    );
    assert!(first.ends_with("  vm-0123456789ab"), "{first}");
    assert_eq!(server.requests()[0].authorization, format!("Bearer {TOKEN}"));
}

#[test]
fn json_output_is_the_servers_response() {
    let home = Home::new();
    home.file(".ssh/id_ed25519.pub", KEY, 0o644);
    let templates = json!({"templates": [{"name": "debian-base", "size_bytes": 2147483648u64, "used_bytes": 335544320,
        "created_at": "2026-01-02T03:04:05Z", "used_by": 2, "protected": true, "storage": {"provisioned_bytes": 2147483648u64,
        "used_bytes": 335544320, "exclusive_bytes": 4096, "measured_at": "2026-01-02T03:04:05.000Z"}}]});
    let server = Server::new(vec![
        ("GET /vms", 200, two_vms()),
        ("GET /vms/box", 200, vm(json!({"name": "box"}))),
        ("POST /vms", 201, vm(json!({}))),
        ("POST /vms/box/start", 200, vm(json!({"name": "box"}))),
        (
            "POST /vms/box/stop",
            200,
            vm(json!({"name": "box", "status": "stopped"})),
        ),
        ("GET /templates", 200, templates.clone()),
        ("GET /pool", 200, pool()),
        ("GET /info", 200, info()),
    ]);
    for (arguments, answer) in [
        (&["vm", "list"][..], two_vms()),
        (&["vm", "get", "box"], vm(json!({"name": "box"}))),
        (&["vm", "create"], vm(json!({}))),
        (&["vm", "start", "box"], vm(json!({"name": "box"}))),
        (&["vm", "stop", "box"], vm(json!({"name": "box", "status": "stopped"}))),
        (&["template", "list"], templates),
        (&["pool", "show"], pool()),
        (&["status"], info()),
    ] {
        let ran = run(home.scalebox(&server, arguments).arg("--json"));
        assert_eq!(ran.code, 0, "{arguments:?}: {}", ran.err);
        assert_eq!(
            serde_json::from_str::<Value>(&ran.out).unwrap(),
            answer,
            "{arguments:?}"
        );
    }
}

#[test]
fn status_and_pool_show_sizes_in_readable_units() {
    let mut full = pool();
    full["free_bytes"] = json!(5u64 << 29);
    let server = Server::new(vec![
        ("GET /info", 200, info()),
        ("GET /pool", 200, pool()),
        ("GET /pool", 200, full),
    ]);
    let home = Home::new();
    let status = run(&mut home.scalebox(&server, &["status"]));
    for line in [
        "server      scaleboxd 0.1.0 on big-iron (192.0.2.7)\n",
        "up          2 h\n",
        "VMs         3 (2 running, 1 failed)\n",
        "pool        60 GiB free of 100 GiB, at /var/lib/scalebox\n",
        "committed   120 GiB of at most 400 GiB\n",
        "memory      1.5 GiB of 8 GiB available\n",
    ] {
        assert!(status.out.contains(line), "{line:?} in\n{}", status.out);
    }
    assert_eq!((status.code, status.err.as_str()), (0, ""));
    let fine = run(&mut home.scalebox(&server, &["pool", "show"]));
    for line in [
        "used                      25 GiB (25 %)\n",
        "  exclusive to VMs        15 GiB\n",
        "  exclusive to templates  2 GiB\n",
        "  shared                  7 GiB\n",
        "  other                   1 GiB\n",
        "  will last               12.5 days at the rate of the last day\n",
    ] {
        assert!(fine.out.contains(line), "{line:?} in\n{}", fine.out);
    }
    assert_eq!(fine.err, "");
    let full = run(&mut home.scalebox(&server, &["pool", "show"]));
    assert_eq!(
        full.err,
        "warning: the pool is full: the server refuses new VMs until space is freed\n"
    );
}

#[test]
fn flags_take_precedence_over_the_environment_and_the_file() {
    let server = Server::new(vec![("GET /vms", 200, json!({"vms": []}))]);
    let home = Home::new();
    let url = server.url();
    home.file(
        ".config/scalebox/config",
        &format!("# mine\nSCALEBOX_URL={url}\nSCALEBOX_TOKEN=from-file\n"),
        0o600,
    );
    let all = ["--url", &url, "--token", "from-flag", "vm", "list"];
    let environment = ("SCALEBOX_TOKEN", "from-env");
    let ran = [
        run(home
            .bare(&all)
            .env(environment.0, environment.1)
            .env("SCALEBOX_URL", "http://127.0.0.1:1")),
        run(home.bare(&["vm", "list"]).env(environment.0, environment.1)),
        run(&mut home.bare(&["vm", "list"])),
        run(home.bare(&["vm", "list"]).env("SCALEBOX_TOKEN", "")),
    ];
    for ran in &ran {
        assert_eq!(
            (ran.code, ran.out.as_str(), ran.err.as_str()),
            (0, "", "no VMs; create one with: scalebox vm create\n")
        );
    }
    let tokens: Vec<String> = server
        .requests()
        .into_iter()
        .map(|request| request.authorization)
        .collect();
    assert_eq!(
        tokens,
        [
            "Bearer from-flag",
            "Bearer from-env",
            "Bearer from-file",
            "Bearer from-file"
        ]
    );
}

#[test]
fn a_missing_token_error_names_all_three_places() {
    let ran = run(&mut Home::new().bare(&["vm", "list"]));
    assert_eq!((ran.code, ran.out.as_str()), (2, ""));
    for place in ["SCALEBOX_TOKEN", ".config/scalebox/config", "--token"] {
        assert!(
            ran.err.starts_with("error: no API token") && ran.err.contains(place),
            "{}",
            ran.err
        );
    }
}

#[test]
fn config_file_problems_are_reported_with_path_and_line() {
    let server = Server::new(vec![("GET /vms", 200, json!({"vms": []}))]);
    let home = Home::new();
    let path = home.file(".config/scalebox/config", "SCALEBOX_TOKEN=x\n", 0o644);
    let ran = run(home.bare(&["vm", "list"]).env("SCALEBOX_URL", server.url()));
    let path = path.display();
    let warning =
        format!("warning: {path} holds a token and is readable or writable by other users; run: chmod 600 {path}\n");
    assert!(ran.code == 0 && ran.err.starts_with(&warning), "{ran:?}");
    home.file(".config/scalebox/config", "\nSCALEBOX_TOKE=x\n", 0o600);
    let ran = run(home.bare(&["vm", "list"]).env("SCALEBOX_URL", server.url()));
    assert_eq!(ran.code, 2);
    assert!(
        ran.err
            .starts_with(&format!("error: {path}, line 2: unknown setting \"SCALEBOX_TOKE\"")),
        "{}",
        ran.err
    );
}

#[test]
fn refusals_print_the_servers_message_and_exit_with_1() {
    let home = Home::new();
    home.file(".ssh/id_rsa.pub", &format!("{KEY}\n"), 0o644);
    let sentence = "Insufficient storage: 5GB available, need 12GB";
    let body = json!({
        "error": sentence, "code": "insufficient_storage", "details": {"available_gib": 5, "need_gib": 12},
    });
    let server = Server::new(vec![("POST /vms", 507, body.clone())]);
    let create = ["vm", "create", "--disk", "10"];
    let ran = run(&mut home.scalebox(&server, &create));
    assert_eq!(
        (ran.code, ran.out.as_str(), ran.err),
        (1, "", format!("error: {sentence}\n"))
    );
    let ran = run(home.scalebox(&server, &create).arg("--json"));
    assert_eq!((ran.code, ran.out.as_str()), (1, ""));
    assert_eq!(serde_json::from_str::<Value>(&ran.err).unwrap(), body);
}

#[test]
fn a_refused_token_error_names_its_source_and_never_shows_it() {
    let server = Server::new(vec![("GET /vms", 401, json!({"error": "unauthorized"}))]);
    let home = Home::new();
    home.file(".config/scalebox/config", "SCALEBOX_TOKEN=file-secret\n", 0o600);
    let url = server.url();
    let in_file = run(&mut home.bare(&["vm", "list", "--url", &url]));
    assert!(in_file.err.contains(&format!(
        "the server at {url} refused the token from {}",
        home.path().display()
    )));
    for (ran, place) in [
        (
            run(&mut home.scalebox(&server, &["vm", "list"])),
            "from SCALEBOX_TOKEN;",
        ),
        (
            run(&mut home.scalebox(&server, &["vm", "list", "--token", "flag-secret"])),
            "from --token;",
        ),
        (in_file, "config;"),
    ] {
        assert_eq!((ran.code, ran.out.as_str()), (1, ""));
        assert!(ran.err.contains(place), "{}", ran.err);
        assert!(
            !ran.err.contains("s3cret") && !ran.err.contains("-secret"),
            "{}",
            ran.err
        );
    }
}

#[test]
fn an_unreachable_server_exits_with_1_and_a_remedy() {
    let url = format!(
        "http://{}",
        TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
    );
    let ran = run(Home::new()
        .bare(&["status", "--url", &url])
        .env("SCALEBOX_TOKEN", TOKEN));
    let expected = format!(
        "error: cannot reach scaleboxd at {url}: connection refused; is it running? (systemctl status scaleboxd)\n"
    );
    assert_eq!(
        (ran.code, ran.out.as_str(), ran.err.as_str()),
        (1, "", expected.as_str())
    );
}

#[test]
fn addresses_and_tokens_may_have_odd_case_and_white_space() {
    let server = Server::new(vec![("GET /vms", 200, json!({"vms": []}))]);
    let home = Home::new();
    let upper_case = server.url().replace("http", "HTTP");
    for url in [
        upper_case,
        format!(" {}/ ", server.url()),
        format!("{}\n", server.url()),
    ] {
        let mut command = home.bare(&["vm", "list", "--json"]);
        let ran = run(command
            .env("SCALEBOX_URL", &url)
            .env("SCALEBOX_TOKEN", format!("{TOKEN}\n")));
        assert_eq!(ran.code, 0, "{url:?}: {}", ran.err);
    }
    assert!(
        server
            .requests()
            .iter()
            .all(|request| request.authorization == format!("Bearer {TOKEN}"))
    );
    // This file is as an editor on Windows saves it: a byte order mark, CRLF, and a comment in
    // Latin-1.
    let config = home.file(".config/scalebox/config", "", 0o600);
    let text = format!(
        "\u{feff}SCALEBOX_URL={}\r\nSCALEBOX_TOKEN={TOKEN}\r\n# Schl\u{1}ssel\r\n",
        server.url()
    );
    std::fs::write(
        config,
        text.into_bytes()
            .into_iter()
            .map(|byte| if byte == 1 { 0xfc } else { byte })
            .collect::<Vec<_>>(),
    )
    .unwrap();
    let ran = run(&mut home.bare(&["vm", "list", "--json"]));
    assert_eq!(ran.code, 0, "{}", ran.err);
}

#[test]
fn unknown_routes_behind_a_path_in_the_address_get_a_hint() {
    let error = json!({"error": "there is no route \"/api/vms\""});
    let server = Server::new(vec![("GET /api/vms", 404, error)]);
    let ran = run(Home::new()
        .scalebox(&server, &["vm", "list"])
        .env("SCALEBOX_URL", server.url() + "/api/"));
    assert_eq!(ran.code, 1);
    assert!(
        ran.err
            .contains("has the path /api: remove it unless a proxy strips it"),
        "{}",
        ran.err
    );
}

#[test]
fn a_variable_that_is_not_utf8_is_rejected() {
    use std::os::unix::ffi::OsStrExt;
    let odd = std::ffi::OsStr::from_bytes(b"http://caf\xe9:8080");
    let ran = run(Home::new()
        .bare(&["status"])
        .env("SCALEBOX_URL", odd)
        .env("SCALEBOX_TOKEN", TOKEN));
    assert!(
        ran.code == 2 && ran.err.contains("is not the address of a server"),
        "{ran:?}"
    );
}

#[test]
fn number_flags_reject_other_text_with_an_example() {
    let server = Server::new(vec![]);
    let home = Home::new();
    for number in [
        "", " 10", "+10", "-10", "10.0", "1e3", "0x10", "10G", "10GiB", "ten", "1_0", "\u{661}",
    ] {
        for command in [
            &["vm", "create", "--disk"][..],
            &["vm", "create", "--vcpus"],
            &["vm", "create", "--memory"],
            &["vm", "create", "--extend-to"],
            &["vm", "create", "--net-mbps"],
            &["vm", "set", "box", "--disk-iops"],
            &["vm", "resize", "box", "--disk"],
            &["pool", "grow", "--size"],
            &["events", "--since"],
        ] {
            let flag = command.last().unwrap();
            let ran = run(home
                .scalebox(&server, &command[..command.len() - 1])
                .arg(format!("{flag}={number}")));
            assert!(
                ran.code == 2 && ran.err.contains(flag) && ran.err.contains("such as 10"),
                "{command:?} {number:?}: {}",
                ran.err
            );
        }
    }
    for large in ["18446744073709551616", "99999999999999999999999"] {
        let ran = run(&mut home.scalebox(&server, &["vm", "create", "--disk", large]));
        assert!(
            ran.code == 2 && ran.err.contains("--disk") && ran.err.contains("too large"),
            "{}",
            ran.err
        );
    }
    assert!(server.requests().is_empty());
}

#[test]
fn all_default_key_files_are_found_and_invalid_keys_are_rejected() {
    // Generated by `ssh-keygen -t ed25519-sk`.
    const SK: &str = "sk-ssh-ed25519@openssh.com AAAAGnNrLXNzaC1lZDI1NTE5QG9wZW5zc2guY29tAAAAIKu6/ItCJ89EaUvwZxaYjzC8kOadG6pYNRTO562Y9T9SAAAABHNzaDo=";
    let server = Server::new(vec![("POST /vms", 201, vm(json!({"status": "stopped"})))]);
    let home = Home::new();
    let sent = |arguments: &[&str]| {
        let ran = run(home.scalebox(&server, &["vm", "create", "--no-start"]).args(arguments));
        assert_eq!(ran.code, 0, "{}", ran.err);
        let body: Value = serde_json::from_str(&server.requests().last().unwrap().body).unwrap();
        body["ssh_public_key"].as_str().unwrap().to_owned()
    };
    home.file(".ssh/id_ecdsa_sk.pub", "not this one", 0o644);
    home.file(".ssh/id_ed25519_sk.pub", &format!("{SK} me\r\n"), 0o644);
    assert_eq!(sent(&[]), format!("{SK} me"));
    home.file(".ssh/id_ed25519.pub", &format!("{KEY}\n"), 0o644);
    assert_eq!(sent(&[]), KEY);

    let refused = |name: &str, text: &[u8]| {
        let path = home.file(name, "", 0o644);
        std::fs::write(&path, text).unwrap();
        let ran = run(home.scalebox(&server, &["vm", "create", "--key"]).arg(&path));
        assert_eq!(ran.code, 2, "{name}");
        ran.err
    };
    let wide: Vec<u8> = KEY.encode_utf16().flat_map(u16::to_le_bytes).collect();
    assert!(refused("wide.pub", &[b"\xff\xfe".to_vec(), wide].concat()).contains("UTF-16"));
    assert!(refused("two.pub", format!("{KEY}\n{KEY}\n").as_bytes()).contains("one line with one key"));
    assert!(refused("twice.pub", format!("{KEY} {KEY}").as_bytes()).contains("must be one key"));
    assert!(refused("empty.pub", b"\n").contains("such as: ssh-ed25519"));
}

#[test]
fn usage_errors_exit_with_2_without_a_request() {
    let server = Server::new(vec![]);
    let home = Home::new();
    for arguments in [
        &["vm"][..],
        &["vm", "lst"],
        &["vm", "get"],
        &["vm", "get", ""],
        &["vm", "delete"],
        &["vm", "create", "../x"],
        &["vm", "create", "--name", "Bad_Name"],
        &["vm", "create", "--disk", "ten"],
        &["vm", "create", "a", "--template", "b"],
        &["vm", "create", "a", "--image", "b:1"],
        &["vm", "create", "--image", "a b"],
        &["vm", "wait", "box", "--timeout", "0"],
        &["vm", "create", "--key", "/no/such/file"],
        &["--url", "localhost:8080", "status"],
    ] {
        let ran = run(&mut home.scalebox(&server, arguments));
        assert_eq!((ran.code, ran.out.as_str()), (2, ""), "{arguments:?}: {}", ran.err);
    }
    assert!(server.requests().is_empty());
}

#[test]
fn create_waits_for_the_pull_of_an_image() {
    let pending = json!({"error": "it is still being pulled", "code": "timeout", "details": {"job": "job-0"}});
    let created = vm(json!({"status": "stopped", "template": "box-1"}));
    let server = Server::new(vec![("POST /vms", 504, pending), ("POST /vms", 201, created)]);
    let home = Home::new();
    home.file(".ssh/id_ed25519.pub", &format!("{KEY}\n"), 0o644);
    let arguments = ["vm", "create", "--image", "team/box:1", "--no-start", "--json"];
    let ran = run(&mut home.scalebox(&server, &arguments));
    assert_eq!(ran.code, 0, "{}", ran.err);
    let printed: Value = serde_json::from_str(&ran.out).unwrap();
    assert_eq!(printed["template"], "box-1");
    let sent = server.requests();
    let expected = json!({"image": "team/box:1", "ssh_public_key": KEY, "start": false});
    assert_eq!(sent.len(), 2);
    for request in sent {
        assert_eq!(serde_json::from_str::<Value>(&request.body).unwrap(), expected);
    }
}

#[test]
fn create_sends_its_flags_and_the_first_default_key() {
    let server = Server::new(vec![("POST /vms", 201, vm(json!({"status": "stopped"})))]);
    let home = Home::new();
    home.file(".ssh/id_rsa.pub", "not this one", 0o644);
    home.file(".ssh/id_ed25519.pub", &format!("{KEY}\n"), 0o644);
    let arguments = [
        "vm",
        "create",
        "custom",
        "--name",
        "box",
        "--disk",
        "10",
        "--vcpus",
        "2",
        "--memory",
        "1024",
        "--no-start",
        "--env",
        "A=b=c",
        "--restart",
        "always",
        "--",
        "nginx",
        "-g",
        "daemon off;",
    ];
    let ran = run(&mut home.scalebox(&server, &arguments));
    assert_eq!((ran.code, ran.err.as_str()), (0, ""));
    assert_eq!(
        ran.out,
        "calm-red-fox (vm-0123456789ab) is stopped: 10 GiB disk, 1 CPU, 512 MiB memory\n\
         start it with: scalebox vm start calm-red-fox\n"
    );
    run(&mut home.scalebox(&server, &["vm", "create", "--template", "debian-base"]));
    run(&mut home.scalebox(&server, &["vm", "create", "web", "--no-main"]));
    let sent: Vec<Value> = server
        .requests()
        .iter()
        .map(|request| serde_json::from_str(&request.body).unwrap())
        .collect();
    let everything = json!({"template": "custom", "env": {"A": "b=c"},
        "main": {"argv": ["nginx", "-g", "daemon off;"], "restart": "always"}, "ssh_public_key": KEY, "name": "box", "disk_size_gib": 10,
        "vcpu_count": 2, "mem_size_mib": 1024, "start": false});
    let nothing = json!({"template": "debian-base", "ssh_public_key": KEY, "start": true});
    let without = json!({"template": "web", "ssh_public_key": KEY, "main": {"run": false}, "start": true});
    assert_eq!(sent, [everything, nothing, without]);
}

#[test]
fn unusable_keys_are_reported_without_a_request() {
    let server = Server::new(vec![]);
    let home = Home::new();
    let private = home.file(".ssh/mine", "-----BEGIN OPENSSH PRIVATE KEY-----\nc2VjcmV0\n", 0o600);
    home.file(".ssh/mine.pub", KEY, 0o644);
    let ran = run(home.scalebox(&server, &["vm", "create", "--key"]).arg(&private));
    let hint = format!("did you mean {}.pub?\n", private.display());
    assert!(
        ran.code == 2 && ran.err.ends_with(&hint) && !ran.err.contains("c2VjcmV0"),
        "{}",
        ran.err
    );
    assert!(server.requests().is_empty());
}

#[test]
fn devices_pipes_and_large_files_are_rejected_as_keys() {
    let server = Server::new(vec![]);
    let home = Home::new();
    let large = home.file("large", &"x".repeat((64 << 10) + 1), 0o600);
    let pipe = large.with_file_name("pipe");
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let link = large.with_file_name("link");
    symlink("/dev/zero", &link).unwrap();
    for (key, reason) in [
        (Path::new("/dev/zero"), "not a regular file"),
        (&link, "not a regular file"),
        (&pipe, "not a regular file"),
        (large.parent().unwrap(), "not a regular file"),
        (&large, "longer than 64 KiB"),
    ] {
        let (code, err) = run_with_a_deadline(home.scalebox(&server, &["vm", "create", "--key"]).arg(key));
        let named = format!("error: {}: the SSH key is ", key.display());
        assert!(
            code == Some(2) && err.starts_with(&named) && err.contains(reason),
            "{err}"
        );
    }
    assert!(server.requests().is_empty());
}

#[test]
fn a_key_may_be_a_symbolic_link() {
    let server = Server::new(vec![("POST /vms", 201, vm(json!({})))]);
    let home = Home::new();
    let key = home.file("key.pub", KEY, 0o644);
    let link = key.with_file_name("link.pub");
    symlink(&key, &link).unwrap();
    let ran = run(home.scalebox(&server, &["vm", "create", "--key"]).arg(link));
    assert_eq!(ran.code, 0, "{}", ran.err);
}

/// Runs a command and returns its exit code and standard error. Kills it after 20 s; then there is
/// no exit code.
fn run_with_a_deadline(command: &mut Command) -> (Option<i32>, String) {
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let mut stderr = child.stderr.take().unwrap();
    let (sender, done) = mpsc::channel();
    let reader = thread::spawn(move || {
        let text = io::read_to_string(&mut stderr).unwrap();
        sender.send(()).unwrap();
        text
    });
    if done.recv_timeout(Duration::from_secs(20)).is_err() {
        child.kill().unwrap();
    }
    (child.wait().unwrap().code(), reader.join().unwrap())
}

/// Starts a server that sends one of `greetings` per connection, repeating the last one. An empty
/// greeting closes the connection. Returns its port.
fn guest(greetings: Vec<&'static str>) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        let mut greetings = greetings.into_iter().peekable();
        let mut greeting = "";
        for mut stream in listener.incoming().flatten() {
            greeting = greetings.next().unwrap_or(greeting);
            let _ = stream.write_all(greeting.as_bytes());
        }
    });
    port
}

#[test]
fn wait_needs_an_ssh_banner_not_just_a_connection() {
    let port = guest(vec!["", "", "Welcome\r\nSSH-2.0-OpenSSH_9.2\r\n"]);
    let server = Server::new(vec![
        ("GET /vms/box", 200, vm(json!({"ssh_port": port}))),
        ("GET /vms/vm-0123456789ab", 200, vm(json!({"ssh_port": port}))),
    ]);
    let home = Home::new();
    let ran = run(&mut home.scalebox(&server, &["vm", "wait", "box"]));
    assert_eq!(
        (ran.code, ran.err.as_str()),
        (0, ""),
        "in a pipe, only the result is printed"
    );
    assert!(
        ran.out.starts_with("calm-red-fox responds to SSH (waited ") && ran.out.lines().count() == 1,
        "{}",
        ran.out
    );
    let again = run(&mut home.scalebox(&server, &["vm", "wait", "box", "--json"]));
    assert_eq!(
        serde_json::from_str::<Value>(&again.out).unwrap()["ssh_port"],
        json!(port)
    );
}

#[test]
fn create_with_wait_prints_how_to_log_in() {
    let port = guest(vec!["SSH-2.0-x\r\n"]);
    let created = vm(json!({"ssh_port": port}));
    let server = Server::new(vec![
        ("POST /vms", 201, created.clone()),
        ("GET /vms/vm-0123456789ab", 200, created),
    ]);
    let home = Home::new();
    let key = home.file("key.pub", KEY, 0o644);
    let ran = run(home.scalebox(&server, &["vm", "create", "--wait", "--key"]).arg(key));
    assert_eq!((ran.code, ran.err.as_str()), (0, ""));
    assert!(
        ran.out.contains("responds to SSH") && ran.out.contains("log in with: scalebox vm ssh calm-red-fox\n"),
        "{}",
        ran.out
    );
}

#[test]
fn wait_fails_with_the_reason_when_the_vm_fails() {
    let port = guest(vec![""]);
    let failed = json!({"ssh_port": port, "status": "failed", "status_reason": "its process ended: out of memory"});
    let server = Server::new(vec![
        ("GET /vms/box", 200, vm(json!({"ssh_port": port}))),
        ("GET /vms/vm-0123456789ab", 200, vm(failed)),
    ]);
    let ran = run(&mut Home::new().scalebox(&server, &["vm", "wait", "box"]));
    assert_eq!(
        (ran.code, ran.out.as_str(), ran.err.as_str()),
        (
            1,
            "",
            "error: calm-red-fox is failed (its process ended: out of memory); see: scalebox vm get calm-red-fox\n"
        )
    );
}

#[test]
fn wait_times_out() {
    let port = guest(vec!["HTTP/1.1 400 Bad Request\r\n"]);
    let server = Server::new(vec![("GET /vms/box", 200, vm(json!({"ssh_port": port})))]);
    let ran = run(&mut Home::new().scalebox(&server, &["vm", "wait", "box", "--timeout", "1"]));
    let expected = format!("error: calm-red-fox did not answer SSH at 127.0.0.1:{port} within 1 s (");
    assert!(ran.code == 1 && ran.err.starts_with(&expected), "{ran:?}");
}

#[test]
fn delete_continues_after_a_refusal_and_exits_with_1() {
    let server = Server::new(vec![
        ("DELETE /vms/a", 204, json!(null)),
        ("DELETE /vms/b", 404, json!({"error": "there is no VM b"})),
        ("DELETE /vms/c", 204, json!(null)),
    ]);
    let home = Home::new();
    let ran = run(&mut home.scalebox(&server, &["vm", "delete", "--yes", "a", "b", "c"]));
    assert_eq!((ran.code, ran.out.as_str()), (1, "deleted a\ndeleted c\n"));
    assert_eq!(ran.err, "error: there is no VM b\nerror: 1 of 3 could not be deleted\n");
    let json = run(&mut home.scalebox(&server, &["vm", "delete", "a", "c", "--json"]));
    assert_eq!(
        serde_json::from_str::<Value>(&json.out).unwrap(),
        json!({"deleted": ["a", "c"]})
    );
    let alone = run(&mut home.scalebox(&server, &["vm", "delete", "b"]));
    assert_eq!((alone.code, alone.err.as_str()), (1, "error: there is no VM b\n"));
    let template = run(&mut home.scalebox(&server, &["template", "delete", "x"]));
    assert_eq!(
        (template.code, template.err.as_str()),
        (1, "error: nothing at DELETE /templates/x\n")
    );
}

/// Puts a fake `ssh` that runs `script` first into the search path.
fn with_ssh(home: &Home, command: &mut Command, script: &str) {
    home.file("bin/ssh", &format!("#!/bin/sh\n{script}\n"), 0o755);
    let path = std::env::var("PATH").unwrap();
    command.env("PATH", format!("{}:{path}", home.path().join("bin").display()));
}

#[test]
fn ssh_stores_host_keys_by_vm_id() {
    let server = Server::new(vec![("GET /vms/box", 200, vm(json!({})))]);
    let home = Home::new();
    let identity = home.file("my key", "", 0o600);
    let mut command = home.scalebox(&server, &["vm", "ssh", "box", "-i"]);
    command.arg(&identity);
    let real = run(Command::new("sh").args(["-c", "command -v ssh"])).out;
    with_ssh(&home, &mut command, &format!("exec {} -F none -G \"$@\"", real.trim()));
    let ran = run(&mut command);
    assert_eq!(ran.code, 0, "the real ssh accepts the options: {}", ran.err);
    let known_hosts = home.path().join(".local/state/scalebox/known_hosts");
    for line in [
        "user user\n",
        "hostname 127.0.0.1\n",
        "port 22001\n",
        "hostkeyalias vm-0123456789ab\n",
        &format!("identityfile {}\n", identity.display()),
        "identitiesonly yes\n",
        "stricthostkeychecking accept-new\n",
        &format!("userknownhostsfile {}\n", known_hosts.display()),
    ] {
        assert!(ran.out.contains(line), "{line:?} in\n{}", ran.out);
    }
    assert!(known_hosts.parent().unwrap().is_dir());
}

#[test]
fn ssh_receives_the_command_unchanged_and_its_exit_code_is_returned() {
    let server = Server::new(vec![("GET /vms/box", 200, vm(json!({})))]);
    let home = Home::new();
    let script = "while [ \"$1\" != -- ]; do shift; done; printf '%s|' \"$@\"; exit 7";
    for (arguments, sent) in [
        (&["df", "-h", "/"][..], "--|user@127.0.0.1|df|-h|/|"),
        (&["--", "-v", "--json"], "--|user@127.0.0.1|-v|--json|"),
        (
            &["sh", "-c", "echo $HOME; --token x"],
            "--|user@127.0.0.1|sh|-c|echo $HOME; --token x|",
        ),
        (&[], "--|user@127.0.0.1|"),
    ] {
        let mut command = home.scalebox(&server, &["vm", "ssh", "box"]);
        command.args(arguments);
        with_ssh(&home, &mut command, script);
        let ran = run(&mut command);
        assert_eq!((ran.code, ran.out.as_str()), (7, sent), "{}", ran.err);
    }
}

#[test]
fn pool_commands_print_the_new_size_or_the_discarded_bytes() {
    for (args, request) in [
        (&["pool", "grow", "--size", "100"][..], "POST /pool/grow"),
        (&["pool", "grow"], "POST /pool/grow"),
        (&["pool", "shrink", "--size", "40"], "POST /pool/shrink"),
    ] {
        let server = Server::new(vec![(request, 200, pool())]);
        let ran = run(&mut Home::new().scalebox(&server, args));
        let expected = "the pool's capacity is 100 GiB, of which 60 GiB are free\n";
        assert_eq!((ran.code, ran.out.as_str()), (0, expected), "{}", ran.err);
    }
    let server = Server::new(vec![("POST /pool/trim", 200, json!({"trimmed_bytes": 3u64 << 30}))]);
    let ran = run(&mut Home::new().scalebox(&server, &["pool", "trim"]));
    assert_eq!((ran.code, ran.out.as_str()), (0, "discarded 3 GiB\n"));
    let trimmed = json!({"trimmed_bytes": 200u64 << 20});
    let server = Server::new(vec![("POST /vms/box/trim", 200, trimmed)]);
    let ran = run(&mut Home::new().scalebox(&server, &["vm", "trim", "box"]));
    assert_eq!((ran.code, ran.out.as_str()), (0, "box discarded 200 MiB\n"));
}

#[test]
fn resize_prints_the_new_size_and_the_servers_note() {
    for (disk, expected) in [
        (
            json!({"confirmed": true, "guest_total_bytes": 1}),
            "the disk of box has 20 GiB\n",
        ),
        (
            json!({"confirmed": false, "guest_total_bytes": null, "note": "run resize2fs in it"}),
            "the disk of box has 20 GiB\nrun resize2fs in it\n",
        ),
    ] {
        let grown = vm(json!({"name": "box", "disk_size_gib": 20, "disk": disk}));
        let server = Server::new(vec![("PATCH /vms/box", 200, grown)]);
        let ran = run(&mut Home::new().scalebox(&server, &["vm", "resize", "box", "--disk", "20"]));
        assert_eq!((ran.code, ran.out.as_str()), (0, expected), "{}", ran.err);
    }
}

#[test]
fn set_sends_only_the_settings_that_were_given() {
    let policy = json!({"threshold_percent": 80, "increment_gib": 10, "limit_gib": 50});
    for (args, sent, expected) in [
        (
            &["--extend-to", "50", "--extend-by", "10"][..],
            json!({"disk_auto_extend": policy}),
            "extends    by 10 GiB at 80 % usage, up to 50 GiB\nlimits     none\n\
             autostart  after a reboot of the host, if it was running\n",
        ),
        (
            &[
                "--no-extend",
                "--disk-iops",
                "500",
                "--net-mbps",
                "none",
                "--autostart",
                "off",
            ],
            json!({"disk_auto_extend": null, "disk_iops": 500, "net_mbps": null, "autostart": false}),
            "extends    no\nlimits     500 disk IOPS\nautostart  no\n",
        ),
    ] {
        let mut answer = vm(json!({"name": "box"}));
        for (field, value) in sent.as_object().unwrap().iter().filter(|(_, value)| !value.is_null()) {
            answer[field] = value.clone();
        }
        let server = Server::new(vec![("PATCH /vms/box", 200, answer)]);
        let ran = run(&mut Home::new().scalebox(&server, &[&["vm", "set", "box"], args].concat()));
        assert_eq!((ran.code, ran.out.as_str()), (0, expected), "{}", ran.err);
        let body: Value = serde_json::from_str(&server.requests()[0].body).unwrap();
        assert_eq!(body, sent);
    }
    for args in [
        &[][..],
        &["--extend-by", "10"],
        &["--extend-to", "50", "--no-extend"],
        &["--disk-iops", "many"],
        &["--autostart", "maybe"],
    ] {
        let server = Server::new(Vec::new());
        let ran = run(&mut Home::new().scalebox(&server, &[&["vm", "set", "box"], args].concat()));
        assert_eq!((ran.code, server.requests().len()), (2, 0), "{args:?}: {}", ran.err);
    }
}

#[test]
fn ssh_to_a_stopped_vm_fails_with_the_command_to_start_it() {
    let server = Server::new(vec![(
        "GET /vms/box",
        200,
        vm(json!({"name": "box", "status": "stopped"})),
    )]);
    let ran = run(&mut Home::new().scalebox(&server, &["vm", "ssh", "box"]));
    assert_eq!(
        (ran.code, ran.err.as_str()),
        (1, "error: box is stopped; start it with: scalebox vm start box\n")
    );
}

#[test]
fn a_closed_pipe_is_not_an_error() {
    let many: Vec<Value> = (0..5000).map(|_| vm(json!({}))).collect();
    let server = Server::new(vec![("GET /vms", 200, json!({"vms": many}))]);
    let home = Home::new();
    for arguments in [&["vm", "list"][..], &["vm", "list", "--json"], &["completions", "bash"]] {
        let mut child = home
            .scalebox(&server, arguments)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        drop(child.stdout.take());
        let output = child.wait_with_output().unwrap();
        assert_eq!(
            (output.status.code(), output.stderr),
            (Some(0), vec![]),
            "{arguments:?}"
        );
    }
}

#[test]
fn every_command_has_an_example_in_its_help_and_a_completion() {
    let home = Home::new();
    let commands = [
        "create", "list", "get", "start", "stop", "resize", "delete", "wait", "ssh",
    ]
    .map(|command| vec!["vm", command]);
    let others = [
        vec!["status"],
        vec!["template", "list"],
        vec!["template", "delete"],
        vec!["pool", "show"],
        vec!["completions"],
        vec!["run"],
        vec!["exec"],
        vec!["shell"],
        vec!["cp"],
        vec!["logs"],
        vec!["stats"],
        vec!["login"],
        vec!["logout"],
    ];
    for command in commands.into_iter().chain(others).chain([vec![]]) {
        let help = run(home.bare(&command).arg("--help"));
        assert!(
            help.code == 0 && help.out.contains("Example") && help.out.contains("  scalebox "),
            "{}",
            help.out
        );
    }
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = run(&mut home.bare(&["completions", shell]));
        assert!(
            script.code == 0 && script.out.contains("COMPLETE"),
            "{shell}: {}",
            script.out
        );
    }
}

/// Returns two events in the server's stream format.
fn stream() -> Value {
    let created = json!({"id": 1000000001u64, "at": "2026-01-02T03:04:05.678Z", "kind": "created",
                         "vm": {"id": "vm-0123456789ab", "name": "calm-red-fox"}, "details": {"disk_size_gib": 10, "template": "debian-base"}});
    let failed = json!({"id": 1000000002u64, "at": "2026-01-02T03:04:06.789Z", "kind": "failed",
                        "vm": {"id": "vm-0123456789ab", "name": "calm-red-fox"}, "details": {"reason": "it said:\nhello"}});
    let event = |event: &Value| format!("id: {}\nevent: {}\ndata: {event}\n\n", event["id"], event["kind"]);
    json!(format!(
        ": here\nid: 1000000000\n\n{}{}",
        event(&created),
        event(&failed)
    ))
}

#[test]
fn events_are_printed_one_per_line() {
    let server = Server::new(vec![("GET /events?follow=false&since=0", 200, stream())]);
    let ran = run(&mut Home::new().scalebox(&server, &["events", "--no-follow"]));
    assert_eq!((ran.code, ran.err.as_str()), (0, ""));
    let lines: Vec<_> = ran.out.lines().collect();
    assert_eq!(
        lines,
        [
            "2026-01-02T03:04:05.678Z  created           calm-red-fox              disk_size_gib=10 template=debian-base",
            "2026-01-02T03:04:06.789Z  failed            calm-red-fox              reason=\"it said:\\nhello\"",
        ]
    );
    let ran = run(&mut Home::new().scalebox(&server, &["events", "--no-follow", "--json"]));
    let read: Vec<Value> = ran
        .out
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!((read.len(), &read[1]["kind"]), (2, &json!("failed")));
}

#[test]
fn events_resume_after_the_last_one_when_the_connection_is_lost() {
    let server = Server::new(vec![
        ("GET /events?follow=true&since=7", 200, stream()),
        ("GET /events?follow=true&since=1000000002", 401, json!({"error": "no"})),
    ]);
    let ran = run(&mut Home::new().scalebox(&server, &["events", "--since", "7"]));
    assert_eq!((ran.code, ran.out.lines().count()), (1, 2), "{ran:?}");
    assert!(ran.err.contains("reconnecting"), "{ran:?}");
}
