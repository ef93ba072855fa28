//! `scaleboxd template build` and `template import`.

use crate::commands::failed::CommandFailed;
use crate::commands::progress;
use crate::settings::Settings;
use scalebox_images::Recipe;
use scalebox_images::convert::{FSTAB, recognise, without_partitions};
use scalebox_images::oci::{Limits, Phase, Room, Supervisor, Task};
use scalebox_storage::{ConvertedImage, EditedFile, KernelFiles, Pool, Template};
use scalebox_units::{Bytes, TemplateName};
use std::error::Error;
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
    let name: TemplateName = name.parse()?;
    let template = match is_convertible(file)? {
        true => convert(settings, &Arc::new(pool), &name, file, replace)?,
        false => pool.import_template(&name, file, settings.max_disk_size.bytes(), replace)?,
    };
    println!(
        "The template {name} is ready: {} large, {} on disk.",
        template.size, template.used
    );
    Ok(())
}

/// Returns whether a file is a disk image or an archive. Only a regular file is opened: opening a
/// FIFO would wait for a writer.
fn is_convertible(file: &Path) -> Result<bool, CommandFailed> {
    let is_file = std::fs::metadata(file).is_ok_and(|meta| meta.is_file());
    Ok(is_file && recognise(file)?.is_convertible())
}

/// Imports a disk image or an archive.
fn convert(
    settings: &Settings,
    pool: &Arc<Pool>,
    name: &TemplateName,
    file: &Path,
    replace: bool,
) -> Result<Template, CommandFailed> {
    let limits = Limits {
        max_disk: settings.max_disk_size.bytes(),
        ..Limits::default()
    };
    let task = Task::new(Arc::new(Admission(Arc::clone(pool))), limits);
    let made = scalebox_images::convert::convert(file, &pool.build_dir()?, &task)?;
    let fstab = [EditedFile {
        path: FSTAB,
        edit: &without_partitions,
    }];
    let image = ConvertedImage {
        path: &made.image,
        pulled: None,
        config: made.config.clone(),
        init: Some(made.init),
        // An image of containers has settings instead of partitions.
        edited_files: if made.config.is_some() { &[] } else { &fstab },
    };
    Ok(pool.import_converted(name, image, replace)?)
}

/// Admits the space of a conversion.
struct Admission(Arc<Pool>);

impl Supervisor for Admission {
    fn reserve(&self, bytes: Bytes) -> Result<Room, Box<dyn Error + Send + Sync>> {
        Ok(Box::new(self.0.admit(bytes)?))
    }

    fn progress(&self, _phase: Phase, _done: Bytes, _total: Bytes) {}
}
