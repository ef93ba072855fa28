//! Manifests, lists of manifests, and image configurations.

use crate::oci::digest::Digest;
use crate::oci::error::{OciError, quoted};
use crate::oci::limits::{Limits, MAX_DOCUMENT, MAX_LAYERS, MAX_SETTINGS};
use oci_spec::image::{Arch, Descriptor, ImageConfiguration, ImageIndex, ImageManifest, Os};
use scalebox_units::{Bytes, ImageConfig};
use serde::de::DeserializeOwned;

/// Content that is stored under its digest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Blob {
    pub(crate) digest: Digest,
    pub(crate) size: u64,
}

/// The manifest of an image for one platform.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Manifest {
    pub(crate) config: Blob,
    /// The lowest layer first.
    pub(crate) layers: Vec<Blob>,
}

impl Manifest {
    /// Returns the size of all layers, as they are stored.
    pub(crate) fn stored(&self) -> u64 {
        self.layers.iter().map(|layer| layer.size).sum()
    }
}

/// The target of a reference.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Document {
    Image(Manifest),
    /// The digest of the manifest for this platform.
    List(Digest),
}

/// The configuration of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Configuration {
    pub(crate) config: ImageConfig,
    /// The digests of the uncompressed layers, the lowest first.
    pub(crate) diff_ids: Vec<Digest>,
}

/// Parses a manifest or a list of manifests. `what` is the name of the image, for messages.
pub(crate) fn parse(body: &[u8], what: &str, limits: &Limits) -> Result<Document, OciError> {
    let value: serde_json::Value = json(body, &format!("the manifest of {what}"))?;
    match value.get("schemaVersion").and_then(serde_json::Value::as_u64) {
        Some(2) => {}
        Some(1) => {
            return Err(unusable(
                what,
                "it has the obsolete manifest schema 1; push it again with a current tool",
            ));
        }
        _ => return Err(unusable(what, "it is not a manifest")),
    }
    if value.get("manifests").is_some() {
        return choose(&json(body, &format!("the list of {what}"))?, what).map(Document::List);
    }
    let manifest: ImageManifest = json(body, &format!("the manifest of {what}"))?;
    image(&manifest, what, limits).map(Document::Image)
}

/// Chooses the manifest for linux/amd64 from a list.
pub(crate) fn choose(index: &ImageIndex, what: &str) -> Result<Digest, OciError> {
    // Generic code comes before code for newer processors, which an emulated one may not run.
    let rank = |descriptor: &Descriptor| match descriptor.platform() {
        Some(platform) if *platform.os() == Os::Linux && *platform.architecture() == Arch::Amd64 => {
            match platform.variant().as_deref() {
                None | Some("" | "v1") => Some(0),
                Some("v2") => Some(1),
                Some(_) => None,
            }
        }
        Some(_) => None,
        // An archive with a single image often omits the platform. The configuration has it.
        None => Some(2),
    };
    let ranked = index.manifests().iter().filter_map(|entry| Some((rank(entry)?, entry)));
    let Some((_, chosen)) = ranked.min_by_key(|(rank, _)| *rank) else {
        let platforms = index.manifests().iter().filter_map(|entry| entry.platform().as_ref());
        let mut names: Vec<String> = platforms
            .map(|platform| format!("{}/{}", platform.os(), platform.architecture()))
            .collect();
        names.sort();
        names.dedup();
        return Err(OciError::Platform {
            image: what.to_owned(),
            platforms: quoted(names.join(", ").as_bytes()),
        });
    };
    Ok(blob(chosen, what)?.digest)
}

fn image(manifest: &ImageManifest, what: &str, limits: &Limits) -> Result<Manifest, OciError> {
    if manifest.layers().len() > MAX_LAYERS {
        return Err(OciError::TooMany {
            what: "too many layers",
            limit: MAX_LAYERS as u64,
        });
    }
    let layers: Vec<Blob> = manifest
        .layers()
        .iter()
        .map(|layer| layer_blob(layer, what))
        .collect::<Result<_, _>>()?;
    let config = blob(manifest.config(), what)?;
    if config.size > MAX_DOCUMENT {
        return Err(OciError::TooLarge {
            what: format!("the configuration of {what}"),
            limit: Bytes::new(MAX_DOCUMENT),
        });
    }
    let total = layers.iter().try_fold(0_u64, |sum, layer| sum.checked_add(layer.size));
    match total {
        Some(total) if total <= limits.max_stored.as_u64() => Ok(Manifest { config, layers }),
        _ => Err(OciError::TooLarge {
            what: what.to_owned(),
            limit: limits.max_stored,
        }),
    }
}

