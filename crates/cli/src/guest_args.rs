//! Arguments and help texts of the commands that work inside a VM: `run`, `exec`, `shell`, `cp`,
//! `logs` and `stats`.

use crate::complete;
use crate::numbers::{processor_count, whole_number};
use clap::builder::NonEmptyStringValueParser;
use clap_complete::engine::ArgValueCompleter;
use scalebox_api::{CreateExec, ExecId, FileOwner, GuestPath, ImageReference, VmName};
use std::path::PathBuf;

const VM: &str = "Name or id of the VM";

/// The environment, working directory and user of a command.
#[derive(Debug, Clone, Default, clap::Args)]
pub(crate) struct Surroundings {
    /// Set a variable; without a value, take it from the environment here
    #[arg(long, short, value_name = "NAME[=VALUE]", value_parser = variable)]
    pub env: Vec<(String, String)>,
    /// Run in this directory [default: that of the image, or /]
    #[arg(long, short = 'w', value_name = "PATH")]
    pub cwd: Option<GuestPath>,
    /// Run as this user [default: that of the image, or root]
    #[arg(long, short, value_name = "USER[:GROUP]")]
    pub user: Option<FileOwner>,
}

/// The streams of a command.
#[derive(Debug, Clone, Copy, Default, clap::Args)]
pub(crate) struct Streams {
    /// Give the command a terminal, which is this one
    #[arg(long, short)]
    pub tty: bool,
    /// Send standard input to the command also from a terminal; a pipe or file is always sent
    #[arg(long, short)]
    pub interactive: bool,
}

const EXEC: &str = "\
The command and its arguments are passed unchanged, without a shell. Ctrl-C, SIGTERM and SIGHUP are sent to it. If the \
connection is lost, scalebox reconnects and continues with the next byte of the output.

The exit code is that of the command; 128 + N if signal N killed it; 124 after --timeout; 125 if scalebox itself fails.

Examples:
  scalebox exec very-silly-penguin -- df -h /
  scalebox exec very-silly-penguin -- sh -c 'cd /srv && ls | wc -l'
  tar c folder | scalebox exec very-silly-penguin -- tar x -C /srv
  scalebox exec -t very-silly-penguin -- top
  id=$(scalebox exec --detach very-silly-penguin -- make)
  scalebox exec --attach $id very-silly-penguin";

#[derive(Debug, clap::Args)]
#[command(after_help = EXEC)]
pub(crate) struct ExecArgs {
    #[command(flatten)]
    pub surroundings: Surroundings,
    #[command(flatten)]
    pub streams: Streams,
    /// Kill the command after this time
    #[arg(long, value_name = "SECONDS",
          value_parser = clap::value_parser!(u64).range(1..=CreateExec::MAX_TIMEOUT_SECONDS))]
    pub timeout: Option<u64>,
    /// Print the id of the command and leave it running
    #[arg(long, short, conflicts_with_all = ["tty", "list", "attach"])]
    pub detach: bool,
    /// List the commands that run in the VM, and the latest that have ended
    #[arg(long, conflicts_with_all = ["attach", "tty", "interactive"])]
    pub list: bool,
    /// Show the output of a command that was started before, and send it standard input and signals
    #[arg(long, value_name = "ID")]
    pub attach: Option<ExecId>,
    #[arg(value_name = "VM", help = VM, value_parser = NonEmptyStringValueParser::new(),
          add = ArgValueCompleter::new(complete::vms))]
    pub vm: String,
    /// Command and its arguments
    #[arg(value_name = "COMMAND", trailing_var_arg = true, required_unless_present_any = ["list", "attach"],
          conflicts_with_all = ["list", "attach"], allow_hyphen_values = true)]
    pub command: Vec<String>,
}

#[derive(Debug, clap::Args)]
#[command(
    after_help = "Starts bash, or sh where there is no bash. The exit code is that of the shell.\n\n\
    Example:\n  scalebox shell very-silly-penguin"
)]
pub(crate) struct ShellArgs {
    #[command(flatten)]
    pub surroundings: Surroundings,
    #[arg(value_name = "VM", help = VM, value_parser = NonEmptyStringValueParser::new(),
          add = ArgValueCompleter::new(complete::vms))]
    pub vm: String,
}

