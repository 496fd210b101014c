//! argv → exit code.

use std::process::ExitCode;

use lameduck::cli::{self, Command};
use lameduck::{app, client, inject};

#[global_allocator]
static ALLOCATOR: lameduck::allocator::Allocator = lameduck::allocator::Allocator;

fn main() -> ExitCode {
    match cli::parse(std::env::args_os()) {
        Ok(Command::Proxy { settings, log }) => app::proxy(*settings, log).into(),
        Ok(Command::Run { settings, log, app }) => app::run(*settings, log, app).into(),
        Ok(Command::Drain { control, timeout, wait }) => client::drain(&control, timeout, wait),
        Ok(Command::AppHook { control, command }) => client::app_hook(&control, &command),
        Ok(Command::Resume { control }) => client::resume(&control),
        Ok(Command::Hold { control, how, until_idle }) => client::hold(&control, how, until_idle),
        Ok(Command::Swap { control, how, timeout, command }) => {
            client::swap(&control, how, timeout, &command)
        }
        Ok(Command::Lease { control, name, command }) => client::lease(&control, name.as_deref(), &command),
        Ok(Command::Switch { control, to, timeout, wait }) => {
            client::switch(&control, to.as_ref(), timeout, wait)
        }
        Ok(Command::Status { control, view }) => client::status(&control, view),
        Ok(Command::Inject(request)) => inject::command::run(&request),
        Ok(Command::Audit(task)) => inject::command::audit(&task),
        Ok(Command::Webhook { settings, log }) => app::webhook(*settings, log).into(),
        Err(error) => error.exit(),
    }
}
