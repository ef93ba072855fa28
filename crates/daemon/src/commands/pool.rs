//! `scaleboxd pool init`.

use crate::commands::failed::CommandFailed;
use crate::host::advice::advised;
use crate::settings::Settings;
use crate::state::State;
use scalebox_storage::{InitEvent, InitOutcome, PoolPlan};

/// Runs `scaleboxd pool init`.
pub(crate) fn init(settings: &Settings) -> Result<(), CommandFailed> {
    scalebox_storage::require_programs()?;
    let plan = PoolPlan {
        // `serve` and `doctor` report a state that cannot be read.
        expected_disks: State::peek_vms(&settings.state_dir).unwrap_or(0),
        ..settings.pool_plan()
    };
    match scalebox_storage::init(&plan, &mut print_event)? {
        InitOutcome::AlreadyThere => println!("Nothing to do."),
        InitOutcome::Ready => println!("The pool is ready at {}.", settings.data_dir.display()),
    }
    Ok(())
}

fn print_event(event: InitEvent) {
    match event {
        InitEvent::Step(step) => println!("{step}"),
        InitEvent::Warning(warning) => eprintln!("warning: {}", advised(&warning)),
    }
}
