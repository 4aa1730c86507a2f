//! The streams that a client returns. Each one is cancelled when dropped.

use std::{
    collections::BTreeMap,
    fmt,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{ready, Context, Poll},
};

use futures_util::stream::{Stream, StreamExt};
use tokio_util::sync::CancellationToken;
use tonic::Status;

use crate::{
    errors::Result,
    v1::{
        generate_response::Event, Completed, Delta, GenerateResponse, LoadResponse, OutputFinished,
        Started, Token,
    },
};

type Inner<T> = Pin<Box<dyn Stream<Item = Result<T>> + Send>>;

/// A stream of messages. Dropping it cancels the call.
pub struct Messages<T> {
    inner: Arc<Mutex<Option<Inner<T>>>>,
    token: CancellationToken,
    ended: bool,
}

/// Cancels a stream from anywhere.
#[derive(Clone)]
pub struct Canceller(Arc<dyn Fn() + Send + Sync>);

impl Canceller {
    /// Cancels the call on the server; does nothing when it has ended.
    pub fn cancel(&self) {
        self.0()
    }
}

impl<T: 'static> Messages<T> {
    /// Gives the messages of a stream until it is cancelled; `closed` cancels it too.
    pub(crate) fn new(
        closed: &CancellationToken,
        messages: impl Stream<Item = Result<T>> + Send + 'static,
    ) -> Self {
        let token = closed.child_token();
        let inner: Inner<T> = Box::pin(messages.take_until(token.clone().cancelled_owned()));
        Self { inner: Arc::new(Mutex::new(Some(inner))), token, ended: false }
    }

    /// The next message, or how the stream failed; nothing after its end.
    pub async fn next(&mut self) -> Option<Result<T>> {
        StreamExt::next(self).await
    }

    /// Cancels the call; reading on gives an error of [`Kind::Cancelled`](crate::Kind::Cancelled) once.
    pub fn cancel(&self) {
        self.canceller().cancel();
    }

    /// What cancels this stream while somebody reads it.
    pub fn canceller(&self) -> Canceller {
        let (inner, token) = (Arc::downgrade(&self.inner), self.token.clone());
        Canceller(Arc::new(move || {
            token.cancel(); // wakes the reader
            drop(inner.upgrade().and_then(|inner| lock(&inner).take()));
        }))
    }
}

fn lock<T>(inner: &Mutex<T>) -> MutexGuard<'_, T> {
    inner.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<T> Stream for Messages<T> {
    type Item = Result<T>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<T>>> {
        if self.ended {
            return Poll::Ready(None);
        }
        let mut item = match lock(&self.inner).as_mut() {
            Some(inner) => ready!(inner.as_mut().poll_next(context)),
            None => None,
        };
        if item.is_none() && self.token.is_cancelled() {
            item = Some(Err(Status::cancelled("cancelled by the caller").into()));
        }
        if !matches!(item, Some(Ok(_))) {
            self.ended = true;
            drop(lock(&self.inner).take());
        }
        Poll::Ready(item)
    }
}

impl<T> fmt::Debug for Messages<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Messages").field("ended", &self.ended).finish_non_exhaustive()
    }
}

impl Messages<LoadResponse> {
    /// Reads to the end; gives the last message of each replica.
    pub async fn wait(mut self) -> Result<Vec<LoadResponse>> {
        let mut last: Vec<LoadResponse> = Vec::new();
        while let Some(message) = self.next().await {
            let message = message?;
            let same = |seen: &&mut LoadResponse| {
                (&seen.device, &seen.worker) == (&message.device, &message.worker)
            };
            match last.iter_mut().find(same) {
                Some(seen) => *seen = message,
                None => last.push(message),
            }
        }
        Ok(last)
    }
}

/// What one message of the server added to an output; printed it is its text.
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct Chunk {
    /// Text that follows what came before; whole characters, may be empty.
    pub text: String,
    /// Ids of the tokens that made it, when asked for.
    pub token_ids: Vec<u32>,
    /// The same with their log-probabilities, when these were asked for.
    pub tokens: Vec<Token>,
    /// Which output it belongs to, from 0.
    pub output_index: u32,
}

impl fmt::Display for Chunk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// A generation. Reading gives chunks; the rest is known once it has come.
#[derive(Debug)]
pub struct GenerateStream {
    request_id: String,
    messages: Messages<GenerateResponse>,
    started: Option<Started>,
    finished: BTreeMap<u32, OutputFinished>,
    completed: Option<Completed>,
    texts: Vec<String>,
}

impl GenerateStream {
    pub(crate) fn new(request_id: String, messages: Messages<GenerateResponse>) -> Self {
        let (started, finished, completed, texts) = (None, BTreeMap::new(), None, Vec::new());
        Self { request_id, messages, started, finished, completed, texts }
    }

    /// The next chunk, or how the generation failed; nothing after its end.
    pub async fn next(&mut self) -> Option<Result<Chunk>> {
        StreamExt::next(self).await
    }

    /// Reads to the end; gives all text of the first output, what was read before included.
    pub async fn text(&mut self) -> Result<&str> {
        self.texts().await?;
        Ok(self.partial_text())
    }

    /// Does what `text` does; gives the texts of all outputs, by their index.
    pub async fn texts(&mut self) -> Result<&[String]> {
        while let Some(chunk) = self.next().await {
            chunk?;
        }
        Ok(&self.texts)
    }

    /// Text of the first output that has been read so far; stays after a failure.
    pub fn partial_text(&self) -> &str {
        self.texts.first().map_or("", String::as_str)
    }

    /// Model revision, device and prompt tokens.
    pub fn started(&self) -> Option<&Started> {
        self.started.as_ref()
    }

    /// Why the first output ended and at which stop.
    pub fn finished(&self) -> Option<&OutputFinished> {
        self.finished.get(&0)
    }

    /// Why each output ended and at which stop, by its index; those that have.
    pub fn all_finished(&self) -> &BTreeMap<u32, OutputFinished> {
        &self.finished
    }

    /// Tokens used and where the time went, once the stream has ended well.
    pub fn completed(&self) -> Option<&Completed> {
        self.completed.as_ref()
    }

    /// The text of an output, which begins with its first event.
    fn text_mut(&mut self, index: u32) -> &mut String {
        let index = index as usize;
        self.texts.resize(self.texts.len().max(index + 1), String::new());
        &mut self.texts[index]
    }

    /// Cancels the call; reading on gives an error of [`Kind::Cancelled`](crate::Kind::Cancelled) once.
    pub fn cancel(&self) {
        self.messages.cancel();
    }

    /// What cancels this stream while somebody reads it.
    pub fn canceller(&self) -> Canceller {
        self.messages.canceller()
    }
}

impl Stream for GenerateStream {
    type Item = Result<Chunk>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        while let Some(message) = ready!(Pin::new(&mut self.messages).poll_next(context)) {
            match message.map_err(|error| error.named(&self.request_id))?.event {
                Some(Event::Started(started)) => self.started = Some(started),
                Some(Event::OutputFinished(finished)) => {
                    self.text_mut(finished.output_index);
                    self.finished.insert(finished.output_index, finished);
                }
                Some(Event::Completed(completed)) => self.completed = Some(completed),
                Some(Event::Delta(delta)) => {
                    self.text_mut(delta.output_index).push_str(&delta.text);
                    let token_ids = delta.tokens.iter().map(|token| token.id).collect();
                    let Delta { text, tokens, output_index } = delta;
                    return Poll::Ready(Some(Ok(Chunk { text, token_ids, tokens, output_index })));
                }
                None => {}
            }
        }
        Poll::Ready(None)
    }
}
