//! Defines every command, its arguments and its help text.

use crate::complete;
use crate::guest_args::{CopyArgs, ExecArgs, LogsArgs, RunArgs, ShellArgs, StatsArgs, variable};
use crate::numbers::{processor_count, whole_number};
use crate::settings::Connection;
use clap::builder::NonEmptyStringValueParser;
use clap::{Parser, Subcommand};
use clap_complete::Shell;
use clap_complete::engine::ArgValueCompleter;
use scalebox_api::{AutoExtend, CreateMain, IdempotencyKey, ImageReference, RestartPolicy, TemplateName, VmName};
use std::path::PathBuf;
use std::str::FromStr;

const SETTINGS: &str = "\
The server's address and token are taken from the first source that has them:
  1. --url and --token (avoid --token: other users of this machine can read it in the process list)
  2. SCALEBOX_URL and SCALEBOX_TOKEN in the environment
  3. ~/.config/scalebox/config, with lines such as SCALEBOX_TOKEN=... (mode 600)
  4. for root on a Scalebox host, the daemon's settings in /etc/scaleboxd/config

Exit codes: 0 success; 1 the request failed or the server cannot be reached; 2 invalid usage or settings. run, exec \
and shell exit with the code of the command; see their help.

Examples, a VM for one command, and a VM that stays:
  scalebox run debian-base -- df -h /
  scalebox vm create --disk 10 --name first --wait
  scalebox shell first
  scalebox vm delete first";

