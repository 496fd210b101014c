//! Finds the port of `run`'s app: loads the shim into it, and follows where it listens.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::sync::watch;

use crate::capture::object;
use crate::capture::run::{Found, GivenPort, Run, first};
use crate::config::UpstreamAddr;
use crate::proxy::shared::Shared;
use crate::supervise::{App, Preload, StartError};

/// What finds the port of one app.
pub struct Finder {
    number: u16,
    given: GivenPort,
    found: watch::Receiver<Option<Found>>,
    /// Ports on which we serve the app: one that asks for them gets its `PORT` instead.
    own: Vec<u16>,
    preload: Option<Preload>,
}

impl Finder {
    pub fn new(run: &Run, own: Vec<u16>) -> Self {
        Self { number: run.number(), given: run.given.clone(), found: run.found(), own, preload: None }
    }

    /// Prepares the shim for an app that gets this `PORT`. Without the shim only ports that the app does not have to give
    /// up are served.
    pub fn prepare(&mut self, given: Option<u16>) {
        self.given.set(given.unwrap_or(0));
        let written = object::for_run(self.number, given, &self.own).map(|object| Preload::write(&object));
        self.preload = match written {
            Some(Ok(preload)) => Some(preload),
            Some(Err(error)) => {
                tracing::warn!(%error, "can't write the shim that finds the app's ports: set TMPDIR to a folder that may be written");
                None
            }
            None => None,
        };
    }

    pub fn preload(&self) -> Option<&Preload> {
        self.preload.as_ref()
    }

    /// Waits until the app listens, on its `PORT` or elsewhere.
    pub fn wait(
        &self,
        app: &App,
        within: Duration,
    ) -> impl Future<Output = Result<SocketAddr, StartError>> + use<> {
        let (found, app) = (self.found.clone(), app.clone());
        async move { app.wait_found(within, first(found.clone()), || found.borrow().is_some()).await }
    }

    /// Follows an app that opens its `PORT` later, or comes back on another port.
    pub fn follow(&self, app: App, shared: &Shared) -> impl Future<Output = ()> + use<> {
        let (mut found, given, upstream) = (self.found.clone(), self.given.get(), shared.upstream.clone());
        async move {
            while Some(app.port()) != given && found.changed().await.is_ok() {
                let now = *found.borrow_and_update();
                if let Some(Found { addr, .. }) = now.filter(|now| upstream_at(now.addr) != upstream.own()) {
                    app.listens_at(addr);
                    upstream.be_at(upstream_at(addr));
                    tracing::info!(port = addr.port(), "the app listens");
                }
            }
        }
    }
}

/// One on all addresses may be of one family only, and `localhost` means either loopback address.
pub fn upstream_at(addr: SocketAddr) -> UpstreamAddr {
    if addr.ip().is_unspecified() {
        return UpstreamAddr::Tcp { host: "localhost".to_owned(), port: addr.port() };
    }
    addr.into()
}
