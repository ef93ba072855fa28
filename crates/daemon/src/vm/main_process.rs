//! The main process of a VM: the command of its image, which the agent runs.

use crate::host::error::ServiceError;
use crate::state::GuestConfig;
use scalebox_agent_api as wire;
use scalebox_agent_api::main_process::MAX_BYTES;
use scalebox_api::{CreateVm, Init, MainProcess, RestartPolicy, Signal};
use scalebox_storage::Template;

const FIELD: &str = "main";

/// Returns the settings of the commands of a new VM; `None` if there are none.
///
/// # Errors
/// 400 if the VM cannot have the requested main process.
pub(crate) fn guest_config(template: &Template, request: &CreateVm) -> Result<Option<Box<GuestConfig>>, ServiceError> {
    let config = GuestConfig {
        init: template.init,
        image: template.config.clone(),
        env: request.env.clone(),
        main: main_of(template, request)?,
    };
    let size = of(&config).map_or(0, |main| {
        serde_json::to_vec(&main).map_or(usize::MAX, |json| json.len())
    });
    if size > MAX_BYTES {
        return Err(ServiceError::invalid_field(
            FIELD,
            format!("the main process with its environment takes {size} bytes, more than {MAX_BYTES}"),
        ));
    }
    Ok((config != GuestConfig::default()).then(|| Box::new(config)))
}

fn main_of(template: &Template, request: &CreateVm) -> Result<Option<MainProcess>, ServiceError> {
    let requested = request.main.clone().unwrap_or_default();
    if !requested.run {
        return Ok(None);
    }
    if template.init != Some(Init::Agent) {
        return match request.main {
            None => Ok(None),
            Some(_) => Err(ServiceError::invalid_field(
                FIELD,
                format!(
                    "the template {} has no main process: it was not made of an image without an init system; \
                     leave main out, and start programs with its init system or with exec",
                    template.name
                ),
            )),
        };
    }
    let image = template.config.clone().unwrap_or_default();
    let argv = requested.argv.unwrap_or_else(|| [image.entrypoint, image.cmd].concat());
    if argv.is_empty() {
        return match request.main {
            None => Ok(None),
            Some(_) => Err(ServiceError::invalid_field(
                FIELD,
                format!(
                    "the image of the template {} has no command; send one as main.argv",
                    template.name
                ),
            )),
        };
    }
    Ok(Some(MainProcess {
        argv,
        restart: requested.restart,
    }))
}

/// Returns the main process for the agent; `None` if the VM has none.
pub(crate) fn of(config: &GuestConfig) -> Option<wire::MainProcess> {
    let main = config.main.as_ref()?;
    let stop_signal = config.image.as_ref().and_then(|image| image.stop_signal.as_ref());
    Some(wire::MainProcess {
        argv: main.argv.clone(),
        env: config.environment(),
        cwd: config.working_dir(),
        user: config.user(),
        restart: match main.restart {
            RestartPolicy::Always => wire::RestartPolicy::Always,
            RestartPolicy::OnFailure => wire::RestartPolicy::OnFailure,
            RestartPolicy::Never => wire::RestartPolicy::Never,
        },
        // An image with an invalid signal is ended by SIGTERM.
        stop_signal: stop_signal.and_then(|signal| signal.parse().ok()).map(Signal::number),
    })
}
