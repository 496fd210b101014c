//! `lameduck run`: the app as our child.

#[path = "../common/mod.rs"]
mod common;

mod app_never_listens;
mod run_app;
mod run_pid1;
mod supervise;
