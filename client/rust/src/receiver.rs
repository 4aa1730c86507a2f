//! A stream of the server: tried again until its first message, resumed after it.

use std::{future::Future, pin::Pin, sync::Arc, time::Duration};

use prost::Message;
use tokio::time::{sleep, timeout_at, Instant};
use tonic::{Code, Request, Response, Status, Streaming};

use crate::{
    calls::Core,
    errors::{Error, Kind, Result},
    retry::{wait, Tries},
};

pub(crate) type Opening<R> =
    Pin<Box<dyn Future<Output = std::result::Result<Response<Streaming<R>>, Status>> + Send>>;

/// Turns the request into that of what follows a message.
pub(crate) type Resume<M, R> = fn(&mut M, &R);

/// The messages of one call, over all its tries.
pub(crate) struct Receiver<M, R> {
    core: Arc<Core>,
    tries: Tries,
    request: M,
    /// Nothing for a call that may not be made again once it had a message.
    resume: Option<Resume<M, R>>,
    send: Box<dyn Fn(Request<M>) -> Opening<R> + Send + Sync>,
    call: Option<Streaming<R>>,
    seen: bool,
    breaks: u32,
    /// When the time to resume after a break is over.
    until: Option<Instant>,
}

impl<M: Message + Clone, R> Receiver<M, R> {
    pub(crate) fn new(
        core: Arc<Core>,
        tries: Tries,
        request: M,
        resume: Option<Resume<M, R>>,
        send: impl Fn(Request<M>) -> Opening<R> + Send + Sync + 'static,
    ) -> Self {
        let (send, call) = (Box::new(send), None);
        Self { core, tries, request, resume, send, call, seen: false, breaks: 0, until: None }
    }

    /// The next message; nothing at the end.
    pub(crate) async fn read(&mut self) -> Result<Option<R>> {
        loop {
            let error = match self.attempt().await {
                Ok(message) => {
                    if !self.seen {
                        self.core.budget.refund(&self.core.options);
                    }
                    (self.seen, self.breaks, self.until) = (true, 0, None);
                    if let (Some(resume), Some(message)) = (self.resume, &message) {
                        resume(&mut self.request, message);
                    }
                    return Ok(message);
                }
                Err(error) => error,
            };
            self.call = None;
            let wait = match self.seen {
                false => self.tries.wait(&error, &self.core.options, &self.core.budget),
                true => self.wait(&error),
            };
            match wait {
                Some(wait) => sleep(wait).await,
                None => return Err(error),
            }
        }
    }

    async fn attempt(&mut self) -> Result<Option<R>> {
        let (deadline, until) = (self.tries.deadline, self.until);
        let read = async {
            let call = match &mut self.call {
                Some(call) => call,
                none => {
                    let request = self.core.request(self.request.clone(), deadline)?;
                    none.insert((self.send)(request).await?.into_inner())
                }
            };
            call.message().await
        };
        let limit = deadline.into_iter().chain(until).min();
        match limited(limit, read).await {
            Some(result) => Ok(result?),
            None if limit == deadline => Err(Error::deadline()),
            None => Err(Error::new(
                Kind::Unavailable,
                Code::Unavailable,
                "the server did not come back",
            )),
        }
    }

    /// The wait before a stream that broke goes on; nothing when it does not.
    fn wait(&mut self, error: &Error) -> Option<Duration> {
        let refused = self.until.is_some() && error.retry_after.is_some();
        if self.resume.is_none() || !(error.is_broken() || refused) {
            return None;
        }
        let now = Instant::now();
        let until = *self.until.get_or_insert(now + self.core.options.resume_timeout);
        self.breaks += 1;
        let wait = wait(error, &self.core.options, self.breaks);
        (now + wait < until && self.tries.allows(wait)).then_some(wait)
    }
}

/// Waits for a result until `limit`; gives nothing when the time is over.
pub(crate) async fn limited<F: Future>(limit: Option<Instant>, work: F) -> Option<F::Output> {
    match limit {
        Some(limit) => timeout_at(limit, work).await.ok(),
        None => Some(work.await),
    }
}
