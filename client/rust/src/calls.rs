//! Calls over one connection: their tries, deadlines and resumption.

use std::{
    collections::hash_map::RandomState,
    hash::BuildHasher,
    sync::{
        atomic::{AtomicU64, Ordering::Relaxed},
        Arc,
    },
    time::Duration,
};

use futures_util::stream::{try_unfold, TryStreamExt};
use prost::Message;
use tokio::time::{sleep, timeout_at, Instant};
use tokio_util::sync::CancellationToken;
use tonic::{
    client::Grpc,
    codegen::http::uri::PathAndQuery,
    metadata::{Ascii, MetadataValue},
    transport::Channel,
    Code, Request, Status, Streaming,
};
use tonic_prost::ProstCodec;

use crate::{
    client::Client,
    errors::{Error, Result},
    options::Options,
    stream::Messages,
};

/// What the clones of a client share.
pub(crate) struct Core {
    pub(crate) options: Options,
    pub(crate) closed: CancellationToken,
    pub(crate) grpc: Grpc<Channel>,
    pub(crate) authorization: Option<MetadataValue<Ascii>>,
    /// Tenths of retries taken from the budget.
    pub(crate) spent: AtomicU64,
}

impl Core {
    /// Takes a retry from the budget; tells whether there was one.
    fn spend(&self) -> bool {
        let all = u64::from(self.options.retry_budget) * 10;
        let more = |spent| Some(spent + 10).filter(|spent| *spent <= all);
        self.spent.fetch_update(Relaxed, Relaxed, more).is_ok()
    }

    /// Gives back a tenth of a retry after a success.
    fn refund(&self) {
        let _ = self.spent.fetch_update(Relaxed, Relaxed, |spent| spent.checked_sub(1));
    }
}

/// Turns the request into that of what follows a message.
pub(crate) type Resume<M, R> = fn(&mut M, &R);

/// A call over all its tries.
struct Call<M, R> {
    core: Arc<Core>,
    path: &'static str,
    request: M,
    /// Bounds all tries together.
    deadline: Option<Instant>,
    /// Whether a second try has the effect of one.
    again: bool,
    /// Nothing where the call may not be made again once it had a message.
    resume: Option<Resume<M, R>>,
    /// What the last try reads from.
    stream: Option<Streaming<R>>,
    seen: bool,
    /// Failures since the last message, and when the time to resume after them is over.
    failures: u32,
    until: Option<Instant>,
}

impl<M: Message + Clone + 'static, R: Message + Default + 'static> Call<M, R> {
    /// The next message; nothing at the end.
    async fn read(&mut self) -> Result<Option<R>> {
        let message = loop {
            let error = match self.attempt().await {
                Ok(message) => break message,
                Err(error) => error,
            };
            self.stream = None;
            sleep(self.wait(&error).ok_or(error)?).await;
        };
        if !self.seen {
            self.core.refund();
        }
        (self.seen, self.failures, self.until) = (true, 0, None);
        if let (Some(resume), Some(message)) = (self.resume, &message) {
            resume(&mut self.request, message);
        }
        Ok(message)
    }

    /// Reads from the stream of the last try, or else makes one.
    async fn attempt(&mut self) -> Result<Option<R>> {
        let (limit, deadline) = (self.limit(), self.deadline);
        let attempt = async {
            let stream = match self.stream.take() {
                Some(stream) => stream,
                None => self.send().await?,
            };
            Ok(self.stream.insert(stream).message().await?)
        };
        let Some(limit) = limit else { return attempt.await };
        timeout_at(limit, attempt).await.unwrap_or_else(|_| match deadline {
            Some(deadline) if deadline == limit => {
                Err(Status::deadline_exceeded("the call ran out of time").into())
            }
            _ => Err(Status::unavailable("the server did not come back").into()),
        })
    }

