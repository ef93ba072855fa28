//! Makes container images with `tar` and `umoci`, and pushes them with `skopeo`.

use crate::command::run;
use crate::disks::TEMPLATE;
use crate::outcome::Outcome;
use crate::setup::Setup;
use std::fs;
use std::path::Path;
use std::process::Command;

/// A static program, the whole content of an image.
const PROGRAM: &str = "/bin/busybox";

/// The layers of the larger image: folders of the Debian template, about 50 MiB when compressed.
const LAYERS: [&[&str]; 5] = [
    &["etc", "usr/sbin"],
    &["usr/bin"],
    &["usr/lib/x86_64-linux-gnu"],
    &["usr/lib/systemd", "usr/lib/udev", "usr/lib/openssh", "usr/lib/apt"],
    &["usr/share"],
];

/// An image in the registry.
pub(crate) struct Image {
    /// Host, port, name and tag.
    pub reference: String,
    /// Size of its layers in the registry, in bytes.
    pub bytes: u64,
    /// Number of its layers.
    pub layers: usize,
}

/// Pushes an image that contains `/busybox` and nothing else.
pub(crate) fn push_program(setup: &Setup) -> Outcome<Image> {
    let root = setup.scratch.join("program-root");
    fs::create_dir(&root)?;
    fs::copy(PROGRAM, root.join("busybox"))?;
    push(setup, "program", &root, &[&["busybox"]])
}

/// Pushes an image with five layers of files of the Debian template.
pub(crate) fn push_debian(setup: &Setup) -> Outcome<Image> {
    let root = setup.scratch.join("debian-root");
    let template = setup.pool.join("templates").join(format!("{TEMPLATE}.ext4"));
    for folder in LAYERS.concat() {
        let parent = root.join(Path::new(folder).parent().unwrap_or(Path::new("")));
        fs::create_dir_all(&parent)?;
        let request = format!("rdump /{folder} {}", parent.display());
        run(Command::new("debugfs").args(["-R", &request]).arg(&template))?;
    }
    push(setup, "debian", &root, &LAYERS)
}

/// Pushes the image `name`, whose layers are folders of `root`. Removes `root`.
fn push(setup: &Setup, name: &str, root: &Path, layers: &[&[&str]]) -> Outcome<Image> {
    let layout = setup.scratch.join(format!("{name}-layout"));
    let image = format!("{}:1", layout.display());
    run(Command::new("umoci").args(["init", "--layout"]).arg(&layout))?;
    run(Command::new("umoci").args(["new", "--image", &image]))?;
    let archive = setup.scratch.join("layer.tar");
    for folders in layers {
        let mut tar = Command::new("tar");
        tar.args(["--create", "--sort=name", "--numeric-owner", "--file"]);
        run(tar.arg(&archive).arg("--directory").arg(root).args(*folders))?;
        run(Command::new("umoci")
            .args(["raw", "add-layer", "--image", &image])
            .arg(&archive))?;
        fs::remove_file(&archive)?;
    }
    let reference = format!("{}/bench/{name}:1", setup.registry);
    let (from, to) = (format!("oci:{image}"), format!("docker://{reference}"));
    run(Command::new("skopeo").args(["copy", "--quiet", "--dest-tls-verify=false", &from, &to]))?;
    let bytes = layer_bytes(&reference)?;
    fs::remove_dir_all(layout)?;
    fs::remove_dir_all(root)?;
    Ok(Image {
        reference,
        bytes,
        layers: layers.len(),
    })
}

/// Returns the size of all layers, by the image's manifest.
fn layer_bytes(reference: &str) -> Outcome<u64> {
    let image = format!("docker://{reference}");
    let manifest = run(Command::new("skopeo").args(["inspect", "--raw", "--tls-verify=false", &image]))?;
    let manifest: serde_json::Value = serde_json::from_str(&manifest)?;
    let layers = manifest["layers"].as_array().ok_or("a manifest without layers")?;
    Ok(layers.iter().filter_map(|layer| layer["size"].as_u64()).sum())
}
