//! Images in a file: OCI archives and archives of `docker save`.
//!
//! Both are tar archives. Nothing is extracted: an index of the entries has the place of each blob,
//! and layers are read from there. The chain of digests, from the manifest to the configuration to
//! each uncompressed layer, is verified like that of a registry.

use crate::oci::build::{Made, Stored, build};
use crate::oci::digest::Digest;
use crate::oci::error::{OciError, quoted};
use crate::oci::layer::{Kind, Layer};
use crate::oci::limits::MAX_DOCUMENT;
use crate::oci::manifest::{self, Document, Manifest, json, unusable};
use crate::oci::task::Task;
use serde::Deserialize;
use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

/// Maximum number of entries of an archive. An archive of one image has a few for each layer.
const MAX_ENTRIES: usize = 10_000;
/// Maximum number of lists of manifests that lead from one to the next.
const MAX_LISTS: usize = 3;
/// The name of the archive in messages.
const WHAT: &str = "the archive";

/// A file that marks the kind of an archive.
pub(crate) const OCI_LAYOUT: &str = "oci-layout";
pub(crate) const DOCKER_MANIFEST: &str = "manifest.json";

/// The manifest of `docker save`: one entry an image.
#[derive(Deserialize)]
struct Saved {
    #[serde(rename = "Config")]
    config: String,
    #[serde(rename = "RepoTags", default)]
    tags: Option<Vec<String>>,
    #[serde(rename = "Layers")]
    layers: Vec<String>,
}

/// An entry of an archive.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Entry {
    File {
        at: u64,
        size: u64,
    },
    /// A link to another entry. Older versions of Docker write equal layers once.
    Link(String),
}

/// An archive that is open for reading.
#[derive(Debug)]
pub(crate) struct Archive {
    file: Arc<File>,
    entries: HashMap<String, Entry>,
}

impl Archive {
    /// Reads the index of an archive.
    pub(crate) fn open(file: File, task: &Task) -> Result<Archive, OciError> {
        let file = Arc::new(file);
        let size = file.metadata().map_err(OciError::io("read", WHAT))?.len();
        let whole = Section {
            file: Arc::clone(&file),
            at: 0,
            left: size,
        };
        let mut entries = HashMap::new();
        let mut tar = Layer::new(0, Box::new(whole), task, u64::MAX)?;
        while let Some(entry) = tar.next().map_err(damaged)? {
            let name = String::from_utf8_lossy(&entry.path);
            let name = name.trim_start_matches("./").to_owned();
            let place = match entry.kind {
                Kind::File => Entry::File {
                    at: tar.position(),
                    size: entry.size,
                },
                Kind::Symlink => Entry::Link(resolved(&name, &String::from_utf8_lossy(&entry.target))),
                Kind::HardLink => Entry::Link(String::from_utf8_lossy(&entry.target).into_owned()),
                _ => continue,
            };
            entries.insert(name, place);
            if entries.len() > MAX_ENTRIES {
                return Err(OciError::TooMany {
                    what: "too many entries in its archive",
                    limit: MAX_ENTRIES as u64,
                });
            }
        }
        Ok(Archive { file, entries })
    }

    pub(crate) fn has(&self, name: &str) -> bool {
        self.entries.contains_key(name)
    }

    /// Returns the place of a file, following one link.
    fn find(&self, name: &str) -> Result<(u64, u64), OciError> {
        let found = match self.entries.get(name) {
            Some(Entry::Link(target)) => self.entries.get(target),
            other => other,
        };
        match found {
            Some(Entry::File { at, size }) => Ok((*at, *size)),
            _ => Err(unusable(WHAT, &format!("{} is missing in it", quoted(name.as_bytes())))),
        }
    }

    fn section(&self, name: &str) -> Result<Section, OciError> {
        let (at, left) = self.find(name)?;
        Ok(Section {
            file: Arc::clone(&self.file),
            at,
            left,
        })
    }

    /// Reads a small file.
    fn read(&self, name: &str) -> Result<Vec<u8>, OciError> {
        let mut section = self.section(name)?;
        if section.left > MAX_DOCUMENT {
            return Err(OciError::TooLarge {
                what: format!("{} in the archive", quoted(name.as_bytes())),
                limit: scalebox_units::Bytes::new(MAX_DOCUMENT),
            });
        }
        let mut content = Vec::new();
        section.read_to_end(&mut content).map_err(OciError::io("read", WHAT))?;
        Ok(content)
    }

