"""The command line: ``pyvmm run``, ``snapshot``, ``restore``, ``inspect``, ``kernel``, ``doctor``, ``config``.

`runner` runs the machines.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NoReturn

import click
import msgspec

import pyvmm
from pyvmm import cli_devices, keyvalue
from pyvmm.cli_boot import BOOTS, BootOptions, boot_of
from pyvmm.config import SERIALS, CpuConfig, MemoryConfig, SerialConfig, VmmConfig
from pyvmm.exceptions import ConfigError, VmmError
from pyvmm.runner import STATUSES, STDERR, Ask, Instrumentation, Status, print_error, run_machine, run_with

if TYPE_CHECKING:
    from collections.abc import Callable


# Click keeps the lines of a paragraph that begins with \b.
EXIT_STATUSES = "\b\nExit status:\n" + "\n".join(f"  {status:>4}  {what}" for status, what in STATUSES.items())


def main() -> NoReturn:
    """Run the command line and exit with its status."""
    _open_standard_streams()
    error: str | None = None
    try:
        status = cli.main(prog_name="pyvmm", standalone_mode=False)
    except (click.exceptions.Abort, KeyboardInterrupt):
        status, error = Status.INTERRUPTED, "interrupted"
    except click.exceptions.NoArgsIsHelpError as raised:
        raised.show()
        status = Status.ERROR
    except click.ClickException as raised:
        status, error = Status.ERROR, _one_line(raised.format_message())
        click.echo(f"Error: {error}", err=True)
    except (VmmError, OSError) as raised:
        status, error = Status.ERROR, _one_line(str(raised))
        if not isinstance(raised, BrokenPipeError):
            click.echo(f"pyvmm: error: {error}", err=True)
    except SystemExit:
        status = Status.ERROR  # the reader has closed the output
    if error is not None:
        with suppress(OSError):
            print_error(_wants_json(sys.argv[1:]), error, status)
    _flush()
    sys.exit(status if isinstance(status, int) else 0)


def _wants_json(arguments: list[str]) -> bool:
    """Whether the command reports a run as JSON, also if its other arguments cannot be used."""
    return arguments[:1] in (["run"], ["restore"]) and "--json" in arguments


def _one_line(text: str) -> str:
    """An untrusted text in one line, with control and unprintable characters escaped."""
    line = "; ".join(part.strip() for part in text.splitlines() if part.strip())
    shown = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in line)
    return shown.encode(errors="backslashreplace").decode()


def _open_standard_streams() -> None:
    """Open descriptors 0 to 2 if they are closed, so that no other file becomes the console."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= STDERR:
        pass
    os.close(fd)


def _flush() -> None:
    """Flush stdout and stderr, ignoring errors if the reader is gone."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            # Otherwise Python would flush the rest of the buffer again at exit.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)


def _check_seconds(_context: click.Context, _option: click.Parameter, value: float | None) -> float | None:
    if value is not None and not value >= 0:
        raise click.BadParameter(f"{value} is not a number of seconds of at least 0.")
    return value


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(pyvmm.__version__, message="pyvmm %(version)s")
def cli() -> None:
    """KVM virtual machines inside one process."""


_MACHINE = (
    click.argument("kernel", required=False, type=click.Path()),
    click.option(
        "--kernel", "kernel_form", metavar="path=FILE,cmdline=TEXT", help="The kernel, in the syntax of rust-vmm's VMM."
    ),
    click.option("--flat", type=click.Path(), metavar="FILE", help="Machine code to run instead of a kernel."),
    click.option("--mode", metavar="MODE", help="Its mode: real16 (the default), protected32, long64 or user64."),
    click.option("--boot", type=click.Choice(BOOTS), help="What KERNEL is, if it is not found out (auto)."),
    click.option(
        "--initrd",
        multiple=True,
        type=click.Path(),
        metavar="PATH",
        help="The initial RAM disk: a file, or a directory to pack; several follow one another.",
    ),
    click.option("--module", multiple=True, metavar="FILE[,TEXT]", help="A module with its command line; repeatable."),
    click.option("--append", metavar="TEXT", help="The kernel command line."),
    click.option("--memory", metavar="MIB", help="Guest memory: a number of MiB, or size_mib=MIB."),
    click.option("--vcpus", "--vcpu", metavar="N", help="The number of vCPUs: N, or num=N,sockets=S,threads=T."),
    click.option("--cpu", "template", metavar="NAME|FILE", help="The CPU template: a name, or a .toml or .json file."),
    click.option("--hide", multiple=True, metavar="NAME", help="Hide a CPU feature; names as in /proc/cpuinfo."),
    click.option("--expose", multiple=True, metavar="NAME", help="Show a CPU feature that is otherwise hidden."),
    *(
        click.option(
            f"--{port}", type=click.Path(), metavar="FILE", help=f"Add the {what} and write its output to FILE."
        )
        for port, what in (("com2", "second serial port"), ("com3", "third"), ("com4", "fourth"))
    ),
    click.option(
        "--debugcon", type=click.Path(), metavar="FILE", help="Write what firmware prints to port 0x402 here."
    ),
    *cli_devices.OPTIONS,
    click.option("--fixups", is_flag=True, help="Execute instructions that KVM's emulator refuses."),
    click.option("--config", "config_file", type=click.Path(), help="A TOML or JSON file; options override it."),
)


def machine_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the argument and options that configure a machine."""
    for option in reversed(_MACHINE):
        command = option(command)
    return command


