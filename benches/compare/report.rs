//! Medians and ratios: the table and the JSON.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::proxy::Proxy;

/// What the ratios are to.
const BASE: Proxy = Proxy::Nginx;

/// Every figure of a run, in the order they were first measured.
#[derive(Default)]
pub struct Report {
    figures: Vec<Figure>,
    /// What a reader must know besides: who was left out, what failed.
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

    /// The median of each round's ratio to the same round's nginx: what disturbs a round disturbs both.
    fn ratio(&self, proxy: Proxy) -> Option<f64> {
        let (ours, base) = (self.samples.get(&proxy)?, self.samples.get(&BASE)?);
        median(&ours.iter().zip(base).map(|(ours, base)| ours / base).collect::<Vec<_>>())
    }
}

impl Report {
    /// Takes one round's sample of a figure.
    pub fn add(&mut self, name: &str, unit: &'static str, proxy: Proxy, sample: f64) {
        let known = self.figures.iter().position(|figure| figure.name == name);
        let index = known.unwrap_or_else(|| {
            self.figures.push(Figure { name: name.to_owned(), unit, samples: BTreeMap::new() });
            self.figures.len() - 1
        });
        self.figures[index].samples.entry(proxy).or_default().push(sample);
    }

    /// The medians as a Markdown table, each with its ratio to nginx.
    pub fn table(&self, proxies: &[Proxy]) -> String {
        let mut rows = vec![vec!["figure".to_owned()]];
        rows[0].extend(proxies.iter().map(|proxy| proxy.name().to_owned()));
        for figure in &self.figures {
            let mut row = vec![format!("{}, {}", figure.name, figure.unit)];
            row.extend(proxies.iter().map(|proxy| cell(figure, *proxy)));
            rows.push(row);
        }
        let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
        let widths: Vec<usize> = (0..=proxies.len()).map(width).collect();
        let rule: Vec<String> = widths.iter().map(|width| "-".repeat(*width)).collect();
        rows.insert(1, rule);
        let line = |row: &Vec<String>| {
            let cells = row.iter().zip(&widths).map(|(cell, width)| format!(" {cell:<width$} |"));
            format!("|{}\n", cells.collect::<String>())
        };
        rows.iter().map(line).collect()
    }

    /// Every sample, median and ratio.
    pub fn json(&self) -> Value {
        let figures = self.figures.iter().map(|figure| {
            let proxies = figure.samples.iter().map(|(proxy, samples)| {
                let entry = json!({
                    "median": median(samples), "ratio_to_nginx": figure.ratio(*proxy), "samples": samples,
                });
                (proxy.name().to_owned(), entry)
            });
            json!({ "figure": figure.name, "unit": figure.unit, "proxies": Value::Object(proxies.collect()) })
        });
        json!({ "figures": figures.collect::<Vec<_>>(), "notes": self.notes })
    }
}

fn cell(figure: &Figure, proxy: Proxy) -> String {
    let Some(median) = figure.median(proxy) else { return String::new() };
    let ratio = figure.ratio(proxy).filter(|_| proxy != BASE);
    ratio.map_or_else(|| number(median), |ratio| format!("{} ({ratio:.2}×)", number(median)))
}

/// Three figures or more, with commas between thousands.
fn number(value: f64) -> String {
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

/// The middle one, or the mean of the two in the middle; none of nothing.
fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let upper = sorted.get(sorted.len() / 2)?;
    let lower = sorted.get((sorted.len() - 1) / 2)?;
    Some((lower + upper) / 2.0)
}
