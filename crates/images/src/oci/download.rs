//! Downloads layers into the cache: verified while they are written, and resumed after errors.

use crate::oci::cache::{LayerCache, PartialLayer};
use crate::oci::digest::Hasher;
use crate::oci::error::OciError;
use crate::oci::limits::{BLOB_GRACE, MIN_SPEED};
use crate::oci::manifest::Blob;
use crate::oci::registry::{Registry, next_chunk};
use crate::oci::task::{Phase, Task};
use bytes::Bytes as Chunk;
use futures::{StreamExt, TryStreamExt, stream};
use reqwest::StatusCode;
use scalebox_fault_points::fault_point;
use std::fs::File;
use std::io::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::task::spawn_blocking;
use tokio::time::{sleep, timeout};

/// Number of layers that are downloaded at a time, as container engines do.
const PARALLEL: usize = 3;
/// Number of received parts that wait for the disk.
const QUEUE: usize = 16;
/// Interval at which a pull checks whether another pull has finished a layer.
const WAIT: Duration = Duration::from_millis(200);

/// The layers of one image that are being downloaded.
pub(crate) struct Downloads<'d> {
    pub(crate) registry: &'d Registry,
    pub(crate) repository: &'d str,
    pub(crate) cache: &'d LayerCache,
    pub(crate) task: &'d Task,
    /// Bytes so far, and of all layers.
    done: AtomicU64,
    total: u64,
}

impl<'d> Downloads<'d> {
    pub(crate) fn new(
        registry: &'d Registry,
        repository: &'d str,
        cache: &'d LayerCache,
        task: &'d Task,
        total: u64,
    ) -> Self {
        Downloads {
            registry,
            repository,
            cache,
            task,
            done: AtomicU64::new(0),
            total,
        }
    }

    /// Returns all layers, open for reading, in their order.
    pub(crate) async fn all(&self, layers: &[Blob]) -> Result<Vec<File>, OciError> {
        // Futures do nothing before they are polled.
        let layers: Vec<_> = layers.iter().map(|layer| self.layer(layer)).collect();
        stream::iter(layers).buffered(PARALLEL).try_collect().await
    }

    /// Returns one layer: from the cache, or from the registry.
    async fn layer(&self, blob: &Blob) -> Result<File, OciError> {
        loop {
            let (cache, wanted) = (self.cache.clone(), blob.clone());
            let found = blocking(move || match cache.get(&wanted)? {
                Some(file) => Ok((Some(file), None)),
                None => Ok((None, cache.begin(&wanted.digest)?)),
            });
            match found.await? {
                (Some(file), _) => {
                    self.count(blob.size);
                    return Ok(file);
                }
                (None, None) => sleep(WAIT).await,
                (None, Some(partial)) => {
                    let before = AtomicU64::new(0);
                    let limit = BLOB_GRACE + Duration::from_secs(blob.size / MIN_SPEED);
                    let fetched = timeout(limit, self.fetch(blob, partial, &before)).await;
                    // The layer is counted again when it is found in the cache.
                    self.done.fetch_sub(before.load(Ordering::Relaxed), Ordering::Relaxed);
                    fetched.unwrap_or_else(|_| Err(self.too_slow(blob, limit)))?;
                }
            }
        }
    }

    fn too_slow(&self, blob: &Blob, limit: Duration) -> OciError {
        OciError::Deadline {
            host: self.registry.name().to_owned(),
            what: format!("the layer {}", blob.digest),
            seconds: limit.as_secs(),
        }
    }

    fn count(&self, bytes: u64) {
        let done = self.done.fetch_add(bytes, Ordering::Relaxed) + bytes;
        self.task.progress(Phase::Download, done.min(self.total), self.total);
    }

    /// Downloads a layer into the cache. `counted` becomes the number of bytes in the progress.
    async fn fetch(&self, blob: &Blob, partial: PartialLayer, counted: &AtomicU64) -> Result<(), OciError> {
        let room = self.task.reserve(blob.size)?;
        let (sender, chunks) = mpsc::channel(QUEUE);
        let expected = blob.clone();
        let writing = spawn_blocking(move || {
            let written = write(partial, chunks, &expected);
            drop(room);
            written
        });
        let received = self.receive(blob, sender, counted).await;
        let written = writing
            .await
            .unwrap_or_else(|error| Err(OciError::FileSystem(error.to_string())));
        match (received, written) {
            (Err(error), Err(OciError::WrongSize { .. })) => Err(error),
            // The receiver stopped because the disk failed.
            (_, Err(error)) => Err(error),
            (received, Ok(())) => received,
        }
    }

