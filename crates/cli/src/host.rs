//! `scalebox status`, `scalebox template …`, `scalebox pool show`.

use crate::error::Error;
use crate::human::{self, bytes, percent};
use crate::output::{Output, Table, number, text};
use crate::vm::delete_all;
use jiff::Timestamp;
use scalebox_client::{Client, HostInfo, PoolInfo, Template, TemplateList, VmCounts};

pub fn status(client: &Client, output: &Output) -> Result<(), Error> {
    let info = client.info()?;
    if output.json {
        return output.answer(&info);
    }
    output.facts(&[
        (
            "server",
            format!("scaleboxd {} on {} ({})", info.version, info.hostname, info.host_ip),
        ),
        ("up", human::duration(info.uptime_seconds)),
        ("machines", machines(&info)),
        ("VMs", counts(&info.vms)),
        ("templates", info.templates.to_string()),
        ("pool", pool_in_short(&info.storage)),
        ("promised", promised(&info.storage)),
        (
            "memory",
            format!(
                "{} of {} available",
                bytes(info.memory.available_bytes),
                bytes(info.memory.total_bytes)
            ),
        ),
        ("CPU", format!("{} × {}", info.cpu.count, info.cpu.model)),
    ])?;
    warn_when_full(&info.storage, output);
    Ok(())
}

fn machines(info: &HostInfo) -> String {
    match info.accel.as_str() {
        "tcg" => format!("{}, emulated (no KVM: several times slower)", info.vmm),
        accel => format!("{}, {accel}", info.vmm),
    }
}

/// `3 (2 running, 1 failed)`.
fn counts(vms: &VmCounts) -> String {
    let parts = [
        (vms.running, "running"),
        (vms.stopped, "stopped"),
        (vms.paused, "paused"),
        (vms.failed, "failed"),
    ];
    let parts: Vec<String> = parts
        .iter()
        .filter(|(n, _)| *n > 0)
        .map(|(n, status)| format!("{n} {status}"))
        .collect();
    if parts.is_empty() {
        vms.total.to_string()
    } else {
        format!("{} ({})", vms.total, parts.join(", "))
    }
}

fn pool_in_short(pool: &PoolInfo) -> String {
    format!(
        "{} free of {}, at {}",
        bytes(pool.free_bytes),
        bytes(pool.capacity_bytes),
        pool.path
    )
}

fn promised(pool: &PoolInfo) -> String {
    format!(
        "{} of at most {}",
        bytes(pool.committed_bytes),
        bytes(pool.commitment_limit_bytes)
    )
}

fn days_left(pool: &PoolInfo) -> String {
    match pool.days_left {
        Some(days) => format!("{days:.1} days at the rate of the last day"),
        None => "no end in sight, or too short a history to tell".to_owned(),
    }
}

/// The smallest VM has a disk of 1 GiB.
fn warn_when_full(pool: &PoolInfo, output: &Output) {
    let left = pool
        .free_bytes
        .saturating_sub(pool.reserved_bytes)
        .saturating_sub(pool.buffer_bytes);
    if left < 1 << 30 {
        output.warning("the pool is full: the server refuses new VMs until space is given back");
    }
}

pub fn grow_pool(client: &Client, size_gib: Option<u64>, output: &Output) -> Result<(), Error> {
    let growing = output.progress("growing the pool");
    let pool = client.grow_pool(size_gib)?;
    drop(growing);
    show_size(&pool, output)
}

pub fn shrink_pool(client: &Client, size_gib: u64, output: &Output) -> Result<(), Error> {
    let shrinking = output.progress("shrinking the pool");
    let pool = client.shrink_pool(size_gib)?;
    drop(shrinking);
    show_size(&pool, output)
}

fn show_size(pool: &PoolInfo, output: &Output) -> Result<(), Error> {
    if output.json {
        return output.answer(pool);
    }
    output.line(&format!(
        "the pool is {} large, {} can be written",
        bytes(pool.capacity_bytes),
        bytes(pool.free_bytes)
    ))
}

