//! Arguments of `webhook`.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use super::inject::ResourceArgs;
use super::log::LineArgs;
use crate::config::parse_listen;
use crate::config::values::{self, OptionalListener};
use crate::inject::names::PULL_POLICIES;

pub(super) const AFTER_HELP: &str = "\
Enable it with the label lameduck.dev/inject: enabled on a pod or on its namespace. Annotations of the pod set the
details; see lameduck inject --help.

Exit codes: 0 = stopped by a signal, and every review in progress was answered; 1 = failed; 2 = the command line or the
environment is wrong; 3 = a second signal came before the last answer.";

/// Folder of a pod's service account (Kubernetes, "Accessing the Kubernetes API from a Pod").
const ACCOUNT_DIR: &str = "/var/run/secrets/kubernetes.io/serviceaccount";

/// Everything that a running webhook needs, checked once at start-up.
#[derive(Clone, Debug)]
pub struct WebhookSettings {
    /// Address on which the API server connects.
    pub listen: SocketAddr,
    /// Address for `/livez`, `/readyz` and `/metrics`; `None` if switched off.
    pub probe_listen: Option<SocketAddr>,
    /// Folder with `tls.crt` and `tls.key`; `None` for self-made certificates.
    pub tls_dir: Option<PathBuf>,
    /// Secret that holds the self-made certificates.
    pub secret: String,
    /// Service through which the API server connects.
    pub service: String,
    /// MutatingWebhookConfiguration whose caBundles are checked; `None` checks none.
    pub config: Option<String>,
    /// The API server. Always present unless `tls_dir` is set and `config` is not.
    pub cluster: Option<Cluster>,
    /// Image of the sidecars.
    pub image: String,
    /// imagePullPolicy of the sidecars.
    pub pull_policy: Option<String>,
    /// Requests of CPU and memory, and limits of both, of the sidecars.
    pub resources: [Option<String>; 4],
    /// Time that new connections are still accepted after SIGTERM.
    pub lame_duck: Duration,
}

/// The API server as a pod reaches it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cluster {
    /// A name or an address.
    pub host: String,
    /// Its port.
    pub port: u16,
    /// Folder with `token`, `ca.crt` and `namespace`.
    pub account: PathBuf,
}

#[derive(Debug, Args)]
pub(super) struct WebhookArgs {
    /// Address on which the API server calls POST /mutate over TLS
    #[arg(long, value_name = "ADDR", default_value = ":8443",
          value_parser = parse_listen, help_heading = "Addresses")]
    pub listen: SocketAddr,
    /// Address for the kubelet and Prometheus, in plain HTTP, with /livez, /readyz and /metrics; or 'off'
    #[arg(long, value_name = "ADDR", default_value = ":4881",
          value_parser = values::listen_or_off, help_heading = "Addresses")]
    pub probe_listen: OptionalListener,
    /// Folder with tls.crt and tls.key, read again when they change [default: self-made certificates]
    #[arg(long, value_name = "DIR", help_heading = "Certificates")]
    pub tls_dir: Option<PathBuf>,
    /// Secret in this pod's namespace through which replicas share their self-made certificates, and learn of a newer
    /// version's replica
    #[arg(long, value_name = "NAME", default_value = "lameduck-webhook-tls",
          value_parser = name, help_heading = "Certificates")]
    pub secret: String,
    /// Service in this pod's namespace through which the API server connects. Certificates are made for its name
    #[arg(long, value_name = "NAME", default_value = "lameduck-webhook",
          value_parser = name, help_heading = "Certificates")]
    pub service: String,
    /// MutatingWebhookConfiguration to check: the webhook is ready only while each caBundle in it for this Service
    /// verifies the certificate. The caBundle of self-made certificates is also written into it. If
    /// empty, nothing is checked or written
    #[arg(long, value_name = "NAME", default_value = "lameduck",
          value_parser = name_or_empty, help_heading = "Certificates")]
    pub config: Name,
    /// Image of the sidecars; its entrypoint must be lameduck
    #[arg(long, value_name = "IMAGE", help_heading = "Sidecar",
          default_value = concat!("lameduck:", env!("CARGO_PKG_VERSION")))]
    pub image: String,
    /// imagePullPolicy of the sidecars [default: left to Kubernetes]
    #[arg(long, value_name = "POLICY", help_heading = "Sidecar",
          value_parser = PULL_POLICIES)]
    pub image_pull_policy: Option<String>,
    #[command(flatten, next_help_heading = "Sidecar")]
    pub resources: ResourceArgs,
    /// Time that new connections are still accepted after SIGTERM, because API servers don't know of it yet
    #[arg(long, value_name = "TIME", default_value = "5s",
          value_parser = values::time, help_heading = "Drain")]
    pub lame_duck: Duration,
    #[command(flatten)]
    pub log: LineArgs,
}

/// A name, or `None` for the empty text. (A bare `Option` would tell clap that the flag may be left out.)
#[derive(Clone, Debug)]
pub(super) struct Name(Option<String>);

impl WebhookArgs {
    /// Checks the arguments. `api` is the API server's host and port, if this is a pod.
    ///
    /// # Errors
    /// The text for the user if arguments are missing or contradict each other.
    pub fn settings(self, api: Option<(String, u16)>) -> Result<WebhookSettings, String> {
        let cluster = api.map(|(host, port)| Cluster { host, port, account: ACCOUNT_DIR.into() });
        if cluster.is_none() && (self.tls_dir.is_none() || self.config.0.is_some()) {
            return Err("not in a pod (KUBERNETES_SERVICE_HOST is not set): give --tls-dir and --config ''"
                .to_owned());
        }
        if self.probe_listen.0.is_some_and(|probe| probe.port() != 0 && probe.port() == self.listen.port()) {
            return Err("--listen and --probe-listen use the same port: change one of them".to_owned());
        }
        Ok(WebhookSettings {
            listen: self.listen,
            probe_listen: self.probe_listen.0,
            tls_dir: self.tls_dir,
            secret: self.secret,
            service: self.service,
            config: self.config.0,
            cluster,
            image: self.image,
            pull_policy: self.image_pull_policy,
            resources: self.resources.checked()?,
            lame_duck: self.lame_duck,
        })
    }
}

/// Host and port of the API server, from the environment that every pod has.
pub(super) fn api() -> Option<(String, u16)> {
    let host = std::env::var("KUBERNETES_SERVICE_HOST").ok().filter(|host| !host.is_empty())?;
    let port = std::env::var("KUBERNETES_SERVICE_PORT").ok().and_then(|port| port.parse().ok());
    Some((host, port.unwrap_or(443)))
}

/// A Kubernetes object's name. It becomes part of a path and of a DNS name, so only their characters are allowed.
fn name(text: &str) -> Result<String, String> {
    let allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'.';
    match text.is_empty() || text.len() > 253 || !text.bytes().all(allowed) {
        true => Err(format!("'{text}' is not the name of a Kubernetes object")),
        false => Ok(text.to_owned()),
    }
}

fn name_or_empty(text: &str) -> Result<Name, String> {
    if text.is_empty() { Ok(Name(None)) } else { name(text).map(|name| Name(Some(name))) }
}
