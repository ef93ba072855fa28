//! The records of templates: `templates/NAME.json`, beside the image.
//!
//! A template exists when its record does. The record names the image, so replacing the record
//! replaces the template in one step. An image that no record names is a leftover.

use crate::error::StorageError;
use crate::local::files::{self, PARTIAL};
use crate::pool::Pool;
use scalebox_fault_points::fault_point;
use scalebox_units::{ImageConfig, Init, KernelId, TemplateName, VmId};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::PathBuf;

/// Suffix of images.
pub(crate) const IMAGE: &str = ".ext4";
/// Suffix of records.
const RECORD: &str = ".json";
/// Maximum size of a record, in bytes.
const MAX_RECORD: u64 = 1 << 20;

/// The origin of a template.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TemplateSource {
    /// `scaleboxd template build`.
    Build,
    /// An imported image.
    Import,
    /// The disk of this VM.
    Snapshot(VmId),
    /// An image from a registry.
    Pull(PulledImage),
}

/// The image in a registry that a template was made from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PulledImage {
    /// The complete reference, such as `docker.io/library/python:3.12-slim`.
    pub reference: String,
    /// The digest of the manifest, or list of manifests, that the reference resolved to: `sha256:`
    /// and 64 hex digits.
    pub digest: String,
}

impl TemplateSource {
    /// Returns the word for it in records and in the API.
    pub fn as_str(&self) -> &'static str {
        match self {
            TemplateSource::Build => "build",
            TemplateSource::Import => "import",
            TemplateSource::Snapshot(_) => "snapshot",
            TemplateSource::Pull(_) => "pull",
        }
    }
}

/// The content of a record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    /// The file name of the image.
    pub(crate) image: String,
    pub(crate) size_bytes: u64,
    pub(crate) created_at: jiff::Timestamp,
    /// A word of [`TemplateSource`]; none for a template of a release without records.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) source: Option<String>,
    /// The VM, if the source is a snapshot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) source_vm: Option<VmId>,
    /// The reference and the digest of the image, if the source is a pull.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) reference: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) manifest_digest: Option<String>,
    /// The settings of the image that the template was made from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) config: Option<ImageConfig>,
    /// The first process of its VMs; none means an init system.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) init: Option<Init>,
    /// The kernel that VMs of the template boot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) kernel: Option<KernelId>,
    /// See [`digest`](crate::image::digest::digest).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) digest: Option<String>,
    /// Fields of later releases: kept when the record is written again.
    #[serde(flatten)]
    pub(crate) other: Map<String, Value>,
}

impl Record {
    pub(crate) fn source(&self) -> Option<TemplateSource> {
        match (self.source.as_deref()?, &self.source_vm) {
            ("build", _) => Some(TemplateSource::Build),
            ("import", _) => Some(TemplateSource::Import),
            ("snapshot", Some(vm)) => Some(TemplateSource::Snapshot(vm.clone())),
            ("pull", _) => Some(TemplateSource::Pull(PulledImage {
                reference: self.reference.clone()?,
                digest: self.manifest_digest.clone()?,
            })),
            _ => None,
        }
    }

    fn parse(text: &[u8], name: &TemplateName) -> Result<Record, String> {
        let record: Record = serde_json::from_slice(text).map_err(|error| error.to_string())?;
        match image_owner(&record.image) {
            Some(owner) if owner == *name => Ok(record),
            _ => Err(format!("{:?} cannot be the file name of its image", record.image)),
        }
    }
}

/// Returns the template that an image belongs to, by the image's file name. It is `NAME.ext4`, or
/// `NAME@INODE.ext4` if the first was in use.
pub(crate) fn image_owner(file: &str) -> Option<TemplateName> {
    let stem = file.strip_suffix(IMAGE)?;
    let name = match stem.split_once('@') {
        Some((name, inode)) if inode.bytes().all(|byte| byte.is_ascii_digit()) => name,
        Some(_) => return None,
        None => stem,
    };
    name.parse().ok()
}

/// Returns the template that a record belongs to, by the record's file name.
pub(crate) fn record_owner(file: &str) -> Option<TemplateName> {
    file.strip_suffix(RECORD)?.parse().ok()
}

