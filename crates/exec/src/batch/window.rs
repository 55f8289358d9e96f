//! For how long a batch waits for more.

use super::line::Wanted;
use parking_lot::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// How long the first request of a batch waits for others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum MaxWait {
    /// As long as it pays: not at all while one caller at a time asks, since whatever arrives while a batch runs is the next one anyway;
    /// where several have asked at once, until as many (at most 16) have come again, for at most an eighth of the time that a batch takes,
    /// never more than a millisecond, nor less than 20 µs, so that small requests are not called for one by one. A
    /// [`BatchExecutor`](super::BatchExecutor) leaves requests of a few microseconds, which cost less than handing them to another thread, to
    /// who asks for their answer, for a millisecond at most.
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
/// A request that takes less is done sooner by who waits for it than by another thread.
const SMALL: Duration = Duration::from_micros(8);
/// How long the thread sleeps through single requests where several were there at once lately.
const NAP: Duration = Duration::from_micros(50);
/// As many make a batch that gains nearly all there is to gain.
const ENOUGH: usize = 16;
/// A wait may take this part of the time that a batch takes.
const PART: u32 = 8;

/// What adaptive waiting has seen.
#[derive(Debug, Default)]
pub(super) struct Pace {
    seen: Mutex<Seen>,
    /// Whether a request took so little lately that who waits for one does it: asked for each.
    small: AtomicBool,
}

#[derive(Debug, Default)]
struct Seen {
    /// How long a batch takes, smoothed.
    run: Duration,
    /// How long each of its requests takes, likewise; none was seen yet while it is zero.
    each: Duration,
    /// How many requests were there at once, lately.
    expected: usize,
}

impl Seen {
    /// A request took `each`. Whether they are small.
    fn took(&mut self, each: Duration) -> bool {
        self.each = if self.each.is_zero() { each } else { (self.each * 3 + each) / 4 };
        !self.each.is_zero() && self.each < SMALL
    }
}

impl Pace {
    /// For how many a batch waits that has `waiting` requests, the first since `since`, and until when.
    /// Where `leisure` is allowed, small requests are left to who asks for them.
    pub(super) fn more(&self, window: &Window, leisure: bool, waiting: usize, since: Instant) -> Option<Wanted> {
        let (enough, wait, leisurely) = match window.max_wait {
            // the time begins with the first
            MaxWait::Fixed(_) if waiting == 0 => return None,
            MaxWait::Fixed(wait) => (window.max_batch, wait, false),
            MaxWait::Adaptive if leisure && self.is_small() => (window.max_batch, LONGEST, true),
            // more than were there lately would not come
            MaxWait::Adaptive => {
                let seen = self.seen.lock();
                let enough = seen.expected.min(window.max_batch).min(ENOUGH);
                if enough < 2 {
                    return None;
                }
                let wait = if waiting == 0 { NAP } else { (seen.run / PART).clamp(SHORTEST, LONGEST) };
                (enough, wait, false)
            }
        };
        let until = since.checked_add(wait)?;
        (waiting < enough && until > Instant::now()).then_some(Wanted { enough, until, leisurely })
    }

    /// Whether a request takes so little lately that who waits for one does it.
    pub(super) fn is_small(&self) -> bool {
        self.small.load(Ordering::Relaxed)
    }

    /// One request took `run`, by itself.
    pub(super) fn took(&self, run: Duration) {
        self.small.store(self.seen.lock().took(run), Ordering::Relaxed);
    }

    /// A batch of `drawn` took `run`, and at its end `waiting` more were there.
    pub(super) fn ran(&self, drawn: usize, waiting: usize, run: Duration) {
        let mut seen = self.seen.lock();
        seen.run = (seen.run * 3 + run) / 4;
        let small = seen.took(run / u32::try_from(drawn.max(1)).unwrap_or(u32::MAX));
        self.small.store(small, Ordering::Relaxed);
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
        assert_eq!(pace.more(&window, false, 1, now), None, "nothing was seen");
        pace.ran(1, 0, ms);
        assert_eq!(pace.more(&window, false, 1, now), None, "one at a time");
        pace.ran(1, 1, ms);
        assert!(
            pace.more(&window, false, 1, now)
                .is_some_and(|w| w.enough == 2 && w.until <= now + LONGEST && !w.leisurely),
            "two were there"
        );
        assert_eq!(pace.more(&window, false, 2, now), None, "both are there again");
        assert!(
            pace.more(&window, false, 0, now).is_some_and(|w| w.enough == 2 && w.until == now + NAP),
            "they may come together"
        );
        for _ in 0..3 {
            pace.ran(1, 0, ms);
        }
        assert_eq!(
            (pace.more(&window, false, 1, now), pace.more(&window, false, 0, now)),
            (None, None),
            "one at a time again"
        );
    }

    #[test]
    fn small_requests_are_left_to_who_waits_for_them() {
        let (pace, window) = (Pace::default(), Window::default());
        assert!(!pace.is_small(), "nothing was seen");
        pace.ran(16, 0, SMALL * 8);
        let now = Instant::now() + Duration::from_secs(1);
        let wanted = Wanted { enough: window.max_batch, until: now + LONGEST, leisurely: true };
        assert!(pace.is_small());
        assert_eq!((pace.more(&window, true, 0, now), pace.more(&window, true, 1, now)), (Some(wanted), Some(wanted)));
        assert!(pace.more(&window, false, 1, now).is_some_and(|w| !w.leisurely));
        for _ in 0..3 {
            pace.ran(1, 0, SMALL * 2);
        }
        assert!(!pace.is_small());
    }

    #[test]
    fn a_fixed_wait_counts_from_the_arrival() {
        let pace = Pace::default();
        let window = Window { max_batch: 3, max_wait: MaxWait::Fixed(Duration::from_secs(5)) };
        let arrived = Instant::now();
        let wanted = Wanted { enough: 3, until: arrived + Duration::from_secs(5), leisurely: false };
        assert_eq!(pace.more(&window, false, 1, arrived), Some(wanted));
        assert_eq!((pace.more(&window, false, 3, arrived), pace.more(&window, false, 0, arrived)), (None, None));
        let zero = Window { max_wait: MaxWait::Fixed(Duration::ZERO), ..window };
        assert_eq!(pace.more(&zero, false, 1, arrived), None);
    }
}
