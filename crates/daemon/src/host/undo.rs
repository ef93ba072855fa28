//! Undo steps: each completed step is pushed with its undo; on a failure, the undos run in reverse
//! order.

use std::future::Future;
use std::pin::Pin;

type Undo = Pin<Box<dyn Future<Output = Result<(), String>> + Send>>;

/// The undos of the completed steps. Dropping it without [`Steps::undo_all`] keeps the steps.
#[derive(Default)]
pub(crate) struct Steps {
    taken: Vec<(&'static str, Undo)>,
}

impl Steps {
    /// Creates an empty list.
    pub(crate) fn new() -> Steps {
        Steps::default()
    }

    /// Adds a completed step with its undo. The future is polled only if it is needed.
    pub(crate) fn taken<E: std::fmt::Display>(
        &mut self,
        step: &'static str,
        undo: impl Future<Output = Result<(), E>> + Send + 'static,
    ) {
        self.taken.push((
            step,
            Box::pin(async move { undo.await.map_err(|error| error.to_string()) }),
        ));
    }

    /// Undoes all steps in reverse order. An undo that fails is logged and does not stop the
    /// others; the next start cleans up after it.
    pub(crate) async fn undo_all(mut self) {
        while let Some((step, undo)) = self.taken.pop() {
            match undo.await {
                Ok(()) => tracing::debug!(step, "step undone"),
                Err(error) => tracing::warn!(step, error, "cannot undo a step; the next start cleans up"),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};

    #[tokio::test]
    async fn steps_are_undone_in_reverse_order_and_a_failed_undo_does_not_stop_the_others() {
        let order = Arc::new(Mutex::new(Vec::new()));
        let mut steps = Steps::new();
        for step in ["first", "second", "third"] {
            let order = Arc::clone(&order);
            steps.taken(step, async move {
                order.lock().unwrap().push(step);
                if step == "second" { Err("no") } else { Ok(()) }
            });
        }
        steps.undo_all().await;
        assert_eq!(*order.lock().unwrap(), ["third", "second", "first"]);
    }
}
