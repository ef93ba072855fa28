//! Tests of pulls from registries that are slow, broken or hostile.

use crate::oci::address::{Reach, Resolver};
use crate::oci::fake_registry::{FakeImage, FakeRegistry, Reply, Request};
use crate::oci::limits::MAX_ATTEMPTS;
use crate::oci::{Credentials, Deadlines, LayerCache, Limits, Made, OciError, PullRequest, Task, pull};
use reqwest::dns::Resolve;
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

/// Folders for pulls, which check that nothing is left in them.
struct Place {
    folder: tempfile::TempDir,
}

impl Place {
    fn new() -> Place {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("work")).unwrap();
        Place { folder }
    }

    fn cache(&self) -> LayerCache {
        LayerCache::open(&self.folder.path().join("cache")).unwrap()
    }

    async fn pull(&self, request: &PullRequest) -> Result<Made, OciError> {
        let task = Task::new(Arc::new(()), Limits::default());
        pull(request, &self.cache(), &self.folder.path().join("work"), &task).await
    }

    /// Pulls an image that must be rejected.
    async fn refused(&self, request: &PullRequest) -> OciError {
        match self.pull(request).await {
            Ok(_) => panic!("pulled"),
            Err(error) => error,
        }
    }

    fn names(&self, folder: &str) -> Vec<String> {
        let entries = fs::read_dir(self.folder.path().join(folder)).unwrap();
        entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect()
    }

    fn assert_nothing_is_left(&self) {
        assert_eq!(self.names("work"), [""; 0]);
        assert_eq!(self.names("cache/sha256"), [""; 0]);
    }
}

fn request(registry: &FakeRegistry) -> PullRequest {
    named(&format!("{}/box:1", registry.host()))
}

fn named(reference: &str) -> PullRequest {
    PullRequest {
        reference: reference.to_owned(),
        credentials: None,
        insecure: false,
        mirrors: Vec::new(),
        deadlines: Deadlines {
            connect: Duration::from_secs(5),
            request: Duration::from_secs(3),
            stall: Duration::from_millis(700),
            backoff: Duration::from_millis(5),
        },
    }
}

fn with_password(request: PullRequest) -> PullRequest {
    let credentials = Credentials {
        username: "user".to_owned(),
        password: "secret".to_owned(),
    };
    PullRequest {
        credentials: Some(credentials),
        ..request
    }
}

fn count() -> Arc<AtomicU32> {
    Arc::default()
}

fn hello(image: &Path) -> Vec<u8> {
    let output = std::process::Command::new("debugfs")
        .args(["-R", "cat /hello"])
        .arg(image)
        .output();
    output.unwrap().stdout
}

#[tokio::test]
async fn an_image_is_pulled_and_its_layers_are_reused() {
    let (image, place) = (FakeImage::new(), Place::new());
    let registry = FakeRegistry::of(&image, |_| None);
    let made = place.pull(&request(&registry)).await.unwrap();
    assert_eq!(hello(&made.image).len(), 400_000);
    assert_eq!(made.config.as_ref().unwrap().cmd, ["/hello"]);
    assert_eq!(made.digest, Some(image.digest.clone()));
    let by_digest = named(&format!("{}/box@{}", registry.host(), image.digest));
    let again = place.pull(&by_digest).await.unwrap();
    assert_eq!(again.digest, made.digest);
    assert_eq!(
        registry.seen(&image.layer).len(),
        1,
        "the second time, it was in the cache"
    );
    drop((made, again));
    assert_eq!(place.names("work"), [""; 0]);
}

#[tokio::test]
async fn two_pulls_at_once_download_a_layer_once() {
    let (image, place) = (FakeImage::new(), Place::new());
    let layer = image.layer.clone();
    let registry = FakeRegistry::of(&image, move |request| {
        // Long enough for the other pull to find the unfinished layer.
        if request.path == layer {
            std::thread::sleep(Duration::from_millis(300));
        }
        None
    });
    let request = request(&registry);
    let (first, second) = tokio::join!(place.pull(&request), place.pull(&request));
    assert!(first.is_ok() && second.is_ok());
    assert_eq!(registry.seen(&image.layer).len(), 1);
}

