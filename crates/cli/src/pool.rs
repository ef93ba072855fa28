//! The commands `scalebox pool …`.

use crate::error::Error;
use crate::human::{self, bytes, percent};
use crate::output::Output;
use scalebox_api::PoolInfo;
use scalebox_client::Client;

pub(crate) fn show(client: &Client, output: &Output) -> Result<(), Error> {
    let pool = client.pool()?;
    if output.json {
        return output.json(&pool);
    }
    let host_free = pool
        .host_free_bytes
        .map_or_else(|| "- (the pool is not in an image)".to_owned(), bytes);
    let used = format!(
        "{} ({} %)",
        bytes(pool.used_bytes),
        percent(pool.used_bytes, pool.capacity_bytes)
    );
    output.properties(&[
        ("path", pool.path.clone()),
        ("backing", backing(&pool)),
        ("capacity", bytes(pool.capacity_bytes)),
        ("used", used),
        ("  exclusive to VMs", human::measured(pool.vms_exclusive_bytes)),
        (
            "  exclusive to templates",
            human::measured(pool.templates_exclusive_bytes),
        ),
        ("  shared", human::measured(pool.shared_bytes)),
        ("  other", human::measured(pool.other_bytes)),
        ("free", format!("{} can be written", bytes(pool.free_bytes))),
        ("  in the pool", bytes(pool.pool_free_bytes)),
        ("  on the host disk", host_free),
        ("  will last", days_left(&pool)),
        (
            "reserved",
            format!("{} for running operations", bytes(pool.reserved_bytes)),
        ),
        ("buffer", format!("{} always kept free", bytes(pool.buffer_bytes))),
        (
            "committed",
            format!("{} ({} × capacity)", committed(&pool), pool.overcommit_ratio),
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
            "the server could not yet remove all resources of {} stopped or deleted VMs; see the scaleboxd log",
            pool.cleanups_pending
        ));
    }
    Ok(())
}

pub(crate) fn grow(client: &Client, size_gib: Option<u64>, output: &Output) -> Result<(), Error> {
    let growing = output.progress("growing the pool");
    let pool = client.grow_pool(size_gib)?;
    drop(growing);
    show_size(&pool, output)
}

pub(crate) fn shrink(client: &Client, size_gib: u64, output: &Output) -> Result<(), Error> {
    let shrinking = output.progress("shrinking the pool");
    let pool = client.shrink_pool(size_gib)?;
    drop(shrinking);
    show_size(&pool, output)
}

fn show_size(pool: &PoolInfo, output: &Output) -> Result<(), Error> {
    if output.json {
        return output.json(pool);
    }
    output.line(&format!(
        "the pool's capacity is {}, of which {} are free",
        bytes(pool.capacity_bytes),
        bytes(pool.free_bytes)
    ))
}

pub(crate) fn trim(client: &Client, output: &Output) -> Result<(), Error> {
    let trimming = output.progress("discarding the pool's free blocks");
    let trimmed = client.trim_pool()?;
    drop(trimming);
    if output.json {
        return output.json(&trimmed);
    }
    output.line(&format!("discarded {}", bytes(trimmed.trimmed_bytes)))
}

/// Formats free space, capacity and mount point.
pub(crate) fn summary(pool: &PoolInfo) -> String {
    format!(
        "{} free of {}, at {}",
        bytes(pool.free_bytes),
        bytes(pool.capacity_bytes),
        pool.path
    )
}

/// Formats committed space and its limit.
pub(crate) fn committed(pool: &PoolInfo) -> String {
    format!(
        "{} of at most {}",
        bytes(pool.committed_bytes),
        bytes(pool.commitment_limit_bytes)
    )
}

fn days_left(pool: &PoolInfo) -> String {
    match pool.days_left {
        Some(days) => format!("{days:.1} days at the rate of the last day"),
        None => "unknown: usage is not growing, or was measured for less than an hour".to_owned(),
    }
}

fn backing(pool: &PoolInfo) -> String {
    match &pool.image {
        Some(image) => format!("{} in the image {image}", pool.file_system),
        None => format!("{} on {}", pool.file_system, pool.device),
    }
}

/// Warns when not even the smallest disk, of 1 GiB, would be admitted.
pub(crate) fn warn_when_full(pool: &PoolInfo, output: &Output) {
    let left = pool
        .free_bytes
        .saturating_sub(pool.reserved_bytes)
        .saturating_sub(pool.buffer_bytes);
    if left < 1 << 30 {
        output.warning("the pool is full: the server refuses new VMs until space is freed");
    }
}
