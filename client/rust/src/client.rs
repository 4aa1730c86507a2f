//! The client: one connection and the verbs of all services.

use std::{
    env,
    future::Future,
    pin::Pin,
    sync::{
        atomic::{AtomicU64, Ordering},
        Arc,
    },
    time::Duration,
};

use prost::Message;
use tokio::time::{sleep, Instant};
use tokio_util::sync::CancellationToken;
use tonic::{
    metadata::{Ascii, MetadataValue},
    transport::Channel,
    Request, Response, Status, Streaming,
};

use crate::{
    errors::{Error, Result},
    options::{Options, DEFAULT_ADDRESS},
    retry::{random, Budget, Tries},
    stream::{limited, GenerateStream, Messages, Receiver},
    v1::{
        generation_service_client::GenerationServiceClient, job_service_client::JobServiceClient,
        model_service_client::ModelServiceClient,
        quantization_service_client::QuantizationServiceClient,
        runtime_service_client::RuntimeServiceClient, *,
    },
};

const SERVER_DRAIN: Duration = Duration::from_secs(30);

/// A connection to one Lowbit server; clones share it.
///
/// A verb takes the message of its request, or what can be made into one: a name, or
/// `(model, prompt)`. Streams begin with their first read.
#[derive(Clone)]
pub struct Client {
    core: Arc<Core>,
    timeout: Option<Duration>,
}

pub(crate) struct Core {
    pub(crate) options: Options,
    pub(crate) budget: Budget,
    pub(crate) closed: CancellationToken,
    authorization: Option<MetadataValue<Ascii>>,
    address: String,
    generation: GenerationServiceClient<Channel>,
    jobs: JobServiceClient<Channel>,
    models: ModelServiceClient<Channel>,
    quantization: QuantizationServiceClient<Channel>,
    runtime: RuntimeServiceClient<Channel>,
}

/// Runs a connection's tasks until its client is closed.
struct Tasks(CancellationToken);

/// Sees each message of a stream that resumes.
type Note<R> = Box<dyn Fn(&R) + Send + Sync>;

type Task = Pin<Box<dyn Future<Output = ()> + Send>>;

impl hyper::rt::Executor<Task> for Tasks {
    fn execute(&self, task: Task) {
        tokio::spawn(self.0.clone().run_until_cancelled_owned(task));
    }
}

impl Core {
    /// Dresses a message for one try.
    fn request<M: Message>(
        &self,
        message: M,
        deadline: Option<Instant>,
    ) -> std::result::Result<Request<M>, Status> {
        let (bytes, most) = (message.encoded_len(), self.options.max_message_bytes);
        if bytes > most {
            let told = format!("the request has {bytes} bytes, max_message_bytes is {most}");
            return Err(Status::resource_exhausted(told));
        }
        let mut request = Request::new(message);
        if let Some(deadline) = deadline {
            request.set_timeout(deadline.saturating_duration_since(Instant::now()));
        }
        let metadata = request.metadata_mut();
        if let Some(authorization) = &self.authorization {
            metadata.insert("authorization", authorization.clone());
        }
        let trace = self.options.traceparent.as_ref().and_then(|make| make());
        if let Some(Ok(trace)) = trace.map(|trace| trace.parse()) {
            metadata.insert("traceparent", trace);
        }
        Ok(request)
    }
}

/// A function that sends a request to a method of a stub.
macro_rules! rpc {
    ($self:ident.$stub:ident.$method:ident) => {{
        let stub = $self.core.$stub.clone();
        move |request| {
            let mut stub = stub.clone();
            async move { stub.$method(request).await }
        }
    }};
}

