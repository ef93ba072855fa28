//! The guest as a whole: statistics, flush, freeze, trim, growth, clock, shutdown.

mod grow;
mod ioctl;
mod shutdown;
mod stats;
mod volumes;

pub(crate) use shutdown::end;
pub(crate) use volumes::Frozen;

use crate::blocking;
use crate::server::{Agent, Failure, Request, Response, json, no_content, no_route, read_json};
use hyper::Method;
use rustix::fs::sync;
use rustix::time::{ClockId, Timespec, clock_settime};
use scalebox_agent_api::{Clock, Info, Shutdown, Trimmed};
use std::path::Path;
use std::sync::Arc;

/// Responds to the other requests below `/v1`; `rest` is the path after it.
pub(crate) async fn respond(agent: &Arc<Agent>, request: Request, rest: &[&str]) -> Result<Response, Failure> {
    let frozen = Arc::clone(&agent.frozen);
    match (request.method(), rest) {
        (&Method::GET, ["info"]) => info(agent).await,
        (&Method::GET, ["stats"]) => {
            let running = agent.execs.running() as u64;
            blocking::run(move || Ok(json(&stats::read(running)?))).await
        }
        (&Method::POST, ["sync"]) => {
            blocking::run_apart(|| {
                sync();
                Ok(no_content())
            })
            .await
        }
        (&Method::POST, ["freeze"]) => {
            blocking::run_apart(move || frozen.freeze(&volumes::volumes()?).map(|()| no_content())).await
        }
        (&Method::POST, ["thaw"]) => {
            blocking::run_apart(move || frozen.thaw(&volumes::volumes()?).map(|()| no_content())).await
        }
        (&Method::POST, ["trim"]) => {
            blocking::run_apart(move || {
                let bytes = frozen.trim(&volumes::volumes()?)?;
                Ok(json(&Trimmed { bytes }))
            })
            .await
        }
        (&Method::POST, ["grow"]) => blocking::run_apart(|| Ok(json(&grow::grow(Path::new("/"))?))).await,
        (&Method::POST, ["clock"]) => set_clock(&read_json(request).await?),
        (&Method::POST, ["shutdown"]) => {
            let Shutdown { reboot } = read_json(request).await?;
            shutdown::begin(agent.init, reboot)?;
            Ok(no_content())
        }
        _ => Err(no_route(&request)),
    }
}

async fn info(agent: &Agent) -> Result<Response, Failure> {
    let init = agent.init;
    blocking::run(move || {
        let boot_id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id");
        let boot_id = boot_id.map_err(Failure::io("read the boot id"))?;
        Ok(json(&Info {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            boot_id: boot_id.trim_end().to_owned(),
            init,
        }))
    })
    .await
}

fn set_clock(clock: &Clock) -> Result<Response, Failure> {
    let time = Timespec {
        tv_sec: i64::try_from(clock.unix_ns / 1_000_000_000).unwrap_or(i64::MAX),
        tv_nsec: i64::try_from(clock.unix_ns % 1_000_000_000).unwrap_or(0),
    };
    clock_settime(ClockId::Realtime, time).map_err(Failure::io("set the clock"))?;
    Ok(no_content())
}
