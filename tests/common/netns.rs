//! A network namespace for one test, as a pod has one: its own ports, loopback and addresses.

use std::fs::File;
use std::process::{Child, Command, Stdio};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use std::io::Read;
use std::os::fd::AsFd;

/// The pod's addresses.
pub const POD_IPS: [&str; 2] = ["10.244.7.7", "fd00:10:244::7"];

/// The namespace exists while this does. The thread that made it is inside, and so is whatever it starts.
pub struct Netns(Child);

impl Netns {
    /// Moves this thread into a new namespace. `None`, with a line that says so, where that isn't possible.
    pub fn enter() -> Option<Self> {
        let [v4, v6] = POD_IPS;
        // The addresses stand on the loopback device, because not every kernel has another one to offer.
        let script = format!(
            "ip link set lo up && ip addr add {v4}/32 dev lo && ip addr add {v6}/128 dev lo nodad && echo up && exec cat"
        );
        let holder = Command::new("unshare")
            .args(["--net", "sh", "-c", &script])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn();
        let entered = holder.ok().and_then(|mut holder| {
            let mut said = [0; 3];
            holder.stdout.take()?.read_exact(&mut said).ok()?;
            let namespace = File::open(format!("/proc/{}/ns/net", holder.id())).ok()?;
            move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network)).ok()?;
            Some(Self(holder))
        });
        if entered.is_none() {
            println!("LEFT OUT: needs root, unshare (util-linux) and ip (iproute2)");
        }
        entered
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
