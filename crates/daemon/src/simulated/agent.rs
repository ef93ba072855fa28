//! Tests of the connection to a guest's agent: one for each machine, closed when idle, and opened
//! again after errors.

use crate::host::error::ServiceError;
use crate::simulated::http::{call, post};
use crate::simulated::sim::Sim;
use crate::vm::guest;
use bytes::Bytes;
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo};
use scalebox_agent_api::hello::{find_request, response};
use scalebox_testkit::SimAgent;
use serde_json::{Value, json};
use std::convert::Infallible;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

type Respond = dyn Fn(&str) -> (u16, String) + Send + Sync;

/// Returns an agent that follows the protocol of connections, with these responses.
pub(super) fn scripted(respond: impl Fn(&str) -> (u16, String) + Send + Sync + 'static) -> SimAgent {
    let respond: Arc<Respond> = Arc::new(respond);
    SimAgent::Scripted(Arc::new(move |stream| serve(stream, respond.clone())))
}

fn serve(mut stream: UnixStream, respond: Arc<Respond>) {
    let mut read = Vec::new();
    let nonce = loop {
        let mut byte = [0];
        if stream.read_exact(&mut byte).is_err() {
            return;
        }
        read.extend(byte);
        if let Some((nonce, _)) = find_request(&read) {
            break nonce;
        }
    };
    let _ = stream.write_all(&response(&nonce, 1));
    stream.set_nonblocking(true).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let stream = tokio::net::UnixStream::from_std(stream).unwrap();
        let service = service_fn(move |request: Request<Incoming>| {
            let (status, body) = respond(request.uri().path());
            let body: BoxBody<Bytes, Infallible> = Full::new(Bytes::from(body)).boxed();
            async move { Ok::<_, Infallible>(Response::builder().status(status).body(body).unwrap()) }
        });
        let http = http2::Builder::new(TokioExecutor::new());
        let _ = http.serve_connection(TokioIo::new(stream), service).await;
    });
}

fn stats() -> String {
    json!({
        "uptime_seconds": 1.5, "load": [0.1, 0.2, 0.3], "cpu_busy_ms": 7, "memory_total": 100, "memory_available": 50,
        "agent_memory": 1, "root_total": 10, "root_used": 5, "processes": 3, "network_received": 1, "network_sent": 2,
        "execs": 0,
    })
    .to_string()
}

/// Returns the responses of a healthy agent.
fn healthy(path: &str) -> (u16, String) {
    match path {
        "/v1/stats" => (200, stats()),
        "/v1/info" => (
            200,
            json!({ "version": "1\u{1b}[31m", "boot_id": "x", "init": "agent" }).to_string(),
        ),
        _ => (404, json!({ "error": "gone", "code": "not_found" }).to_string()),
    }
}

#[test]
fn requests_share_one_connection_which_closes_when_it_is_not_used() {
    let sim = Sim::in_real_time();
    sim.vmm.set_guest(|guest| guest.agent = scripted(healthy));
    let vm = sim.create("box");
    let machine = sim.machine(&vm);
    assert_eq!(machine.agent_connections(), 0, "none before the first use");
    sim.run(async |host| {
        let all = (0..50).map(|_| guest::stats(&host, "box"));
        for stats in futures::future::join_all(all).await {
            let stats = stats.unwrap();
            assert_eq!((stats.load, stats.agent.version.as_str()), ([0.1, 0.2, 0.3], "1[31m"));
        }
    });
    assert_eq!(machine.agent_connections(), 1);
    sim.skip(Duration::from_secs(50));
    sim.run(async |host| guest::stats(&host, "box").await.unwrap());
    sim.skip(Duration::from_secs(50));
    sim.run(async |host| guest::stats(&host, "box").await.unwrap());
    assert_eq!(machine.agent_connections(), 1, "each use keeps it for a minute");
    sim.skip(Duration::from_secs(70));
    sim.run(async |host| guest::stats(&host, "box").await.unwrap());
    assert_eq!(machine.agent_connections(), 2);
}

#[test]
fn a_reboot_of_the_guest_and_a_restart_of_the_daemon_lead_to_another_connection() {
    let mut sim = Sim::in_real_time();
    sim.vmm.set_guest(|guest| guest.agent = scripted(healthy));
    let vm = sim.create("box");
    let machine = sim.machine(&vm);
    let stats = |sim: &Sim| sim.run(async |host| guest::stats(&host, "box").await.map(drop));
    stats(&sim).unwrap();
    sim.run(async |_| machine.reboot());
    sim.wait(Duration::from_millis(100));
    stats(&sim).unwrap();
    assert_eq!(machine.agent_connections(), 2);
    sim.restart();
    stats(&sim).unwrap();
    assert_eq!(machine.agent_connections(), 3);
}

