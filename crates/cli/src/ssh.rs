//! Runs the system's `ssh`, and finds the public key to give to a new VM.

use crate::error::Error;
use crate::output::Output;
use crate::own_key;
use crate::running::check_runs;
use crate::settings::{home, is_file, xdg_folder};
use scalebox_api::{InvalidFormat, SshPublicKey, Vm, VmId};
use scalebox_client::Client;
use std::ffi::OsString;
use std::fs::{self, DirBuilder, File};
use std::io::Read;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Replaces this process with `ssh`; returns only on failure.
pub(crate) fn connect(client: &Client, vm: &str, identity: Option<&Path>, command: &[String]) -> Result<(), Error> {
    let vm = client.vm(vm)?;
    check_runs(&vm)?;
    if vm.id.parse::<VmId>().is_err() {
        return Err(Error::InvalidVmId(vm.id));
    }
    let known_hosts = known_hosts()?;
    let identities = match identity {
        Some(identity) => vec![identity.to_owned()],
        None => own_key::identities(&default_keys()),
    };
    Err(Error::Ssh(
        Command::new("ssh")
            .args(arguments(&vm, &identities, identity.is_some(), &known_hosts, command))
            .exec(),
    ))
}

/// Builds the arguments of `ssh`. Host keys are stored under the VM's id rather than its address,
/// because a port of the host can belong to another VM later.
fn arguments(
    vm: &Vm,
    identities: &[PathBuf],
    only_these: bool,
    known_hosts: &Path,
    command: &[String],
) -> Vec<OsString> {
    let mut arguments: Vec<OsString> = vec!["-p".into(), vm.ssh_port.to_string().into()];
    let mut option = |option: OsString| arguments.extend(["-o".into(), option]);
    option(format!("HostKeyAlias={}", vm.id).into());
    option("StrictHostKeyChecking=accept-new".into());
    // ssh splits the value at spaces and expands % tokens (ssh_config(5)).
    option(
        format!(
            "UserKnownHostsFile=\"{}\"",
            known_hosts.display().to_string().replace('%', "%%")
        )
        .into(),
    );
    if only_these {
        option("IdentitiesOnly=yes".into());
    }
    for identity in identities {
        arguments.extend(["-i".into(), identity.into()]);
    }
    // After --, ssh does not parse the address as an option.
    arguments.extend(["--".into(), format!("user@{}", vm.ip).into()]);
    arguments.extend(command.iter().map(OsString::from));
    arguments
}

/// Returns the path of the host key file, and creates its folder if it is missing.
fn known_hosts() -> Result<PathBuf, Error> {
    let folder = xdg_folder("XDG_STATE_HOME", ".local/state");
    let created = DirBuilder::new().recursive(true).mode(0o700).create(&folder);
    created.map_err(|why| Error::KnownHosts {
        path: folder.clone(),
        why,
    })?;
    Ok(folder.join("known_hosts"))
}

/// Returns the private keys in ssh-keygen's default files. Keys on security keys come last, because
/// they must be touched at each login.
fn default_keys() -> [PathBuf; 5] {
    ["id_ed25519", "id_ecdsa", "id_rsa", "id_ed25519_sk", "id_ecdsa_sk"].map(|name| home().join(".ssh").join(name))
}

/// Reads the key in `file`, the user's first default key, or scalebox's own, which it creates if
/// necessary. Returns `None` if there is no key and no `ssh-keygen`.
pub(crate) fn public_key_or_own(file: Option<&Path>, output: &Output) -> Result<Option<SshPublicKey>, Error> {
    let defaults = default_keys().map(|key| key.with_extension("pub"));
    match file.or_else(|| defaults.iter().map(PathBuf::as_path).find(|path| is_file(path))) {
        Some(file) => public_key(file).map(Some),
        None => match own_key::get_or_create(output)? {
            Some(file) => public_key(&file).map(Some),
            None => Ok(None),
        },
    }
}

fn public_key(path: &Path) -> Result<SshPublicKey, Error> {
    let text = read_key(path)?;
    if text.starts_with(b"\xff\xfe") || text.starts_with(b"\xfe\xff") {
        return Err(Error::Key {
            path: path.to_owned(),
            why: "is encoded as UTF-16; save it as UTF-8 or ASCII".to_owned(),
        });
    }
    let text = String::from_utf8_lossy(&text);
    text.parse().map_err(|why: InvalidFormat| Error::Key {
        path: path.to_owned(),
        why: match matching_public_key(path) {
            Some(public_key) => format!("{why}; did you mean {}?", public_key.display()),
            None => why.to_string(),
        },
    })
}

/// Reads a key file. Devices and pipes are rejected, and the size is limited, because they may be
/// endless.
fn read_key(path: &Path) -> Result<Vec<u8>, Error> {
    /// Maximum size of a key file. The largest key of `ssh-keygen`, RSA with 16384 bits, has less
    /// than 3 KiB.
    const MAX_KEY_BYTES: u64 = 64 << 10;
    let unreadable = |why| Error::KeyUnreadable {
        path: path.to_owned(),
        why,
    };
    let wrong = |why: &str| Error::Key {
        path: path.to_owned(),
        why: why.to_owned(),
    };
    // The type is checked before opening, because opening a pipe would block until it has a writer.
    if !fs::metadata(path).map_err(unreadable)?.is_file() {
        return Err(wrong("is not a regular file; pass one such as ~/.ssh/id_ed25519.pub"));
    }
    let mut text = Vec::new();
    let file = File::open(path).map_err(unreadable)?;
    file.take(MAX_KEY_BYTES + 1)
        .read_to_end(&mut text)
        .map_err(unreadable)?;
    if text.len() as u64 > MAX_KEY_BYTES {
        return Err(wrong(
            "is longer than 64 KiB; pass a public key, which is one line, such as ~/.ssh/id_ed25519.pub",
        ));
    }
    Ok(text)
}

/// Returns `KEY.pub` for `KEY`, if that file exists.
fn matching_public_key(path: &Path) -> Option<PathBuf> {
    let mut public_key = path.as_os_str().to_owned();
    public_key.push(".pub");
    Some(PathBuf::from(public_key)).filter(|public_key| is_file(public_key))
}
