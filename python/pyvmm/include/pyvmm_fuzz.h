/* The guest side of pyvmm.fuzz, for freestanding C on x86-64. One file of the program includes it,
 * and defines
 *
 *     int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
 *
 * The host boots the program up to the point where it is ready and takes a snapshot there. Then it
 * calls the function for each input. `pyvmm.fuzz.FLAGS` has the flags to compile it with.
 * docs/fuzzing.md describes the rest. */
#ifndef PYVMM_FUZZ_H
#define PYVMM_FUZZ_H

#include <stddef.h>
#include <stdint.h>

#ifndef PYVMM_FUZZ_INPUT_SIZE /* bytes for the inputs of a batch, whole pages */
#define PYVMM_FUZZ_INPUT_SIZE 0x100000
#endif
#ifndef PYVMM_FUZZ_MAP_SIZE /* counters of coverage, a power of two */
#define PYVMM_FUZZ_MAP_SIZE 0x10000
#endif
#ifndef PYVMM_FUZZ_BATCH /* inputs of a batch */
#define PYVMM_FUZZ_BATCH 256
#endif

#ifndef PYVMM_FUZZ_HEAP_SIZE /* bytes for malloc */
#define PYVMM_FUZZ_HEAP_SIZE 0x100000
#endif

#define PYVMM_FUZZ_VERSION 1
#define PYVMM_FUZZ_READY 0x64657276 /* exit codes */
#define PYVMM_FUZZ_DONE 0x656e6476

#if defined(__clang__)
#define PYVMM_FUZZ_UNCOVERED __attribute__((no_sanitize("coverage"), noinline))
#elif defined(__GNUC__) && __GNUC__ >= 12
#define PYVMM_FUZZ_UNCOVERED __attribute__((no_sanitize_coverage, noinline))
#else
#define PYVMM_FUZZ_UNCOVERED __attribute__((noinline))
#endif

#define PYVMM_FUZZ_TEXT_(x) #x
#define PYVMM_FUZZ_TEXT(x) PYVMM_FUZZ_TEXT_(x)

__attribute__((noinline)) int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
/* Called once before the program is ready, if there is one. */
__attribute__((weak)) int LLVMFuzzerInitialize(int *argc, char ***argv);

/* What the host and the program share. RDI has its address at the exit with PYVMM_FUZZ_READY. */
struct pyvmm_fuzz {
	uint64_t version;
	uint64_t input; /* the address of the input buffer */
	uint64_t input_size;
	uint64_t map; /* the address of the counters of coverage */
	uint64_t map_size;
	uint64_t most; /* inputs of a batch */
	uint32_t count; /* set by the host: how many inputs there are */
	uint32_t current; /* the one that is tested */
	uint64_t start; /* set by the host: the address of the first */
	uint32_t lengths[PYVMM_FUZZ_BATCH]; /* set by the host */
	int32_t results[PYVMM_FUZZ_BATCH];
};

/* The last of the program's pages: an access beyond an input that ends there is a page fault. */
__asm__(".section .pyvmm_fuzz_input,\"aw\",@nobits\n"
	".balign 4096\n"
	".globl pyvmm_fuzz_input\n"
	".type pyvmm_fuzz_input, @object\n"
	"pyvmm_fuzz_input: .skip " PYVMM_FUZZ_TEXT(PYVMM_FUZZ_INPUT_SIZE) "\n"
	".size pyvmm_fuzz_input, " PYVMM_FUZZ_TEXT(PYVMM_FUZZ_INPUT_SIZE) "\n"
	".text\n");
