//! `scaleboxd`: the Scalebox daemon, and the commands to set up and maintain a host.
//!
//! # Layout
//!
//! A folder uses folders above it in this table only (`crates/testkit/tests/floor_plan`).
//!
//! | folder | content |
//! |---|---|
//! | `settings` | the environment, the configuration file, defaults |
//! | `state` | the state file: VMs and facts that survive a restart |
//! | `host` | the parts of a running daemon: pool, network, hypervisors, VMs in memory, events |
//! | `pool` | the pool's figures and size, admission, freeing of disks |
//! | `templates` | the list of templates, their deletion, and pulls from registries |
//! | `vm` | operations on one VM, and recovery at start |
//! | `watch` | background loops: space, disk extension, trim, network, usage |
//! | `http` | the server, routes, events, metrics, the OpenAPI document |
//! | `commands` | the subcommands, `doctor` and the log |

mod commands;
mod host;
mod http;
mod pool;
mod settings;
#[cfg(test)]
mod simulated;
mod state;
mod templates;
mod vm;
mod watch;

use clap::{Parser, Subcommand};
use commands::failed::CommandFailed;
use commands::pool::init as pool_init;
use commands::{client_config, doctor, down, log, serve, show_settings, template};
use rustix::fs::Mode;
use rustix::process::{Signal, umask};
use settings::Settings;
use std::path::PathBuf;
use std::process::ExitCode;

/// Turns a Linux server into a host for disposable virtual machines
#[derive(Debug, Parser)]
#[command(
    version,
    max_term_width = 100,
    after_help = "Settings are read from the environment, then from the --config file, then from defaults.\n\n\
        Example, on a new host:\n  \
        scaleboxd pool init\n  \
        scaleboxd template build debian-base\n  \
        API_TOKEN=$(openssl rand -hex 32) scaleboxd serve"
)]
struct Arguments {
    /// The settings file, with KEY=VALUE lines [default: /etc/scaleboxd/config, if it exists]
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve the API until SIGTERM; machines keep running without the daemon
    #[command(after_help = "Example:\n  API_TOKEN=$(openssl rand -hex 32) API_PORT=8080 scaleboxd serve")]
    Serve,
    /// Manage the pool that holds all disks
    #[command(subcommand)]
    Pool(PoolCommand),
    /// Manage the templates that VMs are cloned from
    #[command(subcommand)]
    Template(TemplateCommand),
    /// Stop all machines, remove the network and unmount the pool; VMs and their disks are kept
    ///
    /// For maintenance, and before removing Scalebox from a host. The daemon must not be running. A
    /// reboot, or `pool init` and `serve`, restore everything: VMs that were running are started
    /// again, except those with autostart off.
    #[command(after_help = "Example:\n  systemctl stop scaleboxd && scaleboxd down")]
    Down,
    /// Print all settings: the value in effect, its source, the default and the meaning
    ///
    /// The token is not shown.
    #[command(after_help = "Examples:\n  scaleboxd settings\n  \
        scaleboxd settings --json | jq '.[] | select(.source != \"default\")'")]
    Settings {
        /// Print an array of {key, value, source, default, meaning}, for programs
        #[arg(long)]
        json: bool,
        /// Print only the names of all settings, without reading any
        #[arg(long, conflicts_with = "json")]
        keys: bool,
    },
    /// Print the settings that let `scalebox` reach this daemon, for ~/.config/scalebox/config
    ///
    /// The output contains the token.
    #[command(after_help = "Example, as that user:\n  \
        (umask 077; mkdir -p ~/.config/scalebox; sudo scaleboxd client-config >~/.config/scalebox/config)")]
    ClientConfig,
    /// Report problems on this host with a fix for each; changes nothing
    ///
    /// Exits with 1 if there is a problem. Works before anything is set up, and while the daemon
    /// runs.
    #[command(
        after_help = "Examples:\n  scaleboxd doctor\n  scaleboxd doctor --json | jq '.[] | select(.level == \"problem\")'"
    )]
    Doctor {
        /// Print an array of {check, level, finding, fix}, for programs
        #[arg(long)]
        json: bool,
    },
}

