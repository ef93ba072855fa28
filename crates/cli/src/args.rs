//! Every command, its arguments and its help.

use clap::builder::NonEmptyStringValueParser;
use clap::{Parser, Subcommand};
use clap_complete::Shell;
use scalebox_client::{AutoExtend, IdempotencyKey, TemplateName, VmName};
use std::path::PathBuf;
use std::str::FromStr;

const SETTINGS: &str = "\
Where the server and its token come from, the first that has them:
  1. --url and --token (other users of this machine see the arguments of a process: better not the token)
  2. SCALEBOX_URL and SCALEBOX_TOKEN in the environment
  3. ~/.config/scalebox/config, lines such as SCALEBOX_TOKEN=...; chmod 600 it
  4. for root on a Scalebox host, the daemon's settings in /etc/scaleboxd/config

Exit codes: 0 done, 1 the server said no or cannot be reached, 2 the command was not understood.

Example, the first VM:
  scalebox vm create --disk 10 --name first --wait
  scalebox vm ssh first -- df -h /
  scalebox vm delete first";

/// Disposable VMs on a Scalebox host.
#[derive(Debug, Parser)]
#[command(name = "scalebox", version, after_help = SETTINGS, max_term_width = 100)]
pub struct Args {
    #[command(flatten)]
    pub connection: Connection,
    #[command(subcommand)]
    pub command: Command,
}

/// Whom to ask, and in which form to show the answer.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Server and output")]
pub struct Connection {
    /// Address of the server [default: http://127.0.0.1:8080]
    #[arg(long, global = true, value_name = "URL")]
    pub url: Option<String>,
    /// Its API token; seen by others in the list of processes, so rather set SCALEBOX_TOKEN
    #[arg(long, global = true, value_name = "TOKEN")]
    pub token: Option<String>,
    /// Print the server's answer as JSON
    #[arg(long, global = true)]
    pub json: bool,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// What the host is, what it has and what is in use
    #[command(after_help = "Example:\n  scalebox status")]
    Status,
    /// Make, list, reach and delete VMs
    #[command(subcommand)]
    Vm(VmCommand),
    /// List, export, import and delete the templates that disks are cloned from
    #[command(subcommand)]
    Template(TemplateCommand),
    /// The storage that disks are made from
    #[command(subcommand)]
    Pool(PoolCommand),
    /// Show what happens on the host, as it happens
    #[command(
        after_help = "One event a line, with --json as one JSON object a line. When the server is started anew, it goes on by itself; \
        an event `missed` says that some were lost meanwhile.\n\n\
        Examples:\n  scalebox events\n  scalebox events --no-follow    # what happened so far\n  \
        scalebox events --json | jq --unbuffered -r 'select(.kind == \"failed\").vm.name'"
    )]
    Events {
        /// Begin after this event, as far as the server still knows; 0 for all it knows [default:
        /// from now on]
        #[arg(long, value_name = "ID", value_parser = whole_number)]
        since: Option<u64>,
        /// End with what happened so far instead of waiting for more
        #[arg(long)]
        no_follow: bool,
    },
    /// Print a script that completes commands in your shell
    #[command(after_help = "Examples:\n  source <(scalebox completions bash)\n  \
        scalebox completions fish > ~/.config/fish/completions/scalebox.fish")]
    Completions {
        /// The shell
        shell: Shell,
    },
}

