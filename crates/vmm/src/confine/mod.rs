//! Confines a machine's process: its memory, its CPU time and the files that it can reach.
//!
//! | file | content |
//! |---|---|
//! | `confinement` | applies both to one process |
//! | `cgroup` | limits memory and CPU with a control group |
//! | `landlock` | restricts files with Landlock rules |

pub(crate) mod cgroup;
mod confinement;
mod landlock;

pub use confinement::missing_confinement;
pub(crate) use confinement::{Confined, Confinement};
pub(crate) use landlock::AllowedFiles;
