//! `GET /openapi.json`: every route is in it, and what it says of the VM that a client gets is so.
//! No guest is booted.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test stops where it cannot go on"
)]

mod support;

use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;
use support::{Host, Options, TOKEN, said};

const METHODS: [&str; 5] = ["get", "post", "patch", "put", "delete"];

fn document(host: &Host) -> Value {
    let (status, body) = host.send("GET", "/openapi.json", b"");
    assert_eq!(status, 200, "{body}");
    serde_json::from_str(&body).unwrap()
}

/// `POST /vms/{vm}/start` and the like.
fn routes(document: &Value) -> BTreeSet<String> {
    let paths = document["paths"].as_object().unwrap();
    let of_path = |(path, item): (&String, &Value)| -> Vec<String> {
        let methods = METHODS.iter().filter(|method| item.get(**method).is_some());
        methods
            .map(|method| format!("{} {path}", method.to_uppercase()))
            .collect()
    };
    paths.iter().flat_map(of_path).collect()
}

#[test]
fn every_route_is_described_and_everything_described_is_a_route() {
    let host = Host::with_tiny_template(&Options::default());
    let document = document(&host);
    assert!(document["openapi"].as_str().unwrap().starts_with("3.1"), "{document}");
    let described = routes(&document);

    // The routes are registered with their descriptions: by nothing else.
    let source = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/api.rs")).unwrap();
    assert!(!source.contains(".route(\""), "a route without a description");
    let registered = source.matches(".routes(routes!(").count();
    let paths: BTreeSet<&str> = described.iter().map(|route| route.split_once(' ').unwrap().1).collect();
    assert_eq!(paths.len(), registered);

    // Each answers, and not that it is not there.
    for route in &described {
        let (method, path) = route.split_once(' ').unwrap();
        let path = path.replace("{vm}", "nobody").replace("{name}", "nothing");
        let path = if path == "/events" {
            "/events?follow=false"
        } else {
            &path
        };
        let (status, body) = host.send(method, path, b"");
        assert!(
            status != 405 && !body.contains("there is no route") && status < 500,
            "{route}: {status} {body}"
        );
    }

    // The README tells of the same.
    let readme = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../README.md")).unwrap();
    for route in &described {
        let (method, path) = route.split_once(' ').unwrap();
        let path = path.replace("{vm}", "{id or name}");
        let last = path.rsplit('/').next().unwrap();
        let told = readme.lines().any(|line| {
            line.starts_with('|')
                && line.contains(&format!("{method} "))
                && (line.contains(&path) || line.contains(&format!("/{last}`")))
        });
        assert!(told, "{route} is not in the README's table");
    }
}

#[test]
fn answers_have_the_fields_that_their_schemas_name() {
    let host = Host::with_tiny_template(&Options::default());
    let document = document(&host);
    let schema = |name: &str| document["components"]["schemas"][name].clone();
    let vm = host.create_stopped("tiny", Some(1));
    for (path, name) in [
        (format!("/vms/{}", vm.id), "Vm"),
        ("/pool".to_owned(), "PoolInfo"),
        ("/info".to_owned(), "HostInfo"),
        ("/vms".to_owned(), "VmList"),
        ("/templates".to_owned(), "TemplateList"),
        ("/health".to_owned(), "Health"),
    ] {
        let answer: Value = serde_json::from_str(&host.send("GET", &path, b"").1).unwrap();
        let schema = schema(name);
        let properties = schema["properties"]
            .as_object()
            .unwrap_or_else(|| panic!("{name}: {schema}"));
        for field in answer.as_object().unwrap().keys() {
            assert!(properties.contains_key(field), "{name}.{field}");
        }
        for field in schema["required"].as_array().unwrap() {
            assert!(
                answer.get(field.as_str().unwrap()).is_some(),
                "{name}.{field} is required"
            );
        }
    }
    // What the contract names is there, with its type.
    let create = schema("CreateVm");
    assert_eq!(create["required"], json!(["template", "ssh_public_key"]));
    assert_eq!(
        document["paths"]["/vms"]["post"]["responses"]["507"]["content"]["application/json"]["schema"],
        json!({"$ref": "#/components/schemas/ErrorBody"})
    );
    let (status, _) = host.raw(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    assert_eq!(status, 401);
}

/// Requests made of the document, good and bad ones, and answers compared with it; see
/// scripts/schemathesis.sh.
#[test]
fn the_document_is_true_for_every_request_that_can_be_made_of_it() {
    let mut host = Host::new(&Options {
        // Growth to the largest disk is often asked for.
        env: &[("MAX_DISK_SIZE_GIB", "4")],
        ..Options::default()
    });
    // Under a name that the API neither deletes nor replaces.
    host.import_tiny("debian-base");
    host.serve();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../scripts/schemathesis.sh");
    let run = Command::new(script)
        .env("SCALEBOX_URL", &host.url)
        .env("SCALEBOX_TOKEN", TOKEN)
        .env("SECONDS_AT_MOST", "60")
        .output()
        .expect("scripts/schemathesis.sh");
    assert!(run.status.success(), "{}", said(&run));
    let routes = routes(&document(&host)).len();
    assert!(said(&run).contains(&format!("Tested: {routes}\n")), "{}", said(&run));
    assert!(!host.log().contains("panicked"), "a task panicked");

    // What it left can be removed, and then nothing is left.
    let client = host.client();
    for vm in client.vms().unwrap() {
        client.delete_vm(&vm.id).unwrap();
    }
    assert_eq!(host.leftovers(), Vec::<String>::new());
    assert_eq!(client.pool().unwrap().reserved_bytes, 0);
}

#[test]
fn bounds_in_the_document_are_those_of_the_host() {
    let host = Host::with_tiny_template(&Options {
        env: &[("MAX_DISK_SIZE_GIB", "7"), ("DEFAULT_DISK_SIZE_GIB", "1")],
        ..Options::default()
    });
    let schemas = document(&host)["components"]["schemas"].clone();
    let limits = host.client().info().unwrap().limits;
    for (pointer, value) in [
        ("/CreateVm/properties/disk_size_gib/maximum", json!(7)),
        ("/CreateVm/properties/vcpu_count/maximum", json!(limits.max_vcpu_count)),
        (
            "/CreateVm/properties/mem_size_mib/minimum",
            json!(limits.min_mem_size_mib),
        ),
        (
            "/CreateVm/properties/mem_size_mib/maximum",
            json!(limits.max_mem_size_mib),
        ),
        ("/CreateVm/additionalProperties", json!(false)),
        ("/UpdateVm/additionalProperties", json!(false)),
        ("/UpdateVm/minProperties", json!(1)),
        ("/SnapshotVm/additionalProperties", json!(false)),
        ("/ShrinkPool/required", json!(["size_gib"])),
        ("/AutoExtendRequest/properties/limit_gib/maximum", json!(7)),
        ("/UpdateVm/properties/net_mbps/type", json!(["integer", "null"])),
        ("/CreateVm/properties/net_mbps/type", json!("integer")),
    ] {
        assert_eq!(schemas.pointer(pointer), Some(&value), "{pointer}");
    }
}
