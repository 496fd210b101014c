//! The admission webhook.

#[path = "../common/mod.rs"]
mod common;

mod webhook_certificates;
mod webhook_hands_over;
mod webhook_reviews;
mod webhook_server;
mod webhook_tells_what_is_wrong;
