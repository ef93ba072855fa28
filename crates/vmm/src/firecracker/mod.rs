//! The Firecracker driver.

mod api;
mod binary;
mod driver;
mod jail;
mod machine;
mod vsock;

pub use driver::FirecrackerDriver;
pub use jail::sweep_jails;
