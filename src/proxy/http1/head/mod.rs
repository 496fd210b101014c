//! Heads: parses a request's or response's head and writes the one that is passed on. Pure; no sockets.
//!
//! Names keep their case, fields their order, repeated fields stay repeated. Hop-by-hop fields are removed (RFC 9110
//! §7.6.1); the framing is checked strictly (RFC 9112 §6.3) and written anew.

mod fields;
mod forwarded;
mod message;
mod out;
mod own_urls;
mod request;
mod response;
mod room;

pub(in crate::proxy) use self::fields::{Field, ParsedFields};
pub(in crate::proxy) use self::forwarded::{put_forwarded, put_forwarded_for};
pub use self::message::{Framing, Reject, Sender, Upgrade, ends_within};
pub(in crate::proxy) use self::message::{TOO_MANY_FIELDS, URI_TOO_LONG, bad, put_field};
pub use self::out::HeadOut;
pub use self::own_urls::Site;
pub use self::request::{Origin, Request, request};
pub(in crate::proxy) use self::request::{is_idempotent, put_connection};
pub use self::response::{Response, ResponsePlan, response, typed_response};
