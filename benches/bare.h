/* What the bare loops share: a machine by raw ioctls, in the same process. */

#include <fcntl.h>
#include <linux/kvm.h>
#include <stdint.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum { EXIT_PORT = 0xf4, PAGE = 4096, ENTRIES = 256 };

struct machine {
	int kvm, vm, vcpu, run_size, memfd; /* what memory is a mapping of, if it is one of a file */
	struct kvm_run *run;
	char *memory;
	uint64_t size;
};

static double now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec + t.tv_nsec * 1e-9;
}

/* Complete the last access, so that the registers are those behind it. */
static inline void settle(struct machine *m)
{
	m->run->immediate_exit = 1;
	ioctl(m->vcpu, KVM_RUN, 0);
	m->run->immediate_exit = 0;
}

/* A machine over its memory, whose vCPU has no CPUID yet. */
static int build(struct machine *m)
{
	uint64_t identity = 0xfeffc000;
	struct kvm_userspace_memory_region region = { .memory_size = m->size, .userspace_addr = (uint64_t)m->memory };
	m->kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	if (m->kvm < 0 || ioctl(m->kvm, KVM_GET_API_VERSION, 0) != 12)
		return -1;
	m->vm = ioctl(m->kvm, KVM_CREATE_VM, 0);
	if (m->vm < 0 || ioctl(m->vm, KVM_SET_IDENTITY_MAP_ADDR, &identity) < 0 ||
	    ioctl(m->vm, KVM_SET_TSS_ADDR, 0xfeffd000) < 0 || ioctl(m->vm, KVM_SET_USER_MEMORY_REGION, &region) < 0)
		return -1;
	m->vcpu = ioctl(m->vm, KVM_CREATE_VCPU, 0);
	m->run_size = ioctl(m->kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
	m->run = mmap(NULL, m->run_size, PROT_READ | PROT_WRITE, MAP_SHARED, m->vcpu, 0);
	return m->run == MAP_FAILED ? -1 : 0;
}

static void destroy(struct machine *m)
{
	munmap(m->run, m->run_size);
	close(m->vcpu);
	close(m->vm);
	close(m->kvm);
	munmap(m->memory, m->size);
}
