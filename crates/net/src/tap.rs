//! Creates taps. Netlink cannot ("tap creation via rtnetlink is not supported"), so this module
//! uses the driver's own interface: ioctls on `/dev/net/tun` (networking/tuntap.rst in the kernel
//! documentation; constants from linux/if_tun.h).

use crate::error::{Error, Result};
use rustix::ioctl::{IntegerSetter, Setter, ioctl, opcode};
use std::ffi::c_int;
use std::fs::{File, OpenOptions};
use std::io;

const TUNSETIFF: rustix::ioctl::Opcode = opcode::write::<c_int>(b'T', 202);
const TUNSETPERSIST: rustix::ioctl::Opcode = opcode::write::<c_int>(b'T', 203);
const TUNSETOWNER: rustix::ioctl::Opcode = opcode::write::<c_int>(b'T', 204);

/// Ethernet frames instead of IP packets.
const IFF_TAP: u16 = 0x0002;
/// Omits the four bytes of packet information before each frame.
const IFF_NO_PI: u16 = 0x1000;
/// Fails if the interface exists, instead of attaching to it.
const IFF_TUN_EXCL: u16 = 0x8000;

/// `struct ifreq` (linux/if.h): a zero-terminated name, and a union of 24 bytes that starts with
/// the flags.
#[repr(C)]
struct IfReq {
    name: [u8; 16],
    flags: u16,
    rest: [u8; 22],
}

/// A tap that is deleted on drop, unless [`Tap::persist`] is called. So an error or a crash before
/// that leaves nothing behind.
pub(crate) struct Tap {
    file: File,
    name: String,
}

impl Tap {
    /// Creates the tap, in state down, in the network namespace of the calling thread. Only `owner`
    /// and root may open it later; a tap without an owner could be opened by every user of the
    /// host.
    ///
    /// # Errors
    ///
    /// [`Error::Tap`], for example if an interface of that name exists.
    pub(crate) fn create(name: &str, owner: u32) -> Result<Tap> {
        let failed = |action: &str, source: io::Error| Error::Tap {
            action: format!("{action} {name}"),
            source,
        };
        let request =
            IfReq::new(name).ok_or_else(|| failed("create the tap", io::Error::from(io::ErrorKind::InvalidInput)))?;
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/net/tun")
            .map_err(|source| failed("open /dev/net/tun to create the tap", source))?;
        // SAFETY: TUNSETIFF reads one `struct ifreq`, which `IfReq` is by layout and size.
        unsafe { ioctl(&file, Setter::<TUNSETIFF, IfReq>::new(request)) }
            .map_err(|errno| failed("create the tap", errno.into()))?;
        // SAFETY: TUNSETOWNER takes a user id by value.
        unsafe { ioctl(&file, IntegerSetter::<TUNSETOWNER>::new_usize(owner as usize)) }
            .map_err(|errno| failed("set the owner of the tap", errno.into()))?;
        Ok(Tap {
            file,
            name: name.to_owned(),
        })
    }

    /// Makes the tap outlive this process: the last step of creating one.
    ///
    /// # Errors
    ///
    /// [`Error::Tap`]; the tap is then deleted.
    pub(crate) fn persist(self) -> Result<()> {
        // SAFETY: TUNSETPERSIST takes 0 or 1 by value.
        unsafe { ioctl(&self.file, IntegerSetter::<TUNSETPERSIST>::new_usize(1)) }.map_err(|errno| Error::Tap {
            action: format!("persist the tap {}", self.name),
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
