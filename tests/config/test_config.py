"""The configuration from a dict, TOML and JSON: every error names its key.

Covers python/pyvmm/config_files.py, python/pyvmm/config_parts.py and python/pyvmm/boots.py.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import json
import pickle
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyvmm import (
    BootError,
    BootModule,
    ConfigError,
    CpuConfig,
    ElfBoot,
    EmbeddedBoot,
    FirmwareBoot,
    FlatBoot,
    FwCfgConfig,
    KernelBoot,
    LinuxBoot,
    MemoryConfig,
    PlatformConfig,
    SerialConfig,
    StreamError,
    VmmConfig,
)


def test_defaults_are_a_machine() -> None:
    config = VmmConfig()
    assert config == VmmConfig.from_dict({}) == VmmConfig.from_toml("") == VmmConfig.from_json("{}")
    assert (config.memory.size_mib, config.cpu.vcpus, config.boot, config.exit_port) == (
        128,
        1,
        EmbeddedBoot(),
        0xF4,
    )


TAGS = ("embedded", "flat", "elf", "linux", "kernel", "firmware")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"memory": {"size_mib": 0}}, "memory.size_mib: Expected `int` >= 1"),
        ({"memory": {"size_mib": "1"}}, "memory.size_mib: Expected `int`, got `str`"),
        ({"memory": {"size_mib": 1.5}}, "memory.size_mib: Expected `int`, got `float`"),
        ({"memory": {"sizemib": 1}}, "memory.sizemib: unknown key; did you mean size_mib?"),
        ({"memory": []}, "memory: Expected `object`, got `array`"),
        ({"cpu": {"vcpus": 4097}}, "cpu.vcpus: Expected `int` <= 4096"),
        ({"cpu": {"hide": [1]}}, "cpu.hide[0]: Expected `str`, got `int`"),
        (
            {"cpu": {"template": "x"}},
            "cpu.template: 'x' is not one of auto, host, software-kvm, v2, v3, v4, or a .toml or .json file",
        ),
        (
            {"cpu": {"template": {"base": "x"}}},
            "cpu.template.base: Invalid enum value 'x'; one of auto, host, software-kvm, v2, v3, v4",
        ),
        ({"cpu": {"template": {"bas": "v2"}}}, "cpu.template.bas: unknown key; did you mean base?"),
        ({"cpu": {"threads": 0}}, "cpu.threads: Expected `int` >= 1"),
        ({"boot": {"type": "cloud"}}, f"boot.type: Invalid value 'cloud'; one of {', '.join(TAGS)}"),
        ({"boot": {"type": "linux"}}, "boot: Object missing required field `kernel`"),
        ({"boot": {"type": "linux", "kernel": 3}}, "boot.kernel: Expected `str`, got `int`"),
        ({"boot": {"type": "flat", "code": "?"}}, "boot.code: Invalid base64 encoded string"),
        ({"boot": {"type": "flat", "cod": ""}}, "boot.cod: unknown key; did you mean code?"),
        ({"exit_port": 70000}, "exit_port: Expected `int` <= 65532"),
        (
            {"nonsense": 1},
            "nonsense: unknown key; known are balloon, boot, com2, com3, com4, console, cpu, debugcon, disks, "
            "exit_port, irqchip, memory, nets, pit, platform, rng, serial, shares, virtio, vsock",
        ),
        ([], "config: Expected `object`, got `array`"),
    ],
)
def test_bad_value_is_named_by_its_key(values: Any, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        VmmConfig.from_dict(values)
    assert str(raised.value) == message
    assert raised.value.at == message.split(": ", maxsplit=1)[0]
    with pytest.raises(ConfigError) as raised:
        VmmConfig.from_json(json.dumps(values))
    assert str(raised.value) == message


@pytest.mark.parametrize("text", ["a=", b"\xff", "a = [" * 500, "\0", "[boot]\ntype = 1979-05-27"])
def test_bad_toml_is_refused(text: str | bytes) -> None:
    with pytest.raises(ConfigError):
        VmmConfig.from_toml(text)


@pytest.mark.parametrize("text", ["", "{", b"\xff", "[" * 100_000, "null", '{"memory": {"size_mib": 1e999}}'])
def test_bad_json_is_refused(text: str | bytes) -> None:
    with pytest.raises(ConfigError):
        VmmConfig.from_json(text)


WHOLE = VmmConfig(
    memory=MemoryConfig(size_mib=256),
    cpu=CpuConfig(vcpus=2, hide=("xsave", "avx"), expose=("popcnt",), template="host", fixups=True),
    boot=LinuxBoot("/vmlinux", initrd="/initrd", cmdline="quiet", load_address=0x200000, protocol="pvh"),
    serial=SerialConfig(output="/console", input=0, input_eof=b""),
    com2=SerialConfig(output="/com2"),
    debugcon=SerialConfig(),
    exit_port=None,
    irqchip=True,
    pit=False,
    platform=PlatformConfig(acpi=True, pci=False, hpet=True, fw_cfg=FwCfgConfig(files={"opt/org.example/x": "/x"})),
)
FLAT = VmmConfig(boot=FlatBoot(b"\xf4", address=2**63, entry=5, mode="user64"))


KERNEL = VmmConfig(
    boot=KernelBoot("/k", cmdline="a b", modules=("/m", BootModule("/n", cmdline="c")), protocol="multiboot")
)
FIRMWARE = VmmConfig(boot=FirmwareBoot("/bios.bin"))


@pytest.mark.parametrize("config", [VmmConfig(), WHOLE, FLAT, KERNEL, FIRMWARE])
def test_each_format_gives_it_back(config: VmmConfig) -> None:
    plain = config.to_dict()
    assert VmmConfig.from_dict(plain) == config
    assert VmmConfig.from_json(json.dumps(plain)) == config
    without_none = json.loads(json.dumps(plain), object_hook=lambda d: {k: v for k, v in d.items() if v is not None})
    from_toml = VmmConfig.from_toml(msgspec.toml.encode(without_none) if _has_toml_writer() else b"")
    assert not _has_toml_writer() or from_toml == config.replace(exit_port=from_toml.exit_port)


def _has_toml_writer() -> bool:
    try:
        msgspec.toml.encode({})
    except ImportError:
        return False
    return True


def test_files_are_told_by_their_names_and_paths_count_from_them(tmp_path: Path) -> None:
    (tmp_path / "vm.toml").write_text(
        '[boot]\ntype = "linux"\nkernel = "vmlinux"\ninitrd = "/initrd"\n[serial]\noutput = "log"\n'
    )
    config = VmmConfig.from_file(tmp_path / "vm.toml")
    assert isinstance(config.boot, LinuxBoot)
    assert (config.boot.kernel, config.boot.initrd) == (str(tmp_path / "vmlinux"), "/initrd")
    assert config.serial.output == str(tmp_path / "log")
    (tmp_path / "vm.json").write_text('{"memory": {"size_mib": 5}}')
    assert VmmConfig.from_file(str(tmp_path / "vm.json")).memory == MemoryConfig(size_mib=5)
    for name in ("vm.yaml", "none.toml"):
        with pytest.raises(ConfigError, match=name):
            VmmConfig.from_file(tmp_path / name)


def test_modules_paths_count_from_the_file(tmp_path: Path) -> None:
    path = tmp_path / "vm.toml"
    path.write_text(
        '[boot]\ntype = "kernel"\nkernel = "k"\nprotocol = "pvh"\n'
        'modules = ["m", "/n", {path = "o", cmdline = "a b"}]\n'
    )
    modules = (str(tmp_path / "m"), "/n", BootModule(str(tmp_path / "o"), cmdline="a b"))
    assert VmmConfig.from_file(path).boot == KernelBoot(str(tmp_path / "k"), modules=modules, protocol="pvh")
    path.write_text('[boot]\ntype = "firmware"\npath = "bios.bin"\n')
    assert VmmConfig.from_file(path).boot == FirmwareBoot(str(tmp_path / "bios.bin"))
    path.write_text('[boot]\ntype = "kernel"\nkernel = "k"\nmodules = [{pth = "m"}]\n')
    with pytest.raises(ConfigError, match=r"^boot\.modules\[0\]\.pth: unknown key; did you mean path\?"):
        VmmConfig.from_file(path)


def test_files_of_fw_cfg_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "vm.toml"
    path.write_text('[platform.fw_cfg.files]\n"opt/org.example/a" = "a"\n')
    config = VmmConfig.from_file(path)
    with pytest.raises(BootError, match=r"^platform\.fw_cfg\.files: .*/a: No such file"):
        config.check()
    (tmp_path / "a").write_text("text")
    config.check()


def test_stream_that_is_an_object_cannot_be_written() -> None:
    with pytest.raises(ConfigError, match=r"^serial\.output: builtin_function_or_method cannot be written"):
        VmmConfig(serial=SerialConfig(output=print)).to_dict()
    path = VmmConfig(boot=LinuxBoot(Path("/vmlinux")))
    assert path.to_dict()["boot"]["kernel"] == "/vmlinux"


def test_files_of_fw_cfg_are_paths_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "vm.toml"
    path.write_text('[platform.fw_cfg.files]\n"opt/org.example/x" = "x"\n"opt/org.example/y" = "/y"\n')
    fw_cfg = VmmConfig.from_file(path).platform.fw_cfg
    assert fw_cfg == FwCfgConfig(files={"opt/org.example/x": str(tmp_path / "x"), "opt/org.example/y": "/y"})
    (tmp_path / "x").write_bytes(b"content")
    whole = FwCfgConfig(files={"opt/org.example/x": tmp_path / "x"})
    plain = VmmConfig(platform=PlatformConfig(fw_cfg=whole)).to_dict()
    assert plain["platform"]["fw_cfg"]["files"] == {"opt/org.example/x": str(tmp_path / "x")}
    for content in (b"content", bytearray(b"content")):
        files: dict[str, Any] = {"opt/org.example/x": content}
        with pytest.raises(
            ConfigError, match=r"^platform\.fw_cfg\.files\.opt/org\.example/x: byte\w+ cannot be written"
        ):
            VmmConfig(platform=PlatformConfig(fw_cfg=FwCfgConfig(files=files))).to_dict()


def test_schema_names_every_key_and_its_range() -> None:
    schema = VmmConfig.json_schema()
    parts = schema["$defs"]
    assert set(parts) >= {"VmmConfig", "MemoryConfig", "CpuConfig", "LinuxBoot", "FlatBoot", "SerialConfig"}
    assert set(parts) >= {"KernelBoot", "BootModule", "FirmwareBoot"}
    assert parts["MemoryConfig"]["properties"]["size_mib"]["maximum"] == 2**23 - 1
    assert parts["FlatBoot"]["properties"]["address"]["maximum"] == 2**64 - 1
    assert parts["SerialConfig"]["properties"]["output"]["type"] == ["string", "integer", "null"]
    assert parts["VmmConfig"]["additionalProperties"] is False


KEYS = st.sampled_from(["memory", "size_mib", "cpu", "hide", "boot", "type", "kernel", "code", "serial", "x", ""])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(KEYS, JSON, max_size=5))
def test_any_dict_is_a_config_or_a_config_error(values: dict[str, Any]) -> None:
    try:
        VmmConfig.from_dict(values)
    except ConfigError as error:
        assert error.at


@given(st.text() | st.binary())
def test_any_text_is_a_config_or_a_config_error(text: str | bytes) -> None:
    for load in (VmmConfig.from_toml, VmmConfig.from_json):
        with contextlib.suppress(ConfigError):
            load(text)


@pytest.mark.parametrize(
    ("struct", "positional"),
    [
        (MemoryConfig, ["size_mib"]),
        (CpuConfig, []),
        (EmbeddedBoot, []),
        (FlatBoot, ["code"]),
        (ElfBoot, ["path"]),
        (LinuxBoot, ["kernel"]),
        (KernelBoot, ["kernel"]),
        (BootModule, ["path"]),
        (FirmwareBoot, ["path"]),
        (SerialConfig, []),
        (VmmConfig, []),
    ],
)
def test_fields_are_keywords_except_what_a_part_is_about(struct: type[msgspec.Struct], positional: list[str]) -> None:
    parameters = inspect.signature(struct).parameters.values()
    assert [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY] == positional
    with pytest.raises(TypeError, match=rf"^{struct.__name__} takes "):
        struct(*[b""] * (len(positional) + 1))


@pytest.mark.parametrize(
    ("struct", "arguments", "options", "message"),
    [
        (MemoryConfig, (1, 2), {}, "MemoryConfig takes its options by keyword, except size_mib, but got 2 without"),
        (CpuConfig, (2,), {}, "CpuConfig takes its options by keyword, but got 1 without"),
        (CpuConfig, (2,), {"vcpus": 2}, "CpuConfig takes its options by keyword, but got 1 without"),
        (CpuConfig, (), {"vcpu": 2}, "CpuConfig does not take vcpu; did you mean vcpus?"),
        (VmmConfig, (), {"vcpus": 2}, "VmmConfig does not take vcpus, which is an option of CpuConfig"),
        (VmmConfig, (), {"nonsense": 2}, "VmmConfig does not take nonsense"),
        (LinuxBoot, (), {}, "LinuxBoot needs kernel"),
        (ElfBoot, (), {"stack_kib": 4}, "ElfBoot needs path"),
        (FlatBoot, (), {"paht": "b"}, "FlatBoot does not take paht; did you mean path?"),
        (EmbeddedBoot, (), {"path": "a"}, "EmbeddedBoot takes no options"),
    ],
)
def test_a_refused_argument_is_explained_by_the_options(
    struct: Any, arguments: tuple[Any, ...], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(TypeError) as raised:
        struct(*arguments, **options)
    listed = f" (options: {', '.join(inspect.signature(struct).parameters)})"
    assert str(raised.value) == message + (listed if struct is not EmbeddedBoot else "")


@pytest.mark.parametrize("config", [VmmConfig(cpu=CpuConfig(vcpus=2)), LinuxBoot("a", cmdline="b"), MemoryConfig(3)])
def test_configurations_are_copied_compared_and_pickled(config: msgspec.Struct) -> None:
    assert config == copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == msgspec.structs.replace(config)
    assert hash(config) == hash(copy.copy(config))


# One changed value of each class.
CHANGES: list[tuple[Any, dict[str, Any]]] = [
    (WHOLE, {"exit_port": 0x80}),
    (MemoryConfig(3), {"size_mib": 4}),
    (WHOLE.cpu, {"hide": ["avx"]}),
    (EmbeddedBoot(), {}),
    (FLAT.boot, {"code": b"\xf4\xf4"}),
    (ElfBoot("a", stack_kib=8), {"path": "b"}),
    (WHOLE.boot, {"cmdline": "loud"}),
    (KERNEL.boot, {"modules": ("/m",)}),
    (BootModule("a"), {"cmdline": "b"}),
    (FIRMWARE.boot, {"path": "/other.bin"}),
    (WHOLE.serial, {"output": print}),
]


@pytest.mark.parametrize(("config", "changes"), CHANGES, ids=lambda value: type(value).__name__)
def test_a_copy_has_the_changes_and_everything_else(config: Any, changes: dict[str, Any]) -> None:
    for replace in (config.replace, config.__replace__):
        changed = replace(**changes)
        assert type(changed) is type(config)
        values = {name: getattr(changed, name) for name in config.__struct_fields__}
        assert values == {name: getattr(config, name) for name in config.__struct_fields__} | changes
    if hasattr(copy, "replace"):  # Python 3.13
        assert copy.replace(config, **changes) == changed


def test_a_part_of_a_part_is_replaced() -> None:
    changed = WHOLE.replace(cpu=WHOLE.cpu.replace(vcpus=3))
    assert (changed.cpu.vcpus, WHOLE.cpu.vcpus) == (3, 2)
    assert changed.replace(cpu=WHOLE.cpu) == WHOLE


def test_a_copy_refuses_what_the_class_refuses() -> None:
    with pytest.raises(TypeError, match=r"^CpuConfig does not take vcpu; did you mean vcpus\? \(options: "):
        CpuConfig().replace(vcpu=2)
    with pytest.raises(TypeError, match=r"^VmmConfig does not take vcpus, which is an option of CpuConfig"):
        VmmConfig().replace(vcpus=2)
    with pytest.raises(TypeError):
        VmmConfig().replace(3)  # type: ignore[call-arg]


def test_check_names_what_a_machine_would_name(tmp_path: Path) -> None:
    whole = VmmConfig(boot=FlatBoot(b"\xf4"), cpu=CpuConfig(hide=["avx2"]))
    whole.check()
    for wrong, message in [
        (whole.replace(memory=MemoryConfig(0)), "memory.size_mib: 0 is not from 1"),
        (whole.replace(memory=64), "memory: expected a MemoryConfig, not 64"),
        (whole.replace(cpu=whole.cpu.replace(hide=["nonsense"])), "cpu.hide: 'nonsense' is not a known CPUID feature"),
        (whole.replace(exit_port=0x70), "exit_port: 0x70 overlaps RTC"),
        (whole.replace(boot=LinuxBoot(tmp_path / "none")), f"boot.kernel: {tmp_path / 'none'}: No such file"),
        (whole.replace(boot=FlatBoot(bytes(4096), address=(128 << 20) - 1)), "boot"),
        (whole.replace(serial=SerialConfig(input=tmp_path / "none")), "serial.input: "),
        (whole.replace(serial=SerialConfig(output=tmp_path)), f"serial.output: {tmp_path}: Is a directory"),
        (whole.replace(serial=SerialConfig(output=tmp_path / "a/b")), "serial.output: "),
    ]:
        with pytest.raises((ConfigError, BootError, StreamError)) as raised:
            wrong.check()
        assert str(raised.value).startswith(message), message


def test_check_writes_no_file(tmp_path: Path) -> None:
    output = tmp_path / "console"
    config = VmmConfig(serial=SerialConfig(output=output))
    config.check()
    assert not output.exists()
    output.write_text("kept")
    config.check()
    assert output.read_text() == "kept"
