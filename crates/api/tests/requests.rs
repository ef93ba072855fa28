//! Tests which requests are valid, and the message for each invalid one.

use proptest::prelude::*;
use scalebox_api::{
    AutoExtend, CreateMain, CreateVm, Invalid, Limits, RestartPolicy, SshPublicKey, UpdateVm, VmSource,
};
use serde_json::{Value, json};

const KEY: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIKu6/ItCJ89EaUvwZxaYjzC8kOadG6pYNRTO562Y9T9S me@laptop";
const LIMITS: Limits = Limits {
    max_disk_size_gib: 100,
    max_vcpus: 4,
    min_mem_mib: 128,
    max_mem_mib: 4096,
};
const DISK: &str = "disk_size_gib must be between 1 and 100";
const VCPUS: &str = "vcpu_count must be a whole number between 1 and 4";
const MEM: &str = "mem_size_mib must be a whole number between 128 and 4096";
const FIELDS: &str = "template, image, ssh_public_key, name, vcpu_count, mem_size_mib, disk_size_gib, disk_auto_extend, disk_iops, disk_mbps, net_mbps, autostart, env, main, start";
const EXTEND: AutoExtend = AutoExtend {
    threshold_percent: 80,
    increment_gib: 5,
    limit_gib: 50,
};

fn parse(body: &str) -> Result<CreateVm, Invalid> {
    CreateVm::parse(body.as_bytes(), &LIMITS)
}

/// Parses a valid request in which `field` is set to the JSON text `value`.
fn with(field: &str, value: &str) -> Result<CreateVm, Invalid> {
    let others: Vec<String> = [("template", json!("debian-base")), ("ssh_public_key", json!(KEY))]
        .iter()
        .filter(|(name, _)| *name != field)
        .map(|(name, value)| format!("{name:?}: {value}, "))
        .collect();
    parse(&format!("{{{}{field:?}: {value}}}", others.concat()))
}

/// Returns the error message of `result`.
fn refusal(result: Result<CreateVm, Invalid>) -> String {
    result.map_or_else(
        |invalid| invalid.to_string(),
        |request| format!("accepted: {request:?}"),
    )
}

#[test]
fn template_and_key_are_enough_and_the_vm_is_started() {
    let request = parse(&json!({"template": "debian-base", "ssh_public_key": KEY}).to_string()).unwrap();
    assert_eq!(
        request,
        CreateVm::new("debian-base".parse().unwrap(), Some(KEY.parse().unwrap()))
    );
    assert!(request.start);
}

#[test]
fn the_daemon_parses_what_the_client_serializes() {
    let request = CreateVm {
        name: Some("build-7".parse().unwrap()),
        vcpu_count: Some(2),
        mem_size_mib: Some(1024),
        disk_size_gib: Some(10),
        disk_auto_extend: Some(EXTEND),
        disk_iops: Some(500),
        disk_mbps: Some(20),
        net_mbps: Some(100),
        autostart: false,
        env: [("A".to_owned(), "b=c".to_owned())].into(),
        main: Some(CreateMain {
            argv: Some(vec!["nginx".into()]),
            restart: RestartPolicy::Never,
            ..CreateMain::default()
        }),
        start: false,
        ..CreateVm::new("debian-base".parse().unwrap(), Some(KEY.parse().unwrap()))
    };
    assert_eq!(
        CreateVm::parse(&serde_json::to_vec(&request).unwrap(), &LIMITS),
        Ok(request)
    );
    let changes = [
        UpdateVm::grow(20),
        UpdateVm {
            disk_auto_extend: Some(Some(EXTEND)),
            ..UpdateVm::grow(20)
        },
        UpdateVm {
            disk_auto_extend: Some(None),
            disk_iops: Some(Some(1)),
            disk_mbps: Some(None),
            net_mbps: Some(Some(1_000_000)),
            autostart: Some(true),
            ..UpdateVm::default()
        },
    ];
    for change in changes {
        let body = serde_json::to_vec(&change).unwrap();
        assert_eq!(UpdateVm::parse(&body, &LIMITS), Ok(change));
    }
}

