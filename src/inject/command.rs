//! `lameduck inject`, `uninject` and `audit`: reads files, writes files or stdout, reports on stderr.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use similar::TextDiff;

use super::audit;
use super::manifest::{Manifest, Outcome, ReportLine, Task, transform};
use super::model::PatchSettings;
use super::names::DISABLED;
use super::text::{is_all_json, split};

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
    /// Exit with 1 if anything was skipped that its owner has not disabled.
    pub strict: bool,
}

impl FileTask {
    /// Whether the manifests go somewhere.
    fn writes(&self) -> bool {
        matches!(self.output, Output::Stdout | Output::InPlace)
    }
}

/// Arguments of `audit`.
#[derive(Clone, Debug)]
pub struct AuditTask {
    /// Files, folders, or `-` for stdin.
    pub inputs: Vec<PathBuf>,
    /// What the webhook would add.
    pub settings: Box<PatchSettings>,
    /// The sidecar's image; without it any with the tag of this version.
    pub image: Option<String>,
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

const FOUND: u8 = 1;
const FAILED: u8 = 2;
/// Limit on a manifest in bytes. Its tree takes some twenty times as much memory.
const MAX_LEN: usize = 64 << 20;

/// Runs the command. Exit code: 0 on success; 1 if `check` found something to change or `strict` something skipped; 2 if a
/// file could not be read, parsed or written.
pub fn run(request: &FileTask) -> ExitCode {
    ended(go(request))
}

/// Runs `audit`. Exit code: 0 if every pod has what it should have; 1 if one doesn't; 2 if a file could not be read.
pub fn audit(task: &AuditTask) -> ExitCode {
    ended(audited(task))
}

fn ended(code: io::Result<u8>) -> ExitCode {
    match code {
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
    let (mut sources, mut unread) = (Vec::new(), String::new());
    for input in &request.inputs {
        read(input, &mut sources, &mut unread)?;
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
    io::stderr().write_all((told(&report, request) + &unread).as_bytes())?;
    let failed = !unread.is_empty() || report.iter().any(|line| matches!(line.outcome, Outcome::Failed(_)));
    let skipped = |line: &ReportLine| matches!(&line.outcome, Outcome::Skipped(why) if why != DISABLED);
    let found = (request.check && !changed.is_empty()) || (request.strict && report.iter().any(skipped));
    Ok(if failed { FAILED } else { u8::from(found) * FOUND })
}

fn audited(task: &AuditTask) -> io::Result<u8> {
    let (mut sources, mut unread, mut objects) = (Vec::new(), String::new(), Vec::new());
    for input in &task.inputs {
        read(input, &mut sources, &mut unread)?;
    }
    let wrong = |why: String| io::Error::new(io::ErrorKind::InvalidData, why);
    for source in &sources {
        objects.extend(audit::objects(&source.text).map_err(|why| wrong(format!("{}: {why}", source.name)))?);
    }
    let image = task.image.as_deref();
    let audit = audit::audit(&objects, &task.settings, image, env!("CARGO_PKG_VERSION")).map_err(wrong)?;
    io::stdout().write_all(audit.text.as_bytes())?;
    io::stderr().write_all(unread.as_bytes())?;
    Ok(if unread.is_empty() { u8::from(audit.found) * FOUND } else { FAILED })
}

/// Reads an input: a file, all manifests in a folder and its subfolders, or stdin. A file of a folder that can't be read
/// is added to `unread`, with the reason.
///
/// # Errors
/// An input can't be read.
pub fn read(input: &Path, sources: &mut Vec<Manifest>, unread: &mut String) -> io::Result<()> {
    if input == Path::new("-") {
        sources.push(manifest("-".to_owned(), io::stdin())?);
    } else if input.is_dir() {
        read_folder(input, sources, unread)?;
    } else {
        let name = input.display().to_string();
        let file = File::open(input).map_err(|error| at(&name, &error))?;
        sources.push(manifest(name, file)?);
    }
    Ok(())
}

/// Reads a folder, sorted by name. Hidden files are skipped, and symlinked folders, which could form a cycle.
fn read_folder(folder: &Path, sources: &mut Vec<Manifest>, unread: &mut String) -> io::Result<()> {
    let name = folder.display().to_string();
    let entries: io::Result<Vec<_>> = fs::read_dir(folder).map_err(|error| at(&name, &error))?.collect();
    let mut entries = entries?;
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries.iter().filter(|entry| !entry.file_name().as_encoded_bytes().starts_with(b".")) {
        let path = entry.path();
        let manifest = path.extension().is_some_and(|ext| ["yaml", "yml", "json"].iter().any(|e| ext == *e));
        if (entry.file_type()?.is_dir() || (manifest && !path.is_dir()))
            && let Err(why) = read(&path, sources, unread)
        {
            *unread += &format!("{why}\n");
        }
    }
    Ok(())
}

fn manifest(name: String, from: impl Read) -> io::Result<Manifest> {
    let mut bytes = Vec::new();
    from.take(MAX_LEN as u64 + 1).read_to_end(&mut bytes).map_err(|error| at(&name, &error))?;
    let told = |why: String| io::Error::new(io::ErrorKind::InvalidData, format!("{name}: {why}"));
    if bytes.len() > MAX_LEN {
        return Err(told(format!("left as it is: it has over {} MiB", MAX_LEN >> 20)));
    }
    match String::from_utf8(bytes) {
        Ok(text) => Ok(Manifest { name, text }),
        Err(_) => Err(told("left as it is: it is not UTF-8".to_owned())),
    }
}

fn at(name: &str, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{name}: {error}"))
}

/// One manifest, possibly with several documents.
fn joined(texts: &[String]) -> String {
    if let [one] = texts {
        return one.clone();
    }
    // kubectl takes a stream for JSON if it begins with a brace, and knows no `---` then.
    let parts =
        texts.iter().flat_map(|text| if is_all_json(text) { split(text) } else { vec![text.as_str()] });
    let mut all = String::new();
    for text in parts.map(|part| part.trim_start_matches('\u{feff}')).filter(|part| !part.trim().is_empty()) {
        if !all.is_empty() && !all.ends_with('\n') {
            all.push('\n');
        }
        if !text.starts_with("---") && (!all.is_empty() || is_all_json(text)) {
            all.push_str("---\n");
        }
        all.push_str(text);
    }
    all
}

fn told(report: &[ReportLine], request: &FileTask) -> String {
    let mut text = String::new();
    let restored = match request.writes() {
        true => "leads to the port as before",
        false => "would lead to the port as before",
    };
    let (workload, service) = match (&request.task, request.writes()) {
        (Task::Inject { .. }, true) => ("injected", "leads to the port by its name"),
        (Task::Inject { .. }, false) => ("would be injected", "would lead to the port by its name"),
        (Task::Uninject, true) => ("taken out", restored),
        (Task::Uninject, false) => ("would be taken out", restored),
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