#[derive(Debug, Subcommand)]
pub enum VmCommand {
    /// Make a VM and start it
    Create(Box<CreateArgs>),
    /// List the VMs
    #[command(
        visible_alias = "ls",
        after_help = "Example, the names of those that run:\n  \
        scalebox vm list --json | jq -r '.vms[] | select(.status == \"running\").name'"
    )]
    List,
    /// Show one VM
    #[command(after_help = "Example:\n  scalebox vm get very-silly-penguin")]
    Get {
        #[arg(value_name = "NAME", help = VM, value_parser = NonEmptyStringValueParser::new())]
        vm: String,
    },
    /// Start a stopped VM
    #[command(after_help = "Example:\n  scalebox vm start very-silly-penguin && scalebox vm wait very-silly-penguin")]
    Start {
        #[arg(value_name = "NAME", help = VM, value_parser = NonEmptyStringValueParser::new())]
        vm: String,
    },
    /// Shut a VM down; its disk stays
    #[command(after_help = "Example:\n  scalebox vm stop very-silly-penguin")]
    Stop {
        #[arg(value_name = "NAME", help = VM, value_parser = NonEmptyStringValueParser::new())]
        vm: String,
    },
    /// Shut a VM down and start it again; one that does not run is started
    #[command(after_help = "Example:\n  scalebox vm restart very-silly-penguin")]
    Restart {
        #[arg(value_name = "NAME", help = VM, value_parser = NonEmptyStringValueParser::new())]
        vm: String,
    },
    /// Grow a VM's disk, live if it runs; disks do not shrink
    #[command(after_help = "Example:\n  scalebox vm resize very-silly-penguin --disk 20")]
    Resize {
        #[arg(value_name = "NAME", help = VM, value_parser = NonEmptyStringValueParser::new())]
        vm: String,
        /// New size of the disk
        #[arg(long, value_name = "GIB", value_parser = whole_number)]
        disk: u64,
    },
    /// Change how a VM is kept; what is not named stays as it is
    #[command(after_help = "Examples:\n  scalebox vm set very-silly-penguin --extend-to 50\n  \
        scalebox vm set very-silly-penguin --extend-to 50 --extend-by 10 --extend-at 90\n  \
        scalebox vm set very-silly-penguin --no-extend --disk-iops 500 --net-mbps none --autostart off")]
    Set {
        #[arg(value_name = "NAME", help = VM, value_parser = NonEmptyStringValueParser::new())]
        vm: String,
        #[command(flatten)]
        changes: SetArgs,
    },
    /// Have a guest give back the blocks of what it deleted
    #[command(
        after_help = "Guests do so by schedule too. It needs a guest agent in the guest.\n\n\
        Example:\n  scalebox vm trim very-silly-penguin"
    )]
    Trim {
        #[arg(value_name = "NAME", help = VM, value_parser = NonEmptyStringValueParser::new())]
        vm: String,
    },
    /// Make a template of a VM's disk, running or not
    #[command(
        after_help = "VMs made from it have the files of the VM, and a name, host key and machine id of their own.\n\n\
        Examples:\n  scalebox vm snapshot very-silly-penguin my-golden\n  scalebox vm create my-golden --wait"
    )]
    Snapshot {
        #[arg(value_name = "NAME", help = VM, value_parser = NonEmptyStringValueParser::new())]
        vm: String,
        /// Name of the template to be made
        #[arg(value_name = "TEMPLATE")]
        template: TemplateName,
    },
    /// Delete VMs and their disks
    #[command(
        visible_alias = "rm",
        after_help = "Asks first on a terminal; goes on with the others when one cannot be deleted.\n\n\
        Example:\n  scalebox vm delete --yes very-silly-penguin so-calm-otter"
    )]
    Delete {
        #[arg(value_name = "NAME", help = VM, required = true, value_parser = NonEmptyStringValueParser::new())]
        vms: Vec<String>,
        /// Do not ask
        #[arg(long, short)]
        yes: bool,
    },
    /// Wait until a VM answers SSH
    #[command(after_help = "Example:\n  scalebox vm wait very-silly-penguin --timeout 60")]
    Wait {
        #[arg(value_name = "NAME", help = VM, value_parser = NonEmptyStringValueParser::new())]
        vm: String,
        #[arg(long, value_name = "SECONDS", default_value_t = 120, help = TIMEOUT,
              value_parser = clap::value_parser!(u64).range(1..=86_400))]
        timeout: u64,
    },
    /// Log in to a VM, or run a command in it
    #[command(
        after_help = "Ends with the exit code of ssh, which is that of COMMAND, or 255. Host keys are kept apart from \
        yours, in ~/.local/state/scalebox/known_hosts: a new VM's is taken as it is, a changed one is refused.\n\n\
        Examples:\n  scalebox vm ssh very-silly-penguin\n  scalebox vm ssh very-silly-penguin -- df -h /"
    )]
    Ssh {
        #[arg(value_name = "NAME", help = VM, value_parser = NonEmptyStringValueParser::new())]
        vm: String,
        /// Private key to log in with [default: what ssh tries by itself]
        #[arg(long, short, value_name = "FILE")]
        identity: Option<PathBuf>,
        /// What to run instead of a shell
        #[arg(value_name = "COMMAND", trailing_var_arg = true)]
        command: Vec<String>,
    },
}

const VM: &str = "Name or id of the VM";
const TIMEOUT: &str = "Give up after this long";

