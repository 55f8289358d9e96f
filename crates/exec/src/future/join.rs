//! Several evaluations as one future.

use super::Eval;
use crate::error::Result;
use candle_core::Tensor;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

/// The values of several evaluations; made by [`join`].
#[must_use = "evaluations that are dropped before they have begun never begin"]
#[derive(Debug)]
pub struct Join(Vec<One>);

#[derive(Debug)]
enum One {
    Running(Eval),
    Ended(Result<Tensor>),
    Taken,
}

/// One future for evaluations that were submitted one by one: ready when all of them have ended, with their values in the order given.
/// Tensors that can be submitted at once make one plan by [`eval_all_async`](super::eval_all_async).
///
/// # Errors
/// The future's: that of the first evaluation, in the order given, that failed. The others have ended all the same.
pub fn join(evaluations: impl IntoIterator<Item = Eval>) -> Join {
    Join(evaluations.into_iter().map(One::Running).collect())
}

impl Join {
    /// The values, in the order of the evaluations. Blocks, as [`Eval::wait`].
    ///
    /// # Errors
    /// As [`join`].
    pub fn wait(self) -> Result<Vec<Tensor>> {
        let end = |one| match one {
            One::Running(eval) => eval.wait(),
            One::Ended(result) => result,
            One::Taken => super::taken(),
        };
        // all of them end, then the first error counts
        let ended: Vec<Result<Tensor>> = self.0.into_iter().map(end).collect();
        ended.into_iter().collect()
    }
}

impl Future for Join {
    type Output = Result<Vec<Tensor>>;

    /// Ready once; an error after that.
    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let all = &mut self.get_mut().0;
        let mut ready = true;
        for one in all.iter_mut() {
            if let One::Running(eval) = one {
                match Pin::new(eval).poll(context) {
                    Poll::Ready(result) => *one = One::Ended(result),
                    Poll::Pending => ready = false,
                }
            }
        }
        if !ready {
            return Poll::Pending;
        }
        let take = |one: &mut One| match std::mem::replace(one, One::Taken) {
            One::Ended(result) => result,
            One::Running(_) | One::Taken => super::taken(),
        };
        Poll::Ready(all.iter_mut().map(take).collect::<Vec<_>>().into_iter().collect())
    }
}