#[test]
fn bodies_that_are_not_objects_are_rejected() {
    for (body, sentence) in [
        ("", format!("the request has no body: send a JSON object with {FIELDS}")),
        (
            " \n",
            format!("the request has no body: send a JSON object with {FIELDS}"),
        ),
        (
            "[]",
            format!("the body must be a JSON object with {FIELDS}; this is an array"),
        ),
        (
            " [1, {}]",
            format!("the body must be a JSON object with {FIELDS}; this is an array"),
        ),
        (
            "\"x\"",
            format!("the body must be a JSON object with {FIELDS}; this is a string"),
        ),
        (
            "null",
            format!("the body must be a JSON object with {FIELDS}; this is null"),
        ),
        (
            "1e400",
            format!("the body must be a JSON object with {FIELDS}; this is a number"),
        ),
        (
            "true",
            format!("the body must be a JSON object with {FIELDS}; this is true or false"),
        ),
    ] {
        assert_eq!(refusal(parse(body)), sentence, "{body:?}");
    }
    for body in [
        "hello",
        "{",
        "{}}",
        "{'a': 1}",
        "{\"a\": 1,}",
        "template=debian-base",
        "\u{feff}\u{feff}{}",
        "{} \u{feff}",
        "{\"\\ud800\": 1}",
    ] {
        assert!(refusal(parse(body)).starts_with("the body is not JSON: "), "{body:?}");
    }
    let marked = format!("\u{feff}{}", json!({"template": "debian-base", "ssh_public_key": KEY}));
    assert!(parse(&marked).is_ok(), "one byte order mark is ignored");
    let not_utf8 = CreateVm::parse(b"{\"name\": \"\xff\"}", &LIMITS).unwrap_err();
    assert!(not_utf8.to_string().starts_with("the body is not JSON: "), "{not_utf8}");
}

