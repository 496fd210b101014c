//! How many of the workloads in other people's repositories `inject` takes, and whether it keeps its promises there: the
//! output parses, a second run changes nothing, and `uninject` gives back every byte.

use std::collections::BTreeMap;
use std::error::Error;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use std::{env, fs};

use lameduck::cli::{annotated_flags, check_proxy};
use lameduck::inject::command::read;
use lameduck::inject::diff::Pointer;
use lameduck::inject::kinds::{Role, role};
use lameduck::inject::manifest::{Manifest, Outcome, ReportLine, Task, transform};
use lameduck::inject::model::Written;
use lameduck::inject::text::{Document, is_all_json, split};
use lameduck::inject::{PatchSettings, Services, yaml};
use serde_json::{Value, json};

/// Totals over all repositories.
#[derive(Default)]
struct Totals {
    repositories: usize,
    files: usize,
    documents: usize,
    not_understood: usize,
    workloads: usize,
    served: usize,
    injected: usize,
    no_http: usize,
    reasons: BTreeMap<String, usize>,
    took: Duration,
    slowest: (Duration, String),
    unparsable: Vec<String>,
    not_idempotent: Vec<String>,
    not_restored: Vec<String>,
    lines: Vec<Value>,
}

fn main() -> Result<(), Box<dyn Error>> {
    let (mut folders, mut report, mut capture) = (Vec::new(), None, None);
    let mut args = env::args().skip(1).filter(|arg| arg != "--bench");
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--json" => report = args.next(),
            "--capture" => capture = args.next(),
            _ => folders.push(PathBuf::from(arg)),
        }
    }
    if folders.is_empty() {
        return Err("give folders of repositories: cargo bench --bench inject_coverage -- DIR...".into());
    }
    let mut totals = Totals::default();
    for folder in folders {
        let mut repositories: Vec<_> = fs::read_dir(folder)?.collect::<Result<_, _>>()?;
        repositories.sort_by_key(fs::DirEntry::file_name);
        for repository in repositories.iter().map(fs::DirEntry::path).filter(|path| path.is_dir()) {
            totals.add(&repository, capture.as_deref())?;
        }
    }
    print!("{}", totals.table());
    if let Some(report) = report {
        fs::write(report, serde_json::to_vec_pretty(&totals.lines)?)?;
    }
    Ok(())
}

fn task() -> Task {
    let settings = PatchSettings {
        image: "lameduck".to_owned(),
        pull_policy: None,
        resources: Default::default(),
        token: String::new(),
        service_ports: vec![],
        services: Services::Seen,
        check: check_proxy,
        flags: annotated_flags,
    };
    let (seed, namespace) = ("coverage".to_owned(), "default".to_owned());
    Task::Inject { settings: Box::new(settings), seed, namespace, kinds: vec![] }
}

/// The text with `lameduck.dev/capture` on every pod template that can be edited.
fn annotated(text: &str, capture: &str) -> String {
    split(text)
        .into_iter()
        .map(|part| with_capture(part, capture).unwrap_or_else(|| part.to_owned()))
        .collect()
}

fn with_capture(text: &str, capture: &str) -> Option<String> {
    let document = Document::parse(text).ok()??;
    let (mut edits, mut after) = (Vec::new(), document.value.clone());
    let items = document.value["items"].as_array().map_or(0, Vec::len);
    let places = (0..items).map(|n| Pointer::default().join("items").join(n)).chain([Pointer::default()]);
    for at in places {
        let mut object = document.value.pointer(&at.to_string())?.clone();
        let Role::Workload(template) = role(&object, Some(&vec![])) else { continue };
        let Some(pod) = object.pointer_mut(&template.to_string()).filter(|pod| pod.is_object()) else {
            continue;
        };
        let fits = |value: &Value| value.is_null() || value.is_object();
        if !fits(&pod["metadata"]) || !fits(&pod["metadata"]["annotations"]) {
            continue;
        }
        pod["metadata"]["annotations"]["lameduck.dev/capture"] = json!(capture);
        edits.push(document.edit(&at, &object, &Written::new()).ok()?);
        *after.pointer_mut(&at.to_string())? = object;
    }
    document.with(&edits, &after).ok()
}

