//! The interface between host and guest. It has the kernel parameters, the seed drive with the
//! guest's identity, and the clients of the guest's agents.
//!
//! Everything except [`AgentConnection`] and [`Qga`] is synchronous.
//!
//! # Layout
//!
//! | file | content |
//! |---|---|
//! | `cmdline` | [`kernel_cmdline`]: the kernel parameters of a guest |
//! | `seed` | [`SeedDrive`]: the identity of a guest |
//! | `agent/` | [`AgentConnection`]: our own agent in a running guest |
//! | `qga` | [`Qga`]: `qemu-guest-agent` in a running guest |
//!
//! # Example
//!
//! ```no_run
//! use scalebox_guest::SeedDrive;
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let key = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIKu6/ItCJ89EaUvwZxaYjzC8kOadG6pYNRTO562Y9T9S me";
//! SeedDrive {
//!     instance_id: "vm-0123456789ab".into(),
//!     hostname: "very-silly-penguin".parse()?,
//!     ssh_public_key: Some(key.parse()?),
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
mod cmdline;
mod error;
mod qga;
mod seed;

pub use agent::{AgentConnection, AgentError, Download, FileHead, Output, PutFile, Upload};
pub use cmdline::{kernel_cmdline, with_modules_drive};
pub use error::SeedError;
pub use qga::{FsUsage, Qga, QgaError};
pub use seed::SeedDrive;