/// Manage disposable VMs on a Scalebox host.
#[derive(Debug, Parser)]
#[command(name = "scalebox", version, after_help = SETTINGS, max_term_width = 100)]
pub(crate) struct Args {
    #[command(flatten)]
    pub connection: Connection,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Create a VM, run a command in it, and delete it
    Run(Box<RunArgs>),
    /// Run a command in a VM
    Exec(Box<ExecArgs>),
    /// Open a shell in a VM
    Shell(ShellArgs),
    /// Copy files and directories to and from a VM
    Cp(CopyArgs),
    /// Print the log of a VM's console
    Logs(LogsArgs),
    /// Show the load, memory and disk of VMs
    Stats(StatsArgs),
    /// Check and store the address and the token of a server
    #[command(
        after_help = "Reads the token from standard input, without showing it on a terminal, and stores it in \
        ~/.config/scalebox/config with mode 0600.\n\n\
        Examples:\n  scalebox login https://box.example\n  sudo scaleboxd client-config | sed -n 's/^SCALEBOX_TOKEN=//p' | scalebox login"
    )]
    Login {
        /// Address of the server [default: SCALEBOX_URL, or http://127.0.0.1:8080]
        #[arg(value_name = "URL")]
        server: Option<String>,
    },
    /// Remove the stored address and token
    #[command(after_help = "Example:\n  scalebox logout")]
    Logout,
    /// Show the host's version, pool, memory and VM counts
    #[command(after_help = "Example:\n  scalebox status")]
    Status,
    /// Create, list, change, log in to and delete VMs
    #[command(
        subcommand,
        after_help = "Example:\n  scalebox vm create --name box --disk 10 --wait && scalebox vm ssh box"
    )]
    Vm(VmCommand),
    /// List, pull, export, import and delete the templates that disks are cloned from
    #[command(subcommand, after_help = "Example:\n  scalebox template list")]
    Template(TemplateCommand),
    /// Show, grow, shrink and trim the pool, which holds all disks and templates
    #[command(subcommand, after_help = "Example:\n  scalebox pool show")]
    Pool(PoolCommand),
    /// Follow the host's events
    #[command(
        after_help = "Prints one event per line; with --json, one JSON object per line. Reconnects after a restart of the server; \
        the event `missed` reports that some were lost.\n\n\
        Examples:\n  scalebox events\n  scalebox events --no-follow    # past events only\n  \
        scalebox events --json | jq --unbuffered -r 'select(.kind == \"failed\").vm.name'"
    )]
    Events {
        /// Start after this event; 0 starts with the oldest that the server has [default: new
        /// events only]
        #[arg(long, value_name = "ID", value_parser = whole_number)]
        since: Option<u64>,
        /// Print past events and exit
        #[arg(long)]
        no_follow: bool,
    },
    /// Print a completion script for a shell
    #[command(
        after_help = "Names of VMs and templates are completed too; the script queries the server for them.\n\n\
        Examples:\n  source <(scalebox completions bash)\n  \
        scalebox completions fish > ~/.config/fish/completions/scalebox.fish"
    )]
    Completions {
        /// Shell to print the script for
        shell: Shell,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum VmCommand {
    /// Create a VM and start it
    Create(Box<CreateArgs>),
    /// List all VMs
    #[command(
        visible_alias = "ls",
        after_help = "Example, the names of running VMs:\n  \
        scalebox vm list --json | jq -r '.vms[] | select(.status == \"running\").name'"
    )]
    List,
    /// Show a VM's status, disk, limits and SSH command
    #[command(after_help = "Example:\n  scalebox vm get very-silly-penguin")]
    Get {
        #[arg(value_name = "NAME", help = VM, value_parser = NonEmptyStringValueParser::new(),
              add = ArgValueCompleter::new(complete::vms))]
        vm: String,
    },
    /// Start a stopped VM
    #[command(after_help = "Example:\n  scalebox vm start very-silly-penguin && scalebox vm wait very-silly-penguin")]
    Start {
        #[arg(value_name = "NAME", help = VM, value_parser = NonEmptyStringValueParser::new(),
              add = ArgValueCompleter::new(complete::vms))]
        vm: String,
    },
    /// Shut a VM down and keep its disk
    #[command(after_help = "Example:\n  scalebox vm stop very-silly-penguin")]
    Stop {
        #[arg(value_name = "NAME", help = VM, value_parser = NonEmptyStringValueParser::new(),
              add = ArgValueCompleter::new(complete::vms))]
        vm: String,
    },
    /// Restart a VM, or start it if it is stopped
    #[command(after_help = "Example:\n  scalebox vm restart very-silly-penguin")]
    Restart {
        #[arg(value_name = "NAME", help = VM, value_parser = NonEmptyStringValueParser::new(),
              add = ArgValueCompleter::new(complete::vms))]
        vm: String,
    },
    /// Grow a VM's disk, also while it is running; disks cannot shrink
    #[command(after_help = "Example:\n  scalebox vm resize very-silly-penguin --disk 20")]
    Resize {
        #[arg(value_name = "NAME", help = VM, value_parser = NonEmptyStringValueParser::new(),
              add = ArgValueCompleter::new(complete::vms))]
        vm: String,
        /// New size of the disk in GiB
        #[arg(long, value_name = "GIB", value_parser = whole_number)]
        disk: u64,
    },
    /// Change a VM's settings; settings without a flag keep their values
    #[command(after_help = "Examples:\n  scalebox vm set very-silly-penguin --extend-to 50\n  \
        scalebox vm set very-silly-penguin --extend-to 50 --extend-by 10 --extend-at 90\n  \
        scalebox vm set very-silly-penguin --no-extend --disk-iops 500 --net-mbps none --autostart off")]
    Set {
        #[arg(value_name = "NAME", help = VM, value_parser = NonEmptyStringValueParser::new(),
              add = ArgValueCompleter::new(complete::vms))]
        vm: String,
        #[command(flatten)]
        changes: SetArgs,
    },
    /// Discard the blocks of files deleted in the guest
    #[command(
        after_help = "The server also trims each running guest on a schedule. Needs a guest agent.\n\n\
        Example:\n  scalebox vm trim very-silly-penguin"
    )]
    Trim {
        #[arg(value_name = "NAME", help = VM, value_parser = NonEmptyStringValueParser::new(),
              add = ArgValueCompleter::new(complete::vms))]
        vm: String,
    },
    /// Create a template from the disk of a running or stopped VM
    #[command(
        after_help = "VMs created from the template have the files of this VM, but their own host name, SSH host key and machine id.\n\n\
        Examples:\n  scalebox vm snapshot very-silly-penguin my-template\n  scalebox vm create my-template --wait"
    )]
    Snapshot {
        #[arg(value_name = "NAME", help = VM, value_parser = NonEmptyStringValueParser::new(),
              add = ArgValueCompleter::new(complete::vms))]
        vm: String,
        /// Name of the new template
        #[arg(value_name = "TEMPLATE")]
        template: TemplateName,
    },
    /// Delete VMs and their disks
    #[command(
        visible_alias = "rm",
        after_help = "Asks for confirmation on a terminal. If one VM cannot be deleted, the others still are.\n\n\
        Example:\n  scalebox vm delete --yes very-silly-penguin so-calm-otter"
    )]
    Delete {
        #[arg(value_name = "NAME", help = VM, required = true, value_parser = NonEmptyStringValueParser::new(),
              add = ArgValueCompleter::new(complete::vms))]
        vms: Vec<String>,
        /// Delete without asking for confirmation
        #[arg(long, short)]
        yes: bool,
    },
    /// Wait until a VM responds to SSH, or its agent if it has no init system
    #[command(after_help = "Example:\n  scalebox vm wait very-silly-penguin --timeout 60")]
    Wait {
        #[arg(value_name = "NAME", help = VM, value_parser = NonEmptyStringValueParser::new(),
              add = ArgValueCompleter::new(complete::vms))]
        vm: String,
        #[arg(long, value_name = "SECONDS", default_value_t = 120, help = TIMEOUT,
              value_parser = clap::value_parser!(u64).range(1..=86_400))]
        timeout: u64,
    },
    /// Log in to a VM over SSH, or run a command in it
    #[command(
        after_help = "Exits with the exit code of ssh: that of COMMAND, or 255. Host keys are stored separately from \
        yours, in ~/.local/state/scalebox/known_hosts: a new VM's key is accepted, a changed key is rejected.\n\n\
        Examples:\n  scalebox vm ssh very-silly-penguin\n  scalebox vm ssh very-silly-penguin -- df -h /"
    )]
    Ssh {
        #[arg(value_name = "NAME", help = VM, value_parser = NonEmptyStringValueParser::new(),
              add = ArgValueCompleter::new(complete::vms))]
        vm: String,
        /// Private key to log in with [default: the keys that ssh tries, and scalebox's own]
        #[arg(long, short, value_name = "FILE")]
        identity: Option<PathBuf>,
        /// Command to run instead of a login shell
        #[arg(value_name = "COMMAND", trailing_var_arg = true)]
        command: Vec<String>,
    },
}

