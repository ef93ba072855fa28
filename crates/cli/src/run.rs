//! The command `scalebox run`: a VM for one command.

use crate::copy::Target;
use crate::create::create;
use crate::error::Error;
use crate::exec;
use crate::guest_args::{RunArgs, Streams};
use crate::output::Output;
use crate::session::{Link, exit_code};
use crate::signals::on_signal;
use crate::ssh;
use rustix::process::Signal;
use scalebox_api::{
    AttachMessage, CreateMain, CreateVm, CreateVmQuery, ErrorCode, ImageReference, Template, Vm, VmName, VmSource,
    WaitFor,
};
use scalebox_client::{Client, ClientError};
use std::io::{self, IsTerminal};
use std::process::ExitCode;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

pub(crate) fn run(client: &Client, args: &RunArgs, output: &Output) -> Result<ExitCode, Error> {
    let source = source_of(client, &args.image)?;
    let name = match &args.name {
        Some(name) => free_name(client, name)?,
        None => generated_name()?,
    };
    let vm = Disposable {
        client: client.clone(),
        name: name.as_str().to_owned(),
        phase: Arc::default(),
    };
    vm.handle_signals()?;
    let result = vm
        .create(&create_request(source, name, args, output)?, args.wait, output)
        .and_then(|created| vm.use_it(&created, args, output));
    vm.end(args.keep, output);
    result
}

/// Returns what `image` names: an image of a registry, or an existing template.
fn source_of(client: &Client, image: &ImageReference) -> Result<VmSource, Error> {
    // A name without a tag is more likely a misspelled template than an image of a registry.
    if image.as_str().contains(['/', ':', '@']) {
        return Ok(VmSource::Image(image.clone()));
    }
    let templates = client.templates()?;
    let found = templates.iter().find(|template| template.name == image.as_str());
    match found.and_then(|template| template.name.parse().ok()) {
        Some(name) => Ok(VmSource::Template(name)),
        None => Err(Error::NoImage {
            image: image.to_string(),
            known: templates.into_iter().map(|template| template.name).collect(),
        }),
    }
}

/// Returns the command of the image that a template was made of; empty if there is none.
fn command_of(template: Template) -> Vec<String> {
    let config = template.config.unwrap_or_default();
    [config.entrypoint, config.cmd].concat()
}

/// Checks that a name is free. The VM with this name is deleted at the end, so it must be the one
/// that this command creates.
fn free_name(client: &Client, name: &VmName) -> Result<VmName, Error> {
    match client.vm(name.as_str()) {
        Err(error) if error.status() == Some(404) => Ok(name.clone()),
        Err(error) => Err(error.into()),
        Ok(_) => Err(Error::NameInUse(name.as_str().to_owned())),
    }
}

fn generated_name() -> Result<VmName, Error> {
    let mut random = [0; 4];
    let filled = rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty());
    filled.map_err(|error| Error::Terminal(error.into()))?;
    let name = format!("run-{:08x}", u32::from_ne_bytes(random));
    name.parse().map_err(|_| Error::InvalidVmId(name))
}

fn create_request(source: VmSource, name: VmName, args: &RunArgs, output: &Output) -> Result<CreateVm, Error> {
    // Only a VM that is kept needs a key for SSH.
    let ssh_public_key = match args.keep {
        true => ssh::public_key_or_own(None, output)?,
        false => None,
    };
    Ok(CreateVm {
        name: Some(name),
        disk_size_gib: args.disk,
        mem_size_mib: args.memory,
        vcpu_count: args.cpus,
        autostart: args.keep,
        // The command of this call takes its place.
        main: Some(CreateMain::none()),
        ..CreateVm::from_source(source, ssh_public_key)
    })
}

/// A VM that is deleted at the end.
struct Disposable {
    client: Client,
    name: String,
    phase: Arc<Mutex<Phase>>,
}

/// The present use of the VM, which decides the effect of a signal.
#[derive(Default)]
enum Phase {
    /// The VM does not exist.
    #[default]
    Absent,
    /// The VM is being created, or files are being copied to it.
    Preparing,
    /// The command runs.
    Running(Arc<Link>),
    /// The VM is being deleted.
    Ending,
}

