//! Pulls over the API, from a real registry on loopback. No guest is booted.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed step fails the test"
)]

#[path = "../../images/tests/support/registry.rs"]
mod registry;
mod support;

use registry::{PASSWORD, Registry, USER, small};
use scalebox_api::{CreateVm, CreateVmQuery, ErrorCode, Init, Job, PullTemplate, Vm, VmSource};
use scalebox_client::{Client, ClientError};
use std::fs;
use std::net::TcpListener;
use std::thread;
use support::{Host, Options, eventually};

fn request(reference: &str) -> PullTemplate {
    PullTemplate {
        reference: reference.to_owned(),
        username: Some(USER.to_owned()),
        password: Some(PASSWORD.to_owned()),
        insecure: false,
        replace: false,
    }
}

fn ended(client: &Client, job: &Job) -> Job {
    eventually("the end of the job", || {
        let job = client.job(&job.id).unwrap();
        (!job.is_running()).then_some(job)
    })
}

/// Lists the files that a pull must not leave: intermediate files, and unfinished layers and
/// templates.
fn leftovers(host: &Host) -> Vec<String> {
    let names = |folder: &str| {
        let entries = fs::read_dir(host.folder.join("pool").join(folder));
        let entries = entries.into_iter().flatten();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap())
    };
    let partial = names("templates")
        .chain(names("layers/sha256"))
        .filter(|name| name.ends_with(".partial"));
    partial.chain(names("build")).collect()
}

