/* The physical limit: a machine by raw ioctls and nothing else, in the same process. */

#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>

#include "bare.h"

enum { MEMORY = 1 << 20, START = 0x1000 };

static struct kvm_cpuid2 *cpuid_of(int kvm)
{
	static struct kvm_cpuid2 *table;
	if (!table) {
		table = calloc(1, sizeof(*table) + ENTRIES * sizeof(struct kvm_cpuid_entry2));
		table->nent = ENTRIES;
		if (ioctl(kvm, KVM_GET_SUPPORTED_CPUID, table) < 0)
			return NULL;
	}
	return table;
}

static int create(struct machine *m, const void *code, int size)
{
	struct kvm_sregs sregs;
	struct kvm_regs regs = { .rip = START, .rsp = START, .rflags = 2 };
	m->size = MEMORY;
	m->memory = mmap(NULL, MEMORY, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	memcpy(m->memory + START, code, size);
	if (build(m) < 0 || ioctl(m->vcpu, KVM_SET_CPUID2, cpuid_of(m->kvm)) < 0 ||
	    ioctl(m->vcpu, KVM_GET_SREGS, &sregs) < 0)
		return -1;
	sregs.cs.base = 0;
	sregs.cs.selector = 0;
	return ioctl(m->vcpu, KVM_SET_SREGS, &sregs) < 0 || ioctl(m->vcpu, KVM_SET_REGS, &regs) < 0 ? -1 : 0;
}

/* Run to a write of the exit port; returns how many exits there were before it. */
static long run(struct machine *m)
{
	for (long exits = 0;; exits++) {
		if (ioctl(m->vcpu, KVM_RUN, 0) < 0)
			return -1;
		if (m->run->exit_reason == KVM_EXIT_MMIO) {
			memset(m->run->mmio.data, 0, sizeof(m->run->mmio.data));
			continue;
		}
		if (m->run->exit_reason != KVM_EXIT_IO)
			return -1;
		if (m->run->io.direction == KVM_EXIT_IO_IN)
			memset((char *)m->run + m->run->io.data_offset, 0x60, m->run->io.size * m->run->io.count);
		else if (m->run->io.port == EXIT_PORT)
			return exits;
	}
}

/* Seconds that one run takes, without making the machine. Negative on failure. */
double time_run(const void *code, int size)
{
	struct machine m;
	if (create(&m, code, size) < 0)
		return -1;
	double start = now();
	long exits = run(&m);
	double seconds = now() - start;
	destroy(&m);
	return exits < 0 ? -1 : seconds;
}

static void *run_in_thread(void *m)
{
	return (void *)run(m);
}

/* The seconds to create, run and destroy `cycles` machines, optionally with a new thread for each
 * run. Negative on failure. */
double time_cycles(const void *code, int size, int cycles, int threads)
{
	double start = now();
	for (int i = 0; i < cycles; i++) {
		struct machine m;
		pthread_t thread;
		void *exits;
		if (create(&m, code, size) < 0)
			return -1;
		if (!threads)
			exits = (void *)run(&m);
		else if (pthread_create(&thread, NULL, run_in_thread, &m) || pthread_join(thread, &exits))
			return -1;
		if ((long)exits < 0)
			return -1;
		destroy(&m);
	}
	return now() - start;
}

/* A vCPU's thread that a kicker brings out of the guest and sends in again. */
struct runner {
	struct machine machine;
	pthread_mutex_t lock;
	pthread_cond_t changed;
	int is_out, go, leave;
};

static void ignore(int signal)
{
	(void)signal;
}

static void *run_until_told(void *argument)
{
	struct runner *r = argument;
	for (;;) {
		ioctl(r->machine.vcpu, KVM_RUN, 0);
		pthread_mutex_lock(&r->lock);
		r->is_out = 1;
		pthread_cond_broadcast(&r->changed);
		while (!r->go && !r->leave)
			pthread_cond_wait(&r->changed, &r->lock);
		r->go = 0;
		r->is_out = 0;
		pthread_mutex_unlock(&r->lock);
		if (r->leave)
			return NULL;
	}
}

/* The seconds from each kick of a guest (immediate_exit and a signal) until it has left, with a
 * pause of some microseconds before each kick. Negative on failure. */
double time_kicks(const void *code, int size, int kicks, int microseconds, double *seconds)
{
	struct runner r = { .lock = PTHREAD_MUTEX_INITIALIZER, .changed = PTHREAD_COND_INITIALIZER };
	struct sigaction action = { .sa_handler = ignore }, previous;
	pthread_t thread;
	if (create(&r.machine, code, size) < 0 || sigaction(SIGUSR2, &action, &previous) < 0 ||
	    pthread_create(&thread, NULL, run_until_told, &r))
		return -1;
	for (int i = 0; i < kicks; i++) {
		for (double until = now() + microseconds * 1e-6; now() < until;)
			;
		double start = now();
		__atomic_store_n(&r.machine.run->immediate_exit, 1, __ATOMIC_SEQ_CST);
		pthread_kill(thread, SIGUSR2);
		pthread_mutex_lock(&r.lock);
		while (!r.is_out)
			pthread_cond_wait(&r.changed, &r.lock);
		seconds[i] = now() - start;
		__atomic_store_n(&r.machine.run->immediate_exit, 0, __ATOMIC_SEQ_CST);
		r.is_out = 0;
		r.go = i < kicks - 1;
		r.leave = i == kicks - 1;
		pthread_cond_broadcast(&r.changed);
		pthread_mutex_unlock(&r.lock);
	}
	pthread_join(thread, NULL);
	sigaction(SIGUSR2, &previous, NULL);
	destroy(&r.machine);
	return 0;
}

/* The seconds of a run whose guest writes to the port of an ioeventfd. An epoll loop on this thread
 * answers by adding one to the word at 0x2000. Negative on failure. */
double time_rings(const void *code, int size, int port, int rings)
{
	struct machine m;
	pthread_t thread;
	void *exits;
	int bell = eventfd(0, EFD_NONBLOCK), set = epoll_create1(0);
	struct epoll_event event = { .events = EPOLLIN };
	if (create(&m, code, size) < 0 || epoll_ctl(set, EPOLL_CTL_ADD, bell, &event) < 0)
		return -1;
	struct kvm_ioeventfd ring = { .addr = port, .fd = bell, .flags = KVM_IOEVENTFD_FLAG_PIO };
	if (ioctl(m.vm, KVM_IOEVENTFD, &ring) < 0)
		return -1;
	double start = now();
	if (pthread_create(&thread, NULL, run_in_thread, &m))
		return -1;
	for (int left = rings; left > 0;) {
		uint64_t count;
		if (epoll_wait(set, &event, 1, -1) == 1 && read(bell, &count, sizeof(count)) == sizeof(count)) {
			__atomic_add_fetch((uint16_t *)((char *)m.memory + 0x2000), 1, __ATOMIC_SEQ_CST);
			left -= count;
		}
	}
	pthread_join(thread, &exits);
	double seconds = now() - start;
	destroy(&m);
	close(bell);
	close(set);
	return (long)exits < 0 ? -1 : seconds;
}

/* Create `count` machines with a page of memory and one vCPU, run each to its exit, and keep them.
 * */
double leave_machines(const void *code, int size, int count)
{
	for (int i = 0; i < count; i++) {
		struct machine m;
		if (create(&m, code, size) < 0 || run(&m) < 0)
			return -1;
	}
	return 0;
}
