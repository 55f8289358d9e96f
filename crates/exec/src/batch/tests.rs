//! The order of turns, and what a line does with jobs that nobody serves.
use super::*;
use crate::error::{Error, QueueError};
use std::future::Future;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

type Jobs = Inbox<u32, u32>;

const NOW: Window = Window { max_batch: 64, max_wait: MaxWait::Fixed(Duration::ZERO) };

fn how(priority: Priority, lane: u64) -> SubmitOptions {
    SubmitOptions { priority, lane, deadline: None }
}

fn order(inbox: &Jobs) -> Vec<u32> {
    inbox.try_draw(usize::MAX).iter_mut().map(|one| one.take_job().unwrap()).collect()
}

fn why<T: std::fmt::Debug>(result: crate::Result<T>) -> QueueError {
    match result {
        Err(Error::Queue(why)) => why,
        other => panic!("{other:?}"),
    }
}

#[test]
fn lanes_take_turns_and_jobs_of_one_keep_their_order() {
    let inbox = Jobs::new(100);
    let mut tickets = Vec::new();
    for i in 0..6 {
        tickets.push(inbox.submit(i, &how(Priority::Normal, 1)).unwrap());
    }
    for i in 10..12 {
        tickets.push(inbox.submit(i, &how(Priority::Normal, 2)).unwrap());
    }
    assert_eq!(order(&inbox), [0, 10, 1, 11, 2, 3, 4, 5]);
    // who had many turns owes nothing to who was not there: they come in the order of arrival
    tickets.push(inbox.submit(20, &how(Priority::Normal, 1)).unwrap());
    tickets.push(inbox.submit(21, &how(Priority::Normal, 3)).unwrap());
    assert_eq!(order(&inbox), [20, 21]);
}

#[test]
fn a_high_priority_goes_first_and_a_low_one_is_served_all_the_same() {
    let inbox = Jobs::new(1000);
    let mut tickets = Vec::new();
    tickets.push(inbox.submit(1000, &how(Priority::Low, 0)).unwrap());
    for i in 0..40 {
        tickets.push(inbox.submit(i, &how(Priority::Normal, 0)).unwrap());
    }
    tickets.push(inbox.submit(2000, &how(Priority::High, 0)).unwrap());
    let order = order(&inbox);
    let at = |job: u32| order.iter().position(|&j| j == job).unwrap();
    assert_eq!(at(2000), 0);
    assert!((15..=17).contains(&at(1000)), "every sixteenth time: {order:?}");
    let normal: Vec<u32> = order.iter().copied().filter(|&j| j < 100).collect();
    assert!(normal.is_sorted());
}

#[test]
fn a_full_line_refuses_or_lets_wait_and_a_cancelled_job_makes_room() {
    let inbox = Inbox::<Arc<()>, ()>::new(2);
    let held = Arc::new(());
    let plain = SubmitOptions::default();
    let one = inbox.try_submit(held.clone(), &plain).unwrap();
    let two = inbox.try_submit(held.clone(), &plain).unwrap();
    let refused = inbox.try_submit(held.clone(), &plain);
    assert_eq!(why(refused), QueueError::Full { capacity: 2 });
    let mut entering = inbox.submit_async(held.clone(), &plain);
    let mut context = Context::from_waker(Waker::noop());
    assert!(std::pin::Pin::new(&mut entering).poll(&mut context).is_pending());
    assert_eq!(Arc::strong_count(&held), 4);
    drop(one);
    assert_eq!((Arc::strong_count(&held), inbox.len()), (3, 1), "what it held is gone");
    let Poll::Ready(Ok(three)) = std::pin::Pin::new(&mut entering).poll(&mut context) else { panic!("there is room") };
    let again = std::pin::Pin::new(&mut entering).poll(&mut context);
    assert!(matches!(again, Poll::Ready(Err(_))), "a future is done once");
    let waits = {
        let (inbox, held) = (inbox.clone(), held.clone());
        std::thread::spawn(move || inbox.submit(held, &SubmitOptions::default()))
    };
    drop(two);
    let four = waits.join().unwrap().unwrap();
    assert_eq!(inbox.len(), 2);
    inbox.close(Shutdown::Cancel);
    assert_eq!((why(three.wait()), why(four.wait())), (QueueError::Closed, QueueError::Closed));
    drop(entering);
    assert_eq!(Arc::strong_count(&held), 1);
    let stats = inbox.stats();
    assert_eq!((stats.submitted, stats.cancelled, stats.refused_full, stats.failed, stats.queued), (4, 2, 1, 2, 0));
    assert_eq!(why(inbox.submit(held, &plain)), QueueError::Closed);
    assert!(inbox.draw(&NOW).is_none());
}

