//! The commands `scalebox vm …`, except `ssh`.

use crate::args::{CreateArgs, Limit, SetArgs, Switch};
use crate::error::Error;
use crate::human;
use crate::output::{Output, STATUS, Table, number, text};
use crate::{create, ssh, wait};
use jiff::Timestamp;
use scalebox_api::{
    CreateVm, CreateVmQuery, RestartPolicy, SnapshotVm, TemplateName, UpdateVm, Vm, VmList, VmSource, VmStatus,
};
use scalebox_client::{Client, ClientError};
use std::time::Duration;

pub(crate) fn create(client: &Client, args: &CreateArgs, output: &Output) -> Result<(), Error> {
    let request = create_request(args, output)?;
    let query = CreateVmQuery::default();
    let mut vm = create::create(client, &request, query, "creating the VM", output)?;
    let mut waited = None;
    if args.wait {
        let (booted, took) = wait::until_ssh(client, vm, Duration::from_secs(args.timeout), output)?;
        (vm, waited) = (booted, Some(took));
    }
    if output.json {
        return output.json(&vm);
    }
    output.line(&summary(&vm))?;
    if let Some(took) = waited {
        output.line(&ssh_ready(&vm, took))?;
    }
    output.line(&next_step(&vm))
}

fn create_request(args: &CreateArgs, output: &Output) -> Result<CreateVm, Error> {
    let template = args.template_flag.as_ref().unwrap_or(&args.template);
    let source = match &args.image {
        Some(image) => VmSource::Image(image.clone()),
        None => VmSource::Template(template.clone()),
    };
    Ok(CreateVm {
        name: args.name.clone(),
        vcpu_count: args.vcpus,
        mem_size_mib: args.memory,
        disk_size_gib: args.disk,
        disk_auto_extend: args.extend.policy(),
        disk_iops: args.disk_iops,
        disk_mbps: args.disk_mbps,
        net_mbps: args.net_mbps,
        autostart: !args.no_autostart,
        env: args.commands.env.iter().cloned().collect(),
        main: args.commands.main(),
        start: !args.no_start,
        idempotency_key: args.idempotency_key.clone(),
        ..CreateVm::from_source(source, ssh::public_key_or_own(args.key.as_deref(), output)?)
    })
}

pub(crate) fn list(client: &Client, output: &Output) -> Result<(), Error> {
    let vms = client.vms()?;
    if output.json {
        return output.json(&VmList { vms });
    }
    if vms.is_empty() {
        output.hint("no VMs; create one with: scalebox vm create");
        return Ok(());
    }
    let columns = vec![
        text("NAME", 0),
        text(STATUS, 1),
        number("DISK", 2),
        number("USED", 6),
        number("EXCLUSIVE", 7),
        number("CPUS", 6),
        number("MEMORY", 5),
        text("SSH", 3),
        text("TEMPLATE", 7),
        number("AGE", 4),
        text("ID", 8),
    ];
    let now = Timestamp::now();
    output.table(Table::new(columns, vms.iter().map(|vm| row(vm, now)).collect()))
}

fn row(vm: &Vm, now: Timestamp) -> Vec<String> {
    vec![
        vm.name.clone(),
        vm.status.to_string(),
        format!("{} GiB", vm.disk_size_gib),
        human::measured(vm.storage.as_ref().map(|storage| storage.used_bytes)),
        human::measured(vm.storage.as_ref().map(|storage| storage.exclusive_bytes)),
        vm.vcpu_count.to_string(),
        human::mib(vm.mem_size_mib),
        format!("{}:{}", vm.ip, vm.ssh_port),
        vm.template.clone(),
        human::age(&vm.created_at, now),
        vm.id.clone(),
    ]
}

