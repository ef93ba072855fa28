//! Repeated creation requests, and cancelled creations. No guest is booted.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed step fails the test"
)]

mod support;

use scalebox_api::CreateVm;
use scalebox_client::ClientError;
use serde_json::json;
use std::sync::Barrier;
use std::thread;
use support::{Host, KEY, Options, TOKEN, eventually, unmeasured};

fn rejection(error: ClientError) -> (u16, String) {
    match error {
        ClientError::Refused { status, message, .. } => (status, message),
        other => panic!("{other}"),
    }
}

#[test]
fn repeating_a_request_with_its_key_returns_the_same_vm_even_after_a_restart() {
    let mut host = Host::with_tiny_template(&Options::default());
    let request = CreateVm {
        idempotency_key: Some("job-17".parse().unwrap()),
        ..host.stopped("tiny")
    };
    let vm = host.client().create_vm(&request).unwrap();
    let again = unmeasured([host.client().create_vm(&request).unwrap()]);
    assert_eq!(again, std::slice::from_ref(&vm));
    host.crash();
    host.serve();
    let again = unmeasured([host.client().create_vm(&request).unwrap()]);
    assert_eq!(again, std::slice::from_ref(&vm));
    assert_eq!(unmeasured(host.client().vms().unwrap()), std::slice::from_ref(&vm));

    // Other spaces and another order of fields are the same request, and the response is marked as
    // replayed.
    let raw = |key: &str, body: &str| {
        let request = format!(
            "POST /vms HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: Bearer {TOKEN}\r\nIdempotency-Key: {key}\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        host.raw(request.as_bytes())
    };
    let body = format!(r#"{{ "start": false,  "ssh_public_key": "{KEY}", "template": "tiny" }}"#);
    let (status, answer) = raw("job-17", &body);
    assert!(status == 201 && answer.contains(&vm.id), "{status} {answer}");
    let (status, answer) = raw("two words", &body);
    assert!(status == 400 && answer.contains("Idempotency-Key"), "{status} {answer}");

    let other = CreateVm {
        disk_size_gib: Some(3),
        ..request.clone()
    };
    let (status, message) = rejection(host.client().create_vm(&other).unwrap_err());
    assert!(
        status == 422 && message.contains("job-17") && message.contains(&vm.id),
        "{status} {message}"
    );
    host.client().delete_vm(&vm.id).unwrap();
    let next = host.client().create_vm(&other).unwrap();
    assert_ne!(next.id, vm.id, "the key was deleted with its VM");

    // A failed creation releases its key.
    let failing = CreateVm {
        start: true,
        idempotency_key: Some("job-18".parse().unwrap()),
        ..host.stopped("tiny")
    };
    assert_eq!(rejection(host.client().create_vm(&failing).unwrap_err()).0, 503);
    let corrected = CreateVm {
        start: false,
        ..failing
    };
    host.client().create_vm(&corrected).unwrap();
}

#[test]
fn concurrent_requests_with_one_key_create_one_vm() {
    let host = Host::with_tiny_template(&Options::default());
    let request = CreateVm {
        idempotency_key: Some("at-once".parse().unwrap()),
        ..host.stopped("tiny")
    };
    let start = Barrier::new(8);
    let ask = || {
        start.wait();
        host.client().create_vm(&request)
    };
    let answers: Vec<_> = thread::scope(|scope| {
        let threads: Vec<_> = (0..8).map(|_| scope.spawn(ask)).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    let made = host.client().vms().unwrap();
    assert_eq!(made.len(), 1);
    for answer in answers {
        match answer {
            Ok(vm) => assert_eq!(unmeasured([vm]), unmeasured([made[0].clone()])),
            Err(error) => {
                let (status, message) = rejection(error);
                assert!(
                    status == 409 && message.contains("is still in progress"),
                    "{status} {message}"
                );
            }
        }
    }
}

#[test]
fn deleting_a_vm_during_its_creation_undoes_it() {
    let host = Host::with_tiny_template(&Options {
        pool_size: "100G",
        ..Options::default()
    });
    let mut size = 2;
    // The order of the requests is random. The first clone of a size takes long enough that in some
    // round, the deletion arrives during it.
    eventually("a cancelled creation", || {
        size = size % 99 + 1;
        let request = CreateVm {
            name: Some("unwanted".parse().unwrap()),
            disk_size_gib: Some(size),
            ..host.stopped("tiny")
        };
        let is_cancelled = thread::scope(|scope| {
            let creation = scope.spawn(|| host.client().create_vm(&request));
            eventually("the deletion", || match host.client().delete_vm("unwanted") {
                Ok(()) => Some(()),
                Err(error) => {
                    assert_eq!(rejection(error).0, 404);
                    None
                }
            });
            match creation.join().unwrap() {
                Ok(_) => false,
                Err(error) => {
                    let (status, message) = rejection(error);
                    let expected = "VM unwanted was deleted while it was being created";
                    assert_eq!((status, message.as_str()), (409, expected));
                    true
                }
            }
        });
        assert_eq!(host.client().vms().unwrap(), []);
        assert_eq!(host.client().pool().unwrap().reserved_bytes, 0);
        is_cancelled.then_some(())
    });
    assert_eq!(host.leftovers(), Vec::<String>::new());
    let (status, _) = host.send("GET", "/vms/unwanted", b"");
    assert_eq!(status, 404);
    assert_eq!(host.send("POST", "/vms/unwanted/restart", b"").0, 404);
    let vm = host.create_stopped("tiny", None);
    // A stopped VM would be started, but this host has no kernel.
    assert_eq!(host.send("POST", &format!("/vms/{}/restart", vm.id), b"").0, 503);
    let answer: serde_json::Value = serde_json::from_str(&host.send("GET", &format!("/vms/{}", vm.id), b"").1).unwrap();
    assert_eq!(answer["status"], json!("stopped"));
}