    /// Receives a layer. Retries for as long as each attempt makes progress.
    async fn receive(&self, blob: &Blob, sender: mpsc::Sender<Chunk>, counted: &AtomicU64) -> Result<(), OciError> {
        let (mut received, mut failures) = (0, 0);
        while received < blob.size {
            let before = received;
            let attempt = self.attempt(blob, &sender, &mut received, counted).await;
            failures = if received > before { 0 } else { failures };
            match attempt {
                Ok(()) if received < blob.size => {}
                Ok(()) => break,
                Err(error) if error.is_transient() => {
                    tracing::debug!(layer = %blob.digest, received, %error, "resuming a layer");
                    if failures + 1 >= self.registry.attempts() {
                        return Err(error);
                    }
                }
                Err(error) => return Err(error),
            }
            // Without an error, the body ended early, as it does when a connection is cut.
            if failures + 1 >= self.registry.attempts() {
                return Err(self.wrong_size(blob, received));
            }
            self.registry.pause(failures).await;
            failures += 1;
        }
        Ok(())
    }

    /// Receives the rest of a layer from one response.
    async fn attempt(
        &self,
        blob: &Blob,
        sender: &mpsc::Sender<Chunk>,
        received: &mut u64,
        counted: &AtomicU64,
    ) -> Result<(), OciError> {
        let digest = blob.digest.to_string();
        let mut response = self.registry.blob(self.repository, &digest, *received).await?;
        let mut skip = match response.status() {
            StatusCode::PARTIAL_CONTENT => 0,
            // The response begins at the start again.
            _ => *received,
        };
        let deadlines = *self.registry.deadlines();
        while let Some(mut chunk) = next_chunk(&mut response, self.registry.name(), deadlines.stall).await? {
            let skipped = skip.min(chunk.len() as u64);
            let chunk = chunk.split_off(skipped as usize);
            skip -= skipped;
            let length = chunk.len() as u64;
            if *received + length > blob.size {
                return Err(self.wrong_size(blob, *received + length));
            }
            *received += length;
            counted.fetch_add(length, Ordering::Relaxed);
            self.count(length);
            if sender.send(chunk).await.is_err() {
                // The writer reports the cause.
                return Err(OciError::Cancelled);
            }
        }
        Ok(())
    }

    fn wrong_size(&self, blob: &Blob, actual: u64) -> OciError {
        OciError::WrongSize {
            what: format!("the layer {}", blob.digest),
            expected: blob.size,
            actual,
        }
    }
}

/// Writes the received parts of a layer, and gives it its name if it has the expected digest.
fn write(mut partial: PartialLayer, mut chunks: mpsc::Receiver<Chunk>, expected: &Blob) -> Result<(), OciError> {
    let (mut hasher, mut size) = (Hasher::new(), 0);
    while let Some(chunk) = chunks.blocking_recv() {
        hasher.update(&chunk);
        size += chunk.len() as u64;
        partial
            .file
            .write_all(&chunk)
            .map_err(OciError::io("write", &partial.path))?;
    }
    fault_point("layer: written").map_err(OciError::io("write", &partial.path))?;
    let what = format!("the layer {}", expected.digest);
    if size != expected.size {
        return Err(OciError::WrongSize {
            what,
            expected: expected.size,
            actual: size,
        });
    }
    let actual = hasher.finish();
    if actual != expected.digest {
        return Err(OciError::WrongDigest {
            what,
            expected: expected.digest.to_string(),
            actual: actual.to_string(),
        });
    }
    partial.finish()
}

/// Runs work that waits for the disk.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, OciError> + Send + 'static,
) -> Result<T, OciError> {
    let done = spawn_blocking(work).await;
    done.unwrap_or_else(|error| Err(OciError::FileSystem(format!("a task panicked: {error}"))))
}
