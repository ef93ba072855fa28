//! Builds what a guest boots from: the Debian template, and the seed drive with its identity.
//!
//! A template is Debian, installed by `mmdebstrap` from Debian's archive and prepared for cloning:
//! it contains nothing that belongs to a single machine. A guest reads its identity from its seed
//! drive at each boot; keys and addresses are never written to its disk. The files that go into a
//! guest are in this crate's folder `files/`, where they can be read and checked as they are.
//!
//! Everything except [`Agent`] is synchronous; [`build`] takes a minute or two.
//!
//! # Layout
//!
//! | file | content |
//! |---|---|
//! | `recipe` | [`Recipe`]: the inputs of a template, and their fingerprint |
//! | `template` | [`build`]: from a recipe to root file system, kernel, initramfs and modules drive |
//! | `mirrors` | chooses the package archive |
//! | `bootstrap` | installs the packages into a directory, with mmdebstrap |
//! | `customize`, `embedded` | turns the installation into a guest: own files, account, units |
//! | `scrub` | [`scrub`]: what a disk contains of one machine only |
//! | `kernel`, `lz4` | the kernel package: image and modules |
//! | `initramfs`, `cpio` | the initramfs, which loads virtio drivers and mounts the root |
//! | `mke2fs` | writes the ext4 images, in user space |
//! | `scratch`, `cache` | the working directory of a build, and finished builds |
//! | `progress` | progress reports of a build |
//! | `cmdline` | [`kernel_cmdline`]: the kernel parameters of a guest |
//! | `seed` | [`SeedDrive`]: the identity of a guest |
//! | `agent` | [`Agent`]: queries a running guest |
//! | `programs` | the outside programs of a build |
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
//!     mac: "52:54:00:12:34:56".parse()?,
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
mod cpio;
mod customize;
mod embedded;
mod error;
mod initramfs;
mod kernel;
mod lz4;
mod mirrors;
mod mke2fs;
mod programs;
mod progress;
mod recipe;
mod scratch;
pub mod scrub;
mod seed;
mod template;

pub use agent::{Agent, AgentError, FsUsage};
pub use cmdline::{kernel_cmdline, with_modules_drive};
pub use error::Error;
pub use progress::{Progress, Step};
pub use recipe::Recipe;
pub use seed::SeedDrive;
pub use template::{Artifacts, build};
