//! Medians and ratios, as a table and as JSON.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::proxy::Proxy;

/// Base of the ratios in the table of all figures.
const BASE: Proxy = Proxy::Nginx;

/// All figures of a run, in the order of their first sample.
#[derive(Default)]
pub struct Report {
    figures: Vec<Figure>,
    /// Notes for the reader: proxies that were left out, failures.
    pub notes: Vec<String>,
}

struct Figure {
    name: String,
    unit: &'static str,
    /// One sample per round.
    samples: BTreeMap<Proxy, Vec<f64>>,
}

impl Figure {
    fn median(&self, proxy: Proxy) -> Option<f64> {
        median(self.samples.get(&proxy)?)
    }

    /// Median over the rounds of `combine` applied to the two samples of a round: a disturbance in a round affects
    /// both.
    fn compare(&self, ours: Proxy, base: Proxy, combine: fn(f64, f64) -> f64) -> Option<f64> {
        let (ours, base) = (self.samples.get(&ours)?, self.samples.get(&base)?);
        median(&ours.iter().zip(base).map(|(ours, base)| combine(*ours, *base)).collect::<Vec<_>>())
    }
}

impl Report {
    /// Adds one sample of a figure.
    pub fn add(&mut self, name: &str, unit: &'static str, proxy: Proxy, sample: f64) {
        let known = self.figures.iter().position(|figure| figure.name == name);
        let index = known.unwrap_or_else(|| {
            self.figures.push(Figure { name: name.to_owned(), unit, samples: BTreeMap::new() });
            self.figures.len() - 1
        });
        self.figures[index].samples.entry(proxy).or_default().push(sample);
    }

    fn figure(&self, name: &str) -> Option<&Figure> {
        self.figures.iter().find(|figure| figure.name == name)
    }

    /// Median of the ratios per round.
    pub fn ratio(&self, figure: &str, ours: Proxy, base: Proxy) -> Option<f64> {
        self.figure(figure)?.compare(ours, base, |ours, base| ours / base)
    }

    /// Median of the differences per round.
    pub fn difference(&self, figure: &str, ours: Proxy, base: Proxy) -> Option<f64> {
        self.figure(figure)?.compare(ours, base, |ours, base| ours - base)
    }

    /// Median over the rounds.
    pub fn median(&self, figure: &str, proxy: Proxy) -> Option<f64> {
        self.figure(figure)?.median(proxy)
    }

    /// lameduck's samples, one per round.
    pub fn samples(&self, figure: &str) -> Option<&Vec<f64>> {
        self.figure(figure)?.samples.get(&Proxy::Lameduck)
    }

    /// Unit of a figure.
    pub fn unit(&self, figure: &str) -> &'static str {
        self.figure(figure).map_or("", |figure| figure.unit)
    }

    /// Medians as a Markdown table, each with its ratio to nginx.
    pub fn table(&self, proxies: &[Proxy]) -> String {
        let mut rows = vec![vec!["figure".to_owned()]];
        rows[0].extend(proxies.iter().map(|proxy| proxy.name().to_owned()));
        for figure in &self.figures {
            let mut row = vec![format!("{}, {}", figure.name, figure.unit)];
            row.extend(proxies.iter().map(|proxy| cell(figure, *proxy)));
            rows.push(row);
        }
        table(&rows)
    }

    /// All samples, medians and ratios.
    pub fn json(&self) -> Value {
        let figures = self.figures.iter().map(|figure| {
            let proxies = figure.samples.iter().map(|(proxy, samples)| {
                let entry = json!({
                    "median": median(samples), "samples": samples,
                    "ratio_to_nginx": figure.compare(*proxy, BASE, |ours, base| ours / base),
                });
                (proxy.name().to_owned(), entry)
            });
            json!({ "figure": figure.name, "unit": figure.unit, "proxies": Value::Object(proxies.collect()) })
        });
        json!({ "figures": figures.collect::<Vec<_>>(), "notes": self.notes })
    }
}

/// Formats rows as a Markdown table; the first row is the header.
pub fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.first().map_or(0, Vec::len);
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let rule: Vec<String> = widths.iter().map(|width| "-".repeat(*width)).collect();
    let line = |row: &Vec<String>| {
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!(" {cell:<width$} |"));
        format!("|{}\n", cells.collect::<String>())
    };
    let (head, body) = rows.split_at(rows.len().min(1));
    head.iter().chain([&rule]).chain(body).map(line).collect()
}

fn cell(figure: &Figure, proxy: Proxy) -> String {
    let Some(median) = figure.median(proxy) else { return String::new() };
    let ratio = figure.compare(proxy, BASE, |ours, base| ours / base);
    let ratio = ratio.filter(|ratio| proxy != BASE && ratio.is_finite());
    ratio.map_or_else(|| number(median), |ratio| format!("{} ({ratio:.2}×)", number(median)))
}

/// Formats a number with at least three digits, and commas between thousands.
pub fn number(value: f64) -> String {
    let decimals = match value.abs() {
        v if v < 10.0 => 2,
        v if v < 1000.0 => 1,
        _ => 0,
    };
    let text = format!("{value:.decimals$}");
    if decimals > 0 {
        return text;
    }
    let digit = |(index, digit)| {
        if index > 0 && (text.len() - index) % 3 == 0 { format!(",{digit}") } else { format!("{digit}") }
    };
    text.chars().enumerate().map(digit).collect()
}

/// The middle value, or the mean of the two in the middle; none for no values.
pub fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let upper = sorted.get(sorted.len() / 2)?;
    let lower = sorted.get((sorted.len() - 1) / 2)?;
    Some((lower + upper) / 2.0)
}
