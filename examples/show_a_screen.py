"""Wait for what a guest draws on its VGA text screen; its text, cursor and colours."""

from pyvmm import FlatBoot, PlatformConfig, Vmm, VmmConfig

# Real mode: draw a text at the top left in yellow on blue, put the cursor behind it by the
# registers of the CRTC, and spin.
TEXT = b"Testing \xdb\xdb\xdb\xb0\xb0 60%"
DRAW = bytes.fromhex("b800b8 8ec0 31ff be2010") + b"\xb9" + len(TEXT).to_bytes(2, "little")
# mov ax, 0xb800; mov es, ax; xor di, di; mov si, 0x1020; mov cx, length; mov ah, 0x1e;
# next: lodsb; stosw; loop next; mov dx, 0x3d4; mov ax, 0x100f; out dx, ax; jmp $
DRAW += bytes.fromhex("b41e ac ab e2fc bad403 b80f10 ef ebfe")
GUEST = DRAW.ljust(0x20, b"\x90") + TEXT

config = VmmConfig(boot=FlatBoot(GUEST), platform=PlatformConfig(screen=True))
with Vmm(config) as vmm:
    found = vmm.screen.run_until("60%", timeout=60)
    print(found.before + found.matched)  # Testing ███░░ 60%
    print(vmm.screen.cursor, hex(vmm.screen.attributes[0][0]))  # (0, 16) 0x1e
