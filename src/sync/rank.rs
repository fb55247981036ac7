//! The ranks of all locks, in the order in which they are taken. docs/threads.md shows the same
//! table with what each lock guards and who takes it; a test compares the two.

/// A place in the order of locks: a thread takes a lock only while every lock that it holds has a
/// lower rank.
pub trait Rank {
    /// Goes up in the order in which locks are taken.
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
    /// Who is inside `run`, and whether the machine has been started or is to be closed.
    Runner,
    /// The KVM side of a machine with a loop, until it is closed.
    VmmParts,
    /// The subscribers that are the machine's own.
    OwnSubscribers,
    /// The KVM side of a bare machine, until it is closed.
    Machine,
    /// The trace of a Python `Trace` object.
    TraceObject,
    /// The one trace of a machine.
    MachineTrace,
    /// Whether exits are counted.
    StatsSwitch,
    /// The vCPUs of a machine and their threads.
    Vcpus,
    /// One vCPU: at rest here, or out with its thread. Numbered: several are taken in rising order.
    Vcpu,
    /// The interrupt lines that the host holds high.
    IrqLines,
    /// The devices that a pause keeps still.
    PausedDevices,
    /// The memory slots of a machine, and what they hold.
    MemorySlots,
    /// The map of guest memory.
    MemoryMap,
    /// Views of guest memory that the log takes for written.
    WritableViews,
    /// The process's pagemap.
    Pagemap,
    /// How long threads that turn a loop may wait.
    LoopWaits,
    /// The event manager, with its subscribers, which are called under it.
    EventManager,
    /// The exit handler of a machine.
    ExitHandler,
    /// The run state of a machine.
    RunState,
    /// Descriptors that are written when the run state changes.
    RunStateWakers,
    /// How the guest ended.
    GuestExit,
    /// The hooks that look at exits first.
    ExitHooks,
    /// What looks at exits afterwards; called under it.
    Observers,
    /// The devices of a bus.
    Bus,
    /// What answers where in a machine.
    Resources,
    /// Accesses that nobody answered.
    Unanswered,
    /// The guest's side of a serial port.
    SerialGuest,
    /// The output of a serial port.
    SerialOutput,
    /// The registers of the keyboard controller.
    KeyboardController,
    /// The registers of the clock.
    Rtc,
    /// Counts of executed instructions.
    FixupCounts,
    /// Counts of one vCPU's exits.
    ExitCounts,
    /// The traces that see a loop's turns.
    Recorders,
    /// The tracks of threads that turn loops.
    LoopTracks,
    /// What a thread's track has gathered.
    Track,
    /// The file of a trace.
    TraceFile,
    /// What a signal handler raised during a long call.
    Interruption,
    /// Output that the writer of a Python stream has taken and not settled.
    TakenOutput,
    /// Which threads turn a loop, and what takes the results of its callbacks.
    LoopOwners,
    /// The wait for another thread's turn.
    TurnLock,
    /// What a delivery leaves for the next.
    Delivery,
    /// Calls that wait for a loop's thread.
    Calls,
    /// The answer to such a call.
    Reply,
    /// The slowest callback so far.
    SlowestCallback,
    /// A timer that Python holds, until it is closed.
    TimerObject,
    /// Exit hooks by kind.
    HookFunctions,
    /// The registers that hooks have filtered.
    HookMsrs,
    /// The Python devices of a machine.
    PythonDevices,
    /// The subscribers behind a machine's Python streams.
    PythonStreams,
    /// What the last job of a pool was given of a machine.
    Lease,
    /// What a Python device's `save` or `restore` has raised.
    DeviceFailure,
    /// What callbacks on vCPU threads leave for the run.
    PendingOutcome,
    /// What a Python exit handler's `kick` has raised.
    KickRaised,
    /// Threads of vCPUs that nobody has joined yet.
    LeftThreads,
    /// State that the GIL guards where there is one.
    GilCell,
    /// The hops that a test records.
    Hops,
    /// Locks of tests.
    Test,
}