const VM: &str = "Name or id of the VM";
const TIMEOUT: &str = "Maximum time to wait";

#[derive(Debug, clap::Args)]
#[command(
    after_help = "Prints the VM's name and how to log in. Without --name, the server generates a name of three words.\n\n\
    Examples:\n  scalebox vm create\n  scalebox vm create debian-base --name build-7 --disk 10 --vcpus 2 --memory 1024 --wait\n  \
    scalebox vm create --image nginx:1 --name web --env TZ=Europe/Berlin --restart always\n  \
    scalebox vm create --image python:3.12-slim -- python -m http.server 80"
)]
pub(crate) struct CreateArgs {
    /// Template to clone the disk from
    #[arg(value_name = "TEMPLATE", default_value = "debian-base",
          add = ArgValueCompleter::new(complete::templates))]
    pub template: TemplateName,
    /// Same as the argument TEMPLATE
    #[arg(long = "template", value_name = "TEMPLATE", conflicts_with = "template")]
    pub template_flag: Option<TemplateName>,
    /// Image of a registry instead of a template; the server pulls it if it is not a template yet
    #[arg(long, value_name = "IMAGE", conflicts_with_all = ["template", "template_flag"])]
    pub image: Option<ImageReference>,
    /// Name of the VM, also the guest's host name: lower-case letters, digits and dashes
    #[arg(long, value_name = "NAME")]
    pub name: Option<VmName>,
    /// Size of the disk in GiB [default: the server's default, or the template's size if larger]
    #[arg(long, value_name = "GIB", value_parser = whole_number)]
    pub disk: Option<u64>,
    /// Number of virtual processors [default: the server's default]
    #[arg(long, value_name = "COUNT", value_parser = processor_count)]
    pub vcpus: Option<u32>,
    /// Memory in MiB [default: the server's default]
    #[arg(long, value_name = "MIB", value_parser = whole_number)]
    pub memory: Option<u64>,
    #[command(flatten)]
    pub extend: ExtendArgs,
    /// Limit disk requests per second [default: no limit]
    #[arg(long, value_name = "IOPS", value_parser = whole_number)]
    pub disk_iops: Option<u64>,
    /// Limit disk throughput in megabytes per second, reads and writes together [default: no limit]
    #[arg(long, value_name = "MB", value_parser = whole_number)]
    pub disk_mbps: Option<u64>,
    /// Limit network throughput in megabits per second, in each direction [default: no limit]
    #[arg(long, value_name = "MBIT", value_parser = whole_number)]
    pub net_mbps: Option<u64>,
    /// Do not start the VM after a reboot of the host
    #[arg(long)]
    pub no_autostart: bool,
    /// SSH public key that may log in [default: the first of ~/.ssh/id_ed25519.pub, id_ecdsa.pub,
    /// id_rsa.pub, id_ed25519_sk.pub, id_ecdsa_sk.pub; without one, a key that scalebox creates in
    /// ~/.config/scalebox]
    #[arg(long, value_name = "FILE")]
    pub key: Option<PathBuf>,
    /// Create the VM without starting it
    #[arg(long)]
    pub no_start: bool,
    /// Create at most one VM per key: repeating the same request returns the same VM while it
    /// exists
    #[arg(long, value_name = "KEY")]
    pub idempotency_key: Option<IdempotencyKey>,
    /// Wait until the VM responds to SSH, or its agent if it has no init system
    #[arg(long, conflicts_with = "no_start")]
    pub wait: bool,
    #[arg(long, value_name = "SECONDS", default_value_t = 120, help = "Maximum time to wait with --wait",
          value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub timeout: u64,
    #[command(flatten)]
    pub commands: CommandArgs,
}

