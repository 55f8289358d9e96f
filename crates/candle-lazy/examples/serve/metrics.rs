//! `/metrics`: what the services, the plan cache and the server have counted, in Prometheus' text format (version 0.0.4).

use super::app::App;
use axum::http::StatusCode;
use candle_lazy::exec::plan::cache_stats;
use candle_lazy::nn::service::{Histogram, ServiceStats};
use std::collections::BTreeMap;
use std::fmt::{Display, Write};
use std::sync::{Mutex, PoisonError};

/// Answers by route and status.
#[derive(Debug, Default)]
pub(crate) struct Requests(Mutex<BTreeMap<(String, u16), u64>>);

impl Requests {
    /// Counts an answer. Routes are those of the router, so that there are few.
    pub(crate) fn answered(&self, route: &str, status: StatusCode) {
        let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *counts.entry((route.to_string(), status.as_u16())).or_default() += 1;
    }

    fn snapshot(&self) -> BTreeMap<(String, u16), u64> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// All numbers of now.
pub(crate) fn text(app: &App) -> String {
    let services = [("embedding", app.embedding.stats()), ("generation", app.generation.stats())];
    let mut text = Text::default();
    text.of_services("queued", "gauge", "Requests that wait.", &services, |stats| stats.queued as u64);
    text.of_services("running", "gauge", "Requests that are being computed.", &services, |stats| stats.running as u64);
    text.of_services("submitted_total", "counter", "Requests that were accepted.", &services, |stats| stats.submitted);
    let help = "Requests that were refused: bad input, a full queue, a closed service.";
    text.of_services("refused_total", "counter", help, &services, |stats| stats.refused);
    text.of_services("completed_total", "counter", "Requests that were answered.", &services, |stats| stats.completed);
    text.of_services("failed_total", "counter", "Requests that ended with an error.", &services, |stats| stats.failed);
    let help = "Requests whose callers went away, some of those whose time was over, and what a shutdown ended.";
    text.of_services("cancelled_total", "counter", help, &services, |stats| stats.cancelled);
    let help = "Tokens of prompts and of texts that were computed.";
    text.of_services("prompt_tokens_total", "counter", help, &services, |stats| stats.tokens_in);
    text.of_services("new_tokens_total", "counter", "Tokens that were generated.", &services, |stats| stats.tokens_out);
    text.histograms("batch_size", "Texts per evaluation.", &services, |stats| &stats.batch);
    let help = "From a request's submission to the beginning of its work.";
    text.histograms("wait_seconds", help, &services, |stats| &stats.wait);
    let help = "From the beginning of a request's work to its end.";
    text.histograms("run_seconds", help, &services, |stats| &stats.run);
    text.histograms("evaluation_seconds", "Each evaluation.", &services, |stats| &stats.step);
    let help = "From a generation's submission to its first token.";
    text.histograms("first_token_seconds", help, &services[1..], |stats| &stats.first_token);

    let plans = cache_stats();
    for (name, kind, help, value) in [
        ("plans", "gauge", "Plans that are kept.", plans.plans as u64),
        ("plan_cache_hits_total", "counter", "Evaluations that found their plan.", plans.hits),
        ("plan_cache_misses_total", "counter", "Evaluations that had to make one.", plans.misses),
        ("plan_cache_evicted_total", "counter", "Plans that were dropped for room.", plans.evicted),
    ] {
        text.family(name, kind, help);
        text.sample(name, "", &[], value);
    }

    text.family("http_requests_total", "counter", "Answers by route and status.");
    for ((route, status), count) in app.requests.snapshot() {
        text.sample("http_requests_total", "", &[("route", &route), ("status", &status.to_string())], count);
    }
    let name = "http_requests_in_flight";
    text.family(name, "gauge", "Requests that are being answered, streams included.");
    text.sample(name, "", &[], app.in_flight());
    text.0
}

#[derive(Debug, Default)]
struct Text(String);

impl Text {
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        self.line(format_args!("# HELP candle_lazy_{name} {help}"));
        self.line(format_args!("# TYPE candle_lazy_{name} {kind}"));
    }

    fn sample(&mut self, name: &str, suffix: &str, labels: &[(&str, &str)], value: impl Display) {
        let labels: Vec<String> = labels.iter().map(|(name, value)| format!("{name}=\"{}\"", escaped(value))).collect();
        match labels.is_empty() {
            true => self.line(format_args!("candle_lazy_{name}{suffix} {value}")),
            false => self.line(format_args!("candle_lazy_{name}{suffix}{{{}}} {value}", labels.join(","))),
        }
    }

    fn line(&mut self, line: impl Display) {
        // a string takes everything
        writeln!(self.0, "{line}").unwrap_or_default();
    }

    fn of_services(
        &mut self,
        name: &str,
        kind: &str,
        help: &str,
        services: &[(&str, ServiceStats)],
        value: impl Fn(&ServiceStats) -> u64,
    ) {
        self.family(name, kind, help);
        for (service, stats) in services {
            self.sample(name, "", &[("service", service)], value(stats));
        }
    }

    fn histograms(
        &mut self,
        name: &str,
        help: &str,
        services: &[(&str, ServiceStats)],
        of: impl Fn(&ServiceStats) -> &Histogram,
    ) {
        self.family(name, "histogram", help);
        for (service, stats) in services {
            let histogram = of(stats);
            for (bound, count) in histogram.cumulative() {
                let bound = if bound.is_finite() { bound.to_string() } else { "+Inf".to_string() };
                self.sample(name, "_bucket", &[("service", service), ("le", &bound)], count);
            }
            self.sample(name, "_sum", &[("service", service)], histogram.sum());
            self.sample(name, "_count", &[("service", service)], histogram.count());
        }
    }
}

/// A label's value between quotes.
fn escaped(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}
