//! A request's way to the app and its response's way back: the same for HTTP/1.1 and HTTP/2.

mod app_reader;
pub mod exchange;
pub mod failure;
mod flow;
pub mod forward;
pub mod long_poll;
mod poll_end;
pub mod relay;
pub mod relay_http2;
pub mod retry;
