//! `GET /openapi.json`: it describes every route, and the VMs that clients receive match it. No
//! guest is booted.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed step fails the test"
)]

mod support;

use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;
use support::{Host, Options, TOKEN, output_of};

const METHODS: [&str; 5] = ["get", "post", "patch", "put", "delete"];

fn document(host: &Host) -> Value {
    let (status, body) = host.send("GET", "/openapi.json", b"");
    assert_eq!(status, 200, "{body}");
    serde_json::from_str(&body).unwrap()
}

/// Returns the routes, such as `POST /vms/{vm}/start`.
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
fn every_route_is_described_and_every_described_route_exists() {
    let host = Host::with_tiny_template(&Options::default());
    let document = document(&host);
    assert!(document["openapi"].as_str().unwrap().starts_with("3.1"), "{document}");
    let described = routes(&document);

    // Routes are registered only together with their descriptions.
    let source = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/http/routes.rs")).unwrap();
    assert!(!source.contains(".route(\""), "a route without a description");
    let registered = source.matches(".routes(routes!(").count();
    let paths: BTreeSet<&str> = described.iter().map(|route| route.split_once(' ').unwrap().1).collect();
    assert_eq!(paths.len(), registered);

    // Each route responds with something other than "not found".
    for route in &described {
        let (method, path) = route.split_once(' ').unwrap();
        let path = path.replace("{vm}", "nobody").replace("{name}", "nothing");
        let path = path.replace("{exec}", "exec-0123456789ab");
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

    // The README lists the same routes.
    let readme = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../README.md")).unwrap();
    for route in &described {
        let (method, path) = route.split_once(' ').unwrap();
        let path = path.replace("{vm}", "{id or name}");
        let last = path.rsplit('/').next().unwrap();
        let listed = readme.lines().any(|line| {
            line.starts_with('|')
                && line.contains(&format!("{method} "))
                && (line.contains(&path) || line.contains(&format!("/{last}`")))
        });
        assert!(listed, "{route} is not in the README's table");
    }
}

#[test]
fn responses_have_the_fields_of_their_schemas() {
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
    // The documented fields are there, with their types.
    let create = schema("CreateVm");
    assert_eq!(
        create["oneOf"],
        json!([{ "required": ["template"] }, { "required": ["image"] }])
    );
    assert_eq!(
        create["properties"]["image"]["$ref"],
        "#/components/schemas/ImageReference"
    );
    assert_eq!(
        document["paths"]["/vms"]["post"]["responses"]["507"]["content"]["application/json"]["schema"],
        json!({"$ref": "#/components/schemas/ErrorBody"})
    );
    let (status, _) = host.raw(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    assert_eq!(status, 401);
}

/// Generates valid and invalid requests from the document, and compares the responses with it; see
/// scripts/schemathesis.sh.
#[test]
fn responses_to_generated_requests_match_the_document() {
    let mut host = Host::new(&Options {
        // Many generated requests grow a disk to the maximum.
        env: &[("MAX_DISK_SIZE_GIB", "4")],
        ..Options::default()
    });
    // The API neither deletes nor replaces a template of this name.
    host.import_tiny("debian-base");
    host.serve();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../scripts/schemathesis.sh");
    let run = Command::new(script)
        .env("SCALEBOX_URL", &host.url)
        .env("SCALEBOX_TOKEN", TOKEN)
        .env("MAX_SECONDS", "60")
        .output()
        .expect("scripts/schemathesis.sh");
    assert!(run.status.success(), "{}", output_of(&run));
    let routes = routes(&document(&host)).len();
    assert!(
        output_of(&run).contains(&format!("Tested: {routes}\n")),
        "{}",
        output_of(&run)
    );
    assert!(!host.log().contains("panicked"), "a task panicked");

    // The leftovers can be removed, and then nothing is left.
    let client = host.client();
    for vm in client.vms().unwrap() {
        client.delete_vm(&vm.id).unwrap();
    }
    assert_eq!(host.leftovers(), Vec::<String>::new());
    assert_eq!(client.pool().unwrap().reserved_bytes, 0);
}

#[test]
fn bounds_in_the_document_match_the_host() {
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
