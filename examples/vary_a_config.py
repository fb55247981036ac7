"""Vary a configuration: a base from TOML, copies with other values, and the error of a wrong one."""

from pyvmm import ConfigError, FlatBoot, Vmm, VmmConfig

BASE = """
[memory]
size_mib = 16

[cpu]
hide = ["avx2"]
"""

# lock inc byte [0x3000]; mov al, [0x2000]; wait: cmp [0x3000], al; jb wait; out 0xf4, al
COUNT_VCPUS = bytes.fromhex("f0fe042500300000 8a042500200000 38042500300000 72f7 e6f4")


def count(config: VmmConfig) -> int | None:
    with Vmm(config) as vmm:
        vmm.memory.write_u8(0x2000, config.cpu.vcpus)
        return vmm.run(timeout=60).code


base = VmmConfig.from_toml(BASE).replace(boot=FlatBoot(COUNT_VCPUS, mode="long64"))
dual = base.replace(cpu=base.cpu.replace(vcpus=2))  # everything else stays

print(count(base), count(dual))  # 1 2
print(dual.memory.size_mib, dual.cpu.hide)  # 16 ('avx2',)

try:
    base.replace(cpu=base.cpu.replace(vcpus=0)).check()
except ConfigError as error:
    print(error)  # cpu.vcpus: 0 is not from 1 to 4096
