//! The seed without Python: a configuration becomes a machine, its guest ends, `run` returns an
//! `Exit`.

#![allow(clippy::unwrap_used, reason = "a test")]

use std::time::Duration;

use pyvmm::config::{Boot, Code, FlatBoot, MemoryConfig, VmmConfig};
use pyvmm::cpu::CpuMode;
use pyvmm::error::Error;
use pyvmm::event::NextTurn;
use pyvmm::exit_handler::{Exit, ExitReason};
use pyvmm::vmm::Vmm;

const LIMIT: Duration = Duration::from_secs(60);

fn flat(code: &[u8]) -> VmmConfig {
    let code = Code::Bytes(code.to_vec());
    let boot = Boot::Flat(FlatBoot { code, address: 0x1000, entry: None, mode: CpuMode::Real16 });
    VmmConfig { boot, memory: MemoryConfig { size_mib: 1 }, ..VmmConfig::default() }
}

fn run(vmm: &Vmm, limit: Duration) -> Exit {
    let turn = |next: NextTurn| vmm.event_manager()?.run_until(next, None).map(drop);
    vmm.run::<Error>(Some(limit), turn).unwrap()
}

/// A machine, unless this host has no KVM and nobody insists on it.
fn machine(config: VmmConfig) -> Option<Vmm> {
    if std::env::var_os("PYVMM_REQUIRE_KVM").is_none() && pyvmm::kvm::open_kvm().is_err() {
        return None;
    }
    Some(Vmm::try_from(config).unwrap())
}

#[test]
fn a_guest_ends_through_the_exit_port() {
    // mov al, 42; out 0xf4, al
    let Some(vmm) = machine(flat(&[0xb0, 42, 0xe6, 0xf4])) else {
        return;
    };
    let exit = run(&vmm, LIMIT);
    assert_eq!((exit.reason, exit.code, exit.vcpu), (ExitReason::Code, Some(42), Some(0)));
    assert_eq!(exit.to_string(), "code 42 (vCPU 0)");
}

#[test]
fn the_embedded_guest_speaks_and_answers() {
    let Some(vmm) = machine(VmmConfig::default()) else {
        return;
    };
    vmm.serial().feed(b"hello\r\n\x04");
    let exit = run(&vmm, LIMIT);
    let said = String::from_utf8(vmm.serial().take_output()).unwrap();
    assert_eq!((exit.reason, exit.code), (ExitReason::Code, Some(0)), "{exit}");
    assert!(said.contains("You typed: hello\r\n") && said.ends_with("Goodbye.\r\n"), "{said}");
}

#[test]
fn a_stopped_run_goes_on_in_the_next() {
    // jmp $
    let Some(vmm) = machine(flat(&[0xeb, 0xfe])) else {
        return;
    };
    vmm.stop().unwrap();
    assert_eq!(run(&vmm, LIMIT).reason, ExitReason::Stopped);
    let exit = run(&vmm, Duration::from_millis(20));
    assert_eq!(exit.reason, ExitReason::Timeout);
}
