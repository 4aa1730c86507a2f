//! Turns the status of a failed call into an [`Error`].

use std::{
    collections::HashMap,
    error::{self, Error as _},
    fmt, iter,
    ops::Deref,
    time::Duration,
};

use prost::{Message, Name};
use tonic::{Code, Status};

use crate::{
    status,
    v1::{ErrorReason, Job},
};

pub use crate::{generated::kinds::Kind, status::bad_request::FieldViolation};

/// What a verb or a stream gives, or how it failed.
pub type Result<T> = std::result::Result<T, Error>;

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

    fn new(kind: Kind, code: Code, message: impl Into<String>) -> Self {
        let mut error = Self::from(Status::new(code, message));
        error.0.kind = kind;
        error
    }

    pub(crate) fn options(message: impl Into<String>) -> Self {
        Self::new(Kind::InvalidOptions, Code::InvalidArgument, message)
    }

    pub(crate) fn job(job: Job) -> Self {
        let (state, told) = (job.state(), job.error.clone().unwrap_or_default());
        let state = state.as_str_name().trim_start_matches("JOB_STATE_");
        let mut message = format!("job {} {}", job.id, state.to_lowercase());
        if !told.message.is_empty() {
            message += &format!(": {}", told.message);
        }
        let mut error = Self::new(Kind::JobFailed, Code::Aborted, message).named(&job.request_id);
        error.0.reason = match told.reason() {
            ErrorReason::Unspecified => state.to_owned(),
            reason => reason.as_str_name().trim_start_matches("ERROR_REASON_").to_owned(),
        };
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
        let bad: status::BadRequest = detail(&told).unwrap_or_default();
        let retry: status::RetryInfo = detail(&told).unwrap_or_default();
        // A status with a source was made here, of an error of the connection.
        let code = if status.message().contains("message length too large") {
            Code::ResourceExhausted
        } else if is_caused_by::<tonic::TimeoutExpired>(&status) {
            Code::DeadlineExceeded
        } else if status.source().is_some() {
            Code::Unavailable
        } else {
            status.code()
        };
        Self(Box::new(Failure {
            kind: Kind::of(&info.reason, code),
            code,
            reason: info.reason,
            message: status.message().to_owned(),
            violations: bad.field_violations,
            retry_after: retry.retry_delay.and_then(|delay| delay.try_into().ok()),
            request_id: info.metadata.get("request_id").cloned().unwrap_or_default(),
            metadata: info.metadata,
            job: None,
            not_connected: is_caused_by::<tonic::ConnectError>(&status),
        }))
    }
}

/// Unpacks the first detail of a type, found by the last part of its name.
fn detail<T: Message + Name + Default>(status: &status::Status) -> Option<T> {
    let is = |any: &&prost_types::Any| any.type_url.rsplit('.').next() == Some(T::NAME);
    T::decode(&*status.details.iter().find(is)?.value).ok()
}

fn is_caused_by<E: error::Error + 'static>(status: &Status) -> bool {
    iter::successors(status.source(), |&error| error.source()).any(|error| error.is::<E>())
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
