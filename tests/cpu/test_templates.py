"""CPU templates: the named ones, those of a file, and what is refused.

Covers src/py/config_cpu.rs, python/pyvmm/cpu_template.py.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Literal, TypeAlias

import pytest
from guests import HALT, exit_with, flat, host_features
from pyvmm import (
    ConfigError,
    CpuConfig,
    CpuTemplate,
    KvmUnavailableError,
    RegisterBits,
    Vmm,
    VmmConfig,
    cpu_features,
    cpuid_features,
    cpuid_table,
    kvm_info,
)

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from pyvmm.registers import CpuidEntry

pytestmark = pytest.mark.kvm

Level: TypeAlias = Literal["v2", "v3", "v4"]
# System V ABI, AMD64 supplement, table 3.1, by the names in /proc/cpuinfo. Each has those before.
LEVELS: dict[Level, set[str]] = {
    "v2": {"cx16", "lahf_lm", "popcnt", "pni", "sse4_1", "sse4_2", "ssse3"},
    "v3": {"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"},
    "v4": {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"},
}


def names(table: Iterable[CpuidEntry]) -> set[str]:
    return {name for entry in table for of_register in cpuid_features(entry).values() for name in of_register}


def promised(level: Level) -> set[str]:
    return {name for other, features in LEVELS.items() if other <= level for name in features}


def missing(level: Level) -> set[str]:
    """What the host lacks. A KVM in software runs ring 3 on the processor and lists little of it."""
    offered = names(cpuid_table())
    if kvm_info()["software_kvm"]:
        offered |= host_features()
    return promised(level) - offered


@pytest.mark.parametrize("level", LEVELS)
def test_level_has_its_features_or_says_which_this_host_lacks(level: Level) -> None:
    if lacking := missing(level):
        with pytest.raises(ConfigError) as caught:
            Vmm(flat(HALT, cpu=CpuConfig(template=level)))
        assert caught.value.at == "cpu.template"
        detail = str(caught.value).partition(f"does not offer {level}: ")[2].partition(";")[0]
        assert set(detail.split(", ")) == lacking
    cpu = CpuConfig(vcpus=2, template=level, expose=tuple(lacking))
    with Vmm(flat(exit_with(3), "user64", cpu=cpu)) as vmm:
        assert vmm.run(60).code == 3
        for vcpu in vmm.vcpus:
            # A KVM in software shows the processor's features also if the table lacks them.
            more = host_features() if kvm_info()["software_kvm"] else set()
            assert promised(level) <= names(vcpu.cpuid) & promised("v4") <= promised(level) | more
    assert names(cpuid_table(cpu)) & promised("v4") == promised(level)


@pytest.mark.parametrize("level", LEVELS)
def test_level_hides_what_is_not_of_every_host(level: Level) -> None:
    """Also KVM's own features, which depend on the host's kernel."""
    table = cpuid_table(CpuConfig(template=level, expose=tuple(missing(level))))
    others = {"kvm_pv_ipi", "kvm_asyncpf", "kvm_pv_unhalt", "arch_capabilities", "constant_tsc", "umip", "svm", "vmx"}
    assert not names(table) & others
    last = {entry.function: entry.eax for entry in table if entry.function in (0, 0x8000_0000)}
    assert last[0] == (0xB if level == "v2" else 0xD)
    assert last[0x8000_0000] <= 0x8000_001E


def test_what_is_hidden_need_not_be_there() -> None:
    lacking = missing("v2")
    hidden = {"popcnt", *lacking}
    table = cpuid_table(CpuConfig(template="v2", hide=tuple(hidden)))
    assert not names(table) & hidden
    template = CpuTemplate(base="v2", hide=tuple(lacking))
    assert not names(cpuid_table(CpuConfig(template=template))) & lacking


def test_configuration_is_applied_after_its_template() -> None:
    template = CpuTemplate(base="host", hide=["cx16"], expose=["rdrand"])
    found = names(cpuid_table(CpuConfig(template=template, hide=["rdrand"], expose=["cx16"])))
    assert ("cx16" in found, "rdrand" in found) == (True, False)
    found = names(cpuid_table(CpuConfig(template=template)))
    assert ("cx16" in found, "rdrand" in found) == (False, True)


FILE = """
base = "host"
hide = ["cx16"]
expose = ["rdrand"]

