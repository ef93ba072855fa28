//! Connections: accepted within bounds, and answered to the end when the daemon is told to stop.

use crate::service::Service;
use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::Semaphore;

/// Connections served at once; more wait in the kernel's queue.
const MOST_CONNECTIONS: usize = 1024;
/// How long a client may take to send a request's head, the time between two requests included.
const HEAD_TIMEOUT: Duration = Duration::from_secs(15);
/// How long a shutdown waits for requests under way; longer than the longest of them, a stop.
const SHUTDOWN_GRACE: Duration = Duration::from_secs(90);
/// How long to leave the listener alone after it failed, as it does when files run out.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Serves until SIGTERM or SIGINT, then answers the requests under way and takes no more. A second signal ends it at once.
///
/// # Errors
/// When signals cannot be watched.
pub async fn run(listener: TcpListener, router: Router, service: &Service) -> io::Result<()> {
    let mut signals = Signals {
        terminate: signal(SignalKind::terminate())?,
        interrupt: signal(SignalKind::interrupt())?,
    };
    let connections = Arc::new(Semaphore::new(MOST_CONNECTIONS));
    let graceful = GracefulShutdown::new();
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(HEAD_TIMEOUT);

    loop {
        let accepted = async {
            // Closed only with the last handle, which is held here.
            let room = Arc::clone(&connections).acquire_owned().await;
            (room, listener.accept().await)
        };
        let (room, stream) = tokio::select! {
            accepted = accepted => match accepted {
                (room, Ok((stream, _))) => (room, stream),
                (_, Err(error)) => {
                    tracing::warn!(%error, "a connection could not be accepted");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            },
            name = signals.next() => {
                tracing::info!("{name}: finishing what is under way");
                break;
            }
        };
        let connection = http.serve_connection(TokioIo::new(stream), TowerToHyperService::new(router.clone()));
        let connection = graceful.watch(connection);
        tokio::spawn(async move {
            let _room = room;
            if let Err(error) = connection.await {
                tracing::debug!(%error, "a connection ended early");
            }
        });
    }

    drop(listener);
    let finished = async {
        // Those who follow events are told the end of what is under way; then their streams end too.
        let last_words = async {
            service.finish().await;
            service.inner().events.end();
        };
        tokio::join!(graceful.shutdown(), last_words);
        // What a request that was still arriving began.
        service.finish().await;
    };
    tokio::select! {
        ended = tokio::time::timeout(SHUTDOWN_GRACE, finished) => if ended.is_err() {
            tracing::warn!(seconds = SHUTDOWN_GRACE.as_secs(), "some requests did not end: leaving them to the next start");
        },
        name = signals.next() => tracing::warn!("{name} again: leaving what is under way to the next start"),
    }
    Ok(())
}

struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }
}
