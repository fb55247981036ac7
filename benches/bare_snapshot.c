/* The physical limits of snapshots: the same ioctls, mappings and copies in bare C, in the same
 * process. */

#define _GNU_SOURCE
#include <pthread.h>
#include <stdlib.h>
#include <sys/syscall.h>

#include "bare.h"

enum { START = 0x1000, MSRS = 256 };
/* How memory comes back. */
enum { MEMCPY, DROP, LOG };
/* How a vCPU's state is restored: each class by its ioctl; all of it in the fewest calls; or only
 * the state in the run page, which is enough for a guest that changes nothing else. */
enum { EACH, FEWEST, LEAN };

struct page_region {
	uint64_t start, end, categories;
};

struct pm_scan {
	uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages, inverted, mask, anyof, returned;
};

#define PAGEMAP_SCAN_IOCTL _IOWR('f', 16, struct pm_scan)

static int compare(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;
	return (x > y) - (x < y);
}

static double median(double *values, int count)
{
	qsort(values, count, sizeof(*values), compare);
	return values[count / 2];
}

struct state {
	struct kvm_mp_state mp;
	struct kvm_regs regs;
	struct kvm_sregs sregs;
	struct kvm_xsave xsave;
	struct kvm_xcrs xcrs;
	struct kvm_debugregs debug;
	struct kvm_vcpu_events events;
	struct kvm_clock_data clock;
	struct {
		struct kvm_msrs head;
		struct kvm_msr_entry entries[MSRS];
	} msrs;
	struct {
		struct kvm_cpuid2 head;
		struct kvm_cpuid_entry2 entries[ENTRIES];
	} cpuid;
};

static struct {
	struct kvm_cpuid2 head;
	struct kvm_cpuid_entry2 entries[ENTRIES];
} supported;

static uint32_t msr_list[MSRS];
static int msr_count;

static int learn(int kvm)
{
	static struct {
		struct kvm_msr_list head;
		uint32_t indices[1024];
	} list;
	if (msr_count)
		return 0;
	supported.head.nent = ENTRIES;
	list.head.nmsrs = 1024;
	if (ioctl(kvm, KVM_GET_SUPPORTED_CPUID, &supported) < 0 || ioctl(kvm, KVM_GET_MSR_INDEX_LIST, &list) < 0)
		return -1;
	for (unsigned i = 0; i < list.head.nmsrs && msr_count < MSRS; i++)
		msr_list[msr_count++] = list.indices[i];
	return 0;
}

static int create(struct machine *m, const void *code, int size, uint64_t memory)
{
	struct kvm_sregs sregs;
	struct kvm_regs regs = { .rip = START, .rsp = START, .rflags = 2 };
	m->size = memory;
	m->memfd = memfd_create("bare", MFD_CLOEXEC);
	if (m->memfd < 0 || ftruncate(m->memfd, memory) < 0)
		return -1;
	m->memory = mmap(NULL, memory, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, m->memfd, 0);
	memcpy(m->memory + START, code, size);
	if (build(m) < 0 || learn(m->kvm) < 0 || ioctl(m->vcpu, KVM_SET_CPUID2, &supported) < 0 ||
	    ioctl(m->vcpu, KVM_GET_SREGS, &sregs) < 0)
		return -1;
	sregs.cs.base = 0;
	sregs.cs.selector = 0;
	return ioctl(m->vcpu, KVM_SET_SREGS, &sregs) < 0 || ioctl(m->vcpu, KVM_SET_REGS, &regs) < 0 ? -1 : 0;
}

static void discard(struct machine *m)
{
	destroy(m);
	close(m->memfd);
}

static int run(struct machine *m)
{
	for (;;) {
		if (ioctl(m->vcpu, KVM_RUN, 0) < 0)
			return -1;
		if (m->run->exit_reason == KVM_EXIT_IO && m->run->io.port == EXIT_PORT)
			break;
		if (m->run->exit_reason != KVM_EXIT_IO)
			return -1;
	}
	return 0;
}

