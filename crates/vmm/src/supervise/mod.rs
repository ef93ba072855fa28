//! What the drivers share: the supervision of a machine's process.

pub(crate) mod agent;
