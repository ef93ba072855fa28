//! The operations on one disk image.

pub(crate) mod defragment;
pub(crate) mod digest;
pub(crate) mod e2fsprogs;
pub(crate) mod ext4;
pub(crate) mod format;
pub(crate) mod images;
pub(crate) mod live_growth;
pub(crate) mod pack;
pub(crate) mod scrub;
