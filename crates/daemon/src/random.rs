//! Random bytes from the kernel, as text.

use rustix::rand::{GetRandomFlags, getrandom};
use std::io;

/// `bytes` random bytes (at most 64) in hex.
///
/// # Errors
/// When the kernel gives none, which a running Linux does not do.
pub fn random_hex(bytes: usize) -> io::Result<String> {
    let mut drawn = [0; 64];
    let drawn = &mut drawn[..bytes.min(64)];
    let length = getrandom(&mut *drawn, GetRandomFlags::empty())?;
    if length < drawn.len() {
        return Err(io::Error::other("the kernel gave too few random bytes"));
    }
    Ok(drawn.iter().map(|byte| format!("{byte:02x}")).collect())
}
