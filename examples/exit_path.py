"""The exit path in detail: a KvmVm kicks its exit handler, and the handler stops the loop."""

from pyvmm import EventManager, FlatBoot, KvmVm, VmmConfig, WrappedExitHandler

code = b"\xb0\x07\xe6\xf4"  # mov al, 7; out 0xf4, al

handler = WrappedExitHandler()
manager = EventManager()
manager.add_subscriber(handler)

with KvmVm(VmmConfig(boot=FlatBoot(code)), handler.clone()) as vm:
    vm.run()  # starts the thread vcpu_0, which kicks the handler when the guest ends
    while handler.keep_running():
        manager.run()
    vm.shutdown()
    print(vm.state, vm.exit)  # exiting code 7 (vCPU 0)
