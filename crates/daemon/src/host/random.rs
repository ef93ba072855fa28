//! Random bytes from the kernel, in hex.

use rustix::rand::{GetRandomFlags, getrandom};
use std::io;

/// Returns `bytes` random bytes (at most 64) in hex.
///
/// # Errors
/// If the kernel returns too few bytes, which a running Linux does not do.
pub(crate) fn random_hex(bytes: usize) -> io::Result<String> {
    let mut drawn = [0; 64];
    let drawn = &mut drawn[..bytes.min(64)];
    let length = getrandom(&mut *drawn, GetRandomFlags::empty())?;
    if length < drawn.len() {
        return Err(io::Error::other("the kernel returned too few random bytes"));
    }
    Ok(drawn.iter().map(|byte| format!("{byte:02x}")).collect())
}
