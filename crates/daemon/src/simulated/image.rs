//! Tests of creations of an image. A test takes the part of the job that pulls it.

use crate::host::Host;
use crate::host::error::ServiceError;
use crate::host::jobs::RunningJob;
use crate::simulated::http::{Answer, post};
use crate::simulated::sim::{PULL_WAIT, Sim, TEMPLATE, create_request};
use crate::templates::{self, pull};
use crate::vm;
use scalebox_api::Vm;
use scalebox_storage::{ConvertedImage, PulledImage};
use scalebox_units::Bytes;
use serde_json::{Value, json};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::sleep;

const IMAGE: &str = "team/box:1";
const REFERENCE: &str = "docker.io/team/box:1";
const NAME: &str = "box-1";

/// Begins a job that pulls the image, as a request to pull it does.
fn begin(host: &Host) -> RunningJob {
    let job = host.jobs.begin(pull::KIND, NAME, Some(REFERENCE.to_owned()));
    job.ok().unwrap()
}

/// Makes the template of an image, as its pull does.
fn add_template(host: &Host, image: &Path, reference: &str) {
    let image = ConvertedImage {
        path: image,
        pulled: Some(PulledImage {
            reference: reference.to_owned(),
            digest: format!("sha256:{}", "0".repeat(64)),
        }),
        config: None,
        init: None,
        edited_files: &[],
    };
    host.pool
        .import_converted(&NAME.parse().unwrap(), image, false)
        .unwrap();
}

/// Lets a creation reach the point at which it waits for the pull.
async fn begun() {
    sleep(Duration::from_secs(1)).await;
}

fn stopped(sim: &Sim) -> Result<Vm, ServiceError> {
    sim.try_create(json!({ "image": IMAGE, "start": false }))
}

/// Sends `POST /vms` with these fields, while `end` ends the job.
fn post_while(sim: &Sim, fields: Value, end: impl FnOnce(&RunningJob)) -> Answer {
    sim.run(async |host| {
        let job = begin(&host);
        let request = post(&host, "/vms", fields);
        let ending = async {
            begun().await;
            end(&job);
        };
        tokio::join!(request, ending).0
    })
}

#[test]
fn an_image_that_is_a_template_already_is_not_pulled() {
    let sim = Sim::new();
    add_template(sim.host(), &sim.path("image"), REFERENCE);
    for image in [IMAGE, REFERENCE] {
        let vm = sim.try_create(json!({ "image": image })).unwrap();
        assert_eq!(vm.template, NAME);
    }
    assert!(sim.host().jobs.list().is_empty());
}

#[test]
fn a_template_of_another_origin_is_not_taken_for_the_image() {
    let sim = Sim::new();
    add_template(sim.host(), &sim.path("image"), "ghcr.io/team/box:1");
    let other = stopped(&sim).unwrap_err();
    assert!(matches!(other, ServiceError::NameTaken(_)));
    for part in [
        REFERENCE,
        NAME,
        "ghcr.io/team/box:1",
        "pull the image under another name",
    ] {
        assert!(other.to_string().contains(part), "{other}");
    }
    let imported = sim.try_create(json!({ "image": TEMPLATE })).unwrap_err();
    assert!(imported.to_string().contains("was not pulled"), "{imported}");
    assert!(sim.host().jobs.list().is_empty());
    sim.assert_nothing_but(&[]);
}

#[test]
fn creations_wait_for_the_pull_that_is_running_and_pull_once() {
    let sim = Sim::new();
    let image = sim.path("image");
    let made = sim.run(async |host| {
        let job = begin(&host);
        let create = |name: &str| {
            let request = create_request(&host, json!({ "image": IMAGE, "name": name }));
            vm::create(&host, request, PULL_WAIT)
        };
        let pulled = async {
            begun().await;
            add_template(&host, &image, REFERENCE);
            job.end("done", None);
        };
        tokio::join!(create("one"), create("two"), pulled)
    });
    for (vm, name) in [(made.0, "one"), (made.1, "two")] {
        let (vm, _) = vm.unwrap();
        assert_eq!((vm.name.as_str(), vm.template.as_str()), (name, NAME));
    }
    assert_eq!(sim.host().jobs.list().len(), 1);
}

#[test]
fn a_pull_that_takes_too_long_goes_on_and_no_vm_is_made() {
    let sim = Sim::new();
    let (job, answer) = sim.run(async |host| {
        let job = begin(&host);
        let fields = json!({ "image": IMAGE, "name": "box" });
        let answer = post(&host, "/vms?wait_seconds=5", fields).await;
        (job, answer)
    });
    assert_eq!(answer.error(), (504, "timeout".to_owned()));
    let details = &answer.json()["details"];
    assert_eq!(details["job"].as_str(), Some(job.describe().id.as_str()));
    assert_eq!(details["template"], NAME);
    assert!(job.describe().is_running());
    sim.assert_nothing_but(&[]);
    assert_eq!(sim.host().pool.commitments().reserved, Bytes::ZERO);
    // The name is free again.
    sim.create_stopped("box");
}