/// Options for the commands that run in a VM.
#[derive(Debug, clap::Args)]
pub(crate) struct CommandArgs {
    /// Set a variable for all commands in the VM; without a value, take it from the environment
    /// here
    #[arg(long, short, value_name = "NAME[=VALUE]", value_parser = variable)]
    pub env: Vec<(String, String)>,
    /// When to start the main process again: always, on_failure or never [default: on_failure]
    #[arg(long, value_name = "POLICY")]
    pub restart: Option<RestartPolicy>,
    /// Do not run a main process
    #[arg(long, conflicts_with_all = ["restart", "command"])]
    pub no_main: bool,
    /// Main process and its arguments [default: the entrypoint and command of the image]
    #[arg(value_name = "COMMAND", last = true)]
    pub command: Vec<String>,
}

impl CommandArgs {
    /// Returns the API's form of the main process; `None` for the template's own.
    pub(crate) fn main(&self) -> Option<CreateMain> {
        if self.no_main {
            return Some(CreateMain::none());
        }
        let argv = Some(self.command.clone()).filter(|argv| !argv.is_empty());
        (argv.is_some() || self.restart.is_some()).then(|| CreateMain {
            argv,
            restart: self.restart.unwrap_or_default(),
            ..CreateMain::default()
        })
    }
}

/// Options that make a disk extend automatically.
#[derive(Debug, clap::Args)]
pub(crate) struct ExtendArgs {
    /// Extend the disk automatically when the guest's root file system fills up, up to this size
    #[arg(long, value_name = "GIB", value_parser = whole_number)]
    pub extend_to: Option<u64>,
    /// GiB to add each time the disk extends
    #[arg(long, value_name = "GIB", requires = "extend_to", default_value_t = 5, value_parser = whole_number)]
    pub extend_by: u64,
    /// Extend the disk when this percentage of the file system is in use
    #[arg(long, value_name = "PERCENT", requires = "extend_to", default_value_t = 80, value_parser = whole_number)]
    pub extend_at: u64,
}

impl ExtendArgs {
    /// Returns the API's form of these options; `None` without `--extend-to`.
    pub(crate) fn policy(&self) -> Option<AutoExtend> {
        self.extend_to.map(|limit_gib| AutoExtend {
            threshold_percent: self.extend_at,
            increment_gib: self.extend_by,
            limit_gib,
        })
    }
}

/// Settings that `vm set` can change.
#[derive(Debug, clap::Args)]
#[group(required = true, multiple = true, args = ["extend_to", "no_extend", "disk_iops", "disk_mbps", "net_mbps", "autostart"])]
pub(crate) struct SetArgs {
    #[command(flatten)]
    pub extend: ExtendArgs,
    /// Stop extending the disk automatically
    #[arg(long, conflicts_with = "extend_to")]
    pub no_extend: bool,
    /// Limit disk requests per second
    #[arg(long, value_name = "IOPS|none")]
    pub disk_iops: Option<Limit>,
    /// Limit disk throughput in megabytes per second, reads and writes together
    #[arg(long, value_name = "MB|none")]
    pub disk_mbps: Option<Limit>,
    /// Limit network throughput in megabits per second, in each direction
    #[arg(long, value_name = "MBIT|none")]
    pub net_mbps: Option<Limit>,
    /// Start the VM after a reboot of the host if it was running
    #[arg(long, value_name = "on|off")]
    pub autostart: Option<Switch>,
}

/// A limit; `None` removes it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limit(pub Option<u64>);

impl FromStr for Limit {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "none" => Ok(Limit(None)),
            number => whole_number(number)
                .map(|number| Limit(Some(number)))
                .map_err(|why| format!("{why}, or none to remove the limit")),
        }
    }
}

/// A setting that is on or off.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Switch {
    On,
    Off,
}