@cli.command(epilog=EXIT_STATUSES, short_help="Run a kernel, flat code or the built-in guest.")
@machine_options
@click.option("--timeout", type=float, callback=_check_seconds, metavar="SECONDS", help="End the run after this time.")
@click.option("--expect", metavar="TEXT", help="End the run when the console shows this text, with status 0.")
@click.option("--screen", is_flag=True, help="Show the VGA text screen instead of the serial port.")
@click.option(
    "--json", "as_json", is_flag=True, help="Print the result of the run as JSON; the console goes to stderr."
)
@click.option("--stats", is_flag=True, help="Print tables of the exits and of the vCPUs' time at the end.")
@click.option("--live-stats", is_flag=True, help="Show these tables on a terminal while the guest runs.")
@click.option("--trace", "trace_file", type=click.Path(), metavar="FILE", help="Write a trace for Perfetto.")
def run(
    config_file: str | None,
    timeout: float | None,
    expect: str | None,
    screen: bool,
    as_json: bool,
    stats: bool,
    live_stats: bool,
    trace_file: str | None,
    **options: Any,
) -> int:
    """Run KERNEL: a bzImage, a vmlinux, or another kernel for x86; without one, run the built-in guest.

    The guest's serial port is connected to the terminal. Ctrl-A x ends the machine.
    """
    if expect == "":
        raise ConfigError("--expect: the text is empty", at="--expect")
    base = VmmConfig.from_file(config_file) if config_file else VmmConfig()
    watch = Instrumentation(stats or live_stats, live_stats, trace_file)
    if screen:
        base = base.replace(platform=base.platform.replace(screen=True))
    return run_machine(with_options(base, **options), Ask(timeout, as_json, expect, screen), watch)


@cli.command(short_help="Run a machine and write a snapshot of it.")
@machine_options
@click.option("-o", "--output", required=True, type=click.Path(), help="The file to write.")
@click.option("--base", type=click.Path(), help="Write only the differences from the snapshot in this file.")
@click.option("--text", metavar="TEXT", help="Take the snapshot when the console prints this text.")
@click.option("--after", type=float, callback=_check_seconds, metavar="SECONDS", help="Take it after this time.")
@click.option("--timeout", type=float, callback=_check_seconds, metavar="SECONDS", help="Give up after this time.")
def snapshot(config_file: str | None, **options: Any) -> int:
    """Run KERNEL until it prints a text, a time has passed, or it ends, and write a snapshot.

    The console is printed; nothing can be typed. If the guest ends through its exit port, it
    continues after that instruction when it is restored.
    """
    from pyvmm import snapshot_tool

    how = snapshot_tool.TakeOptions(**{name: options.pop(name) for name in snapshot_tool.TakeOptions._fields})
    base = VmmConfig.from_file(config_file) if config_file else VmmConfig()
    return snapshot_tool.take(with_options(base, **options), how)


@cli.command(epilog=EXIT_STATUSES)
@click.argument("file", type=click.Path())
@click.option("--base", type=click.Path(), help="The file that this one was saved against.")
@click.option("--force", is_flag=True, help="Load it although this host lacks something that the original one had.")
@click.option("--timeout", type=float, callback=_check_seconds, metavar="SECONDS", help="End the run after this time.")
@click.option(
    "--json", "as_json", is_flag=True, help="Print the result of the run as JSON; the console goes to stderr."
)
def restore(file: str, base: str | None, force: bool, timeout: float | None, as_json: bool) -> int:
    """Continue the machine in a snapshot FILE, like `run`."""
    loaded = pyvmm.Snapshot.load(file, base, force=force)
    return run_with(SerialConfig(), lambda serial: loaded.fork(serial=serial), Ask(timeout, as_json), Instrumentation())


@cli.command(epilog='\b\nTo start it: pyvmm run --config "$(pyvmm kernel)/machine.toml"')
@click.option("--virtio", is_flag=True, help="Build the one for disks, networks and shares, with busybox: virtio.toml.")
def kernel(virtio: bool) -> None:
    """Build a small Linux and print its folder.

    Takes minutes the first time. Its userspace is a shell of a few commands.
    """
    from pyvmm import linux

    on_terminal = sys.stderr.isatty()

    def show(files: int) -> None:
        click.echo(f"\rbuilding the small Linux: {files} files compiled", err=True, nl=False)

    built = linux.build("virtio" if virtio else "small", progress=show if on_terminal else None)
    if on_terminal:
        click.echo("\r\033[K", err=True, nl=False)
    click.echo(built)


