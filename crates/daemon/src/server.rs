//! Connections: accepted within bounds, and answered to the end when the daemon is told to stop.
//!
//! Whoever can reach the port can open connections, so none is worth anything to hold: it has to
//! send, it has to read what it is answered, and one that shows no token is closed behind its first
//! answer (see [`api`](crate::api)).

use crate::api::without_trailing_slash;
use crate::error_bodies::{Answering, ErrorBodies};
use crate::logins::Peer;
use crate::service::Service;
use axum::Router;
use axum::body::Body;
use axum::http::{Request, Response};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::{Service as _, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use std::collections::HashMap;
use std::convert::Infallible;
use std::io;
use std::net::IpAddr;
use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::Semaphore;
use tokio_io_timeout::TimeoutStream;

/// Connections served at once; more wait in the kernel's queue.
const MOST_CONNECTIONS: usize = 1024;
/// Of these, one other host's at most. This host's own may come from a proxy, for all the world.
const MOST_OF_A_PEER: usize = MOST_CONNECTIONS / 2;
/// How long a client may leave what it is answered where it is, before the connection is given up.
const READ_PATIENCE: Duration = Duration::from_secs(120);
/// How long a client may take to send a request's head, the time between two requests included.
const HEAD_TIMEOUT: Duration = Duration::from_secs(15);
/// How long a shutdown waits for requests under way; longer than the longest of them, a stop.
const SHUTDOWN_GRACE: Duration = Duration::from_secs(90);
/// How long clients may take, when there is nothing under way any more, to take what they are
/// answered.
const LAST_ANSWERS: Duration = Duration::from_secs(5);
/// How long to leave the listener alone after it failed, as it does when files run out.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Serves until SIGTERM or SIGINT, then answers the requests under way and takes no more. A second
/// signal ends it at once.
///
/// # Errors
/// When signals cannot be watched.
pub async fn run(listener: TcpListener, router: Router, service: &Service) -> io::Result<()> {
    let mut signals = Signals {
        terminate: signal(SignalKind::terminate())?,
        interrupt: signal(SignalKind::interrupt())?,
    };
    let connections = Arc::new(Semaphore::new(MOST_CONNECTIONS));
    let peers = Peers::default();
    let graceful = GracefulShutdown::new();
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(HEAD_TIMEOUT);

    loop {
        let accepted = async {
            // Closed only with the last handle, which is held here.
            let room = Arc::clone(&connections).acquire_owned().await;
            (room, listener.accept().await)
        };
        let (room, stream, peer) = tokio::select! {
            accepted = accepted => match accepted {
                // Of a socket for both versions of IP, those of version 4 come in the form of
                // version 6.
                (room, Ok((stream, peer))) => (room, stream, peer.ip().to_canonical()),
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
        let Some(counted) = peers.count(peer) else {
            tracing::debug!(%peer, "it has connections enough");
            continue;
        };
        let mut stream = TimeoutStream::new(stream);
        stream.set_write_timeout(Some(READ_PATIENCE));
        let answering = Answering::default();
        let stream = ErrorBodies::new(Box::pin(stream), answering.clone());
        let connection = http.serve_connection(TokioIo::new(stream), routed(router.clone(), answering, peer));
        let connection = graceful.watch(connection);
        tokio::spawn(async move {
            let _held = (room, counted);
            if let Err(error) = connection.await {
                tracing::debug!(%error, "a connection ended early");
            }
        });
    }

    drop(listener);
    service.inner().closing.cancel();
    tokio::select! {
        ended = tokio::time::timeout(SHUTDOWN_GRACE, finish(graceful, service)) => if ended.is_err() {
            tracing::warn!(seconds = SHUTDOWN_GRACE.as_secs(), "some requests did not end: leaving them to the next start");
        },
        name = signals.next() => tracing::warn!("{name} again: leaving what is under way to the next start"),
    }
    Ok(())
}

/// Waits for the requests under way, and then for clients to take their answers, but not for long.
async fn finish(graceful: GracefulShutdown, service: &Service) {
    // Those who follow events are told the end of what is under way; then their streams end too.
    let last_words = async {
        service.finish().await;
        service.inner().events.end();
    };
    let (mut answers, mut last_words) = (pin!(graceful.shutdown()), pin!(last_words));
    let all_taken = tokio::select! {
        () = &mut answers => true,
        () = &mut last_words => false,
    };
    if all_taken {
        last_words.await;
    } else if tokio::time::timeout(LAST_ANSWERS, answers).await.is_err() {
        tracing::info!("some clients do not take their answers, or do not finish asking: they are not waited for");
    }
    // What a request that was still arriving began.
    service.finish().await;
}

/// The router as a connection's service. Each request carries its peer.
fn routed(
    router: Router,
    answering: Answering,
    peer: IpAddr,
) -> impl hyper::service::Service<
    Request<Incoming>,
    Response = Response<Body>,
    Error = Infallible,
    Future = impl Future<Output = Result<Response<Body>, Infallible>> + Send,
> {
    let router = TowerToHyperService::new(router);
    service_fn(move |mut request: Request<Incoming>| {
        let guard = answering.begin();
        request.extensions_mut().insert(Peer(peer));
        let answer = router.call(without_trailing_slash(request.map(Body::new)));
        async move { answer.await.map(|answer| guard.until_sent(answer)) }
    })
}

/// How many connections each other host has.
#[derive(Clone, Default)]
struct Peers {
    counts: Arc<Mutex<HashMap<IpAddr, usize>>>,
}

/// A connection of a peer, for as long as this lives.
struct Counted {
    peers: Peers,
    peer: IpAddr,
}

impl Peers {
    /// Counts a connection; `None` when the peer has as many as it may have.
    fn count(&self, peer: IpAddr) -> Option<Counted> {
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        let count = counts.entry(peer).or_default();
        if *count >= MOST_OF_A_PEER && !peer.is_loopback() {
            return None;
        }
        *count += 1;
        Some(Counted {
            peers: self.clone(),
            peer,
        })
    }
}

impl Drop for Counted {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_host_has_half_of_the_connections_at_most_and_gets_them_back() {
        let peers = Peers::default();
        let (other, third, own) = ("192.0.2.1", "192.0.2.2", "127.0.0.1");
        let count = |peer: &str| peers.count(peer.parse().unwrap());
        let mut held: Vec<_> = (0..MOST_OF_A_PEER).map(|_| count(other).unwrap()).collect();
        assert!(count(other).is_none() && count(third).is_some());
        held.pop();
        assert!(count(other).is_some());
        let own: Vec<_> = (0..=MOST_OF_A_PEER).map(|_| count(own).unwrap()).collect();
        drop((held, own));
        assert!(peers.counts.lock().unwrap().is_empty());
    }
}
