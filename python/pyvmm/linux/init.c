/* The /init of the small Linux: a freestanding 32-bit program. It says that userspace is reached, then does what the
 * kernel command line asks for: "pyvmm.shell" a shell of a few commands, "pyvmm.echo" one line that it answers, otherwise
 * nothing; then it reboots. System calls go through the vDSO (AT_SYSINFO): on a KVM that emulates ring 0 neither SYSCALL
 * nor INT 0x80 works from user programs. */

enum {
	SYS_EXIT = 1, SYS_READ = 3, SYS_WRITE = 4, SYS_OPEN = 5, SYS_CLOSE = 6, SYS_MOUNT = 21, SYS_REBOOT = 88,
	SYS_IOPERM = 101, SYS_GETDENTS64 = 220
};
enum { AT_NULL = 0, AT_SYSINFO = 32 };
enum { EXIT_PORT = 0xf4, O_WRONLY = 1, O_DIRECTORY = 0200000, NAME_OF_DIRENT64 = 19 };

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

static long open(const char *path, long flags)
{
	return syscall5(SYS_OPEN, (long)path, flags, 0, 0, 0);
}

static long read(long fd, char *buffer, unsigned size)
{
	return syscall5(SYS_READ, fd, (long)buffer, size, 0, 0);
}

static unsigned read_file(const char *path, char *buffer, unsigned size)
{
	long fd = open(path, 0);
	unsigned total = 0;
	if (fd < 0)
		return 0;
	while (total < size - 1) {
		long n = read(fd, buffer + total, size - 1 - total);
		if (n <= 0)
			break;
		total += n;
	}
	syscall5(SYS_CLOSE, fd, 0, 0, 0, 0);
	buffer[total] = 0;
	return total;
}

static unsigned starts_with(const char *text, const char *word)
{
	unsigned i = 0;
	while (word[i] && text[i] == word[i])
		i++;
	return word[i] == 0;
}

static unsigned count(const char *text, const char *word)
{
	unsigned found = 0;
	for (; *text; text++)
		found += starts_with(text, word);
	return found;
}

static char buffer[8192];

enum { RESTART = 0x01234567, HALT = (int)0xcdef0123, POWER_OFF = 0x4321fedc };

static void reboot(int how)
{
	syscall5(SYS_REBOOT, 0xfee1dead, 672274793, how, 0, 0);
}

/* Ends the run of the machine with a code. */
static void exit_with(const char *digits)
{
	unsigned char code = 0;
	while (*digits >= '0' && *digits <= '9')
		code = code * 10 + (*digits++ - '0');
	if (syscall5(SYS_IOPERM, EXIT_PORT, 1, 1, 0, 0) < 0)
		print("exit: the kernel gives no access to the port\n");
	else
		__asm__ volatile("outb %0, %1" : : "a"(code), "Nd"((unsigned short)EXIT_PORT));
}

static void cat(const char *path)
{
	long n, fd = open(path, 0);
	if (fd < 0) {
		print("cat: no such file\n");
		return;
	}
	while ((n = read(fd, buffer, sizeof(buffer))) > 0)
		syscall5(SYS_WRITE, 1, (long)buffer, n, 0, 0);
	syscall5(SYS_CLOSE, fd, 0, 0, 0, 0);
}

/* Write the text up to the last space to the file after it. */
static void write(char *text)
{
	unsigned at = length(text);
	long fd;
	while (at > 0 && text[at] != ' ')
		at--;
	fd = open(text + at + 1, O_WRONLY);
	if (fd < 0 || syscall5(SYS_WRITE, fd, (long)text, at, 0, 0) < 0)
		print("write: the file cannot be written\n");
	syscall5(SYS_CLOSE, fd, 0, 0, 0, 0);
}

static void ls(const char *path)
{
	long n, at, fd = open(*path ? path : "/", O_DIRECTORY);
	if (fd < 0) {
		print("ls: no such directory\n");
		return;
	}
	while ((n = syscall5(SYS_GETDENTS64, fd, (long)buffer, sizeof(buffer), 0, 0)) > 0)
		for (at = 0; at < n; at += *(unsigned short *)(buffer + at + 16)) {
			print(buffer + at + NAME_OF_DIRENT64);
			print("\n");
		}
	syscall5(SYS_CLOSE, fd, 0, 0, 0, 0);
}

static void shell(void)
{
	static char line[256];
	for (;;) {
		long n;
		print("pyvmm> ");
		n = read(0, line, sizeof(line) - 1);
		if (n <= 0)
			return;
		line[n - (line[n - 1] == '\n')] = 0;
		if (starts_with(line, "echo ")) {
			print(line + 5);
			print("\n");
		} else if (starts_with(line, "cat ")) {
			cat(line + 4);
		} else if (starts_with(line, "ls")) {
			ls(line + 2 + (line[2] == ' '));
		} else if (starts_with(line, "write ")) {
			write(line + 6);
		} else if (starts_with(line, "exit")) {
			exit_with(line + 4 + (line[4] == ' '));
		} else if (starts_with(line, "panic")) {
			syscall5(SYS_EXIT, 1, 0, 0, 0, 0);
		} else if (starts_with(line, "reboot")) {
			return;
		} else if (starts_with(line, "poweroff")) {
			reboot(POWER_OFF);
		} else if (starts_with(line, "halt")) {
			reboot(HALT);
		} else if (line[0]) {
			print("commands: echo TEXT, cat FILE, ls FOLDER, write TEXT FILE, exit CODE, panic, reboot, poweroff, halt\n");
		}
	}
}

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
	if (count(buffer, "pyvmm.shell")) {
		syscall5(SYS_MOUNT, (long)"sys", (long)"/sys", (long)"sysfs", 0, 0);
		shell();
	} else if (count(buffer, "pyvmm.echo")) {
		long n;
		print("pyvmm: type a line\n");
		n = read(0, buffer, sizeof(buffer) - 1);
		buffer[n > 0 ? n : 0] = 0;
		print("pyvmm: you typed ");
		print(buffer);
	}
	reboot(RESTART);
	for (;;)
		;
}

__asm__(".globl _start\n_start:\n\tmov %esp, %eax\n\tpush %eax\n\tcall init\n");
