//! The ranks of all locks, in the order in which they are taken. docs/threads.md has the same
//! table, with the data of each lock and its users; a test compares the two.

/// A place in the order of locks: a thread takes a lock only while every lock that it holds has a
/// lower rank.
pub trait Rank {
    /// Increases in the order in which locks are taken.
    const NUMBER: usize;
    /// As the table names it.
    const NAME: &'static str;
}

macro_rules! ranks {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        #[allow(clippy::enum_variant_names)]
        enum Number { $($name,)* }

        $(
            $(#[$doc])*
            #[derive(Debug)]
            pub struct $name;

            impl Rank for $name {
                const NUMBER: usize = Number::$name as usize;
                const NAME: &'static str = stringify!($name);
            }
        )*

        /// The names of all ranks, in order.
        pub const ALL: &[&str] = &[$($name::NAME,)*];
    };
}

ranks! {
    /// Which thread is inside `run`, and whether the machine is started or to be closed.
    Runner,
    /// The KVM side of a machine with a loop, until it is closed.
    VmmParts,
    /// Which parts of a PC a machine has.
    Platform,
    /// The machine's own subscribers.
    OwnSubscribers,
    /// The KVM side of a bare machine, until it is closed.
    Machine,
    /// The trace of a Python `Trace` object.
    TraceObject,
    /// The only trace of a machine.
    MachineTrace,
    /// Whether exits are counted.
    StatsSwitch,
    /// The vCPUs of a machine and their threads.
    Vcpus,
    /// One vCPU, at rest or in use by its thread. Numbered: several are taken in ascending order.
    Vcpu,
    /// The interrupt lines that the host drives high.
    IrqLines,
    /// The event manager and its subscribers, which are called with the lock held.
    EventManager,
    /// The registers of a virtio device's transport.
    VirtioRegisters,
    /// The state of a virtio device.
    VirtioDevice,
    /// A backend of a network device, called with the device's lock held, and calling back to it.
    NetBackend,
    /// Whether a virtio device may access its queues.
    VirtioGate,
    /// A queue of a virtio device.
    VirtioQueue,
    /// Chains that a virtio device has dropped.
    VirtioAbandoned,
    /// Why a virtio device needs a reset.
    VirtioFailure,
    /// The frames that a program gives and takes.
    NetQueue,
    /// The ports and links of a network inside the process.
    Network,
    /// The handles of a network's ports.
    NetworkPorts,
    /// The frames on their way to a port of a network.
    NetworkInbox,
    /// The file of a capture.
    NetCapture,
    /// The memory slots of a machine, which must not change during a snapshot or reset.
    MemorySlots,
    /// The map of guest memory.
    MemoryMap,
    /// Views of guest memory that the log takes for written.
    WritableViews,
    /// The process's pagemap.
    Pagemap,
    /// The exit handler of a machine.
    ExitHandler,
    /// The run state of a machine.
    RunState,
    /// File descriptors that are written when the run state changes.
    RunStateWakers,
    /// How the guest ended.
    GuestExit,
    /// The exit hooks.
    ExitHooks,
    /// Counters and traces of exits, called with the lock held.
    Observers,
    /// The devices of a bus.
    Bus,
    /// The owners of a machine's addresses, ports and lines.
    Resources,
    /// Counts of accesses that no device answered.
    Unanswered,
    /// The guest's side of a serial port.
    SerialGuest,
    /// The output of a serial port.
    SerialOutput,
    /// The registers of the keyboard controller.
    KeyboardController,
    /// A register that resets the machine.
    ResetRegister,
    /// ACPI's fixed registers.
    AcpiPm,
    /// The registers of the clock.
    Rtc,
    /// The items of fw_cfg, and which is selected.
    FwCfg,
    /// The registers of the VGA adapter.
    Vga,
    /// The address of PCI's configuration ports.
    Pci,
    /// The registers of the HPET.
    Hpet,
    /// Which devices drive an interrupt line high.
    DeviceLines,
    /// Counts of executed instructions.
    FixupCounts,
    /// Counts of one vCPU's exits.
    ExitCounts,
    /// The traces that record a loop.
    Recorders,
    /// The tracks of threads that run loops.
    LoopTracks,
    /// The buffered events of a thread's track.
    Track,
    /// The file of a trace.
    TraceFile,
    /// The thread of a virtio device that may block.
    VirtioWorker,
    /// What wakes the thread of a disk.
    BlkWorker,
    /// The last failure of a disk.
    BlkFailure,
    /// What a disk goes back to before its next request.
    DiskPending,
    /// What a disk reads and writes.
    DiskMedium,
    /// Discards in a qcow2 image, which exclude other requests.
    DiskImage,
    /// Where an image has its data.
    DiskExtents,
    /// The blocks that frozen contents of a disk have saved.
    DiskHistory,
    /// The blocks of an overlay in memory.
    DiskBlocks,
    /// The exception that a signal handler raised during a long call.
    Interruption,
    /// Output that the writer of a Python stream has taken and not yet reported as written.
    TakenOutput,
    /// Which threads run a loop, and what takes the results of its callbacks.
    LoopOwners,
    /// The wait for another thread's iteration.
    TurnLock,
    /// The event buffer, reused by each delivery.
    Delivery,
    /// Calls queued for a loop's thread.
    Calls,
    /// The result of such a call.
    Reply,
    /// The slowest callback so far.
    SlowestCallback,
    /// A timer that Python holds, until it is closed.
    TimerObject,
    /// The MSRs filtered for hooks.
    HookMsrs,
    /// The Python devices of a machine.
    PythonDevices,
    /// The subscribers of a machine's Python streams.
    PythonStreams,
    /// The objects of a machine given to the last job of a pool.
    Lease,
    /// The exception of a Python device's `save` or `restore`.
    DeviceFailure,
    /// Exceptions and stops of callbacks on vCPU threads, until the run takes them.
    PendingOutcome,
    /// The exception of a Python exit handler's `kick`.
    KickRaised,
    /// vCPU threads that have not been joined yet.
    UnjoinedThreads,
    /// State that the GIL protects, in a Python that has one.
    GilCell,
    /// The hops that a test records.
    Hops,
    /// Locks of tests.
    Test,
}
