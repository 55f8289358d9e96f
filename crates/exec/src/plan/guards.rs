//! Guards in front of the plan cache: a graph that is recorded again and again is known by its nodes, before a key is made of it.

use super::Plan;
use crate::config::OptionsKey;
use candle_lazy_graph::{Bindings, FastMap, Guard, NodeRef};
use smallvec::SmallVec;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::Arc;

/// A graph that is known, and its plan.
pub(crate) struct Guarded {
    guard: Guard,
    plan: Arc<Plan>,
    /// The options that change plans.
    options: OptionsKey,
    /// The hash of the plan's key.
    hash: u64,
    /// What its graph looks like at a glance.
    hint: u64,
    /// How many pending nodes were estimated when it was made.
    estimate: u64,
    /// How often it was asked in vain since it last knew a graph.
    in_vain: AtomicU32,
    /// What it bound first, for faults.
    #[cfg(feature = "testing")]
    first: std::sync::OnceLock<(Vec<usize>, Vec<f64>)>,
}

impl Guarded {
    pub(super) fn new(guard: Guard, plan: Arc<Plan>, options: OptionsKey, hash: u64, roots: &[NodeRef]) -> Self {
        Self {
            guard,
            plan,
            options,
            hash,
            hint: Guard::hint(roots),
            estimate: estimate(roots),
            in_vain: AtomicU32::new(0),
            #[cfg(feature = "testing")]
            first: std::sync::OnceLock::new(),
        }
    }

    /// What to bind to the plan, if `roots` have its graph.
    pub(crate) fn bind(&self, roots: &[NodeRef]) -> Option<Bindings> {
        #[allow(unused_mut)] // faults write it
        let mut bindings = self.guard.bind(roots);
        #[cfg(feature = "testing")]
        if let Some(bindings) = &mut bindings {
            let (sizes, scalars) = self.first.get_or_init(|| (bindings.sizes.clone(), bindings.params.clone()));
            if candle_lazy_ops::fault::active("guard.stale_sizes") {
                bindings.sizes.clone_from(sizes);
            }
            if candle_lazy_ops::fault::active("guard.stale_scalars") {
                bindings.params.clone_from(scalars);
            }
        }
        match bindings {
            None => {
                self.in_vain.fetch_add(1, Ordering::Relaxed);
            }
            Some(_) if self.in_vain.load(Ordering::Relaxed) == 0 => {}
            Some(_) => self.in_vain.store(0, Ordering::Relaxed),
        }
        bindings
    }

    pub(crate) fn plan(&self) -> &Arc<Plan> {
        &self.plan
    }

    /// The hash of the plan's key.
    pub(super) fn hash(&self) -> u64 {
        self.hash
    }
}

fn estimate(roots: &[NodeRef]) -> u64 {
    roots.iter().map(|root| root.pending_estimate().0).fold(0, u64::saturating_add)
}

/// So many graphs are known that look alike at a glance.
const ALIKE: usize = 8;
/// So many of them are compared with one graph: a graph that differs in its last node is compared nearly whole.
const ASKED: usize = 2;
/// One that was asked in vain so often is asked only where the estimate says that it may be its graph.
const PATIENCE: u32 = 4;

/// All guards, by what their graphs look like; those that were used last come first.
#[derive(Default)]
pub(super) struct Guards(FastMap<u64, SmallVec<[Arc<Guarded>; 1]>>);

/// What looks like graphs that are known.
pub(super) type Candidates = SmallVec<[Arc<Guarded>; ASKED]>;

impl Guards {
    /// Which guards may know the graph of `roots`.
    pub(super) fn candidates(&self, roots: &[NodeRef], options: &OptionsKey) -> Candidates {
        let Some(all) = self.0.get(&Guard::hint(roots)) else { return Candidates::new() };
        let now = estimate(roots);
        let in_vain = |one: &Arc<Guarded>| one.in_vain.load(Ordering::Relaxed);
        // those that know graphs before those that were asked in vain lately, each in the order of their last use
        let mut alike: SmallVec<[&Arc<Guarded>; ALIKE]> = all.iter().filter(|one| one.options == *options).collect();
        alike.sort_by_key(|one| (one.estimate != now, in_vain(one)));
        match alike.first() {
            Some(first) if first.estimate == now => {
                alike.into_iter().filter(|one| one.estimate == now).take(ASKED).cloned().collect()
            }
            // estimates change with what is recorded beside
            Some(first) if in_vain(first) < PATIENCE => std::iter::once((*first).clone()).collect(),
            _ => Candidates::new(),
        }
    }

    /// Adds a guard, and gives back those for which there is no room.
    pub(super) fn insert(&mut self, one: Arc<Guarded>) -> SmallVec<[Arc<Guarded>; 1]> {
        let all = self.0.entry(one.hint).or_default();
        all.insert(0, one);
        all.drain(ALIKE.min(all.len())..).collect()
    }

    /// It knew a graph just now.
    pub(super) fn used(&mut self, one: &Arc<Guarded>) {
        let Some(all) = self.0.get_mut(&one.hint) else { return };
        if let Some(at @ 1..) = all.iter().position(|other| Arc::ptr_eq(other, one)) {
            all[..=at].rotate_right(1);
        }
    }

    /// The plan is no longer kept.
    pub(super) fn forget(&mut self, plan: &Arc<Plan>) {
        self.0.retain(|_, all| {
            all.retain(|one| !Arc::ptr_eq(&one.plan, plan));
            !all.is_empty()
        });
    }

    pub(super) fn clear(&mut self) {
        self.0.clear();
    }
}