#[tokio::test]
async fn a_cut_connection_is_resumed_where_it_ended() {
    let (image, place, attempts) = (FakeImage::new(), Place::new(), count());
    let (layer, path) = (image.layer_bytes(), image.layer.clone());
    let registry = FakeRegistry::of(&image, move |request| {
        let is_first = request.path == path && attempts.fetch_add(1, Ordering::Relaxed) == 0;
        is_first.then(|| Reply::Cut(layer[..100_000].to_vec(), layer.len()))
    });
    let made = place.pull(&request(&registry)).await.unwrap();
    assert_eq!(hello(&made.image).len(), 400_000);
    let seen = registry.seen(&image.layer);
    assert_eq!(seen.len(), 2);
    assert!(seen[1].from.is_some_and(|from| from > 0 && from <= 100_000), "{seen:?}");
}

#[tokio::test]
async fn errors_of_a_server_are_retried_a_few_times() {
    let (image, place, failures) = (FakeImage::new(), Place::new(), count());
    let registry = FakeRegistry::of(&image, move |request| {
        let fails = !request.path.ends_with("/v2/") && failures.fetch_add(1, Ordering::Relaxed) % 2 == 0;
        fails.then(|| Reply::status(503))
    });
    place.pull(&request(&registry)).await.unwrap();

    let (image, place) = (FakeImage::new(), Place::new());
    let registry = FakeRegistry::of(&image, |_| Some(Reply::status(503)));
    let error = place.refused(&request(&registry)).await;
    assert!(matches!(error, OciError::Status { status: 503, .. }), "{error}");
    assert_eq!(registry.seen("manifests").len() as u32, MAX_ATTEMPTS);
    place.assert_nothing_is_left();
}

#[tokio::test]
async fn an_absent_image_and_a_closed_port_are_reported() {
    let (image, place) = (FakeImage::new(), Place::new());
    let registry = FakeRegistry::of(&image, |_| None);
    let error = place.refused(&named(&format!("{}/absent:1", registry.host()))).await;
    assert!(
        matches!(&error, OciError::NotFound { what, .. } if what == "absent:1"),
        "{error}"
    );
    assert_eq!(registry.seen("absent").len(), 1);
    let request = request(&registry);
    drop(registry);
    let error = place.refused(&request).await;
    assert!(matches!(error, OciError::Unreachable { .. }), "{error}");
    place.assert_nothing_is_left();
}