    /// Reads a document that is stored under its digest.
    fn blob(&self, digest: &Digest) -> Result<Vec<u8>, OciError> {
        let content = self.read(&path_of(digest))?;
        let actual = Digest::of(&content);
        match actual == *digest {
            true => Ok(content),
            false => Err(OciError::WrongDigest {
                what: "a blob in the archive".to_owned(),
                expected: digest.to_string(),
                actual: actual.to_string(),
            }),
        }
    }

    /// Makes the file system of the image in the archive, below `work`.
    pub(crate) fn build(&self, work: &Path, task: &Task) -> Result<Made, OciError> {
        match self.has(OCI_LAYOUT) {
            true => self.build_oci(work, task),
            false => self.build_saved(work, task),
        }
    }

    fn build_oci(&self, work: &Path, task: &Task) -> Result<Made, OciError> {
        let (digest, manifest) = self.manifest(task)?;
        let body = self.blob(&manifest.config.digest)?;
        let configuration = manifest::configuration(&body, WHAT, manifest.layers.len())?;
        let names: Vec<String> = manifest.layers.iter().map(|layer| path_of(&layer.digest)).collect();
        let mut made = build(self.layers(&names), configuration, manifest.stored(), work, task)?;
        made.digest = Some(digest);
        Ok(made)
    }

    /// Returns the manifest of the one image in an OCI archive, and its digest.
    fn manifest(&self, task: &Task) -> Result<(Digest, Manifest), OciError> {
        let mut digest = manifest::choose(&json(&self.read("index.json")?, "the index of the archive")?, WHAT)?;
        let first = digest.clone();
        for _ in 0..MAX_LISTS {
            match manifest::parse(&self.blob(&digest)?, WHAT, &task.limits)? {
                Document::Image(manifest) => return Ok((first, manifest)),
                Document::List(next) => digest = next,
            }
        }
        Err(unusable(WHAT, "its lists of manifests are nested too deeply"))
    }

    fn build_saved(&self, work: &Path, task: &Task) -> Result<Made, OciError> {
        let images: Vec<Saved> = json(&self.read(DOCKER_MANIFEST)?, "the manifest of the archive")?;
        let [image] = images.as_slice() else {
            let reason = format!("it has {} images: save a single one", images.len());
            return Err(unusable(WHAT, &reason));
        };
        let configuration = manifest::configuration(&self.read(&image.config)?, WHAT, image.layers.len())?;
        let mut stored = 0;
        for layer in &image.layers {
            stored += self.find(layer)?.1;
        }
        let mut made = build(self.layers(&image.layers), configuration, stored, work, task)?;
        made.reference = image.tags.iter().flatten().next().cloned();
        Ok(made)
    }

    fn layers<'a>(&'a self, names: &'a [String]) -> impl Iterator<Item = Result<Stored, OciError>> + 'a {
        names.iter().map(|name| Ok(Box::new(self.section(name)?) as Stored))
    }
}

fn path_of(digest: &Digest) -> String {
    format!("blobs/sha256/{}", digest.hex())
}

/// Converts an error of reading the archive. The archive is read like a layer, but its errors must
/// not name one.
fn damaged(error: OciError) -> OciError {
    match error {
        OciError::Layer { reason, .. } => unusable(WHAT, &format!("it is damaged or cut off: {reason}")),
        other => other,
    }
}

/// Returns the name in the archive to which a symbolic link leads.
fn resolved(name: &str, target: &str) -> String {
    let mut parts: Vec<&str> = name.split('/').collect();
    parts.pop();
    for part in target.split('/') {
        match part {
            ".." => {
                parts.pop();
            }
            "" | "." => {}
            part => parts.push(part),
        }
    }
    parts.join("/")
}

/// A part of a file, read independently of others.
struct Section {
    file: Arc<File>,
    at: u64,
    left: u64,
}

impl Read for Section {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = buffer.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
        let count = self.file.read_at(&mut buffer[..most], self.at)?;
        if count == 0 && most > 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.at += count as u64;
        self.left -= count as u64;
        Ok(count)
    }
}
