//! `GET /events`: what happens on a host, told as it happens. No guest is booted.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test stops where it cannot go on"
)]

mod support;

use scalebox_client::{Event, EventKind, UpdateVm};
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
fn a_follower_is_told_of_each_change_and_who_comes_back_of_what_it_missed() {
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
    let told: Vec<_> = following.take(after.len()).collect::<Result<_, _>>().unwrap();
    assert_eq!(kinds(&told), after);
    assert!(told.windows(2).all(|pair| pair[0].id < pair[1].id));
    assert_eq!(
        serde_json::to_value(&told[0].details).unwrap(),
        json!({"from_gib": 2, "to_gib": 3, "by": "request"})
    );
    assert_eq!(told[1].details["capacity_bytes"], json!(50u64 << 30));

    assert_eq!(so_far(&host, created.id), told);
    assert_eq!(kinds(&so_far(&host, 0)), [&["created"], &after[..]].concat());
    assert_eq!(kinds(&so_far(&host, told[4].id)), Vec::<&str>::new());
    // The header of a browser that reconnects goes over the query it repeats.
    let request = format!(
        "GET /events?follow=false&since=0 HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: Bearer {TOKEN}\r\nLast-Event-ID: {}\r\n\r\n",
        told[3].id
    );
    let (status, body) = host.raw(request.as_bytes());
    assert!(
        status == 200 && body.contains("event: template_deleted\n") && !body.contains("event: deleted\n"),
        "{status} {body}"
    );
    assert!(body.contains(&format!("id: {}\n", told[4].id)), "{body}");
    for query in ["since=now", "since=-1", "follow=maybe", "until=7"] {
        let (status, answer) = host.send("GET", &format!("/events?{query}"), b"");
        assert!(
            status == 400 && answer.contains("since=ID"),
            "{query}: {status} {answer}"
        );
    }
}

#[test]
fn the_end_of_the_daemon_ends_the_streams_and_ids_go_on_growing_after_it() {
    let mut host = Host::with_tiny_template(&Options::default());
    let vm = host.create_stopped("tiny", None);
    let [created] = &so_far(&host, 0)[..] else {
        panic!("one event")
    };
    let streams: Vec<_> = (0..8).map(|_| host.client().events(Some(0), true).unwrap()).collect();
    let mut daemon = host.begin_terminating();
    for stream in streams {
        let told: Vec<_> = stream.collect::<Result<_, _>>().unwrap();
        assert_eq!(told, std::slice::from_ref(created));
    }
    assert!(eventually("the daemon to end", || daemon.try_wait().unwrap()).success());
    let log = host.log();
    assert!(!log.contains("some requests did not end"), "{log}");

    host.serve();
    host.client().delete_vm(&vm.id).unwrap();
    let told = so_far(&host, created.id);
    assert_eq!(kinds(&told), ["missed", "deleted"]);
    assert!(created.id < told[0].id && told[0].id < told[1].id, "{told:?}");
    assert_eq!(kinds(&so_far(&host, told[0].id)), ["deleted"]);
    // After a crash as after a graceful end.
    host.crash();
    host.serve();
    host.client().delete_template("tiny").unwrap();
    let later = so_far(&host, told[1].id);
    assert_eq!(kinds(&later), ["missed", "template_deleted"]);
    assert!(told[1].id < later[0].id, "{later:?}");
}