impl Totals {
    /// Injects one repository as its user would: the whole folder.
    fn add(&mut self, repository: &Path, capture: Option<&str>) -> Result<(), Box<dyn Error>> {
        let (mut sources, mut unread) = (Vec::new(), String::new());
        read(repository, &mut sources, &mut unread)?;
        if let Some(capture) = capture {
            sources.iter_mut().for_each(|source| source.text = annotated(&source.text, capture));
        }
        let began = Instant::now();
        let (texts, report) = transform(&sources, &task());
        let took = began.elapsed();
        self.took += took;
        self.slowest = (took, repository.display().to_string()).max(self.slowest.clone());
        self.repositories += 1;
        self.files += sources.len() + unread.lines().count();
        self.documents += sources.iter().map(|source| split(&source.text).len()).sum::<usize>();
        report.iter().for_each(|line| self.count(line));
        self.check(&sources, texts);
        Ok(())
    }

    fn count(&mut self, line: &ReportLine) {
        if line.what.starts_with("service/") {
            return;
        }
        if matches!(line.outcome, Outcome::Failed(_)) {
            self.not_understood += 1;
            return;
        }
        self.workloads += 1;
        let outcome = match &line.outcome {
            Outcome::Skipped(why) => kind_of(why),
            _ => "injected".to_owned(),
        };
        let (source, what) = (&line.source, &line.what);
        self.lines.push(json!({"file": source, "what": what, "served": line.served, "outcome": outcome}));
        if !line.served {
            return;
        }
        self.served += 1;
        match &line.outcome {
            Outcome::Skipped(why) if why.starts_with("it serves no HTTP") => self.no_http += 1,
            Outcome::Skipped(_) => *self.reasons.entry(outcome).or_default() += 1,
            _ => self.injected += 1,
        }
    }

    fn check(&mut self, sources: &[Manifest], texts: Vec<String>) {
        let name = |source: &Manifest| source.name.clone();
        let injected: Vec<_> =
            sources.iter().zip(texts).map(|(source, text)| Manifest { name: name(source), text }).collect();
        for (before, after) in sources.iter().zip(&injected).filter(|(before, after)| before != after) {
            let json = |text: &str| serde_json::from_str::<Value>(text).is_ok();
            let was_json = is_all_json(&before.text);
            let parsed = |text: &str| split(text).iter().filter(|text| yaml::parse(text).is_ok()).count();
            let parses = parsed(&before.text) == parsed(&after.text);
            if !parses || (was_json && !split(&after.text).into_iter().all(json)) {
                self.unparsable.push(name(before));
            }
        }
        let (again, _) = transform(&injected, &task());
        let (back, _) = transform(&injected, &Task::Uninject);
        let differ = |texts: &[String], from: &[Manifest]| -> Vec<String> {
            let pairs = from.iter().zip(texts).filter(|(source, text)| source.text != **text);
            pairs.map(|(source, _)| name(source)).collect()
        };
        self.not_idempotent.extend(differ(&again, &injected));
        self.not_restored.extend(differ(&back, sources));
    }

    fn table(&self) -> String {
        let mut text = String::new();
        let Self { repositories, files, documents, not_understood, workloads, served, injected, .. } = self;
        let web = served - self.no_http;
        let share = |n: usize| format!("{:>5.1} %", 100.0 * n as f64 / web.max(1) as f64);
        let _ = writeln!(text, "{repositories} repositories, {files} files, {documents} documents");
        let _ = writeln!(text, "{not_understood} documents not understood (templates, other formats)");
        let _ = writeln!(text, "{workloads} workloads, {served} of them behind a Service");
        let _ = writeln!(
            text,
            "{} of these serve no HTTP and are left alone; of the other {web} are",
            self.no_http
        );
        let _ = writeln!(text, "{:>8} {} injected", injected, share(*injected));
        let mut reasons: Vec<_> = self.reasons.iter().collect();
        reasons.sort_by_key(|(_, count)| std::cmp::Reverse(**count));
        for (reason, count) in reasons {
            let _ = writeln!(text, "{count:>8} {} skipped: {reason}", share(*count));
        }
        let (slowest, name) = &self.slowest;
        let _ = writeln!(
            text,
            "{:.1} s; the slowest repository took {:.1} s: {name}",
            self.took.as_secs_f64(),
            slowest.as_secs_f64()
        );
        for (what, files) in [
            ("output that does not parse", &self.unparsable),
            ("changed by a second run", &self.not_idempotent),
            ("not byte for byte as before after uninject", &self.not_restored),
        ] {
            let _ = writeln!(text, "{} files: {what}", files.len());
            text.extend(files.iter().map(|file| format!("         {file}\n")));
        }
        text
    }
}

/// A reason without the names and numbers in it.
fn kind_of(reason: &str) -> String {
    let mut kind = String::new();
    for word in reason.split(' ') {
        let named = word.contains(|c: char| c.is_ascii_digit() || c == '\'' || c == '/' || c == '=');
        kind += if named { "… " } else { word };
        kind += if named { "" } else { " " };
    }
    kind.trim_end().chars().take(110).collect()
}
