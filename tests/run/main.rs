//! `lameduck run`: the app as our child process.

#[path = "../common/mod.rs"]
mod common;

mod app_keeps_its_port;
mod app_never_listens;
mod listeners_may_be_elsewhere;
mod port;
mod programs_that_stay;
mod run_app;
mod run_pid1;
mod runs_side_by_side;
mod signals;
mod stray_sigterm;
mod supervise;
mod terminal;
mod wrappers;
