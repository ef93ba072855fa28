//! `scaleboxd template build` and `template import`.

use crate::commands::failed::CommandFailed;
use crate::commands::progress;
use crate::settings::Settings;
use scalebox_storage::Pool;
use scalebox_units::{Bytes, TemplateName};
use std::path::Path;

/// Runs `scaleboxd template build`.
pub fn build(settings: &Settings, name: &str, replace: bool, cache: Option<&Path>) -> Result<(), CommandFailed> {
    let name: TemplateName = name.parse()?;
    let pool = Pool::open(&settings.data_dir, &settings.backing, settings.bounds())?;
    let kernel_there = pool.kernel_dir().join("vmlinuz").exists() && pool.kernel_dir().join("initrd.img").exists();
    if !replace && kernel_there && pool.template(&name).is_ok() {
        println!("The template {name} already exists; use --replace to build it again.");
        return Ok(());
    }
    let mut progress = progress::ProgressDisplay::new();
    let recipe = scalebox_guest::Recipe::default();
    let built = scalebox_guest::build(&recipe, &pool.build_dir()?, cache, &mut progress)?;
    pool.install_kernel(&built.kernel, &built.initrd)?;
    let template = pool.import_template(&name, &built.rootfs, Bytes::new(u64::MAX), true)?;
    progress.finish();
    println!(
        "The template {name} is ready: {} large, {} on disk.",
        template.size, template.used
    );
    Ok(())
}

/// Runs `scaleboxd template import`.
pub fn import(settings: &Settings, name: &str, file: &Path, replace: bool) -> Result<(), CommandFailed> {
    scalebox_storage::require_programs()?;
    let pool = Pool::open(&settings.data_dir, &settings.backing, settings.bounds())?;
    let template = pool.import_template(&name.parse()?, file, settings.max_disk_size.bytes(), replace)?;
    println!(
        "The template {name} is ready: {} large, {} on disk.",
        template.size, template.used
    );
    Ok(())
}
