//! What the tests of several crates share. Nothing of it is in a release.
//!
//! `tests/floor_plan` checks the structure of the whole workspace: which crate, folder and file may
//! use which other one, and how long a function may be.
