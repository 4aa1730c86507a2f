//! The client: one connection and the verbs of all services.

use std::{env, sync::Arc, time::Duration};

use crate::{
    calls::Core,
    errors::{Error, Result},
    options::{Options, DEFAULT_ADDRESS},
    receiver::Resume,
    retry::random,
    stream::{GenerateStream, Messages},
    v1::*,
};

const SERVER_DRAIN: Duration = Duration::from_secs(30);

/// A connection to one Lowbit server; clones share it.
///
/// A verb takes the message of its request, or what can be made into one: a name, or
/// `(model, prompt)`. Streams begin with their first read.
#[derive(Clone)]
pub struct Client {
    pub(crate) core: Arc<Core>,
    pub(crate) timeout: Option<Duration>,
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

/// Verbs that give the items of all pages, fetching one after another.
macro_rules! lists {
    ($($(#[$doc:meta])* $stub:ident.$verb:ident($request:ident) -> $item:ty: $method:ident;)*) => {
        impl Client { $(
            $(#[$doc])*
            pub fn $verb(&self, request: $request) -> Messages<$item> {
                let client = self.clone();
                self.pages(request.page_token.clone(), move |page_token| {
                    let request = $request { page_token, ..request.clone() };
                    let client = client.clone();
                    async move {
                        let timeout = client.core.options.call_timeout;
                        let page = client.call(request, timeout, again, rpc!(client.$stub.$method)).await?;
                        Ok((page.$verb, page.next_page_token))
                    }
                })
            }
        )* }
    };
}

lists! {
    /// Gives all models by name, fetching page after page.
    models.models(ListModelsRequest) -> Model: list_models;
    /// Gives all jobs, newest first, fetching page after page.
    jobs.jobs(ListJobsRequest) -> Job: list_jobs;
}

impl Client {
    /// Makes a client inside a tokio runtime; it connects with its first call.
    ///
    /// An empty address takes `LOWBIT_ADDRESS`, or else `127.0.0.1:50151`. Fails when an option
    /// makes no sense.
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
        Ok(Self { core: Arc::new(Core::new(&address, options)?), timeout: None })
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
        let messages = self.open(request, timeout, None, rpc!(self.generation.generate));
        GenerateStream::new(id, messages)
    }

    /// Starts to load a model and gives its progress. The load is cancelled with its last reader.
    pub fn load(&self, request: impl Into<LoadRequest>) -> Messages<LoadResponse> {
        let timeout = self.core.options.stream_timeout;
        self.open(request.into(), timeout, Some(|_, _| {}), rpc!(self.models.load))
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
        self.open(request.into(), None, None, rpc!(self.models.watch_model))
    }

    /// Gives a job's events, past ones first, until it ends; none is missed and none comes
    /// twice, also when the connection breaks.
    pub fn watch_job(&self, request: impl Into<WatchJobRequest>) -> Messages<WatchJobResponse> {
        let after: Resume<_, WatchJobResponse> =
            |request: &mut WatchJobRequest, event| request.after_sequence = event.sequence;
        self.open(request.into(), None, Some(after), rpc!(self.jobs.watch_job))
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
        self.open(request, None, None, rpc!(self.runtime.watch_runtime))
    }
}
