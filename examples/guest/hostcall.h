/* The guest side of pyvmm hostcalls, for freestanding C on x86, 32 or 64 bits. Addresses are
 * guest-physical: the code assumes that guest memory is identity-mapped. pyvmm.hostcalls describes
 * the block. */
#ifndef PYVMM_HOSTCALL_H
#define PYVMM_HOSTCALL_H

#include <stdint.h>

enum { PYVMM_HOSTCALL_PORT = 0x7076 };
enum pyvmm_kind { PYVMM_UNSIGNED, PYVMM_SIGNED, PYVMM_BYTES, PYVMM_BUFFER };
enum pyvmm_status {
	PYVMM_OK,
	PYVMM_BAD_BLOCK,
	PYVMM_NO_SUCH_FUNCTION,
	PYVMM_BAD_ARGUMENT,
	PYVMM_BAD_MEMORY,
	PYVMM_BAD_RESULT,
	PYVMM_FAILED
};

struct pyvmm_argument {
	uint32_t kind;
	uint32_t length; /* of bytes or a buffer */
	uint64_t value; /* or the address of bytes or a buffer */
};

struct pyvmm_call {
	uint32_t number;
	uint32_t status; /* set by the host */
	int64_t result; /* set by the host */
	uint32_t count;
	uint32_t zero;
	struct pyvmm_argument arguments[6];
};

static inline struct pyvmm_argument pyvmm_number(uint64_t value)
{
	return (struct pyvmm_argument){ PYVMM_UNSIGNED, 0, value };
}

static inline struct pyvmm_argument pyvmm_bytes(const void *start, uint32_t length)
{
	return (struct pyvmm_argument){ PYVMM_BYTES, length, (uintptr_t)start };
}

static inline struct pyvmm_argument pyvmm_buffer(void *start, uint32_t length)
{
	return (struct pyvmm_argument){ PYVMM_BUFFER, length, (uintptr_t)start };
}

/* Make the call and return its status. After PYVMM_OK or PYVMM_FAILED, call->result is set. */
static inline uint32_t pyvmm_hostcall(struct pyvmm_call *call)
{
	__asm__ volatile("outl %0, %1"
			 :
			 : "a"((uint32_t)(uintptr_t)call), "d"((uint16_t)PYVMM_HOSTCALL_PORT)
			 : "memory");
	return call->status;
}

#endif
