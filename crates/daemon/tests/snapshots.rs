//! Responses to `POST /vms/{id}/snapshot`, for stopped VMs.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed step fails the test"
)]

mod support;

use support::{Host, Options};

#[test]
fn a_stopped_vm_s_disk_becomes_a_template_and_invalid_requests_are_rejected() {
    let host = Host::with_tiny_template(&Options::default());
    let vm = host.create_stopped("tiny", Some(3));
    let snapshot = |of: &str, body: &str| host.send("POST", &format!("/vms/{of}/snapshot"), body.as_bytes());

    let (status, answer) = snapshot(&vm.name, r#"{"template_name": "derived"}"#);
    assert_eq!(status, 201, "{answer}");
    let answer: serde_json::Value = serde_json::from_str(&answer).unwrap();
    assert_eq!(
        (&answer["template"], &answer["source_vm"]),
        (&"derived".into(), &vm.id.as_str().into())
    );
    assert_eq!(
        (&answer["size_bytes"], &answer["stood_still_ms"]),
        (&(3u64 << 30).into(), &0.into())
    );

    for (of, body, status, words) in [
        (
            vm.name.as_str(),
            r#"{"template_name": "derived"}"#,
            409,
            "derived exists",
        ),
        (&vm.name, r#"{"template_name": "debian-base"}"#, 403, "protected"),
        (&vm.name, r#"{"template_name": "../x"}"#, 400, "template_name"),
        (&vm.name, r#"{"template_name": "x", "colour": 1}"#, 400, "colour"),
        (&vm.name, "{}", 400, "template_name"),
        ("nobody", r#"{"template_name": "x"}"#, 404, "nobody"),
    ] {
        let (found, answer) = snapshot(of, body);
        assert!(found == status && answer.contains(words), "{body}: {found} {answer}");
    }

    let names = || -> Vec<String> {
        let templates = host.client().templates().unwrap();
        templates.into_iter().map(|template| template.name).collect()
    };
    assert_eq!(names(), ["derived", "tiny"]);
    let (status, answer) = host.send("GET", "/templates/derived", b"");
    let one: scalebox_api::Template = serde_json::from_str(&answer).unwrap();
    assert_eq!(
        (status, one.name.as_str(), one.used_by),
        (200, "derived", 0),
        "{answer}"
    );
    // The template outlives its source, and VMs can be created from it.
    host.client().delete_vm(&vm.id).unwrap();
    let copy = host.create_stopped("derived", None);
    assert_eq!(copy.disk_size_gib, 3);
    host.client().delete_vm(&copy.id).unwrap();
    host.client().delete_template("derived").unwrap();
    assert_eq!(names(), ["tiny"]);
}
