//! Making a tap. Netlink cannot ("tap creation via rtnetlink is not supported", says the kernel),
//! so this is the driver's own interface: an ioctl on `/dev/net/tun` (kernel documentation,
//! networking/tuntap.rst; constants from linux/if_tun.h).

use crate::error::{Error, Result};
use rustix::ioctl::{IntegerSetter, Setter, ioctl, opcode};
use std::ffi::c_int;
use std::fs::{File, OpenOptions};
use std::io;

const TUNSETIFF: rustix::ioctl::Opcode = opcode::write::<c_int>(b'T', 202);
const TUNSETPERSIST: rustix::ioctl::Opcode = opcode::write::<c_int>(b'T', 203);
const TUNSETOWNER: rustix::ioctl::Opcode = opcode::write::<c_int>(b'T', 204);

/// Frames, not packets.
const IFF_TAP: u16 = 0x0002;
/// No four bytes of packet information before each frame.
const IFF_NO_PI: u16 = 0x1000;
/// Fail if the interface exists, instead of joining it.
const IFF_TUN_EXCL: u16 = 0x8000;

/// `struct ifreq` (linux/if.h): a name that ends in a zero, and a union of 24 bytes of which the
/// flags are the first two.
#[repr(C)]
struct IfReq {
    name: [u8; 16],
    flags: u16,
    rest: [u8; 22],
}

/// A tap that vanishes when this is dropped, unless [`Tap::persist`] was called: whatever fails in
/// between, or kills the daemon, leaves nothing.
pub(crate) struct Tap {
    file: File,
    name: String,
}

impl Tap {
    /// Makes the tap, down, in the network namespace of the calling thread. Only `owner` and root
    /// may open it later; a tap without an owner would be open to every user of the host.
    ///
    /// # Errors
    ///
    /// [`Error::Tap`]; among others when an interface of that name exists.
    pub(crate) fn create(name: &str, owner: u32) -> Result<Tap> {
        let failed = |action: &str, source: io::Error| Error::Tap {
            action: format!("{action} {name}"),
            source,
        };
        let request =
            IfReq::new(name).ok_or_else(|| failed("make the tap", io::Error::from(io::ErrorKind::InvalidInput)))?;
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/net/tun")
            .map_err(|source| failed("open /dev/net/tun to make the tap", source))?;
        // SAFETY: TUNSETIFF reads one `struct ifreq`, which `IfReq` is by layout and size.
        unsafe { ioctl(&file, Setter::<TUNSETIFF, IfReq>::new(request)) }
            .map_err(|errno| failed("make the tap", errno.into()))?;
        // SAFETY: TUNSETOWNER takes a user id by value.
        unsafe { ioctl(&file, IntegerSetter::<TUNSETOWNER>::new_usize(owner as usize)) }
            .map_err(|errno| failed("give an owner to the tap", errno.into()))?;
        Ok(Tap {
            file,
            name: name.to_owned(),
        })
    }

    /// Lets the tap outlive this process: the last step of making one.
    ///
    /// # Errors
    ///
    /// [`Error::Tap`]; the tap is then gone.
    pub(crate) fn persist(self) -> Result<()> {
        // SAFETY: TUNSETPERSIST takes 0 or 1 by value.
        unsafe { ioctl(&self.file, IntegerSetter::<TUNSETPERSIST>::new_usize(1)) }.map_err(|errno| Error::Tap {
            action: format!("keep the tap {}", self.name),
            source: errno.into(),
        })
    }
}

impl IfReq {
    fn new(name: &str) -> Option<IfReq> {
        let mut request = IfReq {
            name: [0; 16],
            flags: IFF_TAP | IFF_NO_PI | IFF_TUN_EXCL,
            rest: [0; 22],
        };
        let (last_is_zero, _) = request.name.split_at_mut(15);
        last_is_zero.get_mut(..name.len())?.copy_from_slice(name.as_bytes());
        Some(request)
    }
}
