"""A CPU template in a file: what its guests see, as they would on every host."""

from pathlib import Path

from pyvmm import CpuConfig, FlatBoot, Vmm, VmmConfig, cpuid_features, cpuid_table

FILE = Path(__file__).with_suffix(".toml")


def features(cpu: CpuConfig) -> set[str]:
    """The names of all features in a guest's CPUID."""
    return {name for entry in cpuid_table(cpu) for names in cpuid_features(entry).values() for name in names}


seen = features(CpuConfig(template=FILE))
print("popcnt" in seen, "aes" in seen)  # True True
print("avx2" in seen, "mce" in seen)  # False False
print("constant_tsc" in seen)  # True

# A machine has it for each of its processors.
with Vmm(VmmConfig(cpu=CpuConfig(template=FILE, vcpus=2), boot=FlatBoot(b"\xb0\x2a\xe6\xf4"))) as vmm:
    print(vmm.run().code)  # 42
