//! The body of a request on its way to a guest.

use crate::host::error::ServiceError;
use crate::http::extract::{BODY_TIMEOUT, root_cause};
use axum::body::{Body, Bytes};
use futures::stream::{self, Stream, StreamExt};
use scalebox_guest::Upload;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::timeout;

/// Pieces that wait for the guest.
const MAX_BUFFERED: usize = 4;
/// Time limit for reading the rest of a body that is no longer needed.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(900);

/// The reason why a body did not arrive completely.
#[derive(Clone, Default)]
pub(crate) struct BodyFailure(Arc<Mutex<Option<ServiceError>>>);

impl BodyFailure {
    /// Returns the result of an upload. If its body failed, returns the error of the body.
    pub(crate) fn explain<T>(&self, result: Result<T, ServiceError>) -> Result<T, ServiceError> {
        let failure = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        result.map_err(|error| failure.unwrap_or(error))
    }

    fn set(&self, error: ServiceError) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
    }
}

/// Returns a body as an upload. Each piece must arrive within [`BODY_TIMEOUT`].
///
/// A task of its own reads the body, also after the upload has failed: otherwise, a client that
/// sends the whole body before it reads would not receive the response.
pub(crate) fn upload(body: Body) -> (Upload, BodyFailure) {
    let (sender, receiver) = mpsc::channel(MAX_BUFFERED);
    let failure = BodyFailure::default();
    tokio::spawn(forward(body, sender, failure.clone()));
    let pieces = stream::unfold(receiver, |mut receiver| async {
        let piece = receiver.recv().await?;
        Some((piece, receiver))
    });
    (Upload::stream(pieces), failure)
}

/// Reads a body until its end. An error is sent as the last piece.
async fn forward(body: Body, sender: mpsc::Sender<io::Result<Bytes>>, failure: BodyFailure) {
    let mut pieces = body.into_data_stream();
    loop {
        let error = match timeout(BODY_TIMEOUT, pieces.next()).await {
            Ok(None) => return,
            Ok(Some(Ok(piece))) => {
                if sender.send(Ok(piece)).await.is_ok() {
                    continue;
                }
                // The upload has ended without the rest.
                let _ = timeout(DRAIN_TIMEOUT, drain(pieces)).await;
                return;
            }
            Ok(Some(Err(error))) => ServiceError::invalid(format!(
                "cannot read the body: {}; send all of it, with Content-Length or in chunks",
                root_cause(&error)
            )),
            Err(_) => ServiceError::Timeout(format!(
                "the body is incomplete: no data received for {} s; send it again",
                BODY_TIMEOUT.as_secs()
            )),
        };
        let cause = io::Error::other(error.to_string());
        failure.set(error);
        // An error means that the upload has ended.
        let _ = sender.send(Err(cause)).await;
        return;
    }
}

async fn drain(mut pieces: impl Stream<Item = Result<Bytes, axum::Error>> + Unpin) {
    while let Ok(Some(Ok(_))) = timeout(BODY_TIMEOUT, pieces.next()).await {}
}
