//! When a failed call is tried again, and after how long; no I/O happens here.

use std::{
    collections::hash_map::RandomState,
    hash::BuildHasher,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use tokio::time::Instant;
use tonic::Code;

use crate::{errors::Error, options::Options};

const REFUND: f64 = 0.1;

/// Retries that a client has left.
pub(crate) struct Budget(Mutex<f64>);

impl Budget {
    pub(crate) fn new(options: &Options) -> Self {
        Self(Mutex::new(options.retry_budget.into()))
    }

    fn spend(&self) -> bool {
        let mut left = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let some = *left >= 1.0;
        *left -= f64::from(u8::from(some));
        some
    }

    /// Gives back a tenth of a retry after a success.
    pub(crate) fn refund(&self, options: &Options) {
        let mut left = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *left = (*left + REFUND).min(options.retry_budget.into());
    }
}

/// The tries of one call.
pub(crate) struct Tries {
    /// Bounds all tries together.
    pub(crate) deadline: Option<Instant>,
    again: bool,
    made: u32,
}

impl Tries {
    /// Starts the clock; `again` tells whether a second call has the effect of one.
    pub(crate) fn new(timeout: Option<Duration>, again: bool) -> Self {
        // A timeout beyond what the clock can count is none.
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        Self { deadline, again, made: 1 }
    }

    /// The wait before the next try; nothing when there is to be none.
    pub(crate) fn wait(
        &mut self,
        error: &Error,
        options: &Options,
        budget: &Budget,
    ) -> Option<Duration> {
        let safe = error.retry_after.is_some()
            || error.code == Code::Unavailable && (self.again || error.not_connected);
        if !safe || self.made >= options.max_attempts {
            return None;
        }
        let wait = wait(error, options, self.made);
        if !self.allows(wait) || !budget.spend() {
            return None;
        }
        self.made += 1;
        Some(wait)
    }

    /// Whether the deadline lies beyond a wait.
    pub(crate) fn allows(&self, wait: Duration) -> bool {
        self.deadline.is_none_or(|deadline| Instant::now() + wait < deadline)
    }
}

/// The wait after so many tries: what the server named, up to a tenth longer, or the backoff.
pub(crate) fn wait(error: &Error, options: &Options, tries: u32) -> Duration {
    let random = random() as f64 / u64::MAX as f64;
    if let Some(named) = error.retry_after {
        return named.mul_f64(1.0 + random / 10.0);
    }
    let bound = options.first_backoff.as_secs_f64() * 2f64.powi(tries.min(64) as i32 - 1);
    options
        .max_backoff
        .min(Duration::try_from_secs_f64(bound).unwrap_or(Duration::MAX))
        .mul_f64(0.5 + random / 2.0)
}

/// A random number; no secret depends on it.
pub(crate) fn random() -> u64 {
    RandomState::new().hash_one(0)
}