    /// Makes one try.
    async fn send(&self) -> Result<Streaming<R>> {
        let Core { options, grpc, authorization, .. } = &*self.core;
        let (bytes, most) = (self.request.encoded_len(), options.max_message_bytes);
        if bytes > most {
            let told = format!("the request has {bytes} bytes, max_message_bytes is {most}");
            return Err(Status::resource_exhausted(told).into());
        }
        let mut request = Request::new(self.request.clone());
        if let Some(deadline) = self.deadline {
            request.set_timeout(deadline - Instant::now());
        }
        let trace = options.traceparent.as_ref().and_then(|make| make()?.parse().ok());
        for (name, value) in [("authorization", authorization.clone()), ("traceparent", trace)] {
            if let Some(value) = value {
                request.metadata_mut().insert(name, value);
            }
        }
        let mut grpc = grpc.clone();
        grpc.ready().await.map_err(|error| Status::from_error(error.into()))?;
        let path = PathAndQuery::from_static(self.path);
        Ok(grpc.server_streaming(request, path, ProstCodec::default()).await?.into_inner())
    }

    /// The wait before the next try; nothing when there is to be none.
    fn wait(&mut self, error: &Error) -> Option<Duration> {
        let options = &self.core.options;
        self.failures += 1;
        let named = error.retry_after.is_some();
        let may = if self.seen {
            let resume_time = Instant::now().checked_add(options.resume_timeout);
            self.until = self.until.or(resume_time);
            self.resume.is_some() && (error.is_broken() || named && self.failures > 1)
        } else {
            let safe = error.code == Code::Unavailable && (self.again || error.not_connected);
            self.failures < options.max_attempts && (named || safe)
        };
        let random = random() as f64 / u64::MAX as f64;
        let backoff = options.first_backoff.saturating_mul(1 << (self.failures - 1).min(31));
        let wait = match error.retry_after {
            Some(time) => time.mul_f64(1.0 + random / 10.0),
            None => backoff.min(options.max_backoff).mul_f64(0.5 + random / 2.0),
        };
        let in_time = self.limit().is_none_or(|limit| wait < limit - Instant::now());
        (may && in_time && (self.seen || self.core.spend())).then_some(wait)
    }

    /// When the time of a try is over.
    fn limit(&self) -> Option<Instant> {
        self.deadline.into_iter().chain(self.until).min()
    }
}

/// A random number; no secret depends on it.
fn random() -> u64 {
    RandomState::new().hash_one(0)
}

pub(crate) fn new_request_id() -> String {
    format!("{:016x}{:016x}", random(), random())
}

impl Client {
    /// Makes a call with one answer; `timeout` bounds all its tries.
    pub(crate) async fn call<M: Message + Clone + 'static, R: Message + Default + 'static>(
        &self,
        path: &'static str,
        request: M,
        timeout: Duration,
        again: bool,
    ) -> Result<R> {
        let messages = self.open(path, request, Some(timeout), again, None);
        let mut answers: Vec<R> = messages.try_collect().await?;
        answers.pop().ok_or_else(|| Status::internal("the server gave no answer").into())
    }

    /// Makes a call with a stream of answers; with `resume` it goes on after a broken connection.
    pub(crate) fn open<M: Message + Clone + 'static, R: Message + Default + 'static>(
        &self,
        path: &'static str,
        request: M,
        timeout: Option<Duration>,
        again: bool,
        resume: Option<Resume<M, R>>,
    ) -> Messages<R> {
        let core = self.core.clone();
        // A timeout beyond what the clock can count is none.
        let deadline = self.timeout.or(timeout).and_then(|time| Instant::now().checked_add(time));
        let (stream, seen, failures, until) = (None, false, 0, None);
        let call =
            Call { core, path, request, deadline, again, resume, stream, seen, failures, until };
        let messages = try_unfold(call, |mut call| async {
            Ok(call.read().await?.map(|message| (message, call)))
        });
        Messages::new(&self.core.closed, messages)
    }
}
