//! The memory of nodes that are gone, for the next ones: a step of a loop records as many nodes as the last one dropped, in lots that a
//! general allocator has no short way for. A node is written where it stays, piece by piece: to build it elsewhere and move it costs more
//! than to fill it in.

use super::pending::Pending;
use super::state::State;
use super::{id, Extent, Node, NodeId, Origin};
use crate::site::BuildSite;
use candle_core::{DType, Device};
use parking_lot::Mutex;
use std::cell::RefCell;
use std::sync::OnceLock;
use triomphe::UniqueArc;

/// A thread keeps the memory of so many, which is less than half a mebibyte.
const MOST: usize = 1024;

thread_local! {
    static BLANK: RefCell<Vec<UniqueArc<Node>>> = const { RefCell::new(Vec::new()) };
}

/// Fills in a part of a blank, which owns nothing: to drop what was there would be to look at each of its pieces.
#[inline(always)]
pub(super) fn fill<T>(part: &mut T, new: T) {
    std::mem::forget(std::mem::replace(part, new));
}

impl Node {
    /// What owns nothing: on the CPU, with no dims, without a value, and not waiting for any.
    #[cold]
    pub(super) fn blank() -> Self {
        Self {
            id: NodeId::NONE,
            extent: Extent::default(),
            dtype: DType::U8,
            device: Device::Cpu,
            tracked: false,
            traced: false,
            quantized: false,
            site: BuildSite::bare(),
            origin: Origin::Held,
            history: OnceLock::new(),
            pending: Pending::none(),
            state: Mutex::new(State::Given),
        }
    }

    /// A new node to be filled in: a blank one with a number.
    #[inline]
    pub(super) fn fresh() -> UniqueArc<Self> {
        let blank = BLANK.try_with(|all| all.try_borrow_mut().ok()?.pop()).ok().flatten();
        let mut node = blank.unwrap_or_else(Self::allocated);
        node.id = NodeId::next();
        node
    }

    #[cold]
    fn allocated() -> UniqueArc<Self> {
        UniqueArc::new(Self::blank())
    }

    /// Drops all that a node owns, which has no inputs any more, and keeps its memory.
    #[inline]
    pub(super) fn reuse(mut node: UniqueArc<Self>) {
        id::dropped();
        node.id = NodeId::NONE;
        node.extent = Extent::default();
        node.device = Device::Cpu;
        (node.tracked, node.traced, node.quantized) = (false, false, false);
        node.site = BuildSite::bare();
        node.origin = Origin::Held;
        node.history.take();
        node.pending = Pending::none();
        *node.state.get_mut() = State::Given;
        // what there is no room for is dropped outside of the borrow
        let _too_many = BLANK.try_with(|all| match all.try_borrow_mut() {
            Ok(mut all) if all.len() < MOST => {
                all.push(node);
                None
            }
            _ => Some(node),
        });
    }
}
