//! The bounded line of jobs that wait, in the order in which they are due.
//!
//! The order is that of self-clocked fair queueing (Golestani, "A self-clocked fair queueing scheme for broadband applications", INFOCOM
//! 1994): a job's turn is one step behind the later of its lane's last turn and the turn that was drawn last; a step is shorter for a
//! higher priority. So lanes that ask for much and lanes that ask for little get the same number of turns, a high priority goes first,
//! and no job waits for ever. Jobs of one lane and one priority keep their order.
//!
//! Nothing here knows what a job is, and no lock is held while one is dropped or wakes somebody. The same source is compiled a second
//! time against loom's locks.

use super::sync::{nap, wait_until, Arc, Condvar, Mutex, MutexGuard};
use super::task::{held, Task};
use candle_lazy_graph::FastMap;
use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::task::Waker;
use std::time::Instant;

/// How many turns a lane is told apart by; beyond, those whose last turn is over are forgotten.
const LANES: usize = 64;

/// Where a job stands, apart from its turn.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place {
    /// Whose it is.
    pub(super) lane: u64,
    /// How far its turn is behind the one before.
    pub(super) step: u64,
    /// When it came.
    pub(super) arrived: Instant,
    /// When it must have begun.
    pub(super) deadline: Option<Instant>,
}

/// For what who draws sleeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Wanted {
    /// Until so many jobs wait,
    pub(super) enough: usize,
    /// or until then,
    pub(super) until: Instant,
    /// or until somebody waits for an answer or has a deadline.
    pub(super) leisurely: bool,
}

struct Entry<J, T> {
    turn: u64,
    number: u64,
    arrived: Instant,
    deadline: Option<Instant>,
    task: Arc<Task<J, T>>,
}

impl<J, T> Entry<J, T> {
    fn key(&self) -> (u64, u64) {
        (self.turn, self.number)
    }
}

impl<J, T> PartialEq for Entry<J, T> {
    fn eq(&self, other: &Self) -> bool {
        self.key() == other.key()
    }
}

impl<J, T> Eq for Entry<J, T> {}

impl<J, T> PartialOrd for Entry<J, T> {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl<J, T> Ord for Entry<J, T> {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.key().cmp(&other.key())
    }
}

struct State<J, T> {
    waiting: BinaryHeap<Reverse<Entry<J, T>>>,
    /// How many of them are wanted; the others were abandoned and are skipped.
    live: usize,
    /// How many more than may wait are let in: who draws takes as many at once.
    slots: usize,
    /// The turn that was drawn last.
    clock: u64,
    /// How many were ever put in.
    number: u64,
    /// The last turn of each lane at each step.
    lanes: FastMap<(u64, u64), u64>,
    /// The nearest deadline, or an earlier one whose job is gone.
    nearest: Option<Instant>,
    closed: bool,
    /// For how many jobs a drawer sleeps.
    sleeps_for: Option<usize>,
    /// Whether somebody waits for the answer to a job that was not drawn yet.
    hurried: bool,
    /// Whether a drawer sleeps who comes then: one who sleeps for a number of jobs is not to be woken for each.
    at_leisure: bool,
    /// Who waits for room without a thread, by a number of its own.
    knocking: BTreeMap<u64, Waker>,
    /// How many threads wait for room.
    standing: usize,
}

/// Why a job was not let in; it comes back.
#[derive(Debug)]
pub(super) enum Refused<J> {
    Full(J),
    Closed(J),
}

/// A job that was drawn.
pub(super) struct Started<J, T> {
    pub(super) task: Arc<Task<J, T>>,
    pub(super) job: J,
    pub(super) arrived: Instant,
    /// Whether its deadline has passed.
    pub(super) late: bool,
}

/// The line.
pub(super) struct Line<J, T> {
    state: Mutex<State<J, T>>,
    capacity: usize,
    /// Heard by who draws.
    news: Condvar,
    /// Heard by threads that wait for room.
    room: Condvar,
}

impl<J, T> Line<J, T> {
    pub(super) fn new(capacity: usize) -> Self {
        let state = State {
            waiting: BinaryHeap::new(),
            live: 0,
            slots: 0,
            clock: 0,
            number: 0,
            lanes: FastMap::default(),
            nearest: None,
            closed: false,
            sleeps_for: None,
            hurried: false,
            at_leisure: false,
            knocking: BTreeMap::new(),
            standing: 0,
        };
        Self { state: Mutex::new(state), capacity: capacity.max(1), news: Condvar::new(), room: Condvar::new() }
    }

    pub(super) fn capacity(&self) -> usize {
        self.capacity
    }

    /// How many jobs wait.
    pub(super) fn len(&self) -> usize {
        held(self.state.lock()).live
    }

    pub(super) fn is_closed(&self) -> bool {
        held(self.state.lock()).closed
    }

    /// Whether it is open and nobody waits.
    pub(super) fn is_idle(&self) -> bool {
        let state = held(self.state.lock());
        state.live == 0 && !state.closed
    }

