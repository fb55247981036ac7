/* The program "agent" of the Linux with virtio. As /init it carries out commands that are typed on the console, without
 * a new process for each, which is slow where ring 0 is emulated; and says "~STATUS~" after each. As a program it
 * carries out the command that its arguments are. It is freestanding: the RAM disk stays small, and no vector registers
 * are used.
 *
 *   mount TYPE SOURCE TARGET OPTIONS    umount TARGET        sync             reboot
 *   put FILE TEXT                       cat FILE             ls FOLDER        remove FILE
 *   write FILE BYTES                    make a file and bring it to the disk
 *   overwrite FILE BYTES                the same for a file or disk that is there, past the cache
 *   sum FILE BYTES                      read a file, at most so much of it; "direct" after it: past the cache
 *   dump FILE BYTES                     read a device once, and print it in hexadecimal
 *   records FILE COUNT                  write records of 4 KiB, each said after it has reached the disk
 *   hold MIB                            touch so much memory, and give it back when a line is typed
 *   mac NAME NUMBER                     give an interface the hardware address 02:00:00:00:00:NUMBER
 *   net NAME IP MASK GATEWAY            configure an interface
 *   ping IP COUNT MILLISECONDS          count the answers that come in time
 *   send ADDRESS BYTES                  connect, or listen, and send bytes
 *   receive ADDRESS BYTES               receive as many
 *   echo ADDRESS                        send back what comes, until the other side ends
 *
 * An ADDRESS is tcp:IP:PORT or vsock:CID:PORT; without IP or CID it listens. Of bytes it prints the CRC-32. */

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long u64;

enum {
	SYS_READ = 0, SYS_WRITE = 1, SYS_OPEN = 2, SYS_CLOSE = 3, SYS_POLL = 7, SYS_MMAP = 9, SYS_MUNMAP = 11, SYS_IOCTL = 16,
	SYS_GETPID = 39, SYS_SOCKET = 41, SYS_CONNECT = 42, SYS_ACCEPT = 43, SYS_SHUTDOWN = 48, SYS_BIND = 49, SYS_LISTEN = 50,
	SYS_SETSOCKOPT = 54, SYS_EXIT = 60, SYS_FSYNC = 74, SYS_FDATASYNC = 75, SYS_MKDIR = 83, SYS_UNLINK = 87, SYS_SYNC = 162,
	SYS_MOUNT = 165, SYS_UMOUNT = 166, SYS_REBOOT = 169, SYS_GETDENTS64 = 217, SYS_CLOCK_GETTIME = 228
};
enum {
	AF_INET = 2, AF_VSOCK = 40, SOCK_STREAM = 1, SOCK_DGRAM = 2, SOCK_RAW = 3, IPPROTO_ICMP = 1, SOL_SOCKET = 1,
	SO_REUSEADDR = 2, SHUT_WR = 1, POLLIN = 1, CLOCK_MONOTONIC = 1,
	O_WRONLY = 1, O_CREAT = 0100, O_TRUNC = 01000, O_DIRECT = 040000, O_DIRECTORY = 0200000,
	PROT_READ_WRITE = 3, MAP_PRIVATE_ANONYMOUS = 0x22,
	SIOCADDRT = 0x890b, SIOCSIFFLAGS = 0x8914, SIOCSIFADDR = 0x8916, SIOCSIFNETMASK = 0x891c, SIOCSIFHWADDR = 0x8924, ARPHRD_ETHER = 1, IFF_UP = 1, IFF_RUNNING = 0x40,
	RTF_UP = 1, RTF_GATEWAY = 2, TCGETS = 0x5401, TCSETS = 0x5402, ECHO = 010
};
enum { CHUNK = 256 << 10, RECORD = 4096, PAGE = 4096, NAME_OF_DIRENT64 = 19, ARGUMENTS = 8 };

static u8 buffer[CHUNK] __attribute__((aligned(4096)));
static u32 crc_table[256];

static long syscall6(long number, long a, long b, long c, long d, long e, long f)
{
	register long r10 __asm__("r10") = d, r8 __asm__("r8") = e, r9 __asm__("r9") = f;
	long result;
	__asm__ volatile("syscall"
			 : "=a"(result)
			 : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
			 : "rcx", "r11", "memory");
	return result;
}

static long syscall3(long number, long a, long b, long c)
{
	return syscall6(number, a, b, c, 0, 0, 0);
}

static u64 length(const char *text)
{
	u64 n = 0;
	while (text[n])
		n++;
	return n;
}

static void print(const char *text)
{
	syscall3(SYS_WRITE, 1, (long)text, length(text));
}

