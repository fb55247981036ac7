"""Boot Linux with a directory as its initial RAM disk: initrd_directory.py KERNEL DIRECTORY [COMMAND LINE]."""

import sys

from pyvmm import LinuxBoot, SerialConfig, Vmm, VmmConfig

kernel, directory, *cmdline = sys.argv[1:]
# The directory becomes /, with the owners, modes and links that its files have. The kernel starts
# its /init.
boot = LinuxBoot(kernel, initrd=directory, cmdline=" ".join(cmdline) or "console=ttyS0 panic=-1 reboot=k")
with Vmm(VmmConfig(boot=boot, serial=SerialConfig(output=1))) as vmm:
    print(vmm.run())
