/* A parser to fuzz: records of a type, a length and that many bytes. It trusts the lengths of two
 * types.
 *   gcc -O1 $(python -c 'from pyvmm import fuzz; print(*fuzz.FLAGS)') -fsanitize-coverage=trace-pc parser.c -o parser */
#include "pyvmm_fuzz.h"

/* A function of its own, so that a crash has its name. */
__attribute__((noinline)) static uint32_t sum_of(const uint8_t *bytes, size_t count)
{
	uint32_t sum = 0;
	for (size_t n = 0; n < count; n++)
		sum += bytes[n];
	return sum;
}

/* Return the number of records, or -1 for an input that is none. */
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	uint32_t sum = 0;
	int records = 0;
	for (size_t at = 0; at < size; records++) {
		if (size - at < 2)
			return -1;
		const uint8_t type = data[at], length = data[at + 1];
		at += 2;
		if (type == 'n') {
			if (size - at < length)
				return -1;
			sum += sum_of(data + at, length);
		} else if (type == 'd') {
			sum += sum_of(data + at, length); /* the bug: it reads beyond the input */
		} else if (type == 'a') {
			if (size - at < length)
				return -1;
			sum += sum_of(data + at, length) / length; /* and one more: the average of nothing */
		} else {
			return -1;
		}
		at += length;
	}
	return sum == 0xffffffff ? 0 : records;
}
