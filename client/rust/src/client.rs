//! The client: one connection and the verbs that are not like others.

use std::{env, future::Future, pin::Pin, sync::Arc, time::Duration};

use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;
use tonic::client::Grpc;

use crate::{
    calls::Core,
    errors::{Error, Result},
    options::Options,
    stream::GenerateStream,
    v1::{GenerateRequest, Job, JobState, UnloadRequest, UnloadResponse, WatchJobRequest},
};

/// Where a server on this machine listens.
const DEFAULT_ADDRESS: &str = "127.0.0.1:50151";
const SERVER_DRAIN: Duration = Duration::from_secs(30);

/// Runs a connection's tasks until its client is closed.
struct Tasks(CancellationToken);

type Task = Pin<Box<dyn Future<Output = ()> + Send>>;

impl hyper::rt::Executor<Task> for Tasks {
    fn execute(&self, task: Task) {
        tokio::spawn(self.0.clone().run_until_cancelled_owned(task));
    }
}

/// A connection to one Lowbit server; clones share it.
///
/// A verb takes the message of its request, or what can be made into one: a name, or
/// `(model, prompt)`. Streams begin with their first read.
#[derive(Clone)]
pub struct Client {
    pub(crate) core: Arc<Core>,
    pub(crate) timeout: Option<Duration>,
}

impl Client {
    /// Makes a client inside a tokio runtime; it connects with its first call.
    ///
    /// An empty address takes `LOWBIT_ADDRESS`, or else `127.0.0.1:50151`. Fails when an option
    /// makes no sense.
    pub fn new(address: &str, options: Options) -> Result<Self> {
        if Handle::try_current().is_err() {
            return Err(Error::options("a client needs a tokio runtime to run in"));
        }
        let told = env::var("LOWBIT_ADDRESS").unwrap_or_default();
        let mut addresses = [address, &told].into_iter();
        let address = addresses.find(|address| !address.is_empty()).unwrap_or(DEFAULT_ADDRESS);
        let endpoint = options.endpoint(address)?;
        let authorization = options.authorization()?;
        let closed = CancellationToken::new();
        let channel = endpoint.executor(Tasks(closed.clone())).connect_lazy();
        let grpc = Grpc::new(channel).max_decoding_message_size(options.max_message_bytes);
        let core = Core { options, closed, grpc, authorization, spent: 0.into() };
        Ok(Self { core: Arc::new(core), timeout: None })
    }

    /// The same client with a deadline for each call, in place of the options'.
    pub fn with_timeout(&self, timeout: Duration) -> Self {
        Self { core: self.core.clone(), timeout: Some(timeout) }
    }

    /// Closes the connection, also for clones; what still runs is cancelled.
    pub fn close(&self) {
        self.core.closed.cancel();
    }

    /// Starts a generation, given `(model, prompt)`, a chat or a whole request.
    pub fn generate(&self, request: impl Into<GenerateRequest>) -> GenerateStream {
        let (request, timeout) = (request.into(), self.core.options.stream_timeout);
        let id = request.request_id.clone();
        let path = "/lowbit.v1.GenerationService/Generate";
        GenerateStream::new(id, self.open(path, request, timeout, true, None))
    }

    /// Takes a model off its devices once its streams have ended.
    pub async fn unload(&self, request: impl Into<UnloadRequest>) -> Result<UnloadResponse> {
        let request = request.into();
        let drain = request.drain_timeout.and_then(|time| time.try_into().ok());
        let timeout = self.core.options.call_timeout.saturating_add(drain.unwrap_or(SERVER_DRAIN));
        self.call("/lowbit.v1.ModelService/Unload", request, timeout, false).await
    }

    /// Waits until a job ends; fails when it did not succeed.
    pub async fn wait_job(&self, request: impl Into<WatchJobRequest>) -> Result<Job> {
        let request = request.into();
        let id = request.id.clone();
        let (mut events, mut job) = (self.watch_job(request), None);
        while let Some(event) = events.next().await {
            job = event?.job;
        }
        let job = match job {
            Some(job) => job,
            None => self.get_job(id).await?,
        };
        match job.state() {
            JobState::Succeeded => Ok(job),
            _ => Err(Error::job(job)),
        }
    }
}