fn layer_blob(layer: &Descriptor, what: &str) -> Result<Blob, OciError> {
    let kind = layer.media_type().to_string();
    // The compression is recognised by content. Other kinds are artifacts, or encrypted.
    let is_layer = kind.contains("image.layer.") || kind.contains("image.rootfs.");
    match is_layer && kind.contains(".tar") && !kind.contains("encrypted") {
        true => blob(layer, what),
        false => Err(unusable(
            what,
            &format!("it has a layer of the kind {}", quoted(kind.as_bytes())),
        )),
    }
}

fn blob(descriptor: &Descriptor, what: &str) -> Result<Blob, OciError> {
    let text = descriptor.digest().to_string();
    match text.parse() {
        Ok(digest) => Ok(Blob {
            digest,
            size: descriptor.size(),
        }),
        Err(_) => Err(unusable(
            what,
            &format!("the digest {} is not SHA-256", quoted(text.as_bytes())),
        )),
    }
}

/// Parses the configuration of an image with `layers` layers. `what` is its name, for messages.
pub(crate) fn configuration(body: &[u8], what: &str, layers: usize) -> Result<Configuration, OciError> {
    let parsed: ImageConfiguration = json(body, &format!("the configuration of {what}"))?;
    if (parsed.os(), parsed.architecture()) != (&Os::Linux, &Arch::Amd64) {
        return Err(OciError::Platform {
            image: what.to_owned(),
            platforms: quoted(format!("{}/{}", parsed.os(), parsed.architecture()).as_bytes()),
        });
    }
    let digests = parsed.rootfs().diff_ids().iter().map(|digest| digest.parse());
    let diff_ids: Vec<Digest> = digests
        .collect::<Result<_, _>>()
        .map_err(|_| unusable(what, "a digest of a layer is not SHA-256"))?;
    if diff_ids.len() != layers {
        return Err(unusable(
            what,
            &format!("it has {layers} layers, and digests for {}", diff_ids.len()),
        ));
    }
    let config = settings(&parsed);
    let size = serde_json::to_vec(&config).map_or(usize::MAX, |json| json.len());
    if size > MAX_SETTINGS {
        return Err(unusable(
            what,
            &format!("its environment, commands and other settings take {size} bytes, more than {MAX_SETTINGS}"),
        ));
    }
    Ok(Configuration { config, diff_ids })
}

fn settings(parsed: &ImageConfiguration) -> ImageConfig {
    let Some(config) = parsed.config() else {
        return ImageConfig::default();
    };
    let text = |field: &Option<String>| field.clone().filter(|text| !text.is_empty());
    let list = |field: &Option<Vec<String>>| field.clone().unwrap_or_default();
    let mut exposed_ports = list(config.exposed_ports());
    exposed_ports.sort();
    ImageConfig {
        env: list(config.env()),
        entrypoint: list(config.entrypoint()),
        cmd: list(config.cmd()),
        working_dir: text(config.working_dir()),
        user: text(config.user()),
        exposed_ports,
        stop_signal: text(config.stop_signal()),
    }
}

pub(crate) fn json<T: DeserializeOwned>(body: &[u8], what: &str) -> Result<T, OciError> {
    serde_json::from_slice(body).map_err(|error| OciError::Manifest {
        what: what.to_owned(),
        reason: quoted(error.to_string().as_bytes()),
    })
}

