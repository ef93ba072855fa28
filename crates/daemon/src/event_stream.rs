//! `GET /events`: the host's events as server-sent events
//! (<https://html.spec.whatwg.org/multipage/server-sent-events.html>).

use crate::error::ServiceError;
use crate::events::Subscription;
use crate::openapi::MAX_EVENT_ID;
use crate::service::Service;
use axum::extract::{Query, State};
use axum::http::{HeaderMap, HeaderName};
use axum::response::sse::{KeepAlive, KeepAliveStream, Sse};
use axum::response::{IntoResponse, sse};
use futures::future;
use futures::stream::{self, Stream, StreamExt};
use scalebox_client::Event;
use serde::Deserialize;
use std::sync::Arc;
use std::time::Duration;

const LAST_EVENT_ID: HeaderName = HeaderName::from_static("last-event-id");
/// How often a silent stream gives a sign of life, so that neither a proxy nor a client takes it
/// for dead.
const SIGN_OF_LIFE: Duration = Duration::from_secs(15);

/// What `GET /events` may be asked with.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Wish {
    since: Option<String>,
    follow: Option<bool>,
}

/// Answers with events: after `since`, or after the header `Last-Event-ID`, which wins, because a
/// browser that reconnects repeats the query.
#[utoipa::path(
    get, path = "/events", tag = "Host",
    params(
        ("since" = Option<u64>, Query, description = "Begin after this event; 0 for all that the daemon still knows."),
        ("follow" = Option<bool>, Query, description = "False ends with what happened so far."),
        ("Last-Event-ID" = Option<u64>, Header, description = "Goes before `since`: browsers send it when they reconnect."),
    ),
    responses(
        (status = 200, content_type = "text/event-stream", body = Event, description = "Server-sent events; each one's data is an event."),
        (status = 400, description = "A query that is not understood."),
    )
)]
pub async fn events(
    State(service): State<Service>,
    headers: HeaderMap,
    wish: Result<Query<Wish>, axum::extract::rejection::QueryRejection>,
) -> Result<impl IntoResponse, ServiceError> {
    let wrong = || {
        ServiceError::invalid(format!(
            "the query may hold since=ID, a whole number up to {MAX_EVENT_ID}, and follow=true or follow=false, each once"
        ))
    };
    let Query(wish) = wish.map_err(|_| wrong())?;
    let since = wish
        .since
        .as_deref()
        .map(|id| event_id(id).ok_or_else(wrong))
        .transpose()?;
    let last = headers.get(LAST_EVENT_ID).map(|id| {
        let id = id.to_str().ok().and_then(|id| event_id(id.trim()));
        id.ok_or_else(|| {
            let form =
                format!("the header Last-Event-ID must be the id of an event, a whole number up to {MAX_EVENT_ID}");
            ServiceError::invalid(form)
        })
    });
    let since = last.transpose()?.or(since);
    let subscription = service.inner().events.subscribe(since, wish.follow.unwrap_or(true));
    Ok(sse(subscription))
}

/// Digits alone: a number's parser would take a plus sign too.
fn event_id(text: &str) -> Option<u64> {
    let id = text.bytes().all(|byte| byte.is_ascii_digit()).then_some(text)?;
    id.parse().ok().filter(|id| *id <= MAX_EVENT_ID)
}

fn sse(subscription: Subscription) -> Sse<KeepAliveStream<impl Stream<Item = Result<sse::Event, axum::Error>>>> {
    // Even who is never told an event knows where to go on.
    let place = sse::Event::default()
        .id(subscription.seen().to_string())
        .comment("here");
    let events = stream::unfold(subscription, |mut subscription| async {
        let event = subscription.next().await?;
        let line = sse::Event::default()
            .id(event.id.to_string())
            .event(event.kind.as_str())
            .json_data(Arc::as_ref(&event));
        Some((line, subscription))
    });
    let stream = stream::once(future::ready(Ok(place))).chain(events);
    Sse::new(stream).keep_alive(KeepAlive::new().interval(SIGN_OF_LIFE))
}