    /// Lets a job in if there is room.
    pub(super) fn push(&self, job: J, place: Place) -> Result<Arc<Task<J, T>>, Refused<J>> {
        let (task, calls) = {
            let mut state = held(self.state.lock());
            if state.closed {
                return Err(Refused::Closed(job));
            }
            if !state.has_room(self.capacity) {
                return Err(Refused::Full(job));
            }
            state.enter(job, place)
        };
        if calls {
            self.news.notify_one();
        }
        Ok(task)
    }

    /// Lets a job in as soon as there is room; full where its deadline comes first.
    pub(super) fn push_when_room(&self, job: J, place: Place) -> Result<Arc<Task<J, T>>, Refused<J>> {
        let (task, calls) = {
            let mut state = held(self.state.lock());
            loop {
                if state.closed {
                    return Err(Refused::Closed(job));
                }
                if state.has_room(self.capacity) {
                    break;
                }
                let over = place.deadline.is_some_and(|end| Instant::now() >= end);
                if over {
                    return Err(Refused::Full(job));
                }
                // a drawer at leisure would not come for it
                state.hurried = true;
                self.news.notify_one();
                state.standing += 1;
                state = match place.deadline {
                    Some(end) => wait_until(&self.room, state, end),
                    None => held(self.room.wait(state)),
                };
                state.standing -= 1;
            }
            state.enter(job, place)
        };
        if calls {
            self.news.notify_one();
        }
        Ok(task)
    }

    /// Notes who is to be woken once there is room or the line is closed, under a number of its own; whether one of the two is so now.
    pub(super) fn knock(&self, number: u64, waker: &Waker) -> bool {
        let (now, old) = {
            let mut state = held(self.state.lock());
            if state.closed || state.has_room(self.capacity) {
                (true, state.knocking.remove(&number))
            } else {
                (false, state.knocking.insert(number, waker.clone()))
            }
        };
        drop(old);
        if !now {
            self.hurry();
        }
        now
    }

    /// Nobody waits under this number any more.
    pub(super) fn leave(&self, number: u64) {
        let old = held(self.state.lock()).knocking.remove(&number);
        drop(old);
    }

    /// Lets in so many more than may wait, less one for each that is drawn from now on.
    pub(super) fn set_slots(&self, slots: usize) {
        let (freed, fewer) = {
            let mut state = held(self.state.lock());
            let (more, fewer) = (slots > state.slots, slots < state.slots);
            state.slots = slots;
            (if more { state.freed() } else { (false, Vec::new()) }, fewer && state.sleeps_for.is_some())
        };
        self.tell_room(freed);
        // who sleeps for as many as may not come any more looks again
        if fewer {
            self.news.notify_one();
        }
    }

    /// A job that waited was abandoned.
    pub(super) fn forget(&self) {
        let (dead, freed) = {
            let mut state = held(self.state.lock());
            state.live = state.live.saturating_sub(1);
            state.hurried &= state.live > 0;
            (state.sweep(), state.freed())
        };
        drop(dead);
        self.tell_room(freed);
    }

    /// Somebody waits for the answer to a job that was not drawn yet: a drawer at leisure comes for it.
    pub(super) fn hurry(&self) {
        let calls = {
            let mut state = held(self.state.lock());
            state.hurried = state.live > 0;
            state.hurried && state.at_leisure
        };
        if calls {
            self.news.notify_one();
        }
    }

    /// Sleeps until a job waits, then for as many of them and as long as `more` says, but not beyond a deadline, and takes at most `most`.
    /// `more` is asked with how many wait and since when the one that is due does. While none waits, it may ask to be left asleep until
    /// several do: who submits then need not call for each. `None` where the line is closed and empty.
    pub(super) fn draw(
        &self,
        most: usize,
        more: impl Fn(usize, Instant) -> Option<Wanted>,
    ) -> Option<Vec<Started<J, T>>> {
        let most = most.max(1);
        loop {
            let mut state = held(self.state.lock());
            if state.live == 0 {
                state = self.wait_for(state, more(0, Instant::now()));
            }
            while state.live == 0 {
                if state.closed {
                    return None;
                }
                state.sleeps_for = Some(1);
                state = held(self.news.wait(state));
                state.sleeps_for = None;
            }
            let since = state.waiting.peek().map_or_else(Instant::now, |Reverse(entry)| entry.arrived);
            let wanted = if state.live < most { more(state.live, since) } else { None };
            let state = self.wait_for(state, wanted);
            let started = self.take(state, most, |_| false);
            if !started.is_empty() {
                return Some(started);
            }
            // the one that waited was abandoned a moment ago, which is about to be counted
            nap();
        }
    }

