# One command a line. `make help` lists them; `make all` is what CI runs, in the same order.

export PATH := $(CURDIR)/.venv/bin:$(HOME)/.cargo/bin:$(PATH)
export VIRTUAL_ENV := $(CURDIR)/.venv
SHELL := /bin/bash
PYTHON_CODE := python tests benches examples scripts

.PHONY: help all run test setup quick lint rust loom linux guests pytest checked asan miri hardware docs wheels bench stress long fuzz audit format clean

help: ## List the commands
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

all: test audit ## What CI runs

run: ## Set everything up and boot the built-in guest
	@scripts/setup.sh run kvm
	@pyvmm run

test: setup quick linux guests pytest ## Set everything up and run the tests

# Two at a time: each keeps one processor busy.
quick: setup
	@$(MAKE) --no-print-directory --jobs 2 --output-sync=target lint rust loom checked docs

setup: ## Create .venv with pyvmm in it, built in release
	@scripts/setup.sh

lint: setup ## Formatting, lints, types, stubs
	@scripts/if_there cargo-fmt cargo fmt --check
	@scripts/if_there cargo-clippy cargo clippy --quiet --all-targets -- -D warnings
	@scripts/if_there cargo-clippy cargo clippy --quiet --all-targets --no-default-features --features mock -- -D warnings
	ruff check --quiet $(PYTHON_CODE)
	ruff format --quiet --check $(PYTHON_CODE)
	mypy
	python -m mypy.stubtest pyvmm._pyvmm

# rustdoc would look for the job server of a make that runs two targets at a time, and warn.
rust: setup ## The Rust tests, without Python
	MAKEFLAGS= cargo test --quiet --no-default-features --features mock

loom: setup ## The kick protocols and the commands of vCPU threads in every order of their steps
	RUSTFLAGS="--cfg loom" cargo test --quiet --release --no-default-features --lib --target-dir target/loom -- vcpu::kick vcpu::commands_model event::calls event::turn_lock

linux: ## Build the Linux that the tests boot, once, outside the checkout
	@python/pyvmm/linux/build.sh tests >/dev/null || echo "pyvmm: the tests that boot Linux are left out" >&2

guests: ## Fetch the guests of others that the tests run, once, outside the checkout
	@scripts/guests.sh >/dev/null || echo "pyvmm: the tests of guests that could not be fetched are left out" >&2

pytest: setup linux guests ## The Python tests
	@scripts/pytest.sh

CHECKED ?= tests/stress tests/house/test_flow.py tests/vmm/test_vmm.py tests/vm/test_vm.py tests/devices/test_devices.py tests/devices/test_device_callbacks.py \
	tests/vcpu/test_hooks.py tests/vcpu/test_robustness.py tests/vcpu/test_stop.py
checked: setup ## Python tests with a module that checks the order of locks; CHECKED=ARGUMENTS of pytest
	@scripts/checked.sh
	PYTHONPATH=target/checked/python pytest --quiet $(CHECKED)

TESTS ?= all
hardware: setup linux guests ## The Python tests on a hardware KVM, which QEMU emulates; TESTS=subset: the most useful
	@python scripts/hardware $(TESTS)

# What copies, maps and hands out memory, and what entered Python.
ASAN := tests/memory tests/snapshot/test_snapshot.py tests/snapshot/test_reset.py \
	tests/snapshot/test_snapshot_file.py tests/snapshot/test_snapshot_file_damage.py tests/fixup tests/devices/test_devices.py \
	tests/devices/test_device_callbacks.py tests/devices/test_string_instructions.py tests/devices/test_hostcalls.py tests/stress/test_memory_stress.py
asan: setup ## Python tests with AddressSanitizer, where the toolchain allows it; ASAN=ARGUMENTS of pytest
	@scripts/asan.sh $(ASAN)

# What makes no system calls; file:: reads bytes that anybody may have written.
MIRI := fixup:: cpu:: debug:: boot::mptable config:: vcpu::string_io snapshot::state snapshot::file
miri: ## The Rust tests that need no kernel, interpreted by Miri
	@scripts/miri.sh $(MIRI)

docs: setup ## The documentation site in target/site and the Rust documentation; every link checked
	NO_MKDOCS_2_WARNING=1 mkdocs build --quiet
	RUSTDOCFLAGS="-D warnings" cargo doc --quiet --no-deps --document-private-items

WHEELS ?=
wheels: setup ## Wheels and a source distribution in target/wheels, checked and tried; WHEELS="abi3 sdist": only these
	@scripts/wheels.sh $(WHEELS)

bench: setup ## Benchmarks: ratios against the physical limit; BENCH_JSON=FILE writes them
	python -m benches $(BENCH)

stress: setup ## The long runs of the stress tests
	PYVMM_STRESS_S=30 pytest --quiet tests/stress tests/event/test_event_manager_model.py tests/py/test_ending.py --timeout 3600 -o faulthandler_timeout=7200

long: setup linux ## Linux moves 64 MiB each way by TCP and vsock, where the other tests move 4
	PYVMM_LONG=1 pytest --quiet -m linux tests/virtio/test_linux_net.py tests/virtio/test_linux_vsock.py

FUZZ_S ?= 60
FUZZ_SEED ?= 1
# The counters by which some programs keep the inputs that reach new code.
COVERAGE := -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=3 -Cllvm-args=-sanitizer-coverage-inline-8bit-counters
HOST := $(shell rustc -vV 2>/dev/null | sed -n 's/host: //p')
COVERED = CARGO_PROFILE_RELEASE_LTO=off RUSTFLAGS="$(COVERAGE)" cargo run --quiet --release --no-default-features --features mock \
	--target $(HOST) --target-dir target/fuzz --example
fuzz: setup ## Snapshot files, drivers of devices, disk images and files to boot, changed at random; FUZZ_S=SECONDS of each, FUZZ_SEED=NUMBER
	@pyvmm snapshot --memory 1 -o target/fuzz-sample --text Hello >/dev/null </dev/null
	cargo run --quiet --release --no-default-features --example fuzz_snapshot target/fuzz-sample $(FUZZ_S) $(FUZZ_SEED)
	cargo run --quiet --release --no-default-features --example fuzz_share tests/fuzz/share $(FUZZ_S) $(FUZZ_SEED)
	$(COVERED) fuzz_virtio tests/fuzz/virtio $(FUZZ_S) $(FUZZ_SEED)
	$(COVERED) fuzz_qcow2 tests/fuzz/qcow2 $(FUZZ_S) $(FUZZ_SEED)
	$(COVERED) fuzz_boot tests/fuzz/boot $(FUZZ_S) $(FUZZ_SEED)

audit: setup ## Known vulnerabilities and licences of the dependencies, as far as they can be checked here
	@scripts/audit.sh

format: setup ## Format all code
	@scripts/if_there cargo-fmt cargo fmt
	ruff check --quiet --fix $(PYTHON_CODE)
	ruff format --quiet $(PYTHON_CODE)

clean: ## Remove the files that these commands have created here
	rm -rf .venv target dist .pytest_cache .mypy_cache .ruff_cache .hypothesis python/pyvmm/*.so
