#![forbid(unsafe_code)]
#![doc = include_str!("../README.md")]

mod calls;
mod client;
mod errors;
mod generated {
    pub(crate) mod kinds;
    pub(crate) mod options;
    mod requests;
    mod verbs;
}
mod options;
mod requests;
mod stream;

/// Messages and stubs of the API; their comments are its reference.
#[allow(missing_docs, clippy::all)]
pub mod v1 {
    tonic::include_proto!("lowbit.v1");
}

#[allow(missing_docs, clippy::all)]
mod status {
    tonic::include_proto!("lowbit.status.v1");
}

/// The `google.protobuf.FileDescriptorSet` of the messages, for reflection and JSON.
pub const DESCRIPTORS: &[u8] = include_bytes!("generated/descriptors.binpb");

pub use client::Client;
pub use errors::{Error, Failure, FieldViolation, Kind, Result};
#[cfg(feature = "tls")]
pub use options::Tls;
pub use options::{Options, Traceparent};
pub use stream::{Canceller, Chunk, GenerateStream, Messages};
