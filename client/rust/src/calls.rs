//! Calls over one connection: deadlines, retries and pages.

use std::{future::Future, pin::Pin, sync::Arc, time::Duration};

use prost::Message;
use tokio::time::{sleep, Instant};
use tokio_util::sync::CancellationToken;
use tonic::{
    metadata::{Ascii, MetadataValue},
    transport::Channel,
    Request, Response, Status, Streaming,
};

use crate::{
    client::Client,
    errors::{Error, Result},
    options::Options,
    receiver::{limited, Opening, Receiver, Resume},
    retry::{Budget, Tries},
    stream::Messages,
    v1::{
        generation_service_client::GenerationServiceClient, job_service_client::JobServiceClient,
        model_service_client::ModelServiceClient,
        quantization_service_client::QuantizationServiceClient,
        runtime_service_client::RuntimeServiceClient,
    },
};

/// What the clones of a client share.
pub(crate) struct Core {
    pub(crate) options: Options,
    pub(crate) budget: Budget,
    pub(crate) closed: CancellationToken,
    pub(crate) generation: GenerationServiceClient<Channel>,
    pub(crate) jobs: JobServiceClient<Channel>,
    pub(crate) models: ModelServiceClient<Channel>,
    pub(crate) quantization: QuantizationServiceClient<Channel>,
    pub(crate) runtime: RuntimeServiceClient<Channel>,
    authorization: Option<MetadataValue<Ascii>>,
}

/// Runs a connection's tasks until its client is closed.
struct Tasks(CancellationToken);

type Task = Pin<Box<dyn Future<Output = ()> + Send>>;

impl hyper::rt::Executor<Task> for Tasks {
    fn execute(&self, task: Task) {
        tokio::spawn(self.0.clone().run_until_cancelled_owned(task));
    }
}

impl Core {
    /// Checks the options; connects with the first call.
    pub(crate) fn new(address: &str, options: Options) -> Result<Self> {
        let (endpoint, authorization) = options.endpoint(address)?;
        let closed = CancellationToken::new();
        let channel = endpoint.executor(Tasks(closed.clone())).connect_lazy();
        let size = options.max_message_bytes;
        macro_rules! stub {
            ($stub:ident) => {
                $stub::new(channel.clone()).max_decoding_message_size(size)
            };
        }
        Ok(Self {
            budget: Budget::new(&options),
            options,
            closed,
            generation: stub!(GenerationServiceClient),
            jobs: stub!(JobServiceClient),
            models: stub!(ModelServiceClient),
            quantization: stub!(QuantizationServiceClient),
            runtime: stub!(RuntimeServiceClient),
            authorization,
        })
    }

    /// Dresses a message for one try.
    pub(crate) fn request<M: Message>(
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

impl Client {
    /// Makes a call with one answer; `timeout` bounds all its tries.
    pub(crate) async fn call<M: Message + Clone, R, F>(
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
                        core.budget.refund(&core.options);
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

    /// Makes a call with a stream of answers; with `resume` it goes on after a broken connection.
    pub(crate) fn open<M: Message + Clone + 'static, R: Send + 'static, F>(
        &self,
        request: M,
        timeout: Option<Duration>,
        resume: Option<Resume<M, R>>,
        send: impl Fn(Request<M>) -> F + Send + Sync + 'static,
    ) -> Messages<R>
    where
        F: Future<Output = std::result::Result<Response<Streaming<R>>, Status>> + Send + 'static,
    {
        let tries = Tries::new(self.timeout.or(timeout), true);
        let send = move |request| -> Opening<R> { Box::pin(send(request)) };
        let receiver = Receiver::new(self.core.clone(), tries, request, resume, send);
        Messages::new(&self.core, receiver, |mut receiver| async move {
            Ok(receiver.read().await?.map(|message| (message, receiver)))
        })
    }

    /// Gives the items of all pages; `fetch` gives those of a token, and the next token.
    pub(crate) fn pages<T: Send + 'static, F>(
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