#[derive(Debug, clap::Args)]
#[command(
    after_help = "Prints the name and how to log in. The name is made up of three words unless given.\n\n\
    Examples:\n  scalebox vm create\n  scalebox vm create debian-base --name build-7 --disk 10 --vcpus 2 --memory 1024 --wait"
)]
pub struct CreateArgs {
    /// Template to clone the disk from
    #[arg(value_name = "TEMPLATE", default_value = "debian-base")]
    pub template: TemplateName,
    /// The same as TEMPLATE
    #[arg(long = "template", value_name = "TEMPLATE", conflicts_with = "template")]
    pub template_flag: Option<TemplateName>,
    /// Name of the VM and of its guest: lower-case letters, digits and dashes
    #[arg(long, value_name = "NAME")]
    pub name: Option<VmName>,
    /// Size of the disk in GiB [default: the server's, or the template's if that is larger]
    #[arg(long, value_name = "GIB", value_parser = whole_number)]
    pub disk: Option<u64>,
    /// Number of processors [default: the server's]
    #[arg(long, value_name = "COUNT", value_parser = processor_count)]
    pub vcpus: Option<u32>,
    /// Memory in MiB [default: the server's]
    #[arg(long, value_name = "MIB", value_parser = whole_number)]
    pub memory: Option<u64>,
    #[command(flatten)]
    pub extend: ExtendArgs,
    /// Requests a second that it may make of its disk [default: no limit]
    #[arg(long, value_name = "IOPS", value_parser = whole_number)]
    pub disk_iops: Option<u64>,
    /// Megabytes a second that it may read and write [default: no limit]
    #[arg(long, value_name = "MB", value_parser = whole_number)]
    pub disk_mbps: Option<u64>,
    /// Megabits a second that it may send, and receive [default: no limit]
    #[arg(long, value_name = "MBIT", value_parser = whole_number)]
    pub net_mbps: Option<u64>,
    /// Do not start it again after a reboot of the host
    #[arg(long)]
    pub no_autostart: bool,
    /// SSH public key that may log in [default: the first of ~/.ssh/id_ed25519.pub, id_ecdsa.pub,
    /// id_rsa.pub, id_ed25519_sk.pub, id_ecdsa_sk.pub]
    #[arg(long, value_name = "FILE")]
    pub key: Option<PathBuf>,
    /// Make the VM and leave it stopped
    #[arg(long)]
    pub no_start: bool,
    /// Make one VM however often this is run: while it exists, the same request with the same key
    /// gives it again
    #[arg(long, value_name = "KEY")]
    pub idempotency_key: Option<IdempotencyKey>,
    /// Wait until it answers SSH
    #[arg(long, conflicts_with = "no_start")]
    pub wait: bool,
    #[arg(long, value_name = "SECONDS", default_value_t = 120, help = "Give up --wait after this long",
          value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub timeout: u64,
}

/// How a disk extends itself.
#[derive(Debug, clap::Args)]
pub struct ExtendArgs {
    /// Let the disk extend itself when the guest's root file system fills up, until it is this
    /// large
    #[arg(long, value_name = "GIB", value_parser = whole_number)]
    pub extend_to: Option<u64>,
    /// By how much at a time
    #[arg(long, value_name = "GIB", requires = "extend_to", default_value_t = 5, value_parser = whole_number)]
    pub extend_by: u64,
    /// When so much of it is in use
    #[arg(long, value_name = "PERCENT", requires = "extend_to", default_value_t = 80, value_parser = whole_number)]
    pub extend_at: u64,
}

impl ExtendArgs {
    /// In the API's words.
    pub fn policy(&self) -> Option<AutoExtend> {
        self.extend_to.map(|limit_gib| AutoExtend {
            threshold_percent: self.extend_at,
            increment_gib: self.extend_by,
            limit_gib,
        })
    }
}

/// What `vm set` may change.
#[derive(Debug, clap::Args)]
#[group(required = true, multiple = true, args = ["extend_to", "no_extend", "disk_iops", "disk_mbps", "net_mbps", "autostart"])]
pub struct SetArgs {
    #[command(flatten)]
    pub extend: ExtendArgs,
    /// Leave the disk as large as it is
    #[arg(long, conflicts_with = "extend_to")]
    pub no_extend: bool,
    /// Requests a second that it may make of its disk
    #[arg(long, value_name = "IOPS|none")]
    pub disk_iops: Option<Limit>,
    /// Megabytes a second that it may read and write
    #[arg(long, value_name = "MB|none")]
    pub disk_mbps: Option<Limit>,
    /// Megabits a second that it may send, and receive
    #[arg(long, value_name = "MBIT|none")]
    pub net_mbps: Option<Limit>,
    /// Whether it is started again after a reboot of the host
    #[arg(long, value_name = "on|off")]
    pub autostart: Option<Switch>,
}

