"""Boot a Linux kernel on this terminal: boot_linux.py KERNEL INITRD [COMMAND LINE]."""

import sys

from pyvmm import LinuxBoot, SerialConfig, Vmm, VmmConfig

kernel, initrd, *cmdline = sys.argv[1:]
boot = LinuxBoot(kernel, initrd=initrd, cmdline=" ".join(cmdline) or "console=ttyS0 panic=-1 reboot=k")
with Vmm(VmmConfig(boot=boot, serial=SerialConfig(output=1))) as vmm:
    print(vmm.run())
