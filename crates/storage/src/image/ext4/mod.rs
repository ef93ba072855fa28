//! The ext4 file system in an image. The programs of e2fsprogs check, grow and edit it in user
//! space; our own code inspects it and zeroes its unused space.
//!
//! Guests can write everything in these images, including the superblock. The superblock is
//! inspected before any program runs, because some of its fields make programs wait for another
//! host or look for another device.
//!
//! A program succeeds when its exit code indicates success and its standard error contains nothing
//! but its banner. For operations that move blocks or edit files this is not sufficient:
//! `resize2fs` exits with 0 after failed writes. There the files are compared with a clone made
//! before.
//!
//! | file | contents |
//! |---|---|
//! | `check`, `grow` | checking, repairing and growing with e2fsprogs |
//! | `refuse`, `features` | the file systems that cannot be a disk |
//! | `superblock`, `layout`, `inode`, `directory`, `tree` | parsing the structures in the image |
//! | `unused` | zeroing unused space |
//! | `unchanged` | comparing all files with an earlier clone |
//! | `ranges`, `crc32c` | sets of blocks, checksums of metadata |

mod check;
mod crc32c;
mod directory;
mod error;
mod features;
mod grow;
mod inode;
mod layout;
mod ranges;
mod refuse;
mod superblock;
#[cfg(test)]
mod tests;
mod tree;
mod unchanged;
mod unused;

pub(crate) use check::{check, check_work, keeps_quotas, repair};
pub(crate) use grow::{cannot_grow, fills, finish_growth, grow};
pub(crate) use tree::{Stat, Tree};
pub(crate) use unchanged::{Work, require as require_unchanged};
pub(crate) use unused::zero as zero_unused;
