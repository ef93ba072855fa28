//! Accepts connections within limits, and finishes requests in progress when the daemon stops.
//!
//! Anyone who can reach the port can open a connection, so an idle one must cost nothing: requests
//! and responses have deadlines, and an unauthenticated connection is closed after its first
//! response (see [`api`](crate::http::routes)).

use crate::host::Host;
use crate::http::error_bodies::{ErrorBodies, RequestsInProgress};
use crate::http::logins::Peer;
use axum::Router;
use axum::body::Body;
use axum::http::{Request, Response, Uri};
use hyper::body::Incoming;
use hyper::server::conn::http1::{self, UpgradeableConnection};
use hyper::service::{Service as _, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use rustix::net::sockopt;
use std::collections::HashMap;
use std::convert::Infallible;
use std::io;
use std::net::IpAddr;
use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::Semaphore;
use tokio_io_timeout::TimeoutStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Limit on concurrent connections; further connections wait in the kernel's queue.
const MAX_CONNECTIONS: usize = 1024;
/// Limit per remote peer. Loopback is exempt: it may be a proxy for everyone.
const MAX_CONNECTIONS_PER_PEER: usize = MAX_CONNECTIONS / 2;
/// Time limit for a client to read more of its response, after which the connection is closed.
const WRITE_TIMEOUT: Duration = Duration::from_secs(120);
/// Time limit for a request's head, including the idle time since the previous request.
const HEAD_TIMEOUT: Duration = Duration::from_secs(15);
/// Timeout of a shutdown for operations in progress; longer than the maximum duration of a stop.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(90);
/// Timeout of a shutdown for clients to read their responses, once all operations have ended.
const FINAL_RESPONSE_TIMEOUT: Duration = Duration::from_secs(5);
/// Time without data after which the kernel probes a peer, and between two probes.
const KEEP_ALIVE_TIME: Duration = Duration::from_secs(60);
/// Number of probes without a response after which a peer is gone.
const KEEP_ALIVE_PROBES: u32 = 5;
/// Pause after a failed `accept`, for example when file descriptors have run out.
const ACCEPT_RETRY_INTERVAL: Duration = Duration::from_millis(100);

/// Serves until SIGTERM or SIGINT, then finishes the requests in progress and accepts no more. A
/// second signal ends the daemon at once.
///
pub(crate) async fn run(listener: TcpListener, router: Router, host: &Host, mut signals: Signals) {
    let connections = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let peers = Peers::default();
    let open = OpenConnections::default();
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(HEAD_TIMEOUT);

    loop {
        let accepted = async {
            // The semaphore is never closed: this function holds a handle.
            let permit = Arc::clone(&connections).acquire_owned().await;
            (permit, listener.accept().await)
        };
        let (permit, stream, peer) = tokio::select! {
            accepted = accepted => match accepted {
                // A dual-stack socket reports IPv4 peers as IPv4-mapped IPv6 addresses.
                (permit, Ok((stream, peer))) => (permit, stream, peer.ip().to_canonical()),
                (_, Err(error)) => {
                    tracing::warn!(%error, "cannot accept a connection; retrying");
                    tokio::time::sleep(ACCEPT_RETRY_INTERVAL).await;
                    continue;
                }
            },
            name = signals.next() => {
                tracing::info!("{name} received: finishing the operations in progress");
                break;
            }
        };
        let Some(counted) = peers.count(peer) else {
            tracing::debug!(%peer, "connection rejected: the peer has too many connections");
            continue;
        };
        if let Err(error) = detect_dead_peer(&stream) {
            tracing::debug!(%peer, %error, "cannot set the keep-alive of a connection");
        }
        let mut stream = TimeoutStream::new(stream);
        stream.set_write_timeout(Some(WRITE_TIMEOUT));
        let in_progress = RequestsInProgress::default();
        let stream = ErrorBodies::new(Box::pin(stream), in_progress.clone());
        let connection = http.serve_connection(TokioIo::new(stream), routed(router.clone(), in_progress, peer));
        let served = open.serve(connection.with_upgrades());
        open.tasks.spawn(async move {
            let _held = (permit, counted);
            if let Err(error) = served.await {
                tracing::debug!(%error, "connection ended early");
            }
        });
    }

    drop(listener);
    host.closing.cancel();
    tokio::select! {
        ended = tokio::time::timeout(SHUTDOWN_TIMEOUT, finish(&open, host)) => if ended.is_err() {
            tracing::warn!(seconds = SHUTDOWN_TIMEOUT.as_secs(), "some operations did not end in time; the next start completes or undoes them");
        },
        name = signals.next() => tracing::warn!("{name} received again: stopping now; the next start completes or undoes the operations in progress"),
    }
}

/// Waits for the operations in progress, and then briefly for clients to read their responses.
async fn finish(open: &OpenConnections, host: &Host) {
    // Clients of the event stream receive the events of these operations; then their streams end.
    let last_events = async {
        host.finish().await;
        host.events.end();
    };
    let (mut responses, mut last_events) = (pin!(open.shut_down()), pin!(last_events));
    let all_sent = tokio::select! {
        () = &mut responses => true,
        () = &mut last_events => false,
    };
    if all_sent {
        last_events.await;
    } else if tokio::time::timeout(FINAL_RESPONSE_TIMEOUT, responses).await.is_err() {
        tracing::info!(
            "some clients did not read their responses or finish their requests in time; closing their connections"
        );
    }
    // A request that was still arriving may have begun another operation.
    host.finish().await;
}

/// The connections that are served, until they become WebSockets.
#[derive(Default)]
struct OpenConnections {
    tasks: TaskTracker,
    stopping: CancellationToken,
}

impl OpenConnections {
    /// Serves a connection. When the daemon stops, it ends after the request in progress.
    fn serve<I, S>(
        &self,
        connection: UpgradeableConnection<I, S>,
    ) -> impl Future<Output = hyper::Result<()>> + use<I, S>
    where
        S: hyper::service::HttpService<Incoming, ResBody = Body>,
        S::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
        I: hyper::rt::Read + hyper::rt::Write + Unpin + Send + 'static,
    {
        let stopping = self.stopping.clone();
        async move {
            let mut connection = pin!(connection);
            tokio::select! {
                served = connection.as_mut() => return served,
                () = stopping.cancelled() => connection.as_mut().graceful_shutdown(),
            }
            connection.await
        }
    }

    /// Ends all connections after their requests in progress.
    async fn shut_down(&self) {
        self.stopping.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }
}

/// Makes the kernel close the connection of a peer that is gone. A stream of output may be silent
/// for days, and then nothing else detects it.
fn detect_dead_peer(stream: &TcpStream) -> io::Result<()> {
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, KEEP_ALIVE_TIME)?;
    sockopt::set_tcp_keepintvl(stream, KEEP_ALIVE_TIME)?;
    sockopt::set_tcp_keepcnt(stream, KEEP_ALIVE_PROBES)?;
    Ok(())
}