#[derive(Debug, Subcommand)]
pub(crate) enum TemplateCommand {
    /// List all templates
    #[command(visible_alias = "ls", after_help = "Example:\n  scalebox template list")]
    List,
    /// Write a template to a file, compressed with zstd
    #[command(
        after_help = "The image is verified while it is written, and the file is renamed into place when it is complete.\n\n\
        Examples:\n  scalebox template export my-template\n  scalebox template export my-template - | ssh other-host scalebox template import my-template -"
    )]
    Export {
        /// Name of the template
        #[arg(value_name = "NAME", value_parser = NonEmptyStringValueParser::new(),
              add = ArgValueCompleter::new(complete::templates))]
        template: String,
        /// File to write, or - for standard output [default: NAME.ext4.zst]
        #[arg(value_name = "FILE")]
        file: Option<PathBuf>,
        /// Overwrite an existing file
        #[arg(long)]
        force: bool,
    },
    /// Create a template from an ext4 image, a disk image or an archive of a container image
    #[command(
        after_help = "The server recognises the image by its content: ext4, also compressed with zstd; a disk with GPT or \
        MBR; qcow2; an OCI archive; the output of docker save. It checks the image; the template appears when the import \
        is complete.\n\nExamples:\n  scalebox template import my-template my-template.ext4.zst\n  scalebox template import my-template rootfs.ext4 --replace"
    )]
    Import {
        /// Name of the new template
        #[arg(value_name = "NAME")]
        template: TemplateName,
        /// File to read, or - for standard input
        #[arg(value_name = "FILE")]
        file: PathBuf,
        /// Replace an existing template of this name; VMs created from it are not changed
        #[arg(long)]
        replace: bool,
    },
    /// Create a template from an image in a container registry
    Pull(PullArgs),
    /// Delete templates; VMs created from them are not changed
    #[command(
        visible_alias = "rm",
        after_help = "Asks for confirmation on a terminal.\n\nExample:\n  scalebox template delete my-template"
    )]
    Delete {
        /// Name of the template
        #[arg(value_name = "NAME", required = true, value_parser = NonEmptyStringValueParser::new(),
              add = ArgValueCompleter::new(complete::templates))]
        templates: Vec<String>,
        /// Delete without asking for confirmation
        #[arg(long, short)]
        yes: bool,
    },
}

#[derive(Debug, clap::Args)]
#[command(
    after_help = "The server pulls the image for linux/amd64, and continues if this command is interrupted. With \
    --username, the password or access token is read from standard input.\n\n\
    Examples:\n  scalebox template pull python:3.12-slim\n  \
    scalebox template pull ghcr.io/owner/tool:1 --name tool --username me < token-file"
)]
pub(crate) struct PullArgs {
    /// Image to pull: [REGISTRY/]NAME[:TAG][@sha256:DIGEST]
    #[arg(value_name = "IMAGE")]
    pub reference: ImageReference,
    /// Name of the new template [default: name and tag of the image, such as python-3.12-slim]
    #[arg(long, value_name = "NAME")]
    pub name: Option<TemplateName>,
    /// Replace an existing template of this name; VMs created from it are not changed
    #[arg(long)]
    pub replace: bool,
    /// User name at the registry
    #[arg(long, value_name = "USER", value_parser = NonEmptyStringValueParser::new())]
    pub username: Option<String>,
    /// Allow plain HTTP if HTTPS does not work; a registry on the server itself may always use it
    #[arg(long)]
    pub insecure: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum PoolCommand {
    /// Show the pool's used, free and committed space
    #[command(
        after_help = "Example, the bytes that can still be written:\n  scalebox pool show --json | jq .free_bytes"
    )]
    Show,
    /// Grow the pool while it is in use
    #[command(
        after_help = "Examples:\n  scalebox pool grow                # to 80 % of the space available to it on the host disk\n  \
        scalebox pool grow --size 200     # to exactly 200 GiB"
    )]
    Grow {
        /// New size of the pool in GiB
        #[arg(long, value_name = "GIB", value_parser = whole_number)]
        size: Option<u64>,
    },
    /// Shrink the pool while it is in use; moving data can take minutes
    #[command(after_help = "Example:\n  scalebox pool shrink --size 40")]
    Shrink {
        /// New size of the pool in GiB
        #[arg(long, value_name = "GIB", value_parser = whole_number)]
        size: u64,
    },
    /// Discard the pool's free blocks, which returns them to the host disk
    #[command(after_help = "Example:\n  scalebox pool trim")]
    Trim,
}