/// Verbs with one answer: `again` where a second call has the effect of one.
macro_rules! verbs {
    ($($(#[$doc:meta])* $stub:ident.$verb:ident($request:ty) -> $gives:ty:
        $again:ident, $timeout:ident, |$answer:ident| $get:expr;)*) => {
        impl Client { $(
            $(#[$doc])*
            pub async fn $verb(&self, request: impl Into<$request>) -> Result<$gives> {
                let timeout = self.core.options.$timeout;
                let $answer = self.call(request.into(), timeout, $again, rpc!(self.$stub.$verb)).await?;
                Ok($get)
            }
        )* }
    };
}

#[allow(non_upper_case_globals)]
const again: bool = true;
#[allow(non_upper_case_globals)]
const once: bool = false;

verbs! {
    /// Turns text or a chat into token ids, as `generate` would.
    generation.tokenize(TokenizeRequest) -> TokenizeResponse: again, call_timeout, |answer| answer;
    /// Turns token ids into text.
    generation.detokenize(DetokenizeRequest) -> String: again, call_timeout, |answer| answer.text;
    /// Gives the log-probabilities of continuations.
    generation.score(ScoreRequest) -> ScoreResponse: again, slow_call_timeout, |answer| answer;
    /// Gives a model by name or alias.
    models.get_model(GetModelRequest) -> Model: again, call_timeout, |answer| answer.model.unwrap_or_default();
    /// Removes a model and its aliases from the store.
    models.delete_model(DeleteModelRequest) -> (): once, call_timeout, |_answer| ();
    /// Hashes a model's files again.
    models.verify_model(VerifyModelRequest) -> VerifyModelResponse: again, slow_call_timeout, |answer| answer;
    /// Estimates what a model would take on each device, from headers only.
    models.estimate_load(EstimateLoadRequest) -> EstimateLoadResponse: again, call_timeout, |answer| answer;
    /// Lets an alias point at a model, or removes it when the model is empty.
    models.set_alias(SetAliasRequest) -> (): again, call_timeout, |_answer| ();
    /// Estimates bytes and time before any work, from headers only.
    quantization.estimate_quantization(EstimateQuantizationRequest) -> EstimateQuantizationResponse:
        again, call_timeout, |answer| answer;
    /// Gives a job by its id.
    jobs.get_job(GetJobRequest) -> Job: again, call_timeout, |answer| answer.job.unwrap_or_default();
    /// Asks a job to stop. A job that has ended stays as it is.
    jobs.cancel_job(CancelJobRequest) -> Job: again, call_timeout, |answer| answer.job.unwrap_or_default();
    /// Goes on with a job that was cancelled or interrupted.
    jobs.resume_job(ResumeJobRequest) -> Job: once, call_timeout, |answer| answer.job.unwrap_or_default();
    /// Removes the record of an ended job; what it made stays.
    jobs.delete_job(DeleteJobRequest) -> (): once, call_timeout, |_answer| ();
}

/// Verbs that start a job; they make a `request_id`, so that a second try is the same job.
macro_rules! starters {
    ($($(#[$doc:meta])* $stub:ident.$verb:ident($request:ty) $(unless $dry:ident)?;)*) => {
        impl Client { $(
            $(#[$doc])*
            pub async fn $verb(&self, request: impl Into<$request>) -> Result<Job> {
                let mut request = request.into();
                if request.request_id.is_empty() $(&& !request.$dry)? {
                    request.request_id = format!("{:016x}{:016x}", random(), random());
                }
                let (id, timeout) = (request.request_id.clone(), self.core.options.call_timeout);
                let answer = self.call(request, timeout, again, rpc!(self.$stub.$verb)).await;
                Ok(answer.map_err(|error| error.named(&id))?.job.unwrap_or_default())
            }
        )* }
    };
}

starters! {
    /// Starts a job that brings a model into the store.
    models.import_model(ImportModelRequest) unless validate_only;
    /// Starts a job that makes a smaller copy of a model.
    quantization.quantize(QuantizeRequest) unless validate_only;
    /// Starts a job that measures a model against another on held-out text.
    quantization.evaluate(EvaluateRequest);
}

impl Client {
    /// Makes a client inside a tokio runtime; it connects with its first call.
    ///
    /// An empty address takes `LOWBIT_ADDRESS`, or else [`DEFAULT_ADDRESS`]. Fails when an
    /// option makes no sense.
    pub fn new(address: &str, options: Options) -> Result<Self> {
        if tokio::runtime::Handle::try_current().is_err() {
            return Err(Error::options("a client needs a tokio runtime to run in"));
        }
        let mut address = address.to_owned();
        if address.is_empty() {
            address = env::var("LOWBIT_ADDRESS").unwrap_or_default();
        }
        if address.is_empty() {
            address = DEFAULT_ADDRESS.to_owned();
        }
        let (endpoint, authorization) = options.endpoint(&address)?;
        let closed = CancellationToken::new();
        let channel = endpoint.executor(Tasks(closed.clone())).connect_lazy();
        let size = options.max_message_bytes;
        macro_rules! stub {
            ($stub:ident) => {
                $stub::new(channel.clone()).max_decoding_message_size(size)
            };
        }
        let core = Core {
            budget: Budget::new(&options),
            options,
            closed,
            authorization,
            address,
            generation: stub!(GenerationServiceClient),
            jobs: stub!(JobServiceClient),
            models: stub!(ModelServiceClient),
            quantization: stub!(QuantizationServiceClient),
            runtime: stub!(RuntimeServiceClient),
        };
        Ok(Self { core: Arc::new(core), timeout: None })
    }

    /// HOST:PORT of the server.
    pub fn address(&self) -> &str {
        &self.core.address
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
        let request = request.into();
        let timeout = self.core.options.stream_timeout;
        let id = request.request_id.clone();
        GenerateStream::new(self.open(
            timeout,
            id,
            move || request.clone(),
            rpc!(self.generation.generate),
            None,
        ))
    }

    /// Starts to load a model and gives its progress. The load is cancelled with its last reader.
    pub fn load(&self, request: impl Into<LoadRequest>) -> Messages<LoadResponse> {
        let (request, timeout) = (request.into(), self.core.options.stream_timeout);
        self.open(
            timeout,
            String::new(),
            move || request.clone(),
            rpc!(self.models.load),
            Some(Box::new(|_| {})),
        )
    }

    /// Takes a model off its devices once its streams have ended.
    pub async fn unload(&self, request: impl Into<UnloadRequest>) -> Result<UnloadResponse> {
        let request = request.into();
        let drain = request.drain_timeout.and_then(|time| time.try_into().ok());
        let timeout = self.core.options.call_timeout + drain.unwrap_or(SERVER_DRAIN);
        self.call(request, timeout, once, rpc!(self.models.unload)).await
    }

    /// Gives the model now and after each change of it, until dropped.
    pub fn watch_model(
        &self,
        request: impl Into<WatchModelRequest>,
    ) -> Messages<WatchModelResponse> {
        let request = request.into();
        self.open(None, String::new(), move || request.clone(), rpc!(self.models.watch_model), None)
    }

    /// Gives all models by name, fetching page after page.
    pub fn models(&self, request: ListModelsRequest) -> Messages<Model> {
        let client = self.clone();
        self.pages(request.page_token.clone(), move |page_token| {
            let (client, mut request) = (client.clone(), request.clone());
            request.page_token = page_token;
            async move {
                let timeout = client.core.options.call_timeout;
                let page =
                    client.call(request, timeout, again, rpc!(client.models.list_models)).await?;
                Ok((page.models, page.next_page_token))
            }
        })
    }

    /// Gives all jobs, newest first, fetching page after page.
    pub fn jobs(&self, request: ListJobsRequest) -> Messages<Job> {
        let client = self.clone();
        self.pages(request.page_token.clone(), move |page_token| {
            let (client, mut request) = (client.clone(), request.clone());
            request.page_token = page_token;
            async move {
                let timeout = client.core.options.call_timeout;
                let page =
                    client.call(request, timeout, again, rpc!(client.jobs.list_jobs)).await?;
                Ok((page.jobs, page.next_page_token))
            }
        })
    }

    /// Gives a job's events, past ones first, until it ends; none is missed and none comes
    /// twice, also when the connection breaks.
    pub fn watch_job(&self, request: impl Into<WatchJobRequest>) -> Messages<WatchJobResponse> {
        let request = request.into();
        let seen = Arc::new(AtomicU64::new(request.after_sequence));
        let last = seen.clone();
        let make = move || WatchJobRequest {
            after_sequence: seen.load(Ordering::Relaxed),
            ..request.clone()
        };
        let note = move |event: &WatchJobResponse| last.store(event.sequence, Ordering::Relaxed);
        self.open(None, String::new(), make, rpc!(self.jobs.watch_job), Some(Box::new(note)))
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

    /// Gives all schemes and, per device, whether they can be used and if not why.
    pub async fn list_schemes(&self) -> Result<Vec<SchemeInfo>> {
        let (request, timeout) = (ListSchemesRequest {}, self.core.options.call_timeout);
        Ok(self.call(request, timeout, again, rpc!(self.quantization.list_schemes)).await?.schemes)
    }

    /// Gives the devices with their memory, workers and live models.
    pub async fn devices(&self) -> Result<Vec<Device>> {
        let (request, timeout) = (ListDevicesRequest {}, self.core.options.call_timeout);
        Ok(self.call(request, timeout, again, rpc!(self.runtime.list_devices)).await?.devices)
    }

    /// Gives the server's versions, limits and import roots.
    pub async fn info(&self) -> Result<GetServerInfoResponse> {
        let (request, timeout) = (GetServerInfoRequest {}, self.core.options.call_timeout);
        self.call(request, timeout, again, rpc!(self.runtime.get_server_info)).await
    }

    /// Gives snapshots of memory, queues and throughput, until dropped.
    pub fn watch_runtime(&self, request: WatchRuntimeRequest) -> Messages<WatchRuntimeResponse> {
        self.open(None, String::new(), move || request, rpc!(self.runtime.watch_runtime), None)
    }

    async fn call<M: Message + Clone, R, F>(
        &self,
        message: M,
        timeout: Duration,
        repeatable: bool,
        send: impl Fn(Request<M>) -> F,
    ) -> Result<R>
    where
        F: Future<Output = std::result::Result<Response<R>, Status>>,
    {
        let core = &self.core;
        let mut tries = Tries::new(Some(self.timeout.unwrap_or(timeout)), repeatable);
        // On the heap, because it is big and each layer around it would make it bigger.
        let tried = core.closed.run_until_cancelled(Box::pin(async {
            loop {
                let request = core.request(message.clone(), tries.deadline);
                let sent = async { send(request?).await };
                let error = match limited(tries.deadline, sent).await {
                    Some(Ok(response)) => {
                        tries.succeeded(&core.options, &core.budget);
                        return Ok(response.into_inner());
                    }
                    Some(Err(status)) => Error::from(status),
                    None => Error::deadline(),
                };
                match tries.wait(&error, &core.options, &core.budget) {
                    Some(wait) => sleep(wait).await,
                    None => return Err(error),
                }
            }
        }));
        tried.await.unwrap_or_else(|| Err(Error::cancelled()))
    }

    fn open<M: Message + 'static, R: Send + 'static, F>(
        &self,
        timeout: Option<Duration>,
        id: String,
        make: impl Fn() -> M + Send + Sync + 'static,
        send: impl Fn(Request<M>) -> F + Send + Sync + 'static,
        note: Option<Note<R>>,
    ) -> Messages<R>
    where
        F: Future<Output = std::result::Result<Response<Streaming<R>>, Status>> + Send + 'static,
    {
        let core = self.core.clone();
        let tries = Tries::new(self.timeout.or(timeout), again);
        let receiver = Receiver::new(core.clone(), tries, note.is_some(), move |deadline| {
            let sent = core.request(make(), deadline).map(&send);
            Box::pin(async { sent?.await })
        });
        let shared = Arc::new((id, note));
        Messages::new(&self.core, receiver, move |mut receiver| {
            let shared = shared.clone();
            async move {
                let message = receiver.read().await.map_err(|error| error.named(&shared.0))?;
                if let (Some(note), Some(message)) = (&shared.1, &message) {
                    note(message);
                }
                Ok(message.map(|message| (message, receiver)))
            }
        })
    }

    fn pages<T: Send + 'static, F>(
        &self,
        first: String,
        fetch: impl Fn(String) -> F + Send + Sync + 'static,
    ) -> Messages<T>
    where
        F: Future<Output = Result<(Vec<T>, String)>> + Send + 'static,
    {
        let fetch = Arc::new(fetch);
        let state = (Vec::new().into_iter(), Some(first));
        Messages::new(&self.core, state, move |(mut page, mut token)| {
            let fetch = fetch.clone();
            async move {
                loop {
                    if let Some(item) = page.next() {
                        return Ok(Some((item, (page, token))));
                    }
                    let Some(page_token) = token.take() else { return Ok(None) };
                    let (items, next) = fetch(page_token).await?;
                    (page, token) = (items.into_iter(), Some(next).filter(|next| !next.is_empty()));
                }
            }
        })
    }
}
