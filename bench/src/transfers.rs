//! Measures uploads and downloads of a file, through the API and with `scp`.

use crate::command::{SSH_OPTIONS, run};
use crate::measure::timed;
use crate::outcome::Outcome;
use crate::setup::Setup;
use scalebox_api::{CreateExec, Vm};
use scalebox_client::{Client, Upload};
use serde::Serialize;
use std::fs::File;
use std::io;
use std::path::Path;
use std::process::Command;

/// Size of the file, in MiB.
pub(crate) const SIZE_MIB: u64 = 256;
/// The file in the guest, in the home of the user that `scp` logs in as.
const IN_GUEST: &str = "/home/user/file";

/// The rates of transfers, in MiB per second.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub(crate) struct Transfers {
    /// `PUT /vms/{vm}/files`, until the guest has flushed the file.
    pub upload: f64,
    /// `scp` to the guest, which flushes nothing.
    pub scp_upload: f64,
    /// `GET /vms/{vm}/files`.
    pub download: f64,
    /// `scp` from the guest.
    pub scp_download: f64,
}

/// Transfers a file of random bytes to a guest and back, with each method.
pub(crate) fn measure(setup: &Setup, client: &Client, vm: &Vm) -> Outcome<Transfers> {
    let (source, target) = (setup.scratch.join("upload"), setup.scratch.join("download"));
    let random = File::open("/dev/urandom")?;
    io::copy(&mut io::Read::take(random, SIZE_MIB << 20), &mut File::create(&source)?)?;
    let transfers = Transfers {
        scp_upload: rate(client, vm, || scp(setup, vm, Some(&source), None))?,
        upload: rate(client, vm, || upload(client, vm, &source))?,
        scp_download: rate(client, vm, || scp(setup, vm, None, Some(&target)))?,
        download: rate(client, vm, || download(client, vm, &target))?,
    };
    run(Command::new("cmp").args([&source, &target]))?;
    client.delete_file(&vm.id, &IN_GUEST.parse()?, false)?;
    std::fs::remove_file(source)?;
    std::fs::remove_file(target)?;
    Ok(transfers)
}

/// Returns the rate of a transfer, in MiB per second. Then flushes the guest's file systems, so
/// that the next transfer is not slowed down.
fn rate(client: &Client, vm: &Vm, transfer: impl FnOnce() -> Outcome<()>) -> Outcome<f64> {
    let (time, ()) = timed(transfer)?;
    let flushed = client.run_exec(&vm.id, &CreateExec::of_argv(vec!["sync".to_owned()]))?;
    match flushed.exit_code {
        Some(0) => Ok(SIZE_MIB as f64 / time.as_secs_f64()),
        _ => Err(format!("sync failed in a guest: {flushed:?}").into()),
    }
}

fn upload(client: &Client, vm: &Vm, source: &Path) -> Outcome<()> {
    let (path, size) = (IN_GUEST.parse()?, SIZE_MIB << 20);
    let written = client.write_file(&vm.id, &path, &Upload::default(), File::open(source)?, Some(size))?;
    match written.size == size {
        true => Ok(()),
        false => Err(format!("the guest has {} of {size} bytes", written.size).into()),
    }
}

fn download(client: &Client, vm: &Vm, target: &Path) -> Outcome<()> {
    let mut download = client.read_file(&vm.id, &IN_GUEST.parse()?)?;
    io::copy(&mut download.content, &mut File::create(target)?)?;
    Ok(())
}

/// Copies with `scp`, from or to the guest.
fn scp(setup: &Setup, vm: &Vm, source: Option<&Path>, target: Option<&Path>) -> Outcome<()> {
    let in_guest = format!("user@127.0.0.1:{IN_GUEST}");
    let mut command = Command::new("scp");
    command
        .args(SSH_OPTIONS)
        .arg("-q")
        .arg("-i")
        .arg(setup.scratch.join("key"));
    command.args(["-P", &vm.ssh_port.to_string()]);
    command.arg(source.unwrap_or(Path::new(&in_guest)));
    command.arg(target.unwrap_or(Path::new(&in_guest)));
    run(&mut command).map(drop)
}
