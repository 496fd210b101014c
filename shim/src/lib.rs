//! The shim: a shared object that `LD_PRELOAD` loads into the app's processes. The app listens on 127.77.0.1 instead of
//! the pod's addresses, and the proxy takes the same port there. Under `lameduck run` it listens on loopback addresses of
//! that run.
//!
//! It links no libc, so one file serves glibc and musl, and a program without any. Each function that it stands in for makes the system call
//! itself. So in `LD_PRELOAD` it comes last: whatever else stands in for `bind` passes its call on to us.
//!
//! | variable | |
//! |---|---|
//! | `LAMEDUCK_CAPTURE=off` | nothing is moved, and the sidecar isn't told anything |
//! | `LAMEDUCK_PID1=leave` | SIGTERM stays what it is for a PID 1 |
//! | `LAMEDUCK_NODE_PRELOAD=FILE` | Node also gets `--require FILE`, after what `NODE_OPTIONS` has |
//!
//! | module | |
//! |---|---|
//! | `bind` | which address becomes which |
//! | `word` | tells lameduck that a socket listens, and waits for it |
//! | `run` | whose app this is: a pod's, or one of `lameduck run` |
//! | `pid1` | SIGTERM ends a PID 1 that has no handler of its own |
//! | `environment` | our variables, and Node's |
//! | `sys` | system calls, and symbols of a libc that may be missing |

#![cfg_attr(not(test), no_std)]
#![cfg_attr(
    test,
    allow(dead_code, reason = "what is exported is not: it would stand in for the test's own libc")
)]

mod bind;
mod environment;
#[cfg(not(test))]
mod exports;
mod pid1;
mod run;
mod sys;
mod word;
