//! The testee of the Rust SDK; `tests/conformance/README.md` has its protocol.
#![forbid(unsafe_code)]

use std::{
    collections::HashMap,
    fs,
    future::Future,
    io::{self, BufRead, Write},
    pin::Pin,
    sync::{Arc, LazyLock, Mutex},
    time::Duration,
};

use lowbit::{v1::*, Canceller, Client, Error, Kind, Messages, Options, Result, Tls};
use prost::{Message, Name};
use prost_reflect::{DescriptorPool, DynamicMessage};
use serde::Deserialize;
use serde_json::{json, Map, Value};
use tokio_util::sync::CancellationToken;

static POOL: LazyLock<DescriptorPool> =
    LazyLock::new(|| DescriptorPool::decode(lowbit::DESCRIPTORS).expect("descriptors"));

#[derive(Deserialize)]
#[serde(untagged)]
enum Line {
    Cancel(Cancel),
    Call(Box<Call>),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Cancel {
    id: u64,
    #[serde(rename = "cancel")]
    _cancel: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Call {
    id: u64,
    target: String,
    verb: String,
    #[serde(default)]
    request: Map<String, Value>,
    #[serde(default)]
    options: Settings,
    timeout_s: Option<f64>,
    cancel_after: Option<u64>,
    drop_after: Option<u64>,
}

#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Settings {
    call_timeout_s: Option<f64>,
    slow_call_timeout_s: Option<f64>,
    stream_timeout_s: Option<f64>,
    resume_timeout_s: Option<f64>,
    max_message_bytes: Option<f64>,
    keepalive_interval_s: Option<f64>,
    keepalive_timeout_s: Option<f64>,
    max_attempts: Option<f64>,
    first_backoff_s: Option<f64>,
    max_backoff_s: Option<f64>,
    retry_budget: Option<f64>,
    token: Option<String>,
    traceparent: Option<String>,
    tls: Option<Files>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Files {
    ca_file: Option<String>,
    certificate_file: Option<String>,
    key_file: Option<String>,
    server_name: Option<String>,
}

impl Settings {
    fn options(&self) -> Options {
        let or = |given: Option<f64>, default| given.map_or(default, seconds);
        let default = Options::default();
        Options {
            call_timeout: or(self.call_timeout_s, default.call_timeout),
            slow_call_timeout: or(self.slow_call_timeout_s, default.slow_call_timeout),
            stream_timeout: self.stream_timeout_s.map(seconds),
            resume_timeout: or(self.resume_timeout_s, default.resume_timeout),
            max_message_bytes: self
                .max_message_bytes
                .map_or(default.max_message_bytes, |n| n as usize),
            keepalive_interval: or(self.keepalive_interval_s, default.keepalive_interval),
            keepalive_timeout: or(self.keepalive_timeout_s, default.keepalive_timeout),
            max_attempts: self.max_attempts.map_or(default.max_attempts, |n| n as u32),
            first_backoff: or(self.first_backoff_s, default.first_backoff),
            max_backoff: or(self.max_backoff_s, default.max_backoff),
            retry_budget: self.retry_budget.map_or(default.retry_budget, |n| n as u32),
            token: self.token.clone(),
            traceparent: self
                .traceparent
                .clone()
                .map(|trace| -> lowbit::Traceparent { Arc::new(move || Some(trace.clone())) }),
            tls: self.tls.as_ref().map(|files| Tls {
                ca: read(&files.ca_file),
                certificate: read(&files.certificate_file),
                key: read(&files.key_file),
                server_name: files.server_name.clone(),
            }),
        }
    }
}

fn read(path: &Option<String>) -> Option<String> {
    path.as_ref().map(|path| fs::read_to_string(path).expect("a readable file"))
}

/// What is no time at all (negative, say) is no time, which the client refuses.
fn seconds(seconds: f64) -> Duration {
    Duration::try_from_secs_f64(seconds).unwrap_or_default()
}

fn message<M: Message + Name>(message: &M) -> Value {
    let descriptor = POOL.get_message_by_name(&M::full_name()).expect("a message of the API");
    let mut dynamic = DynamicMessage::new(descriptor);
    dynamic.transcode_from(message).expect("the same schema");
    serde_json::to_value(dynamic).expect("JSON")
}

fn say(id: u64, event: &str, rest: Value) {
    let mut line = json!({"id": id, "event": event});
    if let (Value::Object(line), Value::Object(rest)) = (&mut line, rest) {
        line.extend(rest);
    }
    let mut out = io::stdout().lock();
    writeln!(out, "{line}").and_then(|()| out.flush()).expect("a reader of events");
}

fn error(id: u64, error: &Error, partial_text: &str) {
    let refused = error.kind == Kind::InvalidOptions;
    let class = match error.kind {
        Kind::Other => "LowbitError".to_owned(),
        Kind::InvalidOptions => "ValueError".to_owned(),
        kind => format!("{kind:?}Error"),
    };
    let mut code = String::new();
    for (index, letter) in format!("{:?}", error.code).char_indices() {
        code += if index > 0 && letter.is_uppercase() { "_" } else { "" };
        code.push(letter.to_ascii_uppercase());
    }
    let violations = error.violations.iter();
    let violations = violations.map(|v| json!({"field": v.field, "description": v.description}));
    let told = json!({
        "class": class,
        "code": if refused { "" } else { &code },
        "reason": error.reason,
        "message": error.message,
        "metadata": error.metadata,
        "violations": violations.collect::<Vec<_>>(),
        "retry_after_s": error.retry_after.map(|time| time.as_secs_f64()),
        "request_id": error.request_id,
        "partial_text": partial_text,
    });
    say(id, "error", told);
}

/// A call under way.
type Played<'a> = Pin<Box<dyn Future<Output = ()> + Send + 'a>>;

impl Call {
    fn request<M: Message + Name + Default>(&self) -> M {
        let descriptor = POOL.get_message_by_name(&M::full_name()).expect("a message of the API");
        let request = Value::Object(self.request.clone());
        let dynamic = DynamicMessage::deserialize(descriptor, request).expect("a request");
        dynamic.transcode_to().expect("the same schema")
    }

    /// Ends a call with one answer; dropping its future is how Rust cancels it.
    async fn answer<M>(
        &self,
        cancelled: &CancellationToken,
        verb: impl Future<Output = Result<M>>,
        tell: impl Fn(M) -> Vec<Value>,
    ) {
        match cancelled.run_until_cancelled(verb).await {
            Some(Ok(answer)) => {
                for message in tell(answer) {
                    say(self.id, "message", json!({ "message": message }));
                }
                say(self.id, "end", json!({}));
            }
            Some(Err(failure)) => error(self.id, &failure, ""),
            None => say(
                self.id,
                "error",
                json!({
                    "class": "CancelledError", "code": "CANCELLED", "reason": "",
                    "message": "the future was dropped", "metadata": {}, "violations": [],
                    "retry_after_s": null, "request_id": "", "partial_text": "",
                }),
            ),
        }
    }

    async fn follow<M: Message + Name + 'static>(
        &self,
        cancelled: &CancellationToken,
        mut stream: Messages<M>,
    ) {
        forward(cancelled, stream.canceller());
        let mut given = 0;
        while let Some(next) = stream.next().await {
            match next {
                Ok(next) => say(self.id, "message", json!({ "message": message(&next) })),
                Err(failure) => return error(self.id, &failure, ""),
            }
            given += 1;
            if self.drop_after == Some(given) {
                drop(stream);
                return say(self.id, "dropped", json!({}));
            }
            if self.cancel_after == Some(given) {
                stream.cancel();
            }
        }
        say(self.id, "end", json!({}));
    }

    async fn generate(&self, cancelled: &CancellationToken, client: &Client) {
        let mut stream = client.generate(self.request::<GenerateRequest>());
        forward(cancelled, stream.canceller());
        let (mut given, mut started, mut finished) = (0, false, false);
        loop {
            let next = stream.next().await;
            if let (false, Some(told)) = (started, stream.started()) {
                started = true;
                say(self.id, "started", json!({ "message": message(told) }));
            }
            if let Some(Ok(chunk)) = &next {
                let logprobs: Vec<_> = chunk.tokens.iter().filter_map(|one| one.logprob).collect();
                let told = json!({
                    "text": chunk.text,
                    "output_index": chunk.output_index,
                    "token_ids": chunk.token_ids,
                    "logprobs": logprobs,
                });
                say(self.id, "delta", told);
                given += 1;
            }
            if let (false, Some(told)) = (finished, stream.finished()) {
                finished = true;
                say(self.id, "finished", json!({ "message": message(told) }));
            }
            match next {
                None => break,
                Some(Err(failure)) => return error(self.id, &failure, stream.partial_text()),
                Some(Ok(_)) if self.drop_after == Some(given) => {
                    drop(stream);
                    return say(self.id, "dropped", json!({}));
                }
                Some(Ok(_)) if self.cancel_after == Some(given) => stream.cancel(),
                Some(Ok(_)) => {}
            }
        }
        if let Some(told) = stream.completed() {
            say(self.id, "completed", json!({ "message": message(told) }));
        }
        say(self.id, "end", json!({}));
    }

    async fn run(&self, cancelled: CancellationToken) {
        let client = match Client::new(&self.target, self.options.options()) {
            Ok(client) => client,
            Err(refused) => return error(self.id, &refused, ""),
        };
        let timed = self.timeout_s.map(|timeout| client.with_timeout(seconds(timeout)));
        self.play(&cancelled, timed.as_ref().unwrap_or(&client)).await;
        client.close();
    }

    fn play<'a>(&'a self, cancelled: &'a CancellationToken, client: &'a Client) -> Played<'a> {
        macro_rules! one {
            ($verb:ident($request:ty)) => {
                Box::pin(self.answer(cancelled, client.$verb(self.request::<$request>()), |m| {
                    vec![message(&m)]
                }))
            };
        }
        macro_rules! nothing {
            ($verb:ident($request:ty)) => {
                Box::pin(self.answer(
                    cancelled,
                    client.$verb(self.request::<$request>()),
                    |()| vec![],
                ))
            };
        }
        macro_rules! list {
            ($verb:ident) => {
                Box::pin(
                    self.answer(cancelled, client.$verb(), |list| {
                        list.iter().map(message).collect()
                    }),
                )
            };
        }
        macro_rules! stream {
            ($verb:ident($request:ty)) => {
                Box::pin(self.follow(cancelled, client.$verb(self.request::<$request>())))
            };
        }
        match self.verb.as_str() {
            "generate" => Box::pin(self.generate(cancelled, client)),
            "tokenize" => one!(tokenize(TokenizeRequest)),
            "score" => one!(score(ScoreRequest)),
            "detokenize" => {
                let verb = client.detokenize(self.request::<DetokenizeRequest>());
                Box::pin(self.answer(cancelled, verb, |text| vec![json!({ "text": text })]))
            }
            "import_model" => one!(import_model(ImportModelRequest)),
            "quantize" => one!(quantize(QuantizeRequest)),
            "evaluate" => one!(evaluate(EvaluateRequest)),
            "models" => stream!(models(ListModelsRequest)),
            "jobs" => stream!(jobs(ListJobsRequest)),
            "get_model" => one!(get_model(GetModelRequest)),
            "delete_model" => nothing!(delete_model(DeleteModelRequest)),
            "delete_job" => nothing!(delete_job(DeleteJobRequest)),
            "verify_model" => one!(verify_model(VerifyModelRequest)),
            "estimate_load" => one!(estimate_load(EstimateLoadRequest)),
            "set_alias" => nothing!(set_alias(SetAliasRequest)),
            "load" => stream!(load(LoadRequest)),
            "unload" => one!(unload(UnloadRequest)),
            "watch_model" => stream!(watch_model(WatchModelRequest)),
            "watch_runtime" => stream!(watch_runtime(WatchRuntimeRequest)),
            "list_schemes" => list!(list_schemes),
            "estimate_quantization" => one!(estimate_quantization(EstimateQuantizationRequest)),
            "get_job" => one!(get_job(GetJobRequest)),
            "cancel_job" => one!(cancel_job(CancelJobRequest)),
            "resume_job" => one!(resume_job(ResumeJobRequest)),
            "watch_job" => stream!(watch_job(WatchJobRequest)),
            "wait_job" => one!(wait_job(WatchJobRequest)),
            "devices" => list!(devices),
            "info" => Box::pin(self.answer(cancelled, client.info(), |info| vec![message(&info)])),
            verb => panic!("unknown verb {verb}"),
        }
    }
}