pub(crate) fn get(client: &Client, vm: &str, output: &Output) -> Result<(), Error> {
    let vm = client.vm(vm)?;
    if output.json {
        return output.json(&vm);
    }
    let status = match &vm.status_reason {
        Some(reason) => format!("{}: {reason}", vm.status),
        None => vm.status.to_string(),
    };
    let disk = match &vm.storage {
        Some(storage) => format!(
            "{} GiB, of which {} are used; deleting it frees {}",
            vm.disk_size_gib,
            human::bytes(storage.used_bytes),
            human::bytes(storage.exclusive_bytes)
        ),
        None => format!("{} GiB", vm.disk_size_gib),
    };
    let settings = settings(&vm);
    let mut properties = vec![
        ("name", vm.name),
        ("id", vm.id),
        ("status", status),
        ("ssh", vm.ssh),
        ("template", vm.template),
        ("disk", disk),
        ("cpus", vm.vcpu_count.to_string()),
        ("memory", human::mib(vm.mem_size_mib)),
        (
            "created",
            format!(
                "{} ({} ago)",
                vm.created_at,
                human::age(&vm.created_at, Timestamp::now())
            ),
        ),
    ];
    properties.extend(settings);
    if let Some(main) = vm.main {
        let restart = match main.restart {
            RestartPolicy::Always => "always restarted",
            RestartPolicy::OnFailure => "restarted on failure",
            RestartPolicy::Never => "never restarted",
        };
        properties.push(("main", format!("{} ({restart})", main.argv.join(" "))));
    }
    properties.extend(vm.url.map(|url| ("url", url)));
    output.properties(&properties)
}

pub(crate) fn start(client: &Client, vm: &str, output: &Output) -> Result<(), Error> {
    let starting = output.progress(&format!("starting {vm}"));
    let vm = client.start_vm(vm)?;
    drop(starting);
    show_status(&vm, output)
}

pub(crate) fn stop(client: &Client, vm: &str, output: &Output) -> Result<(), Error> {
    let stopping = output.progress(&format!("shutting {vm} down"));
    let vm = client.stop_vm(vm)?;
    drop(stopping);
    show_status(&vm, output)
}

pub(crate) fn restart(client: &Client, vm: &str, output: &Output) -> Result<(), Error> {
    let restarting = output.progress(&format!("restarting {vm}"));
    let vm = client.restart_vm(vm)?;
    drop(restarting);
    show_status(&vm, output)
}

pub(crate) fn resize(client: &Client, vm: &str, disk_size_gib: u64, output: &Output) -> Result<(), Error> {
    let growing = output.progress(&format!("growing the disk of {vm}"));
    let vm = client.update_vm(vm, &UpdateVm::grow(disk_size_gib))?;
    drop(growing);
    if output.json {
        return output.json(&vm);
    }
    output.line(&format!("the disk of {} has {} GiB", vm.name, vm.disk_size_gib))?;
    match vm.disk.and_then(|disk| disk.note) {
        Some(note) => output.line(&note),
        None => Ok(()),
    }
}

pub(crate) fn set(client: &Client, vm: &str, changes: &SetArgs, output: &Output) -> Result<(), Error> {
    let extend = changes.extend.policy();
    let limit = |limit: Option<Limit>| limit.map(|Limit(number)| number);
    let change = UpdateVm {
        disk_size_gib: None,
        disk_auto_extend: (changes.no_extend || extend.is_some()).then_some(extend),
        disk_iops: limit(changes.disk_iops),
        disk_mbps: limit(changes.disk_mbps),
        net_mbps: limit(changes.net_mbps),
        autostart: changes.autostart.map(|switch| switch == Switch::On),
    };
    let vm = client.update_vm(vm, &change)?;
    if output.json {
        return output.json(&vm);
    }
    output.properties(&settings(&vm))
}