pub(crate) fn unusable(what: &str, reason: &str) -> OciError {
    OciError::Manifest {
        what: what.to_owned(),
        reason: reason.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn digest(letter: char) -> String {
        format!("sha256:{}", letter.to_string().repeat(64))
    }

    fn parsed(value: serde_json::Value) -> Result<Document, OciError> {
        parse(value.to_string().as_bytes(), "box:1", &Limits::default())
    }

    fn manifest(layer: serde_json::Value) -> serde_json::Value {
        json!({"schemaVersion": 2, "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": digest('c'), "size": 7},
            "layers": [layer]})
    }

    #[test]
    fn the_generic_manifest_for_linux_amd64_is_chosen() {
        let entry = |letter, os, architecture, variant: Option<&str>| {
            let platform = json!({"os": os, "architecture": architecture, "variant": variant});
            json!({"mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": digest(letter), "size": 1, "platform": platform})
        };
        let list = |entries: Vec<serde_json::Value>| parsed(json!({"schemaVersion": 2, "manifests": entries}));
        let entries = vec![
            entry('a', "linux", "arm64", None),
            entry('b', "linux", "amd64", Some("v3")),
            entry('c', "linux", "amd64", Some("v2")),
            entry('d', "linux", "amd64", None),
            entry('e', "unknown", "unknown", None),
        ];
        assert_eq!(
            list(entries.clone()).unwrap(),
            Document::List(digest('d').parse().unwrap())
        );
        let error = list(vec![entries[0].clone(), entries[4].clone()]).unwrap_err();
        assert!(
            error.to_string().ends_with("only for: linux/arm64, unknown/unknown"),
            "{error}"
        );
        assert!(matches!(list(vec![]), Err(OciError::Platform { .. })));
    }

    #[test]
    fn unusable_manifests_are_rejected_with_the_reason() {
        let layer =
            |kind: &str, digest: &str, size: u64| manifest(json!({"mediaType": kind, "digest": digest, "size": size}));
        let tar = "application/vnd.oci.image.layer.v1.tar+gzip";
        let docker = "application/vnd.docker.image.rootfs.diff.tar.gzip";
        assert!(matches!(parsed(layer(tar, &digest('a'), 5)), Ok(Document::Image(_))));
        assert!(matches!(parsed(layer(docker, &digest('a'), 5)), Ok(Document::Image(_))));
        for (value, reason) in [
            (
                layer("application/vnd.oci.image.layer.v1.tar+encrypted", &digest('a'), 5),
                "kind",
            ),
            (
                layer("application/vnd.wasm.content.layer.v1+wasm", &digest('a'), 5),
                "kind",
            ),
            (layer(tar, &format!("sha512:{}", "a".repeat(128)), 5), "SHA-256"),
            (layer(tar, "sha256:../../etc/passwd", 5), "cannot use"),
            (layer(tar, &digest('a'), u64::MAX), "larger"),
            (json!({"schemaVersion": 1, "fsLayers": []}), "obsolete"),
            (json!({"hello": 1}), "not a manifest"),
            (json!([]), "not a manifest"),
        ] {
            let error = parsed(value).unwrap_err().to_string();
            assert!(error.contains(reason), "{error}");
        }
    }

    #[test]
    fn settings_are_read_and_must_match_the_layers() {
        let body = json!({"os": "linux", "architecture": "amd64", "rootfs": {"type": "layers", "diff_ids": [digest('a')]},
            "config": {"Env": ["A=1"], "Entrypoint": ["/run"], "Cmd": null, "WorkingDir": "", "User": "app:app",
                "ExposedPorts": {"80/tcp": {}, "53/udp": {}}, "StopSignal": "SIGQUIT"}});
        let read = configuration(body.to_string().as_bytes(), "box", 1).unwrap();
        let expected = ImageConfig {
            env: vec!["A=1".to_owned()],
            entrypoint: vec!["/run".to_owned()],
            user: Some("app:app".to_owned()),
            exposed_ports: vec!["53/udp".to_owned(), "80/tcp".to_owned()],
            stop_signal: Some("SIGQUIT".to_owned()),
            ..ImageConfig::default()
        };
        assert_eq!(read.config, expected);
        assert!(configuration(body.to_string().as_bytes(), "box", 2).is_err());
        let large = body
            .to_string()
            .replace("A=1", &format!("A={}", "1".repeat(MAX_SETTINGS)));
        let error = configuration(large.as_bytes(), "box", 1).unwrap_err().to_string();
        assert!(error.contains("131072"), "{error}");
        let arm = body.to_string().replace("amd64", "arm64");
        assert!(matches!(
            configuration(arm.as_bytes(), "box", 1),
            Err(OciError::Platform { .. })
        ));
    }
}
