//! The inputs from which `make fuzz` starts, and those that once were findings.

#![allow(clippy::panic, clippy::print_stdout, clippy::unwrap_used, reason = "a test")]

#[path = "../fuzz/chance.rs"]
mod chance;
#[path = "../fuzz/panics.rs"]
mod panics;
#[path = "../fuzz/qcow2_run.rs"]
mod qcow2_run;
#[path = "../fuzz/virtio_host.rs"]
mod virtio_host;
#[path = "../fuzz/virtio_input.rs"]
mod virtio_input;
#[path = "../fuzz/virtio_memory.rs"]
mod virtio_memory;
#[path = "../fuzz/virtio_run.rs"]
mod virtio_run;

use std::any::Any;
use std::collections::BTreeSet;
use std::path::Path;
use std::sync::{Arc, Mutex};

use event_manager::EventOps;
use pyvmm::virtio::{Chain, Queues, VirtioDevice};
use virtio_input::{Input, KINDS, STEPS};

/// The inputs of a target, by name.
fn corpus(name: &str) -> Vec<(String, Vec<u8>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz").join(name);
    let mut inputs: Vec<_> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap())
        .map(|entry| {
            (entry.file_name().into_string().unwrap(), std::fs::read(entry.path()).unwrap())
        })
        .collect();
    inputs.sort();
    inputs
}

/// In one test, because each would find the panics of the other.
#[test]
fn the_corpora_have_no_finding() {
    panics::watch();
    let mut room = virtio_memory::Room::new(virtio_host::image());
    let (mut kinds, mut steps) = (BTreeSet::new(), BTreeSet::new());
    for (name, bytes) in corpus("virtio") {
        let input = Input::parse(&bytes);
        kinds.insert(input.kind);
        steps.extend(input.steps.iter().map(|step| step.name));
        let done = virtio_run::run(&input, &mut room);
        assert_eq!((done.map(|count| count.inputs), panics::take()), (Ok(1), None), "{name}");
        assert_eq!(Input::parse(&input.print()), input, "{name}");
    }
    assert_eq!((kinds.len(), steps.len()), (KINDS.len(), STEPS.len()), "{kinds:?} {steps:?}");

    let inputs = corpus("qcow2");
    let base = inputs.iter().find(|(name, _)| name == "plain").unwrap();
    let folder = qcow2_run::Folder::new(&base.1);
    let mut opened = 0;
    for (name, bytes) in &inputs {
        let done = qcow2_run::run(bytes, &folder).unwrap();
        assert_eq!(panics::take(), None, "{name}");
        opened += u64::from(done.opened > 0);
        assert_eq!(done.images, 1);
    }
    // The others are refused.
    assert!((10..inputs.len() as u64).contains(&opened), "{opened}");
    println!("{opened} of {} images opened, {} panics caught", inputs.len(), panics::take_caught());
}

/// What a device does that it must not.
#[derive(Clone, Copy, Debug)]
enum Fault {
    None,
    WritesBeyond,
    Keeps,
    Spins,
}

/// A device with one fault, which keeps chains in the second field.
#[derive(Debug)]
struct Faulty(Fault, Mutex<Vec<Chain>>);

impl VirtioDevice for Faulty {
    fn device_type(&self) -> u32 {
        42
    }

    fn queue_sizes(&self) -> &[u16] {
        &[8]
    }

    fn process_queue(&self, queues: &Arc<Queues>, queue: usize, _ops: &mut EventOps<'_>) {
        let Some(access) = queues.access() else { return };
        while let Some(chain) = access.pop(queue) {
            let end = chain.writable()[0].address + u64::from(chain.writable()[0].length);
            match self.0 {
                Fault::None => access.memory().write(end - 1, b"x").unwrap(),
                Fault::WritesBeyond => access.memory().write(end, b"x").unwrap(),
                Fault::Keeps => return self.1.lock().unwrap().push(chain),
                Fault::Spins => queues.notify(queue),
            }
            access.complete(chain, 0);
        }
        if matches!(self.0, Fault::Spins) {
            queues.notify(queue);
        }
    }

    fn as_any(self: Arc<Self>) -> Arc<dyn Any + Send + Sync> {
        self
    }
}

#[test]
fn what_a_device_must_not_do_is_found() {
    let mut room = virtio_memory::Room::new(virtio_host::image());
    let input = Input::parse(b"rng\nstart 0\nrequest 0 10\nturn\n");
    for (fault, finding) in [
        (Fault::None, None),
        (Fault::WritesBeyond, Some("outside of its buffers")),
        (Fault::Keeps, Some("not given back")),
        (Fault::Spins, Some("does not come to rest")),
    ] {
        let device = Arc::new(Faulty(fault, Mutex::default()));
        let (_, host) = virtio_host::Host::new(input.kind, &room.place);
        let done = virtio_run::run_on(device, host, &input, &mut room);
        match (done, finding) {
            (Ok(count), None) => assert_eq!((count.chains, count.resets), (1, 0)),
            (Err(found), Some(finding)) => assert!(found.contains(finding), "{found}"),
            (done, _) => panic!("{fault:?}: {done:?}"),
        }
    }
}
