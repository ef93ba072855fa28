//! Steps that can be taken back: each is pushed with its undo, and a failure runs the undos, last
//! first.

use std::future::Future;
use std::pin::Pin;

type Undo = Pin<Box<dyn Future<Output = Result<(), String>> + Send>>;

/// The undos of the steps taken so far. Dropped without [`Steps::undo_all`], it undoes nothing: the
/// steps stand.
#[derive(Default)]
pub struct Steps {
    taken: Vec<(&'static str, Undo)>,
}

impl Steps {
    /// No step yet.
    pub fn new() -> Steps {
        Steps::default()
    }

    /// A step was taken; `undo` takes it back. The future is only run when it is needed.
    pub fn taken<E: std::fmt::Display>(
        &mut self,
        step: &'static str,
        undo: impl Future<Output = Result<(), E>> + Send + 'static,
    ) {
        self.taken.push((
            step,
            Box::pin(async move { undo.await.map_err(|error| error.to_string()) }),
        ));
    }

    /// Takes all steps back, last first. One that fails is logged, and the others are still taken
    /// back: what is left of it is found at the next start.
    pub async fn undo_all(mut self) {
        while let Some((step, undo)) = self.taken.pop() {
            match undo.await {
                Ok(()) => tracing::debug!(step, "undone"),
                Err(error) => tracing::warn!(step, error, "a step could not be undone; the next start puts it right"),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};

    #[tokio::test]
    async fn steps_are_undone_last_first_and_a_failing_undo_does_not_stop_the_others() {
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