    /// Sleeps until so many wait, or until then.
    fn wait_for<'a>(
        &'a self,
        mut state: MutexGuard<'a, State<J, T>>,
        wanted: Option<Wanted>,
    ) -> MutexGuard<'a, State<J, T>> {
        let Some(Wanted { enough, until, leisurely }) = wanted else { return state };
        // more cannot come in
        let most = |state: &State<J, T>| enough.min(self.capacity.saturating_add(state.slots));
        while state.live < most(&state) && !state.closed && !(leisurely && (state.hurried || state.nearest.is_some())) {
            let end = state.nearest.map_or(until, |nearest| nearest.min(until));
            if Instant::now() >= end {
                break;
            }
            (state.sleeps_for, state.at_leisure) = (Some(most(&state)), leisurely);
            state = wait_until(&self.news, state, end);
            (state.sleeps_for, state.at_leisure) = (None, false);
        }
        state
    }

    /// Takes what waits now, at most `most`.
    pub(super) fn try_draw(&self, most: usize) -> Vec<Started<J, T>> {
        self.take(held(self.state.lock()), most, |_| false)
    }

    /// The same, and nothing from the first on that does not fit or that a waker looks for: `fits` is asked under locks.
    pub(super) fn try_draw_unwatched(&self, most: usize, fits: impl Fn(&J) -> bool) -> Vec<Started<J, T>> {
        self.take(held(self.state.lock()), most, |task| task.is_watched_or(|job| !fits(job)))
    }

    fn take(
        &self,
        mut state: MutexGuard<'_, State<J, T>>,
        most: usize,
        stays: impl Fn(&Task<J, T>) -> bool,
    ) -> Vec<Started<J, T>> {
        let mut started = Vec::with_capacity(most.min(state.live));
        let now = state.nearest.map(|_| Instant::now());
        while started.len() < most {
            if state.waiting.peek().is_none_or(|Reverse(entry)| stays(&entry.task)) {
                break;
            }
            let Some(Reverse(entry)) = state.waiting.pop() else { break };
            let late = entry.deadline.zip(now).is_some_and(|(end, now)| now > end);
            let Some(job) = entry.task.start() else { continue };
            state.live = state.live.saturating_sub(1);
            state.clock = state.clock.max(entry.turn);
            started.push(Started { task: entry.task, job, arrived: entry.arrived, late });
        }
        // one that is late begins nowhere
        state.slots = state.slots.saturating_sub(started.iter().filter(|one| !one.late).count());
        // who hurried may wait for one that is left
        state.hurried &= state.live > 0;
        if state.nearest.is_some() {
            state.nearest = state.waiting.iter().filter_map(|Reverse(entry)| entry.deadline).min();
        }
        let freed = state.freed();
        drop(state);
        self.tell_room(freed);
        started
    }

    /// Lets nobody in any more. Gives what waits, if it is not to be drawn.
    pub(super) fn close(&self, cancel: bool) -> Vec<Started<J, T>> {
        let mut state = held(self.state.lock());
        state.closed = true;
        let freed = state.freed();
        let waiting = if cancel {
            self.take(state, usize::MAX, |_| false)
        } else {
            drop(state);
            Vec::new()
        };
        self.tell_room(freed);
        self.news.notify_all();
        waiting
    }

    fn tell_room(&self, (threads, wakers): (bool, Vec<Waker>)) {
        if threads {
            self.room.notify_all();
        }
        for waker in wakers {
            // the asker's code; what was drawn on the way is not to be lost by it
            let _ = catch_unwind(AssertUnwindSafe(|| waker.wake()));
        }
    }
}

impl<J, T> State<J, T> {
    /// Puts a job in. Whether the drawer must be called.
    fn enter(&mut self, job: J, place: Place) -> (Arc<Task<J, T>>, bool) {
        let task = Arc::new(Task::new(job));
        let clock = self.clock;
        let last = self.lanes.entry((place.lane, place.step)).or_insert(clock);
        *last = (*last).max(clock).saturating_add(place.step);
        let turn = *last;
        self.number += 1;
        let Place { arrived, deadline, .. } = place;
        let entry = Entry { turn, number: self.number, arrived, deadline, task: task.clone() };
        self.waiting.push(Reverse(entry));
        self.live += 1;
        self.nearest = match (self.nearest, deadline) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        };
        if self.lanes.len() > LANES.max(2 * self.live) {
            self.lanes.retain(|_, last| *last > clock);
        }
        // a deadline that is new may be nearer than the one that the drawer sleeps for
        let calls = self.sleeps_for.is_some_and(|n| self.live >= n || deadline.is_some());
        (task, calls)
    }

    fn has_room(&self, capacity: usize) -> bool {
        self.live < capacity.saturating_add(self.slots)
    }

    /// Who waits for room, if there is any or the line is closed.
    fn freed(&mut self) -> (bool, Vec<Waker>) {
        if self.standing == 0 && self.knocking.is_empty() {
            return (false, Vec::new());
        }
        (self.standing > 0, std::mem::take(&mut self.knocking).into_values().collect())
    }

    /// Takes out what was abandoned, where that is most of what stands here.
    fn sweep(&mut self) -> Vec<Entry<J, T>> {
        if self.waiting.len() < 2 * self.live + 32 {
            return Vec::new();
        }
        let all = std::mem::take(&mut self.waiting).into_vec();
        let (wanted, dead): (Vec<_>, Vec<_>) = all.into_iter().partition(|Reverse(entry)| entry.task.is_waiting());
        self.waiting = wanted.into();
        dead.into_iter().map(|Reverse(entry)| entry).collect()
    }
}
