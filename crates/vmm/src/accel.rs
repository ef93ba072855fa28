//! Detects whether KVM can run guests on this host, and the reason if it cannot.
//!
//! An openable `/dev/kvm` is not enough. Inside a virtual machine without nested virtualisation the
//! device may exist, and KVM may even create a VM, but no guest ever runs. The processor must also
//! offer `vmx` (Intel) or `svm` (AMD).

use crate::error::{Error, Result};
use std::fmt;
use std::fs::{self, File};
use std::path::Path;
use std::str::FromStr;

const DEVICE: &str = "/dev/kvm";

/// The setting `ACCEL`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum AccelSetting {
    /// KVM if it can run guests, otherwise emulation.
    #[default]
    Auto,
    /// KVM; an error if it is not available.
    Kvm,
    /// Emulation, even if KVM is available.
    Tcg,
}

/// The way in which the guest's instructions are executed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accel {
    /// Execution by the processor, through `/dev/kvm`.
    Kvm,
    /// Execution by translation (QEMU's TCG): works everywhere, an order of magnitude slower.
    Tcg,
}

/// The chosen accelerator, and the reason as a sentence for the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AccelChoice {
    /// The accelerator.
    pub accel: Accel,
    /// The reason.
    pub reason: String,
}

/// Facts about the host: the inputs of [`choose`].
#[derive(Debug, Clone)]
struct KvmProbe {
    /// `Ok` if `/dev/kvm` opens for reading and writing, otherwise the kernel's error.
    device: Result<(), String>,
    /// The content of `/proc/cpuinfo`.
    cpuinfo: String,
}

/// Probes the host and chooses an accelerator.
///
/// # Errors
/// [`Error::NoKvm`] if `ACCEL=kvm` and `/dev/kvm` does not open.
pub fn accelerator(setting: AccelSetting) -> Result<AccelChoice> {
    choose(setting, &probe())
}

/// Chooses an accelerator from the facts in `host`. With `ACCEL=kvm` an openable device is enough;
/// the processor flags are not checked.
fn choose(setting: AccelSetting, host: &KvmProbe) -> Result<AccelChoice> {
    let choice = |accel, reason: String| Ok(AccelChoice { accel, reason });
    match (setting, &host.device, virtualisation_flag(&host.cpuinfo)) {
        (AccelSetting::Tcg, _, _) => choice(Accel::Tcg, "emulation was requested".into()),
        (AccelSetting::Kvm, Ok(()), _) => choice(Accel::Kvm, "KVM was requested".into()),
        (AccelSetting::Kvm, Err(why), _) => Err(Error::NoKvm { why: why.clone() }),
        (AccelSetting::Auto, Ok(()), Some(flag)) => {
            choice(Accel::Kvm, format!("/dev/kvm opens and the processor has {flag}"))
        }
        (AccelSetting::Auto, Ok(()), None) => choice(
            Accel::Tcg,
            "/dev/kvm opens, but the processor has neither vmx nor svm: guests cannot run on it".into(),
        ),
        (AccelSetting::Auto, Err(why), _) => choice(Accel::Tcg, why.clone()),
    }
}

/// Returns whether the processor supports KVM but `/dev/kvm` is missing: the module is not loaded,
/// or not yet.
pub fn kvm_is_missing() -> bool {
    virtualisation_flag(&cpuinfo()).is_some() && !Path::new(DEVICE).exists()
}

fn probe() -> KvmProbe {
    let device = File::options().read(true).write(true).open(DEVICE);
    KvmProbe {
        device: device
            .map(drop)
            .map_err(|error| format!("cannot open {DEVICE}: {error}")),
        cpuinfo: cpuinfo(),
    }
}

/// Reads `/proc/cpuinfo`. If it is unreadable there are no flags, and no flags mean emulation:
/// slow, but never wrong.
fn cpuinfo() -> String {
    fs::read_to_string("/proc/cpuinfo").unwrap_or_default()
}

fn virtualisation_flag(cpuinfo: &str) -> Option<&str> {
    cpuinfo
        .lines()
        .filter_map(|line| line.split_once(':'))
        .filter(|(key, _)| key.trim() == "flags")
        .flat_map(|(_, flags)| flags.split_whitespace())
        .find(|flag| matches!(*flag, "vmx" | "svm"))
}

impl fmt::Display for Accel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Accel::Kvm => "kvm",
            Accel::Tcg => "tcg",
        })
    }
}

impl FromStr for AccelSetting {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(AccelSetting::Auto),
            "kvm" => Ok(AccelSetting::Kvm),
            "tcg" => Ok(AccelSetting::Tcg),
            _ => Err(format!("{text:?} is not an accelerator; use auto, kvm or tcg")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(device: Result<(), &str>, flags: &str) -> KvmProbe {
        KvmProbe {
            device: device.map_err(str::to_owned),
            cpuinfo: format!(
                "processor\t: 0\nmodel name\t: svm-like vmx\nflags\t\t: fpu vme {flags} sse2\nbugs\t\t: svm\n"
            ),
        }
    }

    #[test]
    fn kvm_is_chosen_only_where_it_can_run_guests() {
        let refused = || Err("cannot open /dev/kvm: No such file or directory");
        for (device, flags, expected) in [
            (Ok(()), "vmx", Accel::Kvm),
            (Ok(()), "svm", Accel::Kvm),
            (Ok(()), "", Accel::Tcg),
            (Ok(()), "vmx_ept svm_lock", Accel::Tcg),
            (refused(), "vmx", Accel::Tcg),
            (refused(), "", Accel::Tcg),
        ] {
            let choice = choose(AccelSetting::Auto, &host(device, flags)).unwrap();
            assert_eq!(choice.accel, expected, "{device:?} {flags:?}: {}", choice.reason);
        }
    }

    #[test]
    fn the_reason_for_emulation_is_reported() {
        let reason = |device, flags| choose(AccelSetting::Auto, &host(device, flags)).unwrap().reason;
        assert!(reason(Ok(()), "").contains("neither vmx nor svm"));
        assert!(reason(Err("cannot open /dev/kvm: Permission denied"), "vmx").contains("Permission denied"));
    }

    #[test]
    fn an_explicit_setting_is_obeyed_or_rejected_with_the_cause() {
        assert_eq!(
            choose(AccelSetting::Tcg, &host(Ok(()), "vmx")).unwrap().accel,
            Accel::Tcg
        );
        assert_eq!(choose(AccelSetting::Kvm, &host(Ok(()), "")).unwrap().accel, Accel::Kvm);
        let error = choose(AccelSetting::Kvm, &host(Err("cannot open /dev/kvm: gone"), "vmx")).unwrap_err();
        assert_eq!(error.to_string(), "KVM is required, but cannot open /dev/kvm: gone");
    }

    #[test]
    fn an_invalid_setting_is_rejected_with_the_valid_values() {
        assert_eq!("kvm".parse(), Ok(AccelSetting::Kvm));
        assert!("KVM!".parse::<AccelSetting>().unwrap_err().contains("auto, kvm or tcg"));
    }
}