static int get(struct machine *m, struct state *s)
{
	s->cpuid.head.nent = ENTRIES;
	if (ioctl(m->vcpu, KVM_GET_CPUID2, &s->cpuid) < 0 || ioctl(m->vcpu, KVM_GET_MP_STATE, &s->mp) < 0 ||
	    ioctl(m->vcpu, KVM_GET_REGS, &s->regs) < 0 || ioctl(m->vcpu, KVM_GET_SREGS, &s->sregs) < 0 ||
	    ioctl(m->vcpu, KVM_GET_XSAVE, &s->xsave) < 0 || ioctl(m->vcpu, KVM_GET_XCRS, &s->xcrs) < 0 ||
	    ioctl(m->vcpu, KVM_GET_DEBUGREGS, &s->debug) < 0)
		return -1;
	static int is_learnt;
	for (;;) {
		memset(&s->msrs.head, 0, sizeof(s->msrs.head));
		s->msrs.head.nmsrs = msr_count;
		for (int i = 0; i < msr_count; i++)
			s->msrs.entries[i].index = msr_list[i];
		int found = ioctl(m->vcpu, KVM_GET_MSRS, &s->msrs);
		if (found < 0)
			return -1;
		/* KVM gives some registers that it does not take: what is set has to be all of the list. */
		if (found == msr_count && !is_learnt)
			found = ioctl(m->vcpu, KVM_SET_MSRS, &s->msrs);
		if (found < 0)
			return -1;
		if (found == msr_count)
			break;
		memmove(&msr_list[found], &msr_list[found + 1], (--msr_count - found) * sizeof(*msr_list));
	}
	is_learnt = 1;
	return ioctl(m->vcpu, KVM_GET_VCPU_EVENTS, &s->events) < 0 || ioctl(m->vm, KVM_GET_CLOCK, &s->clock) < 0 ? -1 : 0;
}

static int set_msrs(struct machine *m, struct state *s)
{
	return ioctl(m->vcpu, KVM_SET_MSRS, &s->msrs) == (int)s->msrs.head.nmsrs ? 0 : -1;
}

static int set(struct machine *m, struct state *s)
{
	struct kvm_clock_data clock = { .clock = s->clock.clock };
	if (ioctl(m->vcpu, KVM_SET_MP_STATE, &s->mp) < 0 || ioctl(m->vcpu, KVM_SET_REGS, &s->regs) < 0 ||
	    ioctl(m->vcpu, KVM_SET_SREGS, &s->sregs) < 0 || ioctl(m->vcpu, KVM_SET_XSAVE, &s->xsave) < 0 ||
	    ioctl(m->vcpu, KVM_SET_XCRS, &s->xcrs) < 0 || ioctl(m->vcpu, KVM_SET_DEBUGREGS, &s->debug) < 0 ||
	    set_msrs(m, s) < 0 || ioctl(m->vcpu, KVM_SET_VCPU_EVENTS, &s->events) < 0)
		return -1;
	return ioctl(m->vm, KVM_SET_CLOCK, &clock);
}

/* The next KVM_RUN takes registers, special registers and events from the run page. */
static int set_state(struct machine *m, struct state *s, int state)
{
	struct kvm_clock_data clock = { .clock = s->clock.clock };
	if (state == EACH)
		return set(m, s);
	m->run->s.regs.regs = s->regs;
	m->run->s.regs.sregs = s->sregs;
	m->run->s.regs.events = s->events;
	m->run->cr8 = s->sregs.cr8;
	m->run->kvm_dirty_regs = KVM_SYNC_X86_REGS | KVM_SYNC_X86_SREGS | KVM_SYNC_X86_EVENTS;
	if (state == LEAN)
		return 0;
	if (ioctl(m->vcpu, KVM_SET_XSAVE, &s->xsave) < 0 || ioctl(m->vcpu, KVM_SET_XCRS, &s->xcrs) < 0 ||
	    ioctl(m->vcpu, KVM_SET_DEBUGREGS, &s->debug) < 0 || set_msrs(m, s) < 0)
		return -1;
	return ioctl(m->vm, KVM_SET_CLOCK, &clock);
}

static int freeze(struct machine *m)
{
	int flags = MAP_PRIVATE | MAP_FIXED | MAP_NORESERVE;
	return mmap(m->memory, m->size, PROT_READ | PROT_WRITE, flags, m->memfd, 0) == MAP_FAILED ? -1 : 0;
}

/* The seconds to get the state of one vCPU and to remap memory, of which `touched` bytes are in
 * use. */
double time_snapshot(const void *code, int size, uint64_t memory, uint64_t touched)
{
	struct machine m;
	static struct state s;
	if (create(&m, code, size, memory) < 0 || get(&m, &s) < 0)
		return -1;
	memset(m.memory + 2 * PAGE, 1, touched - 2 * PAGE);
	double start = now();
	int failed = get(&m, &s) < 0 || freeze(&m) < 0;
	double seconds = now() - start;
	discard(&m);
	return failed ? -1 : seconds;
}

/* The seconds of a memcpy of this size to newly mapped memory. */
double time_copy(uint64_t size)
{
	int access = PROT_READ | PROT_WRITE, flags = MAP_PRIVATE | MAP_ANONYMOUS;
	char *from = mmap(NULL, size, access, flags, -1, 0), *to = mmap(NULL, size, access, flags, -1, 0);
	memset(from, 1, size);
	double start = now();
	memcpy(to, from, size);
	double seconds = now() - start;
	munmap(from, size);
	munmap(to, size);
	return seconds;
}

