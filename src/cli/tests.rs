//! Command lines and the settings or errors that they lead to.

use std::process::Command as Process;
use std::time::Duration;

use tracing::Level;

use super::args::{annotated_flags, command};
use super::meaning::parse_at;
use super::surroundings::Surroundings;
use super::*;
use crate::config::{
    AppUrl, ClientAuth, ControlAddr, ControlPlaces, DrainReadiness, Forwarded, ReadyCheck, Settings, Sidecar,
    UpstreamAddr, WarmUp,
};

fn laptop() -> Surroundings {
    Surroundings { control: ControlPlaces::defaults(None, 7), cores: 3, ..Surroundings::default() }
}

fn pod() -> Surroundings {
    Surroundings { in_pod: true, ..laptop() }
}

fn words(line: &str) -> Vec<String> {
    line.split_whitespace().map(|word| word.replace('_', " ")).collect()
}

fn settings_of(line: &str, around: &Surroundings) -> Settings {
    match parse_at(words(line), around).unwrap() {
        Command::Proxy { settings, .. } | Command::Run { settings, .. } => *settings,
        other => panic!("{other:?}"),
    }
}

fn refusal(line: &str) -> String {
    let error = parse_at(words(line), &laptop()).unwrap_err();
    assert_eq!(error.exit_code(), 2, "{line}");
    error.to_string()
}

fn secs(n: u64) -> Duration {
    Duration::from_secs(n)
}

#[test]
fn a_proxy_on_a_laptop_has_the_documented_defaults() {
    let s = settings_of("lameduck proxy --upstream :3000", &laptop());
    assert_eq!(s.listen, ["[::]:4880".parse().unwrap()]);
    assert_eq!(s.upstream.to_string(), "127.0.0.1:3000");
    assert_eq!(s.probe_listen, Some("[::]:4881".parse().unwrap()));
    assert_eq!(s.control, laptop().places(None));
    let places: Vec<_> = s.control.defaults.iter().map(ToString::to_string).collect();
    assert_eq!(places, ["/run/lameduck/control.sock", "/tmp/lameduck-7/control.sock", "@lameduck-7"]);
    assert_eq!((s.control_listen, s.token, s.sidecar), (None, None, Sidecar::None));
    let d = s.drain;
    assert_eq!((d.lame_duck, d.grace, d.reserve), (secs(0), secs(30), secs(5)));
    assert_eq!((d.restart_grace, d.stream_spread, d.readiness), (secs(10), secs(5), None));
    assert_eq!((s.ready.check, s.ready.timeout), (ReadyCheck::Connect, secs(1)));
    assert_eq!((s.ready.warm_up, s.ready.warm_up_count), (vec![], 1));
    assert_eq!((s.upstream_wait, s.forwarded, s.access_log), (secs(10), Forwarded::Append, false));
    let l = s.limits;
    assert_eq!((l.max_head, l.max_fields, l.max_connections, l.max_held), (64 << 10, 2000, 50_000, 1000));
    assert_eq!((l.head_timeout, l.body_timeout, l.idle_timeout), (secs(30), secs(300), secs(3600)));
    assert_eq!(
        (l.max_uri, l.max_in_flight, l.answer_timeout, l.tunnel_timeout),
        (16 << 10, 0, secs(0), secs(0))
    );
    assert_eq!((s.tcp, s.proxy_protocol_from), (vec![], vec![]));
    assert_eq!((s.threads, s.termination_log), (3, "/dev/termination-log".into()));
}

#[test]
fn a_pod_gets_a_lame_duck_and_control_on_loopback() {
    let s = settings_of("lameduck proxy --upstream :3000", &pod());
    assert_eq!((s.drain.lame_duck, s.control_listen), (secs(5), Some("127.0.0.1:4882".parse().unwrap())));
    let s = settings_of("lameduck proxy --upstream :3000 --lame-duck 0 --control-listen off", &pod());
    assert_eq!((s.drain.lame_duck, s.control_listen), (secs(0), None));
}

