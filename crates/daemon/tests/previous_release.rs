//! A client of the previous release sees no difference but added fields.
//!
//! `data/previous-release.json` has the responses of version 0.1.0 to the requests below, with each
//! value replaced by its type.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed step fails the test"
)]

mod support;

use serde_json::{Map, Value, json};
use support::{Host, KEY, Options};

/// Returns the requests: method, path and body. Together they cause every status that needs no
/// guest.
fn requests() -> Vec<(&'static str, &'static str, Value)> {
    let create = |fields: Value| {
        let mut body = json!({ "template": "tiny", "ssh_public_key": KEY, "start": false });
        body.as_object_mut()
            .unwrap()
            .extend(fields.as_object().unwrap().clone());
        body
    };
    let extend = json!({ "threshold_percent": 80, "increment_gib": 1, "limit_gib": 3 });
    vec![
        ("GET", "/health", Value::Null),
        ("GET", "/vms", Value::Null),
        (
            "POST",
            "/vms",
            create(json!({ "name": "box", "disk_auto_extend": extend, "disk_iops": 500 })),
        ),
        ("POST", "/vms", create(json!({ "name": "box" }))),
        ("POST", "/vms", create(json!({ "disk_size_gib": 200 }))),
        ("POST", "/vms", create(json!({ "disk_size_gib": 100 }))),
        ("POST", "/vms", create(json!({ "template": "none" }))),
        ("POST", "/vms", create(json!({ "disk_size": 1 }))),
        ("GET", "/vms", Value::Null),
        ("GET", "/vms/box", Value::Null),
        ("GET", "/vms/none", Value::Null),
        ("PATCH", "/vms/box", json!({ "disk_size_gib": 2 })),
        ("PATCH", "/vms/box", json!({ "disk_size_gib": 1 })),
        (
            "PATCH",
            "/vms/box",
            json!({ "net_mbps": 10, "disk_iops": null, "autostart": false }),
        ),
        ("POST", "/vms/box/stop", Value::Null),
        ("POST", "/vms/box/trim", Value::Null),
        ("POST", "/vms/none/start", Value::Null),
        ("POST", "/vms/box/snapshot", json!({ "template_name": "copy" })),
        ("POST", "/vms/box/snapshot", json!({ "template_name": "copy" })),
        ("POST", "/vms/box/snapshot", json!({ "template_name": "debian-base" })),
        ("GET", "/templates", Value::Null),
        ("GET", "/templates/copy", Value::Null),
        ("DELETE", "/templates/copy", Value::Null),
        ("DELETE", "/templates/copy", Value::Null),
        ("GET", "/pool", Value::Null),
        ("POST", "/pool/trim", Value::Null),
        ("GET", "/info", Value::Null),
        ("DELETE", "/vms/box", Value::Null),
        ("DELETE", "/vms/box", Value::Null),
        ("GET", "/none", Value::Null),
        ("PUT", "/vms", Value::Null),
    ]
}

/// Replaces each value by its type. The two messages of the original system stay, apart from their
/// numbers.
fn shape(value: &Value) -> Value {
    match value {
        Value::Object(fields) => fields
            .iter()
            .map(|(name, value)| (name.clone(), shape(value)))
            .collect::<Map<_, _>>()
            .into(),
        Value::Array(items) => items.first().map(shape).into_iter().collect(),
        Value::String(text) if text.starts_with("Insufficient storage") || text.contains("must be between") => text
            .chars()
            .filter(|letter| !letter.is_ascii_digit())
            .collect::<String>()
            .into(),
        Value::String(_) => "a string".into(),
        Value::Number(_) => "a number".into(),
        Value::Bool(_) => "a boolean".into(),
        Value::Null => Value::Null,
    }
}

/// Lists the parts of `before` that `now` lacks. A value that was null may be anything.
fn missing(path: &str, before: &Value, now: &Value, found: &mut Vec<String>) {
    match (before, now) {
        (Value::Null, _) => {}
        (Value::Object(before), Value::Object(now)) => {
            for (name, value) in before {
                match now.get(name) {
                    Some(now) => missing(&format!("{path}.{name}"), value, now, found),
                    None => found.push(format!("{path}.{name} is gone")),
                }
            }
        }
        (Value::Array(before), Value::Array(now)) => {
            for (before, now) in before.iter().zip(now) {
                missing(&format!("{path}[]"), before, now, found);
            }
        }
        _ if before == now => {}
        _ => found.push(format!("{path} was {before}, and is {now}")),
    }
}

#[test]
fn a_client_of_the_previous_release_sees_added_fields_only() {
    let host = Host::with_tiny_template(&Options::default());
    let answers: Vec<Value> = requests()
        .into_iter()
        .map(|(method, path, body)| {
            let sent = if body.is_null() {
                String::new()
            } else {
                body.to_string()
            };
            let (status, received) = host.send(method, path, sent.as_bytes());
            let received = serde_json::from_str(&received).unwrap_or(Value::Null);
            json!({ "request": format!("{method} {path}"), "status": status, "body": shape(&received) })
        })
        .collect();
    let before: Vec<Value> = serde_json::from_str(include_str!("data/previous-release.json")).unwrap();
    let mut found = Vec::new();
    assert_eq!(
        before.len(),
        answers.len(),
        "{}",
        serde_json::to_string_pretty(&answers).unwrap()
    );
    for (before, now) in before.iter().zip(&answers) {
        missing(
            &format!("{}: ", before["request"]),
            &before["body"],
            &now["body"],
            &mut found,
        );
        if (&before["request"], &before["status"]) != (&now["request"], &now["status"]) {
            found.push(format!("{before} has become {now}"));
        }
    }
    assert!(found.is_empty(), "{}", found.join("\n"));
}

#[test]
fn a_field_that_is_gone_or_has_another_type_is_found() {
    let before = json!({ "a": "a string", "b": [{ "c": "a number" }], "d": null });
    let mut found = Vec::new();
    missing(
        "x",
        &before,
        &json!({ "a": "a string", "b": [{ "c": "a number", "e": null }], "d": "a number" }),
        &mut found,
    );
    assert!(found.is_empty(), "{found:?}");
    missing("x", &before, &json!({ "b": [{ "c": "a string" }] }), &mut found);
    assert_eq!(found.len(), 3, "{found:?}");
}