impl Pool {
    pub(crate) fn record_path(&self, name: &TemplateName) -> PathBuf {
        self.templates_dir().join(format!("{name}{RECORD}"))
    }

    /// Reads the record of a template; `None` if there is none.
    ///
    /// # Errors
    /// [`StorageError::DamagedRecord`], [`StorageError::Io`].
    pub(crate) fn record(&self, name: &TemplateName) -> Result<Option<Record>, StorageError> {
        let path = self.record_path(name);
        let failed = |error| StorageError::io("read", path.display(), error);
        let file = match files::open_read(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed(error)),
        };
        let mut text = Vec::new();
        file.take(MAX_RECORD).read_to_end(&mut text).map_err(failed)?;
        let parsed = Record::parse(&text, name);
        parsed.map(Some).map_err(|reason| StorageError::DamagedRecord {
            template: name.to_string(),
            path,
            reason,
        })
    }

    /// Writes the record of a template to a new unfinished file, and flushes it. Returns the locked
    /// file and its path; the caller renames it.
    ///
    /// # Errors
    /// [`StorageError::TemplateBeingMade`], [`StorageError::Io`]. Nothing is left then.
    pub(crate) fn write_record(&self, name: &TemplateName, record: &Record) -> Result<(File, PathBuf), StorageError> {
        let partial = self.templates_dir().join(format!(".{name}{RECORD}{PARTIAL}"));
        let mut file = self.claim(&partial).map_err(|error| match error {
            StorageError::Busy(_) => StorageError::TemplateBeingMade(name.to_string()),
            other => other,
        })?;
        let written = serde_json::to_vec_pretty(record)
            .map_err(io::Error::from)
            .and_then(|text| file.write_all(&text))
            .and_then(|()| file.sync_all())
            .and_then(|()| fault_point("template: record written"));
        if let Err(error) = written {
            files::discard(&partial);
            return Err(StorageError::io("write", partial.display(), error));
        }
        Ok((file, partial))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_of_later_releases_survive_a_rewrite() {
        let text = br#"{"image":"a.b.ext4","size_bytes":4096,"created_at":"2026-01-02T03:04:05Z","source":"later",
            "kernel":"0123456789abcdef","labels":{"team":"x"}}"#;
        let record = Record::parse(text, &"a.b".parse().unwrap()).unwrap();
        assert_eq!((record.source(), record.digest.as_deref()), (None, None));
        let rewritten: Value = serde_json::from_slice(&serde_json::to_vec(&record).unwrap()).unwrap();
        let original: Value = serde_json::from_slice(text).unwrap();
        assert_eq!(rewritten, original);
    }

    #[test]
    fn a_pulled_image_is_recorded_with_its_settings() {
        let text = br#"{"image":"a.ext4","size_bytes":4096,"created_at":"2026-01-02T03:04:05Z","source":"pull",
            "reference":"docker.io/library/a:1","manifest_digest":"sha256:00","config":{"env":["A=1"],"later":1},"init":"agent"}"#;
        let record = Record::parse(text, &"a".parse().unwrap()).unwrap();
        let pulled = PulledImage {
            reference: "docker.io/library/a:1".to_owned(),
            digest: "sha256:00".to_owned(),
        };
        assert_eq!(record.source(), Some(TemplateSource::Pull(pulled)));
        assert_eq!(record.config.unwrap().env, ["A=1"]);
        assert_eq!(record.init, Some(Init::Agent));
    }

    #[test]
    fn a_record_names_only_an_image_of_its_own_template() {
        for (image, fits) in [
            ("box.ext4", true),
            ("box@123.ext4", true),
            ("other.ext4", false),
            ("box@1x.ext4", false),
            ("../box.ext4", false),
            (".box.partial", false),
        ] {
            let text = format!(r#"{{"image":"{image}","size_bytes":1,"created_at":"2026-01-02T03:04:05Z"}}"#);
            let parsed = Record::parse(text.as_bytes(), &"box".parse().unwrap());
            assert_eq!(parsed.is_ok(), fits, "{image}: {parsed:?}");
        }
    }
}
