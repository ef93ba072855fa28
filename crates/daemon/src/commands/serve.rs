//! `scaleboxd serve`: the daemon.

use crate::commands::failed::{CommandFailed, io};
use crate::commands::open::{open_host, runtime};
use crate::http::metrics::Metrics;
use crate::http::routes;
use crate::http::server::{self, Signals};
use crate::settings::{Settings, contradictions};
use crate::state::State;
use crate::vm::{recovery, snapshot};
use crate::watch;
use sd_notify::NotifyState;
use std::io;
use std::sync::Arc;
use tokio::net::TcpListener;

/// Runs `scaleboxd serve`.
pub(crate) fn serve(settings: Settings) -> Result<(), CommandFailed> {
    let token = settings.token()?.clone();
    for caveat in contradictions::caveats(&settings) {
        tracing::warn!(fix = caveat.fix, "{}", caveat.finding);
    }
    let runtime = runtime()?;
    let served = runtime.block_on(async {
        let state = State::open(&settings.state_dir, &settings.run_dir)?;
        let address = settings.api;
        let listener = TcpListener::bind(address)
            .await
            .map_err(|source| CommandFailed::Listen { address, source })?;
        let metrics = Arc::new(Metrics::new().map_err(|error| io("create the metrics")(io::Error::other(error)))?);
        let (host, recovered) = open_host(settings, state).await?;
        tracing::info!(
            vms = recovered.vms,
            adopted = recovered.adopted,
            orphans_killed = recovered.orphans_killed,
            files_removed = recovered.files_removed,
            to_start = recovered.to_start.len(),
            "recovery finished"
        );
        let local = listener.local_addr().map_err(io("read the API's address"))?;
        // A client that waits until the daemon is ready may then stop it at once.
        let signals = Signals::handle().map_err(io("handle signals"))?;
        tracing::info!(address = %local, "scaleboxd ready");
        notify_systemd(&[NotifyState::Ready]);
        watch::start(&host, recovered.unconnected);
        tokio::spawn(snapshot::thaw_left_frozen(host.clone()));
        recovery::complete_stops(&host, recovered.to_stop);
        tokio::spawn(recovery::start_after_reboot(host.clone(), recovered.to_start));
        server::run(listener, routes::router(host.clone(), &token, metrics), &host, signals).await;
        tracing::info!("scaleboxd stopped; machines keep running");
        Ok(())
    });
    // Blocking threads have had their grace period; the next start cleans up after them.
    runtime.shutdown_background();
    served
}

/// Notifies the service manager of the daemon's state, if it requested that (`Type=notify`).
fn notify_systemd(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        tracing::warn!(%error, "cannot notify systemd: it considers the start unfinished");
    }
}
