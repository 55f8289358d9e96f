//! The plan cache: bounded, keyed in relative form, compared in full on a hit.

use super::Plan;
use crate::config::{EvalOptions, OptionsKey};
use candle_lazy_graph::{FastMap, GraphKey};
use candle_lazy_ops::fault;
use parking_lot::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;

struct Entry {
    graph: GraphKey,
    /// The options that change plans.
    options: OptionsKey,
    plan: Arc<Plan>,
    last_used: u64,
}

struct Cache {
    entries: FastMap<u64, Vec<Entry>>,
    len: usize,
    capacity: usize,
    clock: u64,
    hits: u64,
    misses: u64,
    evicted: u64,
}

static LIVE: AtomicU64 = AtomicU64::new(0);

/// Counts the plan that holds it.
#[derive(Debug)]
pub(crate) struct Alive(());

impl Default for Alive {
    fn default() -> Self {
        LIVE.fetch_add(1, Ordering::Relaxed);
        Self(())
    }
}

impl Clone for Alive {
    fn clone(&self) -> Self {
        Self::default()
    }
}

impl Drop for Alive {
    fn drop(&mut self) {
        LIVE.fetch_sub(1, Ordering::Relaxed);
    }
}

static CACHE: Mutex<Option<Cache>> = Mutex::new(None);

/// How many plans are kept unless [`set_cache_capacity`] says otherwise.
const DEFAULT_CAPACITY: usize = 1024;

fn with_cache<R>(f: impl FnOnce(&mut Cache) -> R) -> R {
    let mut guard = CACHE.lock();
    f(guard.get_or_insert_with(|| Cache {
        entries: FastMap::default(),
        len: 0,
        capacity: DEFAULT_CAPACITY,
        clock: 0,
        hits: 0,
        misses: 0,
        evicted: 0,
    }))
}

/// What a plan is looked up by.
#[derive(Clone, Copy)]
struct Wanted<'a> {
    hash: u64,
    words: &'a [u64],
    options: &'a OptionsKey,
}

impl Cache {
    fn find(&mut self, wanted: Wanted<'_>) -> Option<Arc<Plan>> {
        self.clock += 1;
        let clock = self.clock;
        if fault::active("cache.any_graph") {
            let mut all = self.entries.values().flatten();
            let alike = |e: &&Entry| e.graph.words().len() == wanted.words.len() && e.options == *wanted.options;
            return all.find(alike).map(|e| e.plan.clone());
        }
        let same = |e: &&mut Entry| e.graph.words() == wanted.words && e.options == *wanted.options;
        let entry = self.entries.get_mut(&wanted.hash)?.iter_mut().find(same)?;
        entry.last_used = clock;
        Some(entry.plan.clone())
    }

    fn insert(&mut self, graph: GraphKey, options: OptionsKey, plan: Arc<Plan>) {
        if self.capacity == 0 {
            return;
        }
        while self.len >= self.capacity {
            // the scan is linear, but it only runs when a new plan was made, which costs far more
            let oldest =
                self.entries.iter().flat_map(|(hash, list)| list.iter().map(move |e| (e.last_used, *hash))).min();
            let Some((last_used, hash)) = oldest else {
                break;
            };
            if let Some(list) = self.entries.get_mut(&hash) {
                let before = list.len();
                list.retain(|e| e.last_used != last_used);
                self.len -= before - list.len();
                self.evicted += (before - list.len()) as u64;
                if list.is_empty() {
                    self.entries.remove(&hash);
                }
            }
        }
        let last_used = self.clock;
        self.entries.entry(graph.hash()).or_default().push(Entry { graph, options, plan, last_used });
        self.len += 1;
    }
}

/// The cached plan of the graph whose key these words are.
pub(crate) fn find(hash: u64, words: &[u64], options: &EvalOptions) -> Option<Arc<Plan>> {
    let wanted = Wanted { hash, words, options: &options.key() };
    with_cache(|c| {
        let plan = c.find(wanted)?;
        c.hits += 1;
        Some(plan)
    })
}

/// Keeps a plan that was made because there was none. Where another thread was first, its plan.
pub(crate) fn keep(key: GraphKey, options: &EvalOptions, plan: Arc<Plan>) -> Arc<Plan> {
    let options = options.key();
    with_cache(|c| {
        c.misses += 1;
        if let Some(first) = c.find(Wanted { hash: key.hash(), words: key.words(), options: &options }) {
            return first;
        }
        c.insert(key, options, plan.clone());
        plan
    })
}

/// What the plan cache holds and did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheStats {
    /// Plans kept.
    pub plans: usize,
    /// The most that are kept.
    pub capacity: usize,
    /// Evaluations that found their plan.
    pub hits: u64,
    /// Evaluations that had to make one.
    pub misses: u64,
    /// Plans dropped for room.
    pub evicted: u64,
    /// Plans in memory: those kept and those that are running.
    pub alive: u64,
}

/// What the plan cache holds and did since the process began.
#[must_use]
pub fn cache_stats() -> CacheStats {
    with_cache(|c| CacheStats {
        plans: c.len,
        capacity: c.capacity,
        hits: c.hits,
        misses: c.misses,
        evicted: c.evicted,
        alive: LIVE.load(Ordering::Relaxed),
    })
}

/// Forgets every plan.
pub fn clear_cache() {
    with_cache(|c| {
        c.entries.clear();
        c.len = 0;
    });
}

/// Sets how many plans are kept (1,024 by default); the least recently used go first.
pub fn set_cache_capacity(capacity: usize) {
    with_cache(|c| {
        c.capacity = capacity;
        if c.len > capacity {
            c.entries.clear();
            c.len = 0;
        }
    });
}
