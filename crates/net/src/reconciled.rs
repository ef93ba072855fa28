//! The report of a repair.

/// The changes made by [`Network::reconcile`](crate::Network::reconcile), one log line each: taps
/// by name, rules as text. All empty if nothing had to change.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Reconciled {
    /// Missing items that were added.
    pub added: Vec<String>,
    /// Orphaned items that were removed.
    pub removed: Vec<String>,
    /// Taps that could not be repaired, with the reason. They do not prevent the repair of others.
    pub failed: Vec<(String, String)>,
}