/// Digits alone: a unit behind them, a sign or a fraction would be read in another way than it was
/// meant.
fn whole_number(text: &str) -> Result<u64, String> {
    let wrong = || "write a whole number in digits alone, such as 10".to_owned();
    if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(wrong());
    }
    text.parse().map_err(|_| "the number is too large".to_owned())
}

fn processor_count(text: &str) -> Result<u32, String> {
    whole_number(text)?
        .try_into()
        .map_err(|_| "the number is too large".to_owned())
}

/// A number, or no limit.
#[derive(Debug, Clone, Copy)]
pub struct Limit(pub Option<u64>);

impl FromStr for Limit {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "none" => Ok(Limit(None)),
            number => whole_number(number)
                .map(|number| Limit(Some(number)))
                .map_err(|why| format!("{why}; or none, for no limit")),
        }
    }
}

/// On or off.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Switch {
    On,
    Off,
}

#[derive(Debug, Subcommand)]
pub enum TemplateCommand {
    /// List the templates
    #[command(visible_alias = "ls", after_help = "Example:\n  scalebox template list")]
    List,
    /// Write a template to a file, packed with zstd
    #[command(
        after_help = "What comes is checked while it is written, and the file gets its name when it is whole.\n\n\
        Examples:\n  scalebox template export my-golden\n  scalebox template export my-golden - | ssh other-host scalebox template import my-golden -"
    )]
    Export {
        /// Name of the template
        #[arg(value_name = "NAME", value_parser = NonEmptyStringValueParser::new())]
        template: String,
        /// File to write, or - for the standard output [default: NAME.ext4.zst]
        #[arg(value_name = "FILE")]
        file: Option<PathBuf>,
        /// Write over a file that is there
        #[arg(long)]
        force: bool,
    },
    /// Make a template of a file: an ext4 image, bare or packed with zstd
    #[command(
        after_help = "The image is checked on the server, and appears under its name when it is whole.\n\n\
        Examples:\n  scalebox template import my-golden my-golden.ext4.zst\n  scalebox template import my-golden rootfs.ext4 --replace"
    )]
    Import {
        /// Name of the template to be made
        #[arg(value_name = "NAME")]
        template: TemplateName,
        /// File to read, or - for the standard input
        #[arg(value_name = "FILE")]
        file: PathBuf,
        /// Replace a template of that name; VMs made from it stay as they are
        #[arg(long)]
        replace: bool,
    },
    /// Delete templates; the VMs made from them stay
    #[command(
        visible_alias = "rm",
        after_help = "Asks first on a terminal.\n\nExample:\n  scalebox template delete my-golden"
    )]
    Delete {
        /// Name of the template
        #[arg(value_name = "NAME", required = true, value_parser = NonEmptyStringValueParser::new())]
        templates: Vec<String>,
        /// Do not ask
        #[arg(long, short)]
        yes: bool,
    },
}

#[derive(Debug, Subcommand)]
pub enum PoolCommand {
    /// Show what the pool holds, can still take, and has promised
    #[command(
        after_help = "Example, the bytes that can still be written:\n  scalebox pool show --json | jq .free_bytes"
    )]
    Show,
    /// Grow the pool while it is in use
    #[command(
        after_help = "Examples:\n  scalebox pool grow                # 80 % of what the host disk can hold today\n  \
        scalebox pool grow --size 200     # exactly 200 GiB"
    )]
    Grow {
        /// New size of the pool
        #[arg(long, value_name = "GIB", value_parser = whole_number)]
        size: Option<u64>,
    },
    /// Shrink the pool while it is in use; what is in the way is moved, which can take minutes
    #[command(after_help = "Example:\n  scalebox pool shrink --size 40")]
    Shrink {
        /// New size of the pool
        #[arg(long, value_name = "GIB", value_parser = whole_number)]
        size: u64,
    },
    /// Give the pool's free blocks back to the host disk
    #[command(after_help = "Example:\n  scalebox pool trim")]
    Trim,
}