#[test]
fn many_cancelled_jobs_leave_nothing_behind() {
    const MANY: u32 = if cfg!(miri) { 300 } else { 10_000 };
    let inbox = Jobs::new(10);
    for i in 0..MANY {
        drop(inbox.submit(i, &SubmitOptions::default()).unwrap());
    }
    let one = inbox.submit(7, &SubmitOptions::default()).unwrap();
    assert_eq!(order(&inbox), [7]);
    assert_eq!(inbox.stats().cancelled, u64::from(MANY));
    assert_eq!(why(one.wait()), QueueError::Lost);
}

#[test]
fn a_server_with_free_slots_lets_in_as_many_beside_those_that_wait() {
    let inbox = Jobs::new(2);
    let try_in = |job| inbox.try_submit(job, &SubmitOptions::default());
    inbox.set_free_slots(3);
    let tickets: Vec<_> = (0..5).map(|i| try_in(i).unwrap()).collect();
    assert_eq!(why(try_in(5)), QueueError::Full { capacity: 2 });
    // those that begin take the slots with them
    let drawn = inbox.try_draw(3);
    assert_eq!(drawn.len(), 3);
    assert_eq!(why(try_in(6)), QueueError::Full { capacity: 2 });
    inbox.set_free_slots(1);
    let one = try_in(7).unwrap();
    assert_eq!(why(try_in(8)), QueueError::Full { capacity: 2 });
    // nothing begins with one that is late
    drop((tickets, drawn, one));
    let soon = Instant::now() + Duration::from_millis(200);
    let late = inbox.try_submit(9, &SubmitOptions { deadline: Some(soon), ..SubmitOptions::default() }).unwrap();
    while Instant::now() <= soon {}
    assert!(inbox.try_draw(1).is_empty());
    let tickets: Vec<_> = (0..3).map(|i| try_in(i).unwrap()).collect();
    assert_eq!(why(try_in(10)), QueueError::Full { capacity: 2 });
    drop((tickets, late));
    assert!(inbox.is_empty());
}

#[test]
fn a_deadline_in_the_past_is_refused_and_one_that_passes_is_an_error() {
    let inbox = Jobs::new(1);
    let past = SubmitOptions { deadline: Some(Instant::now()), ..SubmitOptions::default() };
    assert_eq!(why(inbox.submit(1, &past)), QueueError::Deadline);
    let soon =
        || SubmitOptions { deadline: Some(Instant::now() + Duration::from_millis(5)), ..SubmitOptions::default() };
    // nobody serves: who waits is told all the same
    assert_eq!(why(inbox.submit(2, &soon()).unwrap().wait()), QueueError::Deadline);
    let ticket = inbox.submit(3, &soon()).unwrap();
    // it waits for room no longer than that
    assert_eq!(why(inbox.submit(4, &soon())), QueueError::Deadline);
    assert!(inbox.try_draw(1).is_empty(), "a late one is not served");
    assert_eq!(why(ticket.wait()), QueueError::Deadline);
    assert_eq!(inbox.stats().expired, 4);
}

/// Nothing here takes so long.
const LONG: Duration = Duration::from_secs(60);

/// Polls on this thread when it is woken; how often.
fn polled<F: Future + Unpin>(mut future: F) -> (F::Output, usize) {
    struct Unpark(std::thread::Thread);
    impl std::task::Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }
    let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
    let mut context = Context::from_waker(&waker);
    for polls in 1.. {
        match std::pin::Pin::new(&mut future).poll(&mut context) {
            Poll::Ready(output) => return (output, polls),
            Poll::Pending => {
                let since = Instant::now();
                std::thread::park_timeout(LONG);
                assert!(since.elapsed() < LONG, "nothing wakes it");
            }
        }
    }
    unreachable!("it was polled for ever")
}

