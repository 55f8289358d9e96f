//! Many requests at once: what has the same plan runs as one.
//!
//! A plan holds symbols, never sizes, so graphs of the same ops share one, whatever their lengths. The members of a group go through
//! it together: a product with a weight that they share is made once, of the rows of all ([`merge`]), and between two of those every
//! member runs by itself, on whatever thread is free. No row's bits depend on its neighbours, so a result is that of
//! [`eval_all`](super::eval_all).
//!
//! A request fails alone: its neighbours run on.

mod merge;

use super::bind::{self, Lent};
use super::slots::SlotValue;
use super::{
    announce_returned, eval_direct, eval_little, evaluate, failure, is_direct, kernel, plan, planned, publish,
    tensor_of, values, As, Planned,
};
use crate::buffer;
use crate::config::{self, EvalOptions, Flag, TARGET};
use crate::error::{Error, Result};
use crate::plan::{Memory, Plan};
use crate::report::EvalReport;
use crate::tensor::LazyTensor;
use candle_core::Tensor;
use candle_lazy_graph::{Bindings, FastMap, NodeId, NodeRef};
use candle_lazy_ops::fault;
use candle_lazy_ops::kernels::{each, with_threads};
use parking_lot::Mutex;
use smallvec::{smallvec, SmallVec};
use std::cell::Cell;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Arc;
use tracing::debug_span;

/// The tensors that one caller wants: one, mostly.
pub(crate) type Request = SmallVec<[LazyTensor; 1]>;
/// Their values.
pub(crate) type Values = SmallVec<[Tensor; 1]>;

/// Who is served together.
struct Company<'a> {
    /// Receives the values of the request with this number, on any thread; called once for each.
    receive: &'a (dyn Fn(usize, Result<Values>) + Sync),
    /// How many products were made for several.
    merged: AtomicUsize,
}

impl Company<'_> {
    fn done(&self, number: usize, result: Result<Values>) {
        (self.receive)(number, result);
    }
}

/// About how long a request takes beside its kernels, in nanoseconds.
const REQUEST_NS: usize = 4_500;
/// Without a budget, the members that run at once hold no more than this many bytes together, or there is one of them.
const AT_ONCE: u64 = 1 << 30;

/// A request that is not finished.
struct Pending {
    number: usize,
    request: Request,
}

