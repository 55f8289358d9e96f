//! For how long a batch waits for more.

use parking_lot::Mutex;
use std::time::{Duration, Instant};

/// How long the first request of a batch waits for others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum MaxWait {
    /// As long as it pays: not at all while one caller at a time asks, since whatever arrives while a batch runs is the next one anyway;
    /// where several have asked at once, until as many (at most 16) have come again, for at most an eighth of the time that a batch takes,
    /// never more than a millisecond, nor less than 20 µs, so that small requests are not called for one by one.
    #[default]
    Adaptive,
    /// So long, counted from the arrival of the first. Zero takes what is there.
    Fixed(Duration),
}

/// What is drawn as one batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    /// The most requests of a batch; at least one.
    pub max_batch: usize,
    /// How long the first of them waits for the others.
    pub max_wait: MaxWait,
}

impl Default for Window {
    /// At most 64, adaptive.
    fn default() -> Self {
        Self { max_batch: 64, max_wait: MaxWait::Adaptive }
    }
}

/// The longest adaptive wait.
const LONGEST: Duration = Duration::from_millis(1);
/// The shortest one: to be called for every request takes longer than a small request does.
const SHORTEST: Duration = Duration::from_micros(20);
/// How long the thread sleeps through single requests where several were there at once lately.
const NAP: Duration = Duration::from_micros(50);
/// As many make a batch that gains nearly all there is to gain.
const ENOUGH: usize = 16;
/// A wait may take this part of the time that a batch takes.
const PART: u32 = 8;

/// What adaptive waiting has seen.
#[derive(Debug, Default)]
pub(super) struct Pace(Mutex<Seen>);

#[derive(Debug, Default)]
struct Seen {
    /// How long a batch takes, smoothed.
    run: Duration,
    /// How many requests were there at once, lately.
    expected: usize,
}

impl Pace {
    /// For how many a batch waits that has `waiting` requests, the first since `since`, and until when.
    pub(super) fn more(&self, window: &Window, waiting: usize, since: Instant) -> Option<(usize, Instant)> {
        let (enough, wait) = match window.max_wait {
            // the time begins with the first
            MaxWait::Fixed(_) if waiting == 0 => return None,
            MaxWait::Fixed(wait) => (window.max_batch, wait),
            // more than were there lately would not come
            MaxWait::Adaptive => {
                let seen = self.0.lock();
                let enough = seen.expected.min(window.max_batch).min(ENOUGH);
                if enough < 2 {
                    return None;
                }
                let wait = if waiting == 0 { NAP } else { (seen.run / PART).clamp(SHORTEST, LONGEST) };
                (enough, wait)
            }
        };
        let until = since.checked_add(wait)?;
        (waiting < enough && until > Instant::now()).then_some((enough, until))
    }

    /// A batch of `drawn` took `run`, and at its end `waiting` more were there.
    pub(super) fn ran(&self, drawn: usize, waiting: usize, run: Duration) {
        let mut seen = self.0.lock();
        seen.run = (seen.run * 3 + run) / 4;
        let now = drawn + waiting;
        // up at once, down by half of what is missing
        seen.expected = if now >= seen.expected { now } else { now.max((seen.expected + now) / 2) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_waits_only_where_several_asked_at_once_and_forgets_them() {
        let (pace, window) = (Pace::default(), Window::default());
        let now = Instant::now() + Duration::from_secs(1);
        let ms = Duration::from_millis(4);
        assert_eq!(pace.more(&window, 1, now), None, "nothing was seen");
        pace.ran(1, 0, ms);
        assert_eq!(pace.more(&window, 1, now), None, "one at a time");
        pace.ran(1, 1, ms);
        assert!(
            pace.more(&window, 1, now).is_some_and(|(n, until)| n == 2 && until <= now + LONGEST),
            "two were there"
        );
        assert_eq!(pace.more(&window, 2, now), None, "both are there again");
        assert!(
            pace.more(&window, 0, now).is_some_and(|(n, until)| n == 2 && until == now + NAP),
            "they may come together"
        );
        for _ in 0..3 {
            pace.ran(1, 0, ms);
        }
        assert_eq!((pace.more(&window, 1, now), pace.more(&window, 0, now)), (None, None), "one at a time again");
    }

    #[test]
    fn a_fixed_wait_counts_from_the_arrival() {
        let pace = Pace::default();
        let window = Window { max_batch: 3, max_wait: MaxWait::Fixed(Duration::from_secs(5)) };
        let arrived = Instant::now();
        assert_eq!(pace.more(&window, 1, arrived), Some((3, arrived + Duration::from_secs(5))));
        assert_eq!((pace.more(&window, 3, arrived), pace.more(&window, 0, arrived)), (None, None));
        let zero = Window { max_wait: MaxWait::Fixed(Duration::ZERO), ..window };
        assert_eq!(pace.more(&zero, 1, arrived), None);
    }
}