/// Formats the settings that `vm set` can change.
fn settings(vm: &Vm) -> [(&'static str, String); 3] {
    let extends = match vm.disk_auto_extend {
        Some(extend) => format!(
            "by {} GiB at {} % usage, up to {} GiB",
            extend.increment_gib, extend.threshold_percent, extend.limit_gib
        ),
        None => "no".to_owned(),
    };
    let limits: Vec<String> = [
        (vm.disk_iops, "disk IOPS"),
        (vm.disk_mbps, "MB/s disk"),
        (vm.net_mbps, "Mbit/s network"),
    ]
    .into_iter()
    .filter_map(|(limit, unit)| Some(format!("{} {unit}", limit?)))
    .collect();
    let limits = match limits.is_empty() {
        true => "none".to_owned(),
        false => limits.join(", "),
    };
    let autostart = if vm.autostart {
        "after a reboot of the host, if it was running"
    } else {
        "no"
    };
    [
        ("extends", extends),
        ("limits", limits),
        ("autostart", autostart.to_owned()),
    ]
}

pub(crate) fn trim(client: &Client, vm: &str, output: &Output) -> Result<(), Error> {
    let trimming = output.progress(&format!("trimming the disk of {vm}"));
    let trimmed = client.trim_vm(vm)?;
    drop(trimming);
    if output.json {
        return output.json(&trimmed);
    }
    output.line(&format!("{vm} discarded {}", human::bytes(trimmed.trimmed_bytes)))
}

pub(crate) fn snapshot(client: &Client, vm: &str, template_name: TemplateName, output: &Output) -> Result<(), Error> {
    let creating = output.progress(&format!("creating a template from {vm}"));
    let snapshot = client.snapshot_vm(vm, &SnapshotVm { template_name })?;
    drop(creating);
    if output.json {
        return output.json(&snapshot);
    }
    let pause = match snapshot.held.as_str() {
        "not_running" => String::new(),
        held => format!("; {vm} was {held} for {} ms", snapshot.stood_still_ms),
    };
    let size = human::bytes(snapshot.size_bytes);
    output.line(&format!("created the template {} of {size}{pause}", snapshot.template))
}

fn show_status(vm: &Vm, output: &Output) -> Result<(), Error> {
    if output.json {
        output.json(vm)
    } else {
        output.line(&format!("{} is {}", vm.name, vm.status))
    }
}

pub(crate) fn delete(client: &Client, vms: &[String], yes: bool, output: &Output) -> Result<(), Error> {
    let disks = if vms.len() == 1 { "its disk" } else { "their disks" };
    delete_all(
        vms,
        &format!("Delete {} and {disks}?", vms.join(", ")),
        yes,
        output,
        |vm| client.delete_vm(vm),
    )
}

/// Prompts for confirmation, then deletes each of `names`, also if some cannot be deleted.
pub(crate) fn delete_all(
    names: &[String],
    question: &str,
    yes: bool,
    output: &Output,
    delete: impl Fn(&str) -> Result<(), ClientError>,
) -> Result<(), Error> {
    if !yes {
        output.confirm(question)?;
    }
    let mut deleted = Vec::new();
    for name in names {
        let deleting = output.progress(&format!("deleting {name}"));
        let result = delete(name);
        drop(deleting);
        match result {
            Ok(()) => {
                deleted.push(name);
                if !output.json {
                    output.line(&format!("deleted {name}"))?;
                }
            }
            // The next one may succeed, unless the server is unreachable or refuses the token.
            Err(error) if names.len() > 1 && error.status().is_some_and(|status| status != 401) => {
                output.error(&error.into());
            }
            Err(error) => return Err(error.into()),
        }
    }
    if output.json {
        output.json(&serde_json::json!({ "deleted": deleted }))?;
    }
    match names.len() - deleted.len() {
        0 => Ok(()),
        failed => Err(Error::SomeFailed {
            failed,
            all: names.len(),
        }),
    }
}

pub(crate) fn wait(client: &Client, vm: &str, timeout: u64, output: &Output) -> Result<(), Error> {
    let vm = client.vm(vm)?;
    let (vm, took) = wait::until_ssh(client, vm, Duration::from_secs(timeout), output)?;
    if output.json {
        output.json(&vm)
    } else {
        output.line(&ssh_ready(&vm, took))
    }
}

fn ssh_ready(vm: &Vm, took: Duration) -> String {
    format!("{} responds to SSH (waited {:.1} s)", vm.name, took.as_secs_f64())
}

fn summary(vm: &Vm) -> String {
    let cpus = if vm.vcpu_count == 1 { "CPU" } else { "CPUs" };
    format!(
        "{} ({}) is {}: {} GiB disk, {} {cpus}, {} memory",
        vm.name,
        vm.id,
        vm.status,
        vm.disk_size_gib,
        vm.vcpu_count,
        human::mib(vm.mem_size_mib)
    )
}

fn next_step(vm: &Vm) -> String {
    match vm.status {
        VmStatus::Running => format!("log in with: scalebox vm ssh {}\n         or: {}", vm.name, vm.ssh),
        _ => format!("start it with: scalebox vm start {}", vm.name),
    }
}