#[test]
fn a_sidecar_and_run_add_no_hop_and_a_front_door_does() {
    for (line, forwarded) in [
        ("proxy --upstream :3000", Forwarded::Append),
        ("proxy --upstream :3000 --sidecar native", Forwarded::IfNone),
        ("proxy --upstream :3000 --sidecar ordinary", Forwarded::IfNone),
        ("proxy --upstream :3000 --sidecar native --forwarded append", Forwarded::Append),
        ("proxy --upstream :3000 --forwarded if-none", Forwarded::IfNone),
        ("run -- x", Forwarded::IfNone),
        ("run --forwarded keep -- x", Forwarded::Keep),
        // A proxy that terminates TLS is the first proxy.
        ("run --tls-listen :4443 --tls-dir /d -- x", Forwarded::Append),
    ] {
        for around in [laptop(), pod()] {
            assert_eq!(settings_of(&format!("lameduck {line}"), &around).forwarded, forwarded, "{line}");
        }
    }
}

#[test]
fn typed_values_reach_the_settings() {
    let s = settings_of(
        "lameduck proxy --upstream unix:/a.sock --listen :80,127.0.0.1:81 --listen [::1]:82 --probe-listen off \
         --token s3cret --sidecar ordinary --grace 1m30s --drain-readiness keep --ready-check /healthz \
         --warm-up GET_/ --warm-up HEAD_/x --warm-up-count 3 --forwarded replace --access-log --max-head 1MiB \
         --threads 7 --control /c.sock",
        &laptop(),
    );
    assert_eq!(s.listen.iter().map(|a| a.port()).collect::<Vec<_>>(), [80, 81, 82]);
    assert_eq!(s.upstream.to_string(), "unix:/a.sock");
    assert_eq!((s.probe_listen, s.token.as_deref(), s.sidecar), (None, Some("s3cret"), Sidecar::Ordinary));
    assert_eq!((s.drain.grace, s.drain.readiness), (secs(90), Some(DrainReadiness::Keep)));
    assert_eq!(s.ready.check, ReadyCheck::Path("/healthz".into()));
    let warm = |method: &str, path: &str| WarmUp { method: method.into(), path: path.into() };
    assert_eq!((s.ready.warm_up, s.ready.warm_up_count), (vec![warm("GET", "/"), warm("HEAD", "/x")], 3));
    assert_eq!((s.forwarded, s.access_log, s.limits.max_head), (Forwarded::Replace, true, 1 << 20));
    assert_eq!((s.threads, s.control), (7, laptop().places(Some(ControlAddr::Path("/c.sock".into())))));
}

#[test]
fn a_tcp_route_has_an_address_of_its_own_and_leads_away() {
    let line = "lameduck proxy --upstream :3000 --tcp :6379=redis:6379,:3306=unix:/db.sock --tcp :1=:2";
    let s = settings_of(line, &laptop());
    assert_eq!(s.tcp.iter().map(|route| route.listen.port()).collect::<Vec<_>>(), [6379, 3306, 1]);
    for (flags, help) in [
        ("--tcp :6379", "is not ADDR=UPSTREAM"),
        ("--tcp :4880=redis:1", "--tcp [::]:4880 is already used by --listen"),
        ("--tcp :5=redis:1 --tcp :5=redis:2", "is already used by --tcp"),
        ("--tcp :6379=localhost:6379", "localhost:6379 is the proxy's own --tcp"),
        ("--tcp :6379=:4880", "127.0.0.1:4880 is the proxy's own --listen"),
        ("--proxy-protocol-from 10.0.0.0/33", "is not a network"),
        ("--max-uri 0", "must be over 0"),
    ] {
        let refused = refusal(&format!("lameduck proxy --upstream :3000 {flags}"));
        assert!(refused.contains(help), "{flags}: {refused}");
    }
}