extern uint8_t pyvmm_fuzz_input[PYVMM_FUZZ_INPUT_SIZE];
static uint8_t pyvmm_fuzz_map[PYVMM_FUZZ_MAP_SIZE] __attribute__((aligned(4096)));
static struct pyvmm_fuzz pyvmm_fuzz __attribute__((aligned(4096))) = {
	.version = PYVMM_FUZZ_VERSION,
	.input = (uint64_t)pyvmm_fuzz_input,
	.input_size = PYVMM_FUZZ_INPUT_SIZE,
	.map = (uint64_t)pyvmm_fuzz_map,
	.map_size = PYVMM_FUZZ_MAP_SIZE,
	.most = PYVMM_FUZZ_BATCH,
};

static uint8_t pyvmm_fuzz_heap[PYVMM_FUZZ_HEAP_SIZE] __attribute__((aligned(4096)));
static size_t pyvmm_fuzz_heap_used;

/* The program is ready: the host takes its snapshot here. */
PYVMM_FUZZ_UNCOVERED static void pyvmm_fuzz_ready(void)
{
	__asm__ volatile("outl %0, $0xf4" : : "a"(PYVMM_FUZZ_READY), "D"(&pyvmm_fuzz) : "memory");
}

/* All inputs have been tested. It does not return: the host resets the machine. */
PYVMM_FUZZ_UNCOVERED __attribute__((noreturn)) static void pyvmm_fuzz_done(void)
{
	for (;;)
		__asm__ volatile("outl %0, $0xf4" : : "a"(PYVMM_FUZZ_DONE) : "memory");
}

PYVMM_FUZZ_UNCOVERED __attribute__((noreturn, used)) static void pyvmm_fuzz_main(void)
{
	typedef void constructor(void);
	extern constructor *const __init_array_start[] __attribute__((weak));
	extern constructor *const __init_array_end[] __attribute__((weak));
	for (constructor *const *each = __init_array_start; each < __init_array_end; each++)
		(*each)();
	if (LLVMFuzzerInitialize) {
		static char *none[1];
		char **argv = none;
		int argc = 0;
		LLVMFuzzerInitialize(&argc, &argv);
	}
	for (uint64_t n = 0; n < pyvmm_fuzz.map_size; n++)
		((volatile uint8_t *)pyvmm_fuzz.map)[n] = 0;
	pyvmm_fuzz_ready();
	volatile struct pyvmm_fuzz *shared = &pyvmm_fuzz;
	const uint8_t *input = (const uint8_t *)shared->start;
	const uint32_t count = shared->count;
	const size_t used = pyvmm_fuzz_heap_used;
	for (uint32_t n = 0; n < count; n++) {
		pyvmm_fuzz_heap_used = used; /* what an input has allocated goes with it */
		const uint32_t length = shared->lengths[n];
		shared->current = n;
		shared->results[n] = LLVMFuzzerTestOneInput(input, length);
		input += length;
	}
	pyvmm_fuzz_done();
}

__asm__(".text\n.globl _start\n.type _start, @function\n_start: xor %ebp, %ebp\ncall pyvmm_fuzz_main\n");

/* Coverage: gcc -fsanitize-coverage=trace-pc. */
PYVMM_FUZZ_UNCOVERED void __sanitizer_cov_trace_pc(void)
{
	static uint64_t before;
	/* The golden ratio spreads the addresses of small programs too. */
	const uint64_t here = ((uint64_t)__builtin_return_address(0) * 0x9e3779b97f4a7c15) >> 32;
	pyvmm_fuzz_map[(here ^ before) % PYVMM_FUZZ_MAP_SIZE]++;
	before = here >> 1;
}

/* clang -fsanitize-coverage=trace-pc-guard. */
PYVMM_FUZZ_UNCOVERED void __sanitizer_cov_trace_pc_guard_init(uint32_t *start, uint32_t *stop)
{
	static uint32_t number;
	if (start < stop && *start == 0)
		for (uint32_t *guard = start; guard < stop; guard++)
			*guard = ++number % PYVMM_FUZZ_MAP_SIZE;
}

PYVMM_FUZZ_UNCOVERED void __sanitizer_cov_trace_pc_guard(uint32_t *guard)
{
	pyvmm_fuzz_map[*guard]++;
}