impl Disposable {
    /// Handles signals. While the VM is prepared, a signal deletes the VM and ends this process.
    /// While the command runs, the command receives the signal; if the terminal is closed, the VM
    /// is deleted as well.
    fn handle_signals(&self) -> Result<(), Error> {
        for (signal, sent) in [
            (Signal::HUP, scalebox_api::Signal::HUP),
            (Signal::INT, scalebox_api::Signal::INT),
            (Signal::TERM, scalebox_api::Signal::TERM),
        ] {
            let (client, name, phase) = (self.client.clone(), self.name.clone(), self.phase.clone());
            let act = move || {
                let running = match &*lock(&phase) {
                    Phase::Running(link) => Some(link.clone()),
                    Phase::Ending => return,
                    Phase::Absent => std::process::exit(128 + signal.as_raw()),
                    Phase::Preparing => None,
                };
                if let Some(link) = running
                    && link.send(AttachMessage::Signal(sent))
                    && signal != Signal::HUP
                {
                    return;
                }
                // A failure is ignored: `vm list` shows a VM that is left.
                let _deleted = client.delete_vm(&name);
                std::process::exit(128 + signal.as_raw());
            };
            on_signal(signal, act).map_err(Error::Terminal)?;
        }
        Ok(())
    }

    fn enter(&self, phase: Phase) {
        *lock(&self.phase) = phase;
    }

    fn create(&self, request: &CreateVm, wait_seconds: u64, output: &Output) -> Result<Vm, Error> {
        let text = format!("creating the VM {} and waiting until it has booted", self.name);
        let query = CreateVmQuery {
            wait: Some(WaitFor::Agent),
            wait_seconds: Some(wait_seconds),
        };
        self.enter(Phase::Preparing);
        let created = create(&self.client, request, query, &text, output);
        if let Err(Error::Client(ClientError::Refused { body, .. })) = &created
            && body.code != ErrorCode::Timeout
        {
            self.enter(Phase::Absent);
        }
        created
    }

    /// Copies files to the VM and runs the command; without one, that of its image, or a shell.
    fn use_it(&self, created: &Vm, args: &RunArgs, output: &Output) -> Result<ExitCode, Error> {
        let command = match args.command.is_empty() {
            true => command_of(self.client.template(&created.template)?),
            false => args.command.clone(),
        };
        for volume in &args.volume {
            let target = Target {
                client: &self.client,
                vm: &self.name,
                path: &volume.remote,
                user: args.surroundings.user.as_ref(),
            };
            target.upload_as(&volume.local, output)?;
        }
        let is_terminal = io::stdin().is_terminal();
        let shell = command.is_empty();
        let mut request = match shell {
            true => exec::login_shell(&args.surroundings),
            false => exec::request(command, &args.surroundings),
        };
        request.timeout_seconds = args.timeout;
        let streams = Streams {
            tty: args.streams.tty || (shell && is_terminal),
            ..args.streams
        };
        let session = exec::start(&self.client, &self.name, request, streams)?;
        self.enter(Phase::Running(session.link()));
        Ok(exit_code(&session.run(output)?))
    }

    /// Deletes the VM, if it exists and is not kept.
    fn end(&self, keep: bool, output: &Output) {
        let before = std::mem::replace(&mut *lock(&self.phase), Phase::Ending);
        if matches!(before, Phase::Absent) {
            return;
        }
        let name = &self.name;
        if keep {
            output.hint(&format!(
                "kept the VM {name}; log in with: scalebox shell {name}\n             delete it with: scalebox vm delete {name}"
            ));
            return;
        }
        let deleting = output.progress(&format!("deleting {name}"));
        let deleted = self.client.delete_vm(name);
        deleting.finish_and_clear();
        match deleted {
            Err(error) if error.status() != Some(404) => {
                output.warning(&format!(
                    "the VM {name} could not be deleted: {error}; delete it with: scalebox vm delete {name}"
                ));
            }
            _ => {}
        }
    }
}

fn lock(phase: &Mutex<Phase>) -> MutexGuard<'_, Phase> {
    phase.lock().unwrap_or_else(PoisonError::into_inner)
}
