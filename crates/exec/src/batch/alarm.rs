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
const IDLE: Duration = Duration::from_secs(2);

/// A task's alarm; cleared when it is dropped. One thread wakes for all of the process.
#[derive(Debug, Default)]
pub(super) struct Alarm(Option<(Instant, u64, Waker)>);

impl Alarm {
    /// Wakes `waker` at `at`, in place of the one of before.
    ///
    /// # Errors
    /// When the system gives no thread.
    pub(super) fn set(&mut self, at: Instant, waker: &Waker) -> std::io::Result<()> {
        if self.0.as_ref().is_some_and(|(known, _, old)| *known == at && old.will_wake(waker)) {
            return Ok(());
        }
        self.clear();
        // a waker is the asker's code, and is not to run under the lock
        let (kept, woken) = (waker.clone(), waker.clone());
        let (number, nearest) = {
            let mut due = DUE.lock();
            if !due.runs {
                std::thread::Builder::new().name("candle-lazy-alarm".into()).spawn(ring)?;
                due.runs = true;
            }
            let number = due.next;
            due.next += 1;
            due.wakers.insert((at, number), woken);
            (number, due.wakers.first_key_value().is_some_and(|(&key, _)| key == (at, number)))
        };
        self.0 = Some((at, number, kept));
        if nearest {
            NEARER.notify_one();
        }
        Ok(())
    }

    fn clear(&mut self) {
        if let Some((at, number, kept)) = self.0.take() {
            let woken = DUE.lock().wakers.remove(&(at, number));
            drop((woken, kept));
        }
    }
}

impl Drop for Alarm {
    fn drop(&mut self) {
        self.clear();
    }
}

/// The thread's.
fn ring() {
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
            due.runs = false;
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)] // tests
    use super::*;
    use std::sync::mpsc::{channel, Sender};
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

    #[test]
    fn each_alarm_rings_at_its_time_unless_it_was_set_again_or_dropped() {
        let (sender, rung) = channel();
        let bells = ["first", "second", "moved", "panics", "dropped"]
            .map(|name| Arc::new(Bell(name, Mutex::new(sender.clone()))));
        let wakers = bells.each_ref().map(|bell| Waker::from(bell.clone()));
        let begin = Instant::now();
        let after = |ms| begin + Duration::from_millis(ms);
        let mut alarms: [Alarm; 5] = std::array::from_fn(|_| Alarm::default());
        for (i, ms) in [(1, 120), (2, 1), (3, 20), (4, 30), (0, 60)] {
            alarms[i].set(after(ms), &wakers[i]).unwrap();
        }
        alarms[2].set(after(180), &wakers[2]).unwrap();
        alarms[4] = Alarm::default();
        let order: Vec<_> = (0..3).map(|_| rung.recv_timeout(Duration::from_secs(60)).unwrap()).collect();
        for ((name, at), (expected, ms)) in order.into_iter().zip([("first", 60), ("second", 120), ("moved", 180)]) {
            assert!(name == expected && at >= after(ms), "{name} rang where {expected} was due");
        }
        assert!(rung.try_recv().is_err());
        // nothing of a task stays behind its alarm
        alarms[0].set(after(3_600_000), &wakers[0]).unwrap();
        drop((alarms, wakers));
        assert!(bells.iter().all(|bell| Arc::strong_count(bell) == 1));
    }
}
