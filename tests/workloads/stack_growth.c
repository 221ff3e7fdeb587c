/* SPDX-License-Identifier: MIT */
/*
 * The stack grows by 47 faults of one page each (a touch right below its VMA), then by a recursion
 * through 131 more pages (one touch a page). 178 growths, no merge, no split, no call.
 */
#include "workload.h"

enum { TOUCHES = 47, DEEP = 131 };

/* The lower end of [stack], from maps. */
static char *stack_start(void)
{
	static char text[65536];
	unsigned long start = 0;
	ssize_t got;
	int fd = open("/proc/self/maps", O_RDONLY | O_CLOEXEC);

	while ((got = read(fd, text, sizeof(text) - 1)) > 0) {
		char *name;

		text[got] = 0;
		name = strstr(text, "[stack]");
		if (!name)
			continue;
		while (name > text && name[-1] != '\n')
			name--;
		start = strtoul(name, NULL, 16);
	}
	close(fd);
	return (char *)start;
}

/* Goes down until the frame lies below `end`, touching every page on its way. */
static int descend(char *end)
{
	volatile char frame[512];

	frame[0] = 1;
	if ((char *)frame < end)
		return frame[0];
	return descend(end) + frame[0];
}

int main(int argc, char **argv)
{
	char *low, *end;

	wl_start(argc, argv, "stack_growth");
	low = stack_start();
	for (long i = 1; i <= TOUCHES; i++) {
		*(volatile char *)(low - i * (long)wl.page) = 1;
		want.stack++;
	}
	if (stack_start() != low - TOUCHES * (long)wl.page)
		wl_die("touches");
	end = low - (TOUCHES + DEEP - 1) * (long)wl.page;
	descend(end);
	want.stack += DEEP;
	if (stack_start() != low - (TOUCHES + DEEP) * (long)wl.page)
		wl_die("recursion");
	wl_finish();
}