static void print_number(u64 value, u32 base, u32 digits)
{
	char text[24];
	u32 at = sizeof(text);
	text[--at] = 0;
	for (; value || digits; value /= base, digits -= digits > 0)
		text[--at] = "0123456789abcdef"[value % base];
	print(text + at);
}

static void finish(const char *what, u64 bytes, u32 crc)
{
	print(what);
	print_number(bytes, 10, 1);
	print(" bytes, crc ");
	print_number(crc, 16, 8);
	print("\n");
}

/* Where a command that fails goes on. */
static void *failed[5];

/* The value, unless it is an error, which ends the command. */
static long must(long value, const char *what)
{
	if (value >= 0)
		return value;
	print("agent: ");
	print(what);
	print(": error ");
	print_number(-value, 10, 1);
	print("\n");
	__builtin_longjmp(failed, 1);
}

static int same(const char *left, const char *right)
{
	while (*left && *left == *right)
		left++, right++;
	return *left == *right;
}

static u64 number(const char **text)
{
	u64 value = 0;
	while (**text >= '0' && **text <= '9')
		value = value * 10 + (*(*text)++ - '0');
	return value;
}

static u64 argument(const char *text)
{
	return text ? number(&text) : 0;
}

static void make_crc_table(void)
{
	for (u32 n = 0; n < 256; n++) {
		u32 value = n;
		for (u32 bit = 0; bit < 8; bit++)
			value = value >> 1 ^ (value & 1 ? 0xedb88320 : 0);
		crc_table[n] = value;
	}
}

static u32 crc(u32 before, const u8 *bytes, u64 size)
{
	u32 value = ~before;
	for (u64 n = 0; n < size; n++)
		value = value >> 8 ^ crc_table[(value ^ bytes[n]) & 255];
	return ~value;
}

/* Fills bytes with what a generator makes next. */
static void make_bytes(u64 *state, u8 *bytes, u64 size)
{
	for (u64 n = 0; n < size; n++) {
		*state = *state * 6364136223846793005 + 1442695040888963407;
		bytes[n] = *state >> 56;
	}
}

static void write_all(int fd, const u8 *bytes, u64 size)
{
	while (size > 0) {
		long n = must(syscall3(SYS_WRITE, fd, (long)bytes, size), "write");
		bytes += n;
		size -= n;
	}
}

struct address {
	u32 length;
	u8 listens;
	union {
		struct { u16 family, port; u8 ip[4], zero[8]; } inet;
		struct { u16 family, reserved; u32 port, cid, zero; } vsock;
	};
};

/* The parts of tcp:IP:PORT or vsock:CID:PORT, or of tcp::PORT or vsock::PORT. */
static struct address parse(const char *text)
{
	struct address to = {.length = 16};
	int vsock = *text == 'v';
	while (*text && *text++ != ':')
		;
	to.listens = *text == ':';
	if (vsock) {
		to.vsock.family = AF_VSOCK;
		to.vsock.cid = to.listens ? -1u : (u32)number(&text);
		text++;
		to.vsock.port = number(&text);
		return to;
	}
	to.inet.family = AF_INET;
	for (u32 n = 0; !to.listens && n < 4; n++, text++)
		to.inet.ip[n] = number(&text);
	text += to.listens;
	to.inet.port = __builtin_bswap16(number(&text));
	return to;
}

static int open_stream(const char *text)
{
	struct address to = parse(text ? text : "");
	int on = 1, fd = must(syscall3(SYS_SOCKET, to.inet.family, SOCK_STREAM, 0), "socket");
	if (!to.listens) {
		must(syscall3(SYS_CONNECT, fd, (long)&to.inet, to.length), "connect");
		return fd;
	}
	syscall6(SYS_SETSOCKOPT, fd, SOL_SOCKET, SO_REUSEADDR, (long)&on, sizeof(on), 0);
	must(syscall3(SYS_BIND, fd, (long)&to.inet, to.length), "bind");
	must(syscall3(SYS_LISTEN, fd, 1, 0), "listen");
	print("agent: listening\n");
	on = must(syscall3(SYS_ACCEPT, fd, 0, 0), "accept");
	syscall3(SYS_CLOSE, fd, 0, 0);
	return on;
}

/* Waits until the other side has ended its stream. */
static void drain(int fd)
{
	while (syscall3(SYS_READ, fd, (long)buffer, CHUNK) > 0)
		;
	syscall3(SYS_CLOSE, fd, 0, 0);
}

