/* A multiboot kernel: reads a sensor at ports 0x300 and 0x304 once for each line of its module, and
 * prints the values on the serial port. Build it with:
 *   cc -m32 -O1 -ffreestanding -nostdlib -static -no-pie -fno-pie -Wl,--build-id=none,-Ttext=0x100000 \
 *     kernel.c -o kernel */
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;

enum { MAGIC = 0x2badb002, COM1 = 0x3f8, EXIT = 0xf4, SELECT = 0x300, VALUE = 0x304 };

/* The header: magic number, flags (modules on pages, memory information), checksum. */
__attribute__((section(".text.header"), aligned(4))) const u32 header[] = {
	0x1badb002, 3, -(0x1badb002u + 3),
};

struct module {
	u32 start, end, line, reserved;
};

struct information {
	u32 flags, mem_lower, mem_upper, boot_device, cmdline, mods_count;
	struct module *mods;
};

static void out8(u16 port, u8 value)
{
	__asm__ volatile("outb %0, %1" :: "a"(value), "d"(port));
}

static void out32(u16 port, u32 value)
{
	__asm__ volatile("outl %0, %1" :: "a"(value), "d"(port));
}

static u32 in32(u16 port)
{
	u32 value;
	__asm__ volatile("inl %1, %0" : "=a"(value) : "d"(port));
	return value;
}

static void put(const char *text)
{
	while (*text)
		out8(COM1, *text++);
}

static void put_number(u32 value)
{
	char text[11], *at = text + sizeof(text);
	*--at = 0;
	do
		*--at = '0' + value % 10;
	while (value /= 10);
	put(at);
}

static u8 stack[16384] __attribute__((aligned(16), used));

__attribute__((used)) void run(u32 magic, struct information *info)
{
	if (magic != MAGIC || info->mods_count != 1)
		out32(EXIT, 1);
	put((char *)info->cmdline);
	u32 line = 0;
	for (u8 *at = (u8 *)info->mods->start; at < (u8 *)info->mods->end; at++) {
		if (*at != '\n') {
			out8(COM1, *at);
			continue;
		}
		out32(SELECT, line++);
		put(": ");
		put_number(in32(VALUE));
		put("\n");
	}
	out32(EXIT, 0);
}

__attribute__((naked)) void _start(void)
{
	__asm__("mov $stack + 16384, %esp\n push %ebx\n push %eax\n call run\n 1: hlt\n jmp 1b");
}
