//! What a client may be told about its connection: limits, timeouts and retries.

use std::{fmt, sync::Arc};

use tonic::{
    metadata::{Ascii, MetadataValue},
    transport::Endpoint,
};

pub use crate::generated::options::Options;

use crate::errors::{Error, Result};

const USER_AGENT: &str = concat!("lowbit-rust/", env!("CARGO_PKG_VERSION"));

/// Gives the W3C `traceparent` of the work that a call is part of.
pub type Traceparent = Arc<dyn Fn() -> Option<String> + Send + Sync>;

/// How the server proves who it is, and how the client does. PEM texts.
#[cfg(feature = "tls")]
#[derive(Clone, Default)]
pub struct Tls {
    /// Authorities to trust; the system's when there is none.
    pub ca: Option<String>,
    /// The client's certificate, for mutual TLS; needs `key`.
    pub certificate: Option<String>,
    /// Key of the certificate.
    pub key: Option<String>,
    /// Name to check instead of the address's.
    pub server_name: Option<String>,
}

impl fmt::Debug for Options {
    /// Tells nothing secret.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Options").finish_non_exhaustive()
    }
}

impl Options {
    /// Checks the values; gives the connection's settings.
    pub(crate) fn endpoint(&self, address: &str) -> Result<Endpoint> {
        self.check()?;
        #[cfg(feature = "tls")]
        let encrypted = self.tls.is_some();
        #[cfg(not(feature = "tls"))]
        let encrypted = false;
        let loopback = ["127.", "localhost:", "[::1]:", "unix:"];
        if self.token.is_some() && !encrypted && !loopback.iter().any(|l| address.starts_with(l)) {
            return Err(Error::options("token needs tls, except on loopback"));
        }
        let scheme = if encrypted { "https" } else { "http" };
        let url = if address.starts_with("unix:") {
            address.to_owned()
        } else {
            format!("{scheme}://{address}")
        };
        let wrong = |error: tonic::transport::Error| {
            let cause = std::error::Error::source(&error).map(|cause| format!(": {cause}"));
            Error::options(format!("{error}{}", cause.unwrap_or_default()))
        };
        let endpoint = Endpoint::from_shared(url)
            .and_then(|endpoint| endpoint.user_agent(USER_AGENT))
            .map_err(wrong)?
            .http2_keep_alive_interval(self.keepalive_interval)
            .keep_alive_timeout(self.keepalive_timeout)
            .keep_alive_while_idle(true);
        #[cfg(feature = "tls")]
        if let Some(tls) = &self.tls {
            return endpoint.tls_config(tls.config()?).map_err(wrong);
        }
        Ok(endpoint)
    }

    /// The header of the token, whose syntax is that of RFC 6750, section 2.1.
    pub(crate) fn authorization(&self) -> Result<Option<MetadataValue<Ascii>>> {
        let Some(token) = &self.token else { return Ok(None) };
        let text = token.trim_end_matches('=');
        let fits = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~+/".contains(&byte);
        match format!("Bearer {token}").parse() {
            Ok(header) if !text.is_empty() && text.bytes().all(fits) => Ok(Some(header)),
            _ => Err(Error::options("token has other characters than RFC 6750 allows, or none")),
        }
    }
}

#[cfg(feature = "tls")]
impl Tls {
    fn config(&self) -> Result<tonic::transport::ClientTlsConfig> {
        use tonic::transport::{Certificate, ClientTlsConfig, Identity};
        let config = ClientTlsConfig::new();
        let config = match &self.ca {
            Some(ca) => config.ca_certificate(Certificate::from_pem(ca)),
            None => config.with_native_roots(),
        };
        let config = match &self.server_name {
            Some(name) => config.domain_name(name),
            None => config,
        };
        match (&self.certificate, &self.key) {
            (Some(cert), Some(key)) => Ok(config.identity(Identity::from_pem(cert, key))),
            (None, None) => Ok(config),
            _ => Err(Error::options("tls needs both certificate and key, or none")),
        }
    }
}