#[test]
fn what_the_sidecar_does_for_the_apps_own_hook_and_probes_reaches_the_settings() {
    let line = "lameduck proxy --upstream unix:/a.sock --share-dir /s --after-drain /bye?x --after-drain-header X-A:_b:c \
                --app-probe /a,b --app-probe /c";
    let s = settings_of(line, &pod());
    assert_eq!(s.share_dir, Some("/s".into()));
    assert_eq!(s.app_probes.iter().map(|probe| &probe.0[..]).collect::<Vec<_>>(), ["/a,b", "/c"]);
    let own = s.after_drain.unwrap();
    assert_eq!((own.url.at, own.url.target.as_str()), (None, "/bye?x"));
    assert_eq!(own.headers, [("x-a".parse().unwrap(), "b:c".parse().unwrap())]);
    for (url, at, target) in [
        ("http://127.0.0.1:9100/bye", "127.0.0.1:9100", "/bye"),
        ("http://[::1]:9100", "[::1]:9100", "/"),
        ("http://[::1]/x", "[::1]:80", "/x"),
        ("http://other/", "other:80", "/"),
    ] {
        let own: AppUrl = url.parse().unwrap();
        assert_eq!((own.at.unwrap().to_string().as_str(), own.target.as_str()), (at, target), "{url}");
    }
    for (flags, help) in [
        ("--after-drain bye", "neither a path"),
        ("--after-drain ftp://x/", "neither a path"),
        ("--after-drain http://x:y/", "neither a path"),
        ("--after-drain-header X-A:_b", "needs --after-drain"),
        ("--after-drain / --after-drain-header X-A", "write 'Name: value'"),
        ("--app-probe healthz", "begins with /"),
    ] {
        let error = refusal(&format!("lameduck proxy --upstream :3000 {flags}"));
        assert!(error.contains(help), "{flags}: {error}");
    }
}

/// Kubernetes sets `{NAME}_PORT=tcp://HOST:PORT` and more for each Service of the namespace, in every container.
#[test]
fn a_service_whose_name_begins_with_lameduck_sets_none_of_our_flags() {
    fn variables(command: &clap::Command) -> Vec<(String, String)> {
        let own = command
            .get_arguments()
            .filter_map(|arg| Some((arg.get_env()?.to_str()?.to_owned(), format!("--{}", arg.get_long()?))));
        own.chain(command.get_subcommands().flat_map(variables)).collect()
    }
    let all = variables(&command(&laptop()));
    assert!(all.len() > 40);
    let link = |name: &str| {
        let name = name.trim_start_matches("LAMEDUCK");
        ["_SERVICE_HOST", "_SERVICE_PORT", "_PORT"].iter().any(|end| name.ends_with(end))
            || name.contains("_SERVICE_PORT_")
            || name.contains("_PORT_")
    };
    let links: Vec<_> = all.iter().filter(|(name, _)| link(name)).map(|(_, flag)| flag.as_str()).collect();
    assert_eq!(links, ["--app-port"], "one more needs what --app-port does");
    for value in ["tcp://10.0.0.1:80", "udp://10.0.0.1:53", "tcp://[fd00::1]:80"] {
        let line = format!("lameduck run --app-port {value} -- x");
        let Command::Run { app, .. } = parse_at(words(&line), &pod()).unwrap() else { panic!() };
        assert_eq!(app.port, None, "{value}");
    }
    assert!(refusal("lameduck run --app-port 0 -- x").contains("'0' is not a port"));
}

#[test]
fn run_takes_over_the_inherited_port_and_everything_after_the_dashes() {
    let around = Surroundings { port: Some("8080".into()), ..laptop() };
    let line = "lameduck run --app-port 3000 --start-timeout 9s -- node server.js --listen x";
    let Command::Run { settings, app, log } = parse_at(words(line), &around).unwrap() else { panic!() };
    assert_eq!(settings.listen, ["[::]:8080".parse().unwrap()]);
    assert_eq!(settings.upstream.to_string(), "localhost:3000");
    assert_eq!((app.port, app.start_timeout), (Some(3000), secs(9)));
    assert_eq!(app.command, ["node", "server.js", "--listen", "x"]);
    assert_eq!(log, LogSettings { format: LogFormat::Auto, level: Level::INFO });
    assert_eq!(settings_of("lameduck run --listen :9 -- x", &around).listen[0].port(), 9);
    assert_eq!(settings_of("lameduck run --app-port 3000 -- x", &laptop()).listen[0].port(), 4880);
    assert_eq!(settings_of("lameduck run -- x", &laptop()).listen, [], "the app's own ports");
    let around = Surroundings { port: Some("http".into()), ..laptop() };
    let error = parse_at(words("lameduck run -- x"), &around).unwrap_err().to_string();
    assert!(error.contains("PORT is 'http'"), "{error}");
}