/// Wraps the router as a connection's service. Each request carries its peer's address.
fn routed(
    router: Router,
    in_progress: RequestsInProgress,
    peer: IpAddr,
) -> impl hyper::service::Service<
    Request<Incoming>,
    Response = Response<Body>,
    Error = Infallible,
    Future = impl Future<Output = Result<Response<Body>, Infallible>> + Send,
> {
    let router = TowerToHyperService::new(router);
    service_fn(move |mut request: Request<Incoming>| {
        let guard = in_progress.begin();
        request.extensions_mut().insert(Peer(peer));
        request.extensions_mut().insert(in_progress.clone());
        let response = router.call(without_trailing_slash(request.map(Body::new)));
        async move { response.await.map(|response| guard.until_sent(response)) }
    })
}

/// Counts the connections of each remote peer.
#[derive(Clone, Default)]
struct Peers {
    counts: Arc<Mutex<HashMap<IpAddr, usize>>>,
}

/// Counts one connection of a peer until it is dropped.
struct PeerConnection {
    peers: Peers,
    peer: IpAddr,
}

impl Peers {
    /// Counts a connection. Returns `None` if the peer is at its limit.
    fn count(&self, peer: IpAddr) -> Option<PeerConnection> {
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        let count = counts.entry(peer).or_default();
        if *count >= MAX_CONNECTIONS_PER_PEER && !peer.is_loopback() {
            return None;
        }
        *count += 1;
        Some(PeerConnection {
            peers: self.clone(),
            peer,
        })
    }
}

impl Drop for PeerConnection {
    fn drop(&mut self) {
        let mut counts = self.peers.counts.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = counts.get_mut(&self.peer) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.peer);
            }
        }
    }
}

/// The signals that stop the daemon.
pub(crate) struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    /// Handles SIGTERM and SIGINT from now on, so that they no longer kill the process.
    ///
    /// # Errors
    /// If the handlers cannot be installed.
    pub(crate) fn handle() -> io::Result<Signals> {
        Ok(Signals {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
        })
    }

    async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }
}

/// Removes a trailing slash from the request's path: clients that join paths by hand send `/vms/`
/// for `/vms`.
fn without_trailing_slash(mut request: axum::extract::Request) -> axum::extract::Request {
    let uri = request.uri();
    let Some(path) = uri.path().strip_suffix('/').filter(|path| !path.is_empty()) else {
        return request;
    };
    let target = match uri.query() {
        Some(query) => format!("{path}?{query}"),
        None => path.to_owned(),
    };
    let mut parts = uri.clone().into_parts();
    if let Ok(target) = target.parse() {
        parts.path_and_query = Some(target);
        if let Ok(uri) = Uri::from_parts(parts) {
            *request.uri_mut() = uri;
        }
    }
    request
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_remote_peer_is_limited_to_half_of_the_connections() {
        let peers = Peers::default();
        let (remote, other_remote, loopback) = ("192.0.2.1", "192.0.2.2", "127.0.0.1");
        let count = |peer: &str| peers.count(peer.parse().unwrap());
        let mut open: Vec<_> = (0..MAX_CONNECTIONS_PER_PEER).map(|_| count(remote).unwrap()).collect();
        assert!(count(remote).is_none() && count(other_remote).is_some());
        open.pop();
        assert!(count(remote).is_some());
        let local: Vec<_> = (0..=MAX_CONNECTIONS_PER_PEER)
            .map(|_| count(loopback).unwrap())
            .collect();
        drop((open, local));
        assert!(peers.counts.lock().unwrap().is_empty());
    }
}
