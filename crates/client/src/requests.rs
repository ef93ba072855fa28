//! Every request that has a body. `parse` reads one from a client's bytes; what it returns holds in every field.

use crate::body::{Fields, Invalid};
use crate::{SshPublicKey, TemplateName, VmName};
use serde::Serialize;

/// What a host allows, from its settings and its size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// `MAX_DISK_SIZE_GIB`; at least 1.
    pub max_disk_size_gib: u64,
    /// Processors of the host.
    pub max_vcpus: u32,
    /// The least memory, in MiB, with which a guest boots.
    pub min_mem_mib: u64,
    /// The most memory, in MiB, that the host has for one guest.
    pub max_mem_mib: u64,
}

/// `POST /vms`. What is `None` is the host's choice.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct CreateVm {
    /// What its disk is cloned from.
    pub template: TemplateName,
    /// What the account `user` of the guest accepts.
    pub ssh_public_key: SshPublicKey,
    /// Otherwise three words.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<VmName>,
    /// Processors of the guest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vcpu_count: Option<u32>,
    /// Memory of the guest, in MiB.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mem_size_mib: Option<u64>,
    /// Size of its disk, in GiB; otherwise the larger of the host's default and the template.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disk_size_gib: Option<u64>,
    /// False makes the VM and leaves it stopped.
    pub start: bool,
}

impl CreateVm {
    const FIELDS: [&str; 7] = [
        "template",
        "ssh_public_key",
        "name",
        "vcpu_count",
        "mem_size_mib",
        "disk_size_gib",
        "start",
    ];

    /// A request for a running VM with the host's choice of everything else.
    pub fn new(template: TemplateName, ssh_public_key: SshPublicKey) -> Self {
        CreateVm {
            template,
            ssh_public_key,
            name: None,
            vcpu_count: None,
            mem_size_mib: None,
            disk_size_gib: None,
            start: true,
        }
    }

    /// Reads a client's body. Whether the template exists, the name is free and the disk is large enough for the template is
    /// for the caller to see.
    ///
    /// # Errors
    /// The first thing wrong, as a sentence that names the field and what it may be.
    pub fn parse(body: &[u8], limits: &Limits) -> Result<Self, Invalid> {
        const TEMPLATE: &str = "name one of those that GET /templates lists";
        const KEY: &str = "send an OpenSSH public key, such as: ssh-ed25519 AAAAC3Nza... me@laptop";
        let fields = Fields::read(body, &Self::FIELDS)?;
        fields.require("template", TEMPLATE)?;
        fields.require("ssh_public_key", KEY)?;
        let mem_mib = limits.min_mem_mib..=limits.max_mem_mib;
        let vcpus = fields.optional_number("vcpu_count", 1..=limits.max_vcpus.into())?;
        Ok(CreateVm {
            disk_size_gib: fields.optional_disk_size(limits.max_disk_size_gib)?,
            vcpu_count: vcpus.and_then(|count| count.try_into().ok()),
            mem_size_mib: fields.optional_number("mem_size_mib", mem_mib)?,
            start: fields.optional_bool("start")?.unwrap_or(true),
            template: fields.text("template", TEMPLATE)?,
            name: fields.optional_text("name")?,
            ssh_public_key: fields.text("ssh_public_key", KEY)?,
        })
    }
}

/// `PATCH /vms/{id}`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct ResizeVm {
    /// The new size of its disk, in GiB.
    pub disk_size_gib: u64,
}

impl ResizeVm {
    /// Reads a client's body. Whether the disk would become smaller is for the caller to see.
    ///
    /// # Errors
    /// The first thing wrong, as a sentence that names the field and what it may be.
    pub fn parse(body: &[u8], limits: &Limits) -> Result<Self, Invalid> {
        let fields = Fields::read(body, &["disk_size_gib"])?;
        let size = fields.optional_disk_size(limits.max_disk_size_gib)?;
        let missing = Invalid::Missing {
            field: "disk_size_gib",
            what: "send the new size of the disk in GiB",
        };
        Ok(ResizeVm {
            disk_size_gib: size.ok_or(missing)?,
        })
    }
}

/// `POST /vms/{id}/snapshot`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct SnapshotVm {
    /// What the template that holds a copy of the disk is to be called.
    pub template_name: TemplateName,
}

impl SnapshotVm {
    /// Reads a client's body. Whether the name is free is for the caller to see.
    ///
    /// # Errors
    /// The first thing wrong, as a sentence that names the field and what it may be.
    pub fn parse(body: &[u8]) -> Result<Self, Invalid> {
        let fields = Fields::read(body, &["template_name"])?;
        Ok(SnapshotVm {
            template_name: fields.text("template_name", "name the template to make")?,
        })
    }
}
