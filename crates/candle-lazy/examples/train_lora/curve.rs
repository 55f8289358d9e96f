//! The course of a loss, as text and as a picture.

use std::fmt::Write as _;

/// The eight heights of a bar.
const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
/// Width and height of the picture, and the margin around the curve, in pixels.
const SIZE: (f64, f64) = (640.0, 320.0);
const MARGIN: f64 = 40.0;

fn range(losses: &[f64]) -> (f64, f64) {
    let finite = losses.iter().copied().filter(|loss| loss.is_finite());
    finite.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), loss| (low.min(loss), high.max(loss)))
}

/// A line of at most `width` bars, each the mean of its share of the losses.
pub(crate) fn text(losses: &[f64], width: usize) -> String {
    let per = losses.len().div_ceil(width.max(1)).max(1);
    let means: Vec<f64> = losses.chunks(per).map(|part| part.iter().sum::<f64>() / part.len() as f64).collect();
    let (low, high) = range(&means);
    let bar = |loss: &f64| {
        let height = if high > low { (loss - low) / (high - low) } else { 0.0 };
        BARS.get((height * 7.0).round() as usize).copied().unwrap_or('?')
    };
    means.iter().map(bar).collect()
}

/// An SVG of the training losses, by step, and of the held-out losses, by the step after which they were taken.
pub(crate) fn svg(losses: &[(u64, f64)], held_out: &[(u64, f64)]) -> String {
    let all: Vec<f64> = losses.iter().chain(held_out).map(|(_, loss)| *loss).collect();
    let (_, high) = range(&all);
    let high = if high.is_finite() && high > 0.0 { high } else { 1.0 };
    let last = losses.iter().chain(held_out).map(|(step, _)| *step).max().unwrap_or(1).max(1) as f64;
    let (width, height) = SIZE;
    let x = |step: u64| MARGIN + step as f64 / last * (width - 2.0 * MARGIN);
    let y = |loss: f64| height - MARGIN - loss / high * (height - 2.0 * MARGIN);
    let points = |curve: &[(u64, f64)]| {
        let finite = curve.iter().filter(|(_, loss)| loss.is_finite());
        finite.map(|(step, loss)| format!("{:.1},{:.1}", x(*step), y(*loss))).collect::<Vec<_>>().join(" ")
    };
    let (left, bottom, top) = (MARGIN, height - MARGIN, MARGIN);
    let mut svg =
        format!("<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" font-size=\"12\">\n");
    // writing to a String cannot fail
    let _ = writeln!(svg, "<path d=\"M{left} {top}V{bottom}H{}\" fill=\"none\" stroke=\"black\"/>", width - MARGIN);
    for (curve, colour) in [(losses, "steelblue"), (held_out, "firebrick")] {
        let _ = writeln!(svg, "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\"/>", points(curve));
    }
    let _ = writeln!(svg, "<text x=\"4\" y=\"{top}\">{high:.2}</text><text x=\"4\" y=\"{bottom}\">0</text>");
    let _ = writeln!(svg, "<text x=\"{}\" y=\"{}\">step {last}</text>", width - 2.0 * MARGIN, height - 12.0);
    let _ = writeln!(svg, "<text x=\"{left}\" y=\"{}\" fill=\"steelblue\">loss of the steps</text>", top - 12.0);
    let _ = writeln!(svg, "<text x=\"{}\" y=\"{}\" fill=\"firebrick\">held-out loss</text>", left + 140.0, top - 12.0);
    svg.push_str("</svg>\n");
    svg
}
