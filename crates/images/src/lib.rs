//! Makes the parts of a template: a root file system, a kernel and its initramfs.
//!
//! The root file system is built from Debian's archive ([`build`]), pulled from a registry
//! ([`oci`]), or converted from a disk image or an archive ([`convert`]).
//!
//! The template `debian-base` is Debian, installed by `mmdebstrap` from Debian's archive and
//! prepared for cloning: it contains nothing that belongs to a single machine. A guest reads its
//! identity from its seed drive at each boot; keys and addresses are never written to its disk. The
//! files that go into a guest are in this crate's folder `files/`, where they can be read and
//! checked as they are.
//!
//! Everything is synchronous, except pulling; [`build`] takes a minute or two.
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
//! | `scrub` | [`scrub`]: the parts of a disk that belong to one machine only |
//! | `kernel`, `lz4` | the kernel package: image and modules |
//! | `initramfs`, `cpio` | the initramfs: virtio drivers, and the agent, which mounts the root |
//! | `mke2fs` | writes the ext4 images, in user space |
//! | `oci/` | images of containers: registries, archives, layers |
//! | `convert/` | recognising images, and converting disk images |
//! | `scratch`, `cache` | the working directory of a build, and finished builds |
//! | `progress` | progress reports of a build |
//! | `programs` | the outside programs of a build |
//!
//! # Example
//!
//! ```no_run
//! use scalebox_images::{Recipe, build};
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let made = build(&Recipe::default(), "/var/tmp".as_ref(), None, &mut ())?;
//! println!("{} boots {}", made.kernel.display(), made.rootfs.display());
//! # Ok(())
//! # }
//! ```

mod bootstrap;
mod cache;
pub mod convert;
mod cpio;
mod customize;
mod embedded;
mod error;
mod initramfs;
mod kernel;
mod lz4;
mod mirrors;
mod mke2fs;
pub mod oci;
mod programs;
mod progress;
mod recipe;
mod scratch;
pub mod scrub;
mod template;

pub use error::Error;
pub use initramfs::{agent_archive, agent_tag};
pub use progress::{Progress, Step};
pub use recipe::{DEV_TEMPLATE, Recipe};
pub use scratch::remove_abandoned;
pub use template::{Artifacts, build};
