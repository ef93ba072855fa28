//! The error of a command.

use crate::host::drivers::DriversError;
use crate::host::error::ServiceError;
use crate::settings::SettingsError;
use crate::state::StateError;
use scalebox_storage::StorageError;
use scalebox_units::InvalidFormat;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;

/// The error of a command, as a sentence for the operator.
///
/// An error of a library is also the source, by which [`advice`](crate::host::advice) finds its
/// remedy.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CommandFailed {
    /// A setting is invalid.
    #[error(transparent)]
    Settings(#[from] SettingsError),
    /// An operation on the pool, a template or a disk failed.
    #[error("{0}")]
    Storage(#[from] StorageError),
    /// The state file cannot be used.
    #[error(transparent)]
    State(#[from] StateError),
    /// The network cannot be set up.
    #[error("{0}")]
    Net(#[from] scalebox_net::Error),
    /// The hypervisor cannot be used.
    #[error("{0}")]
    Vmm(#[from] scalebox_vmm::Error),
    /// A malformed name of a template.
    #[error("the template's name {0}")]
    TemplateName(#[from] InvalidFormat),
    /// The template cannot be built.
    #[error("{0}")]
    Image(#[from] scalebox_images::Error),
    /// Recovery, an import or another operation of the service failed.
    #[error(transparent)]
    Host(#[from] ServiceError),
    /// The pool's disks do not belong to this state.
    #[error(
        "the pool at {} has {disks} disks that are not in the state in {}: set STATE_DIR and DATA_DIR to a pair that belongs together. \
         To discard these VMs, remove their disks first: rm {}/vms/*.ext4",
        pool.display(), state_dir.display(), pool.display()
    )]
    ForeignPool {
        /// The pool's mount point.
        pool: PathBuf,
        /// The state folder.
        state_dir: PathBuf,
        /// The number of disks.
        disks: usize,
    },
    /// The state has VMs, but the pool is not mounted. This is not a wrong setting: the pool may be
    /// mounted a moment later.
    #[error(
        "no pool is mounted at {}, but the state has {vms} VMs: mount it again (mount {}; see scaleboxd doctor), and do not create a new \
         one. scaleboxd starts once it is mounted: systemd retries automatically",
        pool.display(), pool.display()
    )]
    PoolMissing {
        /// The pool's mount point.
        pool: PathBuf,
        /// The number of VMs.
        vms: usize,
    },
    /// The API address cannot be bound.
    #[error(
        "cannot listen on {address}: {source}; set API_BIND and API_PORT to an address of this host and a free port"
    )]
    Listen {
        /// The address.
        address: SocketAddr,
        /// The cause.
        source: io::Error,
    },
    /// `LOG_LEVEL` is invalid.
    #[error(
        "LOG_LEVEL={0:?} cannot be used: must be one of error, warn, info, debug, trace, or a filter such as info,scalebox_net=debug"
    )]
    LogLevel(String),
    /// A system call failed.
    #[error("cannot {doing}: {source}")]
    Io {
        /// The attempted operation.
        doing: &'static str,
        /// The cause.
        source: io::Error,
    },
}

impl CommandFailed {
    /// Returns whether a setting has to be changed, so that a retry does not help.
    pub(crate) fn is_configuration(&self) -> bool {
        matches!(
            self,
            CommandFailed::Settings(_) | CommandFailed::LogLevel(_) | CommandFailed::ForeignPool { .. }
        )
    }
}

/// Turns an I/O error into a [`CommandFailed`] that names the attempted operation.
pub(crate) fn io(doing: &'static str) -> impl Fn(io::Error) -> CommandFailed {
    move |source| CommandFailed::Io { doing, source }
}

impl From<DriversError> for CommandFailed {
    fn from(error: DriversError) -> Self {
        match error {
            DriversError::Settings(error) => error.into(),
            DriversError::Vmm(error) => error.into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::advice::advised;
    use scalebox_programs::ProgramError;

    #[test]
    fn remedies_of_library_errors_are_found_and_appended_once() {
        const SENTENCE: &str = "no pool is mounted at /pool; run `scaleboxd pool init`";
        let not_mounted = || StorageError::NotMounted("/pool".into());
        let host = ServiceError::from(not_mounted());
        for failed in [CommandFailed::from(not_mounted()), CommandFailed::from(host)] {
            assert_eq!(advised(&failed), SENTENCE);
        }
        let (program, package) = ("tool", "tools");
        let guest = scalebox_images::Error::from(ProgramError::Missing { program, package });
        let vmm = || scalebox_vmm::Error::NotInstalled { program, package };
        for failed in [
            CommandFailed::from(guest),
            CommandFailed::from(scalebox_net::Error::NftMissing { package }),
            CommandFailed::from(vmm()),
            CommandFailed::from(DriversError::from(vmm())),
        ] {
            let sentence = advised(&failed);
            assert!(sentence.contains("apt-get install tools"), "{sentence}");
        }
    }
}