static void send(int fd, u64 bytes)
{
	u64 state = 1, left = bytes;
	u32 sum = 0;
	while (left > 0) {
		u64 size = left < CHUNK ? left : CHUNK;
		make_bytes(&state, buffer, size);
		sum = crc(sum, buffer, size);
		write_all(fd, buffer, size);
		left -= size;
	}
	syscall3(SYS_SHUTDOWN, fd, SHUT_WR, 0);
	drain(fd);
	finish("agent: sent ", bytes, sum);
}

static void receive(int fd, u64 bytes)
{
	u64 left = bytes;
	u32 sum = 0;
	while (left > 0) {
		long n = must(syscall3(SYS_READ, fd, (long)buffer, left < CHUNK ? left : CHUNK), "read");
		if (n == 0)
			break;
		sum = crc(sum, buffer, n);
		left -= n;
	}
	syscall3(SYS_CLOSE, fd, 0, 0);
	finish("agent: received ", bytes - left, sum);
}

static void echo(int fd)
{
	long n;
	u64 bytes = 0;
	u32 sum = 0;
	while ((n = must(syscall3(SYS_READ, fd, (long)buffer, CHUNK), "read")) > 0) {
		sum = crc(sum, buffer, n);
		bytes += n;
		write_all(fd, buffer, n);
	}
	syscall3(SYS_CLOSE, fd, 0, 0);
	finish("agent: echoed ", bytes, sum);
}

static int open_file(const char *path, long flags)
{
	return must(syscall3(SYS_OPEN, (long)path, flags, 0644), path);
}

static void records(const char *path, u64 count)
{
	int fd = open_file(path, O_WRONLY | O_CREAT | O_TRUNC);
	for (u64 record = 1; record <= count; record++) {
		u64 state = record;
		make_bytes(&state, buffer, RECORD);
		write_all(fd, buffer, RECORD);
		must(syscall3(SYS_FDATASYNC, fd, 0, 0), "fdatasync");
		print("agent: record ");
		print_number(record, 10, 1);
		print("\n");
	}
	syscall3(SYS_CLOSE, fd, 0, 0);
}

static void write_file(const char *path, u64 bytes, long flags)
{
	int fd = open_file(path, O_WRONLY | flags);
	u64 state = 1, left = bytes;
	u32 sum = 0;
	while (left > 0) {
		u64 size = left < CHUNK ? left : CHUNK;
		make_bytes(&state, buffer, size);
		sum = crc(sum, buffer, size);
		write_all(fd, buffer, size);
		left -= size;
	}
	must(syscall3(SYS_FSYNC, fd, 0, 0), "fsync");
	syscall3(SYS_CLOSE, fd, 0, 0);
	finish("agent: written ", bytes, sum);
}

static void sum_file(const char *path, u64 most, long flags)
{
	int fd = open_file(path, flags);
	u64 bytes = 0;
	u32 sum = 0;
	while (bytes < most) {
		long n = must(syscall3(SYS_READ, fd, (long)buffer, most - bytes < CHUNK ? most - bytes : CHUNK), "read");
		if (n == 0)
			break;
		sum = crc(sum, buffer, n);
		bytes += n;
	}
	syscall3(SYS_CLOSE, fd, 0, 0);
	finish("agent: read ", bytes, sum);
}

static void dump(const char *path, u64 bytes)
{
	int fd = open_file(path, 0);
	long n = must(syscall3(SYS_READ, fd, (long)buffer, bytes), "read");
	syscall3(SYS_CLOSE, fd, 0, 0);
	for (long at = 0; at < n; at++)
		print_number(buffer[at], 16, 2);
	print("\n");
}

static void cat(const char *path)
{
	int fd = open_file(path, 0);
	long n;
	while ((n = must(syscall3(SYS_READ, fd, (long)buffer, CHUNK), "read")) > 0)
		write_all(1, buffer, n);
	syscall3(SYS_CLOSE, fd, 0, 0);
}

static void put(const char *path, const char *text)
{
	int fd = open_file(path, O_WRONLY | O_CREAT | O_TRUNC);
	write_all(fd, (const u8 *)text, length(text));
	syscall3(SYS_CLOSE, fd, 0, 0);
}

static void list(const char *path)
{
	int fd = open_file(path, O_DIRECTORY);
	long n;
	while ((n = must(syscall3(SYS_GETDENTS64, fd, (long)buffer, CHUNK), "getdents")) > 0)
		for (long at = 0; at < n; at += *(u16 *)(buffer + at + 16)) {
			print((char *)buffer + at + NAME_OF_DIRENT64);
			print("\n");
		}
	syscall3(SYS_CLOSE, fd, 0, 0);
}