#[tokio::test]
async fn a_registry_that_answers_401_for_ever_is_given_up() {
    let (image, place) = (FakeImage::new(), Place::new());
    let registry = FakeRegistry::of(&image, |_| {
        Some(Reply::with(401, "www-authenticate", "Basic realm=\"x\""))
    });
    let error = place.refused(&request(&registry)).await;
    assert!(error.to_string().contains("user name and a password"), "{error}");
    let error = place.refused(&with_password(request(&registry))).await;
    assert!(matches!(error, OciError::Unauthorized { .. }), "{error}");
    assert!(registry.seen("manifests").len() <= 3, "{:?}", registry.seen(""));

    // Also if the registry issues tokens.
    let registry = FakeRegistry::start(|request| match request.path.starts_with("/token") {
        true => Reply::ok(br#"{"token": "abc"}"#),
        false => Reply::with(
            401,
            "www-authenticate",
            "Bearer realm=\"/token\",service=\"s\"".to_owned(),
        ),
    });
    let error = place.refused(&with_password(request(&registry))).await;
    assert!(matches!(error, OciError::Unauthorized { .. }), "{error}");
    assert_eq!(registry.seen("/token").len(), 1);
    let first = &registry.seen("/token")[0];
    assert_eq!(first.path, "/token?service=s&scope=repository%3Abox%3Apull");
    assert_eq!(first.authorization.as_deref(), Some("Basic dXNlcjpzZWNyZXQ="));
    place.assert_nothing_is_left();
}

#[tokio::test]
async fn tokens_are_fetched_within_limits_and_shown_to_the_registry() {
    let (image, place) = (FakeImage::new(), Place::new());
    let challenge = |realm: &str| Reply::with(401, "www-authenticate", format!("Bearer realm=\"{realm}\""));
    let with_token = |reply: Reply, realm: &'static str| {
        FakeRegistry::of(&image, move |request| match &request.authorization {
            _ if request.path.starts_with("/token") => Some(reply.clone()),
            Some(token) if token == "Bearer abc" => None,
            _ if request.path == "/v2/" => None,
            _ => Some(challenge(realm)),
        })
    };
    let registry = with_token(Reply::ok(br#"{"access_token": "abc"}"#), "/token");
    place.pull(&request(&registry)).await.unwrap();
    assert_eq!(registry.seen("/token").len(), 1, "one token for all requests");
    for (reply, realm) in [
        (Reply::Endless, "/token"),
        (Reply::ok(b"no token"), "/token"),
        (Reply::status(403), "/token"),
        (Reply::ok(b""), "http://169.254.169.254/token"),
        (Reply::ok(b""), "file:///etc/passwd"),
    ] {
        let error = Place::new().refused(&request(&with_token(reply, realm))).await;
        let fits = matches!(
            error,
            OciError::TooLarge { .. } | OciError::Unauthorized { .. } | OciError::Redirect { .. }
        );
        assert!(fits, "{realm}: {error}");
    }
}

#[tokio::test]
async fn credentials_do_not_follow_a_redirect() {
    let (image, place) = (FakeImage::new(), Place::new());
    let cdn = FakeRegistry::of(&image, |_| None);
    let (target, blob) = (cdn.host(), image.layer.clone());
    let registry = FakeRegistry::of(&image, move |request: &Request| match &request.authorization {
        None if request.path != "/v2/" => Some(Reply::with(401, "www-authenticate", "Basic realm=\"x\"")),
        _ if request.path == blob => Some(Reply::with(307, "location", format!("http://{target}{blob}"))),
        _ => None,
    });
    place.pull(&with_password(request(&registry))).await.unwrap();
    let there = cdn.seen("");
    assert_eq!(there.len(), 1);
    assert_eq!(there[0].authorization, None);
    assert!(registry.seen(&image.layer)[0].authorization.is_some());
}

#[tokio::test]
async fn redirects_to_forbidden_places_and_in_circles_are_not_followed() {
    for target in [
        "http://169.254.169.254/latest/meta-data",
        "file:///etc/passwd",
        "ftp://x/",
        "http://",
        "/v2/again",
    ] {
        let (image, place) = (FakeImage::new(), Place::new());
        let registry = FakeRegistry::of(&image, move |request| {
            (request.path != "/v2/").then(|| Reply::with(302, "location", target))
        });
        let error = place.refused(&request(&registry)).await;
        assert!(matches!(error, OciError::Redirect { .. }), "{target}: {error}");
        assert!(registry.seen("").len() < 10);
        place.assert_nothing_is_left();
    }
}

#[tokio::test]
async fn names_with_forbidden_addresses_are_not_connected_to() {
    let public = Reach::of(&"https://1.1.1.1/".parse().unwrap());
    let resolved = Resolver(public).resolve("localhost".parse().unwrap()).await;
    let error = resolved.err().unwrap();
    assert!(error.to_string().contains("forbidden"), "{error}");
    let local = Reach::of(&"http://localhost:5000/".parse().unwrap());
    assert!(Resolver(local).resolve("localhost".parse().unwrap()).await.is_ok());
}

#[tokio::test]
async fn stalled_endless_and_forged_answers_end_with_an_error_and_leave_nothing() {
    type Fits = fn(&OciError) -> bool;
    let image = FakeImage::new();
    let (manifest, layer) = (image.manifest.as_str(), image.layer.as_str());
    let forged = vec![b'x'; image.layer_bytes().len()];
    let short = image.layer_bytes()[..1000].to_vec();
    let cases: [(&str, Reply, Fits); 8] = [
        (manifest, Reply::Stall(Vec::new()), |error| {
            matches!(error, OciError::Stalled { .. })
        }),
        (manifest, Reply::Endless, |error| {
            matches!(error, OciError::TooLarge { .. })
        }),
        (manifest, Reply::ok(b"<html>"), |error| {
            matches!(error, OciError::Manifest { .. })
        }),
        (layer, Reply::Stall(short.clone()), |error| {
            matches!(error, OciError::Stalled { .. })
        }),
        (layer, Reply::Endless, |error| {
            matches!(error, OciError::WrongSize { .. })
        }),
        (layer, Reply::ok(&forged), |error| {
            matches!(error, OciError::WrongDigest { .. })
        }),
        (layer, Reply::ok(&short), |error| {
            matches!(error, OciError::WrongSize { .. })
        }),
        (layer, Reply::status(404), |error| {
            matches!(error, OciError::NotFound { .. })
        }),
    ];
    for (path, reply, fits) in cases {
        let (place, path) = (Place::new(), path.to_owned());
        let what = format!("{path}: {}", format!("{reply:?}").chars().take(40).collect::<String>());
        let registry = FakeRegistry::of(&image, move |request| (request.path == path).then(|| reply.clone()));
        let error = place.refused(&request(&registry)).await;
        assert!(fits(&error), "{what}: {error}");
        place.assert_nothing_is_left();
    }
}

#[tokio::test]
async fn a_forged_manifest_is_recognized_by_the_digest_of_the_reference() {
    let (image, place) = (FakeImage::new(), Place::new());
    let other = image.contents[&image.manifest]
        .iter()
        .copied()
        .chain([b' '])
        .collect::<Vec<u8>>();
    let registry = FakeRegistry::of(&image, move |request| {
        request.path.contains("manifests").then(|| Reply::ok(&other))
    });
    let error = place
        .refused(&named(&format!("{}/box@{}", registry.host(), image.digest)))
        .await;
    assert!(matches!(error, OciError::WrongDigest { .. }), "{error}");
    place.assert_nothing_is_left();
}

#[tokio::test]
async fn a_dropped_pull_removes_what_it_has_written() {
    let (image, place) = (FakeImage::new(), Place::new());
    let (layer, part) = (image.layer.clone(), image.layer_bytes()[..1000].to_vec());
    let registry = FakeRegistry::of(&image, move |request| {
        (request.path == layer).then(|| Reply::Stall(part.clone()))
    });
    let mut slow = request(&registry);
    slow.deadlines.stall = Duration::from_secs(60);
    let begun = async {
        while place.names("cache/sha256").is_empty() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    place.cache();
    tokio::select! {
        _ = place.pull(&slow) => panic!("it ended"),
        () = begun => {}
    }
    tokio::time::timeout(Duration::from_secs(20), async {
        while !place.names("cache/sha256").is_empty() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await
    .unwrap();
    place.assert_nothing_is_left();
}

/// A request for an image of `registry`, with mirrors at these hosts.
fn mirrored(registry: &FakeRegistry, mirrors: &[&str]) -> PullRequest {
    let mirror = |host: &&str| format!("{}=http://{host}", registry.host()).parse().unwrap();
    PullRequest {
        mirrors: mirrors.iter().map(mirror).collect(),
        ..request(registry)
    }
}

#[tokio::test]
async fn a_mirror_takes_the_place_of_its_registry_only() {
    let (image, place) = (FakeImage::new(), Place::new());
    let (registry, mirror) = (FakeRegistry::of(&image, |_| None), FakeRegistry::of(&image, |_| None));
    let request = mirrored(&registry, &[&mirror.host()]);
    let made = place.pull(&with_password(request.clone())).await.unwrap();
    assert_eq!(made.reference, Some(format!("{}/box:1", registry.host())));
    assert!(registry.seen("").is_empty(), "{:?}", registry.seen(""));
    assert_eq!(mirror.seen("manifests").len(), 1);
    // It is not a mirror of another registry.
    let other = PullRequest {
        mirrors: vec![format!("docker.io=http://{}", mirror.host()).parse().unwrap()],
        ..request
    };
    Place::new().pull(&other).await.unwrap();
    assert_eq!(
        (mirror.seen("manifests").len(), registry.seen("manifests").len()),
        (1, 1)
    );
}

#[tokio::test]
async fn a_mirror_that_fails_is_passed_over_and_never_gets_the_credentials() {
    let image = FakeImage::new();
    let (layer, manifest) = (image.layer.as_str(), image.manifest.as_str());
    let forged = vec![b'x'; image.layer_bytes().len()];
    let closed = FakeRegistry::of(&image, |_| None).host();
    for (path, reply) in [
        ("", Reply::status(404)),
        ("", Reply::status(503)),
        ("", Reply::with(401, "www-authenticate", "Basic realm=\"x\"")),
        (manifest, Reply::Stall(Vec::new())),
        (manifest, Reply::ok(b"<html>")),
        (layer, Reply::status(404)),
        (layer, Reply::ok(&forged)),
        (layer, Reply::Cut(Vec::new(), 1000)),
    ] {
        let what: String = format!("{path} {reply:?}").chars().take(120).collect();
        let (place, path) = (Place::new(), path.to_owned());
        let mirror = FakeRegistry::of(&image, move |request| {
            request.path.contains(&path).then(|| reply.clone())
        });
        let registry = FakeRegistry::of(&image, |request: &Request| match &request.authorization {
            None if request.path != "/v2/" => Some(Reply::with(401, "www-authenticate", "Basic realm=\"x\"")),
            _ => None,
        });
        let request = with_password(mirrored(&registry, &[&closed, &mirror.host()]));
        let made = place.pull(&request).await.unwrap();
        assert_eq!(hello(&made.image).len(), 400_000, "{what}");
        let seen = mirror.seen("");
        assert!(
            !seen.is_empty() && seen.iter().all(|request| request.authorization.is_none()),
            "{what}"
        );
        assert!(seen.len() < 8, "{what}: {seen:?}");
        drop(made);
        assert_eq!(place.names("work"), [""; 0]);
    }
}

#[tokio::test]
async fn the_error_of_the_registry_is_reported_when_mirrors_fail_too() {
    let (image, place) = (FakeImage::new(), Place::new());
    let mirror = FakeRegistry::of(&image, |_| Some(Reply::status(503)));
    let registry = FakeRegistry::of(&image, |_| Some(Reply::status(404)));
    let error = place.refused(&mirrored(&registry, &[&mirror.host()])).await;
    assert!(matches!(error, OciError::NotFound { .. }), "{error}");
    place.assert_nothing_is_left();
}

#[tokio::test]
async fn malformed_references_are_rejected() {
    let place = Place::new();
    for reference in [
        "",
        "UPPER",
        "a b",
        "../x",
        "x@sha256:12",
        "x:tag:tag",
        "http://host/x",
        "x@md5:0123456789abcdef0123456789abcdef",
    ] {
        let error = place.refused(&named(reference)).await;
        assert!(matches!(error, OciError::Reference { .. }), "{reference}: {error}");
    }
    let complete = crate::oci::complete_reference("python:3.12-slim").unwrap();
    assert_eq!(complete, "docker.io/library/python:3.12-slim");
}
