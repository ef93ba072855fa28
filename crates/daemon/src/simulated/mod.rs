//! Tests of the daemon on simulated machines: lifecycle, recovery, the watches, in milliseconds and
//! without root.
//!
//! Everything is the daemon's own code, down to the state file. Simulated are the hypervisor
//! ([`SimVmm`](scalebox_testkit::SimVmm)), the network and the pool's space; disks are ordinary
//! files, and clones are copies. The clock is Tokio's paused clock: a wait of a minute takes no
//! time.
//!
//! | file | content |
//! |---|---|
//! | `sim` | the simulated host, and the operations of tests on it |
//! | `create` | creation, and the host after a creation fails |
//! | `image` | creation of an image, and the pull that it waits for |
//! | `lifecycle` | start, stop, restart, deletion, machines that end |
//! | `change` | growth of a disk, limits, settings |
//! | `agent` | the connection to a guest's agent |
//! | `exec` | commands and files in a guest, with the real agent |
//! | `http` | requests to the API, without a socket |
//! | `snapshot` | snapshots: freezing or pausing the guest |
//! | `main_process` | settings of images: the main process, and the defaults of commands |
//! | `kernels` | the kernel that a VM boots, and the removal of kernels |
//! | `recovery` | recovery at the daemon's next start |
//! | `watches` | the pool watch, auto-extend, clean-up, the network |

mod agent;
mod change;
mod create;
mod exec;
mod http;
mod image;
mod kernels;
mod lifecycle;
mod main_process;
mod recovery;
mod sim;
mod snapshot;
mod watches;
