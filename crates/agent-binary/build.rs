//! Builds `scalebox-agent` as a static program.
//!
//! It is a build of its own, because it needs other flags than the rest of the workspace: it is
//! static, and small, because every guest loads it at boot. It is optimised in test builds too, and
//! all builds of a checkout share its target folder.

use std::env;
use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

const TARGET: &str = "x86_64-unknown-linux-gnu";

fn main() -> Result<(), Box<dyn Error>> {
    let manifest = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?);
    let workspace = manifest.join("../..").canonicalize()?;
    for input in ["agent/src", "agent/Cargo.toml", "agent-api/src", "agent-api/Cargo.toml"] {
        println!(
            "cargo::rerun-if-changed={}",
            workspace.join("crates").join(input).display()
        );
    }
    println!("cargo::rerun-if-changed={}", workspace.join("Cargo.lock").display());
    let out = PathBuf::from(env::var("OUT_DIR")?);
    let target_dir = target_dir(&out).ok_or("the build folder is not in a target folder")?;
    build(&workspace, &target_dir)?;
    let built = target_dir.join(TARGET).join("agent/scalebox-agent");
    fs::copy(&built, out.join("scalebox-agent"))?;
    Ok(())
}

/// Returns the folder of the agent's build: `agent` in the target folder that `out` is in.
fn target_dir(out: &Path) -> Option<PathBuf> {
    // `target/PROFILE/build/PACKAGE/out`.
    Some(out.ancestors().nth(4)?.join("agent"))
}

fn build(workspace: &Path, target_dir: &Path) -> Result<(), Box<dyn Error>> {
    let mut command = Command::new(env::var("CARGO")?);
    command
        .current_dir(workspace)
        .args(["build", "--locked", "--package=scalebox-agent", "--bin=scalebox-agent"])
        .args(["--profile=agent", "--target", TARGET])
        .arg("--target-dir")
        .arg(target_dir)
        // A caller's flags are for the rest of the workspace.
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .env_remove("RUSTC_WORKSPACE_WRAPPER")
        .env_remove("RUSTC_WRAPPER")
        .env("RUSTFLAGS", "-C target-feature=+crt-static -C relocation-model=static");
    let status = command.status()?;
    match status.success() {
        true => Ok(()),
        false => Err(format!("cannot build scalebox-agent: {status}").into()),
    }
}
