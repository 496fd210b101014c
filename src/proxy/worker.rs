//! The state that one thread of the data plane owns.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::captured::{CapturedPort, PortId};
use super::http1::head::Request;
use super::parking::Parking;
use super::route::Route;
use super::shared::Shared;
use crate::config::UpstreamProtocol;
use crate::drain::gate::InFlight;
use crate::drain::ledger::Ledger;
use crate::metrics::{Shard, add};
use crate::upstream::{Pool, Upstream};

/// Maximum number of concurrent health checks that are exempt from counting, and no more than may be in flight.
/// Further ones count as ordinary requests, because clients identify themselves.
const MAX_HEALTH_CHECKS: u64 = 64;

/// The state of one thread.
pub struct Worker {
    /// The state that all threads share.
    pub shared: Arc<Shared>,
    /// This thread's connections.
    pub ledger: Arc<Ledger>,
    /// This thread's counters.
    pub shard: Arc<Shard>,
    /// Parked client connections.
    pub parking: Parking,
    /// The route to `--upstream`.
    pub app: Rc<Route>,
    /// The routes of each `--tcp`; they keep no idle connections.
    pub tcp: Vec<Rc<Route>>,
    /// The routes of the captured ports that this thread has served.
    captured: RefCell<BTreeMap<(PortId, bool), Rc<Route>>>,
    number: usize,
}

impl Worker {
    /// The state of the thread with this number.
    ///
    /// # Errors
    /// If the kernel can't create an epoll set for its parked connections.
    pub fn new(shared: Arc<Shared>, number: usize) -> io::Result<Self> {
        let (ledger, shard) = (shared.ledgers[number].clone(), shared.shards[number].clone());
        let parking = Parking::new(shared.parkings[number].clone())?;
        let route = |upstream: &Arc<Upstream>| route(&shared, upstream, None, number);
        let (app, tcp) = (route(&shared.upstream), shared.tcp.iter().map(route).collect());
        Ok(Self { shared, ledger, shard, parking, app, tcp, captured: RefCell::default(), number })
    }

    /// Returns this thread's route to a captured port, for clients of this pod if `local`.
    pub fn captured(&self, port: &Arc<CapturedPort>, local: bool) -> Rc<Route> {
        let mut routes = self.captured.borrow_mut();
        // A port that was released and captured again is another one.
        let known = routes.get(&(port.id, local));
        let known = known.filter(|route| route.captured.as_ref().is_some_and(|it| Arc::ptr_eq(it, port)));
        if let Some(route) = known {
            return route.clone();
        }
        let route = route(&self.shared, &port.upstream, Some((port, local)), self.number);
        routes.insert((port.id, local), route.clone());
        route
    }

    /// Closes the idle connections to the app that have to be closed: all of them once a drain is over. Forgets the
    /// routes to released ports.
    pub fn close_idle(&self, all: bool) {
        let released = |route: &Route| route.captured.as_ref().is_some_and(|port| port.is_released());
        self.captured.borrow_mut().retain(|_, route| Rc::strong_count(route) > 1 || !released(route));
        for route in self.captured.borrow().values().chain([&self.app]) {
            if all { route.pool.clear() } else { route.pool.retire() }
        }
    }

    /// Whether requests on this route go to the app over HTTP/2. A captured port's app gets what its client speaks, as
    /// it would without us.
    pub fn speaks_http2(&self, route: &Route, client_does: bool) -> bool {
        let always = self.shared.settings.upstream_protocol == UpstreamProtocol::Http2;
        always || (client_does && route.captured.is_some())
    }

    /// Counts a request whose head was read; `first` if it is its connection's first. A health check counts neither
    /// as work nor as an arrival, within the limit. A client of this pod is no arrival: it may be the app itself.
    pub fn take_in(
        &self,
        request: &mut Request,
        route: &Route,
        in_flight: &mut InFlight<'_>,
        now: Instant,
        first: bool,
    ) {
        if request.health_check {
            let max = self.shared.settings.limits.max_in_flight;
            let max = if max == 0 { MAX_HEALTH_CHECKS } else { max.min(MAX_HEALTH_CHECKS) };
            request.health_check = in_flight.become_health_check(max);
        }
        if !request.health_check && !route.local {
            self.arrival(now, first);
        }
    }

    /// Records a request's arrival for the quiet rule; `first` if it is its connection's first.
    pub fn arrival(&self, now: Instant, first: bool) {
        add(&self.shard.arrivals, 1);
        if first {
            add(&self.shard.newcomers, 1);
        }
        let us = now.duration_since(self.shared.began).as_micros() as u64;
        self.shard.last_arrival_us.store(us.max(1), Ordering::Relaxed);
    }

    /// Whether a tunnel whose last byte moved at `moved_at`, in milliseconds of the ledger's clock, has been quiet
    /// for `--tunnel-timeout`.
    pub fn too_quiet(&self, moved_at: u64) -> bool {
        let max = self.shared.settings.limits.tunnel_timeout;
        !max.is_zero() && self.ledger.now_ms().saturating_sub(moved_at) >= max.as_millis() as u64
    }

    /// Returns the deadline for a ledger entry that is `after` from now.
    pub fn deadline(&self, after: Duration) -> u64 {
        self.ledger.now_ms() + after.as_millis() as u64
    }
}

fn route(
    shared: &Shared,
    upstream: &Arc<Upstream>,
    captured: Option<(&Arc<CapturedPort>, bool)>,
    number: usize,
) -> Rc<Route> {
    let local = captured.is_some_and(|(_, local)| local);
    let source = captured.filter(|(_, local)| !local).and_then(|_| shared.captured.source());
    let pool = Pool::new(upstream.clone(), number, shared.settings.limits.max_head, source);
    let captured = captured.map(|(port, _)| port.clone());
    Rc::new(Route { pool, host: upstream.own().http_host(), local, captured })
}
