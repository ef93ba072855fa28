//! `GET /events`: the events of a host as they happen. No guest is booted.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed step fails the test"
)]

mod support;

use scalebox_api::{Event, EventKind, UpdateVm};
use serde_json::json;
use support::{Host, HostDisk, Options, TOKEN, eventually};

fn kinds(events: &[Event]) -> Vec<&str> {
    events.iter().map(|event| event.kind.as_str()).collect()
}

fn so_far(host: &Host, since: u64) -> Vec<Event> {
    let events = host.client().events(Some(since), false).unwrap();
    events.collect::<Result<_, _>>().unwrap()
}

#[test]
fn followers_receive_every_change_and_reconnecting_clients_what_they_missed() {
    let disk = HostDisk::ext4("100G");
    let host = Host::with_tiny_template(&Options {
        image_dir: Some(&disk.folder),
        ..Options::default()
    });
    let client = host.client();
    let mut following = client.events(None, true).unwrap();

    let vm = host.create_stopped("tiny", None);
    let created = following.next().unwrap().unwrap();
    assert_eq!(created.kind, EventKind::Created);
    assert_eq!(
        created.vm.as_ref().map(|vm| (vm.id.as_str(), vm.name.as_str())),
        Some((vm.id.as_str(), vm.name.as_str()))
    );
    let details = json!({"template": "tiny", "status": "stopped", "disk_size_gib": 2, "ssh_port": vm.ssh_port});
    assert_eq!(serde_json::to_value(&created.details).unwrap(), details);

    client.update_vm(&vm.id, &UpdateVm::grow(3)).unwrap();
    client.grow_pool(Some(50)).unwrap();
    client.shrink_pool(40).unwrap();
    client.delete_vm(&vm.id).unwrap();
    client.delete_template("tiny").unwrap();
    let after = ["grown", "pool_grown", "pool_shrunk", "deleted", "template_deleted"];
    let received: Vec<_> = following.take(after.len()).collect::<Result<_, _>>().unwrap();
    assert_eq!(kinds(&received), after);
    assert!(received.windows(2).all(|pair| pair[0].id < pair[1].id));
    assert_eq!(
        serde_json::to_value(&received[0].details).unwrap(),
        json!({"from_gib": 2, "to_gib": 3, "by": "request"})
    );
    assert_eq!(received[1].details["capacity_bytes"], json!(50u64 << 30));

    assert_eq!(so_far(&host, created.id), received);
    assert_eq!(kinds(&so_far(&host, 0)), [&["created"], &after[..]].concat());
    assert_eq!(kinds(&so_far(&host, received[4].id)), Vec::<&str>::new());
    // The `Last-Event-ID` of a browser that reconnects takes precedence over the query it repeats.
    let request = format!(
        "GET /events?follow=false&since=0 HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: Bearer {TOKEN}\r\nLast-Event-ID: {}\r\n\r\n",
        received[3].id
    );
    let (status, body) = host.raw(request.as_bytes());
    assert!(
        status == 200 && body.contains("event: template_deleted\n") && !body.contains("event: deleted\n"),
        "{status} {body}"
    );
    assert!(body.contains(&format!("id: {}\n", received[4].id)), "{body}");
    for query in ["since=now", "since=-1", "follow=maybe", "until=7"] {
        let (status, answer) = host.send("GET", &format!("/events?{query}"), b"");
        assert!(
            status == 400 && answer.contains("since=ID"),
            "{query}: {status} {answer}"
        );
    }
}

#[test]
fn streams_end_with_the_daemon_and_ids_keep_increasing_afterwards() {
    let mut host = Host::with_tiny_template(&Options::default());
    let vm = host.create_stopped("tiny", None);
    let [created] = &so_far(&host, 0)[..] else {
        panic!("one event")
    };
    let streams: Vec<_> = (0..8).map(|_| host.client().events(Some(0), true).unwrap()).collect();
    let mut daemon = host.begin_terminating();
    for stream in streams {
        let received: Vec<_> = stream.collect::<Result<_, _>>().unwrap();
        assert_eq!(received, std::slice::from_ref(created));
    }
    assert!(eventually("the daemon to end", || daemon.try_wait().unwrap()).success());
    let log = host.log();
    assert!(!log.contains("some operations did not end in time"), "{log}");

    host.serve();
    host.client().delete_vm(&vm.id).unwrap();
    let received = so_far(&host, created.id);
    assert_eq!(kinds(&received), ["missed", "deleted"]);
    assert!(
        created.id < received[0].id && received[0].id < received[1].id,
        "{received:?}"
    );
    assert_eq!(kinds(&so_far(&host, received[0].id)), ["deleted"]);
    // Ids increase after a crash, as they do after a graceful shutdown.
    host.crash();
    host.serve();
    host.client().delete_template("tiny").unwrap();
    let later = so_far(&host, received[1].id);
    assert_eq!(kinds(&later), ["missed", "template_deleted"]);
    assert!(received[1].id < later[0].id, "{later:?}");
}
