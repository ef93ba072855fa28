//! The kernel command line.

use crate::init::files::read;
use scalebox_agent_api::InitKind;
use std::path::PathBuf;

/// The parameters that the initramfs supports.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct CommandLine {
    /// `root=`: the block device of the root file system.
    pub(crate) device: PathBuf,
    /// `rootfstype=`: its type.
    pub(crate) kind: String,
    /// `rootflags=`: mount options, separated by commas.
    pub(crate) flags: Vec<String>,
    /// `rw` or `ro`: whether it is mounted writable.
    pub(crate) writable: bool,
    /// `init=`: the program of the root file system that becomes process 1.
    pub(crate) init: PathBuf,
    /// `scalebox.init=system` or `=agent`: which program becomes process 1, regardless of the root
    /// file system.
    pub(crate) init_kind: Option<InitKind>,
    /// `scalebox.modules=`: the block device with the kernel's modules.
    pub(crate) modules: Option<PathBuf>,
}

impl CommandLine {
    /// Reads the command line of the running kernel.
    pub(crate) fn read() -> Result<CommandLine, String> {
        Ok(CommandLine::parse(&read("/proc/cmdline")?))
    }

    fn parse(line: &str) -> CommandLine {
        let mut found = CommandLine {
            device: "/dev/vda".into(),
            kind: "ext4".into(),
            flags: Vec::new(),
            writable: false,
            init: "/sbin/init".into(),
            init_kind: None,
            modules: None,
        };
        for word in line.split_ascii_whitespace() {
            match word.split_once('=').unwrap_or((word, "")) {
                ("root", value) => found.device = value.into(),
                ("rootfstype", value) => found.kind = value.into(),
                ("rootflags", value) => found.flags = value.split(',').map(str::to_owned).collect(),
                ("ro", "") => found.writable = false,
                ("rw", "") => found.writable = true,
                ("init", value) => found.init = value.into(),
                ("scalebox.init", "system") => found.init_kind = Some(InitKind::System),
                ("scalebox.init", "agent") => found.init_kind = Some(InitKind::Agent),
                ("scalebox.modules", value) => found.modules = Some(value.into()),
                _ => {}
            }
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_value_of_a_parameter_counts_and_others_are_ignored() {
        let line = "console=ttyS0 quiet root=/dev/vdb rw rootflags=noatime,commit=30 ro rw init=/bin/start \
                    scalebox.modules=/dev/vdc scalebox.init=agent tsc=reliable\n";
        let parsed = CommandLine::parse(line);
        assert_eq!(
            parsed,
            CommandLine {
                device: "/dev/vdb".into(),
                kind: "ext4".into(),
                flags: vec!["noatime".into(), "commit=30".into()],
                writable: true,
                init: "/bin/start".into(),
                init_kind: Some(InitKind::Agent),
                modules: Some("/dev/vdc".into()),
            }
        );
    }

    #[test]
    fn the_defaults_are_the_first_disk_and_sbin_init() {
        let parsed = CommandLine::parse("quiet");
        assert_eq!(parsed.device, PathBuf::from("/dev/vda"));
        assert_eq!(parsed.init, PathBuf::from("/sbin/init"));
        assert!(!parsed.writable && parsed.init_kind.is_none() && parsed.modules.is_none());
    }
}
