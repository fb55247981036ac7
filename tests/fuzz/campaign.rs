//! Tries inputs for so many seconds: first those of the corpus, then changed ones. An input that
//! reaches new code is changed further. A panic, an input that takes too long, a large allocation,
//! and what the target itself finds end the program, which saves the input.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::chance::Chance;
use super::corpus::{self, Arguments};
use super::coverage::{Coverage, pick};
use super::{allocations, panics};

/// For one input; more is a finding.
const MAX_TIME: Duration = Duration::from_secs(10);

/// What inputs are tried on.
pub(crate) trait Target {
    type Input: Clone;
    const NAME: &'static str;
    /// The largest allocation that is not a finding.
    const MAX_ALLOCATION: usize;

    fn parse(&self, bytes: &[u8]) -> Self::Input;
    fn print(&self, input: &Self::Input) -> Vec<u8>;
    fn change(&self, input: &mut Self::Input, other: &Self::Input, chance: &mut Chance);
    /// Try an input. An error is a finding.
    fn run(&mut self, input: &Self::Input) -> Result<(), String>;
    /// One line for each thing that was counted.
    fn report(&self) -> Vec<String>;
}

/// Since when an input is being tried.
type Current = Arc<Mutex<Option<Instant>>>;

/// Ends the program when an input takes too long.
fn watch_time(name: &'static str, current: &Current) {
    let current = Arc::clone(current);
    std::thread::spawn(move || {
        loop {
            std::thread::sleep(MAX_TIME / 10);
            let began = *current.lock().unwrap();
            if let Some(time) = began.map(|began| began.elapsed()).filter(|it| *it > MAX_TIME) {
                end(name, &format!("no end after {time:?}"));
            }
        }
    });
}

/// Where the input is, in memory if there is such a folder: it is written each time.
fn path(name: &str) -> String {
    let folder = if Path::new("/dev/shm").is_dir() { "/dev/shm" } else { "target" };
    format!("{folder}/pyvmm-fuzz-{name}-{}", std::process::id())
}

/// The input that is being tried is a finding.
fn end(name: &str, finding: &str) -> ! {
    let kept = format!("target/fuzz-{name}");
    std::fs::copy(path(name), &kept).unwrap();
    println!("{finding}\nthe input is in {kept}");
    std::process::exit(1);
}

fn try_input<T: Target>(target: &mut T, input: &T::Input, current: &Current) {
    // It is also there if the process is killed.
    std::fs::write(path(T::NAME), target.print(input)).unwrap();
    *current.lock().unwrap() = Some(Instant::now());
    allocations::take_largest();
    let done = catch_unwind(AssertUnwindSafe(|| target.run(input)));
    let largest = allocations::take_largest();
    *current.lock().unwrap() = None;
    let finding = match (panics::take(), done) {
        (Some(panic), _) => panic,
        (None, Ok(Err(finding))) => finding,
        (None, Err(_)) => "a panic".into(),
        _ if largest > T::MAX_ALLOCATION => format!("an allocation of {largest} bytes"),
        (None, Ok(Ok(()))) => return,
    };
    end(T::NAME, &finding);
}

/// Try inputs as the program's arguments say. Zero seconds only replay the corpus.
pub(crate) fn run<T: Target>(target: &mut T) {
    let mut arguments = Arguments::of_program();
    let files = corpus::read(&arguments.corpus);
    let mut corpus: Vec<T::Input> = files.iter().map(|bytes| target.parse(bytes)).collect();
    let (mut coverage, current) = (Coverage::new(), Current::default());
    panics::watch();
    std::fs::create_dir_all("target").unwrap();
    println!("{}: the input that is being tried is in {}", T::NAME, path(T::NAME));
    watch_time(T::NAME, &current);
    for input in &corpus {
        coverage.clear();
        try_input(target, input, &current);
        coverage.is_new();
    }
    let mut executions = corpus.len();
    let until = arguments.until();
    let Arguments { chance, keep, .. } = &mut arguments;
    while Instant::now() < until {
        let mut input = pick(&corpus, chance).clone();
        let other = &corpus[chance.below(corpus.len())];
        target.change(&mut input, other, chance);
        coverage.clear();
        try_input(target, &input, &current);
        executions += 1;
        if coverage.is_new() {
            if let Some(keep) = keep {
                let path = format!("{keep}/{:05}", corpus.len());
                std::fs::write(path, target.print(&input)).unwrap();
            }
            corpus.push(input);
        }
    }
    std::fs::remove_file(path(T::NAME)).unwrap();
    target.report().iter().for_each(|line| println!("{line}"));
    let (name, kept, edges) = (T::NAME, corpus.len(), coverage.edges());
    println!("{name}: {executions} executions, {kept} inputs kept, {edges} edges; no finding");
}
