/* The physical limit of a fuzz target: the same guest, inputs and resets by hand, with as little as they need. */

#include <fcntl.h>
#include <linux/kvm.h>
#include <stdint.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum { EXIT_PORT = 0xf4, PAGE = 4096, ENTRIES = 256, MOST_PAGES = 1024 };
/* Offsets in struct pyvmm_fuzz. */
enum { COUNT = 48, CURRENT = 52, START = 56, LENGTHS = 64 };

static double now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec + t.tv_nsec * 1e-9;
}

struct machine {
	int kvm, vm, vcpu, run_size;
	struct kvm_run *run;
	uint8_t *memory;
	uint64_t size;
};

static int build(struct machine *m, const void *image)
{
	static struct {
		struct kvm_cpuid2 head;
		struct kvm_cpuid_entry2 entries[ENTRIES];
	} supported;
	uint64_t identity = 0xfeffc000;
	m->memory = mmap(NULL, m->size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	m->kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	supported.head.nent = ENTRIES;
	if (m->memory == MAP_FAILED || m->kvm < 0 || ioctl(m->kvm, KVM_GET_SUPPORTED_CPUID, &supported) < 0)
		return -1;
	memcpy(m->memory, image, m->size);
	m->vm = ioctl(m->kvm, KVM_CREATE_VM, 0);
	struct kvm_userspace_memory_region region = { .memory_size = m->size, .userspace_addr = (uint64_t)m->memory };
	if (m->vm < 0 || ioctl(m->vm, KVM_SET_IDENTITY_MAP_ADDR, &identity) < 0 ||
	    ioctl(m->vm, KVM_SET_TSS_ADDR, 0xfeffd000) < 0 || ioctl(m->vm, KVM_SET_USER_MEMORY_REGION, &region) < 0)
		return -1;
	m->vcpu = ioctl(m->vm, KVM_CREATE_VCPU, 0);
	m->run_size = ioctl(m->kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
	m->run = mmap(NULL, m->run_size, PROT_READ | PROT_WRITE, MAP_SHARED, m->vcpu, 0);
	return m->run == MAP_FAILED || ioctl(m->vcpu, KVM_SET_CPUID2, &supported) < 0 ? -1 : 0;
}

static void destroy(struct machine *m)
{
	munmap(m->run, m->run_size);
	close(m->vcpu);
	close(m->vm);
	close(m->kvm);
	munmap(m->memory, m->size);
}

static int run(struct machine *m)
{
	if (ioctl(m->vcpu, KVM_RUN, 0) < 0 || m->run->exit_reason != KVM_EXIT_IO || m->run->io.port != EXIT_PORT)
		return -1;
	/* Complete the access: it must not change the registers that are set next. */
	m->run->immediate_exit = 1;
	ioctl(m->vcpu, KVM_RUN, 0);
	m->run->immediate_exit = 0;
	return 0;
}

/* The seconds of so many batches of these inputs, which lie one behind the other from `input` on. The pages that a batch
 * changes are found by the first one, which does not count. The results of the last one are left in `results`. */
double time_batches(const uint8_t *image, uint64_t size, struct kvm_regs *regs, struct kvm_sregs *sregs, uint64_t shared,
	uint64_t input, const uint8_t *inputs, const uint32_t *lengths, int count, int most, int batches, int32_t *results)
{
	struct machine m = { .size = size };
	uint64_t dirty[MOST_PAGES], total = 0;
	int pages = 0;
	double start = 0;
	if (build(&m, image) < 0 || ioctl(m.vcpu, KVM_SET_SREGS, sregs) < 0)
		return -1;
	for (int n = 0; n < count; n++)
		total += lengths[n];
	for (int batch = -1; batch < batches; batch++) {
		if (batch == 0)
			start = now();
		uint32_t head[2] = { count, 0 };
		memcpy(m.memory + input, inputs, total);
		memcpy(m.memory + shared + LENGTHS, lengths, 4 * count);
		memcpy(m.memory + shared + COUNT, head, sizeof(head));
		memcpy(m.memory + shared + START, &input, sizeof(input));
		if (ioctl(m.vcpu, KVM_SET_REGS, regs) < 0 || run(&m) < 0)
			return -1;
		memcpy(results, m.memory + shared + LENGTHS + 4 * most, 4 * count);
		for (uint64_t at = 0; batch < 0 && at < size; at += PAGE)
			if (memcmp(m.memory + at, image + at, PAGE)) {
				if (pages == MOST_PAGES)
					return -1;
				dirty[pages++] = at;
			}
		for (int n = 0; n < pages; n++)
			memcpy(m.memory + dirty[n], image + dirty[n], PAGE);
		if (ioctl(m.vcpu, KVM_SET_SREGS, sregs) < 0)
			return -1;
	}
	double seconds = now() - start;
	destroy(&m);
	return seconds;
}
