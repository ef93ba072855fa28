//! Work on one disk image, whatever file system it is on.

pub(crate) mod defragment;
pub(crate) mod ext4;
pub(crate) mod format;
pub(crate) mod live_growth;
pub(crate) mod pack;
pub(crate) mod scrub;
