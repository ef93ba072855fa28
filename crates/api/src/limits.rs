//! The limits of a host that requests are checked against.

/// Limits of a host, from its settings and its hardware.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// `MAX_DISK_SIZE_GIB`; at least 1.
    pub max_disk_size_gib: u64,
    /// Maximum number of processors of a guest.
    pub max_vcpus: u32,
    /// Minimum memory with which a guest boots, in MiB.
    pub min_mem_mib: u64,
    /// Maximum memory of a guest, in MiB.
    pub max_mem_mib: u64,
}
