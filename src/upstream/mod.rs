//! The app's side: finds its servers, connects, keeps connections for reuse, and closes idle ones before the app
//! would.

mod attempt;
mod backends;
mod habits;
mod http2;
mod pool;
mod resolve;
mod slots;
mod source;
mod stream;

pub use self::backends::{Backend, Upstream};
pub use self::http2::{Lease, was_unprocessed};
pub use self::pool::{Connection, ParkedConnection, Pool};
pub use self::resolve::{addresses, keep_up_to_date, locate};
pub use self::slots::{open_connections, set_max_connections, sharing_streams};
pub use self::source::LOOPBACK_SOURCE;
pub use self::stream::{
    UpstreamReader, UpstreamSocket, UpstreamWriter, connect, is_down, is_full, is_lost, lacks_files,
};
