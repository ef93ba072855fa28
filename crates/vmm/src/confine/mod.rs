//! Confinement of a machine's process: control groups and Landlock.

pub(crate) mod cgroup;
mod confinement;
mod landlock;

pub use confinement::missing_confinement;
pub(crate) use confinement::{Confined, Confinement};
pub(crate) use landlock::AllowedFiles;