#[test]
fn a_command_needs_no_dashes_and_keeps_its_own() {
    for (line, wanted) in [
        ("lameduck run node server.js --listen x", "node server.js --listen x"),
        ("lameduck run --listen :9 npm run dev -- --port 3", "npm run dev -- --port 3"),
        ("lameduck run -- npm run dev -- --port 3", "npm run dev -- --port 3"),
        ("lameduck swap docker compose up -d app", "docker compose up -d app"),
        ("lameduck swap --max 9s -- docker compose up -d app", "docker compose up -d app"),
    ] {
        let command = match parse_at(words(line), &laptop()).unwrap() {
            Command::Run { app, .. } => app.command,
            Command::Swap { command, .. } => command,
            other => panic!("{other:?}"),
        };
        assert_eq!(command.join(std::ffi::OsStr::new(" ")), wanted, "{line}");
    }
    assert!(refusal("lameduck run --listn :9 node x").contains("--listn"), "a misspelt flag is no command");
}

#[test]
fn a_wrong_setting_shows_the_usage_of_its_command() {
    let run = refusal("lameduck run --grace 1s -- x");
    assert!(run.contains("--grace 1s leaves no time") && run.contains("Usage: lameduck run ["), "{run}");
    let proxy = refusal("lameduck proxy --upstream :4880");
    assert!(proxy.contains("Usage: lameduck proxy ["), "{proxy}");
}