@cli.command()
@click.argument("file", type=click.Path())
@click.option("--base", type=click.Path(), help="The file that this one was saved against, for --verify.")
@click.option("--verify", is_flag=True, help="Also read all pages and check their checksum.")
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
def inspect(file: str, base: str | None, verify: bool, as_json: bool) -> None:
    """Describe a snapshot FILE."""
    from pyvmm import snapshot_tool

    if verify:
        snapshot_tool.verify(file, base)
    found = pyvmm.Snapshot.inspect(file)
    if as_json:
        click.echo(json.dumps(found, indent=2))
    else:
        snapshot_tool.show(file, found)


@cli.command(short_help="Check what pyvmm needs on this host.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@click.option("--machine", "of_machine", is_flag=True, help="Print a machine's addresses, ports and lines instead.")
@click.option("--config", "file", type=click.Path(), help="With --machine: the machine of this configuration file.")
@click.option("--cpuid", "of_cpuid", is_flag=True, help="Print the CPUID that KVM supports instead.")
@click.option("--cpu", "template", metavar="NAME|FILE", help="With --cpuid: what a guest with this CPU template sees.")
def doctor(as_json: bool, of_machine: bool, file: str | None, of_cpuid: bool, template: str | None) -> int:
    """Check what pyvmm needs on this host, and print what is missing and how to fix it."""
    from pyvmm import cpuid_report
    from pyvmm.doctor import examine, is_healthy, print_checks, print_resources, resources_of

    if file is not None and not of_machine:
        raise click.UsageError("--config needs --machine")
    if template is not None and not of_cpuid:
        raise click.UsageError("--cpu needs --cpuid")
    if of_cpuid and of_machine:
        raise click.UsageError("--cpuid and --machine are different reports")
    if of_cpuid:
        cpuid_report.report(template, as_json=as_json)
        return 0
    if of_machine:
        print_resources(resources_of(None if file is None else VmmConfig.from_file(file)), as_json=as_json)
        return 0
    checks = examine()
    if as_json:
        click.echo(msgspec.json.encode(checks).decode())
    else:
        print_checks(checks)
    return 0 if is_healthy(checks) else 1


@cli.group()
def config() -> None:
    """Check and describe configurations."""


@config.command()
def schema() -> None:
    """Print the JSON schema of a configuration."""
    click.echo(json.dumps(VmmConfig.json_schema(), indent=2))


@config.command(short_help="Check a configuration file.")
@click.argument("file", type=click.Path())
def check(file: str) -> None:
    """Check a configuration file and the files that it names, and print it with every default."""
    found = VmmConfig.from_file(file)
    # File descriptors are those of the process that runs the machine.
    streams = {end: None for end in ("input", "output") if isinstance(getattr(found.serial, end), int)}
    found.replace(serial=found.serial.replace(**streams)).check()
    click.echo(json.dumps(found.to_dict(), indent=2))


def with_options(
    base: VmmConfig,
    memory: str | None,
    vcpus: str | None,
    template: str | None,
    hide: tuple[str, ...],
    expose: tuple[str, ...],
    fixups: bool,
    **rest: Any,
) -> VmmConfig:
    """The configuration with the options of the command line over it."""
    outputs = {port: SerialConfig(output=path) for port in SERIALS if (path := rest.pop(port, None)) is not None}
    base = cli_devices.with_devices(base, {name: rest.pop(name, None) for name in cli_devices.NAMES})
    booted = boot_of(base, BootOptions(**rest))
    if memory is not None:
        size = _number("memory", memory, "size_mib")
        base = base.replace(memory=MemoryConfig(size_mib=size))
    cpu = base.cpu
    if vcpus is not None:
        cpu = _vcpus(cpu, vcpus)
    if template is not None:
        cpu = cpu.replace(template=template)
    if hide:
        cpu = cpu.replace(hide=(*cpu.hide, *_names(hide)))
    if expose:
        cpu = cpu.replace(expose=(*cpu.expose, *_names(expose)))
    if fixups:
        cpu = cpu.replace(fixups=True)
    return base.replace(boot=booted, cpu=cpu, **outputs)


def _vcpus(cpu: CpuConfig, text: str) -> CpuConfig:
    form = text if "=" in text else f"num={text}"
    found = keyvalue.parse("vcpus", form, {"num": int, "sockets": int, "threads": int})
    return cpu.replace(**{"vcpus" if name == "num" else name: value for name, value in found.items()})


def _names(options: tuple[str, ...]) -> list[str]:
    return [name for names in options for name in names.split(",")]


def _number(option: str, text: str, key: str) -> int:
    form = text if "=" in text else f"{key}={text}"
    return int(keyvalue.parse(option, form, {key: int})[key])
