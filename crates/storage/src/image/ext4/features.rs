//! The ext4 features that this folder's code depends on, by their bits in the superblock.

/// A feature that older kernels may ignore.
#[derive(Clone, Copy)]
pub(super) struct Compat(pub(super) u32);

impl Compat {
    pub(super) const FIELD: usize = 0x5c;
    pub(super) const HAS_JOURNAL: Compat = Compat(0x4);
    pub(super) const RESIZE_INODE: Compat = Compat(0x10);
    pub(super) const DIR_INDEX: Compat = Compat(0x20);
    pub(super) const SPARSE_SUPER2: Compat = Compat(0x200);
}

/// A feature without which a kernel cannot read the file system.
#[derive(Clone, Copy)]
pub(super) struct Incompat(pub(super) u32);

impl Incompat {
    pub(super) const FIELD: usize = 0x60;
    pub(super) const RECOVER: Incompat = Incompat(0x4);
    pub(super) const JOURNAL_DEV: Incompat = Incompat(0x8);
    pub(super) const META_BG: Incompat = Incompat(0x10);
    pub(super) const BITS_64: Incompat = Incompat(0x80);
    pub(super) const MMP: Incompat = Incompat(0x100);
    pub(super) const CSUM_SEED: Incompat = Incompat(0x2000);
}

/// A feature without which a kernel can read the file system but not write it.
#[derive(Clone, Copy)]
pub(super) struct RoCompat(pub(super) u32);

impl RoCompat {
    pub(super) const FIELD: usize = 0x64;
    pub(super) const SPARSE_SUPER: RoCompat = RoCompat(0x1);
    pub(super) const GDT_CSUM: RoCompat = RoCompat(0x10);
    pub(super) const QUOTA: RoCompat = RoCompat(0x100);
    pub(super) const BIGALLOC: RoCompat = RoCompat(0x200);
    pub(super) const METADATA_CSUM: RoCompat = RoCompat(0x400);
    pub(super) const PROJECT: RoCompat = RoCompat(0x2000);
}
