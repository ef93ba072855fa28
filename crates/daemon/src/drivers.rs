//! The hypervisors of this host: the one that new VMs get, and those that VMs have from before.
//!
//! A VM's record names the driver that launched its machine, and that driver adopts it after a
//! restart of the daemon, whatever `VMM` says by then. A VM that is started again keeps its driver
//! with `VMM=auto`; a `VMM` that names one moves it there.

use crate::commands::CommandFailed;
use crate::error::ServiceError;
use crate::host;
use crate::service::{Service, blocking};
use crate::settings::{AccelChoice, Settings, SettingsError, VmmChoice};
use crate::state::Record;
use scalebox_storage::jails_dir;
use scalebox_units::VmId;
use scalebox_vmm::{Accel, AccelSetting, Error, FirecrackerDriver, Machine, QemuDriver, Vmm};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// All drivers that a machine of this host may have.
pub struct Drivers {
    /// The first is that of new VMs.
    drivers: Vec<Arc<dyn Vmm>>,
    /// Whether a VM that is started keeps the driver it had.
    keeps: bool,
}

impl Drivers {
    /// Finds the hypervisors that the settings ask for; the second of the pair is how guests' code
    /// runs: `kvm` or `tcg`.
    ///
    /// # Errors
    /// When the one for new VMs cannot be used.
    pub fn find(settings: &Settings) -> Result<(Drivers, String), CommandFailed> {
        let accel = accelerator(settings)?;
        let jails = jails_dir(&settings.data_dir);
        let firecracker = match (settings.vmm, accel.accel) {
            (VmmChoice::Qemu, _) | (_, Accel::Tcg) => None,
            (VmmChoice::Firecracker, Accel::Kvm) => Some(FirecrackerDriver::find(&jails)?),
            (VmmChoice::Auto, Accel::Kvm) => FirecrackerDriver::find(&jails)
                .inspect_err(|error| tracing::info!(%error, "Firecracker is not used"))
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
                // Machines that it launched before `VMM` was changed, or its program removed.
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
        let keeps = settings.vmm == VmmChoice::Auto;
        Ok((Drivers { drivers, keeps }, accel.accel.to_string()))
    }

    /// The driver of new VMs.
    pub fn for_new(&self) -> &Arc<dyn Vmm> {
        &self.drivers[0]
    }

    /// The driver that starts a VM whose record names `recorded`.
    pub fn to_start(&self, recorded: Option<&str>) -> &Arc<dyn Vmm> {
        let kept = self.keeps.then(|| self.named(recorded)).flatten();
        kept.filter(|driver| driver.can_launch()).unwrap_or(self.for_new())
    }

    fn named(&self, name: Option<&str>) -> Option<&Arc<dyn Vmm>> {
        self.drivers.iter().find(|driver| Some(driver.name()) == name)
    }

    /// As [`Vmm::adopt`], by the driver that launched the machine: `recorded`, or whichever knows
    /// it.
    ///
    /// # Errors
    /// Those of [`Vmm::adopt`].
    pub async fn adopt(
        &self,
        id: &VmId,
        recorded: Option<&str>,
        run_dir: &Path,
    ) -> Result<Option<Arc<dyn Machine>>, Error> {
        let first = self.named(recorded).unwrap_or(self.for_new());
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

    /// As [`Vmm::force_stop`], whichever driver launched the machine.
    ///
    /// # Errors
    /// Those of [`Vmm::force_stop`].
    pub async fn force_stop(&self, id: &VmId, run_dir: &Path) -> Result<bool, Error> {
        let mut ended = false;
        for driver in &self.drivers {
            ended |= driver.force_stop(id, run_dir).await?;
        }
        Ok(ended)
    }
}

impl Service {
    /// The record of a VM that is about to be started, with the driver that will start it. The
    /// state has it when this returns.
    pub(crate) async fn assign_driver(&self, record: &Record) -> Result<Record, ServiceError> {
        let name = self.inner().vmm.to_start(record.vmm.as_deref()).name();
        if record.vmm.as_deref() == Some(name) {
            return Ok(record.clone());
        }
        let (state, id) = (Arc::clone(&self.inner().state), record.id.clone());
        blocking(move || state.set_vmm(&id, name)).await?;
        self.inner()
            .vms
            .change(&record.id, |record| record.vmm = Some(name.to_owned()));
        Ok(Record {
            vmm: Some(name.to_owned()),
            ..record.clone()
        })
    }
}

/// How long after its boot a host may take to load KVM's module: udev does that beside all else,
/// and services do not wait for it.
const BOOTING: Duration = Duration::from_secs(90);
const LOOK_INTERVAL: Duration = Duration::from_millis(250);

/// Waits for KVM on a host that has just booted and is going to have it. A daemon that was faster
/// would emulate its guests until its next start.
pub async fn wait_for_kvm(settings: &Settings) {
    let mut told = false;
    while settings.accel != AccelChoice::Tcg && scalebox_vmm::kvm_is_missing() && host::uptime() < BOOTING {
        if !told {
            tracing::info!("the host has just booted, and KVM's module is not loaded yet: waiting for it");
            told = true;
        }
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
}

fn accelerator(settings: &Settings) -> Result<scalebox_vmm::AccelChoice, CommandFailed> {
    let setting = match (settings.vmm, settings.accel) {
        (VmmChoice::Firecracker, AccelChoice::Tcg) => {
            return Err(SettingsError::Value {
                key: "ACCEL",
                value: "tcg".to_owned(),
                right: "Firecracker does not emulate: set ACCEL=auto, or VMM=qemu".to_owned(),
            }
            .into());
        }
        // Firecracker has no emulation: it takes KVM at the operator's word, as ACCEL=kvm does.
        (VmmChoice::Firecracker, _) | (_, AccelChoice::Kvm) => AccelSetting::Kvm,
        (_, AccelChoice::Auto) => AccelSetting::Auto,
        (_, AccelChoice::Tcg) => AccelSetting::Tcg,
    };
    Ok(scalebox_vmm::accelerator(setting)?)
}
