"""The classic smallest VMM: direct use of KVM, a few bytes of real-mode code, and no devices."""

from pyvmm import KvmVm, VcpuExit

CODE = bytes.fromhex("baf803 00d8 0430 ee b00a ee f4")  # dx = 0x3f8; al += bl; al += '0'; out; al = '\n'; out; hlt

with KvmVm() as vm:
    vm.memory.add(0x1000, 0x1000)
    vm.memory.write(0x1000, CODE)
    vcpu = vm.create_vcpu()
    vcpu.sregs.cs.update(base=0, selector=0)
    vcpu.regs.update(rip=0x1000, rax=2, rbx=2, rflags=2)
    while True:
        match vcpu.run_once():
            case VcpuExit.IoOut(0x3F8, _, data):
                print(data.decode(), end="")  # 4
            case VcpuExit.Hlt():
                break
            case exit:
                raise SystemExit(f"what is {exit}?")