#[test]
fn unknown_fields_are_listed_with_suggestions() {
    for (field, meant) in [
        ("disk_size_gb", "disk_size_gib"),
        ("diskSizeGib", "disk_size_gib"),
        ("disk_size", "disk_size_gib"),
        ("disk", "disk_size_gib"),
        ("vcpus", "vcpu_count"),
        ("vcpuCount", "vcpu_count"),
        ("memory", "mem_size_mib"),
        ("mem", "mem_size_mib"),
        ("ssh_key", "ssh_public_key"),
        ("ssh-public-key", "ssh_public_key"),
        ("Template", "template"),
        ("tmplate", "template"),
        ("names", "name"),
    ] {
        let sentence = format!("unknown field {field:?} (did you mean {meant}?); the fields are {FIELDS}");
        // Unknown fields are reported before any problem with a known one.
        let missing_the_rest = parse(&json!({field: 1}).to_string());
        for result in [with(field, "1"), missing_the_rest] {
            assert_eq!(refusal(result), sentence);
        }
    }
    assert_eq!(
        refusal(with("colour", "1")),
        format!("unknown field \"colour\"; the fields are {FIELDS}")
    );
    assert_eq!(
        refusal(parse(r#"{"a\"b": 1, "colour": 2, "start": true}"#)),
        format!("unknown fields \"a\\\"b\", \"colour\"; the fields are {FIELDS}")
    );
}

#[test]
fn the_list_of_unknown_fields_is_limited() {
    let many: Vec<String> = (0..100_000).map(|i| format!("\"x{i}\":1")).collect();
    let sentence = refusal(parse(&format!("{{{}}}", many.join(","))));
    assert!(sentence.contains("and 99992 more"), "{sentence}");
    assert!(sentence.len() < 1000);
    let long = refusal(with(&"é".repeat(100_000), "1"));
    assert!(long.len() < 400, "{long}");
}

#[test]
fn duplicate_fields_are_rejected() {
    let body = r#"{"disk_size_gib": 1, "template": "a", "disk_size_gib": 10}"#;
    assert_eq!(refusal(parse(body)), "the field \"disk_size_gib\" is given twice");
}

#[test]
fn a_template_is_required_and_a_key_is_not() {
    let no_template = json!({"ssh_public_key": KEY}).to_string();
    assert_eq!(
        refusal(parse(&no_template)),
        "template is missing: send the name of a template, which GET /templates lists, or an image"
    );
    let no_key = parse(&json!({"template": "debian-base"}).to_string()).unwrap();
    assert_eq!(no_key, CreateVm::new("debian-base".parse().unwrap(), None));
    assert_eq!(
        serde_json::to_value(no_key).unwrap(),
        json!({"template": "debian-base", "start": true})
    );
    assert!(refusal(parse("{}")).starts_with("template is missing"));
}

#[test]
fn an_image_takes_the_place_of_a_template() {
    let body = json!({"image": "python:3.12-slim", "start": true});
    let request = parse(&body.to_string()).unwrap();
    let image = VmSource::Image("python:3.12-slim".parse().unwrap());
    assert_eq!(request, CreateVm::from_source(image, None));
    assert_eq!(serde_json::to_value(request).unwrap(), body);
    assert_eq!(
        refusal(with("image", "\"a:1\"")),
        "image cannot be combined with template: send one of them"
    );
    for value in ["\"\"", "\"a b\"", "\"a\\n\"", "7", "null"] {
        let refused = parse(&format!("{{\"image\": {value}}}")).unwrap_err();
        assert_eq!(refused.field(), Some("image"), "{value}");
    }
}

#[test]
fn every_invalid_disk_size_gets_the_documented_message() {
    for value in [
        "0",
        "-1",
        "-0",
        "1.5",
        "0.5",
        "100.5",
        "\"10\"",
        "\"\"",
        "1e300",
        "1e400",
        "-1e400",
        "1e-400",
        "null",
        "101",
        "200",
        "true",
        "[10]",
        "{}",
        "18446744073709551616",
        "100.00000000001",
    ] {
        assert_eq!(refusal(with("disk_size_gib", value)), DISK, "{value}");
        let resize = UpdateVm::parse(format!("{{\"disk_size_gib\": {value}}}").as_bytes(), &LIMITS);
        assert_eq!(resize.unwrap_err().to_string(), DISK, "{value}");
    }
    let small = Limits {
        max_disk_size_gib: 7,
        ..LIMITS
    };
    let refused = UpdateVm::parse(br#"{"disk_size_gib": 8}"#, &small).unwrap_err();
    assert_eq!(refused.to_string(), "disk_size_gib must be between 1 and 7");
}

#[test]
fn whole_numbers_may_have_any_json_form() {
    for (value, gib) in [
        ("1", 1),
        ("10", 10),
        ("10.0", 10),
        ("1e1", 10),
        ("1E+1", 10),
        ("1000e-1", 100),
        ("100", 100),
    ] {
        assert_eq!(with("disk_size_gib", value).expect(value).disk_size_gib, Some(gib));
    }
}

#[test]
fn processors_and_memory_are_limited_by_the_host() {
    for value in [
        "0",
        "-1",
        "1.5",
        "5",
        "4294967297",
        "1e300",
        "1e400",
        "\"2\"",
        "null",
        "[]",
    ] {
        assert_eq!(refusal(with("vcpu_count", value)), VCPUS, "{value}");
    }
    for value in ["0", "127", "4097", "-512", "512.5", "1e300", "\"512\"", "null", "{}"] {
        assert_eq!(refusal(with("mem_size_mib", value)), MEM, "{value}");
    }
    assert_eq!(with("vcpu_count", "4").unwrap().vcpu_count, Some(4));
    assert_eq!(with("mem_size_mib", "128").unwrap().mem_size_mib, Some(128));
}

#[test]
fn start_is_true_or_false() {
    assert!(!with("start", "false").unwrap().start);
    assert!(with("start", "true").unwrap().start);
    assert_eq!(refusal(with("start", "0")), "start must be true or false, not a number");
    assert_eq!(
        refusal(with("start", "\"false\"")),
        "start must be true or false, not a string"
    );
    assert_eq!(refusal(with("start", "null")), "start must be true or false, not null");
}

#[test]
fn invalid_main_processes_and_environments_are_rejected_by_field() {
    let large = format!(r#"{{"A": "{}"}}"#, "x".repeat(CreateVm::MAX_ENV_BYTES));
    for (field, value, message) in [
        ("main", "true", "main must be an object"),
        (
            "main",
            r#"{"argv": []}"#,
            "main.argv must begin with the name of a program",
        ),
        (
            "main",
            r#"{"argv": [""]}"#,
            "main.argv must begin with the name of a program",
        ),
        (
            "main",
            r#"{"argv": ["a", "b\u0000"]}"#,
            "main.argv must not contain a zero byte",
        ),
        (
            "main",
            r#"{"argv": ["a"], "run": false}"#,
            "main.argv must not be sent together with",
        ),
        (
            "main",
            r#"{"restart": "sometimes"}"#,
            "main.restart must be \"always\", \"on_failure\"",
        ),
        ("main", r#"{"run": "no"}"#, "main.run must be"),
        ("main", r#"{"command": "a"}"#, "main.command"),
        ("env", r#"{"A=B": "c"}"#, "env must not have the variable \"A=B\""),
        ("env", r#"{"A": 1}"#, "env"),
        ("env", &large, "env must have at most 65536 bytes"),
    ] {
        let refused = refusal(with(field, value));
        assert!(refused.contains(message), "{field} {value}: {refused}");
    }
    let main = with("main", "{}").unwrap().main;
    assert_eq!(main, Some(CreateMain::default()));
    assert_eq!(
        with("main", r#"{"run": false}"#).unwrap().main,
        Some(CreateMain::none())
    );
}

#[test]
fn errors_of_invalid_names_state_the_required_form() {
    for (field, value) in [
        ("template", "\"../x\""),
        ("template", "\"\""),
        ("template", "\"-debian\""),
        ("template", "\"a/b\""),
        ("template", "\"a\\u0000\""),
    ] {
        let sentence = refusal(with(field, value));
        assert!(
            sentence.starts_with("template must be 1 to 63 letters, digits,"),
            "{sentence}"
        );
    }
    let too_long = json!("a".repeat(64)).to_string();
    for value in ["\"\"", "\"-a\"", "\"A\"", "\"a b\"", "\"a\\n\"", "\"a.b\"", &too_long] {
        let sentence = refusal(with("name", value));
        assert!(
            sentence.starts_with("name must be 1 to 63 lower-case letters, digits or dashes"),
            "{sentence}"
        );
    }
    let id = refusal(with("name", "\"vm-0123456789ab\""));
    assert_eq!(id, "name must not have the form of a VM's id (vm- and 12 hex digits)");
    for field in ["name", "template", "ssh_public_key"] {
        assert_eq!(
            refusal(with(field, "null")),
            format!("{field} must be a string, not null")
        );
        assert_eq!(
            refusal(with(field, "7")),
            format!("{field} must be a string, not a number")
        );
        assert_eq!(
            refusal(with(field, "[\"a\"]")),
            format!("{field} must be a string, not an array")
        );
        assert_eq!(
            refusal(with(field, "\"\\ud800\"")),
            format!("{field} must be a valid Unicode string")
        );
    }
    let nothing = UpdateVm::parse(b"{}", &LIMITS).unwrap_err().to_string();
    assert_eq!(
        nothing,
        "there is nothing to change: send at least one of disk_size_gib, disk_auto_extend, disk_iops, disk_mbps, net_mbps, autostart"
    );
}

#[test]
fn automatic_extension_needs_a_valid_threshold_increment_and_limit() {
    const ALL: &str = "disk_auto_extend.threshold_percent, disk_auto_extend.increment_gib, disk_auto_extend.limit_gib";
    let good = r#"{"threshold_percent": 80, "increment_gib": 5, "limit_gib": 50}"#;
    assert_eq!(with("disk_auto_extend", good).unwrap().disk_auto_extend, Some(EXTEND));
    for (value, sentence) in [
        ("80", "disk_auto_extend must be an object, not a number".to_owned()),
        ("null", "disk_auto_extend must be an object, not null".to_owned()),
        (
            "{}",
            "disk_auto_extend.threshold_percent is missing: send the usage of the guest's root file system at which the disk \
             grows, in percent"
                .to_owned(),
        ),
        (
            r#"{"threshold_percent": 80, "increment_gib": 5}"#,
            "disk_auto_extend.limit_gib is missing: send the maximum size of the disk, in GiB".to_owned(),
        ),
        (
            r#"{"threshold_percent": 100, "increment_gib": 5, "limit_gib": 50}"#,
            "disk_auto_extend.threshold_percent must be a whole number between 1 and 99".to_owned(),
        ),
        (
            r#"{"threshold_percent": 80, "increment_gib": 0, "limit_gib": 50}"#,
            "disk_auto_extend.increment_gib must be a whole number between 1 and 100".to_owned(),
        ),
        (
            r#"{"threshold_percent": 80, "increment_gib": 5, "limit_gib": 101}"#,
            "disk_auto_extend.limit_gib must be a whole number between 1 and 100".to_owned(),
        ),
        (
            r#"{"threshold": 80, "increment_gib": 5, "limit_gib": 50}"#,
            format!(
                "unknown field \"disk_auto_extend.threshold\" (did you mean disk_auto_extend.threshold_percent?); the fields are {ALL}"
            ),
        ),
        (
            r#"{"limit_gib": 5, "limit_gib": 50}"#,
            "the field \"disk_auto_extend.limit_gib\" is given twice".to_owned(),
        ),
    ] {
        assert_eq!(refusal(with("disk_auto_extend", value)), sentence, "{value}");
    }
}

#[test]
fn limits_are_whole_numbers_and_null_removes_them_in_a_change_only() {
    for field in ["disk_iops", "disk_mbps", "net_mbps"] {
        let sentence = format!("{field} must be a whole number between 1 and 1000000");
        for value in ["0", "-1", "1000001", "\"10\"", "1.5", "null", "{}"] {
            assert_eq!(refusal(with(field, value)), sentence, "{value}");
            let change = UpdateVm::parse(format!("{{\"{field}\": {value}}}").as_bytes(), &LIMITS);
            match value {
                "null" => assert!(change.is_ok()),
                _ => assert_eq!(change.unwrap_err().to_string(), sentence, "{value}"),
            }
        }
    }
    assert_eq!(
        refusal(with("autostart", "1")),
        "autostart must be true or false, not a number"
    );
}

const RSA_2048: &str = "ssh-rsa AAAAB3NzaC1yc2EAAAADAQABAAABAQDgmH/DYMfmkdzbp7uwSme7elaLyaqLQ6XDEd1iEGyZ1y3Bb2kBiMM0c+eXbRnIT5HmoW6mlDs2hksUNCjMhgMPBD4yAi3gZiEMNhNTJ2aRLqxrtHRPPcNrq7wJiwJuxwjxa+KhZIzAoScp89M3j2yJzS2+a5ykm0GUCsJRKoNV5R2KDYe+SVuz+PicfOU7ka+Ik/i49E2DHIEFDkpPxANmMKXsD4SbcWYrBQ1jTlnHBud9U3p5gUVng4SnCH9Btk20DPYAhVTtfxEajL5ow/Rpf+MZv+Oy5RLFGNx6JV8WeP1hYJTl4kIltdwKCrVOZ4B8XViz3W9196OGljq8SNv9";
const RSA_1024: &str = "ssh-rsa AAAAB3NzaC1yc2EAAAADAQABAAAAgQCgjnjS2HZjk5nof0aoK+BNwtLK1xxvoP8klmFjh3bOPmL+6HscbWO/JYuqONLMfltAW/j4cL5qOtj4S8G+SDop76Uei6uGipX9hOQ9m5gMEUyXul2W1KXEwgztCXkYzUGpEUGxyGKLxUqxi7iUHzD9DGXTnYV694jUjorXtFCMwQ== r";
const ECDSA_256: &str = "ecdsa-sha2-nistp256 AAAAE2VjZHNhLXNoYTItbmlzdHAyNTYAAAAIbmlzdHAyNTYAAABBBCLn9bqzEIFJp3n7bIf/9NptnzfmFzQPCSN1LLP/A5xLuHIw0V59xbHcGco8hhEyVzRMMozl7IJtl9CAr4Iz96Q= e";
const ECDSA_521: &str = "ecdsa-sha2-nistp521 AAAAE2VjZHNhLXNoYTItbmlzdHA1MjEAAAAIbmlzdHA1MjEAAACFBAFNK50a+5EzO7D5NdAQ+SLcWC02KRyxC4qN+otGYX1O46D/6Uyd/7F6bwioKSMbUNaZmbYLTj2P4feoYozPQ4dUkgHVCqqTGBEQ7fVN34FP5OoXIhQRBXJ3sR1M6hx3T6JLIPLg+wCpmXh9HdUukcIfp7o7jZA/EXHSBpZ4IzgDw9xAkA== e";

#[test]
fn keys_that_sshd_accepts_are_accepted() {
    for key in [KEY, RSA_2048, ECDSA_256, ECDSA_521] {
        assert_eq!(key.parse::<SshPublicKey>().expect(key).as_str(), key);
    }
    let spaced = format!("  {}  ", KEY.replace(' ', "   "));
    assert_eq!(spaced.parse::<SshPublicKey>().unwrap().as_str(), KEY);
    let commented = format!("{KEY} at home, café");
    assert_eq!(commented.parse::<SshPublicKey>().unwrap().as_str(), commented);
}

#[test]
fn other_keys_are_rejected_with_the_reason() {
    let data = KEY.split(' ').nth(1).unwrap();
    let cases = [
        ("", "such as: ssh-ed25519"),
        ("   ", "such as: ssh-ed25519"),
        ("hello", "begins with its type, one of ssh-ed25519, "),
        ("ssh-ed25519", "damaged"),
        ("ssh-ed25519 AAAA", "damaged"),
        ("ssh-ed25519 !!!! me", "damaged"),
        (&KEY[..60], "damaged"),
        (&format!("ssh-rsa {data}"), "damaged or has another type"),
        (&format!("{KEY}\r\n{KEY}"), "one line"),
        (&format!("{KEY}\0"), "one line"),
        (&format!("{KEY} {KEY}"), "must be one key"),
        (&format!("{KEY}\u{2028}x"), "one line"),
        (&format!("{KEY}\u{85}x"), "one line"),
        (&format!("command=\"sh\" {KEY}"), "options before it are not allowed"),
        (&format!("no-pty {KEY}"), "options before it are not allowed"),
        (&format!("*.example.org {KEY}"), "options before it are not allowed"),
        (&format!("ssh-ed25519-cert-v01@openssh.com {data}"), "not a certificate"),
        ("ssh-dss AAAAB3NzaC1kc3M=", "DSA"),
        (RSA_1024, "2048 to 16384 bits, not 1024"),
        (
            "-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1rZXktdjEA\n",
            "must be a public key",
        ),
        ("---- BEGIN SSH2 PUBLIC KEY ----", "begins with its type"),
        (&format!("{KEY} {}", "x".repeat(8 << 10)), "at most 8192 bytes"),
    ];
    for (key, reason) in cases {
        let sentence = refusal(with("ssh_public_key", &json!(key).to_string()));
        assert!(
            sentence.starts_with("ssh_public_key must ") && sentence.contains(reason),
            "{key:?}: {sentence}"
        );
        assert!(
            !sentence.contains("b3BlbnNz"),
            "the message shows a private key: {sentence}"
        );
    }
}

#[test]
fn deeply_nested_values_are_rejected() {
    let deep = format!("{}{}", "[".repeat(400_000), "]".repeat(400_000));
    assert_eq!(refusal(with("disk_size_gib", &deep)), DISK);
    assert_eq!(refusal(with("name", &deep)), "name must be a string, not an array");
    assert!(refusal(parse(&"{\"a\":".repeat(200_000))).starts_with("the body is not JSON: "));
}

/// Generates any JSON value, sometimes one that is valid for a field.
fn any_value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        ".*".prop_map(Value::from),
        Just(json!(KEY)),
        Just(json!("debian-base")),
    ];
    leaf.prop_recursive(3, 16, 4, |inner| {
        prop::collection::vec(inner, 0..4).prop_map(Value::from)
    })
}

proptest! {
    #[test]
    fn parsing_never_panics(body in prop::collection::vec(any::<u8>(), 0..400)) {
        let _ = CreateVm::parse(&body, &LIMITS);
        let _ = UpdateVm::parse(&body, &LIMITS);
    }

    #[test]
    fn accepted_requests_are_within_all_limits(
        fields in prop::collection::btree_map(
            prop::sample::select(vec!["template", "ssh_public_key", "name", "vcpu_count", "mem_size_mib", "disk_size_gib", "disk_auto_extend", "start"]),
            any_value(),
            0..8,
        ),
        numbers in (0u64..130, 0u64..8, 0u64..5000),
    ) {
        let mut body = json!({"template": "debian-base", "ssh_public_key": KEY,
            "disk_size_gib": numbers.0, "vcpu_count": numbers.1, "mem_size_mib": numbers.2});
        for (name, value) in fields {
            body[name] = value;
        }
        if let Ok(request) = CreateVm::parse(body.to_string().as_bytes(), &LIMITS) {
            prop_assert!((1..=100).contains(&request.disk_size_gib.unwrap()));
            prop_assert!((1..=4).contains(&request.vcpu_count.unwrap()));
            prop_assert!((128..=4096).contains(&request.mem_size_mib.unwrap()));
            prop_assert!(!request.ssh_public_key.is_some_and(|key| key.as_str().contains(char::is_control)));
        }
    }

    #[test]
    fn accepted_keys_are_single_lines_without_control_characters(at in 0usize..600, with in any::<char>(), key in 0usize..4) {
        let mut text: Vec<char> = [KEY, RSA_2048, ECDSA_256, ECDSA_521][key].chars().collect();
        let at = at % text.len();
        text[at] = with;
        if let Ok(key) = text.iter().collect::<String>().parse::<SshPublicKey>() {
            prop_assert!(!key.as_str().contains(char::is_control));
            prop_assert!(key.as_str().starts_with(['s', 'e']));
        }
    }
}
