//! What goes into a guest: the template it boots from, and the seed drive that tells it who it is.
//!
//! A template is Debian, installed by `mmdebstrap` from its own archive and made ready for being
//! cloned: nothing in it belongs to one machine. What does, a guest reads at each boot from its
//! seed drive; of that, keys and addresses never reach its disk. The files that go into a guest lie
//! in this crate under `files/`, to be read and checked as what they are.
//!
//! All of it is synchronous; [`build`] runs for a minute or two.
//!
//! # Layout
//!
//! | file | job |
//! |---|---|
//! | `recipe` | [`Recipe`]: what a template is made of, and its fingerprint |
//! | `template` | [`build`]: from a recipe to root file system, kernel and initramfs |
//! | `mirrors` | which archive the packages come from |
//! | `bootstrap` | installing them into a directory, by mmdebstrap |
//! | `customize`, `embedded` | making that a guest: its own files, account, units |
//! | `kernel`, `lz4` | the kernel's package: image and modules |
//! | `initramfs`, `cpio` | what loads virtio and mounts the root |
//! | `mke2fs` | writing the ext4 image, in user space |
//! | `scratch`, `cache` | where a build works, and where it keeps what it made |
//! | `progress` | how far it is |
//! | `cmdline` | [`kernel_cmdline`]: what the kernel is told when a guest starts |
//! | `seed` | [`SeedDrive`]: who a guest is |
//! | `agent` | [`Agent`]: asking a running guest through its agent |
//! | `command` | the one door to outside programs |
//!
//! # Example
//!
//! ```no_run
//! use scalebox_guest::{Recipe, SeedDrive, build};
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let made = build(&Recipe::default(), "/var/tmp".as_ref(), None, &mut ())?;
//! println!("{} boots {}", made.kernel.display(), made.rootfs.display());
//!
//! let key = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIKu6/ItCJ89EaUvwZxaYjzC8kOadG6pYNRTO562Y9T9S me";
//! SeedDrive {
//!     instance_id: "vm-0123456789ab".into(),
//!     hostname: "very-silly-penguin".parse()?,
//!     ssh_public_key: key.parse()?,
//!     mac: [0x52, 0x54, 0x00, 0x12, 0x34, 0x56],
//!     address: "172.16.0.2/16".parse()?,
//!     gateway: "172.16.0.1".parse()?,
//!     dns: vec!["172.16.0.1".parse()?],
//! }
//! .write("/run/vm/seed.img".as_ref())?;
//! # Ok(())
//! # }
//! ```

mod agent;
mod bootstrap;
mod cache;
mod cmdline;
mod command;
mod cpio;
mod customize;
mod embedded;
mod error;
mod initramfs;
mod kernel;
mod lz4;
mod mirrors;
mod mke2fs;
mod progress;
mod recipe;
mod scratch;
mod seed;
mod template;

pub use agent::{Agent, AgentError, FileSystem};
pub use cmdline::kernel_cmdline;
pub use command::{CommandError, Program, require_programs};
pub use error::Error;
pub use progress::{Progress, Step};
pub use recipe::Recipe;
pub use seed::SeedDrive;
pub use template::{Artifacts, build};