#[test]
fn a_future_is_told_of_its_deadline_when_nothing_else_wakes_it() {
    let inbox = Jobs::new(1);
    let soon = || Instant::now() + Duration::from_millis(200);
    let until = |deadline| SubmitOptions { deadline: Some(deadline), ..SubmitOptions::default() };
    let deadline = soon();
    let (result, polls) = polled(inbox.submit(1, &until(deadline)).unwrap());
    // a thread may be unparked once for nothing
    assert!(why(result) == QueueError::Deadline && Instant::now() >= deadline && polls <= 3, "{polls} polls");
    assert!(inbox.is_empty(), "it left the line");
    // nor does one that waits for room
    let first = inbox.submit(2, &SubmitOptions::default()).unwrap();
    let deadline = soon();
    let (result, polls) = polled(inbox.submit_async(3, &until(deadline)));
    assert!(why(result) == QueueError::Deadline && Instant::now() >= deadline && polls <= 3, "{polls} polls");
    assert_eq!((inbox.len(), inbox.stats().expired, inbox.stats().cancelled), (1, 2, 0));
    drop(first);
    // one that runs by then has its answer
    let deadline = soon();
    let ticket = inbox.submit(4, &until(deadline)).unwrap();
    let mut drawn = inbox.try_draw(1);
    let server = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(400));
        drawn.pop().unwrap().finish(Ok(40));
    });
    assert_eq!(polled(ticket).0.unwrap(), 40);
    server.join().unwrap();
}

#[test]
fn a_window_collects_what_arrives_and_closes_when_it_is_full() {
    let inbox = Jobs::new(100);
    let server = {
        let inbox = inbox.clone();
        std::thread::spawn(move || {
            let window = Window { max_batch: 3, max_wait: MaxWait::Fixed(Duration::from_secs(600)) };
            let mut sizes = Vec::new();
            while let Some(drawn) = inbox.draw(&window) {
                sizes.push(drawn.len());
                for mut one in drawn {
                    let job = one.take_job().unwrap();
                    assert!(one.waited() < Duration::from_secs(600));
                    one.finish(Ok(job + 1));
                }
            }
            sizes
        })
    };
    let tickets: Vec<_> = (0..6).map(|i| inbox.submit(i, &SubmitOptions::default()).unwrap()).collect();
    let answers: Vec<u32> = tickets.into_iter().map(|ticket| ticket.wait().unwrap()).collect();
    assert_eq!(answers, [1, 2, 3, 4, 5, 6]);
    // two more would wait for a third, but a closed line has no more to wait for
    let last: Vec<_> = (0..2).map(|i| inbox.submit(i, &SubmitOptions::default()).unwrap()).collect();
    inbox.close(Shutdown::Drain);
    assert!(last.into_iter().all(|ticket| ticket.wait().is_ok()));
    let sizes = server.join().unwrap();
    assert_eq!(sizes.iter().sum::<usize>(), 8);
    assert_eq!(&sizes[..2], [3, 3]);
}

#[test]
fn what_fits_is_drawn_up_to_the_first_that_does_not() {
    let inbox = Jobs::new(10);
    let tickets: Vec<_> = [2, 4, 5, 6].map(|i| inbox.submit(i, &SubmitOptions::default()).unwrap()).into();
    let draw = || -> Vec<u32> {
        inbox
            .try_draw_small(&Window::default(), 3, |job| job % 2 == 0)
            .iter_mut()
            .map(|one| one.take_job().unwrap())
            .collect()
    };
    assert!(draw().is_empty(), "nobody knows yet how long they take");
    inbox.ran(1, Duration::from_micros(1));
    assert_eq!(draw(), [2, 4]);
    assert!(draw().is_empty());
    assert!(inbox.try_draw_small(&NOW, 3, |_| true).is_empty(), "a window that was asked for is kept");
    assert_eq!(order(&inbox), [5, 6]);
    drop(tickets);
}

#[test]
fn who_serves_sees_that_nobody_wants_it() {
    let inbox = Jobs::new(4);
    let ticket = inbox.submit(1, &SubmitOptions::default()).unwrap();
    let drawn = inbox.try_draw(1).pop().unwrap();
    assert!(!drawn.is_cancelled());
    drop(ticket);
    assert!(drawn.is_cancelled());
    drawn.finish(Ok(3));
    let stats = inbox.stats();
    assert_eq!((stats.cancelled, stats.completed), (1, 0));
}