#[derive(Debug, Subcommand)]
enum PoolCommand {
    /// Size, create, mount and register the pool; changes nothing if the pool exists
    #[command(
        after_help = "Examples:\n  scaleboxd pool init                      # 80 % of the free space of the host disk\n  \
        STORAGE_SIZE=100G scaleboxd pool init    # exactly 100 GiB"
    )]
    Init,
}

#[derive(Debug, Subcommand)]
enum TemplateCommand {
    /// Build a Debian template, and the kernel that guests of it and of later imports boot
    #[command(
        after_help = "Examples:\n  scaleboxd template build debian-base\n  scaleboxd template build debian-dev    # \
        git, python3, a compiler, tmux, docker\n  scaleboxd template build my-tools --packages git,python3"
    )]
    Build {
        /// The name of the template; `debian-dev` has tools for development and Docker
        name: String,
        /// Debian packages to add, separated by commas
        #[arg(long, value_name = "LIST", value_delimiter = ',')]
        packages: Vec<String>,
        /// Build the template again if it exists
        #[arg(long)]
        replace: bool,
        /// Keep finished parts in this folder, and reuse existing ones
        #[arg(long, value_name = "DIR")]
        cache: Option<PathBuf>,
    },
    /// Create a template from an ext4 image, which is checked and copied
    #[command(after_help = "Example:\n  scaleboxd template import node-20 node-20.ext4")]
    Import {
        /// The name of the new template
        name: String,
        /// The image
        file: PathBuf,
        /// Replace an existing template of this name; disks cloned from it are kept
        #[arg(long)]
        replace: bool,
    },
}

/// `EX_CONFIG` of sysexits.h(3head): `serve` cannot start until a setting is changed. The systemd
/// unit does not restart the daemon then.
const WRONG_CONFIGURATION: u8 = 78;

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    // New files are accessible only to root, unless their mode is set explicitly.
    umask(Mode::RWXG | Mode::RWXO);
    if let Err(error) = survive_file_size_limit() {
        eprintln!("error: cannot handle signals: {error}");
        return ExitCode::FAILURE;
    }
    let serves = matches!(arguments.command, Command::Serve);
    match run(arguments) {
        Ok(code) => code,
        Err(error) => {
            log::report(&error);
            match serves && error.is_configuration() {
                true => ExitCode::from(WRONG_CONFIGURATION),
                false => ExitCode::FAILURE,
            }
        }
    }
}

/// Makes a write beyond `RLIMIT_FSIZE` fail with `EFBIG` instead of killing the process.
///
/// The signal is handled rather than ignored, because child processes inherit an ignored signal but
/// not a handler.
fn survive_file_size_limit() -> std::io::Result<()> {
    let received = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    signal_hook::flag::register(Signal::XFSZ.as_raw(), received).map(drop)
}

fn run(arguments: Arguments) -> Result<ExitCode, CommandFailed> {
    let config = arguments.config.as_deref();
    let load = || {
        let settings = Settings::load(config)?;
        log::start(&settings)?;
        Ok::<_, CommandFailed>(settings)
    };
    match arguments.command {
        Command::Serve => serve::serve(load()?),
        Command::Pool(PoolCommand::Init) => pool_init(&load()?),
        Command::Template(TemplateCommand::Build {
            name,
            packages,
            replace,
            cache,
        }) => {
            let recipe = scalebox_images::Recipe::of_template(&name, &packages);
            template::build(&load()?, &name, &recipe, replace, cache.as_deref())
        }
        Command::Template(TemplateCommand::Import { name, file, replace }) => {
            template::import(&load()?, &name, &file, replace)
        }
        Command::Down => down::down(load()?),
        Command::Settings { keys: true, .. } => show_settings::print_keys(),
        Command::Settings { json, .. } => show_settings::print(config, json),
        Command::ClientConfig => client_config::client_config(&load()?),
        // Reports unusable settings as a finding.
        Command::Doctor { json } => return doctor::run(config, json),
    }
    .map(|()| ExitCode::SUCCESS)
}