#[test]
fn agents_that_cannot_be_reached_are_503_and_stopped_vms_409() {
    let sim = Sim::in_real_time();
    let wrong = scripted(|_| (200, "garbage".to_owned()));
    let garbage = SimAgent::Scripted(Arc::new(|mut stream: UnixStream| {
        let _ = stream.write_all(&[b'x'; 100_000]);
    }));
    let all = &["stats", "execs", "files?path=/", "execs/exec-0123456789ab/output"][..];
    for (name, agent, requests) in [
        ("old", SimAgent::Unreachable, all),
        ("without", SimAgent::Silent, &all[..1]),
        // The bytes of a file may be any.
        ("wrong", wrong, &all[..2]),
        ("closing", garbage, all),
    ] {
        sim.vmm.set_guest(|guest| guest.agent = agent);
        sim.create(name);
        sim.run(async |host| {
            for request in requests {
                let answer = call(&host, "GET", &format!("/vms/{name}/{request}"), "").await;
                assert_eq!(answer.error(), (503, "unreachable".to_owned()), "{name} {request}");
                let error = answer.json()["error"].as_str().unwrap().to_owned();
                assert!(error.starts_with(&format!("VM {name}: its agent ")), "{error}");
            }
        });
    }
    let vm = sim.create_stopped("off");
    sim.run(async |host| {
        let answer = post(&host, "/vms/off/exec", json!({ "command": "true" })).await;
        assert_eq!(answer.error(), (409, "wrong_state".to_owned()));
        let answer = call(&host, "GET", "/vms/nobody/stats", "").await;
        assert_eq!(answer.error(), (404, "not_found".to_owned()));
        let answer = call(&host, "GET", "/vms/off/execs/exec-1/output", "").await;
        assert_eq!(answer.error(), (404, "not_found".to_owned()));
    });
    sim.delete(&vm).unwrap();
}

#[test]
fn creations_can_wait_for_the_agent() {
    let sim = Sim::in_real_time();
    sim.vmm.set_guest(|guest| {
        guest.agent = SimAgent::Real;
        guest.boot_time = Duration::from_millis(2500);
    });
    let create = |name: &str, query: &str, more: Value| {
        let mut body = json!({ "template": crate::simulated::sim::TEMPLATE, "name": name });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let path = format!("/vms?{query}");
        sim.run(async move |host| post(&host, &path, body).await)
    };
    let late = create("late", "wait=agent&wait_seconds=1", json!({}));
    assert_eq!(late.error(), (504, "timeout".to_owned()));
    assert_eq!(late.json()["details"]["name"], "late");
    assert!(sim.host().vms.find("late").is_ok(), "the VM is kept");
    let ready = create("ready", "wait=agent", json!({}));
    assert_eq!((ready.status.as_u16(), &ready.json()["name"]), (201, &json!("ready")));
    for (query, more, field) in [
        ("wait=ssh", json!({}), "wait"),
        ("wait_seconds=5", json!({}), "wait_seconds"),
        ("wait=agent&wait_seconds=601", json!({}), "wait_seconds"),
        ("wait=agent", json!({ "start": false }), "wait"),
    ] {
        let refused = create("refused", query, more);
        assert_eq!(
            (refused.status.as_u16(), &refused.json()["field"]),
            (400, &json!(field))
        );
    }
    assert!(matches!(sim.host().vms.find("refused"), Err(ServiceError::NotFound(_))));
}

#[test]
fn vms_without_a_key_keep_having_none() {
    let mut sim = Sim::new();
    let body = json!({ "template": crate::simulated::sim::TEMPLATE, "name": "keyless" });
    let made = sim.run(async move |host| post(&host, "/vms", body).await);
    assert_eq!(made.status.as_u16(), 201, "{}", made.json());
    assert_eq!(sim.host().vms.find("keyless").unwrap().ssh_public_key, None);
    sim.wait(Duration::from_secs(1));
    sim.restart();
    let record = sim.host().vms.find("keyless").unwrap();
    assert_eq!(record.ssh_public_key, None);
    sim.run(async |host| crate::vm::restart(&host, "keyless".to_owned()).await.unwrap());
}
