//! `scalebox`, the command line. It sends requests to the daemon over HTTP and prints the
//! responses; all decisions are the daemon's.
//!
//! # Layout
//!
//! - `args`: every command, its arguments and its help text
//! - `guest_args`: arguments of the commands that work inside a VM
//! - `settings`: finds the server's address and token in flags, environment and files
//! - `source`: the source of a setting, for messages
//! - `vm`: `scalebox vm create|list|get|start|stop|restart|resize|set|trim|snapshot|delete|wait`
//! - `create`: creates a VM, and shows the pull of its image
//! - `run`: `scalebox run`
//! - `exec`: `scalebox exec` and `scalebox shell`
//! - `session`: connects this process to a command in a VM
//! - `terminal`: raw mode and window size; `signals`: handles signals
//! - `copy`: `scalebox cp`; `place`: its two sides; `archive`: directories as tar streams
//! - `logs`: `scalebox logs`
//! - `stats`: `scalebox stats`
//! - `login`: `scalebox login` and `scalebox logout`
//! - `running`: rejects commands that need a running VM
//! - `wait`: waits until a guest responds to SSH
//! - `ssh`: `scalebox vm ssh`, and finding a public key
//! - `own_key`: an SSH key for users who have none
//! - `complete`: completes names of VMs and templates
//! - `status`: `scalebox status`
//! - `template`: `scalebox template list|delete`
//! - `template_pull`: `scalebox template pull`
//! - `template_files`: `scalebox template export|import`
//! - `pool`: `scalebox pool …`
//! - `events`: `scalebox events`
//! - `output`: prints tables, JSON, messages and progress
//! - `numbers`: parses numbers in arguments
//! - `human`: formats sizes and ages
//! - `error`: errors, their messages and exit codes

mod archive;
mod args;
mod complete;
mod copy;
mod create;
mod error;
mod events;
mod exec;
mod guest_args;
mod human;
mod login;
mod logs;
mod numbers;
mod output;
mod own_key;
mod place;
mod pool;
mod run;
mod running;
mod session;
mod settings;
mod signals;
mod source;
mod ssh;
mod stats;
mod status;
mod template;
mod template_files;
mod template_pull;
mod terminal;
mod vm;
mod wait;

use args::{Args, Command, PoolCommand, TemplateCommand, VmCommand};
use clap::{CommandFactory, Parser};
use clap_complete::CompleteEnv;
use error::Error;
use output::Output;
use scalebox_client::Client;
use std::process::ExitCode;

fn main() -> ExitCode {
    // Prints completions and ends the process, if a shell requests them.
    CompleteEnv::with_factory(Args::command).complete();
    let args = Args::parse();
    let output = Output::new(args.connection.json);
    let runs_a_command = matches!(args.command, Command::Run(_) | Command::Exec(_) | Command::Shell(_));
    match run(args, &output) {
        Ok(code) => code,
        // The reader closed the pipe, as in `scalebox vm list | head -1`.
        Err(Error::Output(error)) if error.kind() == std::io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(error) => {
            output.error(&error);
            // Any other code could be that of the command.
            match runs_a_command {
                true => ExitCode::from(session::FAILED),
                false => error.exit_code(),
            }
        }
    }
}

fn run(args: Args, output: &Output) -> Result<ExitCode, Error> {
    let done = |result: Result<(), Error>| result.map(|()| ExitCode::SUCCESS);
    match &args.command {
        Command::Completions { shell } => return done(output.completions(*shell)),
        Command::Login { server } => return done(login::login(server.as_deref(), &args.connection, output)),
        Command::Logout => return done(login::logout(output)),
        _ => {}
    }
    let server = settings::connect(&args.connection, output)?;
    let client = &server.client;
    let result = match args.command {
        Command::Run(args) => run::run(client, &args, output),
        Command::Exec(args) => exec::exec(client, &args, output),
        Command::Shell(args) => exec::shell(client, &args, output),
        Command::Cp(args) => done(copy::copy(client, &args, output)),
        Command::Logs(args) => done(logs::logs(client, &args, output)),
        Command::Stats(args) => done(stats::stats(client, &args, output)),
        Command::Status => done(status::status(client, output)),
        Command::Vm(command) => done(vm_command(client, command, output)),
        Command::Template(command) => done(template_command(client, command, output)),
        Command::Pool(PoolCommand::Show) => done(pool::show(client, output)),
        Command::Pool(PoolCommand::Grow { size }) => done(pool::grow(client, size, output)),
        Command::Pool(PoolCommand::Shrink { size }) => done(pool::shrink(client, size, output)),
        Command::Pool(PoolCommand::Trim) => done(pool::trim(client, output)),
        Command::Events { since, no_follow } => done(events::events(client, since, !no_follow, output)),
        Command::Completions { .. } | Command::Login { .. } | Command::Logout => Ok(ExitCode::SUCCESS),
    };
    result.map_err(|error| error.with_token_source(client.url(), &server.token_source))
}

fn vm_command(client: &Client, command: VmCommand, output: &Output) -> Result<(), Error> {
    match command {
        VmCommand::Create(create) => vm::create(client, &create, output),
        VmCommand::List => vm::list(client, output),
        VmCommand::Get { vm } => vm::get(client, &vm, output),
        VmCommand::Start { vm } => vm::start(client, &vm, output),
        VmCommand::Stop { vm } => vm::stop(client, &vm, output),
        VmCommand::Restart { vm } => vm::restart(client, &vm, output),
        VmCommand::Resize { vm, disk } => vm::resize(client, &vm, disk, output),
        VmCommand::Set { vm, changes } => vm::set(client, &vm, &changes, output),
        VmCommand::Trim { vm } => vm::trim(client, &vm, output),
        VmCommand::Snapshot { vm, template } => vm::snapshot(client, &vm, template, output),
        VmCommand::Delete { vms, yes } => vm::delete(client, &vms, yes, output),
        VmCommand::Wait { vm, timeout } => vm::wait(client, &vm, timeout, output),
        VmCommand::Ssh { vm, identity, command } => ssh::connect(client, &vm, identity.as_deref(), &command),
    }
}

fn template_command(client: &Client, command: TemplateCommand, output: &Output) -> Result<(), Error> {
    match command {
        TemplateCommand::List => template::list(client, output),
        TemplateCommand::Export { template, file, force } => {
            template_files::export(client, &template, file.as_deref(), force, output)
        }
        TemplateCommand::Import {
            template,
            file,
            replace,
        } => template_files::import(client, template.as_str(), &file, replace, output),
        TemplateCommand::Pull(args) => template_pull::pull(client, &args, output),
        TemplateCommand::Delete { templates, yes } => template::delete(client, &templates, yes, output),
    }
}
