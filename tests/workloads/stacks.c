/*
 * Who called: 7 times each, two functions by name make the calls that cut and that map, both below a third.
 * Compiled with frame pointers and without sibling calls, so that the stack of each call is known:
 * mprotect <- guard_page <- make_arena <- main, and mmap <- make_arena <- main. Takes no arguments.
 */
#define _GNU_SOURCE
#include <stdlib.h>
#include <sys/mman.h>

#define ARENAS 7

__attribute__((noipa)) static void guard_page(char *page)
{
	if (mprotect(page, 4096, PROT_NONE))
		abort();
}

__attribute__((noipa)) static void make_arena(size_t size)
{
	char *arena = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (arena == MAP_FAILED)
		abort();
	guard_page(arena + 65536);
}

int main(void)
{
	for (int n = 0; n < ARENAS; n++)
		make_arena(1 << 20);
	return 0;
}