#[test]
fn the_clients_know_what_to_do() {
    let parsed = |line: &str| format!("{:?}", parse_at(words(line), &laptop()).unwrap());
    let control = format!("control: {:?}", laptop().places(Some(ControlAddr::Path("/c".into()))));
    assert_eq!(
        parsed("lameduck drain --control /c --timeout 30s --no-wait"),
        format!("Drain {{ {control}, timeout: Some(30s), wait: false }}")
    );
    let control_nowhere = format!("control: {:?}", laptop().places(None));
    assert_eq!(parsed("lameduck drain"), format!("Drain {{ {control_nowhere}, timeout: None, wait: true }}"));
    let hook = parsed("lameduck drain --app-hook --control 127.0.0.1:4882 -- sh -c x");
    assert!(
        hook.starts_with("AppHook { control: ControlPlaces { given: Some(Tcp(127.0.0.1:4882))"),
        "{hook}"
    );
    assert!(hook.ends_with(r#"command: ["sh", "-c", "x"] }"#), "{hook}");
    assert!(parsed("lameduck drain --app-hook").ends_with("command: [] }"));
    assert!(refusal("lameduck drain -- x").contains("--app-hook"));
    assert!(refusal("lameduck drain --app-hook --no-wait").contains("cannot be used with"));
    assert_eq!(parsed("lameduck resume --control /c"), format!("Resume {{ {control} }}"));
    assert!(parsed("lameduck status").contains("Human { watch: false }"));
    assert!(parsed("lameduck status --watch --json").contains("Json { watch: true }"));
    assert!(parsed("lameduck status --ready").contains("view: Ready"));
    assert!(refusal("lameduck status --ready --watch").contains("cannot be used with"));
}

#[test]
fn a_wrong_value_is_told_what_to_write_instead() {
    for (flags, help) in [
        ("--grace 5", "'5' has no unit: write 5s"),
        ("--grace soon", "write 5s, 500ms or 1m30s"),
        ("--grace 9999999999years", "'9999999999years'"),
        ("--grace 400days", "over a year"),
        ("--grace 10s --reserve 10s", "raise --grace"),
        ("--ready-timeout 0", "must be over 0"),
        ("--listen nowhere", "write :4880"),
        ("--probe-listen no", "or off"),
        ("--control 127.0.0.1:4882", "use --control-listen for an address"),
        ("--control-listen 0.0.0.0:4882", "write 127.0.0.1:4882"),
        ("--max-head 5", "8KiB"),
        ("--max-head 64KB", "write 64KiB"),
        ("--max-fields 0", "1..=16384"),
        ("--forwarded add", "possible values: append, if-none, replace, keep"),
        ("--max-connections 0", "1.."),
        ("--token a_b", "visible ASCII"),
        ("--ready-check healthz", "neither 'connect' nor a path"),
        ("--log-level loud", "none of error"),
        ("--sidecar maybe", "possible values: none, native, ordinary"),
        ("--listen :4881", "--probe-listen [::]:4881 is already used by --listen"),
        ("--listen :3000", "the proxy's own --listen"),
    ] {
        let error = refusal(&format!("lameduck proxy --upstream localhost:3000 {flags}"));
        assert!(error.contains(help), "{flags}: {error}");
    }
    assert!(refusal("lameduck proxy").contains("--upstream <ADDR>"));
    assert!(refusal("lameduck run --app-port 3000").contains("<CMD>"));
    assert!(refusal(&format!("lameduck resume --control /{}", "x".repeat(107))).contains("108 bytes"));
    // The same port on another machine is not our address.
    settings_of("lameduck proxy --upstream 192.0.2.1:4880", &laptop());
}

#[test]
fn every_flag_of_the_long_running_commands_stands_under_a_heading_with_its_variable() {
    let run: &[&str] = &["Addresses", "TLS", "Drain", "Readiness", "App", "Limits", "Logging"];
    let proxy: &[&str] = &[run, &["Capture"]].concat();
    let webhook: &[&str] = &["Addresses", "Certificates", "Sidecar", "Drain", "Logging"];
    let cli = command(&laptop());
    for (name, headings) in [("proxy", proxy), ("run", run), ("webhook", webhook)] {
        let command = cli.find_subcommand(name).unwrap();
        let mut used = std::collections::BTreeSet::new();
        for arg in command.get_arguments().filter(|arg| arg.get_id() != "help") {
            let heading = arg.get_help_heading().unwrap_or("none");
            assert!(headings.contains(&heading), "{name} --{}: {heading}", arg.get_id());
            assert!(arg.get_help().is_some(), "{name} --{} has no text", arg.get_id());
            used.insert(heading);
            let Some(long) = arg.get_long() else { continue };
            let variable = format!("LAMEDUCK_{}", long.to_uppercase().replace('-', "_"));
            assert_eq!(arg.get_env().and_then(|env| env.to_str()), Some(variable.as_str()));
        }
        assert_eq!(used.len(), headings.len(), "{name}");
    }
    command(&laptop()).debug_assert();
}

#[test]
fn help_tells_the_exit_codes() {
    for line in ["lameduck --help", "lameduck drain --help", "lameduck run --help"] {
        let error = parse_at(words(line), &laptop()).unwrap_err();
        assert_eq!(error.exit_code(), 0);
        assert!(error.to_string().contains("Exit codes: 0 = done, 1 = failed, 2 ="), "{line}");
    }
}

#[test]
fn help_of_inject_tells_every_annotation_that_is_a_flag() {
    let help = parse_at(words("lameduck inject --help"), &laptop()).unwrap_err().to_string();
    for flag in annotated_flags() {
        assert!(help.contains(&format!(" {flag}")), "{flag}");
    }
}

/// A child process reads the environment, because changing it in this process would affect other tests.
#[test]
fn each_flag_can_come_from_the_environment_and_the_typed_one_wins() {
    let child = Process::new(std::env::current_exe().unwrap())
        .args(["--exact", "cli::tests::reads_its_environment", "--ignored", "--nocapture"])
        .env("LAMEDUCK_UPSTREAM", "app:3000")
        .env("LAMEDUCK_LISTEN", ":81,127.0.0.1:82")
        .env("LAMEDUCK_WARM_UP", "GET /,/x")
        .env("LAMEDUCK_ACCESS_LOG", "true")
        .env("LAMEDUCK_GRACE", "1m")
        .env("LAMEDUCK_RESERVE", "7s")
        .env("KUBERNETES_SERVICE_HOST", "10.0.0.1")
        .env("XDG_RUNTIME_DIR", "/run/user/1")
        .output()
        .unwrap();
    assert!(child.status.success(), "{child:?}");
}

#[test]
#[ignore = "run by the test above, with its environment"]
fn reads_its_environment() {
    let Ok(Command::Proxy { settings: s, .. }) = parse(words("lameduck proxy --reserve 8s")) else {
        panic!()
    };
    assert_eq!(s.upstream.to_string(), "app:3000");
    assert_eq!(s.listen.iter().map(|a| a.port()).collect::<Vec<_>>(), [81, 82]);
    assert_eq!((s.ready.warm_up.len(), s.access_log), (2, true));
    assert_eq!((s.drain.grace, s.drain.reserve, s.drain.lame_duck), (secs(60), secs(8), secs(5)));
    assert_eq!(Surroundings::of_process().control[1].to_string(), "/run/user/1/lameduck/control.sock");
}

#[test]
fn tls_needs_its_files_and_takes_the_plain_listener_s_place() {
    let s = settings_of("lameduck proxy --upstream :3000 --tls-listen :443 --tls-dir /tls", &laptop());
    assert_eq!(s.listen, []);
    let tls = s.tls.unwrap();
    assert_eq!((tls.listen, tls.dir), (vec!["[::]:443".parse().unwrap()], "/tls".into()));
    assert_eq!(
        (tls.client_ca, tls.client_auth, tls.handshake_timeout),
        (None, ClientAuth::Require, secs(10))
    );
    let s = settings_of(
        "lameduck proxy --upstream :3000 --listen :80 --tls-listen :443,:444 --tls-dir /tls --tls-client-ca /ca.pem \
         --tls-client-auth request --tls-handshake-timeout 3s",
        &laptop(),
    );
    let tls = s.tls.unwrap();
    assert_eq!((s.listen.len(), tls.listen.len()), (1, 2));
    assert_eq!((tls.client_ca, tls.client_auth), (Some("/ca.pem".into()), ClientAuth::Request));
    assert_eq!(tls.handshake_timeout, secs(3));
    for (flags, why) in [
        ("--tls-listen :443", "--tls-listen needs --tls-dir"),
        ("--tls-dir /tls", "need --tls-listen"),
        ("--tls-client-ca /ca.pem", "need --tls-listen"),
        ("--tls-listen :443 --tls-dir /t --tls-client-auth request", "needs --tls-client-ca"),
        ("--listen :443 --tls-listen :443 --tls-dir /t", "--tls-listen [::]:443 is already used by --listen"),
        ("--upstream-name a_b/c", "is not a host name"),
    ] {
        let said = refusal(&format!("lameduck proxy --upstream :3000 {flags}").replace("a_b/c", "a/c"));
        assert!(said.contains(why), "{flags}: {said}");
    }
}

#[test]
fn a_lease_name_that_a_query_can_not_hold_is_refused() {
    for name in ["a#b", "a&ttl=1h", "ä", &"x".repeat(129)] {
        let said = refusal(&format!("lameduck lease --name {name} -- x"));
        assert!(said.contains("letters, digits or"), "{name}: {said}");
    }
}

#[test]
fn an_upstream_s_scheme_says_whether_it_wants_tls() {
    let addr = |text: &str| text.parse::<UpstreamAddr>();
    let tls = |host: &str, port| UpstreamAddr::Tls { host: host.into(), port, name: host.into() };
    let tcp = |host: &str, port| UpstreamAddr::Tcp { host: host.into(), port };
    for (text, meant) in [
        ("https://app:8443", tls("app", 8443)),
        ("https://app", tls("app", 443)),
        ("https://app/", tls("app", 443)),
        ("https://[::1]", tls("::1", 443)),
        ("https://[::1]:8443", tls("::1", 8443)),
        ("http://app", tcp("app", 80)),
        ("http://app:3000/", tcp("app", 3000)),
        ("app:443", tcp("app", 443)),
    ] {
        assert_eq!(addr(text), Ok(meant), "{text}");
    }
    for text in ["https://app/path", "https://", "ftp://app:21", "https://app:0", "https://a:b:c", "app"] {
        assert!(addr(text).is_err(), "{text}: {:?}", addr(text));
    }
    for text in ["https://app:8443", "https://[::1]:8443", "app:80"] {
        assert_eq!(addr(text).unwrap().to_string(), text);
    }
    let hook = |text: &str| text.parse::<AppUrl>().unwrap();
    assert_eq!(hook("https://app/bye?x=://").at, Some(tls("app", 443)));
    assert_eq!(hook("https://app/bye?x=://").target, "/bye?x=://");
    assert_eq!(hook("/bye?to=http://x").at, None);
    let s = settings_of(
        "lameduck proxy --upstream https://app --upstream-ca /ca.pem --upstream-name app.internal",
        &laptop(),
    );
    assert!(
        matches!(&s.upstream, UpstreamAddr::Tls { host, name, .. } if host == "app" && name == "app.internal")
    );
    assert_eq!(s.upstream_ca, Some("/ca.pem".into()));
}
