//! A client gets the certificate for the name that it requests, and new certificates are loaded when they change.

use crate::common;

use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Instant;

use common::app::RawApp;
use common::tls::{Authority, Secure, proxy_to_its_end};
use common::{LIMIT, MOMENT, wait_for};
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
    assert_eq!(shown(&authority, addr, "127.0.0.1"), Ok(der(&default)), "without SNI");
    // No certificate matches the name: the client gets the default one and rejects it.
    assert!(shown(&authority, addr, "a.b.shop.test").unwrap_err().contains("not valid for name"));
}

/// Replaces the files as the kubelet does: they are links into `..data`, a link to a directory that is swapped.
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
fn a_new_certificate_is_loaded_and_no_connection_ends() {
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

    // An invalid certificate changes nothing, and the log has the reason.
    swap(&dir, "3", |dir| common::tls::Made { crt: first.crt.clone(), key: second.key.clone() }.write(dir));
    proxy.process.wait_line("the warning", |line| {
        (line.contains("keeping the current certificates") && line.contains("tls.crt and tls.key"))
            .then_some(())
    });
    assert_eq!(shown(&authority, addr, "localhost"), Ok(der(&second.crt)));
    kept.get("/");
    kept.until("\r\n\r\nhi");
    assert!(kept.is_quiet_for(MOMENT));
}

#[test]
fn new_certificates_are_loaded_under_load_and_no_client_is_refused() {
    let authority = Authority::default();
    let app = RawApp::start().answer_all(ANSWER);
    let all = [(); 3].map(|()| authority.sign(&["localhost"]));
    let dir = authority.dir.join("server");
    all[0].write(&dir);
    let args = ["--tls-listen", "127.0.0.1:0", "--tls-dir", dir.to_str().expect("ASCII")];
    let proxy = common::process::Lameduck::proxy(app.addr, &args);
    let addr = common::tls::tls_listen(&proxy);
    let (over, begun) = (AtomicBool::new(false), Instant::now());
    // The certificates that one client gets, in order.
    let call = || {
        let (mut seen, mut kept) = (Vec::new(), authority.client(addr));
        loop {
            let last = over.load(Ordering::Acquire) || begun.elapsed() > LIMIT;
            let mut new = authority.client(addr);
            for client in [&mut kept, &mut new] {
                client.get("/");
                client.until("\r\n\r\nhi");
            }
            if seen.last() != Some(&new.peer()) {
                seen.push(new.peer());
            }
            if last {
                return seen;
            }
        }
    };
    thread::scope(|scope| {
        let callers = [(); 3].map(|()| scope.spawn(call));
        for made in &all[1..] {
            made.write(&dir);
            let taken = || (shown(&authority, addr, "localhost") == Ok(der(&made.crt))).then_some(());
            wait_for("the new certificate", taken);
        }
        over.store(true, Ordering::Release);
        for caller in callers {
            let seen = caller.join().expect("no client is refused");
            assert!(
                seen == all.each_ref().map(|made| der(&made.crt)),
                "not each certificate once: {}",
                seen.len()
            );
        }
    });
}

#[test]
fn its_files_may_be_replaced_one_after_the_other() {
    let authority = Authority::default();
    let app = RawApp::start();
    let (old, new) = (authority.sign(&["localhost"]), authority.sign(&["localhost"]));
    let dir = authority.dir.join("server");
    old.write(&dir);
    let args = ["--tls-listen", "127.0.0.1:0", "--tls-dir", dir.to_str().expect("ASCII")];
    let proxy = common::process::Lameduck::proxy(app.addr, &args);
    let addr = common::tls::tls_listen(&proxy);
    let is_shown = |made: &common::tls::Made| shown(&authority, addr, "localhost") == Ok(der(&made.crt));
    // A state is logged only if two checks in a row find it; each state lasts until then.
    let half = new.crt.split_at(new.crt.len() / 2).0;
    for (file, text, why) in [("tls.key", &*new.key, "tls.crt and tls.key: "), ("tls.crt", half, "tls.crt: ")]
    {
        let said = proxy.process.output().matches("keeping the current certificates").count();
        fs::write(dir.join(file), text).expect("written");
        wait_for(why, || {
            assert!(is_shown(&old), "the old certificate is served until the new one is complete");
            let output = proxy.process.output();
            let mut warnings =
                output.lines().filter(|line| line.contains("keeping the current certificates")).skip(said);
            warnings.any(|line| line.contains(why)).then_some(())
        });
    }
    fs::write(dir.join("tls.crt"), &new.crt).expect("written");
    wait_for("the new certificate", || {
        let shown = shown(&authority, addr, "localhost");
        assert!([&old, &new].map(|made| Ok(der(&made.crt))).contains(&shown), "{shown:?}");
        (shown == Ok(der(&new.crt))).then_some(())
    });
}

#[test]
fn a_certificate_whose_files_are_gone_for_a_moment_is_kept() {
    let authority = Authority::default();
    let app = RawApp::start();
    let (old, new) = (authority.sign(&["localhost"]), authority.sign(&["localhost"]));
    let other = [(); 2].map(|()| authority.sign(&["a.test"]));
    let dir = authority.dir.join("server");
    old.write(&dir);
    other[0].write(&dir.join("a"));
    let args = ["--tls-listen", "127.0.0.1:0", "--tls-dir", dir.to_str().expect("ASCII")];
    let proxy = common::process::Lameduck::proxy(app.addr, &args);
    let addr = common::tls::tls_listen(&proxy);
    let show = |name: &str| shown(&authority, addr, name);
    for file in ["tls.key", "tls.crt"] {
        fs::remove_file(dir.join(file)).expect("removed");
    }
    // When the other new certificate is served, the files have been read since the removal.
    other[1].write(&dir.join("a"));
    wait_for("a reload", || (show("a.test") == Ok(der(&other[1].crt))).then_some(()));
    assert_eq!(show("localhost"), Ok(der(&old.crt)));
    new.write(&dir);
    wait_for("the new certificate", || {
        let shown = show("localhost");
        assert!([&old, &new].map(|made| Ok(der(&made.crt))).contains(&shown), "{shown:?}");
        (shown == Ok(der(&new.crt))).then_some(())
    });
    // A certificate that stays away is dropped.
    fs::remove_dir_all(dir.join("a")).expect("removed");
    wait_for("the default for its name", || show("a.test").is_err().then_some(()));
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