static void hold(u64 mib)
{
	u64 size = mib << 20;
	long at = must(syscall6(SYS_MMAP, 0, size, PROT_READ_WRITE, MAP_PRIVATE_ANONYMOUS, -1, 0), "mmap");
	for (u64 page = 0; page < size; page += PAGE)
		*(volatile u64 *)(at + page) = page + 1;
	print("agent: holding\n");
	syscall3(SYS_READ, 0, (long)buffer, CHUNK);
	syscall3(SYS_MUNMAP, at, size, 0);
	print("agent: given back\n");
}

struct inet { u16 family, port; u8 ip[4], zero[8]; };

static struct inet inet(const char *text)
{
	struct inet to = {.family = AF_INET};
	for (u32 n = 0; n < 4; n++, text++)
		to.ip[n] = number(&text);
	return to;
}

struct interface {
	char name[16];
	union { struct inet address; struct { u16 family; u8 mac[6]; } hardware; u16 flags; u8 space[24]; };
};

static struct interface interface(const char *name)
{
	struct interface request = {};
	for (u32 n = 0; n < sizeof(request.name) - 1 && name[n]; n++)
		request.name[n] = name[n];
	return request;
}

static void mac(const char *name, u64 last)
{
	struct interface request = interface(name);
	int fd = must(syscall3(SYS_SOCKET, AF_INET, SOCK_DGRAM, 0), "socket");
	request.hardware.family = ARPHRD_ETHER;
	request.hardware.mac[0] = 2;
	request.hardware.mac[5] = last;
	must(syscall3(SYS_IOCTL, fd, SIOCSIFHWADDR, (long)&request), "hardware address");
	syscall3(SYS_CLOSE, fd, 0, 0);
}

static void net(const char *name, const char *ip, const char *mask, const char *gateway)
{
	struct interface request = interface(name);
	struct { u64 pad; struct inet to, gateway, mask; u16 flags, pad2; u64 pad3[7]; } route = {
		.to = {.family = AF_INET}, .mask = {.family = AF_INET}, .flags = RTF_UP | RTF_GATEWAY
	};
	int fd = must(syscall3(SYS_SOCKET, AF_INET, SOCK_DGRAM, 0), "socket");
	request.address = inet(ip);
	must(syscall3(SYS_IOCTL, fd, SIOCSIFADDR, (long)&request), "address");
	request.address = inet(mask);
	must(syscall3(SYS_IOCTL, fd, SIOCSIFNETMASK, (long)&request), "mask");
	request.flags = IFF_UP | IFF_RUNNING;
	must(syscall3(SYS_IOCTL, fd, SIOCSIFFLAGS, (long)&request), "up");
	if (gateway) {
		route.gateway = inet(gateway);
		must(syscall3(SYS_IOCTL, fd, SIOCADDRT, (long)&route), "gateway");
	}
	syscall3(SYS_CLOSE, fd, 0, 0);
}

static u64 milliseconds(void)
{
	u64 time[2] = {};
	syscall3(SYS_CLOCK_GETTIME, CLOCK_MONOTONIC, (long)time, 0);
	return time[0] * 1000 + time[1] / 1000000;
}

/* Whether an answer to the echo request comes before the deadline. */
static int answered(int fd, u16 sequence, u64 deadline)
{
	for (;;) {
		struct { int fd; u16 wanted, got; } wait = {.fd = fd, .wanted = POLLIN};
		u64 now = milliseconds();
		if (now >= deadline || syscall3(SYS_POLL, (long)&wait, 1, deadline - now) <= 0)
			return 0;
		/* After the IP header of 20 bytes: type 0 of the answer, code, checksum, identifier, sequence. */
		if (syscall3(SYS_READ, fd, (long)buffer, CHUNK) >= 28 && buffer[20] == 0 && *(u16 *)(buffer + 26) == sequence)
			return 1;
	}
}

static void ping(const char *ip, u64 count, u64 patience)
{
	struct inet to = inet(ip);
	int fd = must(syscall3(SYS_SOCKET, AF_INET, SOCK_RAW, IPPROTO_ICMP), "socket");
	u64 answers = 0;
	must(syscall3(SYS_CONNECT, fd, (long)&to, sizeof(to)), "connect");
	for (u16 sequence = 1; sequence <= count; sequence++) {
		u16 request[4] = {8, 0, 0, sequence};
		request[1] = ~(8 + sequence);
		syscall3(SYS_WRITE, fd, (long)request, sizeof(request));
		answers += answered(fd, sequence, milliseconds() + patience);
	}
	syscall3(SYS_CLOSE, fd, 0, 0);
	print("agent: answers ");
	print_number(answers, 10, 1);
	print("\n");
}

