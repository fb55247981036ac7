/* The physical limit of a fuzz target: the same guest, inputs and resets by bare ioctls, with
 * nothing else. */

#include "bare.h"

enum { MAX_PAGES = 1024 };
/* Offsets in struct pyvmm_fuzz. */
enum { COUNT = 48, CURRENT = 52, START = 56, LENGTHS = 64 };

static int create(struct machine *m, const void *image)
{
	static struct {
		struct kvm_cpuid2 head;
		struct kvm_cpuid_entry2 entries[ENTRIES];
	} supported;
	m->memory = mmap(NULL, m->size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (m->memory == MAP_FAILED)
		return -1;
	memcpy(m->memory, image, m->size);
	supported.head.nent = ENTRIES;
	return build(m) < 0 || ioctl(m->kvm, KVM_GET_SUPPORTED_CPUID, &supported) < 0 ||
	       ioctl(m->vcpu, KVM_SET_CPUID2, &supported) < 0 ? -1 : 0;
}

static int run(struct machine *m)
{
	if (ioctl(m->vcpu, KVM_RUN, 0) < 0 || m->run->exit_reason != KVM_EXIT_IO || m->run->io.port != EXIT_PORT)
		return -1;
	/* Complete the access: it must not change the registers that are set next. */
	settle(m);
	return 0;
}

/* The seconds of `batches` batches of these inputs, which are stored one after the other at
 * `input`. A first batch, which is not counted, finds the pages that a batch changes. `results`
 * receives the results of the last one. */
double time_batches(const uint8_t *image, uint64_t size, struct kvm_regs *regs, struct kvm_sregs *sregs, uint64_t shared,
	uint64_t input, const uint8_t *inputs, const uint32_t *lengths, int count, int most, int batches, int32_t *results)
{
	struct machine m = { .size = size };
	uint64_t dirty[MAX_PAGES], total = 0;
	int pages = 0;
	double start = 0;
	if (create(&m, image) < 0 || ioctl(m.vcpu, KVM_SET_SREGS, sregs) < 0)
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
				if (pages == MAX_PAGES)
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