/* clang -fsanitize-coverage=inline-8bit-counters: the counters are the map. They are all in one
 * section. */
PYVMM_FUZZ_UNCOVERED void __sanitizer_cov_8bit_counters_init(char *start, char *stop)
{
	pyvmm_fuzz.map = (uint64_t)start;
	pyvmm_fuzz.map_size = (uint64_t)(stop - start);
}

PYVMM_FUZZ_UNCOVERED void __sanitizer_cov_pcs_init(const uintptr_t *start, const uintptr_t *stop)
{
	(void)start;
	(void)stop;
}

/* Functions that compilers call implicitly, or that most parsers need. The program's own
 * definitions replace these. */
#define PYVMM_FUZZ_LIBC PYVMM_FUZZ_UNCOVERED __attribute__((weak))

PYVMM_FUZZ_LIBC void *memcpy(void *restrict to, const void *restrict from, size_t count)
{
	void *at = to;
	__asm__ volatile("rep movsb" : "+D"(at), "+S"(from), "+c"(count) : : "memory");
	return to;
}

PYVMM_FUZZ_LIBC void *memmove(void *to, const void *from, size_t count)
{
	if ((uintptr_t)to - (uintptr_t)from >= count)
		return memcpy(to, from, count);
	const uint8_t *last = (const uint8_t *)from + count - 1;
	uint8_t *at = (uint8_t *)to + count - 1;
	__asm__ volatile("std; rep movsb; cld" : "+D"(at), "+S"(last), "+c"(count) : : "memory");
	return to;
}

PYVMM_FUZZ_LIBC void *memset(void *to, int value, size_t count)
{
	void *at = to;
	__asm__ volatile("rep stosb" : "+D"(at), "+c"(count) : "a"(value) : "memory");
	return to;
}

PYVMM_FUZZ_LIBC int memcmp(const void *one, const void *other, size_t count)
{
	for (const uint8_t *a = one, *b = other; count; a++, b++, count--)
		if (*a != *b)
			return *a - *b;
	return 0;
}

PYVMM_FUZZ_LIBC size_t strlen(const char *text)
{
	size_t length = 0;
	while (text[length])
		length++;
	return length;
}

PYVMM_FUZZ_LIBC int strcmp(const char *one, const char *other)
{
	while (*one && *one == *other)
		one++, other++;
	return *(const uint8_t *)one - *(const uint8_t *)other;
}

PYVMM_FUZZ_LIBC __attribute__((noreturn)) void abort(void)
{
	__builtin_trap();
}

/* A heap that only grows: `free` does nothing, and everything that an input allocates is released
 * when it ends. The size of a block precedes it. */
PYVMM_FUZZ_LIBC void *malloc(size_t size)
{
	if (size > PYVMM_FUZZ_HEAP_SIZE - 32 || pyvmm_fuzz_heap_used > PYVMM_FUZZ_HEAP_SIZE - 32 - size)
		return 0;
	uint8_t *block = pyvmm_fuzz_heap + pyvmm_fuzz_heap_used + 16;
	((size_t *)block)[-1] = size;
	pyvmm_fuzz_heap_used += 16 + ((size + 15) & ~(size_t)15);
	return block;
}

PYVMM_FUZZ_LIBC void free(void *block)
{
	(void)block;
}

PYVMM_FUZZ_LIBC void *calloc(size_t count, size_t size)
{
	size_t bytes;
	void *block = __builtin_mul_overflow(count, size, &bytes) ? 0 : malloc(bytes);
	return block ? memset(block, 0, bytes) : 0;
}

PYVMM_FUZZ_LIBC void *realloc(void *block, size_t size)
{
	if (!block)
		return malloc(size);
	const size_t before = ((size_t *)block)[-1];
	void *larger = malloc(size);
	return larger ? memcpy(larger, block, before < size ? before : size) : 0;
}

#endif