static void mount(const char *type, const char *source, const char *target, const char *options)
{
	syscall3(SYS_MKDIR, (long)target, 0755, 0);
	must(syscall6(SYS_MOUNT, (long)source, (long)target, (long)type, 0, (long)options, 0), "mount");
}

static void carry_out(char **words)
{
	const char *what = words[0], *at = words[1];
	u64 amount = argument(words[2]);
	if (same(what, "sync"))
		syscall3(SYS_SYNC, 0, 0, 0);
	else if (same(what, "reboot"))
		syscall6(SYS_REBOOT, 0xfee1dead, 672274793, 0x01234567, 0, 0, 0);
	else if (!at)
		must(-22, "what?");
	else if (same(what, "mount"))
		mount(at, words[2], words[3], words[4]);
	else if (same(what, "umount"))
		must(syscall3(SYS_UMOUNT, (long)at, 0, 0), "umount");
	else if (same(what, "remove"))
		must(syscall3(SYS_UNLINK, (long)at, 0, 0), "remove");
	else if (same(what, "put"))
		put(at, words[2]);
	else if (same(what, "cat"))
		cat(at);
	else if (same(what, "ls"))
		list(at);
	else if (same(what, "write"))
		write_file(at, amount, O_CREAT | O_TRUNC);
	else if (same(what, "overwrite"))
		write_file(at, amount, O_DIRECT);
	else if (same(what, "sum"))
		sum_file(at, amount, words[3] ? O_DIRECT : 0);
	else if (same(what, "dump"))
		dump(at, amount);
	else if (same(what, "records"))
		records(at, amount);
	else if (same(what, "hold"))
		hold(argument(at));
	else if (same(what, "mac"))
		mac(at, amount);
	else if (same(what, "net"))
		net(at, words[2], words[3], words[4]);
	else if (same(what, "ping"))
		ping(at, amount, argument(words[3]));
	else if (same(what, "send"))
		send(open_stream(at), amount);
	else if (same(what, "receive"))
		receive(open_stream(at), amount);
	else if (same(what, "echo"))
		echo(open_stream(at));
	else
		must(-22, "what?");
}

/* Cuts a line into words. */
static void cut(char *line, char **words)
{
	u32 n = 0;
	while (n < ARGUMENTS - 1) {
		while (*line == ' ')
			*line++ = 0;
		if (!*line)
			break;
		words[n++] = line;
		while (*line && *line != ' ')
			line++;
	}
	words[n] = 0;
}

static void __attribute__((noinline)) serve(void)
{
	static char line[512];
	static u32 settings[16];
	syscall6(SYS_MOUNT, (long)"proc", (long)"/proc", (long)"proc", 0, 0, 0);
	syscall6(SYS_MOUNT, (long)"dev", (long)"/dev", (long)"devtmpfs", 0, 0, 0);
	syscall3(SYS_IOCTL, 0, TCGETS, (long)settings);
	settings[3] &= ~ECHO;
	syscall3(SYS_IOCTL, 0, TCSETS, (long)settings);
	print("pyvmm: ready\n");
	for (;;) {
		char *words[ARGUMENTS];
		long n = syscall3(SYS_READ, 0, (long)line, sizeof(line) - 1);
		if (n <= 0)
			return;
		line[n - (line[n - 1] == '\n')] = 0;
		cut(line, words);
		if (!words[0])
			continue;
		if (__builtin_setjmp(failed) == 0) {
			carry_out(words);
			print("~0~\n");
		} else {
			for (long fd = 3; fd < 16; fd++)
				syscall3(SYS_CLOSE, fd, 0, 0);
			print("~1~\n");
		}
	}
}

__attribute__((used)) static void start(u64 *stack)
{
	char **argv = (char **)(stack + 1);
	int status = 1;
	make_crc_table();
	if (syscall3(SYS_GETPID, 0, 0, 0) == 1)
		serve();
	else if (stack[0] > 1 && __builtin_setjmp(failed) == 0) {
		char *words[ARGUMENTS] = {};
		for (u32 n = 0; n < ARGUMENTS - 1 && n + 1 < stack[0]; n++)
			words[n] = argv[n + 1];
		carry_out(words);
		status = 0;
	}
	for (;;)
		syscall3(SYS_EXIT, status, 0, 0);
}

__asm__(".globl _start\n_start:\n\tmov %rsp, %rdi\n\tand $-16, %rsp\n\tcall start\n");
