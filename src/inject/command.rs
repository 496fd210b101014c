//! `lameduck inject` and `uninject`: reads files, writes files or stdout, reports on stderr.

use std::fs;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use similar::TextDiff;

use super::manifest::{Manifest, Outcome, ReportLine, Task, transform};

/// Arguments of `inject` and `uninject`.
#[derive(Clone, Debug)]
pub struct FileTask {
    /// Files, folders, or `-` for stdin.
    pub inputs: Vec<PathBuf>,
    /// Inject or uninject.
    pub task: Task,
    /// Where the manifests go.
    pub output: Output,
    /// Exit with 1 if anything would change.
    pub check: bool,
}

/// Where the manifests go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Output {
    /// All manifests to stdout, one after the other, in the form `kubectl apply -f -` accepts.
    Stdout,
    /// Back into the input files.
    InPlace,
    /// A unified diff to stdout.
    Diff,
    /// No output.
    Nothing,
}

const CHANGED: u8 = 1;
const FAILED: u8 = 2;

/// Runs the command. Exit code: 0 on success; 1 if `check` found something to change; 2 if a file could not be read,
/// parsed or written.
pub fn run(request: &FileTask) -> ExitCode {
    match go(request) {
        Ok(code) => code.into(),
        // The reader closed our stdout; that is not an error.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => FAILED.into(),
        Err(error) => {
            eprintln!("lameduck: {error}");
            FAILED.into()
        }
    }
}

fn go(request: &FileTask) -> io::Result<u8> {
    let mut sources = Vec::new();
    for input in &request.inputs {
        read(input, true, &mut sources)?;
    }
    let (texts, report) = transform(&sources, &request.task);
    let changed: Vec<_> = sources.iter().zip(&texts).filter(|(source, text)| source.text != **text).collect();
    match request.output {
        Output::Stdout => io::stdout().write_all(joined(&texts).as_bytes())?,
        Output::Diff => {
            let mut out = io::stdout().lock();
            for (source, text) in &changed {
                let diff = TextDiff::from_lines(source.text.as_str(), text.as_str());
                write!(out, "{}", diff.unified_diff().header(&source.name, &source.name))?;
            }
        }
        Output::InPlace => {
            for (source, text) in &changed {
                fs::write(&source.name, text).map_err(|error| at(&source.name, &error))?;
            }
        }
        Output::Nothing => {}
    }
    io::stderr().write_all(told(&report, request).as_bytes())?;
    let failed = report.iter().any(|line| matches!(line.outcome, Outcome::Failed(_)));
    let found = request.check && !changed.is_empty();
    Ok(if failed { FAILED } else { u8::from(found) * CHANGED })
}

/// Reads a file, or all manifests in a folder and its subfolders, sorted by name. Hidden files are skipped.
fn read(path: &Path, named: bool, sources: &mut Vec<Manifest>) -> io::Result<()> {
    let name = path.display().to_string();
    if named && name == "-" {
        let mut bytes = Vec::new();
        io::stdin().read_to_end(&mut bytes)?;
        return text(name, bytes).map(|source| sources.push(source));
    }
    if path.is_dir() {
        let entries: io::Result<Vec<_>> = fs::read_dir(path).map_err(|error| at(&name, &error))?.collect();
        let mut entries = entries?;
        entries.sort_by_key(fs::DirEntry::file_name);
        for entry in entries.iter().filter(|entry| !entry.file_name().as_encoded_bytes().starts_with(b".")) {
            let path = entry.path();
            let manifest =
                path.extension().is_some_and(|ext| ["yaml", "yml", "json"].iter().any(|e| ext == *e));
            // Symlinked folders are skipped because they could form a cycle.
            if entry.file_type()?.is_dir() || (manifest && !path.is_dir()) {
                read(&path, false, sources)?;
            }
        }
        return Ok(());
    }
    let bytes = fs::read(path).map_err(|error| at(&name, &error))?;
    text(name, bytes).map(|source| sources.push(source))
}

fn text(name: String, bytes: Vec<u8>) -> io::Result<Manifest> {
    match String::from_utf8(bytes) {
        Ok(text) => Ok(Manifest { name, text }),
        Err(_) => Err(at(&name, &io::Error::from(io::ErrorKind::InvalidData))),
    }
}

fn at(name: &str, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{name}: {error}"))
}

/// One manifest, possibly with several documents.
fn joined(texts: &[String]) -> String {
    let mut all = String::new();
    for text in texts {
        if !all.is_empty() && !all.ends_with('\n') {
            all.push('\n');
        }
        if !all.is_empty() && !text.starts_with("---") {
            all.push_str("---\n");
        }
        all.push_str(text);
    }
    all
}

fn told(report: &[ReportLine], request: &FileTask) -> String {
    let mut text = String::new();
    let (workload, service) = match request.task {
        Task::Inject { .. } => ("injected", "leads to the port by its name"),
        Task::Uninject => ("taken out", "leads to the port as before"),
    };
    for line in report {
        let outcome = match &line.outcome {
            Outcome::Changed if line.what.starts_with("service/") => service.to_owned(),
            Outcome::Changed => workload.to_owned(),
            Outcome::Unchanged => "nothing to change".to_owned(),
            Outcome::Skipped(why) => format!("skipped: {why}"),
            Outcome::Failed(why) => format!("not understood, left as it is: {why}"),
        };
        text += &format!("{}: {}: {outcome}\n", line.source, line.what);
        for warning in &line.warnings {
            text += &format!("{}: {}: warning: {warning}\n", line.source, line.what);
        }
    }
    if let Task::Inject { seed, .. } = &request.task
        && seed.is_empty()
        && report.iter().any(|line| line.outcome == Outcome::Changed)
    {
        text += "warning: without --token-seed, everyone who knows a workload's name knows the token of its /drain\n";
    }
    text
}
