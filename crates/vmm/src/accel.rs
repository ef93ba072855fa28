//! Whether KVM can run guests here, and why not.
//!
//! That `/dev/kvm` opens is not enough: inside a virtual machine without nested virtualisation the
//! device may be there, a VM may even be created on it, and no guest ever runs. The processor has
//! to offer `vmx` (Intel) or `svm` (AMD) as well.

use crate::{Error, Result};
use std::fmt;
use std::fs::{self, File};
use std::path::Path;
use std::str::FromStr;

const DEVICE: &str = "/dev/kvm";

/// What the setting `ACCEL` asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum AccelSetting {
    /// KVM where it can run guests, else emulation.
    #[default]
    Auto,
    /// KVM, or an error.
    Kvm,
    /// Emulation, also where KVM would do.
    Tcg,
}

/// How guests' instructions are run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accel {
    /// By the processor, through `/dev/kvm`.
    Kvm,
    /// By translation (QEMU's TCG): works everywhere, an order of magnitude slower.
    Tcg,
}

/// The accelerator chosen, and the reason in a sentence for the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AccelChoice {
    /// The choice.
    pub accel: Accel,
    /// Why.
    pub reason: String,
}

/// What was found on the host: the inputs of [`choose`].
#[derive(Debug, Clone)]
pub struct KvmProbe {
    /// Whether `/dev/kvm` opens for reading and writing; else what the kernel said.
    pub device: Result<(), String>,
    /// The text of `/proc/cpuinfo`.
    pub cpuinfo: String,
}

/// Looks at the host and chooses.
///
/// # Errors
/// [`Error::NoKvm`] when KVM is demanded and `/dev/kvm` does not open.
pub fn accelerator(setting: AccelSetting) -> Result<AccelChoice> {
    choose(setting, &probe())
}

/// Chooses by what was found. KVM that is demanded is taken at the operator's word as soon as the
/// device opens.
///
/// # Errors
/// [`Error::NoKvm`] when KVM is demanded and the device does not open.
pub fn choose(setting: AccelSetting, host: &KvmProbe) -> Result<AccelChoice> {
    let choice = |accel, reason: String| Ok(AccelChoice { accel, reason });
    match (setting, &host.device, virtualisation_flag(&host.cpuinfo)) {
        (AccelSetting::Tcg, _, _) => choice(Accel::Tcg, "ACCEL=tcg".into()),
        (AccelSetting::Kvm, Ok(()), _) => choice(Accel::Kvm, "ACCEL=kvm".into()),
        (AccelSetting::Kvm, Err(why), _) => Err(Error::NoKvm { why: why.clone() }),
        (AccelSetting::Auto, Ok(()), Some(flag)) => {
            choice(Accel::Kvm, format!("/dev/kvm opens and the processor has {flag}"))
        }
        (AccelSetting::Auto, Ok(()), None) => choice(
            Accel::Tcg,
            "/dev/kvm opens, but the processor shows neither vmx nor svm: guests would not run on it".into(),
        ),
        (AccelSetting::Auto, Err(why), _) => choice(Accel::Tcg, why.clone()),
    }
}

/// Whether the processor has KVM, and its device is not there: its module is not loaded, or not
/// yet.
pub fn kvm_is_missing() -> bool {
    virtualisation_flag(&cpuinfo()).is_some() && !Path::new(DEVICE).exists()
}

fn probe() -> KvmProbe {
    let device = File::options().read(true).write(true).open(DEVICE);
    KvmProbe {
        device: device
            .map(drop)
            .map_err(|error| format!("{DEVICE} does not open: {error}")),
        cpuinfo: cpuinfo(),
    }
}

/// A /proc that cannot be read shows no flag, and no flag means emulation: slow, never wrong.
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
            _ => Err(format!("{text:?} is not an accelerator: write auto, kvm or tcg")),
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
        let refused = || Err("/dev/kvm does not open: No such file or directory");
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
    fn emulation_says_why_kvm_was_not_taken() {
        let reason = |device, flags| choose(AccelSetting::Auto, &host(device, flags)).unwrap().reason;
        assert!(reason(Ok(()), "").contains("neither vmx nor svm"));
        assert!(reason(Err("/dev/kvm does not open: Permission denied"), "vmx").contains("Permission denied"));
    }

    #[test]
    fn a_demand_is_met_or_refused_with_the_way_out() {
        assert_eq!(
            choose(AccelSetting::Tcg, &host(Ok(()), "vmx")).unwrap().accel,
            Accel::Tcg
        );
        assert_eq!(choose(AccelSetting::Kvm, &host(Ok(()), "")).unwrap().accel, Accel::Kvm);
        let refusal = choose(AccelSetting::Kvm, &host(Err("/dev/kvm does not open: gone"), "vmx")).unwrap_err();
        assert!(refusal.to_string().contains("gone: load the kvm module"), "{refusal}");
    }

    #[test]
    fn a_setting_that_does_not_parse_shows_what_would() {
        assert_eq!("kvm".parse(), Ok(AccelSetting::Kvm));
        assert!("KVM!".parse::<AccelSetting>().unwrap_err().contains("auto, kvm or tcg"));
    }
}
