//! `/leases`: the app counts work that is no request.

use std::time::Duration;

use hyper::StatusCode;

use super::{Admin, Ask, parameters, time};
use crate::answer::{Answer, text};
use crate::config::values::lease_name;
use crate::control::leases::{LeaseRefused, MAX_LEASES};

/// Time of a lease that doesn't say.
const DEFAULT_TTL: &str = "30s";

impl Admin {
    /// `POST /leases?name=NAME&ttl=30s`: 201 with the lease's id; 409 if a drain accepts no new work, 429 beyond the
    /// limit.
    pub(super) fn lease(&self, ask: &Ask) -> Answer {
        let [name, ttl] = match parameters(ask, ["name", "ttl"]) {
            Ok(values) => values,
            Err(why) => return text(StatusCode::BAD_REQUEST, &why),
        };
        let name = match lease_name(name.unwrap_or_default()) {
            Ok(name) => name,
            Err(why) => return text(StatusCode::BAD_REQUEST, &format!("name {why}")),
        };
        let Some(ttl) = ttl_of(ttl) else { return wrong_ttl() };
        match self.leases.take(&name, ttl) {
            Ok(number) => super::json(
                StatusCode::CREATED,
                &serde_json::json!({ "id": id(number), "ttl_ms": ttl.as_millis() as u64 }),
            ),
            Err(LeaseRefused::Draining) => {
                text(StatusCode::CONFLICT, "a drain is under way: don't begin new work")
            }
            Err(LeaseRefused::TooMany) => {
                text(StatusCode::TOO_MANY_REQUESTS, &format!("{MAX_LEASES} leases are out"))
            }
        }
    }

    /// `POST /leases/renew?id=ID&ttl=30s`: 404 if the lease is not out any more.
    pub(super) fn renew_lease(&self, ask: &Ask) -> Answer {
        let [id, ttl] = match parameters(ask, ["id", "ttl"]) {
            Ok(values) => values,
            Err(why) => return text(StatusCode::BAD_REQUEST, &why),
        };
        let Some(ttl) = ttl_of(ttl) else { return wrong_ttl() };
        match number(id).is_some_and(|number| self.leases.renew(number, ttl)) {
            true => super::json(StatusCode::OK, &serde_json::json!({ "ttl_ms": ttl.as_millis() as u64 })),
            false => not_out(),
        }
    }

    /// `POST /leases/return?id=ID`: 404 if the lease is not out any more.
    pub(super) fn return_lease(&self, ask: &Ask) -> Answer {
        match parameters(ask, ["id"]) {
            Ok([id]) if number(id).is_some_and(|number| self.leases.give_back(number)) => {
                super::json(StatusCode::OK, &serde_json::json!({ "outcome": "returned" }))
            }
            Ok(_) => not_out(),
            Err(why) => text(StatusCode::BAD_REQUEST, &why),
        }
    }
}

fn ttl_of(ttl: Option<&str>) -> Option<Duration> {
    time(ttl.unwrap_or(DEFAULT_TTL))
}

fn wrong_ttl() -> Answer {
    text(StatusCode::BAD_REQUEST, "ttl must be a time over 0, such as 30s")
}

fn id(number: u64) -> String {
    format!("{number:016x}")
}

fn number(id: Option<&str>) -> Option<u64> {
    u64::from_str_radix(id?, 16).ok()
}

fn not_out() -> Answer {
    text(
        StatusCode::NOT_FOUND,
        "no such lease: it was given back, its time was over, or lameduck has restarted",
    )
}