pub fn trim_pool(client: &Client, output: &Output) -> Result<(), Error> {
    let trimming = output.progress("giving free blocks back to the host disk");
    let trimmed = client.trim_pool()?;
    drop(trimming);
    if output.json {
        return output.answer(&trimmed);
    }
    output.line(&format!(
        "{} are free on the host disk's side too",
        bytes(trimmed.trimmed_bytes)
    ))
}

fn lies_on(pool: &PoolInfo) -> String {
    match &pool.image {
        Some(image) => format!("{}, the image {image}", pool.file_system),
        None => format!("{}, {}", pool.file_system, pool.device),
    }
}

pub fn pool(client: &Client, output: &Output) -> Result<(), Error> {
    let pool = client.pool()?;
    if output.json {
        return output.answer(&pool);
    }
    let host_free = pool.host_free_bytes.map_or_else(|| "not on an image".to_owned(), bytes);
    let used = format!(
        "{} ({} %)",
        bytes(pool.used_bytes),
        percent(pool.used_bytes, pool.capacity_bytes)
    );
    output.facts(&[
        ("path", pool.path.clone()),
        ("lies on", lies_on(&pool)),
        ("capacity", bytes(pool.capacity_bytes)),
        ("used", used),
        ("  by one VM each", human::measured(pool.vms_exclusive_bytes)),
        (
            "  by one template each",
            human::measured(pool.templates_exclusive_bytes),
        ),
        ("  shared", human::measured(pool.shared_bytes)),
        ("  by anything else", human::measured(pool.other_bytes)),
        ("free", format!("{} can really be written", bytes(pool.free_bytes))),
        ("  of the pool", bytes(pool.pool_free_bytes)),
        ("  of the host disk", host_free),
        ("  will last", days_left(&pool)),
        (
            "reserved",
            format!("{} for what is being made", bytes(pool.reserved_bytes)),
        ),
        ("buffer", format!("{} always left free", bytes(pool.buffer_bytes))),
        (
            "promised",
            format!("{} ({} × capacity)", promised(&pool), pool.overcommit_ratio),
        ),
        ("unallocated", bytes(pool.unallocated_bytes)),
        (
            "metadata",
            format!(
                "{} of {} used",
                bytes(pool.metadata_used_bytes),
                bytes(pool.metadata_bytes)
            ),
        ),
    ])?;
    warn_when_full(&pool, output);
    if pool.cleanups_pending > 0 {
        output.hint(&format!(
            "{} stopped or deleted VMs left something on the host that cannot be removed yet: see the scaleboxd log",
            pool.cleanups_pending
        ));
    }
    Ok(())
}

pub fn templates(client: &Client, output: &Output) -> Result<(), Error> {
    let templates = client.templates()?;
    if output.json {
        return output.answer(&TemplateList { templates });
    }
    if templates.is_empty() {
        output.hint("no templates; on the server, make one with: scaleboxd template build debian-base");
        return Ok(());
    }
    let columns = vec![
        text("NAME", 0),
        number("SIZE", 1),
        number("USED", 3),
        number("EXCLUSIVE", 6),
        number("VMS", 2),
        number("AGE", 4),
        text("PROTECTED", 5),
    ];
    let now = Timestamp::now();
    let row = |template: &Template| {
        vec![
            template.name.clone(),
            bytes(template.size_bytes),
            bytes(template.used_bytes),
            human::measured(template.storage.as_ref().map(|storage| storage.exclusive_bytes)),
            template.used_by.to_string(),
            human::age(&template.created_at, now),
            if template.protected { "yes" } else { "" }.to_owned(),
        ]
    };
    output.table(Table::new(columns, templates.iter().map(row).collect()))
}

pub fn delete_templates(client: &Client, names: &[String], yes: bool, output: &Output) -> Result<(), Error> {
    let what = if names.len() == 1 {
        "the template"
    } else {
        "the templates"
    };
    let question = format!("Delete {what} {}?", names.join(", "));
    delete_all(names, &question, yes, output, |name| client.delete_template(name))
}
