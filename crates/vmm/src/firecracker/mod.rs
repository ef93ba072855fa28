//! The Firecracker driver.
//!
//! | file | content |
//! |---|---|
//! | `driver` | launch and adopt, each step with its undo |
//! | `machine` | the commands of a running machine, and the detection of its end |
//! | `api` | the API socket: every request, in order |
//! | `jail` | the folder to which the jailer confines a process |
//! | `vsock` | connections to a guest's vsock |
//! | `binary` | finds the Firecracker binary and its jailer |

mod api;
mod binary;
mod driver;
mod jail;
mod machine;
mod vsock;

pub use driver::FirecrackerDriver;
pub use jail::sweep_jails;