static void *run_in_thread(void *m)
{
	run(m);
	return NULL;
}

/* The median seconds of a fork: create a machine, map its memory, set its state and run it to an
 * exit, optionally in a new thread. */
double time_forks(const void *code, int size, uint64_t memory, int forks, int threads)
{
	struct machine m;
	static struct state s;
	if (create(&m, code, size, memory) < 0 || run(&m) < 0)
		return -1;
	settle(&m);
	if (get(&m, &s) < 0 || freeze(&m) < 0)
		return -1;
	double seconds[forks];
	for (int i = 0; i < forks; i++) {
		struct machine f = { .size = memory };
		double start = now();
		f.memory = mmap(NULL, memory, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_NORESERVE, m.memfd, 0);
		if (build(&f) < 0 || ioctl(f.vcpu, KVM_SET_CPUID2, &s.cpuid) < 0 || set(&f, &s) < 0)
			return -1;
		pthread_t thread;
		if (!threads ? run(&f) < 0 : pthread_create(&thread, NULL, run_in_thread, &f) || pthread_join(thread, NULL))
			return -1;
		seconds[i] = now() - start;
		destroy(&f);
	}
	discard(&m);
	return median(seconds, forks);
}

/* The guest writes its pages and is reset: by copying the pages written since the snapshot, by
 * dropping them, or by the dirty log. Returns the median seconds of the resets. `running` receives
 * those of the runs, including the completion of the last access unless the loop is lean, and
 * `whole` those of both together. */
double time_resets(const void *code, int size, uint64_t memory, int resets, int how, int state, int pages,
		   double *running, double *whole)
{
	struct machine m;
	static struct state s;
	static struct page_region found[512];
	static uint64_t bitmap[1 << 16];
	int pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	if (create(&m, code, size, memory) < 0 || get(&m, &s) < 0 || freeze(&m) < 0 || pagemap < 0)
		return -1;
	char *golden = mmap(NULL, memory, PROT_READ, MAP_PRIVATE | MAP_NORESERVE, m.memfd, 0);
	struct kvm_userspace_memory_region region = { .memory_size = memory, .userspace_addr = (uint64_t)m.memory,
		.flags = how == LOG ? KVM_MEM_LOG_DIRTY_PAGES : 0 };
	if (how == LOG && ioctl(m.vm, KVM_SET_USER_MEMORY_REGION, &region) < 0)
		return -1;
	double seconds[resets], runs[resets], both[resets];
	for (int i = -1; i < resets; i++) {
		double start = now();
		if (run(&m) < 0)
			return -1;
		/* What real mode does not reach. */
		for (int page = 200; page < pages; page++)
			m.memory[0x200000 + (uint64_t)page * PAGE] ^= 1;
		if (state != LEAN)
			settle(&m);
		double middle = now();
		if (how == LOG) {
			struct kvm_dirty_log log = { .dirty_bitmap = bitmap };
			if (ioctl(m.vm, KVM_GET_DIRTY_LOG, &log) < 0)
				return -1;
			for (uint64_t word = 0; word < memory / PAGE / 64; word++)
				for (uint64_t left = bitmap[word]; left; left &= left - 1) {
					uint64_t at = (word * 64 + __builtin_ctzll(left)) * PAGE;
					memcpy(m.memory + at, golden + at, PAGE);
				}
		} else {
			struct pm_scan scan = { .size = sizeof(scan), .start = (uint64_t)m.memory,
				.end = (uint64_t)m.memory + memory, .vec = (uint64_t)found, .vec_len = 512,
				.inverted = 4 | 32, .mask = 4 | 32, .anyof = 8 | 16 };
			while (scan.start < scan.end) {
				int count = ioctl(pagemap, PAGEMAP_SCAN_IOCTL, &scan);
				if (count < 0)
					return -1;
				for (int r = 0; r < count; r++) {
					uint64_t at = found[r].start - (uint64_t)m.memory, length = found[r].end - found[r].start;
					if (how == DROP)
						madvise(m.memory + at, length, MADV_DONTNEED);
					else
						for (uint64_t page = at; page < at + length; page += PAGE)
							if (memcmp(m.memory + page, golden + page, PAGE))
								memcpy(m.memory + page, golden + page, PAGE);
				}
				scan.start = scan.walk_end;
			}
		}
		if (set_state(&m, &s, state) < 0)
			return -1;
		double end = now();
		if (i >= 0) {
			seconds[i] = end - middle;
			runs[i] = middle - start;
			both[i] = end - start;
		}
	}
	munmap(golden, memory);
	close(pagemap);
	discard(&m);
	*running = median(runs, resets);
	*whole = median(both, resets);
	return median(seconds, resets);
}