#[test]
fn the_failure_of_a_pull_is_that_of_the_creation() {
    let sim = Sim::new();
    let denied = || ServiceError::Forbidden("the registry denies access".to_owned());
    let body = json!({ "image": IMAGE });
    let answer = post_while(&sim, body.clone(), |job| {
        job.end("failed", Some(Arc::new(denied())));
    });
    assert_eq!(answer.error(), (403, "forbidden".to_owned()));
    let answer = post_while(&sim, body, |job| {
        job.end("cancelled", None);
    });
    assert_eq!(answer.error(), (409, "wrong_state".to_owned()));
    sim.assert_nothing_but(&[]);
}

#[test]
fn requests_that_would_fail_after_the_pull_fail_before_it() {
    let sim = Sim::new();
    sim.space.set_free(Bytes::from_mib(3 << 10));
    let full = sim.try_create(json!({ "image": IMAGE, "disk_size_gib": 80 }));
    assert!(full.unwrap_err().is_insufficient());
    let extend = json!({ "threshold_percent": 80, "increment_gib": 1, "limit_gib": 2 });
    let answer = sim.run(async |host| {
        let body = json!({ "image": IMAGE, "disk_size_gib": 3, "disk_auto_extend": extend });
        post(&host, "/vms", body).await
    });
    assert_eq!(answer.json()["field"], "disk_auto_extend.limit_gib");
    std::fs::remove_dir_all(sim.host().pool.kernels_dir()).unwrap();
    let no_kernel = sim.try_create(json!({ "image": IMAGE, "disk_size_gib": 1 }));
    assert!(matches!(no_kernel, Err(ServiceError::NotReady(_))));
    let protected = sim.try_create(json!({ "image": "debian-base", "disk_size_gib": 1, "start": false }));
    assert!(matches!(protected, Err(ServiceError::Forbidden(_))));
    assert!(sim.host().jobs.list().is_empty());
    sim.assert_nothing_but(&[]);
}

#[test]
fn malformed_images_and_contradictions_are_rejected_with_their_field() {
    let sim = Sim::new();
    for (path, body, field) in [
        ("/vms", json!({ "image": "UPPER/Case" }), "image"),
        ("/vms", json!({ "image": "a b" }), "image"),
        ("/vms", json!({ "image": IMAGE, "template": TEMPLATE }), "image"),
        ("/vms", json!({}), "template"),
        ("/vms?wait_seconds=5", json!({ "template": TEMPLATE }), "wait_seconds"),
        ("/vms?wait=agent", json!({ "image": IMAGE, "start": false }), "wait"),
    ] {
        let answer = sim.run(async |host| post(&host, path, body).await);
        assert_eq!(answer.error(), (400, "invalid_request".to_owned()));
        assert_eq!(answer.json()["field"], field);
    }
    assert!(sim.host().jobs.list().is_empty());
}

#[test]
fn deleting_a_vm_that_waits_for_its_pull_ends_the_creation_and_not_the_pull() {
    let sim = Sim::new();
    let (job, created, deleted) = sim.run(async |host| {
        let job = begin(&host);
        let request = create_request(&host, json!({ "image": IMAGE, "name": "box" }));
        let deletion = async {
            begun().await;
            vm::delete(&host, "box".to_owned()).await
        };
        let (created, deleted) = tokio::join!(vm::create(&host, request, PULL_WAIT), deletion);
        (job, created, deleted)
    });
    deleted.unwrap();
    assert!(
        created
            .unwrap_err()
            .to_string()
            .contains("was deleted while it was being created")
    );
    assert!(job.describe().is_running());
    sim.assert_nothing_but(&[]);
}

#[test]
fn a_client_that_disconnects_interrupts_neither_the_pull_nor_the_creation() {
    let sim = Sim::new();
    let job = sim.run(async |host| {
        let job = begin(&host);
        let request = create_request(&host, json!({ "image": IMAGE, "name": "box" }));
        tokio::select! {
            _ = vm::create(&host, request, PULL_WAIT) => panic!("it waits for the job"),
            () = begun() => {}
        }
        job
    });
    assert!(job.describe().is_running());
    add_template(sim.host(), &sim.path("image"), REFERENCE);
    job.end("done", None);
    sim.wait_until("the VM runs", |sim| sim.host().vms.find("box").is_ok());
}

#[test]
fn a_repeated_request_returns_its_vm_also_without_the_template() {
    let sim = Sim::new();
    let create = || {
        let mut request = create_request(sim.host(), json!({ "image": IMAGE, "start": false }));
        request.idempotency_key = Some("key-1".parse().unwrap());
        sim.run(async |host| vm::create(&host, request, Duration::from_secs(3)).await)
    };
    let job = begin(sim.host());
    assert!(matches!(create(), Err(ServiceError::PullTimeout { .. })));
    add_template(sim.host(), &sim.path("image"), REFERENCE);
    job.end("done", None);
    let (vm, replayed) = create().unwrap();
    assert!(!replayed);
    sim.run(async |host| templates::delete(&host, NAME.to_owned()).await)
        .unwrap();
    let (same, replayed) = create().unwrap();
    assert!(replayed && same.id == vm.id);
    assert_eq!(sim.host().jobs.list().len(), 1);
}
