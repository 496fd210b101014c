//! Possible places of a proxy's control socket, for the proxy and for its clients.

use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// Limit on the proxies of one user that can have their own control socket at each default place.
pub const MAX_SOCKETS: u32 = 8;

/// `--control`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ControlAddr {
    /// A unix socket with a file.
    Path(PathBuf),
    /// `@name`: a unix socket in Linux's abstract namespace, which needs no file (unix(7)).
    Abstract(String),
    /// The proxy's `--control-listen` address; only a client can use it.
    Tcp(SocketAddr),
}

/// The possible places of the control socket.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ControlPlaces {
    /// The place given by `--control`.
    pub given: Option<ControlAddr>,
    /// The default places, best first.
    pub defaults: Vec<ControlAddr>,
}

impl ControlAddr {
    /// The address for the proxy with this number at this place, counted from 1: `control.sock`, `control-2.sock` and
    /// so on.
    pub fn numbered(&self, number: u32) -> Self {
        match self {
            _ if number == 1 => self.clone(),
            Self::Path(path) => {
                let stem = path.file_stem().unwrap_or_default().to_string_lossy();
                let extension = path.extension().unwrap_or_default().to_string_lossy();
                Self::Path(path.with_file_name(format!("{stem}-{number}.{extension}")))
            }
            Self::Abstract(name) => Self::Abstract(format!("{name}-{number}")),
            Self::Tcp(_) => self.clone(),
        }
    }

    /// The path in the kernel's form, in which an abstract name begins with a zero byte; `None` for TCP.
    pub fn unix_path(&self) -> Option<PathBuf> {
        match self {
            Self::Path(path) => Some(path.clone()),
            Self::Abstract(name) => Some(format!("\0{name}").into()),
            Self::Tcp(_) => None,
        }
    }
}

impl ControlPlaces {
    /// The default places, best first: `/run/lameduck`, a folder in `$XDG_RUNTIME_DIR`, a folder in `/tmp`, and an
    /// abstract name, which needs no folder.
    pub fn defaults(runtime_dir: Option<&Path>, uid: u32) -> Vec<ControlAddr> {
        let mut folders = vec![PathBuf::from("/run/lameduck")];
        folders.extend(runtime_dir.map(|dir| dir.join("lameduck")));
        folders.push(format!("/tmp/lameduck-{uid}").into());
        let sockets = folders.into_iter().map(|folder| ControlAddr::Path(folder.join("control.sock")));
        sockets.chain([ControlAddr::Abstract(format!("lameduck-{uid}"))]).collect()
    }
}

impl FromStr for ControlAddr {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        // `sun_path` holds 108 bytes, including the closing NUL of a path or the leading NUL of an abstract name
        // (unix(7)).
        match text.len() {
            0 => return Err("is empty: give the control socket's path".to_owned()),
            n if n > 107 => {
                return Err(format!("the path has {n} bytes; the limit for a unix socket is 107"));
            }
            _ => {}
        }
        match (text.parse(), text.strip_prefix('@')) {
            (Ok(addr), _) => Ok(Self::Tcp(addr)),
            (Err(_), Some("")) => Err("'@' needs a name: write @lameduck, say".to_owned()),
            (Err(_), Some(name)) => Ok(Self::Abstract(name.to_owned())),
            (Err(_), None) => Ok(Self::Path(text.into())),
        }
    }
}

impl fmt::Display for ControlAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Path(path) => write!(f, "{}", path.display()),
            Self::Abstract(name) => write!(f, "@{name}"),
            Self::Tcp(addr) => write!(f, "{addr}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_read_as_it_is_shown() {
        for text in ["/run/lameduck/control.sock", "c.sock", "@lameduck-7", "127.0.0.1:4882", "[::1]:4882"] {
            assert_eq!(text.parse::<ControlAddr>().unwrap().to_string(), text);
        }
        assert_eq!("127.0.0.1:4882".parse::<ControlAddr>().unwrap().unix_path(), None);
        for bad in ["", "@", &"x".repeat(108)] {
            assert!(bad.parse::<ControlAddr>().is_err(), "{bad}");
        }
    }

    #[test]
    fn several_proxies_at_one_place_have_numbers() {
        let numbered = |text: &str, number| text.parse::<ControlAddr>().unwrap().numbered(number).to_string();
        assert_eq!(numbered("/run/a.b/control.sock", 1), "/run/a.b/control.sock");
        assert_eq!(numbered("/run/a.b/control.sock", 2), "/run/a.b/control-2.sock");
        assert_eq!(numbered("@lameduck-0", 3), "@lameduck-0-3");
    }
}