thread_local! {
    /// Whether this thread evaluates requests of others: one that it waits for then would wait for itself.
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

/// Whether this thread evaluates requests of others.
pub(crate) fn in_group() -> bool {
    INSIDE.get()
}

fn inside<R>(f: impl FnOnce() -> R) -> R {
    let _inside = Flag::set(&INSIDE);
    f()
}

/// Evaluates every request, those together whose graphs have the same plan, and calls `receive` with the number and the values of each,
/// on any thread. How many products were made for several requests at once.
pub(crate) fn eval_group(requests: Vec<Request>, receive: &(dyn Fn(usize, Result<Values>) + Sync)) -> usize {
    let company = &Company { receive, merged: AtomicUsize::new(0) };
    let all: Vec<_> = requests.into_iter().enumerate().map(|(number, request)| Pending { number, request }).collect();
    inside(|| {
        let mut left = directly(all, company);
        while !left.is_empty() {
            left = round(left, company);
        }
    });
    company.merged.load(Ordering::Relaxed)
}

/// Whether a request takes no more than a few microseconds, as far as can be seen at a glance.
pub(crate) fn is_small(request: &Request) -> bool {
    matches!(request.as_slice(), [root] if is_direct(root.node()))
}

/// The value of a node that takes no more than a few microseconds, on this thread alone; `None` if it is no such node.
pub(crate) fn eval_now(node: &NodeRef) -> Option<Result<Values>> {
    let known = |result: Result<Option<Tensor>>| result.transpose().map(|value| Ok(smallvec![value?]));
    known(with_threads(1, || inside(|| contained(|| eval_little(node).transpose()))))
}

/// Evaluates one request by itself, on this thread alone.
pub(crate) fn eval_small(request: Request) -> Result<Values> {
    with_threads(1, || inside(|| contained(|| eval_one(&request))))
}

fn eval_one(request: &Request) -> Result<Values> {
    if let Some(values) = direct(request) {
        return values;
    }
    let tensors: Vec<&LazyTensor> = request.iter().collect();
    evaluate(&tensors, &EvalOptions::default(), As::Tensors)?;
    request.iter().map(|root| tensor_of(root.node())).collect()
}

/// Calls `f` with every item, on all threads that are free: alone on each.
fn shared<T: Send>(ns: usize, items: Vec<T>, f: impl Fn(T) + Sync) {
    each(ns, items, |item| with_threads(1, || inside(|| f(item))));
}

fn contained<R>(f: impl FnOnce() -> Result<R>) -> Result<R> {
    let panicked = |panic: Box<dyn std::any::Any + Send>| {
        Err(Error::Internal(format!("a panic ended it: {}", failure::message_of(panic.as_ref()))))
    };
    catch_unwind(AssertUnwindSafe(f)).unwrap_or_else(panicked)
}

/// Runs what needs no plan, and gives back the rest.
fn directly(all: Vec<Pending>, company: &Company<'_>) -> Vec<Pending> {
    // about: reading and writing, and the function of each element
    let ns = |p: &Pending| REQUEST_NS + p.request.first().map_or(0, |x| x.elem_count());
    // one that is alone may use all threads
    if let [one] = all.as_slice() {
        return match contained(|| Ok(direct(&one.request))) {
            Ok(Some(result)) => {
                company.done(one.number, result);
                Vec::new()
            }
            Ok(None) => all,
            Err(error) => {
                company.done(one.number, Err(error));
                Vec::new()
            }
        };
    }
    let total = all.iter().map(ns).sum();
    let left = Mutex::new(Vec::new());
    shared(total, pieces(all), |piece: Vec<Pending>| {
        for one in piece {
            match contained(|| Ok(direct(&one.request))) {
                Ok(Some(result)) => {
                    let number = one.number;
                    // the asker may count on holding them alone
                    drop(one);
                    company.done(number, result);
                }
                Ok(None) => left.lock().push(one),
                Err(error) => company.done(one.number, Err(error)),
            }
        }
    });
    let mut left = left.into_inner();
    left.sort_unstable_by_key(|one| one.number);
    left
}

/// Neighbours together: so many pieces that threads even out.
fn pieces<T>(mut items: Vec<T>) -> Vec<Vec<T>> {
    const PIECES: usize = 8;
    let len = items.len().div_ceil(candle_lazy_ops::kernels::threads().saturating_mul(PIECES)).max(1);
    let mut pieces = Vec::new();
    while items.len() > len {
        let rest = items.split_off(len);
        pieces.push(std::mem::replace(&mut items, rest));
    }
    pieces.push(items);
    pieces
}

fn direct(request: &Request) -> Option<Result<Values>> {
    match request.as_slice() {
        [root] => match eval_direct(root.node()) {
            Some(value) => Some(value.map(|value| smallvec![value])),
            None if root.is_ready() => Some(tensor_of(root.node()).map(|value| smallvec![value])),
            None => None,
        },
        several if several.iter().all(LazyTensor::is_ready) => {
            Some(several.iter().map(|root| tensor_of(root.node())).collect())
        }
        _ => None,
    }
}

/// One request with its plan.
struct Ready {
    pending: Pending,
    planned: Planned,
}

/// Runs every request but those that need what another one computes: those are given back, for the next round.
fn round(left: Vec<Pending>, company: &Company<'_>) -> Vec<Pending> {
    let options = EvalOptions::default();
    let count = left.len();
    let planned_all = Mutex::new(Vec::with_capacity(count));
    let nodes = AtomicUsize::new(0);
    let plan_one = |pending: Pending| {
        let found = contained(|| {
            let roots: Vec<NodeRef> = pending.request.iter().map(|t| t.node().clone()).collect();
            planned(&roots, &options)
        });
        match found {
            Ok(planned) => {
                nodes.fetch_add(planned.bindings.pending, Ordering::Relaxed);
                planned_all.lock().push(Ready { pending, planned });
            }
            Err(error) => company.done(pending.number, Err(error)),
        }
    };
    shared(count * REQUEST_NS, pieces(left), |piece: Vec<Pending>| piece.into_iter().for_each(&plan_one));
    let mut ready = planned_all.into_inner();
    ready.sort_unstable_by_key(|one| one.pending.number);
    let mut claimed: FastMap<NodeId, ()> = FastMap::default();
    let mut groups: Vec<Vec<Ready>> = Vec::new();
    let mut group_of: FastMap<usize, usize> = FastMap::default();
    let mut later = Vec::new();
    for one in ready {
        let computes: Vec<NodeId> = one.planned.bindings.published().flatten().map(|node| node.id()).collect();
        if computes.iter().any(|id| claimed.contains_key(id)) {
            later.push(one.pending);
            continue;
        }
        claimed.extend(computes.into_iter().map(|id| (id, ())));
        let plan = Arc::as_ptr(&one.planned.plan) as usize;
        let group = *group_of.entry(plan).or_insert(groups.len());
        match groups.get_mut(group) {
            Some(group) => group.push(one),
            None => groups.push(vec![one]),
        }
    }
    for group in groups {
        run_group(group, company);
    }
    later
}

/// A request on its way through the plan.
struct Member {
    pending: Pending,
    roots: Vec<NodeRef>,
    bindings: Bindings,
    memory: Arc<Memory>,
    slots: Vec<SlotValue>,
    lent: Lent,
    report: EvalReport,
}

impl Member {
    fn step(&mut self, plan: &Plan, i: usize) -> Result<()> {
        let step = plan.steps.get(i).ok_or_else(|| Error::Internal("a step that is not there".into()))?;
        let ran = catch_unwind(AssertUnwindSafe(|| {
            kernel::run_step((step, i), &self.bindings, &self.memory, &mut self.slots, &mut self.lent, &mut self.report)
        }));
        match ran {
            Ok(Ok(())) => {
                self.freed(plan, i);
                Ok(())
            }
            Ok(Err(error)) => Err(failure::located(plan, i, &self.bindings, error)),
            Err(panic) => Err(failure::panicked(plan, i, &self.bindings, panic.as_ref())),
        }
    }

    fn freed(&mut self, plan: &Plan, i: usize) {
        for &slot in plan.steps.get(i).map(|step| step.free_after.as_slice()).unwrap_or_default() {
            self.lent.freed(slot, &mut self.slots);
        }
    }

    /// The request failed: what was lent goes back.
    fn fail(mut self, error: Error, company: &Company<'_>) {
        if std::mem::take(&mut self.lent).give_back(&mut self.slots) {
            announce_returned();
        }
        let number = self.pending.number;
        drop(self);
        company.done(number, Err(error));
    }

    /// The plan is through.
    fn finish(mut self, plan: &Plan, company: &Company<'_>) {
        let found = contained(|| values(plan, &self.bindings, &mut self.slots, &self.roots, As::Tensors));
        match found {
            Ok(found) => {
                let Self { pending, roots, bindings, lent, .. } = self;
                publish(&bindings, found);
                if lent.finish() {
                    announce_returned();
                }
                // nothing of the run holds its nodes when the asker sees its values
                drop((bindings, pending.request));
                let tensors = contained(|| roots.iter().map(tensor_of).collect());
                drop(roots);
                company.done(pending.number, tensors);
            }
            Err(error) => self.fail(error, company),
        }
    }
}

/// Evaluates one request by itself.
fn alone(pending: Pending, company: &Company<'_>) {
    let Pending { number, request } = pending;
    let result = contained(|| eval_one(&request));
    drop(request);
    company.done(number, result);
}

/// Runs requests with the same plan, as many at once as memory allows.
fn run_group(group: Vec<Ready>, company: &Company<'_>) {
    if group.len() == 1 {
        return group.into_iter().for_each(|one| alone(one.pending, company));
    }
    let budget = config::memory_budget();
    let mut at_once: Vec<Member> = Vec::new();
    let mut held = 0u64;
    let mut shared_plan = None;
    for Ready { pending, planned: Planned { plan, bindings, .. } } in group {
        let memory = plan::needs(&plan, &bindings);
        if let Some(budget) = budget.filter(|&budget| memory.peak > budget) {
            let error = Error::Budget { needed: memory.peak, budget };
            company.done(pending.number, Err(failure::located(&plan, memory.largest, &bindings, error)));
            continue;
        }
        if !at_once.is_empty() && held.saturating_add(memory.peak) > budget.unwrap_or(AT_ONCE) {
            run_members(&plan, std::mem::take(&mut at_once), held, company);
            held = 0;
        }
        held = held.saturating_add(memory.peak);
        let roots = pending.request.iter().map(|t| t.node().clone()).collect();
        let (slots, lent, report) = (Vec::new(), Lent::default(), EvalReport::default());
        at_once.push(Member { pending, roots, bindings, memory, slots, lent, report });
        shared_plan.get_or_insert(plan);
    }
    if let Some(plan) = shared_plan {
        run_members(&plan, at_once, held, company);
    }
}

fn run_members(plan: &Plan, group: Vec<Member>, held: u64, company: &Company<'_>) {
    let _span = debug_span!(target: TARGET, "group", requests = group.len(), steps = plan.steps.len()).entered();
    let _running = buffer::running(held);
    let mut members = Vec::with_capacity(group.len());
    let mut taken = Vec::new();
    for mut member in group {
        match bind::leaves(plan, &mut member.bindings, &mut member.lent) {
            Ok(Some(slots)) => {
                member.slots = slots;
                members.push(member);
            }
            // another run has a leaf that this one wants to write into
            Ok(None) => taken.push(member.pending),
            Err(error) => member.fail(error, company),
        }
    }
    if fault::active("group.neighbour") {
        // a member that reads what another one was given
        let of_first = members.first().map(|m| m.slots.clone());
        if let (Some(slots), Some(second)) = (of_first, members.get_mut(1)) {
            second.slots = slots;
        }
    }
    let mut i = 0;
    while i < plan.steps.len() && !members.is_empty() {
        if let Some(rows) = merge::shape(plan, i, &members) {
            members = merge::run(plan, i, members, &rows, company);
            i += 1;
            continue;
        }
        let next = (i + 1..plan.steps.len()).find(|&n| merge::may(plan, n)).unwrap_or(plan.steps.len());
        members = by_themselves(plan, i..next, members, company);
        i = next;
    }
    shared(members.len() * REQUEST_NS, members, |member| member.finish(plan, company));
    for pending in taken {
        alone(pending, company);
    }
}

/// Runs some steps for each member, on whatever thread is free.
fn by_themselves(
    plan: &Plan,
    steps: std::ops::Range<usize>,
    members: Vec<Member>,
    company: &Company<'_>,
) -> Vec<Member> {
    let run = |mut member: Member| {
        for i in steps.clone() {
            if let Err(error) = member.step(plan, i) {
                member.fail(error, company);
                return None;
            }
        }
        Some(member)
    };
    // few members with much work each are better off with all threads for one after the other
    if members.len() < candle_lazy_ops::kernels::threads() {
        return members.into_iter().filter_map(run).collect();
    }
    let ns = work(plan, steps.clone(), &members);
    let kept = Mutex::new(Vec::with_capacity(members.len()));
    shared(ns, members, |member| {
        if let Some(member) = run(member) {
            kept.lock().push(member);
        }
    });
    let mut members = kept.into_inner();
    members.sort_unstable_by_key(|member| member.pending.number);
    members
}

/// About how many nanoseconds one thread takes for these steps of all members.
fn work(plan: &Plan, steps: std::ops::Range<usize>, members: &[Member]) -> usize {
    let elements = |member: &Member| -> usize {
        let steps = plan.steps.get(steps.clone()).unwrap_or_default();
        let outputs = steps.iter().flat_map(|step| &step.outputs);
        outputs.map(|o| member.bindings.dims(&o.dims).iter().product::<usize>()).sum()
    };
    // members have the same steps, of about the same sizes
    members.first().map_or(0, |first| (elements(first) + steps.len() * 100) * members.len())
}
