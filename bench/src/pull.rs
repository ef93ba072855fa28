//! Measures a pull from a registry, compared with `skopeo copy` and `umoci unpack`.

use crate::command::run;
use crate::daemon::Daemon;
use crate::images::{self, Image};
use crate::measure::{median_seconds, timed};
use crate::outcome::Outcome;
use crate::setup::Setup;
use crate::wait::wait_until;
use scalebox_api::{Job, PullTemplate};
use scalebox_client::Client;
use serde::Serialize;
use std::fs;
use std::process::Command;
use std::time::Duration;

/// The template that is pulled.
const NAME: &str = "pulled";

/// The pulls of one image. Times are medians, in seconds.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Pulls {
    /// Size of the layers in the registry, in bytes.
    pub image_bytes: u64,
    /// Number of layers.
    pub image_layers: usize,
    /// From `POST /templates/{name}/pull` to the end of the job: the template is checked and
    /// durable.
    pub pull_s: f64,
    /// `skopeo copy` to an OCI layout, on ext4 over a loop device like the pool's. Flushes nothing.
    pub skopeo_s: f64,
    /// `umoci unpack` of that layout.
    pub umoci_s: f64,
}

/// Pulls an image of about 50 MiB with each method, a few times in turn.
pub(crate) fn measure(setup: &Setup) -> Outcome<Pulls> {
    let daemon = Daemon::start(setup)?;
    let image = images::push_debian(setup)?;
    let rounds = if setup.quick { 1 } else { 5 };
    let (mut pulls, mut skopeo, mut umoci) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..rounds {
        rustix::fs::sync();
        pulls.push(pull_time(setup, daemon.client(), &image)?);
        rustix::fs::sync();
        let (copied, unpacked) = others(setup, &image)?;
        skopeo.push(copied);
        umoci.push(unpacked);
    }
    Ok(Pulls {
        image_bytes: image.bytes,
        image_layers: image.layers,
        pull_s: median_seconds(pulls),
        skopeo_s: median_seconds(skopeo),
        umoci_s: median_seconds(umoci),
    })
}

/// Pulls `image` as the template `name`, and waits until it exists.
pub(crate) fn pull(client: &Client, name: &str, image: &Image) -> Outcome<()> {
    let request = PullTemplate {
        reference: image.reference.clone(),
        username: None,
        password: None,
        insecure: false,
        replace: false,
    };
    let job = client.pull_template(name, &request)?;
    let mut ended = None;
    wait_until("the pull has ended", || {
        ended = Some(client.job(&job.id)?).filter(|job| !job.is_running());
        Ok(ended.is_some())
    })?;
    match ended {
        Some(Job { status, .. }) if status == "done" => Ok(()),
        other => Err(format!("a pull failed: {other:?}").into()),
    }
}

/// Measures a pull without a cache. Then removes the template and the layers.
fn pull_time(setup: &Setup, client: &Client, image: &Image) -> Outcome<Duration> {
    let (time, ()) = timed(|| pull(client, NAME, image))?;
    client.delete_template(NAME)?;
    for layer in fs::read_dir(setup.pool.join("layers/sha256"))? {
        fs::remove_file(layer?.path())?;
    }
    Ok(time)
}

/// Measures `skopeo copy` and `umoci unpack`.
fn others(setup: &Setup, image: &Image) -> Outcome<(Duration, Duration)> {
    let (layout, bundle) = (setup.ext4.join("layout"), setup.ext4.join("bundle"));
    let copied = format!("{}:1", layout.display());
    let (from, to) = (format!("docker://{}", image.reference), format!("oci:{copied}"));
    let mut skopeo = Command::new("skopeo");
    skopeo.args(["copy", "--quiet", "--src-tls-verify=false", &from, &to]);
    let (skopeo, _) = timed(|| run(&mut skopeo))?;
    let mut umoci = Command::new("umoci");
    umoci.args(["unpack", "--image", &copied]).arg(&bundle);
    let (umoci, _) = timed(|| run(&mut umoci))?;
    fs::remove_dir_all(layout)?;
    fs::remove_dir_all(bundle)?;
    Ok((skopeo, umoci))
}