const CP: &str = "\
A path in a VM is VM:/PATH; write a local path with a colon as ./PATH. A target that is an existing directory receives \
the source under its own name. Permissions are kept; files that are copied to a VM belong to root, or to --user. Files \
appear when they are complete.

Examples:
  scalebox cp notes.txt very-silly-penguin:/root/
  scalebox cp very-silly-penguin:/etc/os-release .
  scalebox cp --recursive project very-silly-penguin:/srv
  scalebox cp very-silly-penguin:/var/log/dpkg.log - | tail -3";

#[derive(Debug, clap::Args)]
#[command(after_help = CP)]
pub(crate) struct CopyArgs {
    /// Copy directories with their content
    #[arg(long, short)]
    pub recursive: bool,
    /// Owner of files in the VM [default: root]
    #[arg(long, short, value_name = "USER[:GROUP]")]
    pub user: Option<FileOwner>,
    /// File or directory to copy, or - for standard input
    #[arg(value_name = "SOURCE", add = ArgValueCompleter::new(complete::places))]
    pub source: String,
    /// Path to copy to, or - for standard output
    #[arg(value_name = "TARGET", add = ArgValueCompleter::new(complete::places))]
    pub target: String,
}

#[derive(Debug, clap::Args)]
#[command(
    after_help = "Prints the output of the VM's main process, which VMs of images without an init system have. For \
    other VMs, and with --console, prints the console: what the kernel and the services printed, also of a VM that is \
    stopped or cannot boot. Both are printed unchanged.\n\n\
    Examples:\n  scalebox logs very-silly-penguin --tail 4000\n  scalebox logs --follow web\n  \
    scalebox logs --console web"
)]
pub(crate) struct LogsArgs {
    /// Continue with new output until interrupted
    #[arg(long, short)]
    pub follow: bool,
    /// Start with the last bytes [default: the whole log]
    #[arg(long, value_name = "BYTES", value_parser = whole_number)]
    pub tail: Option<u64>,
    /// Print the console, also for a VM with a main process
    #[arg(long)]
    pub console: bool,
    #[arg(value_name = "VM", help = VM, value_parser = NonEmptyStringValueParser::new(),
          add = ArgValueCompleter::new(complete::vms))]
    pub vm: String,
}

#[derive(Debug, clap::Args)]
#[command(
    after_help = "The numbers are those that the guest reports. CPU is the use within the last interval, in percent \
    of one processor.\n\nExamples:\n  scalebox stats\n  scalebox stats --watch very-silly-penguin\n  \
    scalebox stats --json | jq '.vms[] | {name, free: .stats.memory_available_bytes}'"
)]
pub(crate) struct StatsArgs {
    /// Update every two seconds until interrupted
    #[arg(long)]
    pub watch: bool,
    #[arg(value_name = "VM", help = "Names or ids of VMs [default: all running VMs]",
          value_parser = NonEmptyStringValueParser::new(), add = ArgValueCompleter::new(complete::vms))]
    pub vms: Vec<String>,
}

const RUN: &str = "\
Creates a VM, runs the command in it with this terminal or these pipes, and deletes the VM, also after an error or \
Ctrl-C. Without a command it runs that of the image, or a shell if the image has none.

The exit code is that of the command; 128 + N if signal N killed it; 124 after --timeout; 125 if scalebox itself fails.

Examples:
  scalebox run debian-base -- uname -a
  scalebox run python:3.12-slim -- python3 -c 'print(6 * 7)'
  scalebox run -t debian-base
  scalebox run --memory 2048 -v ./project:/srv/project debian-base -- make -C /srv/project test
  scalebox run --keep --name box debian-base -- apt-get install -y git";

