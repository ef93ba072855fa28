//! Pulls an image: from a reference to a file system.

use crate::oci::access::Credentials;
use crate::oci::build::{Made, Stored, build};
use crate::oci::cache::LayerCache;
use crate::oci::digest::Digest;
use crate::oci::download::{Downloads, blocking};
use crate::oci::error::{OciError, quoted};
use crate::oci::limits::Deadlines;
use crate::oci::manifest::{self, Blob, Configuration, Document, Manifest};
use crate::oci::mirror::Mirror;
use crate::oci::registry::{Registry, read_document};
use crate::oci::task::Task;
use oci_spec::distribution::Reference;
use std::fs::File;
use std::path::Path;

/// Maximum number of lists of manifests that lead from one to the next.
const MAX_LISTS: usize = 3;

/// The image to pull, and how to reach it.
#[derive(Debug, Clone)]
pub struct PullRequest {
    /// The image, such as `python:3.12-slim` or `localhost:5000/a/b@sha256:…`.
    pub reference: String,
    /// The credentials for a registry that requires them.
    pub credentials: Option<Credentials>,
    /// Allows plain HTTP, if HTTPS does not work. Registries on loopback may always use it.
    pub insecure: bool,
    /// Mirrors of this and other registries. Those of this one are tried in their order, before the
    /// registry itself, and without the credentials.
    pub mirrors: Vec<Mirror>,
    /// Deadlines of the communication.
    pub deadlines: Deadlines,
}

/// Checks a reference, and returns its complete form: with registry, and tag or digest.
///
/// # Errors
/// [`OciError::Reference`].
pub fn complete_reference(text: &str) -> Result<String, OciError> {
    parse(text).map(|reference| reference.whole())
}

fn parse(text: &str) -> Result<Reference, OciError> {
    let invalid = |reason: String| OciError::Reference {
        reference: quoted(text.as_bytes()),
        reason,
    };
    let reference: Reference = text
        .parse()
        .map_err(|error: oci_spec::distribution::ParseError| invalid(error.to_string()))?;
    match reference.digest().map(str::parse::<Digest>) {
        Some(Err(error)) => Err(invalid(error.to_string())),
        _ => Ok(reference),
    }
}

/// Pulls an image into the new file system in [`Made::image`], below `work`.
///
/// Layers go to `cache` first, and stay there. Dropping the future ends the pull and removes its
/// files; the blocking part ends within seconds.
///
/// # Errors
/// All of [`OciError`].
pub async fn pull(request: &PullRequest, cache: &LayerCache, work: &Path, task: &Task) -> Result<Made, OciError> {
    let reference = parse(&request.reference)?;
    let _cancel = CancelOnDrop(task);
    let registry = reference.registry();
    for mirror in request.mirrors.iter().filter(|mirror| mirror.is_of(registry)) {
        let mirror = Registry::mirror(mirror.base(), request.deadlines)?;
        match fetch(&mirror, &reference, cache, task).await {
            Ok(fetched) => return finish(fetched, &reference, work, task).await,
            Err(error) if is_own(&error) => return Err(error),
            Err(error) => {
                let mirror = mirror.name();
                tracing::warn!(mirror, image = %reference, %error, "cannot pull from a mirror; trying the next")
            }
        }
    }
    let credentials = request.credentials.clone();
    let registry = Registry::open(registry, request.insecure, credentials, request.deadlines).await?;
    let fetched = fetch(&registry, &reference, cache, task).await?;
    finish(fetched, &reference, work, task).await
}

/// Returns whether the cause of an error is here, and not at the registry.
fn is_own(error: &OciError) -> bool {
    matches!(
        error,
        OciError::Refused(_) | OciError::Cancelled | OciError::Io { .. } | OciError::FileSystem(_)
    )
}

/// Cancels the blocking part of a pull with the rest of it.
struct CancelOnDrop<'t>(&'t Task);

impl Drop for CancelOnDrop<'_> {
    fn drop(&mut self) {
        self.0.cancel();
    }
}

/// An image whose layers are in the cache.
struct Fetched {
    digest: Digest,
    configuration: Configuration,
    layers: Vec<File>,
    stored: u64,
}

/// Fetches everything of an image from one registry.
async fn fetch(
    registry: &Registry,
    reference: &Reference,
    cache: &LayerCache,
    task: &Task,
) -> Result<Fetched, OciError> {
    let (digest, manifest) = resolve(registry, reference, task).await?;
    let repository = reference.repository();
    let body = config_blob(registry, repository, &manifest.config).await?;
    let configuration = manifest::configuration(&body, &reference.whole(), manifest.layers.len())?;
    let stored = manifest.stored();
    let downloads = Downloads::new(registry, repository, cache, task, stored);
    Ok(Fetched {
        digest,
        configuration,
        layers: downloads.all(&manifest.layers).await?,
        stored,
    })
}

/// Returns the digest that the reference resolves to, and the manifest for this platform.
async fn resolve(registry: &Registry, reference: &Reference, task: &Task) -> Result<(Digest, Manifest), OciError> {
    let (repository, name) = (reference.repository(), reference.whole());
    let mut wanted = reference.digest().and_then(|digest| digest.parse().ok());
    let mut first = None;
    for _ in 0..MAX_LISTS {
        let tag = wanted.as_ref().map(Digest::to_string);
        let tag = tag.as_deref().or(reference.tag()).unwrap_or("latest");
        let body = registry.manifest(repository, tag).await?;
        let actual = Digest::of(&body);
        if let Some(expected) = wanted.filter(|expected| *expected != actual) {
            return Err(OciError::WrongDigest {
                what: format!("the manifest of {name}"),
                expected: expected.to_string(),
                actual: actual.to_string(),
            });
        }
        let digest = first.get_or_insert(actual).clone();
        match manifest::parse(&body, &name, &task.limits)? {
            Document::Image(manifest) => return Ok((digest, manifest)),
            Document::List(next) => wanted = Some(next),
        }
    }
    Err(manifest::unusable(
        &name,
        "its lists of manifests are nested too deeply",
    ))
}

async fn config_blob(registry: &Registry, repository: &str, blob: &Blob) -> Result<Vec<u8>, OciError> {
    let digest = blob.digest.to_string();
    let get = || async {
        let response = registry.blob(repository, &digest, 0).await?;
        read_document(
            response,
            registry.name(),
            "an image configuration",
            registry.deadlines(),
        )
        .await
    };
    let body = registry.retrying(get).await?;
    let actual = Digest::of(&body);
    match actual == blob.digest {
        true => Ok(body),
        false => Err(OciError::WrongDigest {
            what: "the configuration of the image".to_owned(),
            expected: digest,
            actual: actual.to_string(),
        }),
    }
}

/// Makes the file system.
async fn finish(fetched: Fetched, reference: &Reference, work: &Path, task: &Task) -> Result<Made, OciError> {
    let (work, task, name) = (work.to_owned(), task.clone(), reference.whole());
    blocking(move || {
        let layers = fetched.layers.into_iter().map(|file| Ok(Box::new(file) as Stored));
        let mut made = build(layers, fetched.configuration, fetched.stored, &work, &task)?;
        made.reference = Some(name);
        made.digest = Some(fetched.digest);
        Ok(made)
    })
    .await
}
