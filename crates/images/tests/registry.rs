//! Pulls from a real registry. It is Debian's `docker-registry` with a password, on loopback,
//! filled by `skopeo` and `umoci` with an image that is made here.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a failed step ends the test"
)]

#[path = "support/registry.rs"]
mod registry;

use registry::{Layout, PASSWORD, Registry, USER, run, small};
use scalebox_images::convert::{Kind, convert, recognise};
use scalebox_images::oci::{Credentials, Deadlines, LayerCache, Limits, Made, OciError, PullRequest, Task, pull};
use scalebox_units::{Bytes, Init};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Instant;

fn request(registry: &Registry, name: &str) -> PullRequest {
    PullRequest {
        reference: format!("{}/{name}", registry.host),
        credentials: Some(Credentials {
            username: USER.to_owned(),
            password: PASSWORD.to_owned(),
        }),
        insecure: false,
        mirrors: Vec::new(),
        deadlines: Deadlines::default(),
    }
}

/// Folders for pulls.
struct Place {
    folder: tempfile::TempDir,
}

impl Place {
    fn new() -> Place {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("work")).unwrap();
        Place { folder }
    }

    fn work(&self) -> PathBuf {
        self.folder.path().join("work")
    }

    fn task() -> Task {
        Task::new(Arc::new(()), Limits::default())
    }

    async fn pull(&self, request: &PullRequest) -> Result<Made, OciError> {
        let cache = LayerCache::open(&self.folder.path().join("cache")).unwrap();
        pull(request, &cache, &self.work(), &Place::task()).await
    }
}

fn ask(made: &Made, command: &str) -> String {
    let output = Command::new("debugfs")
        .args(["-R", command])
        .arg(&made.image)
        .output()
        .unwrap();
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn assert_is_small(made: &Made) {
    assert_eq!(ask(made, "cat /etc/changed"), "new");
    assert!(ask(made, "stat /etc/changed").contains("User:  1234   Group:  5678"));
    assert!(ask(made, "stat /usr/bin/again").contains("Mode:  04755"));
    assert!(ask(made, "stat /usr/bin/again").contains("Links: 2"));
    assert!(!ask(made, "ls /etc").contains("removed"));
    let config = made.config.as_ref().unwrap();
    assert_eq!(
        (config.cmd.as_slice(), config.env.as_slice()),
        (&["/bin/tool".to_owned()][..], &["A=1".to_owned()][..])
    );
    assert_eq!(
        (config.working_dir.as_deref(), config.user.as_deref()),
        (Some("/etc"), Some("1234"))
    );
    assert_eq!(config.exposed_ports, ["80/tcp"]);
    assert_eq!(made.init, Init::Agent);
    assert_eq!(made.image.metadata().unwrap().len(), 1 << 30);
}

#[tokio::test]
async fn an_image_is_pulled_from_a_registry_with_a_password() {
    let (registry, place) = (Registry::start(), Place::new());
    registry.push(&small(), "team/box:1");
    let made = place.pull(&request(&registry, "team/box:1")).await.unwrap();
    assert_is_small(&made);
    let digest = made.digest.clone().unwrap();
    let again = place
        .pull(&request(&registry, &format!("team/box@{digest}")))
        .await
        .unwrap();
    assert_is_small(&again);

    let anonymous = PullRequest {
        credentials: None,
        ..request(&registry, "team/box:1")
    };
    assert!(matches!(
        place.pull(&anonymous).await,
        Err(OciError::Unauthorized { .. })
    ));
    let mut wrong = request(&registry, "team/box:1");
    wrong.credentials.as_mut().unwrap().password = "wrong".to_owned();
    assert!(matches!(place.pull(&wrong).await, Err(OciError::Unauthorized { .. })));
    let absent = place.pull(&request(&registry, "team/absent:1")).await;
    assert!(matches!(absent, Err(OciError::NotFound { .. })));
    drop((made, again));
    assert_eq!(fs::read_dir(place.work()).unwrap().count(), 0);
}

#[test]
fn archives_of_skopeo_are_imported() {
    let (layout, place) = (small(), Place::new());
    for (kind, transport) in [
        (Kind::OciArchive, "oci-archive"),
        (Kind::DockerArchive, "docker-archive"),
    ] {
        let archive = layout.path(transport);
        run(
            "skopeo",
            &["copy", "-q", &layout.image(), &format!("{transport}:{archive}:box:1")],
        );
        assert_eq!(recognise(archive.as_ref()).unwrap(), kind);
        assert_is_small(&convert(archive.as_ref(), &place.work(), &Place::task()).unwrap());
    }
    assert_eq!(fs::read_dir(place.work()).unwrap().count(), 0);
}

/// Prints the time of the pull too, compared to copying and unpacking the image with other tools.
#[tokio::test]
async fn an_image_of_five_layers_arrives_complete() {
    let (registry, place, layout) = (Registry::start(), Place::new(), Layout::new());
    let mut seed = 1_u64;
    for layer in 0..5 {
        layout.layer(|root| {
            for number in 0..400 {
                let folder = root.join(format!("usr/lib/{layer}/{}", number % 20));
                fs::create_dir_all(&folder).unwrap();
                let next = |_| {
                    seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    (seed >> 56) as u8
                };
                let content: Vec<u8> = (0..26_000).map(next).collect();
                fs::write(folder.join(number.to_string()), content).unwrap();
            }
        });
    }
    registry.push(&layout, "big:1");
    let begun = Instant::now();
    let source = format!("docker://{}/big:1", registry.host);
    let copy = layout.path("copy");
    run(
        "skopeo",
        &[
            "copy",
            "-q",
            "--src-tls-verify=false",
            "--src-creds=user:secret",
            &source,
            &format!("oci:{copy}:1"),
        ],
    );
    run(
        "umoci",
        &["unpack", "--image", &format!("{copy}:1"), &layout.path("unpacked")],
    );
    let others = begun.elapsed();
    let begun = Instant::now();
    let made = place.pull(&request(&registry, "big:1")).await.unwrap();
    let ours = begun.elapsed();
    let size = Bytes::from_blocks(
        std::os::unix::fs::MetadataExt::blocks(&made.image.metadata().unwrap()),
        512,
    );
    let last = made.image.to_str().unwrap();
    let checked = Command::new("e2fsck").args(["-f", "-n", last]).output().unwrap();
    assert!(checked.status.success(), "{checked:?}");
    for layer in 0..5 {
        let name = format!("usr/lib/{layer}/19/399");
        let expected = fs::read(Path::new(&layout.path("unpacked")).join("rootfs").join(&name)).unwrap();
        let cat = ["-R", &format!("cat /{name}"), last];
        let read = Command::new("debugfs").args(cat).output().unwrap();
        assert!(read.stdout == expected, "{name} differs");
    }
    println!(
        "pull {ours:.2?}, skopeo and umoci {others:.2?}: {:.2} times; {size} of ext4",
        ours.as_secs_f64() / others.as_secs_f64()
    );
}
