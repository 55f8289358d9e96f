//! Wakes tasks at an instant: a future looks at the clock when it is polled, and somebody must poll it then.

use parking_lot::{Condvar, Mutex};
use std::collections::BTreeMap;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::task::Waker;
use std::time::{Duration, Instant};

/// Who is to be woken, and when, each under a number of its own.
struct Due {
    wakers: BTreeMap<(Instant, u64), Waker>,
    next: u64,
    /// Whether the thread is there.
    runs: bool,
}

static DUE: Mutex<Due> = Mutex::new(Due { wakers: BTreeMap::new(), next: 0, runs: false });
/// Told of an alarm that is nearer than all others.
static NEARER: Condvar = Condvar::new();

/// So long the thread stays without an alarm.
const IDLE: Duration = if cfg!(test) { Duration::from_millis(20) } else { Duration::from_secs(2) };

/// A task's alarm; cleared when it is dropped. One thread wakes for all of the process.
///
/// It holds no waker: a waker may hold the task, and the task holds this.
#[derive(Debug, Default)]
pub(super) struct Alarm(Option<(Instant, u64)>);

impl Alarm {
    /// Wakes `waker` at `at`, in place of the one of before.
    ///
    /// # Errors
    /// When the system gives no thread.
    pub(super) fn set(&mut self, at: Instant, waker: &Waker) -> std::io::Result<()> {
        // a waker is the asker's code, and is not to run under the lock: it is cloned before, and dropped behind
        let woken = waker.clone();
        let old;
        let nearest = {
            let mut due = DUE.lock();
            if !due.runs {
                std::thread::Builder::new().name("candle-lazy-alarm".into()).spawn(ring)?;
                due.runs = true;
            }
            old = self.0.take().and_then(|key| due.wakers.remove(&key));
            let key = (at, due.next);
            due.next += 1;
            due.wakers.insert(key, woken);
            self.0 = Some(key);
            due.wakers.first_key_value().is_some_and(|(&first, _)| first == key)
        };
        drop(old);
        if nearest {
            NEARER.notify_one();
        }
        Ok(())
    }
}

impl Drop for Alarm {
    fn drop(&mut self) {
        let old = self.0.take().and_then(|key| DUE.lock().wakers.remove(&key));
        drop(old);
    }
}

/// Says that the thread is gone, however it goes.
struct Gone;

impl Drop for Gone {
    fn drop(&mut self) {
        DUE.lock().runs = false;
    }
}

/// The thread's.
fn ring() {
    let gone = Gone;
    let mut due = DUE.lock();
    loop {
        let later = due.wakers.split_off(&(Instant::now(), u64::MAX));
        let over = std::mem::replace(&mut due.wakers, later);
        if !over.is_empty() {
            drop(due);
            for waker in over.into_values() {
                let _ = catch_unwind(AssertUnwindSafe(|| waker.wake()));
            }
            due = DUE.lock();
        } else if let Some((&(at, _), _)) = due.wakers.first_key_value() {
            NEARER.wait_until(&mut due, at);
        } else if NEARER.wait_for(&mut due, IDLE).timed_out() && due.wakers.is_empty() {
            // under the same lock: who sets an alarm now begins another thread
            due.runs = false;
            std::mem::forget(gone);
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)] // tests
    use super::*;
    use std::sync::mpsc::{channel, Receiver, Sender};
    use std::sync::Arc;
    use std::task::Wake;

    /// Tells its name when it is woken.
    struct Bell(&'static str, Mutex<Sender<(&'static str, Instant)>>);

    impl Wake for Bell {
        fn wake(self: Arc<Self>) {
            if self.0 == "panics" {
                panic!("a waker of the asker");
            }
            let _ = self.1.lock().send((self.0, Instant::now()));
        }
    }

    fn bells<const N: usize>(names: [&'static str; N]) -> (Receiver<(&'static str, Instant)>, [Arc<Bell>; N]) {
        let (sender, rung) = channel();
        (rung, names.map(|name| Arc::new(Bell(name, Mutex::new(sender.clone())))))
    }

    const LONG: Duration = Duration::from_secs(60);

    /// Waits until nobody else holds the bell: who rings it may hold it a moment longer than it is heard.
    fn is_free(bell: &Arc<Bell>) -> bool {
        let end = Instant::now() + LONG;
        while Arc::strong_count(bell) > 1 {
            if Instant::now() > end {
                return false;
            }
            std::thread::yield_now();
        }
        true
    }

    #[test]
    fn each_alarm_rings_at_its_time_unless_it_was_set_again_or_dropped() {
        let (rung, bells) = bells(["first", "second", "moved", "panics", "dropped", "later"]);
        let wakers = bells.each_ref().map(|bell| Waker::from(bell.clone()));
        let begin = Instant::now();
        let after = |ms| begin + Duration::from_millis(ms);
        let mut alarms: [Alarm; 6] = std::array::from_fn(|_| Alarm::default());
        for (i, ms) in [(5, 3_600_000), (0, 300), (1, 600), (2, 1_000_000), (3, 20), (4, 2_000_000)] {
            alarms[i].set(after(ms), &wakers[i]).unwrap();
        }
        alarms[2].set(after(900), &wakers[2]).unwrap();
        alarms[4] = Alarm::default();
        for (expected, ms) in [("first", 300), ("second", 600), ("moved", 900)] {
            let (name, at) = rung.recv_timeout(LONG).unwrap();
            assert!(name == expected && at >= after(ms), "{name} rang where {expected} was due");
        }
        assert!(rung.try_recv().is_err());
        // nothing of a task stays behind its alarm
        drop((alarms, wakers));
        assert!(bells.iter().all(is_free));
    }

    #[test]
    fn an_alarm_that_is_set_again_wakes_the_last_waker_once() {
        let (rung, bells) = bells(["old", "new"]);
        let at = Instant::now() + Duration::from_millis(500);
        let mut alarm = Alarm::default();
        for bell in &bells {
            alarm.set(at, &Waker::from(bell.clone())).unwrap();
        }
        assert!(is_free(&bells[0]), "the old one is let go");
        assert_eq!(rung.recv_timeout(LONG).unwrap().0, "new");
        drop(alarm);
        assert!(rung.recv_timeout(Duration::from_millis(50)).is_err());
    }

    #[test]
    fn an_alarm_rings_after_a_time_without_any() {
        let (rung, [bell]) = bells(["again"]);
        for _ in 0..4 {
            let mut alarm = Alarm::default();
            let at = Instant::now() + Duration::from_millis(10);
            alarm.set(at, &Waker::from(bell.clone())).unwrap();
            assert_eq!(rung.recv_timeout(LONG).unwrap().0, "again");
            // longer than the thread stays, unless others have alarms
            std::thread::sleep(4 * IDLE);
        }
    }
}