[[bits]]
leaf = 0x40000010
register = "eax"
set = 0x2b

[[bits]]
leaf = 0x40000010
register = "eax"
clear = 1
"""
# mov eax, 0x40000010; cpuid; out 0xf4, al
READS_THE_LEAF = bytes.fromhex("b810000040 0fa2 e6f4")


def test_file_is_named_relative_to_the_configuration_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cpus"
    folder.mkdir()
    (folder / "mine.toml").write_text(FILE)
    same = CpuTemplate.from_file(folder / "mine.toml")
    (folder / "mine.json").write_text(
        json.dumps({"base": same.base, "hide": same.hide, "expose": same.expose, "bits": [
            {"leaf": bits.leaf, "register": bits.register, "set": bits.set, "clear": bits.clear} for bits in same.bits
        ]})
    )  # fmt: skip
    assert CpuTemplate.from_file(str(folder / "mine.json")) == same
    (tmp_path / "machine.toml").write_text(
        'cpu = {template = "cpus/mine.toml", vcpus = 2}\n'
        '[boot]\ntype = "flat"\nmode = "long64"\ncode = "uBAAAEAPoub0"\n'
    )
    monkeypatch.chdir("/")
    config = VmmConfig.from_file(tmp_path / "machine.toml")
    assert config.cpu.template == str(folder / "mine.toml")
    config.check()
    with Vmm(config) as vmm:
        assert vmm.run(60).code == 0x2A
        found = [names(vcpu.cpuid) for vcpu in vmm.vcpus]
        assert all("rdrand" in each and "cx16" not in each for each in found)
        with vmm.snapshot().fork() as fork:
            assert [vcpu.cpuid for vcpu in fork.vcpus] == [vcpu.cpuid for vcpu in vmm.vcpus]


def test_template_in_the_configuration_itself_is_as_one_in_a_file() -> None:
    bits = (RegisterBits(leaf=0x4000_0010, register="eax", set=0x2A),)
    config = flat(READS_THE_LEAF, "long64", cpu=CpuConfig(template=CpuTemplate(base="host", bits=bits)))
    assert VmmConfig.from_dict(json.loads(json.dumps(config.to_dict(), default=lambda code: ""))).cpu == config.cpu
    with Vmm(config) as vmm:
        assert vmm.run(60).code == 0x2A


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('base = "v1"', "base: Invalid enum value 'v1'"),
        ('bse = "v2"', "unknown field `bse`"),
        ('hide = ["nonsense"]', "hide: 'nonsense' is not a known CPUID feature"),
        ("expose = 3", "expose: Expected `array`, got `int`"),
        ('[[bits]]\nleaf = 1\nregister = "rax"', "bits[0].register: Invalid enum value 'rax'"),
        ('[[bits]]\nleaf = 4294967296\nregister = "eax"', "bits[0].leaf: Expected `int` <= 4294967295"),
        ('[[bits]]\nregister = "eax"', "bits[0]: Object missing required field `leaf`"),
        ("base = ", "mine.toml: "),
        ('base = "\xff', "mine.toml: "),
        ("hide = " + "[" * 100_000, "mine.toml: "),
    ],
)
def test_error_of_a_file_names_it_and_its_key(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(text.encode("latin-1"))
    for use in (lambda: CpuTemplate.from_file(path), lambda: Vmm(flat(HALT, cpu=CpuConfig(template=path)))):
        with pytest.raises(ConfigError) as caught:
            use()
        assert str(caught.value).startswith(f"cpu.template: {path}: ")
        assert message in str(caught.value)
        assert caught.value.at == "cpu.template"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/nowhere/mine.toml", "cpu.template: /nowhere/mine.toml: No such file or directory"),
        ("a\0b.toml", "cpu.template: a\0b.toml: embedded null byte"),
        ("intel", "cpu.template: 'intel' is not one of auto, host, software-kvm, v2, v3, v4, or a .toml"),
        ("", "cpu.template: '' is not one of"),
    ],
)
def test_template_that_cannot_be_found_is_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Vmm(flat(HALT, cpu=CpuConfig(template=name)))
    assert str(caught.value).startswith(message)


def test_object_is_checked_like_a_file() -> None:
    wrong = [
        (CpuTemplate(hide=["nonsense"]), "cpu.template.hide: 'nonsense' is not a known CPUID feature"),
        (CpuTemplate(hide=["avx"], expose=["avx"]), "cpu.template.expose: 'avx' is also in cpu.template.hide"),
        (CpuTemplate(base="v7"), "cpu.template.base: 'v7' is not one of auto, host"),  # type: ignore[arg-type]
        (CpuTemplate(bits=[3]), "cpu.template.bits: expected a RegisterBits, not 3"),  # type: ignore[list-item]
        (
            CpuTemplate(bits=[RegisterBits(leaf=1, register="eax", clear=3, set=1)]),
            "cpu.template.bits: leaf 0x1: 0x1 is both cleared and set",
        ),
        (
            CpuTemplate(bits=[RegisterBits(leaf=1 << 32, register="eax")]),
            "cpu.template.bits.leaf: expected a number of 32 bits, not 4294967296",
        ),
        (
            CpuTemplate(bits=[RegisterBits(leaf=1, register="rax")]),  # type: ignore[arg-type]
            "cpu.template.bits.register: 'rax' is not one of eax, ebx, ecx, edx",
        ),
    ]
    for template, message in wrong:
        with pytest.raises(ConfigError) as caught:
            Vmm(flat(HALT, cpu=CpuConfig(template=template)))
        assert str(caught.value).startswith(message)


@pytest.mark.parametrize("template", ["auto", "host", "software-kvm"])
def test_amx_is_offered_only_by_name(template: Literal["auto", "host", "software-kvm"]) -> None:
    table = cpuid_table(CpuConfig(template=template))
    assert not {name for name in names(table) if name.startswith("amx_")}
    xcr0 = [entry.eax for entry in table if (entry.function, entry.index) == (0xD, 0)]
    assert not any(parts >> 17 & 3 for parts in xcr0)


@pytest.mark.parametrize("place", ["cpu.expose", "cpu.template.expose"])
def test_amx_that_the_host_lacks_is_refused_with_the_reason(place: str) -> None:
    if "amx_tile" in host_features():
        pytest.skip("the processor has AMX")
    assert {"amx_tile", "xfd"} <= set(cpu_features())
    amx = ("amx_tile", "amx_int8")
    cpu = CpuConfig(expose=amx) if place == "cpu.expose" else CpuConfig(template=CpuTemplate(expose=amx))
    with pytest.raises(KvmUnavailableError, match="AMX") as caught:
        Vmm(flat(HALT, cpu=cpu))
    assert caught.value.at == place
    with Vmm(flat(exit_with(1), cpu=CpuConfig(template=CpuTemplate(expose=amx), hide=amx))) as vmm:
        assert vmm.run(60).code == 1


def test_hypercalls_that_are_hidden_are_hidden_from_every_vcpu() -> None:
    for template in ("software-kvm", CpuTemplate(base="host", hide=["kvm_pv_ipi", "kvm_pv_unhalt"])):
        with Vmm(flat(HALT, cpu=CpuConfig(vcpus=3, template=template))) as vmm:
            for vcpu in vmm.vcpus:
                assert not names(vcpu.cpuid) & {"kvm_pv_ipi", "kvm_pv_unhalt"}


def test_table_is_that_of_a_machine_s_first_vcpu() -> None:
    cpu = CpuConfig(vcpus=4, threads=2, hide=("cx16",))
    with Vmm(flat(HALT, cpu=cpu)) as vmm:
        seen = vmm.vcpus[0].cpuid
    told = {(entry.function, entry.index): entry for entry in cpuid_table(cpu)}
    of_topology = [entry for entry in seen if entry.function in (0xB, 0x8000_001E)]
    assert of_topology
    assert [told[entry.function, entry.index] for entry in of_topology] == of_topology
    for wrong in (3, VmmConfig()):
        with pytest.raises(ConfigError, match="cpu: expected a CpuConfig"):
            cpuid_table(wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"cpu.vcpus: 0 is not from 1"):
        cpuid_table(CpuConfig(vcpus=0))
    with pytest.raises(TypeError, match="expected a CpuidEntry"):
        cpuid_features(3)  # type: ignore[arg-type]
