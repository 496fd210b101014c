//! The certificate that a client gets is the one for the name that it asks for, and new ones are taken over as they come.

mod common;

use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::symlink;
use std::path::Path;

use common::app::RawApp;
use common::tls::{Authority, Secure, proxy_to_its_end};
use common::{MOMENT, wait_for};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use rustls::version::TLS13;

const ANSWER: &str = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi";

fn shown(authority: &Authority, addr: SocketAddr, name: &str) -> Result<CertificateDer<'static>, String> {
    Secure::try_connect(addr, name, authority.client_config(&[&TLS13], None)).map(|secure| secure.peer())
}

fn der(pem: &str) -> CertificateDer<'static> {
    CertificateDer::from_pem_slice(pem.as_bytes()).expect("PEM")
}

#[test]
fn the_name_picks_the_certificate() {
    let authority = Authority::default();
    let app = RawApp::start();
    let shop = authority.sign(&["shop.test", "*.shop.test"]);
    let till = authority.sign(&["till.shop.test"]);
    let dir = authority.tls_dir();
    shop.write(&dir.join("shop"));
    till.write(&dir.join("till"));
    fs::create_dir(dir.join("lost+found")).expect("a folder");
    let args = ["--tls-listen", "127.0.0.1:0", "--tls-dir", dir.to_str().expect("ASCII")];
    let proxy = common::process::Lameduck::proxy(app.addr, &args);
    let addr = common::tls::tls_listen(&proxy);
    for (name, made) in
        [("shop.test", &shop), ("www.shop.test", &shop), ("WWW.Shop.Test", &shop), ("till.shop.test", &till)]
    {
        assert_eq!(shown(&authority, addr, name), Ok(der(&made.crt)), "{name}");
    }
    let default = fs::read_to_string(dir.join("tls.crt")).expect("read");
    assert_eq!(shown(&authority, addr, "localhost"), Ok(der(&default)));
    assert_eq!(shown(&authority, addr, "127.0.0.1"), Ok(der(&default)), "no name is said");
    // No certificate is for it: the client is shown the default and refuses it.
    assert!(shown(&authority, addr, "a.b.shop.test").unwrap_err().contains("not valid for name"));
}

/// As the kubelet does it: the files are links into `..data`, which is a link to a folder that is swapped.
fn swap(dir: &Path, version: &str, write: impl FnOnce(&Path)) {
    let new = dir.join(format!("..{version}"));
    write(&new);
    symlink(&new, dir.join("..data_tmp")).expect("a link");
    fs::rename(dir.join("..data_tmp"), dir.join("..data")).expect("swapped");
    for name in ["tls.crt", "tls.key"] {
        let _ = symlink(Path::new("..data").join(name), dir.join(name));
    }
}

#[test]
fn a_new_one_is_taken_over_and_no_connection_ends() {
    let authority = Authority::default();
    let app = RawApp::start().answer_all(ANSWER);
    let dir = authority.dir.join("secret");
    fs::create_dir(&dir).expect("a folder");
    let (first, second) = (authority.sign(&["localhost"]), authority.sign(&["localhost"]));
    swap(&dir, "1", |dir| first.write(dir));
    let args = ["--tls-listen", "127.0.0.1:0", "--tls-dir", dir.to_str().expect("ASCII")];
    let proxy = common::process::Lameduck::proxy(app.addr, &args);
    let addr = common::tls::tls_listen(&proxy);
    let mut kept = authority.client(addr);
    assert_eq!(kept.peer(), der(&first.crt));
    kept.get("/");
    kept.until("\r\n\r\nhi");

    swap(&dir, "2", |dir| second.write(dir));
    let taken = || (shown(&authority, addr, "localhost") == Ok(der(&second.crt))).then_some(());
    wait_for("the new certificate", taken);
    kept.get("/");
    kept.until("\r\n\r\nhi");

    // A broken one changes nothing, and the log says what is wrong with it.
    swap(&dir, "3", |dir| common::tls::Made { crt: first.crt.clone(), key: second.key.clone() }.write(dir));
    proxy.process.wait_line("the warning", |line| {
        (line.contains("TLS goes on with what it has") && line.contains("tls.crt and tls.key")).then_some(())
    });
    assert_eq!(shown(&authority, addr, "localhost"), Ok(der(&second.crt)));
    kept.get("/");
    kept.until("\r\n\r\nhi");
    assert!(kept.is_quiet_for(MOMENT));
}

#[test]
fn a_broken_pair_is_an_error_at_the_start() {
    let authority = Authority::default();
    let start = |dir: &Path| {
        let dir = dir.to_str().expect("a path in ASCII");
        proxy_to_its_end(&["--upstream", ":1", "--tls-listen", "127.0.0.1:0", "--tls-dir", dir])
    };
    let dir = authority.dir.join("none");
    fs::create_dir(&dir).expect("a folder");
    let (code, output) = start(&dir);
    assert!(code == 1 && output.contains("there is no tls.crt"), "{code} {output}");

    let dir = authority.tls_dir();
    fs::write(dir.join("tls.key"), "not a key").expect("written");
    let (code, output) = start(&dir);
    assert!(code == 1 && output.contains("server: tls.key: "), "{code} {output}");

    authority.tls_dir();
    authority.sign(&["a.test"]).write(&dir.join("a"));
    fs::remove_file(dir.join("a/tls.key")).expect("removed");
    let (code, output) = start(&dir);
    assert!(code == 1 && output.contains("a/tls.key: No such file"), "{code} {output}");
}
