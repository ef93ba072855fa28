//! Templates, and snapshots of VMs, which become templates.

use crate::body::{Fields, Invalid};
use crate::pool::StorageUsage;
use scalebox_units::{ImageConfig, Init, TemplateName};
use serde::{Deserialize, Serialize};

/// A template, as `GET /templates` returns it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Template {
    /// Name to use in `POST /vms`.
    pub name: String,
    /// Size that a guest sees; a VM's disk is at least this large.
    pub size_bytes: u64,
    /// Size of the blocks that the template maps.
    pub used_bytes: u64,
    /// Time of creation: RFC 3339, in UTC.
    #[cfg_attr(feature = "openapi", schema(format = DateTime))]
    pub created_at: String,
    /// Number of existing VMs that were cloned from the template.
    pub used_by: u64,
    /// `true` if the template is protected against deletion.
    pub protected: bool,
    /// Usage in the pool, with resized base images included in `exclusive_bytes`; absent until
    /// measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub storage: Option<StorageUsage>,
    /// Origin: `build`, `import`, `snapshot` or `pull`; absent for templates of releases that did
    /// not record it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    /// Id of the VM that the disk belonged to, if the source is `snapshot`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source_vm: Option<String>,
    /// Complete reference of the image, such as `docker.io/library/python:3.12-slim`, if the source
    /// is `pull`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reference: Option<String>,
    /// Digest of the manifest that the reference resolved to, `sha256:` and 64 hex digits, if the
    /// source is `pull`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub manifest_digest: Option<String>,
    /// Settings of the image that the template was made from; absent if the image had none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub config: Option<ImageConfig>,
    /// First process of its VMs; absent means the init system in its file system.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub init: Option<Init>,
    /// Id of the kernel that new VMs boot; absent if the template was imported before there was
    /// one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel: Option<String>,
    /// Digest of the image, `blocks-sha256:` and 64 hex digits; absent for snapshots. See
    /// docs/storage.md.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
}

/// The response to `GET /templates`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct TemplateList {
    /// All templates of the pool.
    pub templates: Vec<Template>,
}

/// A template created from a VM's disk, as `POST /vms/{id}/snapshot` returns it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Snapshot {
    /// Name of the template.
    pub template: String,
    /// Id of the VM that the disk belongs to.
    pub source_vm: String,
    /// Size that a guest sees.
    pub size_bytes: u64,
    /// Time of creation: RFC 3339, in UTC.
    #[cfg_attr(feature = "openapi", schema(format = DateTime))]
    pub created_at: String,
    /// Time during which the guest could not write, in milliseconds; 0 if it was not running.
    /// Includes the round trips to its agent.
    pub stood_still_ms: u64,
    /// The way in which writes were prevented. The agent had `frozen` the guest, the host had
    /// `paused` it, or it was `not_running`.
    pub held: String,
}

/// The body of `POST /vms/{id or name}/snapshot`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct SnapshotVm {
    /// Name of the new template; it must not exist yet.
    pub template_name: TemplateName,
}

impl SnapshotVm {
    /// Parses a client's body. The caller checks whether the name is free.
    ///
    /// # Errors
    /// Returns the first problem found, with the field and its valid values.
    pub fn parse(body: &[u8]) -> Result<Self, Invalid> {
        let fields = Fields::read(body, &["template_name"])?;
        Ok(SnapshotVm {
            template_name: fields.text("template_name", "send the name of the new template")?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn snapshot_requests_have_only_a_template_name() {
        let named = SnapshotVm::parse(br#"{"template_name": "my-template"}"#).unwrap();
        assert_eq!(named.template_name.as_str(), "my-template");
        for body in [
            &b"{}"[..],
            b"",
            br#"{"template_name": "../x"}"#,
            br#"{"template_name": 7}"#,
            br#"{"template_name": "x", "vm": "y"}"#,
        ] {
            assert!(SnapshotVm::parse(body).is_err());
        }
    }
}