#[test]
fn a_pulled_image_becomes_a_template_with_its_settings() {
    let (registry, mut host) = (Registry::start(), Host::new(&Options::default()));
    registry.push(&small(), "team/box:1");
    host.serve();
    let (client, reference) = (host.client(), format!("{}/team/box:1", registry.host));
    let job = client.pull_template("box", &request(&reference)).unwrap();
    assert_eq!(
        (job.kind.as_str(), job.reference.as_deref()),
        ("pull", Some(reference.as_str()))
    );
    let job = ended(&client, &job);
    assert_eq!((job.status.as_str(), &job.error), ("done", &None));
    let template = client.template("box").unwrap();
    assert_eq!(template.source.as_deref(), Some("pull"));
    assert_eq!(template.reference, Some(reference.clone()));
    assert!(
        template
            .manifest_digest
            .is_some_and(|digest| digest.starts_with("sha256:"))
    );
    assert_eq!(template.config.unwrap().cmd, ["/bin/tool"]);
    assert_eq!(template.init, Some(Init::Agent));
    assert_eq!(leftovers(&host), [""; 0]);
    // Its disks are cloned like those of other templates.
    let vm = host.create_stopped("box", Some(2));
    assert_eq!(vm.template, "box");

    let (status, body) = host.send(
        "POST",
        "/templates/box/pull",
        format!(r#"{{"reference": "{reference}"}}"#).as_bytes(),
    );
    assert!(status == 409 && body.contains("name_taken"), "{body}");
    let (status, body) = host.send("POST", "/templates/other/pull", br#"{"reference": "UPPER"}"#);
    assert!(status == 400 && body.contains(r#""field":"reference""#), "{body}");
    let replacing = PullTemplate {
        replace: true,
        ..request(&reference)
    };
    let again = client.pull_template("box", &replacing).unwrap();
    assert_eq!(ended(&client, &again).status, "done");
    assert_eq!(client.jobs().unwrap().len(), 2);
}

#[test]
fn a_failed_pull_reports_why_and_leaves_nothing() {
    let (registry, mut host) = (Registry::start(), Host::new(&Options::default()));
    host.serve();
    let client = host.client();
    let mut wrong = request(&format!("{}/box:1", registry.host));
    wrong.password = Some("wrong".to_owned());
    let job = client.pull_template("box", &wrong).unwrap();
    let job = ended(&client, &job);
    let error = job.error.unwrap();
    assert_eq!((job.status.as_str(), error.code), ("failed", ErrorCode::Forbidden));
    assert!(
        error.error.contains("denies access") && !error.error.contains("wrong\""),
        "{}",
        error.error
    );
    let absent = client
        .pull_template("box", &request(&format!("{}/box:1", registry.host)))
        .unwrap();
    assert_eq!(ended(&client, &absent).error.unwrap().code, ErrorCode::NotFound);
    assert!(client.template("box").is_err());
    assert_eq!(leftovers(&host), [""; 0]);
    assert!(!host.log().contains(PASSWORD));
}

#[test]
fn a_running_pull_can_be_cancelled() {
    let mut host = Host::new(&Options::default());
    host.serve();
    let client = host.client();
    // The registry accepts connections, and never responds.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let reference = format!("{}/box:1", silent.local_addr().unwrap());
    let job = client.pull_template("box", &request(&reference)).unwrap();
    let (status, body) = host.send(
        "POST",
        "/templates/box/pull",
        format!(r#"{{"reference": "{reference}"}}"#).as_bytes(),
    );
    assert!(status == 409 && body.contains("busy"), "{body}");
    client.cancel_job(&job.id).unwrap();
    assert_eq!(ended(&client, &job).status, "cancelled");
    assert!(
        client
            .cancel_job(&job.id)
            .is_err_and(|error| error.status() == Some(409))
    );
    assert_eq!(host.send("GET", "/jobs/job-0", b"").0, 404);
    assert_eq!(leftovers(&host), [""; 0]);
    // A stop of the daemon does not wait for a job.
    client.pull_template("box", &request(&reference)).unwrap();
    assert!(host.terminate().success());
}

/// Creates a stopped VM of an image.
fn create(client: &Client, image: &str, wait_seconds: u64) -> Result<Vm, ClientError> {
    let request = CreateVm {
        start: false,
        ..CreateVm::from_source(VmSource::Image(image.parse().unwrap()), None)
    };
    let query = CreateVmQuery {
        wait_seconds: Some(wait_seconds),
        ..CreateVmQuery::default()
    };
    client.create_vm_and_wait(&request, query)
}

#[test]
fn vms_of_an_image_are_created_at_once_after_one_pull() {
    let (registry, mut host) = (Registry::open(), Host::new(&Options::default()));
    registry.push(&small(), "team/box:1");
    host.serve();
    let (client, image) = (host.client(), format!("{}/team/box:1", registry.host));
    let vms = thread::scope(|scope| {
        let creating = [(); 4].map(|()| scope.spawn(|| create(&client, &image, 60).unwrap()));
        creating.map(|creating| creating.join().unwrap())
    });
    assert!(vms.iter().all(|vm| vm.template == "box-1"));
    let jobs = client.jobs().unwrap();
    assert_eq!((jobs.len(), jobs[0].reference.as_ref()), (1, Some(&image)));
    let template = client.template("box-1").unwrap();
    assert_eq!((template.reference.as_ref(), template.used_by), (Some(&image), 4));
    // Another image with the same name is not taken for it.
    registry.push(&small(), "other/box:1");
    let other = create(&client, &format!("{}/other/box:1", registry.host), 60).unwrap_err();
    assert_eq!(other.code(), Some(&ErrorCode::NameTaken));
    assert!(other.to_string().contains("team/box:1"), "{other}");
    assert_eq!(leftovers(&host), [""; 0]);
}

#[test]
fn a_creation_fails_like_its_pull_or_leaves_it_running() {
    let (registry, mut host) = (Registry::start(), Host::new(&Options::default()));
    host.serve();
    let client = host.client();
    let private = create(&client, &format!("{}/box:1", registry.host), 60).unwrap_err();
    assert_eq!(private.code(), Some(&ErrorCode::Forbidden));
    // It accepts connections, and never answers.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let image = format!("{}/slow:1", silent.local_addr().unwrap());
    let pending = create(&client, &image, 1).unwrap_err();
    assert_eq!(pending.status(), Some(504));
    let job = client.job(pending.pending_pull().unwrap()).unwrap();
    assert!(job.is_running() && job.template == "slow-1", "{job:?}");
    let joined = create(&client, &image, 1).unwrap_err();
    assert_eq!(joined.pending_pull(), Some(job.id.as_str()));
    client.cancel_job(&job.id).unwrap();
    assert_eq!(ended(&client, &job).status, "cancelled");
    assert_eq!(client.vms().unwrap(), []);
    assert_eq!(client.pool().unwrap().reserved_bytes, 0);
    assert_eq!(leftovers(&host), [""; 0]);
}
