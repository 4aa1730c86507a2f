//! Turns the status of a failed call into an [`Error`]; one table.

use std::{collections::HashMap, error, fmt, ops::Deref, time::Duration};

use prost::{Message, Name};
use tonic::{Code, Status};

use crate::{
    status,
    v1::{ErrorReason, Job},
};

pub use crate::status::bad_request::FieldViolation;

/// What a verb or a stream gives, or how it failed.
pub type Result<T> = std::result::Result<T, Error>;

macro_rules! kinds {
    ($($(#[$doc:meta])* $kind:ident $(< $parent:ident)? : [$($reason:literal)*] [$($code:ident)*],)*) => {
        /// What a caller can tell errors apart by; the contract's class without `Error`.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum Kind { $($(#[$doc])* $kind,)* }

        impl Kind {
            /// The wider kind that this one belongs to.
            pub fn parent(self) -> Option<Kind> {
                match self {
                    $($(Kind::$kind => Some(Kind::$parent),)?)*
                    _ => None,
                }
            }

            fn of(reason: &str, code: Code) -> Kind {
                match (reason, code) {
                    $($(($reason, _) => Kind::$kind,)*)*
                    $($((_, Code::$code) => Kind::$kind,)*)*
                    _ => Kind::Other,
                }
            }
        }
    };
}

// A reason's row comes before that of any code.
kinds! {
    /// The request is wrong and stays wrong however often it is sent.
    InvalidArgument: [] [InvalidArgument OutOfRange],
    /// The prompt has more tokens than the model's context.
    ContextLength < InvalidArgument: ["CONTEXT_LENGTH_EXCEEDED"] [],
    /// What was to be imported is unsafe, damaged or of an unknown format.
    SourceRejected < InvalidArgument: ["SOURCE_UNSUPPORTED" "SOURCE_CORRUPT"] [],
    /// There is no such model, job, device or source.
    NotFound: [] [NotFound],
    /// No model or alias has this name.
    ModelNotFound < NotFound: ["MODEL_NOT_FOUND"] [],
    /// No job has this id.
    JobNotFound < NotFound: ["JOB_NOT_FOUND"] [],
    /// The name or the request id is taken.
    AlreadyExists: [] [AlreadyExists],
    /// The caller may not do this, or the path is outside the import roots.
    PermissionDenied: [] [PermissionDenied],
    /// The server does not know who calls.
    Unauthenticated: [] [Unauthenticated],
    /// The server's state does not allow this now.
    FailedPrecondition: [] [FailedPrecondition],
    /// The model is in the store but not loaded.
    ModelNotLoaded < FailedPrecondition: ["MODEL_NOT_LOADED"] [],
    /// The model is loaded, or a job reads it.
    ModelInUse < FailedPrecondition: ["MODEL_IN_USE"] [],
    /// A worker could not make the model live; the message says why.
    LoadFailed < FailedPrecondition: ["LOAD_FAILED"] [],
    /// A job's checkpoint was made from other inputs; the message names what differs.
    CheckpointMismatch < FailedPrecondition: ["CHECKPOINT_MISMATCH"] [],
    /// The job has not ended, ended well or would fail again.
    JobNotResumable < FailedPrecondition: ["JOB_NOT_RESUMABLE"] [],
    /// The scheme cannot be used on this server; the message says what to install.
    SchemeUnavailable < FailedPrecondition: ["SCHEME_UNAVAILABLE"] [],
    /// Measured quality is outside the allowed values.
    QualityGate < FailedPrecondition: ["QUALITY_GATE_FAILED"] [],
    /// Memory, disk, a queue or a size limit is used up.
    ResourceExhausted: [] [ResourceExhausted],
    /// The admission queue is full; `retry_after` says when to ask again.
    QueueFull < ResourceExhausted: ["QUEUE_FULL"] [],
    /// The stream was not read fast enough and was ended.
    ClientStalled < ResourceExhausted: ["CLIENT_STALLED"] [],
    /// The model does not fit; `metadata` has needed and free bytes per device.
    InsufficientMemory < ResourceExhausted: ["INSUFFICIENT_DEVICE_MEMORY"] [],
    /// The server cannot be reached, or does not take calls now.
    Unavailable: [] [Unavailable],
    /// The model is being loaded; `retry_after` says when to ask again.
    ModelLoading < Unavailable: ["MODEL_LOADING"] [],
    /// The worker process died. Text that arrived before stays on the stream.
    WorkerLost: ["WORKER_LOST"] [],
    /// The call was cancelled, here or on the server.
    Cancelled: [] [Cancelled],
    /// The call took longer than its timeout.
    DeadlineExceeded: [] [DeadlineExceeded],
    /// The API defines this; this server does not offer it.
    NotImplementedByServer: [] [Unimplemented],
    /// Stored data is damaged: a file's digest differs from its manifest.
    DataLoss: [] [DataLoss],
    /// A fault of the server; its log has the cause under `request_id`.
    Internal: [] [Internal],
    /// A job that was waited for did not succeed; `job` is its last state.
    JobFailed: [] [],
    /// The options of a client make no sense; nothing was sent.
    InvalidOptions: [] [],
    /// Anything else.
    Other: [] [],
}

/// Why a call failed. Printed it is one line, which never holds text of prompts.
#[derive(Clone, Debug)]
pub struct Error(Box<Failure>);

/// The facts of an [`Error`].
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Failure {
    /// What to match on.
    pub kind: Kind,
    /// gRPC status code.
    pub code: Code,
    /// Name of the `ErrorReason` without its prefix; empty where the server gave none.
    pub reason: String,
    /// What went wrong, for a person.
    pub message: String,
    /// Values that belong to the reason, such as needed and free bytes.
    pub metadata: HashMap<String, String>,
    /// Every bad field of the request.
    pub violations: Vec<FieldViolation>,
    /// Time to wait before the next try, where the server named one.
    pub retry_after: Option<Duration>,
    /// Name of the request in the server's log; empty where it is not known.
    pub request_id: String,
    /// The job that did not succeed.
    pub job: Option<Job>,
    pub(crate) not_connected: bool,
}

impl Error {
    /// Whether the error is of a kind or of one that belongs to it.
    pub fn is(&self, kind: Kind) -> bool {
        self.kind == kind || self.kind.parent() == Some(kind)
    }

    pub(crate) fn new(kind: Kind, code: Code, message: impl Into<String>) -> Self {
        Self(Box::new(Failure {
            kind,
            code,
            reason: String::new(),
            message: message.into(),
            metadata: HashMap::new(),
            violations: Vec::new(),
            retry_after: None,
            request_id: String::new(),
            job: None,
            not_connected: false,
        }))
    }

    pub(crate) fn options(message: impl Into<String>) -> Self {
        Self::new(Kind::InvalidOptions, Code::InvalidArgument, message)
    }

    pub(crate) fn cancelled() -> Self {
        Self::new(Kind::Cancelled, Code::Cancelled, "cancelled by the caller")
    }

    pub(crate) fn deadline() -> Self {
        Self::new(Kind::DeadlineExceeded, Code::DeadlineExceeded, "the call ran out of time")
    }

    pub(crate) fn job(job: Job) -> Self {
        let (state, told) = (job.state(), job.error.clone().unwrap_or_default());
        let state = state.as_str_name().trim_start_matches("JOB_STATE_");
        let mut message = format!("job {} {}", job.id, state.to_lowercase());
        if !told.message.is_empty() {
            message = format!("{message}: {}", told.message);
        }
        let mut error = Self::new(Kind::JobFailed, Code::Aborted, message);
        error.0.reason = match told.reason() {
            ErrorReason::Unspecified => state.to_owned(),
            reason => reason.as_str_name().trim_start_matches("ERROR_REASON_").to_owned(),
        };
        error.0.request_id = job.request_id.clone();
        error.0.job = Some(job);
        error
    }

    /// Names the request, where the call had a name.
    pub(crate) fn named(mut self, request_id: &str) -> Self {
        if !request_id.is_empty() {
            self.0.request_id = request_id.to_owned();
        }
        self
    }

    /// Whether the connection broke or the server goes away.
    pub(crate) fn is_broken(&self) -> bool {
        self.code == Code::Unavailable && (self.reason.is_empty() || self.reason == "SHUTTING_DOWN")
    }
}

impl From<Status> for Error {
    fn from(status: Status) -> Self {
        let told = status::Status::decode(status.details()).unwrap_or_default();
        let info: status::ErrorInfo = detail(&told).unwrap_or_default();
        let retry: Option<status::RetryInfo> = detail(&told);
        let bad: Option<status::BadRequest> = detail(&told);
        let not_connected = caused_by::<tonic::ConnectError>(&status);
        // A status with a source was made here, of an error of the connection.
        let code = if status.message().contains("message length too large") {
            Code::ResourceExhausted
        } else if caused_by::<tonic::TimeoutExpired>(&status) {
            Code::DeadlineExceeded
        } else if error::Error::source(&status).is_some() {
            Code::Unavailable
        } else {
            status.code()
        };
        let mut error = Self::new(Kind::of(&info.reason, code), code, status.message());
        error.0.request_id = info.metadata.get("request_id").cloned().unwrap_or_default();
        error.0.reason = info.reason;
        error.0.metadata = info.metadata;
        error.0.violations = bad.map(|bad| bad.field_violations).unwrap_or_default();
        error.0.retry_after = retry.and_then(|info| info.retry_delay?.try_into().ok());
        error.0.not_connected = not_connected;
        error
    }
}

/// Unpacks the first detail of a type, found by the last part of its name.
fn detail<T: Message + Name + Default>(status: &status::Status) -> Option<T> {
    let is = |any: &&prost_types::Any| any.type_url.rsplit('.').next() == Some(T::NAME);
    T::decode(&*status.details.iter().find(is)?.value).ok()
}

fn caused_by<E: error::Error + 'static>(status: &Status) -> bool {
    let mut source = error::Error::source(status);
    while let Some(error) = source {
        if error.is::<E>() {
            return true;
        }
        source = error.source();
    }
    false
}

impl Deref for Error {
    type Target = Failure;

    fn deref(&self) -> &Failure {
        &self.0
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name =
            if self.reason.is_empty() { format!("{:?}", self.kind) } else { self.reason.clone() };
        let mut line = format!("{name}: {}", self.message);
        for bad in &self.violations {
            if !self.message.contains(&bad.description) {
                line += &format!("; {}: {}", bad.field, bad.description);
            }
        }
        f.write_str(&line.split_whitespace().collect::<Vec<_>>().join(" "))
    }
}

impl error::Error for Error {}
