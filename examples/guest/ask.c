/* Asks the host for a name and greets it, by two hostcalls, in 64-bit ring 3. Build it with:
 *   cc -O1 -nostdlib -ffreestanding -static -fno-pie -no-pie -Wl,--build-id=none,-Ttext=0x100000,-N ask.c -o ask.elf
 *   objcopy -O binary ask.elf ask.bin */
#include "hostcall.h"

enum { ASK = 1, SAY = 2 };

static uint32_t length(const char *text)
{
	uint32_t n = 0;
	while (text[n])
		n++;
	return n;
}

__attribute__((section(".text.start"), noreturn)) void _start(void)
{
	const char *prompt = "Who are you?";
	char name[32];
	struct pyvmm_call ask = {
		.number = ASK,
		.count = 2,
		.arguments = { pyvmm_bytes(prompt, length(prompt)), pyvmm_buffer(name, sizeof(name)) },
	};
	uint8_t code = pyvmm_hostcall(&ask);
	if (code == PYVMM_OK) {
		struct pyvmm_call say = { .number = SAY, .count = 1, .arguments = { pyvmm_bytes(name, ask.result) } };
		code = pyvmm_hostcall(&say);
	}
	for (;;)
		__asm__ volatile("outb %0, $0xf4" : : "a"(code));
}
