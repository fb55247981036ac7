/* The /init of the test Linux: a freestanding 32-bit program that says it is there, answers a line if the
 * kernel command line has "pyvmm.echo", and reboots. System calls go through the vDSO (AT_SYSINFO): on a
 * KVM that emulates ring 0 neither SYSCALL nor INT 0x80 works from user programs. */

enum { SYS_READ = 3, SYS_WRITE = 4, SYS_OPEN = 5, SYS_CLOSE = 6, SYS_MOUNT = 21, SYS_REBOOT = 88 };
enum { AT_NULL = 0, AT_SYSINFO = 32 };

static unsigned long vdso_entry;

static long syscall5(long number, long a, long b, long c, long d, long e)
{
	long result;
	__asm__ volatile("call *%[entry]"
			 : "=a"(result)
			 : "a"(number), "b"(a), "c"(b), "d"(c), "S"(d), "D"(e), [entry] "m"(vdso_entry)
			 : "memory");
	return result;
}

static unsigned length(const char *text)
{
	unsigned n = 0;
	while (text[n])
		n++;
	return n;
}

static void print(const char *text)
{
	syscall5(SYS_WRITE, 1, (long)text, length(text), 0, 0);
}

static unsigned read_file(const char *path, char *buffer, unsigned size)
{
	long fd = syscall5(SYS_OPEN, (long)path, 0, 0, 0, 0);
	unsigned total = 0;
	if (fd < 0)
		return 0;
	while (total < size - 1) {
		long n = syscall5(SYS_READ, fd, (long)(buffer + total), size - 1 - total, 0, 0);
		if (n <= 0)
			break;
		total += n;
	}
	syscall5(SYS_CLOSE, fd, 0, 0, 0, 0);
	buffer[total] = 0;
	return total;
}

static unsigned count(const char *text, const char *word)
{
	unsigned found = 0, n = length(word);
	for (; *text; text++) {
		unsigned i = 0;
		while (i < n && text[i] == word[i])
			i++;
		found += i == n;
	}
	return found;
}

static char buffer[8192];

__attribute__((used)) static void init(unsigned long *stack)
{
	unsigned long *at = stack + 1 + stack[0] + 1; /* argc, argv, NULL */
	char digit[2] = "0";
	while (*at++) /* envp, NULL */
		;
	for (; at[0] != AT_NULL; at += 2)
		if (at[0] == AT_SYSINFO)
			vdso_entry = at[1];

	syscall5(SYS_MOUNT, (long)"proc", (long)"/proc", (long)"proc", 0, 0);
	read_file("/proc/cpuinfo", buffer, sizeof(buffer));
	digit[0] += count(buffer, "processor\t:");
	print("pyvmm: userspace reached, processors: ");
	print(digit);
	print("\n");

	read_file("/proc/cmdline", buffer, sizeof(buffer));
	if (count(buffer, "pyvmm.echo")) {
		long n;
		print("pyvmm: type a line\n");
		n = syscall5(SYS_READ, 0, (long)buffer, sizeof(buffer) - 1, 0, 0);
		buffer[n > 0 ? n : 0] = 0;
		print("pyvmm: you typed ");
		print(buffer);
	}
	syscall5(SYS_REBOOT, 0xfee1dead, 672274793, 0x01234567, 0, 0);
	for (;;)
		;
}

__asm__(".globl _start\n_start:\n\tmov %esp, %eax\n\tpush %eax\n\tcall init\n");
