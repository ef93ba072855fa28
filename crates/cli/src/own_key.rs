//! An SSH key of scalebox's own, for users who have none.

use crate::error::Error;
use crate::output::Output;
use crate::settings::{config_folder, is_file};
use rustix::fs::{FlockOperation, flock};
use scalebox_programs::{Program, Run};
use std::fs::{DirBuilder, File};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

const SSH_KEYGEN: Program = Program::new("ssh-keygen", "openssh-client").within(Duration::from_secs(30));

fn private_key() -> PathBuf {
    config_folder().join("id_ed25519")
}

/// Returns the path of the public key, after creating both keys if necessary; `None` if
/// `ssh-keygen` is not installed.
pub(crate) fn get_or_create(output: &Output) -> Result<Option<PathBuf>, Error> {
    let private = private_key();
    let public = private.with_extension("pub");
    if is_file(&public) {
        return Ok(Some(public));
    }
    if !SSH_KEYGEN.is_installed() {
        output.hint("no SSH key, and no ssh-keygen to create one: log in with scalebox shell, not over SSH");
        return Ok(None);
    }
    create(&private).map_err(|why| Error::OwnKey {
        path: private.clone(),
        why,
    })?;
    output.hint(&format!(
        "created an SSH key for scalebox, because you have none: {}",
        private.display()
    ));
    Ok(Some(public))
}

/// Creates the keys, with mode 0600, unless another process has just done so.
fn create(private: &Path) -> Result<(), String> {
    let folder = config_folder();
    let created = DirBuilder::new().recursive(true).mode(0o700).create(&folder);
    let locked = created
        .and_then(|()| File::open(&folder))
        .and_then(|folder| Ok(flock(&folder, FlockOperation::LockExclusive).map(|()| folder)?));
    let _lock = locked.map_err(|error| error.to_string())?;
    if is_file(&private.with_extension("pub")) {
        return Ok(());
    }
    let run = Run::of(SSH_KEYGEN).args(["-q", "-t", "ed25519", "-N", "", "-C", "scalebox", "-f"]);
    let created = run.args([private]).stdout();
    created.map(drop).map_err(|error| error.to_string())
}

/// Returns the private keys for `ssh`. Without a key of scalebox's own the list is empty, and ssh
/// chooses. Otherwise it has that key and the existing ones of `defaults`, because ssh then tries
/// no default keys.
pub(crate) fn identities(defaults: &[PathBuf]) -> Vec<PathBuf> {
    let own = private_key();
    if !is_file(&own) {
        return Vec::new();
    }
    let defaults = defaults.iter().filter(|key| is_file(key)).cloned();
    defaults.chain([own]).collect()
}
