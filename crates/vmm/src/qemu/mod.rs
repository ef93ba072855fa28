//! The QEMU `microvm` driver.

pub(crate) mod arguments;
pub(crate) mod binary;
pub(crate) mod driver;
pub(crate) mod machine;
mod qmp;

pub use driver::QemuDriver;