/// Cancels a stream when its call is cancelled by a line; the task ends with the call.
fn forward(cancelled: &CancellationToken, canceller: Canceller) {
    let cancelled = cancelled.clone();
    tokio::spawn(async move {
        cancelled.cancelled().await;
        canceller.cancel();
    });
}

fn main() {
    std::panic::set_hook(Box::new(|info| {
        eprintln!("{info}");
        std::process::exit(1);
    }));
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("a runtime");
    let running: Arc<Mutex<HashMap<u64, CancellationToken>>> = Arc::default();
    for line in io::stdin().lock().lines() {
        match serde_json::from_str(&line.expect("UTF-8")).expect("a call or a cancellation") {
            Line::Cancel(Cancel { id, .. }) => {
                if let Some(cancelled) = running.lock().expect("no panic").get(&id) {
                    cancelled.cancel();
                }
            }
            Line::Call(call) => {
                let cancelled = CancellationToken::new();
                running.lock().expect("no panic").insert(call.id, cancelled.clone());
                let running = running.clone();
                runtime.spawn(async move {
                    call.run(cancelled.clone()).await;
                    running.lock().expect("no panic").remove(&call.id);
                    cancelled.cancel(); // ends what waits for it
                });
            }
        }
    }
    runtime.shutdown_background();
}
