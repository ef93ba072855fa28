//! The system's own `ssh`, which is the only outside program here, and the public key that it will
//! log in with.

use crate::error::Error;
use crate::settings::{home, is_file, own_folder};
use crate::vm::check_runs;
use scalebox_client::{Client, InvalidFormat, SshPublicKey, Vm, VmId};
use std::ffi::OsString;
use std::fs::{self, DirBuilder, File};
use std::io::Read;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Becomes `ssh`: returns only when it cannot.
pub fn connect(client: &Client, vm: &str, identity: Option<&Path>, command: &[String]) -> Result<(), Error> {
    let vm = client.vm(vm)?;
    check_runs(&vm)?;
    if vm.id.parse::<VmId>().is_err() {
        return Err(Error::StrangeId(vm.id));
    }
    let known_hosts = known_hosts()?;
    Err(Error::Ssh(
        Command::new("ssh")
            .args(arguments(&vm, identity, &known_hosts, command))
            .exec(),
    ))
}

/// A port of the host leads to one VM today and to another tomorrow, so that a host key belongs to
/// the id, not to the address.
fn arguments(vm: &Vm, identity: Option<&Path>, known_hosts: &Path, command: &[String]) -> Vec<OsString> {
    let mut arguments: Vec<OsString> = vec!["-p".into(), vm.ssh_port.to_string().into()];
    let mut option = |option: OsString| arguments.extend(["-o".into(), option]);
    option(format!("HostKeyAlias={}", vm.id).into());
    option("StrictHostKeyChecking=accept-new".into());
    // ssh would read a space as the next file and a % as a token (ssh_config(5)).
    option(
        format!(
            "UserKnownHostsFile=\"{}\"",
            known_hosts.display().to_string().replace('%', "%%")
        )
        .into(),
    );
    if let Some(identity) = identity {
        option("IdentitiesOnly=yes".into());
        arguments.extend(["-i".into(), identity.into()]);
    }
    // After -- neither the address nor the command is read as an option.
    arguments.extend(["--".into(), format!("user@{}", vm.ip).into()]);
    arguments.extend(command.iter().map(OsString::from));
    arguments
}

/// The file of host keys, in a folder that is made when missing.
fn known_hosts() -> Result<PathBuf, Error> {
    let folder = own_folder("XDG_STATE_HOME", ".local/state");
    let made = DirBuilder::new().recursive(true).mode(0o700).create(&folder);
    made.map_err(|why| Error::KnownHosts {
        path: folder.clone(),
        why,
    })?;
    Ok(folder.join("known_hosts"))
}

/// The key in `file`, or the first of those that `ssh-keygen` makes by default; those on security
/// keys, which have to be touched at each login, come last.
pub fn public_key(file: Option<&Path>) -> Result<SshPublicKey, Error> {
    const DEFAULTS: [&str; 5] = [
        "id_ed25519.pub",
        "id_ecdsa.pub",
        "id_rsa.pub",
        "id_ed25519_sk.pub",
        "id_ecdsa_sk.pub",
    ];
    let candidates = DEFAULTS.map(|name| home().join(".ssh").join(name));
    let path = match file {
        Some(file) => file,
        None => candidates
            .iter()
            .map(PathBuf::as_path)
            .find(|path| is_file(path))
            .ok_or_else(|| Error::NoKey {
                looked_for: candidates.each_ref().map(|path| path.display().to_string()).join(", "),
            })?,
    };
    let text = read_key(path)?;
    if text.starts_with(b"\xff\xfe") || text.starts_with(b"\xfe\xff") {
        return Err(Error::Key {
            path: path.to_owned(),
            why: "is in a file of UTF-16; write it as UTF-8 or ASCII".to_owned(),
        });
    }
    let text = String::from_utf8_lossy(&text);
    text.parse().map_err(|why: InvalidFormat| Error::Key {
        path: path.to_owned(),
        why: match public_twin(path) {
            Some(twin) => format!("{why}; did you mean {}?", twin.display()),
            None => why.to_string(),
        },
    })
}

/// What the file holds. Only a plain one, and only so much: a device or a pipe may never come to an
/// end.
fn read_key(path: &Path) -> Result<Vec<u8>, Error> {
    /// In bytes; a public key of RSA with 16384 bits, the longest that `ssh-keygen` makes, has
    /// under 3 KiB.
    const LONGEST: u64 = 64 << 10;
    let unreadable = |why| Error::KeyUnreadable {
        path: path.to_owned(),
        why,
    };
    let wrong = |why: &str| Error::Key {
        path: path.to_owned(),
        why: why.to_owned(),
    };
    // Before it is opened: opening a pipe waits for its writer.
    if !fs::metadata(path).map_err(unreadable)?.is_file() {
        return Err(wrong("is not in a plain file; name one such as ~/.ssh/id_ed25519.pub"));
    }
    let mut text = Vec::new();
    let file = File::open(path).map_err(unreadable)?;
    file.take(LONGEST + 1).read_to_end(&mut text).map_err(unreadable)?;
    if text.len() as u64 > LONGEST {
        return Err(wrong(
            "is in a file of over 64 KiB; a public key is one line, such as in ~/.ssh/id_ed25519.pub",
        ));
    }
    Ok(text)
}

/// `KEY.pub` beside `KEY`.
fn public_twin(path: &Path) -> Option<PathBuf> {
    let mut twin = path.as_os_str().to_owned();
    twin.push(".pub");
    Some(PathBuf::from(twin)).filter(|twin| is_file(twin))
}
