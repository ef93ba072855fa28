//! `scaleboxd template build` and `template import`.

use crate::commands::failed::CommandFailed;
use crate::commands::progress;
use crate::settings::Settings;
use crate::templates::import::Import;
use scalebox_images::Recipe;
use scalebox_storage::{KernelFiles, Pool};
use scalebox_units::TemplateName;
use std::path::Path;
use std::sync::Arc;

/// Runs `scaleboxd template build`.
pub(crate) fn build(
    settings: &Settings,
    name: &str,
    recipe: &Recipe,
    replace: bool,
    cache: Option<&Path>,
) -> Result<(), CommandFailed> {
    let name: TemplateName = name.parse()?;
    let pool = open_upgraded(settings)?;
    if !replace && pool.newest_kernel()?.is_some() && pool.template(&name).is_ok() {
        println!("The template {name} already exists; use --replace to build it again.");
        return Ok(());
    }
    let mut progress = progress::ProgressDisplay::new();
    let built = scalebox_images::build(recipe, &pool.build_dir()?, cache, &mut progress)?;
    let kernel = pool.install_kernel(&KernelFiles {
        vmlinuz: built.kernel.clone(),
        initrd: built.initrd.clone(),
        modules: Some(built.modules.clone()),
    })?;
    let template = pool.import_built(&name, &built.rootfs, &kernel)?;
    progress.finish();
    println!(
        "The template {name} is ready: {} large, {} on disk.",
        template.size, template.used
    );
    Ok(())
}

/// Opens the pool, and upgrades it if an earlier release made it. Fails while a daemon of that
/// release runs.
fn open_upgraded(settings: &Settings) -> Result<Pool, CommandFailed> {
    let pool = Pool::open(&settings.data_dir, &settings.backing, settings.bounds())?;
    if !pool.is_upgraded() {
        pool.lock()?;
        pool.upgrade()?;
    }
    Ok(pool)
}

/// Runs `scaleboxd template import`.
pub(crate) fn import(settings: &Settings, name: &str, file: &Path, replace: bool) -> Result<(), CommandFailed> {
    scalebox_storage::require_programs()?;
    let pool = open_upgraded(settings)?;
    let import = Import::new(Arc::new(pool), name.parse()?, settings.max_disk_size.bytes(), replace);
    let template = import.file(file)?;
    println!(
        "The template {name} is ready: {} large, {} on disk.",
        template.size, template.used
    );
    Ok(())
}
