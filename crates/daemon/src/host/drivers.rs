//! The hypervisor drivers of this host: the one for new VMs, and those of existing VMs.
//!
//! A VM's record names the driver that launched its machine. That driver adopts the machine after a
//! restart of the daemon, even if `VMM` has changed. A VM that is started again keeps its driver
//! with `VMM=auto`; a `VMM` that names a driver moves it there.

use crate::host::advice::advised;
use crate::host::system;
use crate::settings::{AccelChoice, Settings, SettingsError, VmmChoice};
use scalebox_storage::jails_dir;
use scalebox_units::VmId;
use scalebox_vmm::{Accel, AccelSetting, Error, FirecrackerDriver, Machine, QemuDriver, Vmm};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// The reason why the hypervisors cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DriversError {
    /// Two settings contradict each other.
    #[error(transparent)]
    Settings(#[from] SettingsError),
    /// The hypervisor for new VMs cannot be used.
    #[error("{0}")]
    Vmm(#[from] Error),
}

/// All drivers that a machine on this host may have.
pub(crate) struct Drivers {
    /// The first driver is used for new VMs.
    drivers: Vec<Arc<dyn Vmm>>,
    /// `true` if a VM that is started keeps its recorded driver.
    keep_recorded: bool,
}

impl Drivers {
    /// Finds the hypervisors that the settings allow. The second value is the accelerator: `kvm` or
    /// `tcg`.
    ///
    /// # Errors
    /// If the driver for new VMs cannot be used.
    pub(crate) fn find(settings: &Settings) -> Result<(Drivers, String), DriversError> {
        let accel = accelerator(settings)?;
        let jails = jails_dir(&settings.data_dir);
        let firecracker = match (settings.vmm, accel.accel) {
            (VmmChoice::Qemu, _) | (_, Accel::Tcg) => None,
            (VmmChoice::Firecracker, Accel::Kvm) => Some(FirecrackerDriver::find(&jails)?),
            (VmmChoice::Auto, Accel::Kvm) => FirecrackerDriver::find(&jails)
                .inspect_err(|error| tracing::info!(error = %advised(error), "not using Firecracker"))
                .ok(),
        };
        let mut drivers: Vec<Arc<dyn Vmm>> = Vec::new();
        match firecracker {
            Some(firecracker) => {
                let version = firecracker.version().unwrap_or_default();
                tracing::info!(version, reason = accel.reason, "hypervisor: firecracker");
                drivers.push(Arc::new(firecracker));
                let qemu = QemuDriver::find(accel.accel).unwrap_or_else(|_| QemuDriver::without_program());
                drivers.push(Arc::new(qemu));
            }
            None => {
                tracing::info!(accel = %accel.accel, reason = accel.reason, "hypervisor: qemu");
                drivers.push(Arc::new(QemuDriver::find(accel.accel)?));
                // Firecracker may have launched machines before `VMM` was changed or its program
                // was removed.
                if jails.exists() {
                    let firecracker = match accel.accel {
                        Accel::Kvm => FirecrackerDriver::find(&jails).ok(),
                        Accel::Tcg => None,
                    };
                    drivers.push(Arc::new(
                        firecracker.unwrap_or_else(|| FirecrackerDriver::without_program(&jails)),
                    ));
                }
            }
        }
        let keep_recorded = settings.vmm == VmmChoice::Auto;
        Ok((Drivers::new(drivers, keep_recorded), accel.accel.to_string()))
    }

    /// Combines `drivers`, of which the first is used for new VMs. With `keep_recorded`, a VM that
    /// is started keeps its recorded driver.
    pub(crate) fn new(drivers: Vec<Arc<dyn Vmm>>, keep_recorded: bool) -> Drivers {
        Drivers { drivers, keep_recorded }
    }

    /// Returns the driver for new VMs.
    pub(crate) fn for_new(&self) -> &Arc<dyn Vmm> {
        &self.drivers[0]
    }

    /// Returns the driver to start a VM with, given its recorded driver.
    pub(crate) fn to_start(&self, recorded: Option<&str>) -> &Arc<dyn Vmm> {
        let kept = self.keep_recorded.then(|| self.by_name(recorded)).flatten();
        kept.filter(|driver| driver.can_launch()).unwrap_or(self.for_new())
    }

    fn by_name(&self, name: Option<&str>) -> Option<&Arc<dyn Vmm>> {
        self.drivers.iter().find(|driver| Some(driver.name()) == name)
    }

    /// Adopts a machine like [`Vmm::adopt`], by the recorded driver first, then by the others.
    ///
    /// # Errors
    /// Those of [`Vmm::adopt`].
    pub(crate) async fn adopt(
        &self,
        id: &VmId,
        recorded: Option<&str>,
        run_dir: &Path,
    ) -> Result<Option<Arc<dyn Machine>>, Error> {
        let first = self.by_name(recorded).unwrap_or(self.for_new());
        let others = self.drivers.iter().filter(|driver| driver.name() != first.name());
        let mut adopted = first.adopt(id, run_dir).await;
        for driver in others {
            if !matches!(adopted, Err(Error::Foreign { .. })) {
                break;
            }
            adopted = driver.adopt(id, run_dir).await;
        }
        adopted
    }

    /// Force-stops a machine like [`Vmm::force_stop`], by all drivers.
    ///
    /// # Errors
    /// Those of [`Vmm::force_stop`].
    pub(crate) async fn force_stop(&self, id: &VmId, run_dir: &Path) -> Result<bool, Error> {
        let mut killed = false;
        for driver in &self.drivers {
            killed |= driver.force_stop(id, run_dir).await?;
        }
        Ok(killed)
    }
}

/// Timeout for the KVM module to be loaded, from the boot of the host. Services do not wait for
/// udev, which loads it in the background.
const KVM_LOAD_TIMEOUT: Duration = Duration::from_secs(90);
const CHECK_INTERVAL: Duration = Duration::from_millis(250);

/// Waits for KVM on a host that has just booted. Without this wait, a fast daemon would emulate its
/// guests until its next start.
pub(crate) async fn wait_for_kvm(settings: &Settings) {
    let mut logged = false;
    while settings.accel != AccelChoice::Tcg && scalebox_vmm::kvm_is_missing() && system::uptime() < KVM_LOAD_TIMEOUT {
        if !logged {
            tracing::info!("the host has just booted and the KVM module is not loaded yet: waiting for it");
            logged = true;
        }
        tokio::time::sleep(CHECK_INTERVAL).await;
    }
}

fn accelerator(settings: &Settings) -> Result<scalebox_vmm::AccelChoice, DriversError> {
    let setting = match (settings.vmm, settings.accel) {
        (VmmChoice::Firecracker, AccelChoice::Tcg) => {
            return Err(SettingsError::Value {
                key: "ACCEL",
                value: "tcg".to_owned(),
                expected: "Firecracker does not support emulation: set ACCEL=auto or VMM=qemu".to_owned(),
            }
            .into());
        }
        // Firecracker has no emulation, so KVM is not probed, as with ACCEL=kvm.
        (VmmChoice::Firecracker, _) | (_, AccelChoice::Kvm) => AccelSetting::Kvm,
        (_, AccelChoice::Auto) => AccelSetting::Auto,
        (_, AccelChoice::Tcg) => AccelSetting::Tcg,
    };
    Ok(scalebox_vmm::accelerator(setting)?)
}
