//! What an image needs for each runtime: its program with what it loads, and the apps in `runtimes/`.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::images::{node, scratch};

/// Arguments of the image's builder; none if something can't be had here.
type Parts = Option<Vec<String>>;

/// The folder of the apps, which is `/apps` in the image.
pub fn apps() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/kubernetes/runtimes")
}

/// Node with the slow example app.
pub fn node_apps() -> Parts {
    let slow = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/slow/server.js");
    Some(parts(&[("--program", node()), ("--file", format!("{}:/slow/server.js", slow.display()))]))
}

/// A Next.js app, built as `standalone`: without its packages.
pub fn next() -> Parts {
    let folder = scratch("next");
    done(Command::new("cp").arg("-rT").args([&apps().join("next"), &folder]))?;
    done(Command::new("cp").args([&apps().join("fetch.js"), &folder]))?;
    done(Command::new("npm").args(["install", "--silent", "--no-audit", "--no-fund"]).current_dir(&folder))?;
    let mut build = Command::new("npx");
    done(build.args(["next", "build"]).env("NEXT_TELEMETRY_DISABLED", "1").current_dir(&folder))?;
    Some(parts(&[("--program", node()), ("--file", format!("{}/.next/standalone:/next", folder.display()))]))
}

/// Bun, from npm.
pub fn bun() -> Parts {
    from_npm("bun", "bun@1")
}

/// Deno, from npm.
pub fn deno() -> Parts {
    from_npm("deno", "deno@2")
}

fn from_npm(program: &str, package: &str) -> Parts {
    let folder = scratch(program);
    let folder = folder.to_str()?;
    done(Command::new("npm").args([
        "install",
        "--silent",
        "--no-audit",
        "--no-fund",
        "--prefix",
        folder,
        package,
    ]))?;
    let at = Path::new(folder).join("node_modules/.bin").join(program).canonicalize().ok()?;
    Some(parts(&[("--program", format!("{}:/usr/local/bin/{program}", at.display()))]))
}

/// CPython with gunicorn and uvicorn from PyPI, in `/packages`.
pub fn python() -> Parts {
    let packages = scratch("python");
    done(
        Command::new("python3")
            .args(["-m", "pip", "install", "--quiet", "--upgrade", "gunicorn", "uvicorn", "--target"])
            .arg(&packages),
    )?;
    let library = scratch("python-library");
    let _ = std::fs::remove_dir_all(&library);
    // Prints the program, its library, its extensions and its home.
    let copy = "import os, shutil, sys, sysconfig
program, library = os.path.realpath(sys.executable), sysconfig.get_path('stdlib')
shutil.copytree(library, sys.argv[1], ignore=shutil.ignore_patterns('*-packages', 'test', '__pycache__'))
print(program, library, sysconfig.get_config_var('DESTSHARED'), sys.base_prefix, sep='\\n')";
    let paths = output(Command::new("python3").args(["-c", copy]).arg(&library))?;
    let [program, path, extensions, home] = paths.lines().collect::<Vec<_>>().try_into().ok()?;
    let mut all = parts(&[
        ("--program", format!("{program}:/usr/local/bin/python3")),
        ("--file", format!("{}:{path}", library.display())),
        ("--file", format!("{}:/packages", packages.display())),
        ("--env", format!("PYTHONHOME={home}")),
        ("--env", "PYTHONPATH=/packages:/apps".to_owned()),
    ]);
    // They are in the library already; their shared libraries are not.
    for file in std::fs::read_dir(extensions).ok()?.flatten() {
        all.extend(parts(&[("--program", file.path().to_str()?.to_owned())]));
    }
    Some(all)
}

/// A Java runtime with what the app needs, in `/java`.
pub fn java() -> Parts {
    let (classes, runtime) = (scratch("classes"), scratch("java"));
    let _ = std::fs::remove_dir_all(&runtime);
    done(Command::new("javac").arg("-d").arg(&classes).arg(apps().join("App.java")))?;
    done(Command::new("jlink").args(["--add-modules", "jdk.httpserver", "--output"]).arg(&runtime))?;
    let runtime = runtime.display();
    Some(parts(&[
        ("--file", format!("{runtime}:/java")),
        ("--file", format!("{}:/classes", classes.display())),
        ("--program", format!("{runtime}/bin/java:/usr/local/bin/java")),
        ("--program", format!("{runtime}/lib/server/libjvm.so:/usr/local/lib/libjvm.so")),
    ]))
}

/// nginx.
pub fn nginx() -> Parts {
    program("/usr/sbin/nginx", "nginx")
}

/// PHP's own server.
pub fn php() -> Parts {
    program("/usr/bin/php", "php")
}

/// php-fpm, whose name has its version.
pub fn fpm() -> Parts {
    let names = std::fs::read_dir("/usr/sbin").ok()?.flatten().map(|file| file.path());
    let fpm =
        names.filter_map(|path| path.to_str().map(str::to_owned)).find(|path| path.contains("/php-fpm"))?;
    program(&fpm, "php-fpm")
}

/// nginx and php-fpm.
pub fn nginx_and_fpm() -> Parts {
    Some([nginx()?, fpm()?].concat())
}

/// The Go program, statically linked.
pub fn go() -> Parts {
    let program = scratch("static-go");
    let mut build = Command::new("go");
    done(build.args(["build", "-o"]).arg(&program).arg(apps().join("main.go")).env("CGO_ENABLED", "0"))?;
    Some(parts(&[("--file", format!("{}:/usr/local/bin/static-go", program.display()))]))
}

/// MariaDB, with an empty database in `/data`, and Redis.
pub fn databases() -> Parts {
    let data = scratch("mariadb");
    let _ = std::fs::remove_dir_all(&data);
    let folder = format!("--datadir={}", data.display());
    done(
        Command::new("mariadb-install-db")
            .args(["--no-defaults", "--skip-test-db", "--skip-log-bin"])
            .args([&folder, "--innodb-log-file-size=8M", "--user=root"]),
    )?;
    // The user of the restricted pods.
    done(Command::new("chown").args(["-R", "65532"]).arg(&data))?;
    let mut all =
        parts(&[("--file", format!("{}:/data", data.display())), ("--file", "/usr/share/mysql".to_owned())]);
    for (path, name) in [
        ("/usr/sbin/mariadbd", "mariadbd"),
        ("/usr/bin/redis-server", "redis-server"),
        ("/usr/bin/redis-cli", "redis-cli"),
    ] {
        all.extend(program(path, name)?);
    }
    Some(all)
}

/// The gRPC client.
pub fn grpc_client() -> Option<PathBuf> {
    let program = scratch("grpc-client");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/grpc_go");
    done(Command::new("go").args(["build", "-o"]).arg(&program).arg(".").current_dir(source))?;
    Some(program)
}

fn program(path: &str, name: &str) -> Parts {
    let path = Path::new(path).canonicalize().ok()?;
    Some(parts(&[("--program", format!("{}:/usr/local/bin/{name}", path.display()))]))
}

fn parts(pairs: &[(&str, String)]) -> Vec<String> {
    pairs.iter().flat_map(|(option, value)| [(*option).to_owned(), value.clone()]).collect()
}

fn done(command: &mut Command) -> Option<()> {
    output(command).map(|_| ())
}

/// Output of a command that builds or fetches something; none if it fails, which is printed.
fn output(command: &mut Command) -> Option<String> {
    let output = command.output();
    if let Ok(output) = &output
        && output.status.success()
    {
        return String::from_utf8(output.stdout.clone()).ok();
    }
    eprintln!("{command:?}: {output:?}");
    None
}