#[derive(Debug, clap::Args)]
#[command(after_help = RUN)]
pub(crate) struct RunArgs {
    /// Name of the VM [default: run- and eight hex digits]
    #[arg(long, value_name = "NAME")]
    pub name: Option<VmName>,
    /// Keep the VM when the command has ended
    #[arg(long)]
    pub keep: bool,
    /// Size of the disk in GiB [default: the server's default, or the template's size if larger]
    #[arg(long, value_name = "GIB", value_parser = whole_number)]
    pub disk: Option<u64>,
    /// Memory in MiB [default: the server's default]
    #[arg(long, value_name = "MIB", value_parser = whole_number)]
    pub memory: Option<u64>,
    /// Number of virtual processors [default: the server's default]
    #[arg(long, value_name = "COUNT", value_parser = processor_count)]
    pub cpus: Option<u32>,
    /// Copy a local file or directory to the VM before the command runs
    #[arg(long, short, value_name = "LOCAL:REMOTE", value_parser = volume)]
    pub volume: Vec<Volume>,
    /// Maximum time to wait until the VM has booted
    #[arg(long, value_name = "SECONDS", default_value_t = 120,
          value_parser = clap::value_parser!(u64).range(1..=scalebox_api::CreateVmQuery::MAX_WAIT_SECONDS))]
    pub wait: u64,
    /// Kill the command after this time
    #[arg(long, value_name = "SECONDS",
          value_parser = clap::value_parser!(u64).range(1..=CreateExec::MAX_TIMEOUT_SECONDS))]
    pub timeout: Option<u64>,
    #[command(flatten)]
    pub surroundings: Surroundings,
    #[command(flatten)]
    pub streams: Streams,
    /// Template, or image of a registry with a tag, a digest or a path; the server pulls an image if
    /// it is not a template yet
    #[arg(value_name = "IMAGE", add = ArgValueCompleter::new(complete::templates))]
    pub image: ImageReference,
    /// Command and its arguments [default: the entrypoint and command of the image, or a shell]
    #[arg(value_name = "COMMAND", trailing_var_arg = true, allow_hyphen_values = true)]
    pub command: Vec<String>,
}

/// A local file or directory, and its path in a VM.
#[derive(Debug, Clone)]
pub(crate) struct Volume {
    pub local: PathBuf,
    pub remote: GuestPath,
}

fn volume(text: &str) -> Result<Volume, String> {
    let (local, remote) = text
        .rsplit_once(':')
        .filter(|(local, _)| !local.is_empty())
        .ok_or("write LOCAL:REMOTE, such as ./project:/srv/project")?;
    let remote = remote.parse().map_err(|why| format!("the path in the VM {why}"))?;
    Ok(Volume {
        local: local.into(),
        remote,
    })
}

pub(crate) fn variable(text: &str) -> Result<(String, String), String> {
    let (name, value) = match text.split_once('=') {
        Some((name, value)) => (name, value.to_owned()),
        None => {
            let value = std::env::var_os(text).ok_or("the variable is not set here; write NAME=VALUE")?;
            let value = value.into_string();
            (
                text,
                value.map_err(|_| "the value of the variable is not UTF-8".to_owned())?,
            )
        }
    };
    match name {
        "" => Err("the name is empty; write NAME=VALUE".to_owned()),
        name => Ok((name.to_owned(), value)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn volumes_have_a_local_and_an_absolute_remote_path() {
        let parsed = volume("./a:b:/srv").unwrap();
        assert_eq!((parsed.local.to_str(), parsed.remote.as_str()), (Some("./a:b"), "/srv"));
        for text in ["", "a", ":/srv", "a:", "a:srv", "a:/../b"] {
            assert!(volume(text).is_err(), "{text}");
        }
    }

    #[test]
    fn variables_without_a_value_come_from_the_environment() {
        assert_eq!(variable("A=b=c").unwrap(), ("A".to_owned(), "b=c".to_owned()));
        assert_eq!(variable("A=").unwrap().1, "");
        assert_eq!(variable("PATH").unwrap().1, std::env::var("PATH").unwrap());
        for text in ["", "=a", "NO_SUCH_VARIABLE"] {
            assert!(variable(text).is_err(), "{text}");
        }
    }
}
