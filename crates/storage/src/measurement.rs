//! The last measurement of the pool's usage, as the pool keeps it.

use scalebox_units::Bytes;

/// The result of a measurement that admission uses.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Measurement {
    /// The unreclaimable usage.
    pub(crate) size: Bytes,
    /// Modification times of the templates' folders when the walk started: once they change, the
    /// result is stale.
    pub(crate) folders: FolderTimes,
}

/// The last measurement, and the number of invalidations so far. A walk that started before an
/// invalidation is stale when it ends.
#[derive(Debug, Default)]
pub(crate) struct Measurements {
    pub(crate) last: Option<Measurement>,
    pub(crate) forgotten: u64,
}

/// The time of the last change in each of the templates' folders, in nanoseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct FolderTimes(pub(crate) [i128; 2]);
